"""What stands below the panels: work per head, the key to the colours, and the densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.drawing.colours import LIGHT, css, painted
from flexsparse.drawing.panels import Panels
from flexsparse.drawing.paper import LINE, QUIET, Sheet
from flexsparse.drawing.words import percent


def shows_heads(shown: Panels) -> bool:
    """Whether there are heads to tell apart."""
    return len({h for panel in shown.shown for _, h in panel.owners}) > 1


def draw_head_bars(sheet: Sheet, shown: Panels, x: float, y: float, width: float) -> None:
    """A bar for each head: the blocks it computes, as a part of all."""
    grid = shown.grid
    every = grid.rows * grid.columns
    sheet.text(x, y, "Blocks computed for each head, of all blocks", size=8, weight="bold")
    heads: dict[int, tuple[float, float]] = {}
    for panel in shown.shown:
        for _, h in panel.owners:
            if h is not None:  # of several batch rows the first counts
                parts = (int(panel.full.sum()) / every, int(panel.partial.sum()) / every)
                heads.setdefault(h, parts)
    highest = max(sum(parts) for parts in heads.values())
    left, top, high = x + 0.42, y + 0.24, 0.5
    step = min((width - 0.42) / len(heads), 0.42)
    scale = high / max(highest, 1e-9)
    for i, h in enumerate(sorted(heads)):
        at, base = left + (i + 0.15) * step, top + high
        for part, colour in zip(heads[h], (LIGHT.full, LIGHT.partial), strict=True):
            base -= part * scale
            sheet.rectangle(at, base, 0.7 * step, part * scale, facecolor=css(colour))
        if i % -(-len(heads) // 40) == 0:
            middle = left + (i + 0.5) * step
            sheet.text(middle, top + high + 0.03, str(h), size=7, color=QUIET, ha="center")
    right = left + len(heads) * step
    sheet.lines([((left, top + high), (right, top + high))], color=LINE, linewidth=0.8)
    style = {"size": 7, "color": QUIET, "ha": "right", "va": "center"}
    sheet.text(left - 0.05, top, percent(highest), **style)
    sheet.text(left - 0.05, top + high, "0", **style)


class Key(NamedTuple):
    """An entry of the key: an image of one row, its width in inches, and what it means."""

    image: Tensor
    width: float
    text: str


def state_keys(*, elements: bool) -> list[Key]:
    """The key to the colours of the states of blocks, or of elements."""

    def key(state: int, text: str, dots: int = 1) -> Key:
        shade = torch.linspace(0, 1, dots)[None]
        image = painted(torch.full_like(shade, state), shade)
        return Key(image, 0.9 if dots > 1 else 0.2, text)

    if elements:
        return [key(2, "kept"), key(0, "masked")]
    return [
        key(0, "empty: skipped"),
        key(1, "partial: masked inside", dots=64),
        key(2, "full: computed without the mask"),
    ]


def draw_key(sheet: Sheet, keys: Sequence[Key], x: float, y: float) -> None:
    """The key to the colours."""
    for image, width, text in keys:
        sheet.image(image, x, y, width, 0.16)
        sheet.rectangle(x, y, width, 0.16, fill=False, edgecolor=LINE, linewidth=0.8)
        if image.shape[1] > 1:
            for end, at in (("0", x), ("100 % kept", x + width)):
                sheet.text(at, y + 0.18, end, size=7, color=QUIET, ha="center")
        sheet.text(x + width + 0.07, y + 0.01, text)
        x += width + 0.07 + len(text) * 0.062 + 0.3


def notes(shown: Panels) -> list[str]:
    """What the picture does not show by itself, a sentence each."""
    first = shown.shown[0]
    of_those = "Of the masks shown, " if shown.left_out else ""
    elements = shown.weighted([panel.element_density for panel in shown.shown])
    lines = []
    if first.elements is not None:
        lines.append(f"{of_those}{percent(elements)} of the elements are kept.")
        bars = "keys that a query sees"
    else:
        blocks = shown.weighted([panel.block_density for panel in shown.shown])
        lines.append(f"{of_those}{percent(blocks)} of all blocks are computed; {_kept(elements)}.")
        high, wide = first.pools.side
        if (high, wide) != (1, 1):
            lines.append(
                f"A cell is {high} × {wide} blocks: in colour if any of them is computed, full if "
                "all are full."
            )
        bars = "blocks computed for a row of queries"
    lines.append(f"Bars at the right: {bars}; the number below is the most.")
    if shown.left_out:
        lines.append(f"{shown.left_out:,} more distinct masks are left out.")
    return lines


def _kept(elements: float | None) -> str:
    if elements is None:
        return "kept elements were not counted, and shades are of computed blocks"
    return f"{percent(elements)} of all elements are kept"
