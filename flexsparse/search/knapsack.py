"""One candidate for each head under a budget of blocks: the multiple-choice knapsack, exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.errors import MaskError

LARGEST_TABLE = 1 << 27  # entries; above, costs are counted in larger units


class Assignment(NamedTuple):
    """A candidate for each slot.

    choice: for each slot, the place of its candidate
    cost: of all slots together
    loss: of all slots together
    bound: no assignment within the budget has a smaller loss; equal to loss where it is exact
    """

    choice: tuple[int, ...]
    cost: int
    loss: float
    bound: float


def assign(losses: Tensor, costs: Tensor, budget: int) -> Assignment:
    """The assignment of the smallest total loss whose total cost is within a budget.

    Dynamic programming over the budget: exact, slots x candidates x budget steps. A table of more
    than 2^27 entries is avoided by counting costs in larger units, rounded up, so that the budget
    still holds; `bound` then says how much better any assignment could be.

    >>> assign(torch.tensor([[0.0, 1.0], [0.0, 5.0]]), torch.tensor([[9, 1], [9, 1]]), 10).choice
    (1, 0)

    Args:
        losses: float[slots, candidates].
        costs: int[slots, candidates], 0 or more.
        budget: of all slots together.

    Raises:
        MaskError: even the cheapest candidates exceed the budget.
    """
    return fewest_changes(losses, costs, budget, None, 0)[-1]


def fewest_changes(
    losses: Tensor, costs: Tensor, budget: int, current: Tensor | None, most: int
) -> list[Assignment]:
    """`assign` with at most 1, 2, ... `most` slots that differ from `current`; `most` is last.

    Without `current` there is one entry, free to change everything. Numbers of changes at which
    the budget cannot be met are left out.
    """
    losses, costs = losses.double().cpu(), costs.long().cpu()
    cheapest = int(costs.min(1).values.sum())
    if cheapest > budget:
        raise MaskError(
            f"The cheapest candidates of all heads compute {cheapest:,} blocks together, and the "
            f"budget is {budget:,}. Raise the density, or add cheaper candidates."
        )
    slots, n = losses.shape
    layers = 1 if current is None else most + 1
    unit = -(-slots * layers * (budget + 1) // LARGEST_TABLE)
    units, room = -(-costs // unit), budget // unit
    if unit > 1 and int(units.min(1).values.sum()) > room:
        # rounding up alone broke the budget: every slot takes its cheapest
        choice = costs.argmin(1)
        return [_assignment(losses, costs, choice, _bound(losses, costs, budget))]
    # best[changes, cost]: the smallest loss of the slots so far at exactly this many changes or
    # fewer and this cost or less
    best = torch.zeros(layers, room + 1, dtype=torch.float64)
    picks = torch.zeros(slots, layers, room + 1, dtype=torch.int16)
    for slot in range(slots):
        new = torch.full_like(best, torch.inf)
        for place in range(n):
            cost, loss = int(units[slot, place]), float(losses[slot, place])
            step = int(current is not None and place != int(current[slot]))
            if cost > room or step >= layers:
                continue
            old = best[: layers - step, : room + 1 - cost] + loss
            here = new[step:, cost:]
            better = old < here
            here.copy_(torch.where(better, old, here))
            pick = picks[slot, step:, cost:]
            pick.copy_(torch.where(better, place, pick))
        best = new
    found = []
    for changes in range(min(1, layers - 1), layers):
        if torch.isinf(best[changes, room]):
            continue
        choice = torch.empty(slots, dtype=torch.int64)
        left, cost = changes, room
        for slot in reversed(range(slots)):
            place = int(picks[slot, left, cost])
            choice[slot] = place
            cost -= int(units[slot, place])
            left -= int(current is not None and place != int(current[slot]))
        bound = float(best[changes, room]) if unit == 1 else _bound(losses, costs, budget)
        found.append(_assignment(losses, costs, choice, bound))
    return found


def _assignment(losses: Tensor, costs: Tensor, choice: Tensor, bound: float) -> Assignment:
    rows = torch.arange(len(choice))
    cost, loss = int(costs[rows, choice].sum()), float(losses[rows, choice].sum())
    return Assignment(tuple(choice.tolist()), cost, loss, min(bound, loss))


def _bound(losses: Tensor, costs: Tensor, budget: int) -> float:
    """A lower bound of the loss: the best Lagrangian relaxation, its price found by bisection."""

    def relaxed(price: float) -> tuple[float, int]:
        value, place = (losses + price * costs).min(1)
        return float(value.sum()) - price * budget, int(costs.gather(1, place[:, None]).sum())

    low, high = 0.0, 1.0
    while relaxed(high)[1] > budget and high < 1e30:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if relaxed(middle)[1] > budget:
            low = middle
        else:
            high = middle
    return max(relaxed(low)[0], relaxed(high)[0])
