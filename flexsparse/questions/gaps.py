"""Queries that see no key, and keys that no query sees, from the classes of the blocks.

A row of blocks without a kept block is empty; one with a FULL block is not. In what remains, rows
are bounded against PARTIAL blocks, and where that leaves it open they are looked at element by
element, until every row has its key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import (
    CELLS_AT_ONCE,
    Grid,
    batch_and_head,
    bound_places,
    interval_reading,
)
from flexsparse.analysis.classify import BlockClasses
from flexsparse.analysis.interval import Interval
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.settle import ELEMENTS_AT_ONCE
from flexsparse.expr import Mask
from flexsparse.tree import kept_at

GROUPS = 8  # parts of a block bounded as one
WITNESSES = 16  # places looked at in a line of a block before all of it is

Ranges = tuple[range, ...]


class _Side(NamedTuple):
    """Queries looked at along keys, or (is_key) keys along queries; a line is `block` tokens."""

    is_key: bool
    grid: Grid

    @property
    def lines(self) -> int:
        return self.grid.columns if self.is_key else self.grid.rows

    @property
    def length(self) -> int:
        return self.grid.kv_len if self.is_key else self.grid.q_len

    @property
    def across_length(self) -> int:
        return self.grid.q_len if self.is_key else self.grid.kv_len

    @property
    def block(self) -> int:
        return self.grid.block_size[self.is_key]

    @property
    def across_block(self) -> int:
        return self.grid.block_size[not self.is_key]

    @property
    def offset(self) -> int:
        return 0 if self.is_key else self.grid.q_offset

    @property
    def across_offset(self) -> int:
        return self.grid.q_offset if self.is_key else 0


def empty_rows(mask: Mask, classes: BlockClasses) -> list[Ranges]:
    """The positions of queries that see no key, for each plane of the grid."""
    return _gaps(mask, classes, _Side(False, classes.grid))


def unseen_keys(mask: Mask, classes: BlockClasses) -> list[Ranges]:
    """The positions of keys that no query sees, for each plane of the grid."""
    return _gaps(mask, classes, _Side(True, classes.grid))


def _gaps(mask: Mask, classes: BlockClasses, side: _Side) -> list[Ranges]:
    partial, full = (x.transposed() if side.is_key else x for x in (classes.partial, classes.full))
    has_full = _covered(full, side)
    looked_at = _covered(partial, side) & ~has_full
    open_lines = looked_at.flatten().nonzero().flatten()
    search = _Search(mask, side, open_lines)
    search.bound_own_places()
    search.look_at_own_places()
    search.look_in_blocks(partial)
    used = search.used

    unused = ~(has_full | looked_at)
    gaps_in = unused.any(1)
    gaps_in[open_lines[~used.all(1)] // side.lines] = True
    return [
        _ranges(unused[plane], open_lines - plane * side.lines, used, side) if gaps else ()
        for plane, gaps in enumerate(gaps_in.tolist())
    ]


def _covered(rectangles: Rectangles, side: _Side) -> Tensor:
    """Whether any rectangle touches a line: bool [planes, lines]."""
    edges = torch.zeros(side.grid.planes, side.lines + 1, dtype=torch.int64)
    step = torch.ones_like(rectangles.plane)
    edges.index_put_((rectangles.plane, rectangles.row0), step, accumulate=True)
    edges.index_put_((rectangles.plane, rectangles.row1), -step, accumulate=True)
    return edges.cumsum(1)[:, :-1] > 0


class _Search:
    """Tokens of open lines and whether each is in a pair that is kept, found from cheap to dear.

    open_lines: [open lines], their numbers among those of all planes
    tokens: [open lines, block], row numbers of q, or of keys
    used: bool [open lines, block], whether such a pair was found
    """

    def __init__(self, mask: Mask, side: _Side, open_lines: Tensor) -> None:
        self.mask, self.side, self.open_lines = mask, side, open_lines
        self.plane = open_lines // side.lines
        self.tokens = (open_lines % side.lines)[:, None] * side.block + torch.arange(side.block)
        self.used = self.tokens >= side.length  # past a ragged end there is nothing to look for
        self._reading = interval_reading(mask, side.grid)

    def bound_own_places(self) -> None:
        """Most masks let many queries in a row see the key at the position of the first of them."""
        side = self.side
        for size in (side.block, -(-side.block // GROUPS)):
            firsts = torch.arange(0, side.block, size)
            line = self._open().repeat_interleave(len(firsts))
            first = firsts.repeat(len(line) // len(firsts))
            token = self.tokens[line, first].clamp(max=side.length - 1)
            last = (token + size - 1).clamp(max=side.length - 1)
            across = self._own_place(last if side.is_key else token)
            always, _ = self._bounds(line, (token, last), (across, across))
            inside = first[always][:, None] + torch.arange(size)
            self.used[line[always][:, None], inside.clamp(max=side.block - 1)] = True

    def look_at_own_places(self) -> None:
        """And each query the key at its own."""
        for _, line, inside in self._undecided(self._open()):
            self._settle(line, inside, self._own_place(self.tokens[line, inside])[:, None])

    def look_in_blocks(self, partial: Rectangles) -> None:
        """In 1 PARTIAL block of each line, then 2, then 4, so that lines settled early cost little.

        A token is bounded against a block, looked at in few places of it, and then in all.
        """
        side = self.side
        every = torch.arange(side.across_block)
        few = every[:: max(1, side.across_block // WITNESSES)]
        lines, column, turn = _blocks_of(partial, self.open_lines[self._open()], side)
        line = torch.searchsorted(self.open_lines, lines)
        for now in sorted(set(turn.tolist())):
            chosen = (turn == now).nonzero().flatten()
            for place, own_line, inside in self._undecided(line[chosen]):
                start = column[chosen][place] * side.across_block
                end = (start + side.across_block - 1).clamp(max=side.across_length - 1)
                token = self.tokens[own_line, inside]
                always, ever = self._bounds(own_line, (token, token), (start, end))
                self.used[own_line[always], inside[always]] = True
                for steps in (few, every):
                    open_pairs = (ever & ~always).nonzero().flatten()
                    for some in torch.split(open_pairs, max(1, ELEMENTS_AT_ONCE // len(steps))):
                        still = some[~self.used[own_line[some], inside[some]]]
                        across = (start[still][:, None] + steps).clamp(max=side.across_length - 1)
                        self._settle(own_line[still], inside[still], across)

    def _open(self) -> Tensor:
        """The open lines, by their place among them, that still have tokens without a pair."""
        return (~self.used.all(1)).nonzero().flatten()

    def _undecided(self, line: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens without a pair yet, as (place in `line`, line, place in the block)."""
        at_once = max(1, ELEMENTS_AT_ONCE // self.side.block)
        for start in range(0, len(line), at_once):
            chunk = line[start : start + at_once]
            place, inside = (~self.used[chunk]).nonzero().T
            yield start + place, chunk[place], inside

    def _own_place(self, token: Tensor) -> Tensor:
        """The number across of what has the position of a token, or is nearest to it."""
        side = self.side
        return (token + side.offset - side.across_offset).clamp(0, side.across_length - 1)

    def _settle(self, line: Tensor, inside: Tensor, across: Tensor) -> None:
        """Look at pairs of tokens [n] with those across from them [n, m]."""
        side = self.side
        mine, other = self.tokens[line, inside][:, None] + side.offset, across + side.across_offset
        q, kv = (other, mine) if side.is_key else (mine, other)
        b, h = batch_and_head(side.grid, self.plane[line][:, None])
        kept = kept_at(self.mask, {"b": b, "h": h, "q_idx": q, "kv_idx": kv})
        found = kept.expand(across.shape).any(1)
        self.used[line[found], inside[found]] = True

    def _bounds(
        self, line: Tensor, tokens: tuple[Tensor, Tensor], across: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Whether all pairs of tokens first to last with those across are kept, and whether any."""
        side, plane = self.side, self.plane[line]
        found = [torch.zeros(2, 0, dtype=torch.bool)]
        for part in torch.split(torch.arange(len(plane)), CELLS_AT_ONCE) if len(plane) else ():
            mine = Interval(*(x[part] + side.offset for x in tokens))
            other = Interval(*(x[part] + side.across_offset for x in across))
            q, kv = (other, mine) if side.is_key else (mine, other)
            truth = bound_places(self.mask, self._reading, side.grid, plane[part], q, kv)
            found.append(torch.stack(truth))
        always, ever = torch.cat(found, 1)
        return always, ever


def _blocks_of(rectangles: Rectangles, lines: Tensor, side: _Side) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of some lines: (line, column, turn), of which the first is in turn 0."""
    wanted = torch.zeros(side.grid.planes * side.lines, dtype=torch.bool)
    wanted[lines] = True
    rows = rectangles.rows()
    blocks = rows.where(wanted[rows.plane * side.lines + rows.row0]).units()
    line, column = blocks.plane * side.lines + blocks.row0, blocks.column0
    order = torch.argsort(line * (int(column.max()) + 1 if len(column) else 1) + column)
    line, column = line[order], column[order]
    first = torch.searchsorted(line, line)
    place = torch.arange(len(line)) - first
    return line, column, (place + 1).log2().long()


def _ranges(unused: Tensor, open_lines: Tensor, used: Tensor, side: _Side) -> Ranges:
    """The tokens of a plane that are in no pair, as ranges of positions."""
    own = (open_lines >= 0) & (open_lines < side.lines)
    missing = unused[:, None].repeat(1, side.block)
    missing[open_lines[own]] = ~used[own]
    edges = torch.nn.functional.pad(missing.flatten()[: side.length].int(), (1, 1)).diff()
    starts, stops = (
        ((edges == step).nonzero().flatten() + side.offset).tolist() for step in (1, -1)
    )
    return tuple(range(start, stop) for start, stop in zip(starts, stops, strict=True))
