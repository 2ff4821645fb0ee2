"""How far a level's hypergradient is from the converged one, edge by edge."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlodeco.calculus.response import Method, Status
from mlodeco.calculus.sweep import Hypergradient, Solve, are_same
from mlodeco.declare.records import Unset
from mlodeco.declare.registry import Registry
from mlodeco.errors import RunError
from mlodeco.graph import SweepPlan
from mlodeco.hypergrad import Converged, Implicit, Neumann, spell, turned
from mlodeco.runtime.build import Build, Methods
from mlodeco.runtime.engine import (
    Batches,
    Loop,
    compute_hypergradient,
    levels_involved,
    muted_context,
)
from mlodeco.runtime.functional import (
    check_nested,
    find_batches,
    prepare,
    present_entropy,
    rolled_levels,
)
from mlodeco.tree import Tree, add, dot, epsilon, norm

_RIGHT = 0.99
"""The cosine from which on a direction counts as right."""

_NEAR = 0.1
"""The relative error up to which a hypergradient counts as right."""

_SOLVED = 0.9
"""The cosine from which on a method counts as solving its system."""

_LADDER = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Dampings that are tried, the easiest first."""

_ROUNDING_SINGLE, _ROUNDING_DOUBLE = 1e-4, 1e-8
"""The residuals below which a reference is solved, in single and in double precision."""

_WORTH = 0.8
"""A turn must leave less than this share of ``1 - cosine`` or of the error."""


@dataclass(frozen=True)
class Agreement:
    """How a vector x agrees with its reference r.

    Attributes:
        error: ``|x - r| / |r|``; None where r is zero and x is not.
        cosine: of the angle between them; None where one of them is zero.
        length: ``|x| / |r|``; None where r is zero.
    """

    error: float | None
    cosine: float | None
    length: float | None

    @staticmethod
    def between(found: Tree, reference: Tree) -> Agreement:
        """Compares two trees."""
        size, wanted = norm(found), norm(reference)
        if wanted == 0.0:
            return Agreement(0.0 if size == 0.0 else None, None, None)
        error = norm(add(found, reference, -1.0)) / wanted
        cosine = dot(found, reference) / size / wanted if size > 0.0 else None
        return Agreement(error, cosine, size / wanted)

    @property
    def are_zero(self) -> bool:
        """Whether both are zero."""
        return self.error == 0.0 and self.length is None

    @property
    def is_right(self) -> bool:
        """Whether the direction is."""
        return self.error == 0.0 or (self.cosine is not None and self.cosine >= _RIGHT)


@dataclass(frozen=True)
class EdgeCheck:
    """One lower-to-upper edge with its own method, all others with the reference.

    Attributes:
        upper: the level that differentiates.
        lower: the level through which it does.
        method: its method, with the options that are not the default.
        solve: its linear solve; None if the edge is closed.
        agreement: of the indirect hypergradient.
    """

    upper: str
    lower: str
    method: str
    solve: Solve | None
    agreement: Agreement

    @property
    def name(self) -> str:
        """``upper -> lower``."""
        return f"{self.upper} -> {self.lower}"


@dataclass(frozen=True)
class Findings:
    """What a check found.

    Attributes:
        level: the level whose hypergradient was checked.
        edges: each edge on a path, by itself.
        indirect: the indirect hypergradient with all methods as they are.
        overall: the whole hypergradient, the direct gradient included.
        nested: Eq. (2) with converged solves against the true derivative through nested best
            responses; None if it was not asked for.
        references: the solves of the reference.
        advice: which knob to turn.
    """

    level: str
    edges: tuple[EdgeCheck, ...]
    indirect: Agreement
    overall: Agreement
    nested: Agreement | None
    references: tuple[Solve, ...]
    advice: str


def compare(
    level: str,
    *,
    batches: Mapping[str, Any] | None,
    program: Registry,
    hypergrad: Any | Unset,
    damping: float | None,
    nested: bool,
) -> Findings:
    """Compares the methods of a level's sweep with converged ones; changes nothing."""
    check_damping(damping)
    check_nested(nested)
    built, methods, given = prepare(level, batches, program, hypergrad)
    reference = {
        edge: Converged(damping=_damping_of(method) if damping is None else damping)
        for edge, method in methods.items()
    }
    with _checking(built, level, given, methods, reference, nested=nested) as checker:
        return checker.findings(nested=nested)


class Yardstick:
    """One reference, with which the whole hypergradients of several methods are compared.

    Args:
        level: the level whose hypergradient is looked at.
        program: the program, whose parameters stay where they are meanwhile.
        uppers: the levels on whose edges the methods are; the others keep theirs.
        dampings: of the reference, on every edge.
        nested: the hypergradients are the true derivatives through nested best responses.
    """

    def __init__(
        self,
        level: str,
        *,
        program: Registry,
        uppers: Collection[str],
        dampings: Mapping[tuple[str, str], float],
        nested: bool = False,
    ) -> None:
        self._level = level
        self._program = program
        self._uppers = uppers
        self._dampings = dampings
        self._nested = nested
        self._references: dict[tuple[str, ...], Hypergradient] = {}

    def measure(self, hypergrad: Any) -> tuple[Agreement, list[str]]:
        """How a method agrees with the reference, and what makes that doubtful.

        Of unrolled methods both are taken at the end of an inner loop from the present
        parameters. Nothing is changed.

        Raises:
            MlodecoError: as for :func:`compare`.
        """
        built, given, _ = prepare(self._level, None, self._program, hypergrad)
        methods = {
            edge: method if edge[0] in self._uppers else built.methods[edge]
            for edge, method in given.items()
        }
        reference = {edge: Converged(damping=self._dampings[edge]) for edge in methods}
        place = tuple(rolled_levels(built, methods, self._level))
        nested = self._nested
        with _checking(built, self._level, {}, methods, reference, nested=nested) as checker:
            if place not in self._references:
                self._references[place] = checker.true if nested else checker.exact
            exact = self._references[place]
            found = checker.sweep(methods, nested=nested)
            return Agreement.between(found.gradient, exact.gradient), checker.doubts(exact)


def dampings_of(built: Build) -> dict[tuple[str, str], float]:
    """The damping that the program's own method has on each edge; zero for one without."""
    return {edge: _damping_of(method) for edge, method in built.methods.items()}


@contextmanager
def _checking(
    built: Build,
    level: str,
    given: Mapping[str, Any],
    methods: Methods,
    reference: Mapping[tuple[str, str], Method | None],
    *,
    nested: bool,
) -> Iterator[_Checker]:
    """What checks the methods, with all levels that it looks at open.

    Raises:
        RunError: the level has no path, or one on which no solve sees it.
    """
    plan = built.plan(level, dict(reference))
    if not plan.edges:
        sees_more = built.needs_nesting(level, dict(reference))
        if not (nested and sees_more):
            raise RunError(
                f"level {level!r} has no path by Eq. (2); nested=True sees more."
                if sees_more
                else f"level {level!r} has no lower level to differentiate through.",
                expected="a level with a path through lower levels: see program.graph().",
                remedy="set nested=True." if sees_more else "check a level above others.",
                level=level,
                site=built.levels[level].site,
            )
    _require_reference(built, plan)
    involved = dict.fromkeys(levels_involved(built, level, dict(reference), nested=False))
    if nested:
        involved.update(dict.fromkeys(levels_involved(built, level, dict(reference), nested=True)))
    rolled = rolled_levels(built, methods, level)
    items, loops = find_batches(built, tuple(involved), given, rolled)
    seen = dict.fromkeys(name for one in involved for name in built.levels[one].seen)
    # once for all sweeps, of which processes with other numbers make more or fewer
    with built.opened(seen, whole=True):
        yield _Checker(built, plan, items, loops, methods, reference)


def check_damping(damping: object) -> None:
    """Refuses what is not a finite number of at least zero, or None.

    Raises:
        RunError: it is not.
    """
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if damping is not None and not (number and 0 <= damping < math.inf):  # type: ignore[operator]
        raise RunError(
            f"damping={damping!r}.",
            expected="a finite number of at least zero, added to the diagonal in the reference.",
            remedy="set damping=0.01, for instance, or leave it out for that of each edge's "
            "method.",
        )


def _require_reference(built: Build, plan: SweepPlan) -> None:
    """Refuses levels on which the level acts through their steps, which no solve sees.

    Raises:
        RunError: there is one.
    """
    for visit in plan.visits:
        low = built.levels[visit.level]
        if visit.feeds_top and plan.top not in low.loss.sees:
            raise RunError(
                f"level {plan.top!r} acts on {low.name!r} through its steps alone "
                "(init_from=, tune= or an @update rule): a converged solve, which is the "
                "reference of a check, does not see it.",
                expected=f"a loss of {low.name!r} that reads {plan.top!r}.",
                remedy="hypergrad='unroll' without truncate is exact here, and needs no check.",
                level=plan.top,
                site=built.levels[plan.top].site,
            )


def _damping_of(method: Method | None) -> float:
    return method.damping if isinstance(method, Implicit) else 0.0


class _Checker:
    """Sweeps at one point, with the reference on some edges."""

    def __init__(
        self,
        built: Build,
        plan: SweepPlan,
        batches: Batches,
        loops: Mapping[str, Loop],
        methods: Methods,
        reference: Mapping[tuple[str, str], Method | None],
    ) -> None:
        self._built = built
        self._plan = plan
        self._batches = batches
        self._loops = loops
        self._methods = methods
        self._reference: Methods = dict(reference)

    @cached_property
    def exact(self) -> Hypergradient:
        """With the reference on every edge."""
        return self.sweep(self._reference)

    @cached_property
    def true(self) -> Hypergradient:
        """The same through nested best responses."""
        return self.sweep(self._reference, nested=True)

    @cached_property
    def _direct(self) -> Tree:
        return self.sweep(dict.fromkeys(self._methods)).gradient

    def findings(self, *, nested: bool) -> Findings:
        """Every edge by itself, all together, and what to turn."""
        gap = self._gap_to_nested() if nested else None
        edges = [self._check(edge, self._methods[edge]) for edge in self._plan.edges]
        actual = self.sweep(self._methods)
        indirect = self._agreement(actual)
        advice = self._advise(edges, indirect)
        return Findings(
            level=self._plan.top,
            edges=tuple(edges),
            indirect=indirect,
            overall=Agreement.between(actual.gradient, self.exact.gradient),
            nested=gap,
            references=self.exact.solves,
            advice=" ".join([advice, *_advise_on_nested(gap), *self.doubts(self.exact)]),
        )

    def sweep(self, methods: Methods, *, nested: bool = False) -> Hypergradient:
        built = self._built
        return compute_hypergradient(
            built,
            self._plan.top,
            self._batches,
            lambda name: muted_context(built, name),
            methods=methods,
            nested=nested,
            entropy=present_entropy(),
            loops=self._loops,
        )

    def _gap_to_nested(self) -> Agreement:
        return Agreement.between(self.exact.gradient, self.true.gradient)

    def _agreement(self, found: Hypergradient) -> Agreement:
        direct = self._direct
        return Agreement.between(
            add(found.gradient, direct, -1.0), add(self.exact.gradient, direct, -1.0)
        )

    def _check(self, edge: tuple[str, str], method: Method | None) -> EdgeCheck:
        found = self.sweep({**self._reference, edge: method})
        solve = next(
            (
                s
                for s in found.solves
                if s.level == edge[1] and method is not None and are_same(s.method, method)
            ),
            None,
        )
        name = "none (direct gradient only)" if method is None else spell(method)
        return EdgeCheck(*edge, name, solve, self._agreement(found))

    def _advise(self, edges: list[EdgeCheck], indirect: Agreement) -> str:
        if not edges:
            return "Eq. (2) has no path here: its hypergradient is the direct gradient."
        if indirect.are_zero:
            return (
                "Of the indirect hypergradient and its reference both are zero: no path carries "
                "anything at these parameters. Where training starts, with zeros for instance, "
                "that may be so; check again after some ticks: mlodeco check --at 10, or a run "
                "of some before check()."
            )
        worst = min(edges, key=lambda e: (e.agreement.is_right, _quality(e.agreement)))
        agreement = worst.agreement
        edge = worst.upper, worst.lower
        method = self._methods[edge]
        if agreement.is_right and (agreement.error or 0.0) <= _NEAR:
            return "Every edge agrees with its reference: no knob needs a turn."
        if agreement.is_right:
            return (
                f"{worst.name}: {worst.method} has the right direction and {agreement.length:.2g} "
                "times the right length: Adam does not mind; for SGD divide the learning rate of "
                f"{self._plan.top!r} by that{', or set scale' if hasattr(method, 'scale') else ''}."
            )
        damping = _damping_of(self._reference[edge])
        turns: tuple[Any, ...] = turned(method) if method else ()
        if isinstance(method, Implicit) and method.damping != damping:
            # another system than the reference's, whatever the solver
            turns = tuple(replace(turn, damping=damping) for turn in (method, *turns))
        tried = [self._check(edge, turn) for turn in turns]
        better = [turn for turn in tried if _is_better(turn.agreement, agreement)]
        if better:
            best = max(better, key=lambda turn: _quality(turn.agreement))
            return (
                f"{worst.name}: use {best.method} in place of {worst.method}: the cosine goes from "
                f"{_cosine(agreement.cosine)} to {_cosine(best.agreement.cosine)}, the relative "
                f"error from {_figure(agreement.error)} to {_figure(best.agreement.error)}."
            )
        if method is None:
            return f"{worst.name}: the edge is closed; set a method, such as hypergrad='neumann'."
        if hasattr(method, "recording"):
            steps = self._built.levels[worst.lower].declaration.inner_steps
            return (
                f"{worst.name}: {worst.method} differentiates the inner_steps of {worst.lower!r} "
                f"that are run, which end far from its best response: raise inner_steps of "
                f"{worst.lower!r} ({steps} now)."
            )
        names = ", ".join(turn.method for turn in tried)
        none = f"none of the methods tried comes near ({names})" if tried else "has no other knob"
        return (
            f"{worst.name}: {worst.method} is far off, and {none}: the system is nearly singular, "
            f"indefinite or large. {self._soften(edge, method)}"
        )

    def _soften(self, edge: tuple[str, str], method: Method) -> str:
        """The least damping of a ladder at which the method solves its system."""
        start = method if isinstance(method, Implicit) else Neumann()
        found = ""
        for damping in _LADDER:
            if damping <= start.damping:
                break
            damped = replace(start, damping=damping)
            easier = _Checker(
                self._built,
                self._plan,
                self._batches,
                self._loops,
                {**self._methods, edge: damped},
                {**self._reference, edge: Converged(damping=damping)},
            )
            turn = easier._check(edge, damped)
            if (turn.agreement.cosine or 0.0) < _SOLVED:
                break
            found = f"{turn.method} solves a smoother one (cosine {_cosine(turn.agreement.cosine)})"
        return f"{found}." if found else "Solve the lower level further first."

    def doubts(self, exact: Hypergradient) -> list[str]:
        """A sentence for each reference that is none, and one about warm starts."""
        warm = any(getattr(method, "warm_start", False) for method in self._methods.values())
        cold = ["Solves are cold here: a run's warm starts are better."] if warm else []
        return cold + [doubt for solve in exact.solves if (doubt := _doubt(solve))]


def _doubt(solve: Solve) -> str:
    """What to say of a reference: nothing where its residual is at rounding."""
    solution = solve.solution
    if solution.status is Status.CONVERGED or not solution.value:
        return ""
    rounding = _ROUNDING_SINGLE if epsilon(solution.value) > _ROUNDING_DOUBLE else _ROUNDING_DOUBLE
    if solution.residual is not None and solution.residual < rounding:
        if solution.status is Status.SINGULAR:
            return f"At {solve.level!r} the system is singular: solved in the least-squares sense."
        return ""
    return (
        f"The reference at {solve.level!r} is itself rough, with a residual of "
        f"{_figure(solution.residual)} after {solution.steps} products: take its figures as a "
        "sign, or have another, easier system as the reference: check(..., damping=...), "
        "or mlodeco compare --damping."
    )


def _advise_on_nested(gap: Agreement | None) -> list[str]:
    if gap is None or (gap.error is not None and gap.error <= _NEAR):
        return []
    if gap.error is None:
        return ["The true derivative is zero, and Eq. (2) is not: use nested=True."]
    cosine = "" if gap.cosine is None else f" (cosine {_cosine(gap.cosine)})"
    return [
        f"Eq. (2) itself has a relative error of {_figure(gap.error)} against the true derivative"
        f"{cosine}, however well it is solved: use nested=True."
    ]


def _quality(agreement: Agreement) -> float:
    return 1.0 if agreement.error == 0.0 else (agreement.cosine or 0.0)


def _is_better(new: Agreement, old: Agreement) -> bool:
    return 1.0 - _quality(new) < _WORTH * (1.0 - _quality(old))


def _cosine(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"
