"""Reverse accumulation of a hypergradient over the dataflow graph, Eq. (2) of Betty.

``dC_k/dtheta_k = direct - sum over paths of (cross product)(inverse curvature)...``: the
cotangents run down the lower-to-upper edges, every level on a path is solved once, and the
responses that read the top level are added up. Choe et al., ICLR 2023, arXiv:2207.02849.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlodeco.calculus.finite import require_finite_tree
from mlodeco.calculus.kernels import second_derivatives
from mlodeco.calculus.point import LowerProblem, Memory, Point
from mlodeco.calculus.replicas import respond
from mlodeco.calculus.response import Method, Solution, cause_of, name_solution
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import live, require_finite
from mlodeco.calculus.tape import Tape
from mlodeco.errors import MethodError
from mlodeco.graph import SweepPlan
from mlodeco.tree import Tree, add, match, norm, widen

Memories = Mapping[tuple[str, int], Memory]
"""What the methods of one top level's sweep keep: by level and number of its solve."""


@dataclass(frozen=True)
class Solve:
    """One linear solve of a sweep."""

    level: str
    method: Method
    solution: Solution


@dataclass(frozen=True)
class Hypergradient:
    """The total derivative of a level's loss in its own parameters.

    Attributes:
        gradient: direct plus indirect term; parameters that neither touches are left out.
        size: its norm.
        loss: the loss, averaged over micro-batches.
        metrics: what the loss function returned beside it, for the last micro-batch.
        solves: the linear solves made, in their order.
        state: the tensors of the top level's slots after its pass, updated buffers included.
        memories: what the methods keep for the next hypergradient of this level.
    """

    gradient: Tree
    size: float
    loss: float
    metrics: dict[str, Any]
    solves: tuple[Solve, ...]
    state: State
    memories: Memories

    @staticmethod
    def lost(like: Tree) -> Hypergradient:
        """What is left where numbers overflowed: none of the gradient of these parameters."""
        gradient = {key: torch.full_like(t, math.nan) for key, t in like.items()}
        return Hypergradient(gradient, math.nan, math.nan, {}, (), {}, {})


@second_derivatives()
def sweep(
    plan: SweepPlan,
    points: Mapping[str, Point],
    methods: Mapping[tuple[str, str], Method],
    memories: Memories | None = None,
    tapes: Mapping[str, Tape] | None = None,
) -> Hypergradient:
    """The hypergradient of ``plan.top`` at the points given.

    Args:
        plan: the visits, uppers first.
        points: the loss of the top level and of each level visited.
        methods: for each edge (upper, lower) how the lower level is differentiated.
        memories: what the methods kept at the last hypergradient of this level.
        tapes: the steps of the levels that a method differentiates step by step.

    Raises:
        LossError: a loss function returned no scalar loss.
        MethodError: no method differentiates what the top level acts on.
        NonFiniteError: a loss, a cotangent or a solution is not finite.
    """
    _refuse_blind_methods(plan, points, methods)
    first = _direct_pass(plan, points[plan.top])
    indirect: Tree = {}
    pending = _Cotangents()
    for low in plan.lowers:
        pending.add(low, methods[plan.top, low], first.cotangents.get(low, {}), 1.0)
    solves: list[Solve] = []
    kept: dict[tuple[str, int], Memory] = {}
    parts: list[_Part] = []
    for visit in plan.visits:
        targets = (*visit.lowers, *((plan.top,) if visit.feeds_top else ()))
        for number, (method, cotangent) in enumerate(pending.of(visit.level)):
            key = visit.level, number
            memory = (memories or {}).get(key, {})
            tape = (tapes or {}).get(visit.level)
            point = points[visit.level]
            seen = tuple(target for target in targets if target in point.loss.sees)
            problem = LowerProblem(point, visit.level, seen, memory, tape, targets)
            parts.append((cotangent, point, "the cotangent that reaches the level", ""))
            _require_finite(cotangent, parts)
            with solving_for(problem.point):
                response = respond(method, problem, cotangent)
            what = name_solution(method, response.solution)
            parts.append((response.solution.value, point, what, cause_of(response.solution)))
            solves.append(Solve(visit.level, method, response.solution))
            kept[key] = response.memory
            for target, tree in response.cross.items():
                what = f"the second derivative towards level {target!r}"
                parts.append((tree, point, what, ""))
                if target == plan.top:
                    indirect = add(indirect, tree, -1.0)
                else:
                    pending.add(target, methods[visit.level, target], tree, -1.0)
    parts.append((first.direct, points[plan.top], "the direct gradient", ""))
    gradient = add(first.direct, indirect)
    size = _require_finite(gradient, parts)
    if any(point.loss.is_half for point in points.values()):
        require_finite_tree(gradient, points[plan.top], "the hypergradient")
    return Hypergradient(
        gradient=match(gradient, points[plan.top].values[plan.top]),
        size=size,
        loss=first.loss,
        metrics=first.metrics,
        solves=tuple(solves),
        state=first.state,
        memories=kept,
    )


def _refuse_blind_methods(
    plan: SweepPlan,
    points: Mapping[str, Point],
    methods: Mapping[tuple[str, str], Method],
) -> None:
    """Refuses linear solves where the top level enters no loss, but only steps.

    Raises:
        MethodError: every path to the top level ends in such a solve.
    """
    feeding = {visit.level for visit in plan.visits if visit.feeds_top}
    edges = [(upper, low) for upper, low in plan.edges if low in feeding]
    blind = [
        (upper, low)
        for upper, low in edges
        if plan.top not in points[low].loss.sees and not hasattr(methods[upper, low], "recording")
    ]
    if not blind or len(blind) < len(edges):
        return
    upper, low = blind[0]
    raise MethodError(
        f"{plan.top!r} acts on this level through its steps alone (init_from=, tune= or an "
        f"@update rule), and {type(methods[upper, low]).__name__}, by which {upper!r} "
        "differentiates it, sees its loss alone: the derivative would be zero.",
        expected="a method that differentiates the steps.",
        remedy=f"set hypergrad='unroll' at {upper!r}; for init_from={plan.top!r} a loss that "
        f"reads {plan.top!r} does too, as in iMAML: add lam / 2 * |w - init|**2 to it.",
        level=low,
        site=points[low].loss.site,
    )


@dataclass(frozen=True)
class _DirectPass:
    loss: float
    metrics: dict[str, Any]
    direct: Tree
    cotangents: Mapping[str, Tree]
    state: State


def _direct_pass(plan: SweepPlan, point: Point) -> _DirectPass:
    """One backward of the top level's loss: its direct gradient and all first cotangents."""
    wanted = (plan.top, *plan.lowers)
    leaves = {level: live(point.values[level]) for level in wanted}
    inputs = {(level, key): t for level, tree in leaves.items() for key, t in tree.items()}
    state = point.state({**point.values, **leaves})
    share = 1.0 / len(point.batches)

    def differentiate() -> tuple[float, list[dict[str, Any]], dict[str, Tree]]:
        value = 0.0
        outcomes: list[dict[str, Any]] = []
        found: dict[str, Tree] = {level: {} for level in wanted}
        for loss, metrics in point.losses():
            outcomes.append(metrics)
            value += share * float(point.unscaled(loss))
            if not loss.requires_grad:
                continue
            parts: dict[str, dict[str, Tensor]] = {level: {} for level in wanted}
            for (level, key), part in point.loss.gradient(loss, inputs).items():
                parts[level][key] = part
            for level in wanted:
                found[level] = add(found[level], widen(parts[level]), share / point.scale)
        return value, outcomes, found

    value, outcomes, found = point.loss.within(state, differentiate)
    value, found = _shared(point, value, found)
    require_finite(value, point.loss.level, point.loss.site)
    value, metrics = point.reported(value, outcomes)
    return _DirectPass(value, metrics, found.pop(plan.top), found, state)


def _shared(point: Point, value: float, found: dict[str, Tree]) -> tuple[float, dict[str, Tree]]:
    """The means over processes, by one collective."""
    if point.mean is None:
        return value, found
    some = next(iter(point.values[next(iter(found))].values()))
    loss = widen({"loss": some.new_tensor(value)})
    like = [widen(point.values[level]) for level in found]
    means = point.mean([loss, *found.values()], [loss, *like])
    return float(means[0]["loss"]), dict(zip(found, means[1:], strict=True))


_Part = tuple[Tree, Point, str, str]
"""What a gradient was made from: a tree, the point of its level, its name and the cause."""


class _Cotangents:
    """The cotangents on their way down, by level and by the method of the edge they came on."""

    def __init__(self) -> None:
        self._by_level: dict[str, list[tuple[Method, Tree]]] = {}

    def add(self, level: str, method: Method, tree: Tree, factor: float) -> None:
        groups = self._by_level.setdefault(level, [])
        for number, (other, cotangent) in enumerate(groups):
            if are_same(other, method):
                groups[number] = (other, add(cotangent, tree, factor))
                return
        groups.append((method, add({}, tree, factor)))

    def of(self, level: str) -> list[tuple[Method, Tree]]:
        return self._by_level.get(level, [])


def are_same(left: Method, right: Method) -> bool:
    """Whether two methods do the same; a user's own are not compared by their contents."""
    kind = type(left)
    is_known = kind is type(right) and kind.__module__.startswith("mlodeco.hypergrad.")
    return left is right or (is_known and left == right)


@contextmanager
def solving_for(point: Point) -> Iterator[None]:
    """Adds the level of ``point`` to a method's own refusal, which does not know it.

    Raises:
        MethodError: the method refused.
    """
    try:
        yield
    except MethodError as error:
        if error.level is not None:
            raise
        raise MethodError(
            error.found,
            expected=error.expected,
            remedy=error.remedy,
            level=point.loss.level,
            site=point.loss.site,
        ) from error.__cause__


def _require_finite(tree: Tree, parts: list[_Part]) -> float:
    """The norm of a tree; if it is not finite, the first of its parts that is not is refused."""
    size = norm(tree)
    if not math.isfinite(size):
        for part, point, what, cause in parts:
            require_finite_tree(part, point, what, cause)
    return size
