"""search: the plan that changes a model least among those within a budget of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import MaskError
from flexsparse.expr import Mask, everything
from flexsparse.fidelity.density import BLOCK, full_layers
from flexsparse.fidelity.perplexity import check_length
from flexsparse.plan import SparsePlan, masks_at
from flexsparse.search.candidates import candidates_for, costs_of
from flexsparse.search.criteria import Measured, Slot, of_heads, plan_of
from flexsparse.search.knapsack import Assignment, assign

CRITERIA = ("mass", "output", "ablation", "divergence")


@dataclass(frozen=True)
class Found:
    """What a search found.

    plan: for the model
    assignment: the candidate of each slot, with its cost in blocks, and its loss by the criterion
        and the bound of that: for "divergence", what the changes of the last round promised
    budget: in blocks
    of_all: all blocks of the slots, those above the diagonal included
    history: (blocks, divergence) of the plan of each round; empty if the model was not run again
    """

    plan: SparsePlan
    assignment: Assignment
    budget: int
    of_all: int
    history: tuple[tuple[int, float], ...] = ()

    @property
    def density(self) -> float:
        """Blocks computed as a part of all."""
        return self.assignment.cost / self.of_all

    def __str__(self) -> str:
        cost, loss, bound = self.assignment[1:]
        lines = [
            str(self.plan),
            f"{cost:,} of {self.of_all:,} blocks ({self.density:.2%}), within {self.budget:,}.",
            f"Loss by the criterion, added up over heads: {loss:.4g}; no assignment within the "
            f"budget has less than {bound:.4g}.",
        ]
        if self.history:
            lines.append("Divergence from the dense model, measured, round by round:")
            lines += [f"  {value:.5f} at {n:,} blocks" for n, value in self.history]
        return "\n".join(lines)


def search(
    model: Any,
    ids: Tensor,
    density: float,
    *,
    criterion: str = "divergence",
    candidates: Sequence[Mask] | None = None,
    layers: Sequence[int] | None = None,
    start: SparsePlan | None = None,
    every: int = 4,
    rounds: int = 3,
) -> Found:
    """Choose a mask for each head so that a model changes least, within a budget of blocks.

    Each criterion says what a candidate costs a head; which head gets which is then a knapsack,
    solved exactly. "mass" and "output" look at each head alone, in the dense model: attention mass
    lost (MInference), error of its output. "ablation" runs the dense model with one head changed
    (DuoAttention's question: which heads need everything?). "divergence" does so around the plan
    itself and solves again, a few rounds, starting from one pattern for all heads, or from a plan:
    one that was found on less text, say.

    >>> found = search(model, sequences(tokenizer, text, 2048, 4), density=0.25)
    >>> found.plan.save("plan.json")

    Args:
        model: a causal language model of transformers.
        ids: int64[sequences, length]: a text that stands for what the model will read.
        density: blocks computed as a part of all, in the layers searched, at most.
        criterion: one of the four.
        candidates: masks to choose from; by default `candidates_for(length)`.
        layers: by number; by default those without a window of their own.
        start: the plan that "divergence" starts from, within the density; its masks are candidates
            too.
        every: "ablation" and "divergence" compare predictions at every `every`-th token.
        rounds: of "divergence", at most; it stops when no change helps.

    Raises:
        MaskError: an argument that is not possible; the text says what is.
    """
    config = model.config.get_text_config()
    length = ids.shape[1]
    check_length(model, length)
    layers = full_layers(config) if layers is None else sorted(set(layers))
    candidates = candidates_for(length) if candidates is None else list(candidates)
    n_heads = config.num_attention_heads
    reason = _unusable(config, density, criterion, layers, candidates, start)
    if reason is not None:
        raise MaskError(reason)
    slots = [Slot(layer, head) for layer in layers for head in range(n_heads)]
    first = () if start is None else _masks_of(start, slots, length)
    candidates += [mask for mask in dict.fromkeys(first) if mask not in candidates]
    costs = costs_of(candidates, config, layers, length)
    of_all = len(slots) * (-(-length // BLOCK)) ** 2
    budget = int(density * of_all)
    assign(costs.double(), costs, budget)  # refuses what nothing fits, before anything runs
    if criterion == "divergence":
        places = [candidates.index(mask) for mask in first]
        current = _begun(places, costs, budget) if first else _uniform(costs, budget)
        measured = Measured(model, ids, slots, every)
        found, history = _refined(measured, candidates, costs, budget, current, rounds)
    else:
        if criterion == "ablation":
            dearest = [candidates[i] for i in costs.argmax(1)]
            losses = Measured(model, ids, slots, every).moves(dearest, candidates)
        else:
            losses = of_heads(model, ids, layers, candidates, criterion)
        found, history = assign(losses, costs, budget), []
    masks = [candidates[i] for i in found.choice]
    return Found(plan_of(config, slots, masks), found, budget, of_all, tuple(history))


def _refined(
    measured: Measured,
    candidates: Sequence[Mask],
    costs: Tensor,
    budget: int,
    current: Tensor,
    rounds: int,
) -> tuple[Assignment, list[tuple[int, float]]]:
    """Measure every single change of a plan, solve for the best of them together, and repeat.

    Returns:
        the last assignment, and (blocks, divergence) of the first one and of each that was better
    """
    rows = torch.arange(len(costs), device="cpu")
    divergence = measured.of([candidates[i] for i in current])
    cost = int(costs[rows, current].sum())
    found, history = Assignment(tuple(current.tolist()), cost, 0.0, 0.0), [(cost, divergence)]
    worth = None
    for _ in range(rounds):
        table = measured.moves([candidates[i] for i in current], candidates, worth)
        worth = _undominated(table, costs)
        best = assign(table, costs, budget)
        is_change = torch.ones_like(table).scatter_(1, current[:, None], 0)
        option, price, value = best, 0.0, divergence
        # Changes do not quite add up. Where those together do not help, only those are made that
        # promise more.
        while (new := torch.tensor(option.choice, device="cpu")).ne(current).any():
            value = measured.of([candidates[i] for i in new])
            if value < divergence:
                break
            promised = -float(table[rows, new].sum()) / int(new.ne(current).sum())
            price = max(2 * price, promised, torch.finfo(torch.float64).tiny)
            option = assign(table + price * is_change, costs, budget)
        if value >= divergence:
            break
        current, divergence = new, value
        loss = float(table[rows, current].sum())
        found = Assignment(option.choice, option.cost, loss, best.bound)
        history.append((found.cost, divergence))
    return found, history


def _undominated(losses: Tensor, costs: Tensor) -> Tensor:
    """bool[slots, candidates]: no other candidate of the slot costs less and loses less."""
    cheaper = costs[:, None, :] < costs[:, :, None]
    better = losses[:, None, :] < losses[:, :, None]
    return ~(cheaper & better).any(2)


def _begun(places: Sequence[int], costs: Tensor, budget: int) -> Tensor:
    """int64[slots]: the candidates of the plan to start from, if it is within the budget."""
    current = torch.tensor(places, device="cpu")
    cost = int(costs.gather(1, current[:, None]).sum())
    if cost > budget:
        raise MaskError(
            f"The plan to start from computes {cost:,} blocks, and the budget is {budget:,}. "
            "Raise the density, or start from a plan with fewer blocks."
        )
    return current


def _uniform(costs: Tensor, budget: int) -> Tensor:
    """int64[slots]: the candidate of the most blocks that all slots can have within a budget."""
    totals = costs.sum(0)
    within = torch.where(totals <= budget, totals, -1)
    if int(within.max()) < 0:
        return costs.argmin(1)
    return within.argmax().expand(len(costs)).clone()


def _masks_of(plan: SparsePlan, slots: Sequence[Slot], length: int) -> tuple[Mask, ...]:
    """The masks that a plan gives the slots at a length; `everything` where it gives none."""
    layers = {slot.layer: plan.layers[slot.layer] for slot in slots}
    masks = {i: layer and masks_at(layer, length) for i, layer in layers.items()}
    return tuple(
        its_masks[slot.head] if (its_masks := masks[slot.layer]) else everything for slot in slots
    )


def _unusable(
    config: Any,
    density: float,
    criterion: str,
    layers: Sequence[int],
    candidates: Sequence[Mask],
    start: SparsePlan | None,
) -> str | None:
    """Why a search with these arguments cannot be, as a sentence, or None if it can."""
    if not 0 < density <= 1:
        return f"density={density}; it is a part of all blocks, more than 0 and at most 1."
    if criterion not in CRITERIA:
        return f"criterion={criterion!r}; it must be one of {', '.join(CRITERIA)}."
    if not candidates:
        return "There are no candidates to choose from; give masks, such as causal and window(256)."
    if not layers:
        return (
            "Every layer of the model has a window of its own, so there is nothing to search; "
            "give layers=[...] to search some all the same."
        )
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            return (
                f"Layer {layer} does not exist; the model has layers 0 to "
                f"{config.num_hidden_layers - 1}."
            )
    if start is not None and criterion != "divergence":
        return f"A search by {criterion} starts from no plan; drop start= or search by divergence."
    return None if start is None else start.problem(config)
