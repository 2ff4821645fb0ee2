"""Several solvers side by side, whose products are taken together.

Each solver runs in a thread of its own, and only one at any time: it runs until it asks for a
product, and waits. Once every solver that has not ended has asked, one product of stacked
vectors answers all. So solvers need not know that there are others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from mlodeco.calculus.copies import row, stacked
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import Cross, Curvature, open_curvature
from mlodeco.calculus.response import Method, Response
from mlodeco.calculus.subbatch import take_part
from mlodeco.tree import Tree

R = TypeVar("R")


class _AbandonedError(BaseException):
    """Ends a solver that nobody waits for any more."""


@dataclass(frozen=True)
class _Question:
    """What a solver asks for: a product of a problem, with its vector."""

    product: str
    fraction: float
    has_targets: bool
    kind: str
    vector: Mapping[str, Tensor] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for questions that one product answers."""
        return (self.product, self.fraction, self.has_targets, self.kind)


class _Solver(threading.Thread, Generic[R]):
    """A function that runs until it asks, and goes on once it is answered."""

    def __init__(self, function: Callable[[Callable[[_Question], Any]], R]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Any = None
        self._is_abandoned = False
        self.question: _Question | None = None
        self.error: BaseException | None = None
        self.result: R | None = None

    def run(self) -> None:
        self._mine.acquire()
        try:
            if not self._is_abandoned:
                self.result = self._function(self._ask)
        except _AbandonedError:
            pass
        except BaseException as error:  # raised again where the solver was started
            self.error = error
        self.question = None
        self._theirs.release()

    def proceed(self, answer: Any = None) -> None:
        """Lets it run to its next question, or to its end."""
        self._answer = answer
        self._mine.release()
        self._theirs.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Ends it where it waits."""
        self._is_abandoned = True
        self._mine.release()
        self.join()

    def _ask(self, question: _Question) -> Any:
        self.question = question
        self._theirs.release()
        self._mine.acquire()
        if self._is_abandoned:
            raise _AbandonedError
        return self._answer


class AskedCurvature:
    """Products that are asked for."""

    def __init__(
        self, ask: Callable[[_Question], Any], fraction: float, has_targets: bool, product: str
    ) -> None:
        self._ask = ask
        self._start = (product, fraction, has_targets)

    def touched(self) -> tuple[str, ...]:
        """The own parameters that the loss depends on."""
        found: tuple[str, ...] = self._ask(_Question(*self._start, "touched"))
        return found

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """``(dg/dw)^T v``."""
        found: Tree = self._ask(_Question(*self._start, "hvp", v))
        return found

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """``(dg/dlambda)^T v``, for all replicas together: the first is given the sum."""
        found: Cross = self._ask(_Question(*self._start, "cross", v))
        return found


class _Answers:
    """Products of the stacked problem."""

    def __init__(self, problem: LowerProblem) -> None:
        self._problem = problem
        self._opened: dict[tuple[Any, ...], Curvature] = {}

    def of(self, questions: dict[int, _Question]) -> dict[int, Any]:
        """Answers to some of the questions, those of one key by one product.

        Solvers that are at their cross products, which free the graph, wait for the others.
        """
        found: dict[int, Any] = {}
        early = {r: q for r, q in questions.items() if q.kind != "cross"} or questions
        for key in dict.fromkeys(question.key for question in early.values()):
            found |= self._together({r: q for r, q in early.items() if q.key == key})
        return found

    def _together(self, questions: dict[int, _Question]) -> dict[int, Any]:
        first = next(iter(questions.values()))
        curvature = self._curvature(first)
        if first.kind == "touched":
            return dict.fromkeys(questions, curvature.touched())
        count = len(next(iter(self._problem.parameters.values())))
        vectors = [dict(questions[r].vector or {}) if r in questions else {} for r in range(count)]
        v = stacked(vectors, self._problem.parameters)
        if first.kind == "cross":
            # linear, and summed over replicas in any case
            cross = curvature.cross(v)
            return {r: cross if r == min(questions) else {} for r in questions}
        product = curvature.hvp(v)
        return {r: row(product, r) for r in questions}

    def _curvature(self, question: _Question) -> Curvature:
        key = (question.product, question.fraction, question.has_targets)
        if key not in self._opened:
            problem = self._problem
            if question.fraction < 1.0:
                problem = replace(problem, point=take_part(problem.point, question.fraction))
            if not question.has_targets:
                problem = replace(problem, targets=())
            self._opened[key] = open_curvature(problem, question.product)
        return self._opened[key]


def respond_in_lockstep(
    method: Method, whole: LowerProblem, problems: list[LowerProblem], cotangents: list[Tree]
) -> list[Response]:
    """The responses of all replicas, with products of the whole in place of each one's own."""

    def solver(problem: LowerProblem, cotangent: Tree) -> _Solver[Response]:
        def solve(ask: Callable[[_Question], Any]) -> Response:
            def opened(asked: LowerProblem, product: str) -> Curvature:
                if product == "difference":  # its step has the length of one replica's vector
                    return open_curvature(replace(asked, opened=None), product)
                return AskedCurvature(ask, asked.point.fraction, bool(asked.targets), product)

            return method.respond(replace(problem, opened=opened), cotangent)

        return _Solver(solve)

    solvers = [solver(*pair) for pair in zip(problems, cotangents, strict=True)]
    answers = _Answers(whole)
    for one in solvers:
        one.start()
    try:
        for one in solvers:
            one.proceed()
        while True:
            asking = {r: q for r, one in enumerate(solvers) if (q := one.question) is not None}
            if not asking:
                return [one.result for one in solvers if one.result is not None]
            for r, answer in answers.of(asking).items():
                solvers[r].proceed(answer)
    finally:
        for one in solvers:
            if one.is_alive():
                one.abandon()
