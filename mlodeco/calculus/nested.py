"""The true derivative of nested best responses, where Eq. (2) is an approximation.

Eq. (2) differentiates a level as if the levels below it were constants. Here a level follows
the stationarity of its *total* loss, its lower levels responding to it: with G its total
gradient and H the derivative of G in its own parameters, both at the present point,

    theta <- theta - H^-1 (G(theta, inputs) - G_now)

from the present parameters, as often as derivatives are taken above. The value stays where it
is, since ``G - G_now`` is zero there; p such chord-Newton steps carry p derivatives. Where no
level feeds back into the levels below it, this is Eq. (2), at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mlodeco.calculus.finite import require_finite_tree
from mlodeco.calculus.kernels import second_derivatives
from mlodeco.calculus.mean import mean_of, shared, tied
from mlodeco.calculus.point import Point
from mlodeco.calculus.response import Solution, cause_of, name_solution
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import gradient, live, require_finite
from mlodeco.calculus.sweep import Hypergradient, Solve, are_same, solving_for
from mlodeco.errors import MethodError
from mlodeco.graph import NestPlan
from mlodeco.tree import Tree, add, fill, is_zero, match, norm, restrict, widen, zeros_like

Values = dict[str, Tree]
"""The parameters of levels on which something is differentiated."""

_NO_HOOKS = "nested=True does not go through saved-tensor hooks"
"""The text by which torch's refusal of them is known."""


class Solver(Protocol):
    """A method that is a linear solver."""

    def solve(self, matvec: Callable[[Tree], Tree], b: Tree) -> Solution:
        """An approximate solution of ``matvec(x) = b``."""


@second_derivatives()
def differentiate_nested(
    plan: NestPlan,
    points: Mapping[str, Point],
    methods: Mapping[tuple[str, str], Any],
) -> Hypergradient:
    """The hypergradient of ``plan.top`` with every level's total response.

    Exact as far as the linear solves are; each H is taken as symmetric. Cost: one solve a level
    where Eq. (2) makes one, each of whose products makes solves of the levels that it feeds back
    into, so that it multiplies with depth: where a lowest level reads the one between, 4 solves
    a product of that one and 8 more, so 24 for 4 variables solved as a matrix; and a fourth level
    on top of the same kind makes it hundreds. Without feedback, one solve a level.

    Of a method its solver and its damping count. ``product``, ``curvature_batch`` and
    ``warm_start`` have no part: products are reverse, on whole batches, and nothing is kept.

    Args:
        plan: what responds to what.
        points: the loss of each of ``plan.levels``.
        methods: for each edge (upper, lower) its linear solver.

    Raises:
        MethodError: a method is not a linear solver, or a loss uses saved-tensor hooks.
        NonFiniteError: a loss, a gradient, a cotangent or a solution is not finite.
    """
    return _Nest(plan, points, methods).hypergradient()


class _Nest:
    """The total losses of one nest at one point."""

    def __init__(
        self,
        plan: NestPlan,
        points: Mapping[str, Point],
        methods: Mapping[tuple[str, str], Any],
    ) -> None:
        _require_solvers(plan, points, methods)
        self._plan = plan
        self._points = points
        self._methods = methods
        self._distinct: list[Any] = []
        self._known: dict[tuple[Any, ...], tuple[Values, Tree]] = {}
        self._inverses: dict[tuple[str, int], _Inverse] = {}
        self._solves: dict[str, Solve] = {}

    def hypergradient(self) -> Hypergradient:
        """One backward of the top level's total loss."""
        top = self._plan.top
        point = self._points[top]
        own = live(point.values[top])
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            loss, metrics, state = self._total_loss(top, {top: own}, 0)
            value = require_finite(loss, top, point.loss.site)
            value = _mean_loss(value, loss, point)
            found = gradient(loss, own) if loss.requires_grad else {}
        require_finite_tree(found, point, "the derivative through the levels below")
        solves = tuple(self._solves.values())
        return Hypergradient(found, norm(found), value, metrics, solves, state, {})

    def _total_loss(
        self, level: str, values: Values, order: int
    ) -> tuple[Tensor, dict[str, Any], State]:
        """The level's loss with the responses of the levels below.

        Right to one derivative in its own parameters and ``order`` more in all. Also its
        metrics, and the tensors of its slots after the pass.
        """
        scope, moves_with_own = dict(values), {level}
        for low in self._plan.responses[level]:
            moves = not moves_with_own.isdisjoint(self._plan.inputs[low])
            response = self._response(low, scope, order + moves, self._plan.via[level, low])
            if response is not None:
                scope[low] = response
            if moves:
                moves_with_own.add(low)
        point = self._points[level]
        seen = {name: tree for name, tree in scope.items() if name in point.values}
        common = shared(seen, point.mean)
        state = point.state({**point.values, **common})
        share = 1.0 / len(point.batches)

        def mean() -> tuple[Tensor, dict[str, Any]]:
            losses = list(point.losses())
            total = torch.stack([loss * share for loss, _ in losses]).sum()
            return total, losses[-1][1]

        with _located(point):
            loss, metrics = point.loss.within(state, mean)
        return tied(loss, common, point.mean), metrics, state

    def _total_gradient(self, level: str, values: Values, order: int, damping: float) -> Tree:
        """The derivative of the total loss in the level's own parameters.

        It can be differentiated ``order`` times more. The damping is that of a term
        ``damping / 2 |theta|^2`` of the loss.
        """
        loss, _, _ = self._total_loss(level, values, order)
        if not loss.requires_grad:
            return {}
        total = gradient(loss, values[level], create_graph=True)
        return add(total, restrict(values[level], total), damping) if damping else total

    def _response(
        self, level: str, scope: Values, order: int, edge: tuple[str, str]
    ) -> Tree | None:
        """The level's parameters as a function of its inputs; None if it is a constant."""
        given = {name: scope[name] for name in scope if name in self._plan.inputs[level]}
        if not given or not order:
            return None
        number = self._number(self._methods[edge])
        key = (level, order, number, *((name, id(tree)) for name, tree in given.items()))
        if key not in self._known:
            self._known[key] = given, self._chord_newton(level, given, order, number)
        return self._known[key][1]

    def _number(self, method: Any) -> int:
        """One number for all methods that do the same."""
        for number, other in enumerate(self._distinct):
            if are_same(other, method):
                return number
        self._distinct.append(method)
        return len(self._distinct) - 1

    def _chord_newton(self, level: str, given: Values, order: int, number: int) -> Tree:
        """``order`` steps from the present parameters, which carry as many derivatives."""
        inverse = self._inverse(level, number)
        theta = live(self._points[level].values[level])
        for derivatives in range(1, order + 1):
            values = {**given, level: theta}
            total = self._total_gradient(level, values, derivatives, inverse.damping)
            moved = {key: g - g.detach() for key, g in total.items() if g.requires_grad}
            theta = add(theta, inverse(moved), -1.0)
        return theta

    def _inverse(self, level: str, number: int) -> _Inverse:
        """``H^-1`` by a method, its graph kept for all uses."""
        if (level, number) not in self._inverses:
            method, point = self._distinct[number], self._points[level]
            solver: Solver = method
            own = live(point.values[level])
            damping = float(getattr(method, "damping", 0.0))
            total = self._total_gradient(level, {level: own}, 1, damping)
            require_finite_tree(total, point, "the gradient of its total loss")

            def report(solution: Solution) -> None:
                self._keep(Solve(level, method, solution))

            self._inverses[level, number] = _Inverse(solver, point, damping, own, total, report)
        return self._inverses[level, number]

    def _keep(self, solve: Solve) -> None:
        """Keeps the worst solve of each level."""
        known = self._solves.get(solve.level)
        if known is None or _badness(solve) >= _badness(known):
            self._solves[solve.level] = solve


def _mean_loss(value: float, loss: Tensor, point: Point) -> float:
    like = {"loss": loss.detach()}
    return float(mean_of(point.mean, like, like)["loss"]) if point.mean else value


def _badness(solve: Solve) -> tuple[bool, float]:
    return solve.solution.status.is_trouble, solve.solution.residual or 0.0


@contextmanager
def _located(point: Point) -> Iterator[None]:
    """Says at which loss saved-tensor hooks were met.

    Raises:
        MethodError: they were.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_HOOKS not in str(error):
            raise
        raise MethodError(
            "nested=True does not go through saved-tensor hooks such as activation checkpointing, "
            "and the loss uses some.",
            remedy="use the module without checkpointing, or leave nested out.",
            level=point.loss.level,
            site=point.loss.site,
        ) from error


def _require_solvers(
    plan: NestPlan, points: Mapping[str, Point], methods: Mapping[tuple[str, str], Any]
) -> None:
    """Refuses methods that solve no linear system, at the level whose option they are.

    Raises:
        MethodError: there is one.
    """
    for name in plan.levels:
        for low in plan.responses[name]:
            upper, lower = plan.via[name, low]
            method = methods[upper, lower]
            if not hasattr(method, "solve"):
                raise MethodError(
                    "nested=True differentiates through the inverse of each level's total Hessian, "
                    f"and {type(method).__name__}, by which this level differentiates through "
                    f"{lower!r}, is not a linear solver.",
                    expected="a method with solve(matvec, b), such as CG, MINRES, GMRES, Neumann, "
                    "Nystrom, Dense or Identity.",
                    remedy="use hypergrad=CG() for this level, or leave nested out.",
                    level=upper,
                    site=points[upper].loss.site,
                )


@dataclass(frozen=True)
class _Inverse:
    """``H^-1`` as a linear map that autograd differentiates by itself.

    ``total`` is the total gradient in ``own``, damping included, so that H is its derivative.
    """

    solver: Solver
    point: Point
    damping: float
    own: Tree
    total: Tree
    report: Callable[[Solution], None]

    def __call__(self, b: Tree) -> Tree:
        """The x for b; parameters that the total gradient does not touch stay zero."""
        keys = tuple(key for key in self.total if key in b)
        if not keys:
            return {}
        return dict(zip(keys, _solve(self, keys, *(b[key] for key in keys)), strict=True))

    def solve(self, b: Tree) -> Tree:
        """The solver's x, without a graph."""
        if is_zero(b):
            return zeros_like(b)
        require_finite_tree(b, self.point, "the cotangent that reaches the level")
        with solving_for(self.point):
            solution = self.solver.solve(self._product, widen(b))
        what, cause = name_solution(self.solver, solution), cause_of(solution)
        require_finite_tree(solution.value, self.point, what, cause)
        self.report(solution)
        return match(solution.value, b)

    def _product(self, v: Tree) -> Tree:
        keys = [key for key in self.total if key in v and self.total[key].requires_grad]
        outputs = [self.total[key] for key in keys]
        weights = [v[key].detach().to(self.total[key].dtype) for key in keys]
        product = gradient(outputs, self.own, weights, retain_graph=True) if keys else {}
        return fill(widen(product), v)


class _Solve(torch.autograd.Function):
    """``x = H^-1 b``; its derivative is the same map, H being symmetric."""

    @staticmethod
    def forward(
        ctx: Any, inverse: _Inverse, keys: tuple[str, ...], *b: Tensor
    ) -> tuple[Tensor, ...]:
        """Solves; nothing is done for b = 0."""
        ctx.inverse, ctx.keys = inverse, keys
        found = inverse.solve(dict(zip(keys, b, strict=True)))
        return tuple(found[key] for key in keys)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Solves for the cotangents, differentiably."""
        return None, None, *_solve(ctx.inverse, ctx.keys, *cotangents)


def _solve(inverse: _Inverse, keys: tuple[str, ...], *b: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _Solve.apply(inverse, keys, *b)  # type: ignore[no-untyped-call]
    return found
