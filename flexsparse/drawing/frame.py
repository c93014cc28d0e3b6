"""One panel on a sheet: the cells of a grid, its four axes, and bars of work beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.drawing.colours import RGB, css
from flexsparse.drawing.paper import LINE, POINT, QUIET, Sheet
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.words import tokens

BARS = 0.2  # the width of the bars of work and the gap before them, as a part of that of the cells
GAP = 0.035
NARROW = 2  # inches; a narrower panel has no numbers in the middle
LINES_UP_TO = 32  # cells in a row between which lines are drawn


class Sides(NamedTuple):
    """Which sides of a panel have no neighbour, and so carry the numbers of their axis."""

    left: bool = True
    right: bool = True
    top: bool = True
    bottom: bool = True


class Frame(NamedTuple):
    """Where cells stand on a sheet, and what they are.

    x, y: of the upper left corner, in inches
    width, height: of the cells, in inches
    room: to the right of the cells, up to the numbers of blocks, in inches
    grid: lengths and block size; query 0 is on top
    """

    sheet: Sheet
    x: float
    y: float
    width: float
    height: float
    room: float
    grid: Grid

    def across(self, key: float) -> float:
        """Where a key stands, in inches."""
        return self.x + self.width * key / self.grid.kv_len

    def down(self, query: float) -> float:
        """Where a query stands, in inches."""
        return self.y + self.height * query / self.grid.q_len

    def cells(self, image: Tensor, pools: Pools) -> None:
        """Paint cells: uint8[rows, columns, 3], a colour for each pool."""
        # below the cells: on top, the frame would hide a thin column at the edge
        frame = self.outline(LINE, zorder=0)
        rows, columns = image.shape[:2]
        high, wide = (k * n for k, n in zip(pools.side, self.grid.block_size, strict=True))
        width, height = self.across(columns * wide) - self.x, self.down(rows * high) - self.y
        cells = self.sheet.image(image, self.x, self.y, width, height)
        # the last pools may stick out over the end
        cells.set_clip_path(frame)
        if max(rows, columns) > LINES_UP_TO:
            return
        right, below = self.x + self.width, self.y + self.height
        across = [self.across(x) for x in range(wide, self.grid.kv_len, wide)]
        down = [self.down(y) for y in range(high, self.grid.q_len, high)]
        segments = [((x, self.y), (x, below)) for x in across]
        segments += [((self.x, y), (right, y)) for y in down]
        self.sheet.lines(segments, color="white", linewidth=0.8, zorder=3)

    def outline(self, colour: str, zorder: float) -> Any:
        """A frame round the cells."""
        style = {"fill": False, "edgecolor": colour, "linewidth": 1.6, "zorder": zorder}
        return self.sheet.rectangle(self.x, self.y, self.width, self.height, **style)

    def bars(self, edges: Tensor, parts: Sequence[tuple[Tensor, RGB]]) -> None:
        """Bars of work beside the cells, how much each row of queries computes; below, the most.

        Args:
            edges: int64[bars + 1], the rows where bars begin and end; a bar is their mean.
            parts: int64[rows] and a colour each: what is stacked, from the cells outwards.
        """
        most = int(torch.stack([part for part, _ in parts]).sum(0).max())
        first = self.x + self.width * (1 + GAP)
        scale = self.width * (BARS - GAP) / max(most, 1)
        queries = (edges * self.grid.block_size[0]).clamp(max=self.grid.q_len).double()
        y = (self.y + queries * (self.height / self.grid.q_len)).repeat_interleave(2)
        stacked = torch.stack([part for part, _ in parts]).cumsum(0)
        # the longest first, so that the shorter lie on them
        for total, (_, colour) in reversed(list(zip(stacked, parts, strict=True))):
            until = torch.cat([total.new_zeros(1), total.cumsum(0)])[edges]
            ends = first + until.diff() / edges.diff().double() * scale
            base = ends.new_full((1,), first)
            x = torch.cat([base, ends.repeat_interleave(2), base])
            self.sheet.polygon(torch.stack([x, y], 1).numpy(), facecolor=css(colour))
        below = self.y + self.height
        self.sheet.lines([((first, self.y), (first, below))], color=LINE, linewidth=0.6)
        right = self.x + self.width * (1 + BARS)
        self._note(f"{most:,}", right, below + 3 * POINT, "right", "top")

    def axes(self, sides: Sides) -> None:
        """Tokens at the left and the bottom, blocks at the top and the right."""
        q_block, kv_block = self.grid.block_size
        most = 2 if self.width < NARROW else 3
        x_ticks = _ticks(self.grid.kv_len, kv_block, most)
        y_ticks = _ticks(self.grid.q_len, q_block, most)
        across = ("left", "center", "right")[:: 4 - len(x_ticks)]
        down = ("top", "center", "bottom")[:: 4 - len(y_ticks)]
        below, right = self.y + self.height, self.x + self.width + self.room
        for i, (key, align) in enumerate(zip(x_ticks, across, strict=True)):
            x = self.across(key)
            if sides.bottom:
                text = _named("key", i, tokens(key))
                self._note(text, x, below + 3 * POINT, align, "top")
            if sides.top:
                text = _named("block", i, f"{-(-key // kv_block):,}")
                self._note(text, x, self.y - 2 * POINT, align, "bottom", size=6)
        for i, (query, align) in enumerate(zip(y_ticks, down, strict=True)):
            y = self.down(query)
            if sides.left:
                text = _named("query", i, tokens(query + self.grid.q_offset))
                self._note(text, self.x - 3 * POINT, y, "right", align)
            if sides.right:
                text = _named("block", i, f"{-(-query // q_block):,}")
                self._note(text, right + 3 * POINT, y, "left", align, size=6)

    def labels(self, words: Sequence[str] | None, sides: Sides) -> None:
        """The tokens themselves, or their positions: of queries at the left, of keys below."""
        q_len, kv_len, offset = self.grid.q_len, self.grid.kv_len, self.grid.q_offset
        if sides.left:
            for i in range(q_len) if words else sorted({0, q_len - 1}):
                known = words is not None and 0 <= i + offset < len(words)
                text = words[i + offset] if words and known else _named("query", i, f"{i + offset}")
                self._note(text, self.x - 3 * POINT, self.down(i + 0.5), "right", "center")
        if sides.bottom:
            below = self.y + self.height + 3 * POINT
            for i in range(kv_len) if words else sorted({0, kv_len - 1}):
                text = words[i] if words else _named("key", i, f"{i}")
                rotation = 90 if words else 0
                self._note(text, self.across(i + 0.5), below, "center", "top", rotation=rotation)

    def ends(self, queries: tuple[int, int], keys: tuple[int, int]) -> None:
        """The positions of the first and last query and key."""
        for i, (position, align) in enumerate(zip(queries, ("top", "bottom"), strict=True)):
            y = self.down(i * self.grid.q_len)
            self._note(_named("query", i, f"{position:,}"), self.x - 3 * POINT, y, "right", align)
        below = self.y + self.height + 3 * POINT
        for i, (position, align) in enumerate(zip(keys, ("left", "right"), strict=True)):
            x = self.across(i * self.grid.kv_len)
            self._note(_named("key", i, f"{position:,}"), x, below, align, "top")

    def _note(self, text: str, x: float, y: float, across: str, down: str, **style: Any) -> None:
        style = {"size": 6.5, "color": QUIET, "ha": across, "va": down, **style}
        self.sheet.text(x, y, text, **style)


def _ticks(length: int, block: int, most: int) -> list[int]:
    """Where an axis has numbers: its ends, and the block boundary next to the middle."""
    middle = length // 2 // block * block
    return sorted({0, middle, length} if most > 2 else {0, length})


def _named(what: str, place: int, number: str) -> str:
    return f"{what} {number}" if place == 0 else number
