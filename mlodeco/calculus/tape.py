"""The steps of an inner loop, kept so that they can be differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mlodeco.calculus.point import LowerProblem, Point
from mlodeco.calculus.products import Cross, Reverse, first_gradient
from mlodeco.calculus.update import Iterate, Update
from mlodeco.tree import Tree, add

Origins = Mapping[str, tuple[str, str]]
"""For a parameter's name the level that owns the one it was copied from, and its name there."""


@dataclass(frozen=True)
class Recording:
    """What a method needs of a tape.

    Attributes:
        steps: the last steps that it needs; None for the whole loop.
        every: of how many steps one keeps its iterate; None: the first alone.
        keep_graph: whether the graph of each step's gradient is kept.
    """

    steps: int | None = None
    every: int | None = 1
    keep_graph: bool = False

    def join(self, other: Recording) -> Recording:
        """What both need."""
        counts = (self.steps, other.steps)
        gaps = [gap for gap in (self.every, other.every) if gap is not None]
        return Recording(
            None if None in counts else max(count or 0 for count in counts),
            min(gaps, default=None),
            self.keep_graph or other.keep_graph,
        )


@dataclass(frozen=True)
class TapeStep:
    """One step ``(w', s') = U(w, g(w), s)``.

    Attributes:
        point: the level's loss, with the values of all other levels.
        update: how the parameters followed from the gradient.
        before: the iterate that it started from; None where it follows from the step before.
        gradient: the one that was used, where it is not that of the loss alone.
        graph: the graph of the gradient, where it was kept.
    """

    point: Point
    update: Update
    before: Iterate | None
    gradient: Tree | None = None
    graph: Reverse | None = None

    def problem(self, level: str, parameters: Tree, targets: tuple[str, ...] = ()) -> LowerProblem:
        """The second derivatives of its loss at the parameters that it started from."""
        values = {**self.point.values, level: parameters}
        seen = tuple(target for target in targets if target in self.point.loss.sees)
        return LowerProblem(replace(self.point, values=values), level, seen)

    def follow(self, level: str, before: Iterate) -> Iterate:
        """The iterate behind it, as it was when the step was taken."""
        gradient = self.gradient
        if gradient is None:
            gradient = first_gradient(self.problem(level, before.parameters))
        return self.update.advance(before, gradient, self.point.values)


@dataclass(frozen=True)
class Tape:
    """The steps of a loop in their order.

    Attributes:
        level: the level that took them.
        steps: the steps; the first has its iterate.
        initial: where parameters that were copied in before the first come from; those that no
            level above owns are left out.
        end: the iterate behind the last, where it is not the level's present one.
    """

    level: str
    steps: tuple[TapeStep, ...]
    initial: Origins = field(default_factory=dict)
    end: Iterate | None = None

    @property
    def is_stacked(self) -> bool:
        """Whether its iterates are those of several replicas."""
        copies = self.steps[0].point.copies if self.steps else None
        return copies is not None and self.level in copies.levels

    def starts(self, levels: Iterable[str]) -> tuple[str, ...]:
        """Those of the levels whose parameters were copied in before the first step."""
        owners = {level for level, _ in self.initial.values()}
        return tuple(level for level in levels if level in owners)

    def into_initial(self, tree: Tree) -> Cross:
        """A cotangent of the first iterate as one of the levels from which each copy starts."""
        found: Cross = {}
        for key in (key for key in tree if key in self.initial):
            level, name = self.initial[key]
            part = tree[key].sum(0) if self.is_stacked else tree[key]
            found[level] = add(found.get(level, {}), {name: part})
        return found

    def from_initial(self, level: str, tree: Tree) -> Tree:
        """A tangent of a level as one of the first iterate."""
        copies = self.steps[0].point.copies if self.is_stacked else None
        found = {
            key: tree[name]
            for key, (owner, name) in self.initial.items()
            if owner == level and name in tree
        }
        if copies is None:
            return found
        return {key: t.expand(copies.count, *t.shape).clone() for key, t in found.items()}

    def first(self, count: int | None = None) -> TapeStep:
        """The first of the last ``count`` steps."""
        return self.steps[0 if count is None else max(0, len(self.steps) - count)]

    def forward(self, count: int | None = None) -> Iterator[tuple[TapeStep, Iterate]]:
        """The last ``count`` steps in their order, with the iterates that they started from.

        Those that were not kept are computed again on the way.
        """
        skipped = 0 if count is None else max(0, len(self.steps) - count)
        before: Iterate | None = None
        for number, step in enumerate(self.steps):
            if step.before is None and before is not None:
                before = self.steps[number - 1].follow(self.level, before)
            else:
                before = step.before
            if before is not None and number >= skipped:
                yield step, before

    def backward(self, count: int | None = None) -> Iterator[tuple[TapeStep, Iterate]]:
        """The same from behind; at any time it holds the iterates between two that were kept."""
        skipped = 0 if count is None else max(0, len(self.steps) - count)
        end = len(self.steps)
        while end > skipped:
            begin = end - 1
            while self.steps[begin].before is None:
                begin -= 1
            part = Tape(self.level, self.steps[begin:end])
            yield from reversed(list(part.forward(end - max(begin, skipped))))
            end = begin
