"""A user's own linear solver as a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlodeco.calculus.response import Solution, Status
from mlodeco.declare.calls import call
from mlodeco.declare.site import locate
from mlodeco.errors import MethodError, quoted
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.tree import Tree


@dataclass(frozen=True, kw_only=True, eq=False)  # a solver may hold tensors
class Custom(Implicit):
    """``v = solver(matvec, b)``, with trees for vectors.

    Cost: what the solver spends, and one cross product.

    Attributes:
        name: for messages.
        solver: ``solve(matvec, b) -> x``; x is a tree shaped like b, or a ``Solution``.
    """

    name: str
    solver: Callable[[MatVec, Tree], Any]

    # eq=False alone would inherit a comparison of the options of Implicit
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Calls the solver and checks what it returns.

        Raises:
            MethodError: the result is not a tree shaped like b.
        """
        found = call(f"the method {self.name!r}", locate(self.solver), self.solver, matvec, b)
        if isinstance(found, Solution):
            self._check(found.value, b)
            return found
        self._check(found, b)
        return Solution(dict(found), 0, None, Status.TRUNCATED)

    def _check(self, x: object, b: Tree) -> None:
        remedy = "return a dictionary with the keys and shapes of b."
        what = f"the method {self.name!r} ({locate(self.solver)})"
        if not isinstance(x, Mapping) or not all(isinstance(v, Tensor) for v in x.values()):
            raise MethodError(
                f"{what} returned {type(x).__name__}.",
                expected="a dictionary of tensors.",
                remedy=remedy,
            )
        for key, value in b.items():
            if key not in x or x[key].shape != value.shape:
                shape = tuple(x[key].shape) if key in x else "no such key"
                raise MethodError(
                    f"{what} returned {shape} for {key!r}.",
                    expected=f"the shape {tuple(value.shape)}; keys {quoted(b)}.",
                    remedy=remedy,
                )
