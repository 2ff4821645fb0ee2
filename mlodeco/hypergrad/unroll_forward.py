"""Forward iterative differentiation: tangents carried along the steps of the inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import Cross, first_gradient, push_gradient
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.calculus.tape import Recording, Tape, TapeStep
from mlodeco.calculus.update import Cotangent, Iterate, Tangent
from mlodeco.calculus.update_derivatives import push_forward
from mlodeco.errors import MethodError
from mlodeco.hypergrad.options import Guide, Options, check_count
from mlodeco.hypergrad.unroll import require_tape
from mlodeco.tree import Tree, dot, widen


@dataclass(frozen=True, kw_only=True)
class UnrollForward(Options):
    """The derivative that :class:`Unroll` gives, from the first step to the last.

    For each entry j of the hyperparameters a tangent ``z_j = d(w, s)/dlambda_j`` is carried
    along: ``dg = (dg/dw) z_j + (dg/dlambda) e_j`` by dual numbers through the backward pass, then
    ``z_j <- dU(w, g, s) (z_j, dg)``. At the end ``<b, z_j>`` for the cotangent b.

    Memory: one iterate and a tangent of its size for each entry, whatever the number of steps.
    Cost for each step: the step again, and for each entry a forward-mode pass, which takes twice
    to three times a gradient. So for a handful of hyperparameters and long loops.

    Attributes:
        truncate: the last steps to differentiate; those before are constants. None for all.
        limit: refuse more entries than this.

    For operations with a forward rule. The lower levels of a level between others are
    hyperparameters too, each of whose entries costs a pass.

    Reference:
        Franceschi et al. 2017, arXiv:1703.01785.
    """

    truncate: int | None = None
    limit: int = 100
    is_entrywise: ClassVar[bool] = True

    guide = Guide(
        solves="the derivative of the inner loop, forwards",
        cost="a forward-mode pass for each step and hyperparameter",
        when="a handful of hyperparameters, long inner loops",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        if self.truncate is not None:
            check_count(self, "truncate", self.truncate)
        check_count(self, "limit", self.limit)

    @property
    def recording(self) -> Recording:
        """What it needs of a tape."""
        return Recording(self.truncate, None if self.truncate is None else 1)

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Goes along the tape.

        Raises:
            MethodError: there is no tape, or more than ``limit`` entries.
            OptimizerError: the optimizer's step cannot be differentiated.
        """
        tape = require_tape(self, problem, self.truncate)
        values = {**_starts(problem, tape), **problem.point.values, **tape.steps[-1].point.values}
        entries = self._entries({name: values[name] for name in problem.wanted})
        tangents = [Cotangent(tape.from_initial(target, unit)) for target, unit in entries]
        count = 0
        for step, before in tape.forward(self.truncate):
            tangents = _push(problem, step, before, entries, tangents)
            count += 1
        cross: Cross = {target: {} for target in problem.wanted}
        for (target, unit), tangent in zip(entries, tangents, strict=True):
            ((key, hot),) = unit.items()
            found = cross[target].get(key)
            part = hot * -dot(cotangent, tangent.parameters)
            cross[target][key] = part if found is None else found + part
        return Response(cross, Solution({}, count, None, Status.UNROLLED))

    def _entries(self, targets: Mapping[str, Tree]) -> list[tuple[str, Tree]]:
        """A unit tree for each number among the hyperparameters."""
        count = sum(t.numel() for tree in targets.values() for t in tree.values())
        if count > self.limit:
            raise MethodError(
                f"UnrollForward(limit={self.limit}) on {count} hyperparameters, each of which "
                "takes a forward-mode pass a step.",
                remedy="use Unroll, whose cost does not depend on their number, or raise limit.",
            )
        return [
            (target, {key: _unit(tensor, number)})
            for target, tree in targets.items()
            for key, tensor in widen(tree).items()
            for number in range(tensor.numel())
        ]


def _starts(problem: LowerProblem, tape: Tape) -> dict[str, Tree]:
    """Trees like the parameters that the first iterate was copied from."""
    found: dict[str, Tree] = {}
    for key, (level, name) in tape.initial.items():
        own = problem.parameters[key]
        found.setdefault(level, {})[name] = own[0] if tape.is_stacked else own
    return found


def _unit(like: Tensor, number: int) -> Tensor:
    unit = torch.zeros_like(like)
    unit.view(-1)[number] = 1.0
    return unit


def _push(
    problem: LowerProblem,
    step: TapeStep,
    before: Iterate,
    entries: list[tuple[str, Tree]],
    tangents: list[Cotangent],
) -> list[Cotangent]:
    """The tangents behind a step."""
    level, seen = problem.level, step.point.loss.sees
    inner = step.problem(level, before.parameters)
    gradient = first_gradient(inner) if step.gradient is None else step.gradient
    values = step.point.values
    pushed: list[Cotangent] = []
    for (target, unit), tangent in zip(entries, tangents, strict=True):
        along = {target: unit} if target in seen else {}
        slope = push_gradient(inner.at(problem.point.scale), {**along, level: tangent.parameters})
        own = {target: unit} if target in step.update.reads else {}
        move = Tangent(tangent.parameters, tangent.state, slope, own)
        pushed.append(push_forward(step.update, before, gradient, values, move))
    return pushed
