"""Perplexity against density, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flexsparse.drawing.colours import ONLY_A, ONLY_B, css
from flexsparse.drawing.paper import INK, QUIET, Sheet

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
    axes = sheet.plot(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    axes.axhline(dense.perplexity, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    for point in [dense, *points]:
        colour = QUIET if point is dense else css(ONLY_B if point.is_plan else ONLY_A)
        at = point.density * 100, point.perplexity
        axes.plot(*at, "D" if point.is_plan else "o", color=colour, markersize=6)
        axes.annotate(
            f"{point.name}  {point.perplexity:.2f}",
            at,
            # plans lie below the masks that compute as much, and near the line of the dense model
            xytext=(-7, 3) if point.is_plan else (7, 3),
            ha="right" if point.is_plan else "left",
            textcoords="offset points",
            size=7,
            color=INK,
        )
    # room for the name of the dense model at the right
    axes.set_xlim(0, dense.density * 125)
    axes.margins(y=0.15)
    axes.set_xlabel("blocks computed, % of all", size=8, color=QUIET)
    axes.set_ylabel("perplexity", size=8, color=QUIET)
    return sheet.figure
