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
    from mlodeco.show.curves import plot_histories
    from mlodeco.show.drawing import GraphView
    from mlodeco.show.figures import FORMATS, save_figure
    from mlodeco.show.methods import method_table
    from mlodeco.show.progress import Form, make_display
    from mlodeco.show.report import Report

__all__ = [
    "FORMATS",
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
    "plot_histories",
    "save_figure",
]
