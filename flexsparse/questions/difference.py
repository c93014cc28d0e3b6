"""diff: where two masks differ, or a proof that they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flexsparse.analysis.classify import BlockClasses, classify
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.validate import first_kept, problem
from flexsparse.arguments import block_sizes
from flexsparse.default_device import cpu_by_default
from flexsparse.errors import MaskError
from flexsparse.expr import Mask, nothing
from flexsparse.heads import PerHead, as_per_head, not_a_mask
from flexsparse.questions.cases import Case, cases, missing_argument
from flexsparse.text import amount, shorten, shown
from flexsparse.tree import kept_at

BLOCKS_SHOWN = 8
NAME_WIDTH = 56


class Block(NamedTuple):
    """A block of a batch row and head: the row among blocks of queries, the column among keys."""

    b: int
    h: int
    row: int
    column: int


class Pair(NamedTuple):
    """A query and a key, by position, that one of two masks keeps; kept_by is 'a' or 'b'."""

    b: int
    h: int
    q_idx: int
    kv_idx: int
    kept_by: str


@dataclass(frozen=True)
class Difference:
    """Where two masks differ; false if they are proved equal. Print it.

    a, b: the names of the masks
    blocks: how many blocks hold a pair on which they differ
    of_blocks: how many blocks there are
    first_blocks: the first of those that differ, in the order of batch row, head, row, column
        (heads, and batch rows, that cannot differ from each other are shown once)
    pair: the first pair of the first block on which they differ; None if they do not
    """

    a: str
    b: str
    blocks: int
    of_blocks: int
    first_blocks: tuple[Block, ...]
    pair: Pair | None

    def __bool__(self) -> bool:
        return self.pair is not None

    def __str__(self) -> str:
        a, b = shorten(self.a, NAME_WIDTH), shorten(self.b, NAME_WIDTH)
        if self.pair is None:
            every = "the only block" if self.of_blocks == 1 else f"all of {self.of_blocks:,} blocks"
            return f"no difference, proved in {every}\n  a: {a}\n  b: {b}"
        at = self.pair
        keeps, drops = ("a", "b") if at.kept_by == "a" else ("b", "a")
        more = self.blocks - len(self.first_blocks)
        blocks = ", ".join(f"({x.b}, {x.h}, {x.row}, {x.column})" for x in self.first_blocks)
        return "\n  ".join(
            [
                f"{self.blocks:,} of {amount(self.of_blocks, 'block')} differ",
                f"a: {a}",
                f"b: {b}",
                f"blocks (b, h, row, column): {blocks}" + (f" and {more:,} more" if more else ""),
                f"at b={at.b}, h={at.h}, q_idx={at.q_idx}, kv_idx={at.kv_idx}: {keeps} keeps the "
                f"pair and {drops} drops it",
            ]
        )

    __repr__ = __str__


@cpu_by_default()
def diff(
    a: Mask | PerHead,
    b: Mask | PerHead,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    n_heads: int | None = None,
    q_offset: int | None = None,
    block_size: int | tuple[int, int] = 128,
) -> Difference:
    """Find where two masks differ at given lengths, by the block analysis of a ^ b.

    "No difference" is a proof for these lengths. Cost: the boundary of a ^ b, not its area.

    Args:
        a: one mask for all heads, or `per_head([...])`.
        b: what it is compared with.
        q_len: queries, in tokens.
        kv_len: keys, in tokens.
        batch: batch rows; needed if a mask reads `b`.
        n_heads: query heads; needed if a single mask reads `h`.
        q_offset: position of query row 0; kv_len - q_len by default.
        block_size: tokens of a block, or (of queries, of keys).
    """
    sizes = block_sizes("diff: block_size", block_size)
    either = _exclusive_or(a, b)
    differing = 0
    of_blocks = 0
    first: list[tuple[Block, Case]] = []
    for case in cases(
        "diff",
        either,
        q_len,
        kv_len,
        batch=batch,
        n_heads=n_heads,
        q_offset=q_offset,
        block_size=sizes,
    ):
        reason = missing_argument(case) or problem(case.mask, case.grid, case.mask.device)
        if reason is not None:
            raise MaskError(f"diff: {reason}")
        grid = case.grid
        # heads (or batch rows) that share a mask share its blocks
        copies = 1 if "h" in case.mask.variables else len(case.heads or (0,))
        copies *= 1 if "b" in case.mask.variables else batch or 1
        classes = classify(case.mask, grid)
        differing += classes.blocks * copies
        of_blocks += grid.planes * grid.rows * grid.columns * copies
        first += [(block, case) for block in _first_blocks(classes, case)]
    first.sort(key=lambda found: found[0])
    names = [shown(x) if isinstance(x, Mask) else x.name for x in (a, b)]
    return Difference(
        names[0],
        names[1],
        differing,
        of_blocks,
        tuple(block for block, _ in first[:BLOCKS_SHOWN]),
        _pair(a, *first[0]) if first else None,
    )


def _exclusive_or(a: Mask | PerHead, b: Mask | PerHead) -> Mask | PerHead:
    """The mask that is true where two differ, for each head if one of them has masks of heads."""
    for name, mask in (("a", a), ("b", b)):
        reason = not_a_mask(mask)
        if reason is not None:
            raise MaskError(f"diff takes a Mask or per_head([...]), and {name} is {reason}")
    if isinstance(a, Mask) and isinstance(b, Mask):
        return _differing(a, b)
    n = next(x.n_heads for x in (a, b) if isinstance(x, PerHead))
    sides = [as_per_head(x, n) for x in (a, b)]
    if sides[0].n_heads != sides[1].n_heads:
        raise MaskError(
            f"diff: a has masks for {sides[0].n_heads} heads and b for {sides[1].n_heads}; give "
            "the same number of heads."
        )
    pairs = list(zip(sides[0].which, sides[1].which, strict=True))
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    distinct = tuple(_differing(sides[0].distinct[i], sides[1].distinct[j]) for i, j in places)
    return PerHead(distinct, tuple(places[pair] for pair in pairs))


def _differing(a: Mask, b: Mask) -> Mask:
    # bounds of the two sides of ^ are taken apart, and cannot tell that they are one expression
    return nothing if a == b else a ^ b


def _first_blocks(classes: BlockClasses, case: Case) -> Iterator[Block]:
    """The first blocks that are kept, row by row."""
    grid = classes.grid
    rectangles = Rectangles.joined([classes.partial, classes.full])
    found = 0
    line = -1  # the row of blocks, counted through all planes, that was looked at last
    base = rectangles.plane * grid.rows
    while found < BLOCKS_SHOWN:
        later = base + rectangles.row1 - 1 > line
        if not bool(later.any()):
            return
        line = int((base + rectangles.row0).clamp(min=line + 1)[later].min())
        here = (base + rectangles.row0 <= line) & (line < base + rectangles.row1)
        plane, row = divmod(line, grid.rows)
        b, place = divmod(plane, len(grid.heads))
        h = grid.heads[place] if "h" in case.mask.variables else (case.heads or (0,))[0]
        runs = torch.stack([rectangles.column0, rectangles.column1], 1)[here].tolist()
        for start, stop in sorted(runs):
            for column in range(start, min(stop, start + BLOCKS_SHOWN - found)):
                yield Block(b, h, row, column)
                found += 1
            if found == BLOCKS_SHOWN:
                return


def _pair(a: Mask | PerHead, block: Block, case: Case) -> Pair:
    """The first pair of a block on which the masks differ."""
    q, kv = first_kept(case.mask, case.grid, *block)
    mine = a if isinstance(a, Mask) else a[block.h]
    place = {"b": block.b, "h": block.h, "q_idx": q, "kv_idx": kv}
    kept = kept_at(mine, {name: torch.tensor([n]) for name, n in place.items()})
    return Pair(block.b, block.h, q, kv, "a" if bool(kept) else "b")
