"""compare: what only one of two masks keeps, and what both do."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.compiler import CompiledMask
from flexsparse.default_device import cpu_by_default
from flexsparse.drawing.block_lists import grid_of, planes_of
from flexsparse.drawing.colours import BOTH, EACH, LIGHT, ONLY_A, ONLY_B, chosen
from flexsparse.drawing.frame import Frame, Sides
from flexsparse.drawing.legend import Key, draw_key
from flexsparse.drawing.page import MARGIN, Layout, Tile, lengths_text, page
from flexsparse.drawing.panels import (
    ELEMENTS_EVALUATED,
    MOST_PANELS,
    counted,
    panel,
)
from flexsparse.drawing.paper import QUIET, wrapped
from flexsparse.drawing.plane import ELEMENTS_UP_TO, Blocks, Owner, Plane, plane_of, who_text
from flexsparse.drawing.planes import Lengths, classified, planes
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.words import percent
from flexsparse.errors import MaskError

COLOURS = [LIGHT.empty, ONLY_A, BOTH, ONLY_B, EACH]
MEANINGS = ("neither", "only a", "both", "only b", "only a and only b")


@cpu_by_default()
def compare(
    a: Any,
    b: Any,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    n_heads: int | None = None,
    q_offset: int | None = None,
    block_size: int | tuple[int, int] | None = None,
) -> Any:
    """A picture of what only a keeps, what both keep, and what only b keeps.

    Masks are compared element by element, whatever the length: a cell in the colour of one side has
    an element that the other side lacks. A BlockMask longer than 64 tokens is compared by the
    blocks that are computed.

    >>> compare(causal & window(256), causal & (sink(64) | window(256)), 4096)

    Args:
        a: a Mask, per_head([...]), a CompiledMask, or any torch BlockMask.
        b: what it is compared with.
        q_len: queries, in tokens; needed if neither side has its lengths.
        kv_len: keys, in tokens; q_len by default.
        batch: batch rows; needed only if a mask reads `b`.
        n_heads: query heads; needed only if a single mask reads `h`.
        q_offset: position of query row 0; kv_len - q_len by default.
        block_size: tokens of a block, or (of queries, of keys); 128 by default.

    Returns:
        A matplotlib Figure.

    Raises:
        MaskError: the sides do not fit each other; the text says what to change.
        ImportError: matplotlib is not installed.
    """
    at = Lengths(q_len, kv_len, batch, n_heads, q_offset, block_size)
    sides = [_planes(x, other, at) for x, other in ((a, b), (b, a))]
    by_blocks = isinstance(a, BlockMask) or isinstance(b, BlockMask)
    pairs = _paired(sides[0], sides[1], by_blocks)
    grid = pairs[0].a.grid
    layout = Layout.of(len(pairs), bars=False)
    shown = [
        (pair, _compared(pair, layout.pools, by_blocks, len(pairs))) for pair in pairs[:MOST_PANELS]
    ]
    left_out = len(pairs) - len(shown)
    sentences = _notes([found for _, found in shown], left_out)
    sheet, below = page(
        lengths_text(grid, with_blocks=max(grid.q_len, grid.kv_len) > ELEMENTS_UP_TO),
        [_tile(pair, found, layout.width) for pair, found in shown],
        layout,
        grid,
        foot=0.5 + 0.13 * len(sentences),
    )
    keys = [Key(chosen(torch.tensor([[i]]), COLOURS), 0.2, text) for i, text in enumerate(MEANINGS)]
    draw_key(sheet, keys, MARGIN, below + 0.1)
    sheet.text(MARGIN, below + 0.36, "\n".join(sentences), size=7.5, color=QUIET)
    return sheet.figure


class Pair(NamedTuple):
    """A plane of each side, and the (batch row, head) pairs that have both."""

    a: Plane
    b: Plane
    owners: tuple[Owner, ...]


class Compared(NamedTuple):
    """What a pair has, pooled.

    classes: int64[rows, columns], an index of MEANINGS for each cell
    parts: of all elements, or blocks: only a, both, only b; None if not counted
    unit: 'elements' or 'blocks'
    pools: how the cells pool blocks; None where they are elements
    """

    classes: Tensor
    parts: tuple[float | None, ...]
    unit: str
    pools: Pools | None


def _planes(side: Any, other: Any, at: Lengths) -> list[Plane]:
    """The planes of one side, at the lengths of the other where it has none itself."""
    if isinstance(side, (CompiledMask, BlockMask)):
        return planes("compare", side, Lengths())
    if at.q_len is None and isinstance(other, CompiledMask):
        return planes("compare", side, Lengths.of(other))
    if at.q_len is None and isinstance(other, BlockMask):
        grid = grid_of(other)
        batch, heads = (n if n > 1 else None for n in planes_of(other))
        own = Lengths(grid.q_len, grid.kv_len, batch, heads, at.q_offset, grid.block_size)
        return planes("compare", side, own)
    return planes("compare", side, at)


def _paired(a: Sequence[Plane], b: Sequence[Plane], by_blocks: bool) -> list[Pair]:
    """The distinct pairs of planes, each with its owners."""
    grids = [x[0].grid for x in (a, b)]
    if by_blocks:
        # only blocks are compared, and a BlockMask does not know its offset
        grids = [grid._replace(q_offset=0) for grid in grids]
    if grids[0] != grids[1]:
        raise MaskError(
            "compare: the sides have different lengths, offsets or blocks: a is "
            f"{lengths_text(a[0].grid, with_blocks=True)}, q_offset {a[0].grid.q_offset}, and b is "
            f"{lengths_text(b[0].grid, with_blocks=True)}, q_offset {b[0].grid.q_offset}."
        )
    owners = [owner for side in (a, b) for plane in side for owner in plane.owners]
    rows, heads = ({owner[i] for owner in owners} - {None} or {None} for i in (0, 1))
    found: dict[tuple[int, int], Pair] = {}
    for owner in itertools.product(sorted(rows, key=_first), sorted(heads, key=_first)):
        one, two = (_plane_of(side, owner, name) for side, name in ((a, "a"), (b, "b")))
        key = (id(one), id(two))
        others = found[key].owners if key in found else ()
        found[key] = Pair(one, two, (*others, owner))
    return list(found.values())


def _first(n: int | None) -> int:
    return n or 0


def _plane_of(side: Sequence[Plane], owner: Owner, name: str) -> Plane:
    plane = plane_of(side, *owner)
    if plane is None:
        raise MaskError(
            f"compare: {name} has no {who_text([owner])}; give both sides as many heads and batch "
            "rows."
        )
    return plane


def _compared(pair: Pair, most_pools: int, by_blocks: bool, pairs: int) -> Compared:
    grid = pair.a.grid
    if max(grid.q_len, grid.kv_len) <= ELEMENTS_UP_TO:
        whole = ((0, grid.rows), (0, grid.columns))
        a, b = (plane.elements(*whole) for plane in (pair.a, pair.b))
        if a is not None and b is not None:
            return _classes([(a & ~b).long(), (a & b).long(), (b & ~a).long()], "elements", None)
    if by_blocks:
        pools = Pools.of(grid, most_pools)
        return _classes(_blocks_compared(pair.a.blocks(), pair.b.blocks(), pools), "blocks", pools)
    a_mask, b_mask = pair.a.mask, pair.b.mask
    assert a_mask is not None
    assert b_mask is not None
    parts = []
    for mask in (a_mask & ~b_mask, a_mask & b_mask, b_mask & ~a_mask):
        plane = Plane("", (), grid, mask, functools.partial(classified, mask, grid))
        parts.append(panel(counted(plane, ELEMENTS_EVALUATED // (3 * pairs)), most_pools))
    found = _classes([part.states for part in parts], "elements", parts[0].pools)
    return found._replace(parts=tuple(part.element_density for part in parts))


def _classes(parts: Sequence[Tensor], unit: str, pools: Pools | None) -> Compared:
    """The meaning of cells that hold so much of only a, of both, and of only b."""
    only_a, both, only_b = (part > 0 for part in parts)
    differ = torch.where(only_a & only_b, 4, torch.where(only_a, 1, 3))
    classes = torch.where(only_a | only_b, differ, both.long() * 2)
    total = int(pools.blocks.sum()) if pools else parts[0].numel()
    return Compared(classes, tuple(int(part.sum()) / total for part in parts), unit, pools)


def _blocks_compared(a: Blocks, b: Blocks, pools: Pools) -> list[Tensor]:
    """int64[rows, columns] each: the blocks of a pool that only a, both, and only b compute."""
    found: list[list[Tensor]] = [[], [], []]
    edges = pools.row_edges.tolist()
    ends = pools.column_edges
    for top, bottom in itertools.pairwise(edges):
        one, two = (_raster(x, top, bottom, int(ends[-1])) for x in (a, b))
        for rows, part in zip(found, (one & ~two, one & two, two & ~one), strict=True):
            across = torch.nn.functional.pad(part.sum(0).cumsum(0), (1, 0))
            rows.append(across[ends].diff())
    return [torch.stack(rows) for rows in found]


def _raster(blocks: Blocks, top: int, bottom: int, columns: int) -> Tensor:
    """bool[bottom - top, columns]: the blocks that are computed in some rows."""
    change = torch.zeros(bottom - top + 1, columns + 1, dtype=torch.int32)
    for rectangles in blocks:
        near = (rectangles.row0 < bottom) & (rectangles.row1 > top)
        part = rectangles.where(near)
        row0, row1 = (x.clamp(top, bottom) - top for x in (part.row0, part.row1))
        for row, row_sign in ((row0, 1), (row1, -1)):
            for column, column_sign in ((part.column0, 1), (part.column1, -1)):
                sign = torch.full(row.shape, row_sign * column_sign, dtype=torch.int32)
                change.index_put_((row, column), sign, accumulate=True)
    return change.cumsum(0).cumsum(1)[:-1, :-1] > 0


def _tile(pair: Pair, found: Compared, width: float) -> Tile:
    name = "\n".join(
        wrapped(f"{letter}: {plane.name}", width, 8, 1)
        for letter, plane in (("a", pair.a), ("b", pair.b))
    )
    who = who_text(pair.owners)
    only_a, both, only_b = (percent(part) for part in found.parts)
    text = f"{who}\nonly a {only_a}, both {both}, only b {only_b}"

    def paint(frame: Frame, sides: Sides) -> None:
        image = chosen(found.classes, COLOURS)
        if found.pools is not None:
            frame.cells(image, found.pools)
            frame.axes(sides)
            return
        frame = frame._replace(grid=frame.grid._replace(block_size=(1, 1)))
        frame.cells(image, Pools.of(frame.grid, ELEMENTS_UP_TO))
        frame.labels(None, sides)

    return Tile(name, text, paint)


def _notes(found: Sequence[Compared], left_out: int) -> list[str]:
    unit = found[0].unit
    lines = []
    if all(not bool(((x.classes == 1) | (x.classes > 2)).any()) for x in found):
        verb = "keep" if unit == "elements" else "compute"
        lines.append(f"a and b {verb} the same {unit}.")
    pools = found[0].pools
    if pools is not None:
        high, wide = pools.side
        cell = (
            f"A cell is {high} × {wide} blocks" if (high, wide) != (1, 1) else "A cell is a block"
        )
        lines.append(f"{cell}; {unit} are compared, and one that differs colours its cell.")
    lines.append(f"Numbers are parts of all {unit}.")
    if left_out:
        lines.append(f"{left_out:,} more pairs of masks are left out.")
    return lines
