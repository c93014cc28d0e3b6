"""What one call does to the scores of a batch: its mask, its score_mod and its dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

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
LOG2_E = math.log2(math.e)
# a float as its bits, and those of -inf
BITS = {torch.float32: (torch.int32, -1 << 23), torch.float64: (torch.int64, -1 << 52)}


class Batch(NamedTuple):
    """Some planes of some work: entries x stacked heads x queries x keys."""

    work: Work
    at: Addresses
    edge: tuple[Tensor, Tensor] | None  # bits to keep of the scores of the work's edge, bits to set
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
        """What q is multiplied by besides scale: 1 / log 2 makes powers of 2 of its products."""
        # a score_mod takes natural scores, and may give such as a product with this would overflow
        return LOG2_E if self.score_mod is None else 1.0

    def exp_(self, s: Tensor) -> Tensor:
        """The exponential of differences of scores, in place."""
        return (s if self.score_mod is None else s.mul_(LOG2_E)).exp2_()

    def batches(self, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
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
            edge = None
            if work.edge and mask_is_shared:
                zero = torch.zeros_like(work.row)
                edge = self._edge(work, zero, zero[:, None], q_idx, kv_idx, is_past, dtype)
            planes_at_once = max(1, budget // (sizes.stacked * q_idx.numel() * kv_idx.shape[1]))
            for first in range(0, planes, planes_at_once):
                end = min(first + planes_at_once, planes)
                at = addresses(work, sizes, first, end)
                indices = q_idx.repeat(end - first, 1), kv_idx.repeat(end - first, 1)
                if work.edge and not mask_is_shared:
                    edge = self._edge(work, at.b, at.h, *indices, is_past, dtype)
                yield Batch(work, at, edge, *indices)

    def _edge(
        self,
        work: Work,
        b: Tensor,
        h: Tensor,
        q_idx: Tensor,
        kv_idx: Tensor,
        is_past: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Bits that leave a score or make it -inf: [planes, lines, stacked, queries, keys], two."""
        integer, minus_infinity = BITS[dtype]
        block_kv = self.sizes.block[1]
        keys = work.edge * block_kv
        is_in = (work.kind != PAD).repeat_interleave(block_kv, 1) & ~is_past[:, :keys]
        kept = -is_in[:, None, None].to(integer)
        if self.mask_mod is not None and bool((work.kind == PARTIAL).any()):
            by_mask = over_indices(self.mask_mod)(b, h, q_idx, kv_idx[:, :keys])
            # a mask that does not read the head is the same for all stacked heads
            by_mask = by_mask[:, :1] if by_mask.stride(1) == 0 else by_mask
            by_mask = by_mask.to(torch.bool).to(kept.dtype).neg_()
            by_mask = by_mask.view(-1, len(work.row), *by_mask.shape[1:])
            if bool((work.kind == FULL).any()):
                is_full = -(work.kind == FULL).to(kept.dtype).repeat_interleave(block_kv, 1)
                by_mask = by_mask | is_full[:, None, None]
            kept = by_mask if bool(is_in.all()) else by_mask & kept
        return kept, kept.bitwise_not().bitwise_and_(minus_infinity)

    def modify(self, s: Tensor, batch: Batch) -> Tensor:
        """The score_mod of natural scores [entries, stacked, queries, keys]."""
        assert self.score_mod is not None
        mod = over_indices(self.score_mod, scores=1)
        return mod(s, batch.at.b, batch.at.h, batch.q_idx, batch.kv_idx).to(s.dtype)

    def hide_(self, s: Tensor, batch: Batch, *, with_zero: bool = False) -> Tensor:
        """Make the scores that are not kept -inf, or 0, in place, whatever they are.

        By their bits: they may be NaN, and masked_fill takes many times as long.
        """
        if batch.edge is not None:
            kept, lost = batch.edge
            keys = batch.work.edge * self.sizes.block[1]
            edge = s.view(-1, len(batch.work.row), *s.shape[1:])[..., :keys].view(kept.dtype)
            edge.bitwise_and_(kept)
            if not with_zero:
                edge.bitwise_or_(lost)
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
