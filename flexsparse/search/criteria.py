"""What it costs in quality to give a head a candidate: four ways to measure it.

Each gives a table float64[slots, candidates], a slot being a head of a layer; smaller is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.expr import Mask
from flexsparse.fidelity.divergence import Divergence
from flexsparse.fidelity.heads import head_fidelity, layer_inputs
from flexsparse.fidelity.perplexity import applied
from flexsparse.fidelity.replay import Replay
from flexsparse.plan import SparsePlan
from flexsparse.progress import Progress


class Slot(NamedTuple):
    """A head of a layer, to which a search gives a mask."""

    layer: int
    head: int


def of_heads(
    model: Any, ids: Tensor, layers: Sequence[int], candidates: Sequence[Mask], criterion: str
) -> Tensor:
    """The criteria that look at a head alone, in the dense model.

    "mass": the attention mass lost (MInference's); "output": the error of the head's output.
    """
    tables = []
    with Progress("Looking at heads", len(ids)) as progress:
        for row in ids[:, None]:
            inputs = layer_inputs(model, row, layers)
            found = [head_fidelity(inputs[layer], candidates) for layer in layers]
            tables.append(
                torch.cat([1 - x.mass if criterion == "mass" else x.error for x in found])
            )
            progress.tick()
    return torch.stack(tables).double().mean(0)


class Measured:
    """The divergence of a model from its dense self, under plans and single changes of them.

    Args:
        model: a causal language model of transformers.
        ids: int64[sequences, length].
        slots: the heads that plans may change.
        every: predictions are compared at every `every`-th token.
    """

    def __init__(self, model: Any, ids: Tensor, slots: Sequence[Slot], every: int) -> None:
        self.model, self.slots = model, slots
        self.config = model.config.get_text_config()
        self.starts = sorted({slot.layer for slot in slots})
        rows = ids.to(model.device)[:, None]
        with applied(None, model):
            self.replays = [Replay(model, row, self.starts, every) for row in rows]
            self.dense = [Divergence(replay) for replay in self.replays]

    def of(self, masks: Sequence[Mask]) -> float:
        """The divergence under a plan, which gives each slot its mask; later moves start here."""
        with applied(self._plan(masks), self.model):
            for replay in self.replays:
                replay.record(self.starts[0])
            return self._mean()

    def moves(
        self, masks: Sequence[Mask], candidates: Sequence[Mask], worth: Tensor | None = None
    ) -> Tensor:
        """float64[slots, candidates]: by how much the divergence grows if one slot changes.

        Args:
            masks: the plan that is changed.
            candidates: what a slot may change to.
            worth: bool[slots, candidates], the changes to measure; the others are given infinity.
        """
        shape = len(self.slots), len(candidates)
        table = torch.full(shape, torch.inf, dtype=torch.float64, device="cpu")
        base = self.of(masks)
        for i, mask in enumerate(masks):
            table[i, [candidate == mask for candidate in candidates]] = 0
        todo = (table > 0) & (True if worth is None else worth)
        places = todo.nonzero().tolist()
        what = f"{len(places)} single changes of a plan"
        with (
            applied(self._plan(masks), self.model),
            Progress("Measuring", len(places), what) as progress,
        ):
            for i, j in places:
                changed = [*masks[:i], candidates[j], *masks[i + 1 :]]
                self._plan(changed).apply(self.model)
                table[i, j] = self._mean(self.slots[i].layer) - base
                progress.tick()
        return table

    def _mean(self, start: int | None = None) -> float:
        pairs = zip(self.dense, self.replays, strict=True)
        return sum(dense.of(replay, start) for dense, replay in pairs) / len(self.replays)

    def _plan(self, masks: Sequence[Mask]) -> SparsePlan:
        return plan_of(self.config, self.slots, masks)


def plan_of(config: Any, slots: Sequence[Slot], masks: Sequence[Mask]) -> SparsePlan:
    """The plan that gives each slot its mask and leaves all other heads as they are."""
    layers: list[list[Mask | None] | None] = [None] * config.num_hidden_layers
    for slot, mask in zip(slots, masks, strict=True):
        heads = layers[slot.layer] or [None] * config.num_attention_heads
        heads[slot.head] = mask
        layers[slot.layer] = heads
    return SparsePlan(layers)
