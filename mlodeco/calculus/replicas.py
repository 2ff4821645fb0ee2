"""Points, steps and tapes of stacked replicas taken apart, and answers put together."""

from __future__ import annotations

from dataclasses import replace

from mlodeco.calculus.copies import row, stacked
from mlodeco.calculus.lockstep import respond_in_lockstep
from mlodeco.calculus.point import LowerProblem, Memory
from mlodeco.calculus.products import Cross
from mlodeco.calculus.response import Method, Response, Solution, Status
from mlodeco.calculus.split import split_iterate, split_point, split_update
from mlodeco.calculus.tape import Tape, TapeStep
from mlodeco.tree import Tree, add


def respond(method: Method, problem: LowerProblem, cotangent: Tree) -> Response:
    """The response of a level, each of its replicas solved by itself.

    Methods that act on each entry by itself take all replicas of a vmapped loss at once, and
    those that iterate solve them side by side; else one replica is solved after another.
    """
    copies = problem.point.copies
    if copies is None or problem.level not in copies.levels:
        return method.respond(problem, cotangent)
    if getattr(method, "is_entrywise", False) and (copies.is_vmapped or _keeps_graphs(problem)):
        return method.respond(problem, cotangent)
    problems = [split_problem(problem, r) for r in range(copies.count)]
    rows = [row(cotangent, r) for r in range(copies.count)]
    if copies.is_vmapped and getattr(method, "is_iterative", False):
        found = respond_in_lockstep(method, problem, problems, rows)
    else:
        pairs = zip(problems, rows, strict=True)
        found = [method.respond(one, cotangent_) for one, cotangent_ in pairs]
    return _joined(found, problem)


def _keeps_graphs(problem: LowerProblem) -> bool:
    """Whether graphs were kept, which are those of all replicas."""
    return problem.tape is not None and any(step.graph for step in problem.tape.steps)


def _joined(found: list[Response], problem: LowerProblem) -> Response:
    """The sums of cross products, and the solutions as one."""
    cross: Cross = {}
    for response in found:
        for target, tree in response.cross.items():
            cross[target] = add(cross.get(target, {}), tree)
    memory: dict[str, Tree] = {
        f"{r}/{name}": tree
        for r, response in enumerate(found)
        for name, tree in response.memory.items()
    }
    return Response(cross, _joined_solution(found, problem.parameters), memory)


def _joined_solution(found: list[Response], like: Tree) -> Solution:
    """All values, with the largest counts; the first trouble is that of all."""
    solutions = [response.solution for response in found]
    residuals = [s.residual for s in solutions if s.residual is not None]
    order = sorted(solutions, key=_severity, reverse=True)
    return Solution(
        stacked([s.value for s in solutions], like),
        max(s.steps for s in solutions),
        max(residuals, default=None),
        order[0].status,
    )


def _severity(solution: Solution) -> int:
    status = solution.status
    if status is Status.NOT_FINITE:
        return 3
    if status.is_trouble:
        return 2
    return int(status is not Status.CONVERGED)


def split_problem(problem: LowerProblem, replica: int) -> LowerProblem:
    """The problem of one replica."""
    prefix = f"{replica}/"
    memory: Memory = {
        name.removeprefix(prefix): tree
        for name, tree in problem.memory.items()
        if name.startswith(prefix)
    }
    tape = None if problem.tape is None else split_tape(problem.tape, replica)
    return replace(problem, point=split_point(problem.point, replica), memory=memory, tape=tape)


def split_tape(tape: Tape, replica: int) -> Tape:
    """The steps of one replica."""
    end = tape.end
    if end is not None:
        end = split_iterate(tape.steps[-1].update, end, replica)
    return replace(tape, steps=tuple(split_step(step, replica) for step in tape.steps), end=end)


def split_step(step: TapeStep, replica: int) -> TapeStep:
    """A step of one replica."""
    before, gradient = step.before, step.gradient
    return TapeStep(
        split_point(step.point, replica),
        split_update(step.update),
        None if before is None else split_iterate(step.update, before, replica),
        None if gradient is None else row(gradient, replica),
    )
