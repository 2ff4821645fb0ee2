"""What people look at: progress, tables, drawings."""

from mlodeco.calculus.randomness import preserved_randomness

with preserved_randomness():  # rich draws a number from ``random`` when it is first imported
    from mlodeco.show.drawing import GraphView
    from mlodeco.show.progress import Form, make_display

__all__ = ["Form", "GraphView", "make_display"]
