"""Reverse iterative differentiation: back through the steps of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import (
    LINEARIZATIONS,
    Cross,
    Linearization,
    first_gradient,
    fit_linearization,
    open_linearization,
    share_linearization,
)
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.calculus.tape import Recording, Tape, TapeStep
from mlodeco.calculus.update import Cotangent, Iterate
from mlodeco.calculus.update_derivatives import pull_back
from mlodeco.errors import MethodError, quoted
from mlodeco.hypergrad.options import Guide, Options, check_count, check_flag, check_product
from mlodeco.tree import Tree, add, scale


@dataclass(frozen=True, kw_only=True)
class Unroll(Options):
    """The derivative through the steps ``(w, s)' = U(w, g(w, lambda), s)`` of the inner loop.

    From the last step to the first, with (a, c) the cotangent of (w', s'): the vjp of the update
    gives ``(a, b, c) <- dU(w, g, s)^T (a, c)`` with b that of the gradient, elementwise; then one
    product gives both ``a <- a + (dg/dw)^T b`` and the cross products ``(dg/dlambda)^T b``. This
    is the exact derivative of the loop from where it started, which is held constant, or with
    ``init_from`` is that of the level copied in. It holds for every optimizer of torch that has
    a ``differentiable`` option, with its state, groups, schedule and clipping, and for
    ``@update`` rules.

    Memory: the parameters and optimizer state before each step, not graphs, and one graph of a
    gradient. Cost for each step: one gradient and one second-order product, twice a step's own
    passes. In a run the steps are those that were executed.

    Attributes:
        truncate: the last steps to differentiate; those before are constants. None for all.
        checkpoint_every: of how many steps one keeps its parameters and state; those between are
            computed again. The square root of the number of steps needs the least memory. In a
            run with hooks between its steps, which may change parameters, every step keeps them.
        keep_graph: keep the graph of each step's gradient from when the step is taken: no
            gradient is computed again, and memory grows with the number of steps.
        first_order: take the gradients of the inner steps as constants (first-order MAML), so
            that no second derivative is needed; only ``init_from`` and what the update itself
            reads then carry anything.
        product: ``"auto"``, ``"reverse"``; ``"forward"`` for memory: dual numbers in place of a
            graph of the gradient, slower; ``"difference"`` where an operation has no second
            derivative.

    A level between others is rolled with its lower levels held, as in Eq. (2).

    Reference:
        Maclaurin et al. 2015, arXiv:1502.03492; Finn et al. 2017, arXiv:1703.03400.
    """

    truncate: int | None = None
    checkpoint_every: int = 1
    keep_graph: bool = False
    first_order: bool = False
    product: str = "auto"
    is_entrywise: ClassVar[bool] = True

    guide = Guide(
        solves="the derivative of the inner loop, backwards",
        cost="a gradient and a product a step; its states in memory",
        when="short inner loops; learned rates, rules and starts (MAML)",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        if self.truncate is not None:
            check_count(self, "truncate", self.truncate)
        check_count(self, "checkpoint_every", self.checkpoint_every)
        check_flag(self, "keep_graph", self.keep_graph)
        check_flag(self, "first_order", self.first_order)
        check_product(self, self.product, LINEARIZATIONS)
        wasted = "first_order" if self.first_order else "checkpoint_every"
        if self.keep_graph and (self.first_order or self.checkpoint_every > 1):
            raise MethodError(
                f"Unroll(keep_graph=True, {wasted}={getattr(self, wasted)!r}).",
                expected="one of them: graphs that are kept leave nothing to save.",
                remedy=f"leave out keep_graph, or {wasted}.",
            )

    @property
    def recording(self) -> Recording:
        """What it needs of a tape."""
        return Recording(self.truncate, self.checkpoint_every, self.keep_graph)

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Goes back over the tape.

        Raises:
            MethodError: there is no tape, or ``truncate`` cuts off what it starts from.
            OptimizerError: the optimizer's step cannot be differentiated.
        """
        tape = require_tape(self, problem, self.truncate)
        after = Cotangent(cotangent)
        cross: Cross = {target: {} for target in problem.wanted}
        starts = tape.starts(problem.wanted)
        count = 0
        for step, before in tape.backward(self.truncate):
            is_last = step is tape.first(self.truncate) and not starts
            after, found = self._pull_back(problem, step, before, after, own=not is_last)
            for target, tree in found.items():
                cross[target] = add(cross[target], tree)
            count += 1
        initial = tape.into_initial(after.parameters) if starts else {}
        for target in starts:
            cross[target] = add(cross[target], initial.get(target, {}))
        # the sweep subtracts what a response carries on, as for v = H^-1 b
        carried = {target: scale(tree, -1.0) for target, tree in cross.items()}
        return Response(carried, Solution(after.parameters, count, None, Status.UNROLLED))

    def _pull_back(
        self,
        problem: LowerProblem,
        step: TapeStep,
        before: Iterate,
        after: Cotangent,
        *,
        own: bool,
    ) -> tuple[Cotangent, Cross]:
        """The cotangent before a step, and what the step carries to the targets.

        The part of the former that goes through the gradient is left out unless ``own``.
        """
        inner = step.problem(problem.level, before.parameters, problem.wanted)
        reads = tuple(name for name in step.update.reads if name in problem.wanted)
        opened = None if self.first_order else self._open(step, inner.at(problem.point.scale))
        gradient = step.gradient
        if gradient is None:
            gradient = first_gradient(inner) if opened is None else opened.gradient()
        pulled = pull_back(step.update, before, gradient, step.point.values, after, reads)
        if opened is None or not pulled.gradients:
            return pulled.before, pulled.reads
        curved, cross = opened.pull_back(pulled.gradients, own=own)
        found = {target: tree for target, tree in cross.items() if target in problem.wanted}
        for target, tree in pulled.reads.items():
            found[target] = add(found.get(target, {}), tree)
        direct = pulled.before
        return Cotangent(add(direct.parameters, curved), direct.state), found

    def _open(self, step: TapeStep, inner: LowerProblem) -> Linearization:
        """The graph that was kept, as long as nobody has used it up, else a new one."""
        kept = step.graph
        if kept is None or kept.is_spent:
            return open_linearization(inner, self.product)
        return fit_linearization(share_linearization(kept, inner), inner, step.point.scale)


def require_tape(method: Options, problem: LowerProblem, truncate: int | None) -> Tape:
    """The tape of a problem.

    Raises:
        MethodError: there is none, or the derivative in its start is cut off.
    """
    tape = problem.tape
    name = type(method).__name__
    if tape is None or not tape.steps:
        raise MethodError(
            f"{name} has no steps of the level to differentiate through.",
            expected="an inner loop: at least one step of the level since the last turn above it.",
            remedy="use it in a run or in hypergradient().",
        )
    is_cut = truncate is not None and truncate < len(tape.steps)
    starts = tape.starts(problem.wanted)
    if starts and is_cut:
        raise MethodError(
            f"{name}(truncate={truncate}) on a loop of {len(tape.steps)} steps that starts from "
            f"parameters of {quoted(starts)} by init_from=, the derivative in which is cut off.",
            expected=f"truncate of at least {len(tape.steps)}.",
            remedy="leave truncate out.",
        )
    return tape
