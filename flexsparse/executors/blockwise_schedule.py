"""Block lists -> batched work: lines of blocks that are about as long are done together.

A line is one row of blocks of one plane of the mask. Where the mask is shared (its B or H is 1), a
line stands for that row in every batch row and key head, and the query heads of a key head are
stacked into one tall row, so that their keys are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

LONGEST_PIECE = 4096  # keys of a line taken at once; longer lines are merged piece by piece
PAD, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Sizes:
    """The lengths of one call, and how its heads map to planes of the mask."""

    batch: int
    n_heads: int
    n_kv_heads: int
    q_len: int
    kv_len: int
    block: tuple[int, int]
    mask_batch: int
    mask_heads: int

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.block[0])

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block[1])

    @property
    def stacked(self) -> int:
        """Query heads stacked into one row: all of a key head's where they share their lists."""
        return self.n_heads // self.n_kv_heads if self.mask_heads == 1 else 1

    @property
    def planes(self) -> tuple[int, int]:
        """How many (batch rows, key heads) each line stands for."""
        return (
            self.batch if self.mask_batch == 1 else 1,
            self.n_kv_heads if self.mask_heads == 1 else 1,
        )


class Work(NamedTuple):
    """Some lines, and for each of them as many blocks of keys.

    The first `edge` blocks need a look: a block there may be padding (PAD, another block of the
    line), PARTIAL, or a FULL block that ends after the last key. All behind are plainly full.
    """

    b: Tensor  # [lines], of the mask: 0 where it is shared
    h: Tensor  # [lines], likewise
    row: Tensor  # [lines]
    kv_block: Tensor  # [lines, blocks]
    kind: Tensor  # [lines, edge]
    edge: int
    is_first: bool  # no earlier work holds other blocks of these lines


class Addresses(NamedTuple):
    """Where some planes of some work read and write: entries are planes x lines."""

    b: Tensor  # [entries]
    h: Tensor  # [entries, stacked]
    q_block: Tensor  # [entries * stacked] in [batch * n_heads * rows]
    kv_block: Tensor  # [entries * blocks] in [batch * n_kv_heads * columns]


def schedule(block_mask: BlockMask, sizes: Sizes, budget: int) -> Iterator[Work]:
    """Every kept block exactly once, in batches of at most `budget` scores per plane.

    Lines whose lengths differ by an eighth at most share a batch; the shorter are padded. Entries
    of the lists past a line's count are never used.
    """
    block_q, block_kv = sizes.block
    partial = block_mask.kv_num_blocks.reshape(-1).long()
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = block_mask.full_kv_num_blocks.reshape(-1).long()
    total = (partial + full).cpu()
    # an eighth of the power of two below: lengths 1 to 15 stay apart
    step = 2 ** ((total.clamp(min=1).log2().floor().long() - 3).clamp(min=0))
    length = -(-total // step) * step
    order = torch.argsort(length * (sizes.columns + 1) + full.cpu(), stable=True)
    lengths, counts = torch.unique_consecutive(length[order], return_counts=True)

    row_of_scores = sizes.stacked * block_q
    piece = max(1, min(LONGEST_PIECE, budget // row_of_scores) // block_kv)
    start = 0
    for longest, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        lines_at_once = max(1, budget // (row_of_scores * block_kv * min(max(longest, 1), piece)))
        for first in range(start, start + count if longest else start, lines_at_once):
            lines = order[first : min(first + lines_at_once, start + count)].to(partial.device)
            slots = int(total[lines.cpu()].max())
            # pieces of equal size: a line of 33 blocks is 17 + 16, not 32 + 1
            size = -(-slots // -(-slots // piece))
            for left in range(0, slots, size):
                yield _work(
                    block_mask, sizes, lines, partial[lines], full[lines], slots, left, size
                )
        start += count


def _work(
    block_mask: BlockMask,
    sizes: Sizes,
    lines: Tensor,
    partial: Tensor,
    full: Tensor,
    slots: int,
    left: int,
    size: int,
) -> Work:
    """Slots left to left + size of `lines`; a line is its padding, its partial, its full blocks."""
    b = lines // (sizes.mask_heads * sizes.rows)
    h = lines // sizes.rows % sizes.mask_heads
    row = lines % sizes.rows
    slot = torch.arange(left, min(left + size, slots), device=lines.device)
    place = (slot + (partial + full)[:, None] - slots).clamp(min=-1)  # [lines, blocks], -1: padding
    kind = torch.where(place < 0, PAD, torch.where(place < partial[:, None], PARTIAL, FULL))
    place = place.clamp(min=0)

    def entries(indices: Tensor | None, place: Tensor, count: Tensor) -> Tensor:
        if indices is None or not indices.shape[-1]:
            return torch.zeros_like(place)
        place = torch.minimum(place, (count - 1).clamp(min=0)[:, None])
        return indices[b[:, None], h[:, None], row[:, None], place].long()

    is_listed_partial = place < partial[:, None]
    kv_block = torch.where(
        is_listed_partial,
        entries(block_mask.kv_indices, place, partial),
        entries(block_mask.full_kv_indices, (place - partial[:, None]).clamp(min=0), full),
    )
    is_plain = kind == FULL
    if sizes.kv_len % sizes.block[1]:
        is_plain &= kv_block < sizes.columns - 1
        front = torch.argsort(is_plain.byte(), dim=1, stable=True)
        kv_block, kind = kv_block.gather(1, front), kind.gather(1, front)
    edge = int((~is_plain).sum(1).max())
    return Work(b, h, row, kv_block, kind[:, :edge], edge, left == 0)


def addresses(work: Work, sizes: Sizes, first: int, end: int) -> Addresses:
    """Where planes `first` to `end` of the work are found; a plane is (batch row, key head)."""
    plane = torch.arange(first, end, device=work.row.device)[:, None]
    key_heads = sizes.planes[1]
    b = (work.b + plane // key_heads).reshape(-1)  # [entries]
    if sizes.mask_heads == 1:
        kv_head = (plane % key_heads).expand(-1, len(work.row)).reshape(-1)
        h = kv_head[:, None] * sizes.stacked + torch.arange(sizes.stacked, device=plane.device)
    else:
        h = work.h.expand(end - first, -1).reshape(-1, 1)
        kv_head = h[:, 0] // (sizes.n_heads // sizes.n_kv_heads)
    row = work.row.expand(end - first, -1).reshape(-1, 1)
    kv_block = work.kv_block.expand(end - first, -1, -1).flatten(0, 1)
    return Addresses(
        b,
        h,
        ((b[:, None] * sizes.n_heads + h) * sizes.rows + row).reshape(-1),
        ((b * sizes.n_kv_heads + kv_head)[:, None] * sizes.columns + kv_block).reshape(-1),
    )
