"""One candidate for each head under a budget of blocks: the multiple-choice knapsack, exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.default_device import cpu_by_default
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


@cpu_by_default()
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
    losses, costs = losses.double().cpu(), costs.long().cpu()
    cheapest = costs.argmin(1)
    if _total(costs, cheapest) > budget:
        raise MaskError(
            f"The cheapest candidates of all heads compute {int(_total(costs, cheapest)):,} blocks "
            f"together, and the budget is {budget:,}. Raise the density, or add cheaper candidates."
        )
    unit = -(-len(losses) * (budget + 1) // LARGEST_TABLE)
    choice = _solved(losses, -(-costs // unit), budget // unit)
    if choice is None:  # rounding up alone broke the budget
        choice = cheapest
    loss = float(_total(losses, choice))
    bound = loss if unit == 1 else min(_bound(losses, costs, budget), loss)
    return Assignment(tuple(choice.tolist()), int(_total(costs, choice)), loss, bound)


def _total(table: Tensor, choice: Tensor) -> Tensor:
    return table.gather(1, choice[:, None]).sum()


def _solved(losses: Tensor, costs: Tensor, budget: int) -> Tensor | None:
    """int64[slots]: the best candidates, or None if none are within the budget."""
    # best[cost]: the smallest loss of the slots so far at this cost or less
    best = torch.zeros(budget + 1, dtype=torch.float64)
    picks = torch.zeros(len(losses), budget + 1, dtype=torch.int16)
    for slot, (its_losses, its_costs) in enumerate(zip(losses, costs, strict=True)):
        new = torch.full_like(best, torch.inf)
        for place, cost in enumerate(its_costs.tolist()):
            old = best[: max(budget + 1 - cost, 0)] + its_losses[place]
            better = old < new[cost:]
            new[cost:][better] = old[better]
            picks[slot, cost:][better] = place
        best = new
    if torch.isinf(best[budget]):
        return None
    choice = torch.empty(len(losses), dtype=torch.int64)
    for slot in reversed(range(len(losses))):
        choice[slot] = picks[slot, budget]
        budget -= int(costs[slot, choice[slot]])
    return choice


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
