"""A plane: the blocks of q_len x kv_len of one mask, and the heads and batch rows that have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.expr import Mask
from flexsparse.heads import numbered
from flexsparse.tree import kept_at

ELEMENTS_UP_TO = 64  # tokens; shorter masks are drawn element by element
Owner = tuple[int | None, int | None]  # batch row and head; None: all of them


class Blocks(NamedTuple):
    """The blocks that are computed, as disjoint rectangles; every other block is EMPTY."""

    partial: Rectangles
    full: Rectangles


@dataclass(frozen=True, eq=False)
class Plane:
    """One picture's worth of blocks.

    name: the mask in words
    owners: the (batch row, head) pairs that have it
    grid: lengths and block size; of one batch row and one head
    mask: which elements it keeps in PARTIAL blocks; reads neither b nor h; None if unknown
    blocks: finds its blocks, which may be many: they are held no longer than they are needed
    """

    name: str
    owners: tuple[Owner, ...]
    grid: Grid
    mask: Mask | None
    blocks: Callable[[], Blocks]

    @property
    def is_short(self) -> bool:
        """Whether its elements are drawn, not its blocks."""
        if max(self.grid.q_len, self.grid.kv_len) > ELEMENTS_UP_TO:
            return False
        return self.mask is not None or not len(self.blocks().partial.plane)

    @property
    def who(self) -> str:
        """The owners in words: 'heads 0-7, 12', 'batch row 1, all heads'."""
        return who_text(self.owners)

    def state(self, row: int, column: int) -> str:
        """What one block is: 'empty', 'partial' or 'full'."""
        place = torch.tensor([row]), torch.tensor([column])
        partial, full = (bool(_covered(x, *place)) for x in self.blocks())
        return "full" if full else "partial" if partial else "empty"

    def elements(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor | None:
        """bool[queries, keys]: which elements are computed in a range of blocks and not masked.

        None if that is unknown. Ranges are of blocks, the end excluded, and cut to the lengths.
        """
        grid = self.grid
        q, kv = (
            torch.arange(first * block, min(end * block, n))
            for (first, end), block, n in (
                (rows, grid.block_size[0], grid.q_len),
                (columns, grid.block_size[1], grid.kv_len),
            )
        )
        row, column = q // grid.block_size[0], kv // grid.block_size[1]
        partial, full = (_covered(x, row, column) for x in self.blocks())
        if not bool(partial.any()):
            return full
        if self.mask is None:
            return None
        kept = kept_at(self.mask, {"q_idx": q[:, None] + grid.q_offset, "kv_idx": kv})
        return full | (partial & kept)


def plane_of(planes: Sequence[Plane], b: int | None, h: int | None) -> Plane | None:
    """The plane that a batch row and head have, or None if there is no such head or row."""
    for plane in planes:
        if not {(b, h), (None, h), (b, None), (None, None)}.isdisjoint(plane.owners):
            return plane
    return None


def who_text(owners: Sequence[Owner]) -> str:
    """Owners in words: 'heads 0-7, 12', 'batch row 1, all heads'."""
    heads_of: dict[int | None, list[int | None]] = {}
    for b, h in owners:
        heads_of.setdefault(b, []).append(h)
    rows_of: dict[tuple[int | None, ...], list[int | None]] = {}
    for b, heads in heads_of.items():
        rows_of.setdefault(tuple(heads), []).append(b)
    return "; ".join(_rows_and_heads(rows, heads) for heads, rows in rows_of.items())


def _rows_and_heads(rows: Sequence[int | None], heads: Sequence[int | None]) -> str:
    known = [h for h in heads if h is not None]
    text = numbered("head", known) if known else "all heads"
    in_batch = [b for b in rows if b is not None]
    if not in_batch:
        return text
    return f"{numbered('batch row', in_batch)}, {text}"


def _covered(rectangles: Rectangles, row: Tensor, column: Tensor) -> Tensor:
    """bool[rows, columns]: whether a block lies in one of the rectangles."""
    near = (
        (rectangles.row0 <= row[-1])
        & (rectangles.row1 > row[0])
        & (rectangles.column0 <= column[-1])
        & (rectangles.column1 > column[0])
    )
    covered = torch.zeros(len(row), len(column), dtype=torch.bool)
    for place in near.nonzero().flatten().tolist():
        _, row0, row1, column0, column1 = (int(x[place]) for x in rectangles)
        rows = (row >= row0) & (row < row1)
        covered |= rows[:, None] & (column >= column0) & (column < column1)
    return covered
