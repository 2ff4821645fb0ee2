"""What people look at: progress, tables, drawings."""

from mlodeco.show.drawing import GraphView
from mlodeco.show.progress import make_display

__all__ = ["GraphView", "make_display"]
