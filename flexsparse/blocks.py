"""Block classes -> torch BlockMask: the lists of kept blocks, for queries and for keys.

The lists are compact: a row takes as many entries as the longest row, not as there are blocks of
keys. torch reads them through an overlapping view as wide as it expects; entries past a row's count
belong to the next row and are never looked at.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses
from flexsparse.analysis.rectangles import Rectangles

ENTRIES_AT_ONCE = 1 << 21
LARGE = 1 << 22  # entries, 16 MB


class BlockLists(NamedTuple):
    """The columns of blocks that each line of blocks keeps, in ascending order.

    counts: int32[B, H, lines]
    indices: int32[B, H, lines, width], contiguous; entries past a line's count are valid blocks
        that mean nothing. Its storage is padded, so that `widened` needs no copy.
    """

    counts: Tensor
    indices: Tensor

    def widened(self, columns: int) -> Tensor:
        """The indices as int32[B, H, lines, columns], an overlapping view that takes no memory."""
        batch, heads, lines, width = self.indices.shape
        stride = (heads * lines * width, lines * width, width, 1)
        return self.indices.as_strided((batch, heads, lines, max(columns, width)), stride)


class KeptBlocks(NamedTuple):
    """The block lists of a mask: keys kept for each row of queries, and queries for each column.

    The q lists serve backward alone and are None where nothing will ask for them.
    """

    kv: BlockLists
    full_kv: BlockLists
    q: BlockLists | None
    full_q: BlockLists | None


class CompactBlockMask(BlockMask):
    """A BlockMask whose lists overlap in memory, so that what torch would misread is done anew.

    torch's methods take the entries past a row's count for the rest of a permutation of all blocks;
    here they are other rows. Everything else is BlockMask's own, pickling too.
    """

    def __getitem__(self, index: Any) -> CompactBlockMask:
        """What torch takes for this index, whose rows of keys are as compact as these."""
        part = super().__getitem__(index)
        kept = (*self._TENSOR_ATTRS, *self._CONTEXT_ATTRS)
        return CompactBlockMask(**{name: getattr(part, name) for name in kept})

    def _adjust(self, new_q_len: int, new_kv_len: int) -> CompactBlockMask:
        """The upper left corner, of whole blocks: the mask of the first queries and keys."""
        rows, columns = (
            -(-n // block)
            for n, block in zip((new_q_len, new_kv_len), self.BLOCK_SIZE, strict=True)
        )
        lists: dict[str, Any] = {}
        for kind, lines, blocks in (
            ("kv", rows, columns),
            ("full_kv", rows, columns),
            ("q", columns, rows),
            ("full_q", columns, rows),
        ):
            counts, indices = (getattr(self, f"{kind}_{x}") for x in ("num_blocks", "indices"))
            if counts is not None:
                counts, indices = counts[:, :, :lines], indices[:, :, :lines, :blocks]
                # kept blocks ascend, so those inside come first
                inside = _is_listed(counts, indices) & (indices < blocks)
                counts = inside.sum(-1, dtype=torch.int32)
            lists |= {f"{kind}_num_blocks": counts, f"{kind}_indices": indices}
        return CompactBlockMask(
            seq_lengths=(new_q_len, new_kv_len),
            **lists,
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=self.mask_mod,
        )

    def row(self, row: int, grid: Grid, mask_mod: Callable[..., Tensor]) -> CompactBlockMask:
        """One row of blocks, as the mask of a grid that has no other."""
        lists: dict[str, Any] = {}
        for kind in ("", "full_"):
            for name in ("kv_num_blocks", "kv_indices"):
                # a copy, because a compiler takes a view's place in memory for a constant
                there = getattr(self, kind + name)[:, :, row : row + 1]
                lists[kind + name] = there.clone(memory_format=torch.contiguous_format)
            rows, counts = getattr(self, kind + "q_indices"), getattr(self, kind + "q_num_blocks")
            lists |= {kind + "q_indices": rows, kind + "q_num_blocks": counts}
            if rows is not None:
                sees = (rows == row) & _is_listed(counts, rows)
                lists[kind + "q_num_blocks"] = sees.sum(-1, dtype=torch.int32)
                lists[kind + "q_indices"] = torch.zeros_like(rows)
        return CompactBlockMask(
            seq_lengths=(grid.q_len, grid.kv_len),
            **lists,
            BLOCK_SIZE=grid.block_size,
            mask_mod=mask_mod,
        )

    def to(self, device: torch.device | str) -> CompactBlockMask:
        """The same lists on a device, as compact; tables of its mask_mod move with them."""
        lists = {}
        for name in self._TENSOR_ATTRS:
            x = getattr(self, name)
            if x is not None and x.device != torch.empty(0, device=device).device:
                stored = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                x = stored.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
            lists[name] = x
        move = getattr(self.mask_mod, "to", None)
        return CompactBlockMask(
            seq_lengths=self.seq_lengths,
            **lists,
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=self.mask_mod if move is None else move(device),
        )


def _is_listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which entries of block lists count: those before the count of their line."""
    return torch.arange(indices.shape[3], device=indices.device) < counts[..., None]


def _follow_block_mask_in_trees() -> None:
    """Make these masks nodes of trees where someone has registered BlockMask as one.

    torch has not, and its context parallelism takes a BlockMask for a leaf.
    """
    nodes = pytree.SUPPORTED_NODES
    if BlockMask in nodes and CompactBlockMask not in nodes:
        pytree.register_pytree_node(
            CompactBlockMask,
            CompactBlockMask._flatten,  # type: ignore[arg-type]
            CompactBlockMask._unflatten,  # type: ignore[arg-type]
            flatten_with_keys_fn=CompactBlockMask._flatten_with_keys,  # type: ignore[arg-type]
        )


def write_kept_blocks(
    classes: BlockClasses, device: torch.device, *, compact: bool = True, q_lists: bool = True
) -> KeptBlocks:
    """Write the block lists of classified blocks.

    Args:
        classes: the classes of all blocks.
        device: where the lists are written.
        compact: lists as wide as the longest line; else as wide as the grid.
        q_lists: whether to write the lists for keys too.
    """
    grid = classes.grid

    def lists(rectangles: Rectangles, rows: int, columns: int) -> BlockLists:
        counts, indices = write_lists(
            rectangles, grid.planes * rows, rows, columns, device, None if compact else columns
        )
        shape = (grid.batch, len(grid.heads), rows)
        return BlockLists(counts.view(shape), indices.view(*shape, indices.shape[1]))

    def both(rows: int, columns: int, transpose: bool) -> list[BlockLists]:
        return [
            lists(x.transposed() if transpose else x, rows, columns)
            for x in (classes.partial, classes.full)
        ]

    kv, full_kv = both(grid.rows, grid.columns, transpose=False)
    if not q_lists:
        return KeptBlocks(kv, full_kv, None, None)
    q, full_q = both(grid.columns, grid.rows, transpose=True)
    return KeptBlocks(kv, full_kv, q, full_q)


def block_mask(
    grid: Grid, kept: KeptBlocks, mask_mod: Callable[..., Tensor], *, widen: bool = True
) -> CompactBlockMask:
    """Torch's BlockMask of these lists, entry for entry what create_block_mask gives.

    Args:
        grid: lengths and block size.
        kept: the block lists.
        mask_mod: the mask, exact for every element: other libraries rebuild the lists from it.
        widen: give the lists the width of the grid, which all of torch's own methods expect.
    """

    def indices(lists: BlockLists | None, columns: int) -> Tensor | None:
        if lists is None:
            return None
        return lists.widened(columns) if widen else lists.indices

    _follow_block_mask_in_trees()
    kv, full_kv, q, full_q = kept
    return CompactBlockMask(
        seq_lengths=(grid.q_len, grid.kv_len),
        kv_num_blocks=kv.counts,
        kv_indices=kv.widened(grid.columns) if widen else kv.indices,
        full_kv_num_blocks=full_kv.counts,
        full_kv_indices=indices(full_kv, grid.columns),
        q_num_blocks=None if q is None else q.counts,
        q_indices=indices(q, grid.rows),
        full_q_num_blocks=None if full_q is None else full_q.counts,
        full_q_indices=indices(full_q, grid.rows),
        BLOCK_SIZE=grid.block_size,
        mask_mod=mask_mod,
    )


def write_lists(
    rectangles: Rectangles,
    lines: int,
    rows: int,
    columns: int,
    device: torch.device,
    width: int | None,
) -> tuple[Tensor, Tensor]:
    """The columns that the rectangles cover in each line: (counts [lines], indices [lines, width]).

    Lines are planes x rows. Each row of a rectangle is a run of consecutive columns. A line is one
    cumulative sum: its entries step by 1 inside a run and jump where the next run starts.
    """
    # numbers decide how wide lists are, and on meta there are none
    target, device = device, torch.device("cpu") if device.type == "meta" else device
    line, start, length = (x.to(device) for x in _runs(rectangles, rows, columns))
    counts = torch.zeros(lines, dtype=torch.int64, device=device).index_add_(0, line, length)
    if width is None:
        # never 1: compilers specialise on sizes of 1, and a mask's numbers shall not cause a kernel
        width = max(2, int(counts.max()))

    # the place of a run in its line, and the step from the run before it to its first column
    line_start = counts.cumsum(0) - counts
    place = length.cumsum(0) - length - line_start[line]
    last = start + length - 1
    jump = start.clone()
    jump[1:] -= torch.where(line[1:] == line[:-1], last[:-1], 0)
    line_last = torch.zeros_like(counts).scatter_reduce_(0, line, last, "amax")

    size = lines * width + max(columns - width, 0)
    storage = _zeros(size, device, written=int(counts.sum()))
    body = storage[: lines * width].view(lines, width)
    tops = torch.arange(0, lines, max(1, ENTRIES_AT_ONCE // width), device=device)
    bottoms = torch.cat([tops[1:], tops.new_tensor([lines])])
    bounds = torch.searchsorted(line, torch.stack([tops, bottoms], 1))
    for (top, bottom), (first, end) in zip(
        zip(tops.tolist(), bottoms.tolist(), strict=True), bounds.tolist(), strict=True
    ):
        count = counts[top:bottom]
        longest = int(count.max())
        part = body[top:bottom, :longest].fill_(1)
        part[line[first:end] - top, place[first:end]] = jump[first:end].int()
        # past its count a line steps back to 0, so that every entry is a valid block
        short = (count < longest).nonzero().flatten()
        part[short, count[short]] = -line_last[top:bottom][short].int()
        torch.cumsum(part, 1, dtype=torch.int32, out=part)
    return counts.int().to(target), storage.to(target)[: lines * width].view(lines, width)


def _zeros(size: int, device: torch.device, written: int) -> Tensor:
    """int32 zeros, of which only a few will be written; pages that are not take no memory.

    One long line, such as the sink's, makes every line wide. The usual large pages would then all
    be touched, and take more time and memory than everything else together.
    """
    if (
        device.type == "cpu"
        and size > LARGE
        and written * 8 < size
        and hasattr(mmap, "MADV_NOHUGEPAGE")
    ):
        pages = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.int32)
    return torch.zeros(size, dtype=torch.int32, device=device)


def _runs(rectangles: Rectangles, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of each rectangle as (line, first column, length), ordered by line and column."""
    plane, row, _, start, end = rectangles.rows()
    line = plane * rows + row
    order = torch.argsort(line * columns + start)
    return line[order], start[order], (end - start)[order]
