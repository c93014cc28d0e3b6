"""Perplexity against density, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flexsparse.drawing.colours import ONLY_A, ONLY_B, css
from flexsparse.drawing.paper import INK, LINE, QUIET, Sheet

WIDTH, HEIGHT = 6.4, 4.0  # inches
LEFT, RIGHT, TOP, BOTTOM = 0.75, 0.3, 0.55, 0.6


class Point(NamedTuple):
    """A plan in the picture.

    name: shown beside it
    density: blocks computed as a part of all
    perplexity: of the model under it
    is_plan: whether it is a plan with a mask for each head; else one mask for all
    """

    name: str
    density: float
    perplexity: float
    is_plan: bool


def draw_perplexity(points: Sequence[Point], dense: Point, title: str) -> Any:
    """A matplotlib Figure of plans and masks by what they compute and what they cost.

    Raises:
        ImportError: matplotlib is not installed.
    """
    sheet = Sheet(WIDTH, HEIGHT)
    sheet.text(0.2, 0.18, title, size=9)
    axes = sheet.axes(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(True)
        axes.spines[side].set_color(LINE)
    axes.axhline(dense.perplexity, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{dense.name}: {dense.perplexity:.2f} at {dense.density:.0%}",
        (0, dense.perplexity),
        xycoords=("axes fraction", "data"),
        xytext=(4, -9),
        textcoords="offset points",
        size=7,
        color=QUIET,
    )
    for point in points:
        axes.plot(
            point.density * 100,
            point.perplexity,
            "D" if point.is_plan else "o",
            color=css(ONLY_B if point.is_plan else ONLY_A),
            markersize=6,
        )
        axes.annotate(
            point.name,
            (point.density * 100, point.perplexity),
            xytext=(6, 4),
            textcoords="offset points",
            size=7,
            color=INK,
        )
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_locator(_ticks())
    axes.yaxis.set_major_locator(_ticks())
    axes.set_xlabel("blocks computed, % of all", size=8, color=QUIET)
    axes.set_ylabel("perplexity", size=8, color=QUIET)
    return sheet.figure


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6)
