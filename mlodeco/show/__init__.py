"""What people look at: progress, tables, drawings."""

from mlodeco.calculus.randomness import preserved_randomness

with preserved_randomness():  # rich draws a number from ``random`` when it is first imported
    from mlodeco.show.comparison import (
        Comparison,
        Row,
        comparison_figure,
        comparison_table,
        loss_of,
    )
    from mlodeco.show.drawing import GraphView
    from mlodeco.show.figures import save_figure
    from mlodeco.show.methods import method_table
    from mlodeco.show.progress import Form, make_display
    from mlodeco.show.report import Report

__all__ = [
    "Comparison",
    "Form",
    "GraphView",
    "Report",
    "Row",
    "comparison_figure",
    "comparison_table",
    "loss_of",
    "make_display",
    "method_table",
    "save_figure",
]
