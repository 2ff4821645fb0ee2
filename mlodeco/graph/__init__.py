"""From declarations to a checked dataflow graph, its schedule and the order of its sweeps."""

from mlodeco.graph.nesting import NestPlan, plan_nest, sees_more
from mlodeco.graph.schedule import Schedule, Timing
from mlodeco.graph.structure import Edge, EdgeKind, Graph
from mlodeco.graph.sweep_order import SweepPlan, Visit, plan_sweep

__all__ = [
    "Edge",
    "EdgeKind",
    "Graph",
    "NestPlan",
    "Schedule",
    "SweepPlan",
    "Timing",
    "Visit",
    "plan_nest",
    "plan_sweep",
    "sees_more",
]
