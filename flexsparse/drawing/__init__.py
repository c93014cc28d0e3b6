"""Pictures of masks: figures (matplotlib, the extra `viz`) and HTML for notebooks."""

from flexsparse.drawing.comparing import compare
from flexsparse.drawing.devices import Device
from flexsparse.drawing.figure import draw
from flexsparse.drawing.html import html
from flexsparse.drawing.roofline import roofline
from flexsparse.drawing.zooming import zoom

__all__ = ["Device", "compare", "draw", "html", "roofline", "zoom"]
