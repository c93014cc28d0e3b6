"""The grids of a picture for a browser: an HTML fragment that zooms and needs nothing from outside.

Every row of cells is written as runs of one value, each as its difference to the run above it, and
deflated: a regular mask of thousands of blocks takes kilobytes. What is too large is pooled.
"""

from __future__ import annotations

import array
import base64
import json
import zlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.drawing.colours import DARK, LIGHT, Colours, css
from flexsparse.drawing.page import proportion
from flexsparse.drawing.panels import FULL, PARTIAL, Counted, panel
from flexsparse.drawing.pools import Pools

MOST_BYTES = 130_000  # of all grids, as text
MOST_RUNS = 1_500_000  # of all grids, which a browser paints without delay
MOST_LINES = 1_000_000  # of one grid, before neighbours become one run
MOST_CELLS = 1 << 22  # of all grids that are pooled
LONGEST_LINE = 0xFFFF  # cells
POOLED = (1024, 512, 256, 128, 64, 32, 16)  # cells in a row of a grid that is too large
# a PARTIAL cell is worth the percent of it that is kept, or one of these
UNDER_1, OVER_99, IS_FULL, UNKNOWN = 101, 102, 254, 255
WIDTHS = ((1, 420), (3, 300), (8, 220), (32, 150))  # up to how many panels, and pixels


class Runs(NamedTuple):
    """Runs of cells of one value, ordered by row and start; int64 each.

    row: of cells
    start, end: columns; the end is excluded
    value: IS_FULL, UNKNOWN or what PARTIAL cells are worth
    """

    row: Tensor
    start: Tensor
    end: Tensor
    value: Tensor


def canvas(found: Sequence[Counted], above: str = "") -> str:
    """HTML that shows planes of blocks: the wheel zooms, dragging moves, hovering names a cell.

    Args:
        found: the planes, all of the same lengths.
        above: HTML that stands above; an image in it is hidden where scripts run.
    """
    grid = found[0].plane.grid
    side, grids = _fitting(found)
    elements = found[0].plane.is_short
    if elements:
        grid = grid._replace(block_size=(1, 1))
    spec = {
        "cells": [-(-grid.rows // side[0]), -(-grid.columns // side[1])],
        "side": side,
        "block": grid.block_size,
        "lengths": [grid.q_len, grid.kv_len],
        "q_offset": grid.q_offset,
        "elements": elements,
        "light": LIGHT,
        "dark": DARK,
        "panels": [
            {"who": x.plane.who, "runs": runs} for x, runs in zip(found, grids, strict=True)
        ],
    }
    script = resources.files("flexsparse.drawing").joinpath("canvas.js").read_text()
    return (
        f'<div class="flexsparse" data-grid="{escape(json.dumps(spec))}">{above}'
        f'<div class="flexsparse-live" style="display:none">'
        f'<div class="flexsparse-panels">{_figures(found, grid)}</div>'
        f'<div class="flexsparse-key">{_key(elements)}</div>'
        f'<div><span class="flexsparse-shown"></span>. {_manual(side)}</div>'
        '<div class="flexsparse-hover"></div></div>'
        f"<style>{_style()}</style><script>{script}</script></div>"
    )


def _fitting(found: Sequence[Counted]) -> tuple[tuple[int, int], list[str]]:
    """Blocks in a cell, (of queries, of keys), and each grid as text: as fine as fits a page."""
    grid = found[0].plane.grid
    if found[0].plane.is_short:
        kept = [x.plane.elements((0, grid.rows), (0, grid.columns)) for x in found]
        dense = [torch.where(x, IS_FULL, -1) for x in kept if x is not None]
        return (1, 1), [_packed(_dense_runs(x), grid.q_len) for x in dense]
    longest = max(grid.rows, grid.columns)
    if longest <= LONGEST_LINE and max(map(_lines, found)) <= MOST_LINES:
        texts = _texts(found, None)
        if texts is not None:
            return (1, 1), texts
    texts = None
    for most in POOLED:
        if most < longest and most**2 * len(found) <= MOST_CELLS:
            texts = _texts(found, most)
        if texts is not None:
            break
    assert texts is not None  # a few cells always fit
    return (-(-grid.rows // most), -(-grid.columns // most)), texts


def _texts(found: Sequence[Counted], most: int | None) -> list[str] | None:
    """Each grid as text, pooled to `most` cells in a row if that is given; None if too much."""
    grid = found[0].plane.grid
    rows = grid.rows if most is None else len(Pools.of(grid, most).row_edges) - 1
    texts = []
    runs_left, bytes_left = MOST_RUNS, MOST_BYTES
    for plane in found:
        runs = _block_runs(plane) if most is None else _pool_runs(plane, most)
        texts.append(_packed(runs, rows) if len(runs.row) <= runs_left else "")
        runs_left -= len(runs.row)
        bytes_left -= len(texts[-1])
        if min(runs_left, bytes_left) < 0:
            return None
    return texts


def _lines(found: Counted) -> int:
    """How many runs there are at most, before any is merged with its neighbour."""
    partial, full = (int((x.row1 - x.row0).sum()) for x in found.blocks)
    return full + (partial if found.kept is None else found.blocks.partial.blocks)


def _block_runs(found: Counted) -> Runs:
    """The blocks of a plane as runs."""
    grid = found.plane.grid
    _, row, _, start, end = found.blocks.full.rows()
    parts = [(row, start, end, torch.full_like(row, IS_FULL))]
    if found.kept is None:
        _, row, _, start, end = found.blocks.partial.rows()
        parts.append((row, start, end, torch.full_like(row, UNKNOWN)))
    else:
        row, column, kept = found.kept
        high = (grid.q_len - row * grid.block_size[0]).clamp(max=grid.block_size[0])
        wide = (grid.kv_len - column * grid.block_size[1]).clamp(max=grid.block_size[1])
        parts.append((row, column, column + 1, _worth(kept / (high * wide))))
    row, start, end, value = (torch.cat(x) for x in zip(*parts, strict=True))
    order = torch.argsort(row * (grid.columns + 1) + start)
    row, start, end, value = (x[order] for x in (row, start, end, value))
    # neighbours of one value become one run
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row[1:] != row[:-1]) | (start[1:] != end[:-1]) | (value[1:] != value[:-1])
    ends = begins.roll(-1)
    return Runs(row[begins], start[begins], end[ends], value[begins])


def _worth(part: Tensor) -> Tensor:
    """What cells are worth that keep a part of their elements; only all is 100, only none is 0."""
    rounded = (part * 100).round().long()
    worth = torch.where((rounded == 0) & (part > 0), UNDER_1, rounded)
    return torch.where((rounded == 100) & (part < 1), OVER_99, worth)


def _pool_runs(found: Counted, most_pools: int) -> Runs:
    """The pools of a plane as runs."""
    pooled = panel(found, most_pools)
    value = _worth(pooled.shade) if pooled.kept is not None else torch.tensor(UNKNOWN)
    states = pooled.states
    value = torch.where(states == FULL, IS_FULL, torch.where(states == PARTIAL, value, -1))
    return _dense_runs(value)


def _dense_runs(value: Tensor) -> Runs:
    """A grid of values as runs; cells below 0 are in none."""
    differs = torch.ones(value.shape[0], value.shape[1] + 1, dtype=torch.bool)
    differs[:, 1:-1] = value[:, 1:] != value[:, :-1]
    row, start = (differs[:, :-1] & (value >= 0)).nonzero().unbind(1)
    end = (differs[:, 1:] & (value >= 0)).nonzero()[:, 1] + 1
    return Runs(row, start, end, value[row, start])


def _packed(runs: Runs, rows: int) -> str:
    """Runs as text: counts of rows, then gaps, lengths and values of runs, deflated."""
    row, start, end, value = runs
    counts = torch.bincount(row, minlength=rows)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(row)) - first[row]
    before = torch.cat([row.new_zeros(1), end[:-1]])[: len(row)]
    gap = torch.where(place == 0, start, start - before)
    row_above = (row - 1).clamp(min=0)
    has_above = (row > 0) & (place < counts[row_above])
    above = torch.where(has_above, first[row_above] + place, 0)

    def steps(numbers: Tensor) -> Tensor:
        if not len(numbers):
            return numbers
        return numbers - torch.where(has_above, numbers[above], 0)

    counts = counts - torch.cat([counts.new_zeros(1), counts[:-1]])
    words = torch.cat([counts, steps(gap), steps(end - start)]) & 0xFFFF
    raw = array.array("H", words.tolist()).tobytes() + bytes((steps(value) & 0xFF).tolist())
    return base64.b64encode(zlib.compress(raw)).decode()


def _figures(found: Sequence[Counted], grid: Grid) -> str:
    width = next(pixels for most, pixels in WIDTHS if len(found) <= most)
    height = round(width * proportion(grid))
    return "".join(
        f'<figure style="width:{width}px"><figcaption><b>{escape(x.plane.name)}</b><br>'
        f'{escape(x.plane.who)}</figcaption><canvas role="img" aria-label="blocks" '
        f'style="width:{width}px;height:{height}px"></canvas></figure>'
        for x in found
    )


def _key(elements: bool) -> str:
    if elements:
        names = {"full": "kept", "empty": "masked"}
    else:
        names = {
            "empty": "empty: skipped",
            "partial": "partial: masked inside, the stronger the more is kept",
            "full": "full: computed without the mask",
        }
    return "".join(f'<i class="flexsparse-{x}"></i>{text} ' for x, text in names.items())


def _manual(side: tuple[int, int]) -> str:
    text = "Point at a cell to see what it is. Wheel: zoom. Drag: move. Double-click: all."
    if side == (1, 1):
        return text
    high, wide = side
    return f"{text} Each cell pools {high} × {wide} blocks; the whole grid is too large for a page."


def _style() -> str:
    def swatches(colours: Colours, where: str) -> str:
        gradient = f"linear-gradient(90deg,{css(colours.sparse)},{css(colours.dense)})"
        return (
            f"{where} .flexsparse-empty{{background:{css(colours.empty)}}}"
            f"{where} .flexsparse-full{{background:{css(colours.full)}}}"
            f"{where} .flexsparse-partial{{background:{gradient};width:48px}}"
        )

    return (
        ".flexsparse{position:relative;font:13px/1.4 system-ui,sans-serif;color:inherit}"
        ".flexsparse img{max-width:100%}"
        ".flexsparse table{border-collapse:collapse;margin:6px 0;font:inherit;color:inherit}"
        ".flexsparse th,.flexsparse td{text-align:right;padding:2px 10px 2px 0;background:none}"
        ".flexsparse th{font-weight:400;opacity:.7}"
        ".flexsparse .flexsparse-left{text-align:left}"
        ".flexsparse-panels{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-end}"
        ".flexsparse figure{margin:0}"
        ".flexsparse figcaption{overflow-wrap:anywhere;margin-bottom:3px}"
        ".flexsparse canvas{display:block;cursor:crosshair;touch-action:none;"
        "outline:1px solid rgba(128,128,128,.5)}"
        ".flexsparse-key{margin-top:8px}"
        ".flexsparse-hover{display:none;position:absolute;z-index:9;pointer-events:none;"
        "padding:2px 7px;border-radius:3px;background:#20242c;color:#fff;white-space:pre}"
        ".flexsparse i{display:inline-block;width:16px;height:12px;margin:0 5px 0 12px;"
        "vertical-align:-1px;outline:1px solid rgba(128,128,128,.5)}"
        ".flexsparse i:first-child{margin-left:0}"
        + swatches(LIGHT, ".flexsparse")
        + swatches(DARK, '.flexsparse[data-dark="true"]')
    )
