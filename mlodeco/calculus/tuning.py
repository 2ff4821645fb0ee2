"""Options of an optimizer that are computed from the parameters of levels above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from torch import Tensor

from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.errors import OptimizerError
from mlodeco.tree import Tree

_PAIR: Final = "betas"
"""The option that is two numbers."""


@dataclass(frozen=True)
class Tuning:
    """``mu = f(lambda)``, for each option that ``tune=`` names.

    Attributes:
        function: gives the options by name; its modules are those of the levels that it reads.
    """

    function: StatelessLoss

    @property
    def reads(self) -> tuple[str, ...]:
        """The levels whose parameters enter."""
        return self.function.sees

    def tensors(self, values: Mapping[str, Tree]) -> dict[str, Any]:
        """The options as tensors without dimensions, with their graph.

        Raises:
            OptimizerError: one is not a number.
        """
        seen = {level: values[level] for level in self.reads}
        state = self.function.state(seen)
        try:
            found: Mapping[str, Any] = self.function.within(
                state, lambda: self.function.module.forward({})
            )
        except Exception as error:
            where = f"level {self.function.level!r} ({self.function.site})"
            error.add_note(f"raised by tune= of {where}")
            raise
        return {name: self._checked(name, value) for name, value in found.items()}

    def numbers(self, values: Mapping[str, Tree]) -> dict[str, Any]:
        """The same as Python's numbers."""
        return {name: _as_numbers(value) for name, value in self.tensors(values).items()}

    def _checked(self, name: str, value: Any) -> Any:
        if name != _PAIR:
            return self._number(name, value)
        if isinstance(value, tuple | list) and len(value) == 2:
            return tuple(self._number(name, part) for part in value)
        raise self._refusal(name, value)

    def _number(self, name: str, value: Any) -> Any:
        is_tensor = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
        if not is_tensor and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._refusal(name, value)
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        if not 0.0 <= number < inf:
            raise self._refusal(name, number)
        return value.reshape(()) if isinstance(value, Tensor) else value

    def _refusal(self, name: str, value: Any) -> OptimizerError:
        return OptimizerError(
            f"tune={{{name!r}: ...}} gave {_described(value)}.",
            expected="a tensor with one finite number of at least 0; for betas a pair of them.",
            remedy="compute one number for all parameters: lambda hyper: hyper.log_lr.exp().",
            level=self.function.level,
            site=self.function.site,
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    return repr(value)


def _as_numbers(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_numbers, value))
    return float(value.detach()) if isinstance(value, Tensor) else value
