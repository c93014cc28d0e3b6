"""A mask as a picture in characters: its blocks pooled to the terminal, or its elements."""

from __future__ import annotations

import os
import shutil
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses
from flexsparse.compiler import CompiledMask
from flexsparse.drawing.plane import ELEMENTS_UP_TO
from flexsparse.drawing.pools import covered
from flexsparse.expr import Mask
from flexsparse.tree import kept_at

MOST_COLUMNS = 64
MOST_ROWS = 48


class Ink(NamedTuple):
    """How the three states look: a character each, and the codes of its colour or ''."""

    empty: str
    partial: str
    full: str
    colours: tuple[str, str, str]

    @classmethod
    def of(cls, stream: TextIO) -> Ink:
        """Blocks and colour where the stream has them; NO_COLOR and pipes get plain characters."""
        try:
            "·▒█│┌┐└┘─".encode(stream.encoding or "ascii")
            glyphs = ("·", "▒", "█")
        except (UnicodeEncodeError, LookupError):
            glyphs = (".", "+", "#")
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        colour = stream.isatty() and not plain
        return cls(*glyphs, ("\033[2m", "\033[33m", "\033[36m") if colour else ("", "", ""))

    def paint(self, states: list[int]) -> str:
        """A line of states 0 (empty), 1 (partial) and 2 (full), coloured in runs."""
        glyphs = (self.empty, self.partial, self.full)
        line, last = "", 0
        for i in range(1, len(states) + 1):
            if i == len(states) or states[i] != states[last]:
                state = states[last]
                colour = self.colours[state]
                line += colour + glyphs[state] * (i - last) + ("\033[0m" if colour else "")
                last = i
        return line


def picture(compiled: CompiledMask, ink: Ink, width: int | None = None) -> str:
    """The mask of the first head and batch row, with a legend.

    Up to 64 tokens each character is an element; beyond that it is a pool of blocks, and a pool
    with any computed block shows.

    Args:
        compiled: the mask at its lengths.
        ink: from `Ink.of(sys.stdout)`.
        width: of the terminal, in characters; asked of it by default.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    classes = compiled.launches[0].classes
    if max(compiled.q_len, compiled.kv_len) <= ELEMENTS_UP_TO:
        kept = elements(compiled.masks[0], classes.grid)
        legend = [
            f"{ink.paint([2])} kept   {ink.paint([0])} masked   "
            f"{int(kept.sum()):,} of {kept.numel():,} elements kept ({kept.double().mean():.1%})"
        ]
        states = kept.int() * 2
    else:
        rows, columns = _shape(classes.grid, width - 2)
        states = pooled_states(classes, rows, columns)
        legend = _block_legend(classes, rows, columns, ink)
    repeat = 2 if states.shape[1] * 2 <= min(width - 2, MOST_COLUMNS) else 1
    frame = _frame(states.repeat_interleave(repeat, 1), compiled, ink)
    if classes.grid.planes > 1:
        legend.append("The picture is of head 0 in batch row 0; others may differ.")
    return "\n".join([*frame, *legend])


def elements(mask: Mask, grid: Grid) -> Tensor:
    """bool[q_len, kv_len]: which elements a mask keeps in head 0 of batch row 0."""
    zero = torch.tensor(0)
    q_idx = torch.arange(grid.q_len)[:, None] + grid.q_offset
    places = {"b": zero, "h": zero, "q_idx": q_idx, "kv_idx": torch.arange(grid.kv_len)}
    return kept_at(mask, places).expand(grid.q_len, grid.kv_len)


def pooled_states(classes: BlockClasses, rows: int, columns: int) -> Tensor:
    """int[rows, columns]: 0 where a pool has no computed block, 2 where all are FULL, 1 between.

    The pools part the blocks of the first plane as evenly as whole blocks can be.
    """
    grid = classes.grid
    row_edges = torch.arange(rows + 1) * grid.rows // rows
    column_edges = torch.arange(columns + 1) * grid.columns // columns
    full, partial = (
        covered(rectangles.of_plane(0), row_edges, column_edges)
        for rectangles in (classes.full, classes.partial)
    )
    size = row_edges.diff()[:, None] * column_edges.diff()
    return (full + partial > 0).int() + (full == size).int()


def _shape(grid: Grid, width: int) -> tuple[int, int]:
    """(rows, columns) of pools, such that a square mask looks square: characters are 1 x 2."""
    columns = max(1, min(grid.columns, width, MOST_COLUMNS))
    drawn = columns * 2 if columns * 2 <= min(width, MOST_COLUMNS) else columns
    rows = round(drawn / 2 * grid.q_len / grid.kv_len)
    return max(1, min(grid.rows, rows, MOST_ROWS)), columns


def _frame(states: Tensor, compiled: CompiledMask, ink: Ink) -> list[str]:
    """The lines of a picture in a box, with the first and last key and query at its edges."""
    fancy = ink.full != "#"
    top_left, top_right, low_left, low_right, bar, side = "┌┐└┘─│" if fancy else "++++-|"
    columns = states.shape[1]
    first, last = "keys 0", f"{compiled.kv_len - 1:,}"
    gap = max(1, columns + 2 - len(first) - len(last))
    lines = [first + " " * gap + last, top_left + bar * columns + top_right]
    for row, line in enumerate(states.tolist()):
        note = " query 0" if row == 0 else ""
        if row == len(states) - 1 and row:
            note = f" query {compiled.q_len - 1:,}"
        lines.append(side + ink.paint(line) + side + note)
    return [*lines, low_left + bar * columns + low_right]


def _block_legend(classes: BlockClasses, rows: int, columns: int, ink: Ink) -> list[str]:
    grid = classes.grid
    q_block, kv_block = grid.block_size
    full, partial = (x.of_plane(0).blocks for x in (classes.full, classes.partial))
    every = grid.rows * grid.columns
    if (rows, columns) == (grid.rows, grid.columns):
        meanings = ("full: no element masked", "partial: masked inside", "empty: skipped")
        scale = f"One cell is a block of {q_block} queries x {kv_block} keys."
    else:
        meanings = ("all its blocks full", "some computed", "none computed")
        scale = (
            f"One cell pools about {grid.rows / rows:.0f} x {grid.columns / columns:.0f} blocks "
            f"of {q_block} queries x {kv_block} keys."
        )
    key = "   ".join(f"{ink.paint([2 - i])} {meaning}" for i, meaning in enumerate(meanings))
    return [
        key,
        scale,
        f"{full + partial:,} of {every:,} blocks computed ({(full + partial) / every:.2%}): "
        f"{full:,} full, {partial:,} partial; {every - full - partial:,} skipped.",
    ]
