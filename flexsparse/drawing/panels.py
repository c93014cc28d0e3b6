"""The numbers behind a picture: pooled counts of each distinct mask. Nothing here needs matplotlib.

A panel of up to 64 tokens shows elements; a longer one shows blocks, pooled to what a picture can
hold. A pool with one computed block is not empty, however many blocks it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.drawing.density import MOST_BLOCKS, kept_elements
from flexsparse.drawing.plane import Blocks, Owner, Plane
from flexsparse.drawing.pools import Pools

MOST_PANELS = 32
ELEMENTS_EVALUATED = 1 << 25  # of all panels together; about half a second
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Panel:
    """One distinct mask, pooled.

    name: the mask in words
    who: the heads, and batch rows, that have it, in words
    owners: the same as (batch row, head) pairs; None: all
    grid: lengths and block size
    pools: how its blocks are pooled
    partial, full: int64[rows, columns], blocks of each pool
    work: int64[2, rows of blocks], the PARTIAL and the FULL blocks that each row computes
    kept: int64[rows, columns], elements of each pool that the mask keeps; None if not computed
    elements: bool[q_len, kv_len] of a mask of up to 64 tokens, else None
    """

    name: str
    who: str
    owners: tuple[Owner, ...]
    grid: Grid
    pools: Pools
    partial: Tensor
    full: Tensor
    work: Tensor
    kept: Tensor | None
    elements: Tensor | None

    @property
    def states(self) -> Tensor:
        """int64[rows, columns]: EMPTY if no block of a pool is computed, FULL if all are FULL."""
        return (self.partial + self.full > 0).long() + (self.full == self.pools.blocks).long()

    @property
    def shade(self) -> Tensor:
        """float64[rows, columns]: the part of a pool's elements that is kept.

        Where that was not computed, the part of its blocks that is computed.
        """
        if self.kept is None:
            return (self.partial + self.full) / self.pools.blocks.double()
        return self.kept / self.pools.elements(self.grid).double()

    @property
    def blocks(self) -> int:
        """Blocks that are computed."""
        return int((self.partial + self.full).sum())

    @property
    def block_density(self) -> float:
        """Blocks that are computed, as a part of all blocks."""
        return self.blocks / (self.grid.rows * self.grid.columns)

    @property
    def element_density(self) -> float | None:
        """Elements that are kept, as a part of all elements; None if not computed."""
        if self.kept is None:
            return None
        return int(self.kept.sum()) / (self.grid.q_len * self.grid.kv_len)


@dataclass(frozen=True, eq=False)
class Panels:
    """What a picture shows.

    shown: the panels, in the order of the first head of each
    left_out: distinct masks beyond those shown
    """

    shown: tuple[Panel, ...]
    left_out: int

    @property
    def grid(self) -> Grid:
        """The lengths and block size, which all panels share."""
        return self.shown[0].grid

    def weighted(self, densities: list[float | None]) -> float | None:
        """The mean of a number of each panel over the heads and batch rows that have it."""
        known = [x for x in densities if x is not None]
        if len(known) < len(densities):
            return None
        weights = [len(panel.owners) for panel in self.shown]
        return sum(w * x for w, x in zip(weights, known, strict=True)) / sum(weights)


class Kept(NamedTuple):
    """How many elements are kept in PARTIAL blocks; int64[blocks] each.

    row, column: of the block
    elements: kept in it
    """

    row: Tensor
    column: Tensor
    elements: Tensor


class Counted(NamedTuple):
    """The blocks of a plane; kept is None where elements were not counted."""

    plane: Plane
    blocks: Blocks
    kept: Kept | None


def counted(plane: Plane, most: int) -> Counted:
    """The blocks of a plane; elements are counted if no more than `most` must be evaluated."""
    blocks = plane.blocks()
    if plane.mask is None or blocks.partial.blocks > MOST_BLOCKS:
        return Counted(plane, blocks, None)
    _, row, _, column, _ = blocks.partial.units()
    elements = kept_elements(plane.mask, plane.grid, row, column, most)
    return Counted(plane, blocks, None if elements is None else Kept(row, column, elements))


def panel(found: Counted, most_pools: int) -> Panel:
    """A plane, pooled to at most `most_pools` in a row or column."""
    plane, blocks, counts = found
    grid = plane.grid
    pools = Pools.of(grid, most_pools)
    full = pools.blocks_of(blocks.full)
    kept = elements = None
    if counts is None:
        partial = pools.blocks_of(blocks.partial)
    else:
        row, column, in_block = counts
        partial = pools.sum_of(row, column, torch.ones_like(row))
        kept = pools.elements_of(blocks.full, grid, full) + pools.sum_of(row, column, in_block)
    if plane.is_short:
        elements = plane.elements((0, grid.rows), (0, grid.columns))
    work = torch.stack([_per_row(x, grid.rows) for x in blocks])
    return Panel(
        plane.name, plane.who, plane.owners, grid, pools, partial, full, work, kept, elements
    )


def _per_row(rectangles: Rectangles, rows: int) -> Tensor:
    """int64[rows]: how many blocks rectangles cover in each row."""
    change = torch.zeros(rows + 1, dtype=torch.int64)
    width = rectangles.column1 - rectangles.column0
    change.index_add_(0, rectangles.row0, width).index_add_(0, rectangles.row1, -width)
    return change.cumsum(0)[:-1]


def panels(found: Sequence[Plane], most_pools: int) -> Panels:
    """Planes, pooled to at most `most_pools` in a row or column, and no more than fit a page."""
    shown = found[:MOST_PANELS]
    most = ELEMENTS_EVALUATED // len(shown)
    return Panels(
        tuple(panel(counted(plane, most), most_pools) for plane in shown), len(found) - len(shown)
    )
