"""A page of panels: where each stands, with its name above it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexsparse.analysis.cells import Grid
from flexsparse.drawing.frame import BARS, Frame, Sides
from flexsparse.drawing.panels import MOST_PANELS
from flexsparse.drawing.paper import DPI, QUIET, Sheet, wrapped
from flexsparse.drawing.words import tokens
from flexsparse.text import amount

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
LETTER, DIGIT = 0.065, 0.051  # of a token label, and of the positions on an axis
LABEL = 0.1  # from one token label to the next
LEAST_WIDTH = 6.6  # takes the key to the colours


class Layout(NamedTuple):
    """How panels stand.

    in_row: how many stand in a row
    width: of the cells of each, in inches
    room: beside them, in inches
    """

    in_row: int
    width: float
    room: float

    @classmethod
    def of(cls, count: int, *, bars: bool = True, labels: int = 0) -> Layout:
        """The layout for a number of panels, with or without bars of work and token labels."""
        count = min(count, MOST_PANELS)
        _, in_row, width = next(x for x in LAYOUTS if count <= x[0])
        width = max(width, labels * LABEL)
        return cls(min(in_row, count), width, width * BARS if bars else 0)

    @property
    def pools(self) -> int:
        """The most cells in a row; each takes two dots or more, so that none gets lost."""
        return min(MOST_POOLS, int(self.width * DPI / 2))


class Tile(NamedTuple):
    """A panel on a page: its name, lines of text below that, and what paints it."""

    name: str
    text: str
    paint: Callable[[Frame, Sides], None]


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
    width, height = layout.width, layout.width * proportion(grid)
    names = max(tile.name.count("\n") + 1 for tile in tiles)
    texts = max(tile.text.count("\n") + 1 for tile in tiles)
    header = names * NAME_LINE + texts * NOTE_LINE + TOP_AXIS
    positions = f"query {tokens(grid.q_offset)}", tokens(grid.q_offset + grid.q_len)
    left = max(LEFT, 0.05 + max(map(len, positions)) * DIGIT) + longest_label * LETTER
    across = width + layout.room + GAP
    down = header + height + FOOTER
    below = TITLE + -(-len(tiles) // layout.in_row) * down + longest_label * LETTER
    sheet = Sheet(max(left + layout.in_row * across - GAP + RIGHT, LEAST_WIDTH), below + foot)
    title = wrapped(title, sheet.width - 2 * MARGIN, 11, 1)
    sheet.text(MARGIN, 0.16, title, size=11, weight="bold")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, layout.in_row)
        x, y = left + column * across, TITLE + row * down + header
        is_last = column == layout.in_row - 1 or i == len(tiles) - 1
        sides = Sides(column == 0, is_last, row == 0, i + layout.in_row >= len(tiles))
        tile.paint(Frame(sheet, x, y, width, height, layout.room, grid), sides)
        y -= TOP_AXIS
        sheet.text(x, y, tile.text, size=7, color=QUIET, va="bottom", linespacing=1.15)
        y -= (tile.text.count("\n") + 1) * NOTE_LINE + 0.03
        sheet.text(x, y, tile.name, weight="bold", va="bottom", linespacing=1.15)
    return sheet, below


def proportion(grid: Grid) -> float:
    """The height of a panel over its width: queries over keys, but never very flat or tall."""
    return min(max(grid.q_len / grid.kv_len, 0.25), 1.5)


def lengths_text(grid: Grid, *, with_blocks: bool) -> str:
    """'4,096 queries × 4,096 keys, in blocks of 128 × 128'."""
    text = f"{amount(grid.q_len, 'query', 'queries')} × {amount(grid.kv_len, 'key')}"
    q_block, kv_block = grid.block_size
    return f"{text}, in blocks of {q_block} × {kv_block}" if with_blocks else text
