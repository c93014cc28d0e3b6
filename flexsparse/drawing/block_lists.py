"""Torch BlockMask -> rectangles of blocks: ours or torch's own, whole or compact, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.errors import MaskError

ENTRIES_AT_ONCE = 1 << 21

Lists = tuple[Tensor, Tensor]  # counts [rows] and indices [rows, width] of one plane


def grid_of(block_mask: BlockMask) -> Grid:
    """The lengths and the block size of a BlockMask; positions count from its first row."""
    q_block, kv_block = block_mask.BLOCK_SIZE
    q_len, kv_len = block_mask.seq_lengths
    rows = block_mask.kv_num_blocks.shape[-1]
    if -(-q_len // q_block) != rows:
        # a slice of a BlockMask keeps the lengths of the whole
        q_len = rows * q_block
    return Grid(int(q_len), int(kv_len), 0, (int(q_block), int(kv_block)), 1, (0,))


def planes_of(block_mask: BlockMask) -> tuple[int, int]:
    """The number of batch rows and of heads that have lists of their own."""
    batch, heads = (1, 1, *block_mask.kv_num_blocks.shape[:-1])[-2:]
    return batch, heads


def rectangles_of(block_mask: BlockMask, b: int, h: int) -> tuple[Rectangles, Rectangles]:
    """The (partial, full) blocks of one batch row and head."""
    columns = grid_of(block_mask).columns
    none = torch.zeros(0, dtype=torch.int64)
    found = []
    for lists in _lists_of(block_mask, b, h):
        if lists is None:
            found.append(Rectangles(*[none] * 5))
            continue
        row, start, end = _runs(*lists, columns)
        found.append(Rectangles(torch.zeros_like(row), row, row + 1, start, end))
    partial, full = found
    _, row, _, start, end = Rectangles.joined([partial, full])
    order = torch.argsort(row * (columns + 1) + start)
    row, start, end = row[order], start[order], end[order]
    twice = ((row[1:] == row[:-1]) & (start[1:] < end[:-1])).nonzero().flatten()
    if len(twice):
        at = int(twice[0]) + 1
        raise MaskError(
            f"The BlockMask lists the block ({int(row[at])}, {int(start[at])}) both as partial and "
            "as full, so that attention would count it twice. List it once."
        )
    return partial, full


def place_of(block_mask: BlockMask, b: int, h: int) -> tuple[int, ...]:
    """Where the lists of a plane lie in memory: planes that share them look alike."""
    return tuple(x.data_ptr() for lists in _lists_of(block_mask, b, h) for x in lists or ())


def _lists_of(block_mask: BlockMask, b: int, h: int) -> Iterator[Lists | None]:
    """The lists of the partial and of the full blocks of a plane; None where there are none."""
    for counts, indices in (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        if counts is None or indices is None:
            yield None
            continue
        while counts.dim() < 3:
            counts, indices = counts[None], indices[None]
        yield counts[b, h], indices[b, h]


def _runs(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of consecutive blocks, as (row, first column, column after the last)."""
    counts = counts.cpu().long()
    longest = int(counts.max()) if len(counts) else 0
    at_once = max(1, ENTRIES_AT_ONCE // max(1, longest))
    rows, starts, ends = [counts[:0]], [counts[:0]], [counts[:0]]
    for top in range(0, len(counts), at_once):
        count = counts[top : top + at_once, None]
        listed = indices[top : top + at_once, : int(count.max())].cpu().long()
        used = torch.arange(listed.shape[1]) < count
        wrong = listed[used & ((listed < 0) | (listed >= columns))]
        if len(wrong):
            raise MaskError(
                f"The BlockMask lists the key block {int(wrong[0])}, and its keys have {columns} "
                "blocks. Make it again for these lengths and this block size."
            )
        # what is not used goes to the right of everything, and a gap before it
        line = torch.where(used, listed, columns + 1).sort(1).values
        used = line < columns
        first, last = used.clone(), used.clone()
        first[:, 1:] &= line[:, 1:] > line[:, :-1] + 1
        last[:, :-1] &= line[:, 1:] > line[:, :-1] + 1
        rows.append(first.nonzero()[:, 0] + top)
        starts.append(line[first])
        ends.append(line[last] + 1)
    return torch.cat(rows), torch.cat(starts), torch.cat(ends)
