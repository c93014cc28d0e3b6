"""A sheet of matplotlib, measured in inches from its top left corner.

Panels share one pair of axes: a pair for each of many would take longer than the rest.
"""

from __future__ import annotations

import functools
import io
import textwrap
from typing import Any

INK, QUIET, LINE = "#20242c", "#6c7078", "#c4c4c0"
DPI = 110
POINT = 1 / 72
INSTALL = "Pictures need matplotlib. Install it: pip install 'flexsparse[viz]'"


class Sheet:
    """A figure whose parts are placed in inches.

    figure: the matplotlib Figure
    axes: the whole of it, in inches; y points down
    width, height: in inches
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = _figure_class()(figsize=(width, height), dpi=DPI, facecolor="white")
        self.width, self.height = width, height
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        self.axes.set_autoscale_on(False)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text whose first line hangs from (x, y)."""
        self.axes.text(x, y, text, **{"color": INK, "size": 8, "va": "top", **style})

    def image(self, pixels: Any, x: float, y: float, width: float, height: float) -> Any:
        """An image uint8[rows, columns, 3], its upper left corner at (x, y)."""
        extent = (x, x + width, y + height, y)
        return self.axes.imshow(
            pixels.numpy(), extent=extent, interpolation="nearest", aspect="auto"
        )

    def polygon(self, outline: Any, **style: Any) -> Any:
        """A polygon, from float64[corners, 2]."""
        from matplotlib.patches import Polygon

        return self.axes.add_artist(Polygon(outline, **{"linewidth": 0, **style}))

    def rectangle(self, x: float, y: float, width: float, height: float, **style: Any) -> Any:
        """A rectangle, its upper left corner at (x, y)."""
        right, below = x + width, y + height
        return self.polygon([(x, y), (right, y), (right, below), (x, below)], **style)

    def lines(self, segments: Any, **style: Any) -> None:
        """Straight lines, each from one point to another."""
        from matplotlib.collections import LineCollection

        self.axes.add_artist(LineCollection(segments, **style))

    def plot(self, x: float, y: float, width: float, height: float, **style: Any) -> Any:
        """Axes for curves, their upper left corner at (x, y); quiet, with lines on two sides."""
        bottom = self.height - y - height
        place = (x / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place, facecolor="none", **style)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(LINE)
        axes.tick_params(length=0, labelsize=7, labelcolor=QUIET)
        return axes


def wrapped(text: str, inches: float, size: float, lines: int) -> str:
    """A text on a few lines of a width, with an ellipsis where something is left out."""
    letters = max(8, int(inches * 72 / (size * 0.58)))
    return "\n".join(
        textwrap.wrap(text, letters, max_lines=lines, placeholder=" ...", break_long_words=True)
    )


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    return buffer.getvalue()


def small_png(figure: Any) -> bytes:
    """A figure as a PNG of few colours, a third of the size; its text looks the same."""
    from PIL import Image  # matplotlib needs it too

    with Image.open(io.BytesIO(png(figure))) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(160, dither=Image.Dither.NONE).save(
            buffer, "PNG", optimize=True
        )
    return buffer.getvalue()


@functools.cache
def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(INSTALL) from None

    class Picture(Figure):
        """A figure that notebooks show also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture
