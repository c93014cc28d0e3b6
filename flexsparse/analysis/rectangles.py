"""Rectangles of blocks: what the analysis finds, as it finds it, and never a list of all blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Rectangles(NamedTuple):
    """Rectangles of blocks: row0 <= row < row1 and column0 <= column < column1, an entry each."""

    plane: Tensor
    row0: Tensor
    row1: Tensor
    column0: Tensor
    column1: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Rectangles]) -> Rectangles:
        """The rectangles of all parts, of which there is one at least."""
        return cls(*(torch.cat(entries) for entries in zip(*parts, strict=True)))

    @property
    def blocks(self) -> int:
        """How many blocks the rectangles hold."""
        return int(((self.row1 - self.row0) * (self.column1 - self.column0)).sum())

    def where(self, chosen: Tensor | slice) -> Rectangles:
        """Some of the rectangles: by a boolean for each, by their places, or by a slice."""
        return Rectangles(*(entries[chosen] for entries in self))

    def of_plane(self, plane: int) -> Rectangles:
        """The rectangles of one plane."""
        return self.where(self.plane == plane)

    def transposed(self) -> Rectangles:
        """The same rectangles with queries and keys exchanged."""
        return Rectangles(self.plane, self.column0, self.column1, self.row0, self.row1)

    def rows(self) -> Rectangles:
        """Every row of every rectangle, as a rectangle one block high."""
        height = self.row1 - self.row0
        which = torch.repeat_interleave(height)
        row = torch.arange(len(which)) + (self.row0 - height.cumsum(0) + height)[which]
        return Rectangles(self.plane[which], row, row + 1, self.column0[which], self.column1[which])

    def units(self) -> Rectangles:
        """Every block of every rectangle, as a rectangle of its own; row by row."""
        return self.rows().transposed().rows().transposed()
