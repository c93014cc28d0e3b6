"""Cells of a grid of blocks, and what intervals prove of a mask in each.

A cell is a square of blocks: its plane, row and column, counted in cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.interval import INTERVAL_READING, Interval, Truth
from flexsparse.analysis.pyramid import Pyramid
from flexsparse.analysis.whole import loosely_truncated
from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tree import evaluate

SPLIT = 4  # a cell is split into SPLIT x SPLIT
CELLS_AT_ONCE = 1 << 15  # stays in the cache, and below the size torch starts threads for


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

    def read_by(self, mask: Mask) -> Grid:
        """The same grid with one batch row, and one head, where a mask does not tell them apart."""
        return self._replace(
            batch=self.batch if "b" in mask.variables else 1,
            heads=self.heads if "h" in mask.variables else (0,),
        )


def kept_pyramids() -> Callable[[Table], Pyramid]:
    """The pyramid of a table, built when it is asked for and once."""
    pyramids: dict[int, Pyramid] = {}

    def pyramid_of(table: Table) -> Pyramid:
        if id(table) not in pyramids:
            pyramids[id(table)] = Pyramid(table.tensor)
        return pyramids[id(table)]

    return pyramid_of


def interval_reading(
    mask: Mask, grid: Grid, pyramid_of: Callable[[Table], Pyramid] | None = None
) -> dict[str, Any]:
    """INTERVAL_READING for the cells of a grid, with the tables of this mask behind pyramids."""
    pyramid_of = pyramid_of or kept_pyramids()

    def lookup(table: Table, *indices: Interval | None) -> Any:
        return INTERVAL_READING["lookup"](pyramid_of(table), *indices)

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
    return bound_places(mask, reading, grid, cells[0], *positions(grid, cells, side))


def positions(grid: Grid, cells: list[Tensor], side: int) -> tuple[Interval, Interval]:
    """The queries and the keys of cells."""
    _, row, column = cells
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
    return q, kv


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
    if grid.planes == 1:
        return torch.tensor(0), heads[0]
    return plane // len(heads), heads[plane % len(heads)]


def all_cells(grid: Grid, side: int) -> list[Tensor]:
    """Planes, rows and columns of the cells of `side` blocks that make up a grid."""
    lengths = grid.planes, -(-grid.rows // side), -(-grid.columns // side)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in lengths))
    return list(cells.T.contiguous())


def split(grid: Grid, cells: list[Tensor], side: int) -> list[Tensor]:
    """The cells of `side` blocks that the given cells, SPLIT times as wide, are made of."""
    step = torch.arange(SPLIT)
    plane, row, column = (x[:, None, None] for x in cells)
    rows, columns = row * SPLIT + step[:, None], column * SPLIT + step
    parts = [x.expand(-1, SPLIT, SPLIT).flatten() for x in (plane, rows, columns)]
    inside = (parts[1] * side < grid.rows) & (parts[2] * side < grid.columns)
    # to choose all of them takes several times as long as to make them
    return parts if inside.all() else [x[inside] for x in parts]
