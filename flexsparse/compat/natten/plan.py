"""The order in which the tokens of a grid are stored, and the mask of a neighborhood in that order.

A block is 128 tokens. In row-major order those are a strip of the grid, and together they see far
more keys than each of them does; in tiles they are a cube of it. Which order computes fewer blocks
is counted, and the plan keeps it with the compiled mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse import CompiledMask, Mask, compile_mask, kv_idx, lookup, q_idx
from flexsparse.compat.natten.axes import Axis
from flexsparse.default_device import cpu_by_default
from flexsparse.masks import causal, full, neighborhood

BLOCK = 128
# Of row-major order the blocks of this many rows are counted, spread over the grid: the analysis of
# all takes seconds for a video, and would mostly be thrown away.
ROWS_COUNTED = 16
# Storing the tokens of a row of blocks in tiles, and its output back, takes as long as this many
# blocks do.
COST_OF_TILES = 2


class Tiles(NamedTuple):
    """Tokens stored tile by tile, first those of one dilation group, then those of the next.

    A grid that tiles and dilation do not divide is padded at the end of its axes.

    shape: tokens along each axis
    dilation: tokens from one of a group to the next, along each axis
    tile: tokens of a tile along each axis, all of one group
    """

    shape: tuple[int, ...]
    dilation: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The tiles of a group along each axis."""
        axes = zip(self.shape, self.dilation, self.tile, strict=True)
        return tuple(-(-n // (gap * size)) for n, gap, size in axes)

    @property
    def padded(self) -> tuple[int, ...]:
        """Tokens along each axis, padding among them."""
        axes = zip(self.dilation, self.counts, self.tile, strict=True)
        return tuple(prod(axis) for axis in axes)

    def places(self) -> list[Tensor]:
        """Where each stored token stands along each axis, as `Axis.windows` counts."""
        sizes, rank = (*self.dilation, *self.counts, *self.tile), len(self.shape)
        found = []
        for axis, n in enumerate(self.padded):
            its_sizes = [x if i % rank == axis else 1 for i, x in enumerate(sizes)]
            found.append(torch.arange(n).view(its_sizes).expand(sizes).flatten())
        return found

    def store(self, x: Tensor) -> Tensor:
        """[B, *shape, heads, D] -> [B, heads, stored tokens, D]; padding is 0."""
        rank = len(self.shape)
        padding = [n - given for n, given in zip(self.padded, self.shape, strict=True)]
        if any(padding):
            # torch takes the last dimension first
            ends = [end for n in reversed(padding) for end in (0, n)]
            x = torch.nn.functional.pad(x, [0, 0, 0, 0, *ends])
        axes = zip(self.counts, self.tile, self.dilation, strict=True)
        x = x.reshape(len(x), *(size for axis in axes for size in axis), *x.shape[-2:])
        parts = [1 + 3 * axis + part for part in (2, 0, 1) for axis in range(rank)]
        return x.permute(0, -2, *parts, -1).flatten(2, -2)

    def restore(self, x: Tensor) -> Tensor:
        """[B, heads, stored tokens, D] -> [B, *shape, heads, D]."""
        rank, heads, dim = len(self.shape), x.shape[1], x.shape[3]
        x = x.reshape(len(x), heads, *self.dilation, *self.counts, *self.tile, dim)
        parts = [2 + rank * part + axis for axis in range(rank) for part in (1, 2, 0)]
        x = x.permute(0, *parts, 1, -1).reshape(len(x), *self.padded, heads, dim)
        for axis, n in enumerate(self.shape):
            x = x.narrow(1 + axis, 0, n)
        return x


class Plan(NamedTuple):
    """A neighborhood, ready to run.

    attend: of queries in this order to keys in this order, with additional ones behind them
    tiles: the order; None where it is row-major
    """

    attend: CompiledMask
    tiles: Tiles | None


@cpu_by_default()
def plan(
    shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    n_additional: int,
    device: torch.device,
) -> Plan:
    """A neighborhood in the order that computes the fewest blocks.

    Raises:
        MaskError: the numbers do not fit the shape.
    """
    numbers = [_short(x) for x in (kernel_size, stride, dilation, is_causal)]
    pattern = neighborhood(shape, *numbers)
    axes = [Axis(*x) for x in zip(shape, kernel_size, stride, dilation, is_causal, strict=True)]
    n, label, tiles = prod(shape), pattern.name, None
    if len(axes) == 1 and dilation == (1,):
        mask = _of_sequence(axes[0], pattern)
        mask = mask | (kv_idx >= n) if n_additional else mask
    else:
        mask = _row_major(axes, n_additional)
        tiled, cost = _best_tiles(axes)
        if cost < _row_major_blocks(mask, n, n_additional):
            rooms = [axis.room(size) for axis, size in zip(axes, tiled.tile, strict=True)]
            mask, tiles = _near(axes, rooms, tiled.places(), n_additional), tiled
            n = prod(tiles.padded)
            label += f" in tiles of {' x '.join(map(str, tiles.tile))}"
    if n_additional:
        label += f" and {n_additional} additional keys"
    mask = mask.named(label).to(device)
    return Plan(compile_mask(mask, n, n + n_additional, q_offset=0, device=device), tiles)


def _short(of_axes: tuple[Any, ...]) -> Any:
    """One value for all axes where they have the same."""
    return of_axes[0] if len(set(of_axes)) == 1 else of_axes


def _of_sequence(axis: Axis, pattern: Mask) -> Mask:
    """The mask of one axis without dilation, in the form that has kernels of its own if any has."""
    if axis.kernel_size < axis.n:
        return pattern
    return causal if axis.is_causal else full


def _near(
    axes: Sequence[Axis], rooms: Sequence[int], places: Sequence[Tensor], n_additional: int
) -> Mask:
    """The mask of tokens stored in any order, from tables.

    Tables and not arithmetic: their kernel is faster, and the same for all neighborhoods of a rank.

    Args:
        axes: what tokens see along each axis.
        rooms: the places of each dilation group.
        places: where each stored token stands along each axis.
        n_additional: keys behind the tokens, which every query sees.
    """
    kept = full
    for axis, room, place in zip(axes, rooms, places, strict=True):
        first, end = axis.windows(room)
        if bool((first == 0).all() and (end == len(end)).all()):
            continue
        first_seen, seen_end = (lookup(x[place].int(), q_idx) for x in (first, end))
        kv_place = lookup(torch.nn.functional.pad(place, (0, n_additional)).int(), kv_idx)
        seen = (first_seen <= kv_place) & (kv_place < seen_end)
        kept = seen if kept is full else kept & seen
    if n_additional and kept is not full:
        kept = kept | (kv_idx >= len(places[0]))
    return kept


def _row_major(axes: Sequence[Axis], n_additional: int) -> Mask:
    """The mask of tokens in row-major order."""
    rooms = [axis.room(1) for axis in axes]
    # of a group's room the last places may be left out, where it has fewer tokens than others
    along = [
        (torch.arange(axis.n) % axis.dilation) * room + torch.arange(axis.n) // axis.dilation
        for axis, room in zip(axes, rooms, strict=True)
    ]
    places = [x.flatten() for x in torch.meshgrid(*along, indexing="ij")]
    return _near(axes, rooms, places, n_additional)


def _best_tiles(axes: Sequence[Axis]) -> tuple[Tiles, int]:
    """The tiles of 128 tokens that compute the fewest blocks, and what they cost in blocks.

    A tile sees another if it does so along each axis: the blocks are the product of the axes' own.
    """
    pairs = [{size: axis.pairs(size) for size in _powers_of_2(BLOCK)} for axis in axes]
    found = []
    for tile in _tiles(len(axes), BLOCK):
        blocks = prod(of_axis[size] for of_axis, size in zip(pairs, tile, strict=True))
        tiles = Tiles(tuple(x.n for x in axes), tuple(x.dilation for x in axes), tile)
        found.append((blocks + COST_OF_TILES * prod(tiles.padded) // BLOCK, tiles))
    cost, best = min(found)
    return best, cost


def _tiles(rank: int, size: int) -> list[tuple[int, ...]]:
    """All tiles of `size` tokens whose sides are powers of 2."""
    if rank == 1:
        return [(size,)]
    return [(side, *rest) for side in _powers_of_2(size) for rest in _tiles(rank - 1, size // side)]


def _powers_of_2(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _row_major_blocks(mask: Mask, n: int, n_additional: int) -> float:
    """About how many blocks a mask of n tokens in row-major order computes."""
    rows = range(0, n, BLOCK)
    counted = rows[:: -(-len(rows) // ROWS_COUNTED)]
    blocks = 0
    for row in counted:
        part = compile_mask(mask, min(BLOCK, n - row), n + n_additional, q_offset=row, device="cpu")
        blocks += part.cost().blocks
    return blocks * len(rows) / len(counted)
