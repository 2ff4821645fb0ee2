"""What people look at: progress, tables, drawings."""

from mlodeco.calculus.randomness import preserved_randomness

with preserved_randomness():  # rich draws a number from ``random`` when it is first imported
    from mlodeco.show.drawing import GraphView
    from mlodeco.show.progress import make_display

__all__ = ["GraphView", "make_display"]
