"""How a best response is differentiated: the protocol between the sweep and the methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from mlodeco.calculus.point import LowerProblem, Memory
from mlodeco.calculus.products import Cross
from mlodeco.errors import counted
from mlodeco.tree import Tree


class Status(Enum):
    """How a linear solve ended, in words that say what to do."""

    CONVERGED = "converged to its tolerance"
    TRUNCATED = "stopped after its fixed number of terms, as asked"
    MAX_STEPS = "stopped at max_steps before its tolerance: raise max_steps or loosen rtol"
    DIVERGING = (
        "the terms of the series grow: add damping against negative curvature, or lower step_size"
    )
    INDEFINITE = (
        "met a direction without positive curvature: add damping, or use minres or gmres, which "
        "need none"
    )
    SINGULAR = "the system is singular, solved in the least-squares sense: add damping"
    GROWN = (
        "the residual had grown tenfold at max_steps, so that the one of smallest residual was "
        "taken: add damping, or raise max_steps"
    )
    UNROLLED = "differentiated step by step"
    NOT_FINITE = "met a product with the Hessian that is not finite"

    @property
    def is_trouble(self) -> bool:
        """Whether a person should hear of it."""
        return self in (
            Status.DIVERGING,
            Status.INDEFINITE,
            Status.SINGULAR,
            Status.GROWN,
        )


@dataclass(frozen=True)
class Solution:
    """An approximate solution of ``H x = b``.

    Attributes:
        value: x, with the keys of b.
        steps: how many steps or terms the method took, as the method counts them.
        residual: ``|b - H x| / |b|``, or what the method documents; None if not computed.
        status: how it ended.
    """

    value: Tree
    steps: int
    residual: float | None
    status: Status

    @staticmethod
    def lost(b: Tree, steps: int) -> Solution:
        """What is left where a product is not finite: no numbers, which the sweep reports."""
        value = {key: torch.full_like(part, torch.nan) for key, part in b.items()}
        return Solution(value, steps, None, Status.NOT_FINITE)


def name_solution(solver: object, solution: Solution) -> str:
    """A solution as messages name it."""
    after = counted(solution.steps, "step")
    return f"the solution of {type(solver).__name__} after {after} ({solution.status.value})"


def cause_of(solution: Solution) -> str:
    """Why a solution may not be finite; empty where its solve does not know."""
    status = solution.status
    return f"{status.value}." if status.is_trouble else ""


@dataclass(frozen=True)
class Response:
    """The solution v of the linear system and the cross products ``(dg/dlambda)^T v``.

    ``memory`` is handed to the method at the next hypergradient of a run.
    """

    cross: Cross
    solution: Solution
    memory: Memory = field(default_factory=dict)


class Method(Protocol):
    """Differentiates a best response."""

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Solves ``(dg/dw)^T v = cotangent`` and returns v with its cross products."""
