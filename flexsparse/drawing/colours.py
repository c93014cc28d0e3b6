"""The colours of the three states, on a light and on a dark ground.

Hue tells them apart for readers with and without colour blindness (orange and blue), lightness in
grey: EMPTY is the ground, FULL is farthest from it, and every shade of PARTIAL lies between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RGB = tuple[int, int, int]


class Colours(NamedTuple):
    """A palette; PARTIAL goes from `sparse` to `dense` with the part of elements that is kept."""

    empty: RGB
    sparse: RGB
    dense: RGB
    full: RGB

    @property
    def partial(self) -> RGB:
        """PARTIAL where one colour stands for all of its shades."""
        a, b, c = ((x + y) // 2 for x, y in zip(self.sparse, self.dense, strict=True))
        return a, b, c


LIGHT = Colours((245, 244, 240), (248, 190, 96), (204, 90, 10), (24, 44, 96))
DARK = Colours((40, 42, 48), (124, 72, 22), (218, 130, 40), (170, 206, 255))

# of compare: only a, only b, both, and cells where both a and b keep what the other does not
ONLY_A: RGB = (31, 88, 160)
ONLY_B: RGB = (222, 118, 20)
BOTH: RGB = (196, 196, 192)
EACH: RGB = (92, 20, 84)


def painted(states: Tensor, shade: Tensor, colours: Colours = LIGHT) -> Tensor:
    """uint8[rows, columns, 3]: cells of states 0 (EMPTY), 1 (PARTIAL, shaded) and 2 (FULL)."""
    empty, sparse, dense, full = (torch.tensor(x, dtype=torch.float64) for x in colours)
    # the square root parts the low densities, which are the usual ones
    weight = shade.double().clamp(0, 1).sqrt()[..., None]
    partial = sparse + (dense - sparse) * weight
    state = states[..., None]
    image = torch.where(state == 0, empty, torch.where(state == 1, partial, full))
    return image.round().to(torch.uint8)


def chosen(classes: Tensor, colours: list[RGB]) -> Tensor:
    """uint8[rows, columns, 3]: cells in the colour of their class."""
    return torch.tensor(colours, dtype=torch.uint8)[classes]


def css(colour: RGB) -> str:
    """A colour as '#rrggbb'."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
