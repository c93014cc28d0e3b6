"""draw: a picture of a mask, small multiples of its distinct masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexsparse.analysis.cells import Grid
from flexsparse.default_device import cpu_by_default
from flexsparse.drawing.colours import LIGHT, painted
from flexsparse.drawing.frame import Frame, Sides
from flexsparse.drawing.legend import draw_head_bars, draw_key, notes, shows_heads, state_keys
from flexsparse.drawing.page import MARGIN, Layout, Tile, lengths_text, page
from flexsparse.drawing.panels import Panel, Panels, panels
from flexsparse.drawing.paper import QUIET, wrapped
from flexsparse.drawing.plane import ELEMENTS_UP_TO
from flexsparse.drawing.planes import Lengths, planes
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.words import percent
from flexsparse.errors import MaskError


@cpu_by_default()
def draw(
    mask: Any,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    batch: int | None = None,
    n_heads: int | None = None,
    q_offset: int | None = None,
    block_size: int | tuple[int, int] | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Any:
    """A picture of a mask: each distinct mask once, with the heads that have it.

    Longer than 64 tokens it shows blocks, pooled where there are more than 128 in a row; a pool
    with one computed block is never shown empty. Shorter, it shows the elements themselves.

    >>> draw(causal & (sink(64) | window(256)), 4096).savefig("mask.png")

    Args:
        mask: a Mask, per_head([...]), a CompiledMask, or any torch BlockMask.
        q_len: queries, in tokens; of a Mask alone, as are all lengths here.
        kv_len: keys, in tokens; q_len by default.
        batch: batch rows; needed only if the mask reads `b`.
        n_heads: query heads; needed only if a single mask reads `h`.
        q_offset: position of query row 0; kv_len - q_len by default.
        block_size: tokens of a block, or (of queries, of keys); 128 by default.
        labels: the kv_len tokens as text, shown with elements.
        title: above the picture; the lengths by default.

    Returns:
        A matplotlib Figure: notebooks show it, and savefig writes it.

    Raises:
        MaskError: what is drawn does not fit the lengths; the text says what to change.
        ImportError: matplotlib is not installed.
    """
    at = Lengths(q_len, kv_len, batch, n_heads, q_offset, block_size)
    found = planes("draw", mask, at)
    reason = _unusable(labels, found[0].grid)
    if reason is not None:
        raise MaskError(reason)
    layout = Layout.of(len(found), labels=len(labels or ()))
    return picture(panels(found, layout.pools), layout, labels, title)


def _unusable(labels: Sequence[str] | None, grid: Grid) -> str | None:
    """Why token labels cannot be drawn, or None if they can."""
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
        return f"draw: labels={labels!r}; give a list of {grid.kv_len} strings, one for each key."
    if len(labels) != grid.kv_len:
        return f"draw: labels has {len(labels)} tokens and the mask {grid.kv_len} keys."
    if max(grid.q_len, grid.kv_len) > ELEMENTS_UP_TO:
        return f"draw: labels are shown with elements, up to {ELEMENTS_UP_TO} tokens."
    return None


def picture(
    shown: Panels, layout: Layout, labels: Sequence[str] | None = None, title: str | None = None
) -> Any:
    """The matplotlib Figure of some panels."""
    sentences = notes(shown)
    heads = 0.9 if shows_heads(shown) else 0.0
    with_blocks = shown.shown[0].elements is None
    sheet, below = page(
        title or lengths_text(shown.grid, with_blocks=with_blocks),
        [_tile(panel, layout.width + layout.room, labels) for panel in shown.shown],
        layout,
        shown.grid,
        longest_label=max(map(len, labels)) if labels else 0,
        foot=heads + 0.67 + 0.13 * len(sentences),
    )
    if heads:
        draw_head_bars(sheet, shown, MARGIN, below, sheet.width - 2 * MARGIN)
    draw_key(sheet, state_keys(elements=not with_blocks), MARGIN, below + heads + 0.1)
    sheet.text(MARGIN, below + heads + 0.46, "\n".join(sentences), size=7.5, color=QUIET)
    return sheet.figure


def _tile(panel: Panel, width: float, labels: Sequence[str] | None) -> Tile:
    """A panel with its mask, the heads that have it, and what they compute."""
    lines = [wrapped(panel.who, width, 7, 1)]
    if panel.elements is None:
        counts = [f"{percent(panel.block_density)} of blocks"]
        if panel.kept is not None:
            counts.append(f"{percent(panel.element_density)} of elements")
        one_line = ", ".join(counts)
        lines += [one_line] if wrapped(one_line, width, 7, 1) == one_line else counts

    def paint(frame: Frame, sides: Sides) -> None:
        paint_panel(frame, panel, sides, labels)

    return Tile(wrapped(panel.name, width, 8, 2), "\n".join(lines), paint)


def paint_panel(
    frame: Frame, panel: Panel, sides: Sides, labels: Sequence[str] | None = None
) -> None:
    """Paint the cells, axes and bars of a panel."""
    if panel.elements is not None:
        grid = panel.grid._replace(block_size=(1, 1))
        frame = frame._replace(grid=grid)
        pools = Pools.of(grid, ELEMENTS_UP_TO)
        frame.cells(painted(panel.elements.long() * 2, panel.elements), pools)
        frame.bars(pools.row_edges, [(panel.elements.sum(1), LIGHT.full)])
        frame.labels(labels, sides)
        return
    frame.cells(painted(panel.states, panel.shade), panel.pools)
    partial, full = panel.work
    frame.bars(panel.pools.row_edges, [(full, LIGHT.full), (partial, LIGHT.partial)])
    frame.axes(sides)
