"""What was measured, as records that print and that become JSON."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.agree import Agreement
from tests.benchmarks.timing import Ratio

STEP_TARGETS = {
    **{("mlp", method): 1.3 for method in ("finite_difference", "neumann", "cg")},
    **{("resnet", method): 1.1 for method in ("finite_difference", "neumann", "cg")},
}
"""The most that a tick of mlodeco may take, in ticks of the hand-written loop."""


@dataclass(frozen=True)
class Memory:
    """Peaks above setup in megabytes; None where the system does not tell."""

    this: float | None
    base: float | None

    @property
    def ratio(self) -> float | None:
        """The one over the other."""
        return self.this / self.base if self.this is not None and self.base else None

    def __str__(self) -> str:
        return "-" if self.ratio is None else f"{self.ratio:.2f}"


@dataclass(frozen=True)
class Step:
    """A tick of mlodeco beside one of the hand-written loop."""

    workload: str
    method: str
    loop_ms: float
    time: Ratio
    memory: Memory
    agreement: Agreement

    @property
    def target(self) -> float | None:
        """The largest median of the ratios that is accepted."""
        return STEP_TARGETS.get((self.workload, self.method))


@dataclass(frozen=True)
class Product:
    """A cross product by one mode beside the same by another."""

    workload: str
    mode: str
    base: str
    base_ms: float
    time: Ratio
    memory: Memory
    target: float | None = None
    memory_target: float | None = None


@dataclass(frozen=True)
class Peer:
    """A tick of another library beside one of the loop, or why there is none.

    ``error`` is that of its hypergradient at the same point, in float64; where it is not small
    the library's algorithm or its constants are others.
    """

    workload: str
    method: str
    peer: str
    time: Ratio | None = None
    error: float | None = None
    note: str = ""


Result = Step | Product | Peer
