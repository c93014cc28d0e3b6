"""Pooling: how many blocks, and how many kept elements, lie in each of a few large cells.

A grid of thousands of blocks is never drawn, nor made: pixels would then decide which of its blocks
are seen. It is cut into pools of whole blocks, and counts of blocks are exact in each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.rectangles import Rectangles

RECTANGLES_AT_ONCE = 1 << 18


class Pools(NamedTuple):
    """A grid of blocks cut into pools; the last of a line may be smaller than the others.

    row_edges, column_edges: int64, in blocks, the first being 0 and the last the whole
    side: blocks of queries and blocks of keys that a pool has
    """

    row_edges: Tensor
    column_edges: Tensor
    side: tuple[int, int]

    @classmethod
    def of(cls, grid: Grid, most: int) -> Pools:
        """The smallest pools of which there are at most `most` in a line."""
        lines = (grid.rows, grid.columns)
        side = (-(-grid.rows // most), -(-grid.columns // most))
        edges = [
            torch.arange(-(-n // k) + 1).mul(k).clamp(max=n)
            for n, k in zip(lines, side, strict=True)
        ]
        return cls(edges[0], edges[1], side)

    @property
    def shape(self) -> tuple[int, int]:
        """Pools of queries and pools of keys."""
        return len(self.row_edges) - 1, len(self.column_edges) - 1

    @property
    def blocks(self) -> Tensor:
        """int64[rows, columns]: the blocks of each pool."""
        return self.row_edges.diff()[:, None] * self.column_edges.diff()

    def elements(self, grid: Grid) -> Tensor:
        """int64[rows, columns]: the elements of each pool that lie inside the lengths."""
        queries, keys = (edges.diff() for edges in self._token_edges(grid))
        return queries[:, None] * keys

    def _token_edges(self, grid: Grid) -> tuple[Tensor, Tensor]:
        q_block, kv_block = grid.block_size
        rows = (self.row_edges * q_block).clamp(max=grid.q_len)
        return rows, (self.column_edges * kv_block).clamp(max=grid.kv_len)

    def blocks_of(self, rectangles: Rectangles) -> Tensor:
        """int64[rows, columns]: the blocks of each pool that disjoint rectangles cover."""
        return covered(rectangles, self.row_edges, self.column_edges)

    def elements_of(self, rectangles: Rectangles, grid: Grid, blocks: Tensor) -> Tensor:
        """int64[rows, columns]: the elements of each pool in blocks that rectangles cover.

        Args:
            rectangles: disjoint.
            grid: lengths and block size.
            blocks: what blocks_of says of them.
        """
        q_block, kv_block = grid.block_size
        row1, column1 = rectangles.row1 * q_block, rectangles.column1 * kv_block
        if not bool((row1 > grid.q_len).any() | (column1 > grid.kv_len).any()):
            return blocks * (q_block * kv_block)
        tokens = Rectangles(
            rectangles.plane,
            rectangles.row0 * q_block,
            row1.clamp(max=grid.q_len),
            rectangles.column0 * kv_block,
            column1.clamp(max=grid.kv_len),
        )
        return covered(tokens, *self._token_edges(grid))

    def sum_of(self, row: Tensor, column: Tensor, values: Tensor) -> Tensor:
        """int64[rows, columns]: the sum of the values of the blocks in each pool."""
        place = row // self.side[0] * self.shape[1] + column // self.side[1]
        total = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.int64)
        return total.index_add_(0, place, values).view(self.shape)


def covered(rectangles: Rectangles, row_edges: Tensor, column_edges: Tensor) -> Tensor:
    """int64[rows, columns]: the area that disjoint rectangles cover of each cell between edges.

    Cost: the rectangles plus the cells. A rectangle is four corners with signs. The area above and
    to the left of (r, c) is the sum of sign * (r - a) * (c - b) over the corners (a, b) there, so
    that sums of sign, sign * a, sign * b and sign * a * b over corners are all it takes.
    """
    rows, columns = len(row_edges), len(column_edges)
    moments = torch.zeros(4, rows * columns, dtype=torch.int64)
    for start in range(0, len(rectangles.plane), RECTANGLES_AT_ONCE):
        _, *ends = rectangles.where(slice(start, start + RECTANGLES_AT_ONCE))
        # the first edge at or after each end
        top, bottom, left, right = (
            torch.searchsorted(row_edges if i < 2 else column_edges, x.contiguous())
            for i, x in enumerate(ends)
        )
        for a, row, row_sign in ((ends[0], top, 1), (ends[1], bottom, -1)):
            for b, column, column_sign in ((ends[2], left, 1), (ends[3], right, -1)):
                place = row * columns + column
                sign = torch.full_like(place, row_sign * column_sign)
                values = (sign, sign * a, sign * b, sign * a * b)
                for moment, value in zip(moments, values, strict=True):
                    moment.index_add_(0, place, value)
    one, a, b, ab = moments.view(4, rows, columns).cumsum(1).cumsum(2)
    r, c = row_edges[:, None], column_edges
    above: Tensor = one * r * c - a * c - b * r + ab
    return above.diff(dim=0).diff(dim=1)
