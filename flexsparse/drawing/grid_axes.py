"""One panel in matplotlib: the cells of a grid, its four axes, and bars of work beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.classify import Grid
from flexsparse.drawing.colours import RGB, css
from flexsparse.drawing.paper import LINE, QUIET
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.words import tokens

BARS = 0.2  # the width of the bars of work and the gap before them, as a part of that of the cells
GAP = 0.035
LINES_UP_TO = 32  # cells in a row between which lines are drawn


class Sides(NamedTuple):
    """Which sides of a panel have no neighbour, and so carry the numbers of their axis."""

    left: bool = True
    right: bool = True
    top: bool = True
    bottom: bool = True


def draw_cells(axes: Any, image: Tensor, grid: Grid, pools: Pools, room: float = BARS) -> None:
    """Paint cells; the axes are in tokens, query 0 on top.

    Args:
        axes: of matplotlib.
        image: uint8[rows, columns, 3], a colour for each pool.
        grid: lengths and block size.
        pools: how the cells pool blocks.
        room: beside the cells, as a part of their width.
    """
    high, wide = (k * block for k, block in zip(pools.side, grid.block_size, strict=True))
    rows, columns = image.shape[:2]
    cells = axes.imshow(
        image.numpy(),
        extent=(0, columns * wide, rows * high, 0),
        interpolation="nearest",
        aspect="auto",
    )
    frame = axes.add_patch(rectangle(grid.kv_len, grid.q_len, LINE, zorder=0))
    cells.set(zorder=1)  # over the inner half of the frame, which would hide thin cells
    cells.set_clip_path(frame)  # the last pools may stick out over the end
    if max(rows, columns) <= LINES_UP_TO:
        style = {"color": "white", "linewidth": 0.8, "zorder": 3}
        axes.hlines(range(high, grid.q_len, high), 0, grid.kv_len, **style)
        axes.vlines(range(wide, grid.kv_len, wide), 0, grid.q_len, **style)
    axes.set_ylim(grid.q_len, 0)
    axes.set_xlim(0, grid.kv_len * (1 + room))


def rectangle(width: float, height: float, colour: str, zorder: float) -> Any:
    """A frame round cells, to be added to their axes."""
    from matplotlib.patches import Rectangle

    style = {"fill": False, "edgecolor": colour, "linewidth": 1.6, "clip_on": False}
    return Rectangle((0, 0), width, height, zorder=zorder, **style)


def draw_bars(axes: Any, grid: Grid, edges: Tensor, parts: Sequence[tuple[Tensor, RGB]]) -> None:
    """Bars of work beside the cells, how much each row of queries computes; below, the most.

    Args:
        axes: where the cells are.
        grid: lengths and block size.
        edges: int64[bars + 1]: the rows where bars begin and end; a bar is the mean of its rows.
        parts: int64[rows] and a colour each: what is stacked.
    """
    most = int(torch.stack([part for part, _ in parts]).sum(0).max())
    scale = grid.kv_len * (BARS - GAP) / max(most, 1)
    first = grid.kv_len * (1 + GAP)
    y = (edges * grid.block_size[0]).clamp(max=grid.q_len).tolist()
    start = torch.full(edges[1:].shape, first, dtype=torch.float64)
    for part, colour in parts:
        total = torch.cat([part.new_zeros(1), part.cumsum(0)])[edges]
        end = start + total.diff() / edges.diff() * scale
        left, right = ([*x.tolist(), float(x[-1])] for x in (start, end))
        axes.fill_betweenx(y, left, right, step="post", color=css(colour), linewidth=0)
        start = end
    axes.vlines(first, 0, grid.q_len, color=LINE, linewidth=0.6)
    _note(axes, f"{most:,}", grid.kv_len * (1 + BARS), grid.q_len, (0, -3), "right", "top")


def draw_axes(axes: Any, grid: Grid, sides: Sides) -> None:
    """Tokens at the left and the bottom, blocks at the top and the right."""
    q_block, kv_block = grid.block_size
    x_ticks, y_ticks = _ticks(grid.kv_len, kv_block), _ticks(grid.q_len, q_block)
    across = ("left", "center", "right")[:: 4 - len(x_ticks)]
    down = ("top", "center", "bottom")[:: 4 - len(y_ticks)]
    for i, (x, align) in enumerate(zip(x_ticks, across, strict=True)):
        if sides.bottom:
            _note(axes, _named("key", i, tokens(x)), x, grid.q_len, (0, -3), align, "top")
        if sides.top:
            text = _named("block", i, f"{-(-x // kv_block):,}")
            _note(axes, text, x, 0, (0, 2), align, "bottom", size=6)
    for i, (y, align) in enumerate(zip(y_ticks, down, strict=True)):
        if sides.left:
            text = _named("query", i, tokens(y + grid.q_offset))
            _note(axes, text, 0, y, (-3, 0), "right", align)
        if sides.right:
            text = _named("block", i, f"{-(-y // q_block):,}")
            _note(axes, text, axes.get_xlim()[1], y, (3, 0), "left", align, size=6)


def draw_labels(axes: Any, grid: Grid, labels: Sequence[str] | None, sides: Sides) -> None:
    """The tokens themselves, or their positions: of queries at the left, of keys below."""
    if sides.left:
        for i in range(grid.q_len) if labels else sorted({0, grid.q_len - 1}):
            position = i + grid.q_offset
            known = labels is not None and 0 <= position < len(labels)
            text = labels[position] if labels and known else _named("query", i, f"{position}")
            _note(axes, text, 0, i + 0.5, (-3, 0), "right", "center")
    if sides.bottom:
        for i in range(grid.kv_len) if labels else sorted({0, grid.kv_len - 1}):
            text = labels[i] if labels else _named("key", i, f"{i}")
            turned = {"rotation": 90} if labels else {}
            _note(axes, text, i + 0.5, grid.q_len, (0, -3), "center", "top", **turned)


def draw_ends(axes: Any, grid: Grid, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    """The positions of the first and last query and key."""
    for i, (text, align) in enumerate(zip(queries, ("top", "bottom"), strict=True)):
        y = i * grid.q_len
        _note(axes, _named("query", i, f"{text:,}"), 0, y, (-3, 0), "right", align)
    for i, (text, align) in enumerate(zip(keys, ("left", "right"), strict=True)):
        x = i * grid.kv_len
        _note(axes, _named("key", i, f"{text:,}"), x, grid.q_len, (0, -3), align, "top")


def _ticks(length: int, block: int) -> list[int]:
    """Where an axis has numbers: its ends, and the block boundary next to the middle."""
    middle = length // 2 // block * block
    return sorted({0, middle, length})


def _named(what: str, place: int, number: str) -> str:
    return f"{what} {number}" if place == 0 else number


def _note(
    axes: Any,
    text: str,
    x: float,
    y: float,
    offset: tuple[float, float],
    across: str,
    down: str,
    **style: Any,
) -> None:
    axes.annotate(
        text,
        (x, y),
        offset,
        textcoords="offset points",
        ha=across,
        va=down,
        annotation_clip=False,
        **{"size": 6.5, "color": QUIET, **style},
    )
