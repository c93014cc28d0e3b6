"""zoom: the elements of one block, and where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.default_device import cpu_by_default
from flexsparse.drawing.colours import painted
from flexsparse.drawing.frame import Frame, Sides
from flexsparse.drawing.legend import draw_key, state_keys
from flexsparse.drawing.page import TITLE, proportion
from flexsparse.drawing.panels import ELEMENTS_EVALUATED, counted, panel
from flexsparse.drawing.paper import DPI, Sheet, wrapped
from flexsparse.drawing.plane import Plane, plane_of, who_text
from flexsparse.drawing.planes import Lengths, planes
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.words import percent
from flexsparse.errors import MaskError
from flexsparse.expr import Mask

LEFT, MAP, GAP, SIDE = 0.66, 2.0, 0.9, 4.4  # inches
MARK = "#c0143c"


@cpu_by_default()
def zoom(
    mask: Any,
    q_block: int,
    kv_block: int,
    h: int = 0,
    b: int = 0,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
) -> Any:
    """A picture of the elements of one block, beside a map that shows where it lies.

    >>> zoom(attend, q_block=17, kv_block=4, h=3)

    Args:
        mask: a CompiledMask, any torch BlockMask, or, with lengths, a Mask or per_head([...]).
        q_block: which block of queries, from 0.
        kv_block: which block of keys, from 0.
        h: the query head.
        b: the batch row.
        q_len: queries, in tokens; of a Mask alone.
        kv_len: keys, in tokens; q_len by default.

    Returns:
        A matplotlib Figure.

    Raises:
        MaskError: there is no such block, head or batch row.
        ImportError: matplotlib is not installed.
    """
    at = Lengths(q_len, kv_len)
    if isinstance(mask, Mask):
        at = at._replace(batch=b + 1, n_heads=h + 1)
    plane = plane_of(found := planes("zoom", mask, at), b, h)
    if plane is None:
        raise MaskError(
            f"zoom: there is no {who_text([(b, h)])}; the mask has "
            f"{who_text(sorted(o for x in found for o in x.owners))}."
        )
    grid = plane.grid
    for name, place, n in (("q_block", q_block, grid.rows), ("kv_block", kv_block, grid.columns)):
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < n:
            raise MaskError(f"zoom: {name}={place!r}; there are {n} blocks, 0 to {n - 1}.")
    kept = plane.elements((q_block, q_block + 1), (kv_block, kv_block + 1))
    if kept is None:
        raise MaskError(
            "zoom: the elements of this block are unknown, as the mask_mod of the BlockMask cannot "
            "be called; torch drops that of a slice."
        )
    distinct = [any(owner[i] is not None for owner in plane.owners) for i in (0, 1)]
    who = who_text([(b if distinct[0] else None, h if distinct[1] else None)])
    return _picture(plane, q_block, kv_block, kept, who)


def _picture(plane: Plane, row: int, column: int, kept: Tensor, who: str) -> Any:
    grid = plane.grid
    state = plane.state(row, column)
    part = f", {percent(float(kept.double().mean()))} kept" if state == "partial" else ""
    sheet = Sheet(LEFT + MAP + GAP + SIDE + 0.4, TITLE + SIDE + 0.75)
    title = f"{who}, q block {row}, kv block {column}: {state}{part}"
    sheet.text(0.2, 0.16, title, size=11, weight="bold")

    sheet.text(LEFT, TITLE + 0.32, wrapped(plane.name, MAP, 8, 2), weight="bold", va="bottom")
    whole = panel(counted(plane, ELEMENTS_EVALUATED), int(MAP * DPI / 2))
    small = Frame(sheet, LEFT, TITLE + 0.5, MAP, MAP * proportion(grid), 0, grid)
    small.cells(painted(whole.states, whole.shade), whole.pools)
    small.axes(Sides(right=False))
    queries, keys = kept.shape
    top, left = row * grid.block_size[0], column * grid.block_size[1]
    across, down = small.across(left + keys / 2), small.down(top + queries / 2)
    style = {"fill": False, "edgecolor": MARK, "linewidth": 1.6, "zorder": 5}
    sheet.rectangle(across - 0.06, down - 0.06, 0.12, 0.12, **style)

    inside = Grid(queries, keys, 0, (1, 1), 1, (0,))
    pools = Pools.of(inside, int(SIDE * DPI / 2))
    places = kept.nonzero()
    counts = pools.sum_of(places[:, 0], places[:, 1], torch.ones(len(places), dtype=torch.int64))
    states = (counts > 0).long() + (counts == pools.blocks).long()
    large = Frame(sheet, LEFT + MAP + GAP, TITLE + 0.1, SIDE, SIDE, 0, inside)
    large.cells(painted(states, counts / pools.blocks), pools)
    first = top + grid.q_offset
    large.ends((first, first + queries - 1), (left, left + keys - 1))
    large.outline(MARK, zorder=5)
    draw_key(sheet, state_keys(elements=True), LEFT, TITLE + SIDE + 0.25)
    return sheet.figure
