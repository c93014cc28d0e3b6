"""NATTEN's rule along one axis, as an interval of keys for each token.

An axis with dilation falls apart into groups of tokens that see only each other. Here its tokens
have places, one group after the other, each in a room of equal size: what a token sees is then one
interval of places, whatever kernel_size, stride, dilation and is_causal say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """The tokens of one axis, and what they see along it."""

    n: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    def room(self, tile: int) -> int:
        """The places of each group: a multiple of `tile`, as many as the largest group needs."""
        return -(-self.n // (self.dilation * tile)) * tile

    def windows(self, room: int) -> tuple[Tensor, Tensor]:
        """The first place that each place sees, and the one after the last: int64 [places] each.

        Padding, at the end of a room, sees what the last token of its group sees, so that no row
        is empty and no block of padding reaches further than a token does.
        """
        group = torch.arange(self.dilation)[:, None]
        members = (self.n - 1 - group) // self.dilation + 1
        index = torch.arange(room).minimum(members - 1)
        leader = index // self.stride * self.stride
        if self.is_causal:
            leader = (leader + self.stride - 1).minimum(members - 1)
            first, end = (leader - self.kernel_size + 1).clamp(min=0), index + 1
        else:
            leader = (leader + self.stride // 2).minimum(members - 1)
            first = (leader - self.kernel_size // 2).minimum(members - self.kernel_size).clamp(0)
            end = first + self.kernel_size
        return (first + group * room).flatten(), (end + group * room).flatten()

    def pairs(self, tile: int) -> int:
        """How many pairs of tiles of the axis see each other."""
        first, end = self.windows(self.room(tile))
        n_tiles = len(first) // tile
        row = torch.arange(len(first)) // tile
        # +1 where the tiles that a place sees begin and -1 behind them: a sum is positive between
        edges = torch.zeros(n_tiles, n_tiles + 1, dtype=torch.int32)
        one = torch.ones(len(first), dtype=torch.int32)
        edges.index_put_((row, first // tile), one, accumulate=True)
        edges.index_put_((row, (end - 1) // tile + 1), -one, accumulate=True)
        return int((edges.cumsum(1) > 0).sum())
