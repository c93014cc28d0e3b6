"""A page of panels: where each stands, with its name above it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flexsparse.classify import Grid
from flexsparse.drawing.grid_axes import BARS, Sides
from flexsparse.drawing.panels import MOST_PANELS
from flexsparse.drawing.paper import DPI, QUIET, Sheet

# up to how many panels, how many in a row, and the width of the cells of each in inches
LAYOUTS = (
    (1, 1, 4.4),
    (2, 2, 3.4),
    (3, 3, 3.0),
    (12, 4, 2.6),
    (18, 6, 1.75),
    (MOST_PANELS, 8, 1.35),
)
MOST_POOLS = 128
MARGIN, LEFT, RIGHT, GAP, FOOTER, TITLE = 0.2, 0.66, 0.5, 0.34, 0.3, 0.5  # inches
NAME_LINE, NOTE_LINE, TOP_AXIS = 0.135, 0.115, 0.17
LEAST_WIDTH = 6.6  # takes the key to the colours


class Layout(NamedTuple):
    """How panels stand.

    in_row: how many stand in a row
    width: of the cells of each, in inches
    room: beside them, as a part of their width
    """

    in_row: int
    width: float
    room: float

    @classmethod
    def of(cls, count: int, room: float = BARS) -> Layout:
        """The layout for a number of panels."""
        count = min(count, MOST_PANELS)
        _, in_row, width = next(x for x in LAYOUTS if count <= x[0])
        return cls(min(in_row, count), width, room)

    @property
    def pools(self) -> int:
        """The most cells in a row; each takes two dots or more, so that none gets lost."""
        return min(MOST_POOLS, int(self.width * DPI / 2))

    @property
    def panel_width(self) -> float:
        """The width of a panel in inches."""
        return self.width * (1 + self.room)


class Tile(NamedTuple):
    """A panel on a page: its name, lines of text below that, and what paints its axes."""

    name: str
    text: str
    paint: Callable[[Any, Sides], None]


def page(
    title: str,
    tiles: Sequence[Tile],
    layout: Layout,
    grid: Grid,
    *,
    longest_label: int = 0,
    foot: float = 0.5,
) -> tuple[Sheet, float]:
    """A sheet with its panels painted, and how far down it is free.

    Args:
        title: of the page.
        tiles: what stands on it, row by row.
        layout: how it stands.
        grid: the lengths of all panels, which give their shape.
        longest_label: letters of the longest token label beside the cells.
        foot: inches left free below.
    """
    wide, height = layout.panel_width, layout.width * min(max(grid.q_len / grid.kv_len, 0.25), 1.5)
    names, texts = (max(tile[i].count("\n") + 1 for tile in tiles) for i in (0, 1))
    header = names * NAME_LINE + texts * NOTE_LINE + TOP_AXIS
    turned = longest_label * 0.065
    left = LEFT + turned
    step = header + height + FOOTER
    below = TITLE + -(-len(tiles) // layout.in_row) * step + turned
    width = left + layout.in_row * (wide + GAP) - GAP + RIGHT
    sheet = Sheet(max(width, LEAST_WIDTH), below + foot)
    sheet.text(MARGIN, 0.16, title, size=11, weight="bold")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, layout.in_row)
        x, y = left + column * (wide + GAP), TITLE + row * step + header
        is_last = column == layout.in_row - 1 or i == len(tiles) - 1
        sides = Sides(column == 0, is_last, row == 0, i + layout.in_row >= len(tiles))
        tile.paint(sheet.axes(x, y, wide, height), sides)
        y -= TOP_AXIS
        sheet.text(x, y, tile.text, size=7, color=QUIET, va="bottom", linespacing=1.15)
        y -= (tile.text.count("\n") + 1) * NOTE_LINE + 0.03
        sheet.text(x, y, tile.name, size=8, weight="bold", va="bottom", linespacing=1.15)
    return sheet, below


def lengths_text(grid: Grid, *, with_blocks: bool) -> str:
    """'4,096 queries × 4,096 keys, in blocks of 128 × 128'."""
    queries = "1 query" if grid.q_len == 1 else f"{grid.q_len:,} queries"
    text = f"{queries} × {grid.kv_len:,} key{'s' if grid.kv_len > 1 else ''}"
    q_block, kv_block = grid.block_size
    return f"{text}, in blocks of {q_block} × {kv_block}" if with_blocks else text
