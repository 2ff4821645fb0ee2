"""The sides by name: mlodeco, the hand-written loop, and the peers."""

from __future__ import annotations

from tests.benchmarks import workloads
from tests.benchmarks.case import Case, Side
from tests.benchmarks.library import Library
from tests.benchmarks.loop import Loop
from tests.benchmarks.methods import METHODS
from tests.benchmarks.peers import PEERS

LOOP, LIBRARY = "loop", "mlodeco"


def make_side(name: str, workload: str, method: str, case: Case) -> Side:
    """A side that is ready for its first tick.

    Args:
        name: ``"loop"``, ``"mlodeco"`` or a peer.
        workload: a key of ``WORKLOADS``.
        method: a key of ``METHODS``.
        case: the workload made.
    """
    if name == LOOP:
        return Loop(case, METHODS[method].tail, late=workload in workloads.LATE)
    if name == LIBRARY:
        return Library(case, METHODS[method].library(case))
    return PEERS[name](case, method)
