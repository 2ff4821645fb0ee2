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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mlodeco.calculus.kernels import second_derivatives
from mlodeco.calculus.point import Point
from mlodeco.calculus.response import Solution
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import gradient, live, require_finite
from mlodeco.calculus.sweep import Hypergradient, Solve
from mlodeco.errors import MethodError
from mlodeco.graph import NestPlan
from mlodeco.tree import Tree, add, is_zero, restrict, zeros_like

Values = dict[str, Tree]
"""The parameters of levels on which something is differentiated."""

_NO_HOOKS = (
    "nested=True does not go through saved-tensor hooks such as activation checkpointing: use the "
    "module without checkpointing, or leave nested out"
)


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
    where Eq. (2) makes one, each of whose products makes solves of the levels below it, so
    that it multiplies with depth.

    Args:
        plan: what responds to what.
        points: the loss of each of ``plan.levels``.
        methods: for each edge (upper, lower) its linear solver.

    Raises:
        MethodError: a method is not a linear solver.
        NonFiniteError: the loss is not finite.
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
        self._plan = plan
        self._points = points
        self._methods = methods
        self._known: dict[tuple[Any, ...], tuple[Values, Tree]] = {}
        self._inverses: dict[tuple[str, tuple[str, str]], _Inverse] = {}
        self._solves: dict[str, Solve] = {}

    def hypergradient(self) -> Hypergradient:
        """One backward of the top level's total loss."""
        top = self._plan.top
        own = live(self._points[top].values[top])
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            loss, metrics, state = self._total_loss(top, {top: own}, 0)
            value = require_finite(loss, top, self._points[top].loss.site)
            found = gradient(loss, own) if loss.requires_grad else {}
        return Hypergradient(found, value, metrics, tuple(self._solves.values()), state, {})

    def _total_loss(
        self, level: str, values: Values, order: int
    ) -> tuple[Tensor, dict[str, Any], State]:
        """The level's loss with the responses of the levels below.

        Right to one derivative in its own parameters and ``order`` more in all. Also its
        metrics, and the tensors of its slots after the pass.
        """
        scope = dict(values)
        for low in self._plan.responses[level]:
            needed = order + int(level in self._plan.inputs[low])
            response = self._response(low, scope, needed, self._plan.via[level, low])
            if response is not None:
                scope[low] = response
        point = self._points[level]
        state = point.loss.state(
            {**point.values, **{k: scope[k] for k in scope if k in point.values}}
        )
        share = 1.0 / len(point.batches)

        def mean() -> tuple[Tensor, dict[str, Any]]:
            losses = list(point.losses())
            total = torch.stack([loss * share for loss, _ in losses]).sum()
            return total, losses[-1][1]

        loss, metrics = point.loss.within(state, mean)
        return loss, metrics, state

    def _total_gradient(self, level: str, values: Values, order: int) -> Tree:
        """The derivative of the total loss in the level's own parameters.

        It can be differentiated ``order`` times more.
        """
        loss, _, _ = self._total_loss(level, values, order)
        return gradient(loss, values[level], create_graph=True) if loss.requires_grad else {}

    def _response(
        self, level: str, scope: Values, order: int, edge: tuple[str, str]
    ) -> Tree | None:
        """The level's parameters as a function of its inputs; None if it has none in scope."""
        given = {name: scope[name] for name in scope if name in self._plan.inputs[level]}
        if not given or not order:
            return None
        key = (level, order, edge, *((name, id(tree)) for name, tree in given.items()))
        if key not in self._known:
            self._known[key] = given, self._chord_newton(level, given, order, edge)
        return self._known[key][1]

    def _chord_newton(self, level: str, given: Values, order: int, edge: tuple[str, str]) -> Tree:
        """``order`` steps from the present parameters, which carry as many derivatives."""
        inverse = self._inverse(level, edge)
        theta = live(self._points[level].values[level])
        for _ in range(order):
            total = self._total_gradient(level, {**given, level: theta}, order)
            moved = {key: g - g.detach() for key, g in total.items()}
            theta = add(theta, inverse(moved), -1.0)
        return theta

    def _inverse(self, level: str, edge: tuple[str, str]) -> _Inverse:
        """``H^-1`` by the method of the edge, its graph kept for all uses."""
        key = level, edge
        if key not in self._inverses:
            method = self._methods[edge]
            own = live(self._points[level].values[level])
            total = self._total_gradient(level, {level: own}, 1)
            self._inverses[key] = _Inverse(_solver(method, self._points[level]), own, total)
            self._inverses[key].report = lambda s: self._keep(Solve(level, method, s))
        return self._inverses[key]

    def _keep(self, solve: Solve) -> None:
        """Keeps the worst solve of each level."""
        known = self._solves.get(solve.level)
        if known is None or _badness(solve) >= _badness(known):
            self._solves[solve.level] = solve


def _badness(solve: Solve) -> tuple[bool, float]:
    return solve.solution.status.is_trouble, solve.solution.residual or 0.0


def _solver(method: Any, point: Point) -> Solver:
    if not hasattr(method, "solve"):
        raise MethodError(
            f"nested=True differentiates through the inverse of each level's total Hessian, and "
            f"{type(method).__name__} is not a linear solver.",
            expected="a method with solve(matvec, b), such as CG, MINRES, GMRES, Neumann, Nystrom, "
            "Dense or Identity.",
            remedy="use CG() for the levels above this one, or leave nested out.",
            level=point.loss.level,
            site=point.loss.site,
        )
    solver: Solver = method
    return solver


@dataclass
class _Inverse:
    """``(H + damping I)^-1`` as a linear map that autograd differentiates by itself."""

    solver: Any
    own: Tree
    total: Tree
    report: Callable[[Solution], None] = lambda solution: None

    def __call__(self, b: Tree) -> Tree:
        """The x for b; parameters that the total gradient does not touch stay zero."""
        keys = tuple(key for key in self.total if key in b)
        if not keys:
            return {}
        return dict(zip(keys, _solve(self, keys, *(b[key] for key in keys)), strict=True))

    def solve(self, b: Tree) -> Tree:
        """The solver's x, without a graph."""
        touched = restrict(b, self.total)
        if is_zero(touched):
            return zeros_like(b)
        solution = self.solver.solve(self._product, touched)
        self.report(solution)
        return {**zeros_like(b), **solution.value}

    def _product(self, v: Tree) -> Tree:
        damping = getattr(self.solver, "damping", 0.0)
        keys = [key for key in self.total if key in v and self.total[key].requires_grad]
        outputs, weights = [self.total[k] for k in keys], [v[k].detach() for k in keys]
        product = gradient(outputs, self.own, weights, retain_graph=True) if keys else {}
        filled = {k: product[k] if k in product else torch.zeros_like(v[k]) for k in v}
        return add(filled, v, damping) if damping else filled


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
