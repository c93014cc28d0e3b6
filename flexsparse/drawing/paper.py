"""A sheet of matplotlib, measured in inches from its top left corner."""

from __future__ import annotations

import functools
import io
import textwrap
from typing import Any

INK, QUIET, LINE = "#20242c", "#6c7078", "#c4c4c0"
DPI = 110
INSTALL = "Pictures need matplotlib. Install it: pip install 'flexsparse[viz]'"


class Sheet:
    """A figure whose parts are placed in inches.

    figure: the matplotlib Figure
    width, height: in inches
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = _figure_class()(figsize=(width, height), dpi=DPI, facecolor="white")
        self.width, self.height = width, height

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes without a frame or ticks, the upper left corner at (x, y)."""
        bottom = self.height - y - height
        axes = self.figure.add_axes(
            (x / self.width, bottom / self.height, width / self.width, height / self.height)
        )
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelsize=7, labelcolor=QUIET, pad=2)
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text whose first line stands at (x, y)."""
        style = {"color": INK, "size": 8, "va": "top", **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)


def wrapped(text: str, inches: float, size: float, lines: int) -> str:
    """A text on a few lines of a width, with an ellipsis where something is left out."""
    letters = max(8, int(inches * 72 / (size * 0.58)))
    return "\n".join(
        textwrap.wrap(text, letters, max_lines=lines, placeholder=" ...", break_long_words=True)
    )


def png(figure: Any, dpi: float | None = None) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi or figure.dpi)
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
