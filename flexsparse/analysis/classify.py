"""EMPTY, PARTIAL or FULL for every block of a mask, proved by hierarchical refinement.

A cell is a square of blocks. Cells of one size are bounded at once; a cell that is everywhere true
is FULL as a whole, one that is nowhere true is EMPTY, and the rest are split 4 x 4 until a cell is
one block. A block that intervals leave undecided is settled by looking: at a few witnesses, then
at every element. The cost follows the boundary of the mask, not its area.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.interval import INTERVAL_READING, Interval, Truth
from flexsparse.analysis.pyramid import Pyramid
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.whole import loosely_truncated
from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tree import evaluate, kept_at

SPLIT = 4  # a cell is split into SPLIT x SPLIT
CELLS_TO_BEGIN_WITH = 1 << 8  # of each plane; so many take hardly longer than one
CELLS_AT_ONCE = 1 << 15  # stays in the cache, and below the size torch starts threads for
ELEMENTS_AT_ONCE = 1 << 20


class Grid(NamedTuple):
    """Where a mask is looked at: its lengths in tokens, its block size, and what it varies over."""

    q_len: int
    kv_len: int
    q_offset: int
    block_size: tuple[int, int]
    batch: int
    heads: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.q_len // self.block_size[0])

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def planes(self) -> int:
        """Masks of q_len x kv_len: one for each batch row and head, batch rows outermost."""
        return self.batch * len(self.heads)


class BlockClasses(NamedTuple):
    """The class of every block of a grid; a block in neither list is EMPTY.

    grid: lengths and block size
    partial, full: disjoint rectangles of blocks
    evaluated: blocks that had to be evaluated element by element
    """

    grid: Grid
    partial: Rectangles
    full: Rectangles
    evaluated: int

    @property
    def blocks(self) -> int:
        """Blocks that are computed."""
        return self.partial.blocks + self.full.blocks

    @property
    def density(self) -> float:
        """Blocks that are computed, as a part of all blocks."""
        return self.blocks / (self.grid.planes * self.grid.rows * self.grid.columns)

    @classmethod
    def of_planes(
        cls, grid: Grid, parts: Sequence[tuple[BlockClasses, Sequence[int]]]
    ) -> BlockClasses:
        """Classes of some heads each, put together for all heads and batch rows of a grid."""

        def spread(name: str) -> Rectangles:
            return Rectangles.joined(
                _on_planes(getattr(classes, name), classes.grid, heads, grid)
                for classes, heads in parts
            )

        evaluated = sum(classes.evaluated for classes, _ in parts)
        return cls(grid, spread("partial"), spread("full"), evaluated)

    def of_heads(self, heads: tuple[int, ...]) -> BlockClasses:
        """The classes of some of its heads, in the order given."""
        grid = self.grid._replace(heads=heads)
        planes = torch.arange(self.grid.planes).view(self.grid.batch, -1)
        chosen = planes[:, [self.grid.heads.index(head) for head in heads]].flatten()
        new_plane = torch.full((self.grid.planes,), -1)
        new_plane[chosen] = torch.arange(grid.planes)

        def renumbered(rectangles: Rectangles) -> Rectangles:
            plane = new_plane[rectangles.plane]
            return rectangles._replace(plane=plane).where(plane >= 0)

        partial, full = renumbered(self.partial), renumbered(self.full)
        return BlockClasses(grid, partial, full, self.evaluated)

    def of_row(self, row: int, grid: Grid) -> BlockClasses:
        """The classes of one row of blocks, as those of a grid that has no other."""

        def alone(rectangles: Rectangles) -> Rectangles:
            kept = rectangles.where((rectangles.row0 <= row) & (row < rectangles.row1))
            return kept._replace(row0=torch.zeros_like(kept.row0), row1=torch.ones_like(kept.row1))

        return BlockClasses(grid, alone(self.partial), alone(self.full), self.evaluated)


def _on_planes(
    rectangles: Rectangles, grid: Grid, heads: Sequence[int], target: Grid
) -> Rectangles:
    """Rectangles repeated for each head and batch row of the target that a plane stands for."""
    copies = []
    for b in range(target.batch):
        for place, head in enumerate(heads):
            own = min(b, grid.batch - 1) * len(grid.heads) + min(place, len(grid.heads) - 1)
            chosen = rectangles.of_plane(own)
            plane = torch.full_like(chosen.plane, b * len(target.heads) + head)
            copies.append(chosen._replace(plane=plane))
    return Rectangles.joined(copies)


def classify(mask: Mask, grid: Grid) -> BlockClasses:
    """Prove, block by block, that a mask is everywhere false (EMPTY) or everywhere true (FULL).

    Sound and complete: what intervals leave undecided is settled by witnesses or by every element.
    A ragged last block is at most PARTIAL, as in torch's create_block_mask.
    Cost: the boundary of the mask in blocks, times its steps; no [q_len, kv_len] tensor is made.
    """
    reading = interval_reading(mask, grid)
    side = 1
    while -(-grid.rows // side) * -(-grid.columns // side) > CELLS_TO_BEGIN_WITH:
        side *= SPLIT
    nothing = [torch.arange(0)] * 3
    full, partial, evaluated = [_rectangles(grid, nothing, 1)], [_rectangles(grid, nothing, 1)], 0
    # depth first, so that memory follows the result and not the number of open cells
    stack = [(side, _all_cells(grid, side))]
    while stack:
        side, cells = stack.pop()
        if len(cells[0]) > CELLS_AT_ONCE:
            chunks = zip(*(torch.split(x, CELLS_AT_ONCE) for x in cells), strict=True)
            stack += [(side, list(chunk)) for chunk in chunks]
            continue
        always, ever = bound_cells(mask, reading, grid, cells, side)
        full.append(_rectangles(grid, [x[always] for x in cells], side))
        open_cells = [x[ever & ~always] for x in cells]
        if not len(open_cells[0]):
            continue
        if side > 1:
            stack.append((side // SPLIT, _split(grid, open_cells, side // SPLIT)))
            continue
        some_partial, some_full, looked_at = _settle(mask, grid, open_cells)
        partial.append(_rectangles(grid, some_partial, 1))
        full.append(_rectangles(grid, some_full, 1))
        evaluated += looked_at
    whole, ragged = _part_ragged(grid, Rectangles.joined(full))
    return BlockClasses(grid, Rectangles.joined([*partial, ragged]), whole, evaluated)


def interval_reading(mask: Mask, grid: Grid) -> dict[str, Any]:
    """INTERVAL_READING for the cells of a grid, with the tables of this mask behind pyramids."""
    pyramids: dict[int, Pyramid] = {}

    def lookup(table: Table, *indices: Interval | None) -> Any:
        if id(table) not in pyramids:
            pyramids[id(table)] = Pyramid(table.tensor)
        return INTERVAL_READING["lookup"](pyramids[id(table)], *indices)

    reading = {**INTERVAL_READING, "lookup": lookup}
    if loosely_truncated(mask, grid):
        reading["truncate"] = lambda *_: None
    return reading


def bound_cells(
    mask: Mask, reading: dict[str, Any], grid: Grid, cells: list[Tensor], side: int
) -> tuple[Tensor, Tensor]:
    """Whether a mask is proved to be always true, and whether it may ever be, in each cell.

    Args:
        mask: what to bound.
        reading: its interval_reading.
        grid: lengths and block size.
        cells: planes, rows and columns of the cells, in cells.
        side: blocks along a cell.
    """
    plane, row, column = cells
    q, kv = (
        Interval(
            place * (side * block) + offset,
            ((place + 1) * (side * block)).clamp(max=n) - 1 + offset,
        )
        for place, block, n, offset in (
            (row, grid.block_size[0], grid.q_len, grid.q_offset),
            (column, grid.block_size[1], grid.kv_len, 0),
        )
    )
    return bound_places(mask, reading, grid, plane, q, kv)


def bound_places(
    mask: Mask, reading: dict[str, Any], grid: Grid, plane: Tensor, q: Interval, kv: Interval
) -> tuple[Tensor, Tensor]:
    """The same for positions of queries and keys, an interval of each with the plane it is in."""
    b, h = batch_and_head(grid, plane)
    variables: dict[str, Any] = {
        "b": Interval(b, b),
        "h": Interval(h, h),
        "q_idx": q,
        "kv_idx": kv,
    }
    truth: Truth = evaluate(mask, variables, reading)
    always, ever = (torch.as_tensor(x).expand(plane.shape) for x in truth)
    return always, ever


def batch_and_head(grid: Grid, plane: Tensor) -> tuple[Tensor, Tensor]:
    """The batch row and the head of each plane."""
    heads = torch.tensor(grid.heads)
    return plane // len(heads), heads[plane % len(heads)]


def _all_cells(grid: Grid, side: int) -> list[Tensor]:
    """Planes, rows and columns of the cells of `side` blocks that make up a grid."""
    lengths = grid.planes, -(-grid.rows // side), -(-grid.columns // side)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in lengths))
    return list(cells.T.contiguous())


def _split(grid: Grid, cells: list[Tensor], side: int) -> list[Tensor]:
    """The cells of `side` blocks that the given cells, SPLIT times as wide, are made of."""
    plane, row, column = cells
    step = torch.arange(SPLIT)
    rows = (row[:, None, None] * SPLIT + step[:, None]).expand(-1, SPLIT, SPLIT)
    columns = (column[:, None, None] * SPLIT + step).expand(-1, SPLIT, SPLIT)
    inside = (rows * side < grid.rows) & (columns * side < grid.columns)
    return [plane[:, None, None].expand_as(rows)[inside], rows[inside], columns[inside]]


def _settle(mask: Mask, grid: Grid, cells: list[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """Decide single blocks by looking, at few places first.

    Returns:
        Those that are PARTIAL, those that are FULL, and how many were evaluated element by element.
    """
    # a block may be far longer than what it holds
    sizes = [min(n) for n in zip(grid.block_size, (grid.q_len, grid.kv_len), strict=True)]
    q_all, kv_all = (torch.arange(n) for n in sizes)
    q_few, kv_few = (torch.tensor(sorted({0, 1 % n, n // 2, n - 1})) for n in sizes)
    # then the border, which every line, stripe or diagonal through the block crosses
    looks = [(q_few, kv_few), (q_all[:: max(1, len(q_all) - 1)], kv_all)]
    looks += [(q_all, kv_all[:: max(1, len(kv_all) - 1)]), (q_all, kv_all)]
    partial: list[list[Tensor]] = []
    looked_at, always = 0, torch.zeros(0, dtype=torch.bool)
    for q_steps, kv_steps in looks:
        some, always = _look(mask, grid, cells, q_steps, kv_steps)
        partial.append([x[some & ~always] for x in cells])
        looked_at = len(cells[0])
        unsettled = some == always  # not yet one True and one False
        cells, always = [x[unsettled] for x in cells], always[unsettled]
    proved = [torch.cat(parts) for parts in zip(*partial, strict=True)]
    return proved, [x[always] for x in cells], looked_at


def _look(
    mask: Mask, grid: Grid, cells: list[Tensor], q_steps: Tensor, kv_steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate blocks exactly at q_steps x kv_steps of each: (any is true, all are true)."""
    at_once = max(1, ELEMENTS_AT_ONCE // (len(q_steps) * len(kv_steps)))
    found_some, found_all = [torch.empty(0, dtype=torch.bool)], [torch.empty(0, dtype=torch.bool)]
    for start in range(0, len(cells[0]), at_once):
        plane, row, column = (x[start : start + at_once, None, None] for x in cells)
        # elements past a ragged end repeat the last one, which changes neither `any` nor `all`
        q = (row * grid.block_size[0] + q_steps[:, None]).clamp(max=grid.q_len - 1) + grid.q_offset
        kv = (column * grid.block_size[1] + kv_steps).clamp(max=grid.kv_len - 1)
        b, h = batch_and_head(grid, plane)
        kept = kept_at(mask, {"b": b, "h": h, "q_idx": q, "kv_idx": kv})
        kept = kept.expand(len(plane), len(q_steps), len(kv_steps)).flatten(1)
        found_some.append(kept.any(1))
        found_all.append(kept.all(1))
    return torch.cat(found_some), torch.cat(found_all)


def _rectangles(grid: Grid, cells: list[Tensor], side: int) -> Rectangles:
    plane, row, column = cells
    return Rectangles(
        plane,
        row * side,
        ((row + 1) * side).clamp(max=grid.rows),
        column * side,
        ((column + 1) * side).clamp(max=grid.columns),
    )


def _part_ragged(grid: Grid, full: Rectangles) -> tuple[Rectangles, Rectangles]:
    """Split off the blocks that stick out over the end of the queries or keys."""
    rows = grid.q_len // grid.block_size[0]
    columns = grid.kv_len // grid.block_size[1]
    whole = full._replace(row1=full.row1.clamp(max=rows), column1=full.column1.clamp(max=columns))
    below = full._replace(row0=full.row0.clamp(min=rows))
    right = full._replace(row1=full.row1.clamp(max=rows), column0=full.column0.clamp(min=columns))
    return _non_empty(whole), _non_empty(Rectangles.joined([below, right]))


def _non_empty(rectangles: Rectangles) -> Rectangles:
    kept = (rectangles.row0 < rectangles.row1) & (rectangles.column0 < rectangles.column1)
    return rectangles.where(kept)
