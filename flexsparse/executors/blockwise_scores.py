"""What one call does to the scores of a batch: its mask, its score_mod and its dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flexsparse.dropout import Dropout
from flexsparse.executors.blockwise_schedule import (
    FULL,
    PAD,
    PARTIAL,
    Addresses,
    Sizes,
    Work,
    addresses,
    schedule,
)

Mod = Callable[..., Tensor]

# scores in one batch: on CPU they stay in the cache, elsewhere they fill the device
BUDGET = {"cpu": 1 << 20}
BUDGET_ELSEWHERE = 1 << 24
# what a score loses where it is not kept, and the least maximum of a row: the exp2 of their
# difference is 0, and no infinity ever meets another
HIDDEN = 1e30
LOWEST = -1e29
LOG2_E = math.log2(math.e)


class Batch(NamedTuple):
    """Some planes of some work: entries x stacked heads x queries x keys."""

    work: Work
    at: Addresses
    hidden: Tensor | None  # > 0 where a score of the work's edge is not kept, None without an edge
    q_idx: Tensor  # [entries, queries]
    kv_idx: Tensor  # [entries, keys]


@dataclass(frozen=True)
class Call:
    """One call, its q, k and v aside."""

    block_mask: BlockMask
    sizes: Sizes
    scale: float
    mask_mod: Callable[..., Tensor] | None
    score_mod: Callable[..., Tensor] | None
    dropout: Dropout | None

    @property
    def unit(self) -> float:
        """What q is multiplied by besides scale, so that its products with k are powers of 2."""
        return LOG2_E if self.score_mod is None else 1.0

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """Every kept block once; a mask that reads neither b nor h is evaluated once a line."""
        sizes = self.sizes
        budget = BUDGET.get(device.type, BUDGET_ELSEWHERE)
        planes = sizes.planes[0] * sizes.planes[1]
        mask_is_shared = self.mask_mod is None or _reads_neither_b_nor_h(self.mask_mod, device)
        in_q, in_kv = (torch.arange(n, device=device) for n in sizes.block)
        for work in schedule(self.block_mask, sizes, budget):
            # those past the ends are clamped so that tables can be read with them, then hidden
            q_idx = (work.row[:, None] * sizes.block[0] + in_q).clamp(max=sizes.q_len - 1)
            raw = (work.kv_block[:, :, None] * sizes.block[1] + in_kv).flatten(1)
            kv_idx = raw.clamp(max=sizes.kv_len - 1)
            is_past = raw >= sizes.kv_len
            hidden = None
            if work.edge and mask_is_shared:
                zero = torch.zeros_like(work.row)
                hidden = self._hide(work, zero, zero[:, None], q_idx, kv_idx, is_past)
            planes_at_once = max(1, budget // (sizes.stacked * q_idx.numel() * kv_idx.shape[1]))
            for first in range(0, planes, planes_at_once):
                end = min(first + planes_at_once, planes)
                at = addresses(work, sizes, first, end)
                indices = q_idx.repeat(end - first, 1), kv_idx.repeat(end - first, 1)
                if work.edge and not mask_is_shared:
                    hidden = self._hide(work, at.b, at.h, *indices, is_past)
                yield Batch(work, at, hidden, *indices)

    def _hide(
        self, work: Work, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, is_past: Tensor
    ) -> Tensor:
        """Float, to hide by one fused subtraction: [planes, lines, stacked, queries, keys]."""
        block_kv = self.sizes.block[1]
        keys = work.edge * block_kv
        hidden = torch.zeros((), device=b.device)
        if self.mask_mod is not None and bool((work.kind == PARTIAL).any()):
            kept = over_indices(self.mask_mod)(b, h, q_idx, kv_idx[:, :keys])
            # a mask that does not read the head is the same for all stacked heads
            kept = kept[:, :1] if kept.stride(1) == 0 else kept
            hidden = kept.logical_not().float()
            hidden = hidden.view(-1, len(work.row), *hidden.shape[1:])
            if bool((work.kind == FULL).any()):
                is_partial = (work.kind == PARTIAL).float().repeat_interleave(block_kv, 1)
                hidden = hidden * is_partial[:, None, None]
        outside = (work.kind == PAD).repeat_interleave(block_kv, 1) | is_past[:, :keys]
        return hidden + outside[:, None, None].float() if bool(outside.any()) else hidden

    def modify(self, s: Tensor, batch: Batch) -> Tensor:
        """The score_mod of natural scores [entries, stacked, queries, keys]."""
        assert self.score_mod is not None
        mod = over_indices(self.score_mod, scores=1)
        return mod(s, batch.at.b, batch.at.h, batch.q_idx, batch.kv_idx)

    def hide(self, s: Tensor, batch: Batch) -> Tensor:
        """Sink the scores that are not kept, in place, so far down that exp2 gives 0."""
        if batch.hidden is None:
            return s
        keys = batch.work.edge * self.sizes.block[1]
        s = s.contiguous()
        edge = s.view(-1, len(batch.work.row), *s.shape[1:])[..., :keys]
        if self.score_mod is None:
            edge.sub_(batch.hidden, alpha=HIDDEN)
        else:
            # a score_mod may give anything where the mask hides, NaN too
            edge.masked_fill_(batch.hidden > 0, -HIDDEN)
        return s

    def drop_factor(self, batch: Batch, dtype: torch.dtype) -> Tensor | None:
        """0 where dropout drops a weight, 1 / (1 - p) elsewhere; None without dropout."""
        if self.dropout is None:
            return None
        kept = self.dropout.kept(
            batch.at.b[:, None, None, None],
            batch.at.h[:, :, None, None],
            batch.q_idx[:, None, :, None],
            batch.kv_idx[:, None, None, :],
            # eager integer arithmetic wraps
            width=torch.int32,
        )
        return kept.to(dtype).div_(1 - self.dropout.p)


def over_indices(mod: Mod, scores: int = 0) -> Mod:
    """A mod of single indices, over b [e], h [e, g], q_idx [e, q], kv_idx [e, k]: -> [e, g, q, k].

    By vmap, as FlexAttention itself does: a mod written for single indices need not broadcast.
    """
    s: tuple[int | None, ...] = (0,) * scores
    mod = torch.vmap(mod, (*s, None, None, None, 0))
    mod = torch.vmap(mod, (*s, None, None, 0, None))
    mod = torch.vmap(mod, (*s, None, 0, None, None))
    return torch.vmap(mod, (*s, 0, 0, 0, 0))


def _reads_neither_b_nor_h(mask_mod: Mod, device: torch.device) -> bool:
    """Proved by the data flow: vmap only expands (stride 0) a result that b and h never reached."""
    two = torch.zeros(2, dtype=torch.long, device=device)
    kept = torch.vmap(mask_mod, (0, 0, None, None))(two, two, two[0], two[0])
    return bool(kept.stride(0) == 0)


class _Watch(TorchFunctionMode):
    """Collects the tensors with gradients that a function uses and did not make itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in self._made:
                self.found[id(x)] = x
        result = func(*args, **(kwargs or {}))
        self._made |= {id(x): x for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


def captured_by(score_mod: Mod, q: Tensor) -> list[Tensor]:
    """The tensors that receive gradients through score_mod, found by calling it once."""
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    score = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    with _Watch() as watch:
        score_mod(score, zero, zero, zero, zero)
    return list(watch.found.values())
