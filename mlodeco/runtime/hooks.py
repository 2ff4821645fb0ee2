"""Hooks and validations bound to a program, and called at their events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlodeco.declare.binding import bind_offered
from mlodeco.declare.records import (
    HookDeclaration,
    ValidationDeclaration,
    describe_hook,
    describe_validation,
)
from mlodeco.declare.registry import RUN_EVENTS, Registry
from mlodeco.errors import GraphError, did_you_mean, quoted
from mlodeco.runtime.build import Build
from mlodeco.runtime.context import Context

_OF_LEVEL = ("ctx", "optimizer", "scheduler")
OFFERS: Mapping[str, tuple[str, ...]] = {
    "run_start": ("ctx",),
    "loop_start": _OF_LEVEL,
    "before_step": (*_OF_LEVEL, "batch"),
    "hypergradient": (*_OF_LEVEL, "batch", "grads", "loss", "metrics"),
    "after_backward": (*_OF_LEVEL, "batch", "grads", "loss", "metrics"),
    "after_step": (*_OF_LEVEL, "batch", "grads", "loss", "metrics"),
    "epoch_end": _OF_LEVEL,
    "loop_end": _OF_LEVEL,
    "validate": ("ctx", "metrics"),
    "checkpoint": ("ctx", "path"),
    "run_end": ("ctx", "history"),
}
"""What each event offers beside the levels' modules; with ``batch`` the level's sources too."""


@dataclass
class _Hook:
    declaration: HookDeclaration
    arguments: tuple[str, ...]
    counts: dict[str | None, int] = field(default_factory=dict)


class Hooks:
    """The hooks of a program by event.

    Raises:
        BindingError: a hook asks for something that its event does not offer.
        GraphError: a hook names an unknown level.
    """

    def __init__(self, registry: Registry, built: Build) -> None:
        self._modules = {name: level.module for name, level in built.levels.items()}
        self._by_event: dict[str, list[_Hook]] = {}
        for declaration in registry.hooks:
            if declaration.level is not None and declaration.level not in built.levels:
                raise GraphError(
                    f"{describe_hook(declaration)} names the level {declaration.level!r}, "
                    "which is not known.",
                    expected=f"one of {quoted(built.levels)}.",
                    remedy=f"correct it.{did_you_mean(declaration.level, built.levels)}",
                    site=str(declaration.site),
                )
            arguments = bind_offered(
                declaration.function,
                (*self._modules, *_sources(declaration, built), *OFFERS[declaration.event]),
                what=describe_hook(declaration),
                site=declaration.site,
                remedies=dict.fromkeys(built.sources, _OF_SOURCES),
            )
            hook = _Hook(declaration, arguments)
            self._by_event.setdefault(declaration.event, []).append(hook)

    def wants(self, event: str) -> bool:
        """Whether anybody listens."""
        return event in self._by_event

    @property
    def functions(self) -> list[Any]:
        """Those of all hooks."""
        return [hook.declaration.function for hooks in self._by_event.values() for hook in hooks]

    @property
    def listens_to_gradients(self) -> bool:
        """Whether some hook takes ``grads``."""
        return any("grads" in hook.arguments for hooks in self._by_event.values() for hook in hooks)

    def come_between(self, level: str) -> bool:
        """Whether some hook of a level, or of all, is called between its steps."""
        elsewhere = ("run_start", "hypergradient", "after_backward", "run_end")
        return any(
            hook.declaration.level in (None, level)
            for event, hooks in self._by_event.items()
            for hook in hooks
            if event not in elsewhere
        )

    def fire(self, event: str, level: str | None = None, **offered: Any) -> None:
        """Calls the hooks of an event, in the order of their declaration.

        Args:
            event: the event.
            level: the level that it is one of; None for those of the run.
            **offered: the values of :data:`OFFERS`, and of sources.
        """
        for hook in self._by_event.get(event, ()):
            declaration = hook.declaration
            if event not in RUN_EVENTS and declaration.level not in (None, level):
                continue
            hook.counts[level] = hook.counts.get(level, 0) + 1
            if hook.counts[level] % declaration.every:
                continue
            values = {**self._modules, **offered}
            try:
                declaration.function(**{name: values[name] for name in hook.arguments})
            except Exception as error:
                where = _moment(event, level, offered["ctx"])
                error.add_note(
                    f"raised in {describe_hook(declaration)} ({declaration.site}), {where}"
                )
                raise

    @contextmanager
    def counted_once(self) -> Iterator[None]:
        """Lets what is broken off inside, and comes again, count once."""
        counts = self.state_dict()
        try:
            yield
        except BaseException:
            self.load_state_dict(counts)
            raise

    def state_dict(self) -> dict[str, Any]:
        """How often each was due to be called, by event."""
        events = self._by_event.items()
        return {event: [dict(hook.counts) for hook in hooks] for event, hooks in events}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting; hooks that have been added or taken away count anew."""
        for event, hooks in self._by_event.items():
            known = state.get(event, [])
            if len(known) == len(hooks):
                for hook, counts in zip(hooks, known, strict=True):
                    hook.counts = dict(counts)


_OF_SOURCES = (
    "name one level that reads the source, @on(..., level='name'), and an event that has a batch."
)


def _sources(declaration: HookDeclaration, built: Build) -> tuple[str, ...]:
    """The sources whose items of the step a hook may take."""
    if declaration.level is None or "batch" not in OFFERS[declaration.event]:
        return ()
    return built.levels[declaration.level].binding.sources


def _moment(event: str, level: str | None, ctx: Context) -> str:
    """The level's own step, from 1, and the tick."""
    if level is None:
        return f"tick {ctx.tick}"
    is_over = event in ("after_step", "epoch_end", "loop_end")
    return f"level {level!r}, step {ctx.step if is_over else ctx.step + 1}, tick {ctx.tick}"


def bind_validation(declaration: ValidationDeclaration, levels: Iterable[str]) -> tuple[str, ...]:
    """The arguments that a validation function takes.

    Raises:
        BindingError: it asks for something that is not offered.
    """
    offered = (*levels, "ctx", *(("batch",) if declaration.data is not None else ()))
    return bind_offered(
        declaration.function,
        offered,
        what=describe_validation(declaration),
        site=declaration.site,
        remedies={"batch": "give data= to @validate, or remove the argument."},
    )
