"""The records that declarations leave in a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

from mlodeco.declare.replicas import Replicas
from mlodeco.declare.site import Site

Function = Callable[..., Any]

RESERVED: Final = ("batch", "ctx")
"""Argument names that are never levels or sources."""

RULE_ARGUMENTS: Final = ("params", "grads", "state")
"""What an update rule takes by these names; its other arguments are levels."""

PRECISIONS: Final = ("fp32", "bf16", "fp16")
"""What a level's passes may be in, in place of the run's precision."""

Refresh = Literal["step", "loop"]
"""When a source gives its next item: at each reader's step, or once the highest had its turn."""


class Unset(Enum):
    """Marks an option that was not given, where ``None`` has a meaning of its own."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, eq=False)
class LevelDeclaration:
    """One optimization problem, as declared. Options are those of ``Program.level``."""

    name: str
    function: Function
    site: Site
    lower: tuple[str, ...]
    argument_reads: Mapping[str, str]
    extra_reads: tuple[str, ...]
    hypergrad: Any
    module: Any
    params: Any
    optimizer: Any
    scheduler: Any
    data: Any
    fields: tuple[str, ...]
    inner_steps: int
    repeat: int
    warmup: int
    accumulate: int
    clip_norm: float | None
    rollback: bool
    init_from: str | None = None
    replicas: Replicas | None = None
    tune: Mapping[str, Function] = field(default_factory=dict)
    precision: str | None = None

    @property
    def data_keys(self) -> tuple[str, ...]:
        """The names under which the items of several loaders are read."""
        return tuple(self.data) if isinstance(self.data, Mapping) else ()


@dataclass(frozen=True, eq=False)
class SourceDeclaration:
    """Items that levels read by name, from a function of levels or from an object."""

    name: str
    value: Any
    site: Site
    refresh: Refresh

    @property
    def is_function(self) -> bool:
        """Whether a pass is begun by calling it; otherwise it is an object to iterate over."""
        kind = type(self.value)
        return callable(self.value) and not hasattr(kind, "__iter__") and not self.is_one_shot

    @property
    def is_one_shot(self) -> bool:
        """Whether it is an iterator, whose items come once."""
        return hasattr(type(self.value), "__next__")


@dataclass(frozen=True, eq=False)
class HookDeclaration:
    """A function to call at an event."""

    event: str
    function: Function
    site: Site
    level: str | None
    every: int


@dataclass(frozen=True, eq=False)
class ValidationDeclaration:
    """A function that returns metrics, and what to do with them."""

    function: Function
    site: Site
    every: int
    data: Any
    monitor: str | None
    mode: str | None
    patience: int | None


def describe_hook(declaration: HookDeclaration) -> str:
    """A hook in words, for messages that name its place as well."""
    return f"the hook {declaration.site.name!r} on {declaration.event!r}"


def describe_validation(declaration: ValidationDeclaration) -> str:
    """A validation in words, for messages that name its place as well."""
    return f"the validation {declaration.site.name!r}"


@dataclass(frozen=True, eq=False)
class MethodDeclaration:
    """A linear solver or method object under a name of the user's."""

    name: str
    value: Any
    site: Site


@dataclass(frozen=True, eq=False)
class UpdateDeclaration:
    """The rule by which a level steps, in place of an optimizer."""

    level: str
    function: Function
    site: Site
