"""Pictures of masks: figures (matplotlib, the extra `viz`) and HTML for notebooks."""

from flexsparse.drawing.comparing import compare
from flexsparse.drawing.devices import Device
from flexsparse.drawing.figure import draw
from flexsparse.drawing.least_time import roofline
from flexsparse.drawing.notebook import html
from flexsparse.drawing.zooming import zoom

__all__ = ["Device", "compare", "draw", "html", "roofline", "zoom"]
