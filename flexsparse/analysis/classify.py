"""EMPTY, PARTIAL or FULL for every block of a mask, proved by hierarchical refinement.

A cell is a square of blocks. Cells of one size are bounded at once; a cell that is everywhere true
is FULL as a whole, one that is nowhere true is EMPTY, and the rest are split 4 x 4 until a cell is
one block. A block that reaches its bounds is PARTIAL (reached.py); what is then still open is
settled by looking (settle.py). The cost follows the boundary of the mask, not its area.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import (
    CELLS_AT_ONCE,
    SPLIT,
    Grid,
    all_cells,
    bound_cells,
    interval_reading,
    kept_pyramids,
    split,
)
from flexsparse.analysis.reached import bound_blocks, reached_reading
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.settle import settle
from flexsparse.expr import Mask

CELLS_TO_BEGIN_WITH = 1 << 8  # of each plane; so many take hardly longer than one


class BlockClasses(NamedTuple):
    """The class of every block of a grid; a block in neither list is EMPTY.

    grid: lengths and block size
    partial, full: disjoint rectangles of blocks
    evaluated: blocks that were settled by elements that intervals could not tell apart
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

    Sound and complete: what intervals leave open is settled by witnesses, or by every element.
    A ragged last block is at most PARTIAL, as in torch's create_block_mask.
    Cost: the boundary of the mask in blocks, times its steps; no [q_len, kv_len] tensor is made.
    """
    pyramid_of = kept_pyramids()
    reading = interval_reading(mask, grid, pyramid_of)
    of_blocks = reached_reading(reading, pyramid_of)
    side = 1
    while -(-grid.rows // side) * -(-grid.columns // side) > CELLS_TO_BEGIN_WITH:
        side *= SPLIT
    nothing = [torch.arange(0)] * 3
    full, partial, evaluated = [_rectangles(grid, nothing, 1)], [_rectangles(grid, nothing, 1)], 0
    # depth first, so that memory follows the result and not the number of open cells
    stack = [(side, all_cells(grid, side))]
    while stack:
        side, cells = stack.pop()
        if not len(cells[0]):
            continue
        if len(cells[0]) > CELLS_AT_ONCE:
            chunks = zip(*(torch.split(x, CELLS_AT_ONCE) for x in cells), strict=True)
            stack += [(side, list(chunk)) for chunk in chunks]
            continue
        if side > 1:
            always, ever = bound_cells(mask, reading, grid, cells, side)
            open_cells = [x[ever & ~always] for x in cells]
            stack.append((side // SPLIT, split(grid, open_cells, side // SPLIT)))
        else:
            always, ever, *known = bound_blocks(mask, of_blocks, grid, cells)
            open_cells, known = ([x[ever & ~always] for x in part] for part in (cells, known))
            some_partial, some_full, looked_at = settle(mask, reading, grid, open_cells, *known)
            partial.append(_rectangles(grid, some_partial, 1))
            full.append(_rectangles(grid, some_full, 1))
            evaluated += looked_at
        full.append(_rectangles(grid, [x[always] for x in cells], side))
    whole, ragged = _part_ragged(grid, Rectangles.joined(full))
    return BlockClasses(grid, Rectangles.joined([*partial, ragged]), whole, evaluated)


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
