"""The registry behind a program: decorators as methods, one current registry."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Never, Self, TypeVar, get_args, overload

from mlodeco.declare.checks import Checker, find_cycle
from mlodeco.declare.inner_loop import (
    read_init_from,
    read_replicas,
    read_tune,
    refuse_contradictions,
)
from mlodeco.declare.records import (
    PRECISIONS,
    UNSET,
    Function,
    HookDeclaration,
    LevelDeclaration,
    MethodDeclaration,
    Refresh,
    SourceDeclaration,
    Unset,
    UpdateDeclaration,
    ValidationDeclaration,
    describe_hook,
    describe_validation,
)
from mlodeco.declare.replicas import Replicas
from mlodeco.declare.site import Site, is_one_callable, locate, locate_call, underlying
from mlodeco.declare.sources import declare_source
from mlodeco.declare.updates import declare_update
from mlodeco.errors import (
    GraphError,
    ModuleWarning,
    RedeclarationWarning,
    RunError,
    counted,
    quoted,
)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

Event = Literal[
    "run_start",
    "loop_start",
    "before_step",
    "hypergradient",
    "after_backward",
    "after_step",
    "epoch_end",
    "loop_end",
    "validate",
    "checkpoint",
    "run_end",
]
"""The events of ``on``, in the order in which a tick fires them."""

EVENTS: Final = get_args(Event)
"""The same at run time."""

RUN_EVENTS: Final = ("run_start", "validate", "checkpoint", "run_end")
"""The events that belong to the run and not to a level."""

LEVEL_OPTIONS: Final = (
    "lower",
    "reads",
    "hypergrad",
    "module",
    "params",
    "optimizer",
    "scheduler",
    "data",
    "fields",
    "inner_steps",
    "repeat",
    "warmup",
    "accumulate",
    "clip_norm",
    "precision",
    "rollback",
    "init_from",
    "replicas",
    "tune",
)

_NO_NAMES: Final = ("<lambda>", "_")
"""What functions are called that nobody has named."""

_LEVEL: Final = "@level('name', module=..., ...)"

_current: ContextVar[Registry | None] = ContextVar("mlodeco_program", default=None)


class Registry:
    """What a program declares: levels, sources, hooks, validations, methods and update rules.

    A declaration is checked whole before it is recorded, so one that fails
    leaves no trace. ``version`` grows with each that succeeds.
    """

    default: ClassVar[Registry | None] = None
    """The one that is current where none was entered by ``with``."""

    def __init__(self) -> None:
        self.levels: dict[str, LevelDeclaration] = {}
        self.sources: dict[str, SourceDeclaration] = {}
        self.hooks: list[HookDeclaration] = []
        self.validations: list[ValidationDeclaration] = []
        self.methods: dict[str, MethodDeclaration] = {}
        self.updates: dict[str, UpdateDeclaration] = {}
        self.tracked: dict[str, Any] = {}
        self.version = 0
        self.built: Any = None
        self._tokens: list[Token[Registry | None]] = []

    def level(
        self,
        name: str = "",
        *,
        lower: Iterable[str] = (),
        reads: Iterable[str] | Mapping[str, str] = (),
        hypergrad: Any | Unset = UNSET,
        module: Any = None,
        params: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        data: Any = None,
        fields: Iterable[str] = (),
        inner_steps: int = 1,
        repeat: int = 1,
        warmup: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        precision: Literal["fp32", "bf16", "fp16"] | None = None,
        rollback: bool = False,
        init_from: str | None = None,
        replicas: int | Replicas | None = None,
        tune: Mapping[str, Function] | None = None,
        **unknown: Never,
    ) -> Callable[[F], F]:
        """Declares the decorated function as the loss of a level and returns it unchanged.

        Args:
            name: the level's name; functions that take an argument of that name read it.
            lower: the levels whose solution this level's loss depends on.
            reads: levels that the function uses without naming them, or a mapping
                from its arguments to levels where the names differ.
            hypergrad: how this level differentiates through its lower levels: a
                name, a method object, a mapping from lower levels to these, or None
                for the direct gradient alone. Default ``"neumann"``.
            module: an ``nn.Module``, a factory of one, a mapping of names to tensors,
                or the name of another level whose module is shared.
            params: which parameters of the module this level optimizes: a predicate
                on their names, or an iterable of parameters or names. Default: all that
                require grad.
            optimizer: from parameters to a ``torch.optim.Optimizer``, a function of an
                argument ``module``, or an instance.
            scheduler: from the optimizer to a learning-rate scheduler, which steps once
                per own optimizer step.
            data: a re-iterable of batches, a factory of one, or a mapping of names to these.
            fields: names for the parts of a batch.
            inner_steps: own optimizer steps per turn of the levels above.
            repeat: own optimizer steps at each of its turns.
            warmup: own optimizer steps before the levels above start.
            accumulate: micro-batches per optimizer step.
            clip_norm: the largest norm of the gradient.
            precision: of every pass of this level's function, in place of the run's
                ``mixed_precision``: ``"bf16"`` and ``"fp16"`` by autocast, ``"fp32"`` without.
            rollback: after the levels above have stepped, go back to the start of the
                inner loop and repeat its last step with the updated upper levels.
            init_from: a level above whose parameters and buffers are copied in, and the
                optimizer's state reset, at the start of every inner loop (MAML).
            replicas: how many independent copies of the level are solved together, each on
                its slice of every tensor of the items; levels above see the mean over them.
                An integer, or :class:`Replicas` to say how.
            tune: for options of the optimizer, functions of levels above that compute them,
                ``tune={"lr": lambda hyper: hyper.log_lr.exp()}``; they take the levels'
                modules by name.
            **unknown: refused, with the option that was probably meant.

        Raises:
            DeclarationError: an option is unknown or cannot be right, or the name is taken.
            GraphError: the levels known so far depend on each other in a circle.
        """

        def decorate(function: F) -> F:
            site = locate(function)
            check = Checker("@level", name if isinstance(name, str) and name else None, site)
            if name == "":
                raise check.error("@level was used without a name.", remedy=f"write {_LEVEL}.")
            check.level_name(name)
            check.unknown(unknown, LEVEL_OPTIONS)
            check.function(function)
            for option, value in (("reads", reads), ("data", data), ("hypergrad", hypergrad)):
                check.keys(option, value)
            mapped = reads if isinstance(reads, Mapping) else {}
            check.names("reads", mapped.values() if mapped else ())
            declaration = LevelDeclaration(
                name=name,
                function=function,
                site=site,
                lower=_lower(check, name, lower),
                argument_reads=dict(mapped),
                extra_reads=() if isinstance(reads, Mapping) else check.names("reads", reads),
                hypergrad="neumann" if hypergrad is UNSET else hypergrad,
                module=_module(check, name, module),
                params=_params(check, params),
                optimizer=optimizer,
                scheduler=scheduler,
                data=data,
                fields=check.names("fields", fields),
                inner_steps=check.count("inner_steps", inner_steps, least=1),
                repeat=check.count("repeat", repeat, least=1),
                warmup=check.count("warmup", warmup, least=0),
                accumulate=check.count("accumulate", accumulate, least=1),
                clip_norm=check.norm_bound("clip_norm", clip_norm),
                precision=None
                if precision is None
                else check.choice("precision", precision, PRECISIONS),
                rollback=check.flag("rollback", rollback),
                init_from=read_init_from(check, name, init_from),
                replicas=read_replicas(check, replicas),
                tune=read_tune(check, tune),
            )
            refuse_contradictions(check, declaration)
            if hypergrad is not UNSET and not declaration.lower:
                raise check.error(
                    f"hypergrad={hypergrad!r} on a level without lower levels.",
                    remedy="add lower=[...], or remove hypergrad: it says how a level "
                    "differentiates through its lower levels.",
                )
            if optimizer is not None and not callable(optimizer) and _plain(optimizer):
                raise check.error(
                    f"optimizer={optimizer!r} is not an optimizer.",
                    remedy="give functools.partial(torch.optim.SGD, lr=0.1), a function of the "
                    "parameters, or an optimizer.",
                )
            check.callable_or_none(
                "scheduler",
                scheduler,
                "give a function of the optimizer: "
                "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10).",
            )
            self._add_level(declaration, check)
            return function

        _refuse_bare("@level", name, "name", _LEVEL)
        return decorate

    @overload
    def source(
        self, name: str | None = None, refresh: Refresh = "step", **unknown: Never
    ) -> Callable[[T], T]: ...

    @overload
    def source(self, name: T, refresh: Refresh = "step", **unknown: Never) -> T: ...

    def source(self, name: Any = None, refresh: Refresh = "step", **unknown: Never) -> Any:
        """Declares what gives items that levels read by an argument of its name.

        It decorates a generator function, or any function that returns an iterator, or is
        applied to an object, ``source("task")(tasks)``: an iterator or something that can be
        iterated over again and again. Returns what it was given, unchanged.

        The function may take levels by name and receives their modules. It runs under
        ``torch.no_grad``, and the train/eval modes of these modules are restored after each
        item. What it reads makes no edges. When its iterator ends it is called again.

        A generator cannot be continued in another process; an object with ``state_dict`` and
        ``load_state_dict`` can.

        Args:
            name: the source's name; default: the function's.
            refresh: ``"step"``: each own step of a level that reads the source takes a new
                item from the one stream, one for each of its ``accumulate`` micro-batches.
                ``"loop"``: all readers see one item until the highest of them, above which
                no other reader stands, has had its turn (with several highest: each of them);
                the next reader's step then takes a new one.
            **unknown: refused.

        Raises:
            DeclarationError: an option cannot be right, or the name is taken.
        """
        is_bare = name is not None and not isinstance(name, str)

        def decorate(value: T) -> T:
            declaration, check = declare_source(value, None if is_bare else name, refresh, unknown)
            self._add_source(declaration, check)
            return value

        return decorate(name) if is_bare else decorate

    def on(
        self, event: Event, level: str | None = None, every: int = 1, **unknown: Never
    ) -> Callable[[F], F]:
        """Declares a hook: a function called at an event.

        It takes any subset of what the event offers, by name. Every event offers ``ctx`` and
        the levels' modules under their names; those of a level also its ``optimizer`` and
        ``scheduler``. In the order of a tick:

        - ``run_start``: once, before the first tick;
        - ``loop_start``: before the first step of an inner loop;
        - ``before_step``: before each own step, with ``batch``;
        - ``hypergradient``: an upper level's hypergradient is there, with ``batch``,
          ``grads``, ``loss``, ``metrics``;
        - ``after_backward``: any level's gradients are there, before clipping, with the same;
        - ``after_step``: after the optimizer's step, with the same;
        - ``epoch_end``: the step used the last batch of a pass over the data;
        - ``loop_end``: the inner loop is finished;
        - ``validate``: after each validation, with ``metrics``;
        - ``checkpoint``: one was written, to the folder ``path``;
        - ``run_end``: once, after the last tick, with ``history``.

        ``grads`` are the ``.grad`` by parameter name and may be changed in place. Of a step that
        is skipped, since its numbers were not finite, nobody hears at ``hypergradient`` and
        ``after_backward``; at ``after_step`` it has no gradients, and ``ctx.skipped`` is True.

        Args:
            event: one of these.
            level: the level whose events are meant; None for those of every level.
            every: call it at each ``every``-th occurrence only.
            **unknown: refused.

        Raises:
            DeclarationError: the event is unknown, or an option cannot be right.
        """

        def decorate(function: F) -> F:
            site = locate(function)
            check = Checker("@on", None, site)
            check.function(function)
            check.names_taken(function, "a hook")
            check.unknown(unknown, ("event", "level", "every"))
            check.choice("event", event, EVENTS)
            if level is not None and event in RUN_EVENTS:
                raise check.error(
                    f"event {event!r} belongs to the run, not to level {level!r}.",
                    remedy="leave level out.",
                )
            if level is not None:
                check.level_name(level)
            count = check.count("every", every, least=1)
            _put(self.hooks, HookDeclaration(event, function, site, level, count))
            self.version += 1
            return function

        _refuse_bare("@on", event, "event", "@on('after_step')")
        return decorate

    @overload
    def validate(self, function: F, /) -> F: ...

    @overload
    def validate(
        self,
        *,
        every: int = 1,
        data: Any = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        patience: int | None = None,
    ) -> Callable[[F], F]: ...

    def validate(
        self,
        *functions: Any,
        every: int = 1,
        data: Any = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        patience: int | None = None,
        **unknown: Any,
    ) -> Any:
        """Declares a function that returns metrics, called in eval mode under ``no_grad``.

        Called every ``every`` ticks and after the last one. Neither the random
        numbers nor the modes of the run change by it.

        Args:
            *functions: the function, where the decorator is used without arguments.
            every: ticks between two validations.
            data: batches; the function is then called once per batch and its metrics
                are averaged by the number of samples.
            monitor: the metric that decides which validation is the best.
            mode: whether its smallest (``"min"``) or its largest value (``"max"``) is the best;
                needed with ``monitor``.
            patience: stop after this many validations in a row without a new best.
            **unknown: refused.

        Raises:
            DeclarationError: an option cannot be right.
        """

        def decorate(function: F) -> F:
            site = locate(function)
            check = Checker("@validate", None, site)
            if not callable(function):
                raise check.error(
                    f"@validate was given {function!r} by position.",
                    remedy="name its options: @validate(every=100).",
                )
            check.function(function)
            check.unknown(unknown, ("every", "data", "monitor", "mode", "patience"))
            if mode is not None:
                check.choice("mode", mode, ("min", "max"))
            if monitor is not None and not isinstance(monitor, str):
                raise check.error(
                    f"monitor={monitor!r}.",
                    expected="the name of a metric.",
                    remedy="name one of the metrics that the function returns.",
                )
            if monitor is not None and mode is None:
                raise check.error(
                    f"monitor={monitor!r} is set and mode is not.",
                    expected="whether the smallest or the largest value is the best.",
                    remedy=f"write monitor={monitor!r}, mode='min' for an error or a loss, "
                    f"mode='max' for an accuracy.",
                )
            if patience is not None:
                check.count("patience", patience, least=1)
                if monitor is None:
                    raise check.error(
                        "patience is set and monitor is not.",
                        remedy="say which metric to watch: monitor='accuracy', mode='max'.",
                    )
            declaration = ValidationDeclaration(
                function=function,
                site=site,
                every=check.count("every", every, least=1),
                data=data,
                monitor=monitor,
                mode=mode,
                patience=patience,
            )
            self._give_up_former_monitor(declaration, check)
            _put(self.validations, declaration)
            self.version += 1
            return function

        return decorate(functions[0]) if functions else decorate

    def method(self, name: str, **unknown: Never) -> Callable[[F], F]:
        """Registers a linear solver or a method object under a name usable in ``hypergrad=``.

        A solver is a function ``solve(matvec, b) -> x`` on dictionaries of tensors,
        with ``x`` near the solution of ``matvec(x) = b``. A class is instantiated
        without arguments.

        Args:
            name: the method's name.
            **unknown: refused.

        Raises:
            DeclarationError: the name is not one or is taken.
        """

        def decorate(value: F) -> F:
            site = locate(value)
            check = Checker("@method", None, site)
            check.unknown(unknown, ("name",))
            check.not_module(value)
            if not isinstance(name, str) or not name.isidentifier():
                raise check.error(
                    f"the method's name is {name!r}.",
                    expected="an identifier.",
                    remedy="name it like a variable: @method('my_solver').",
                )
            declaration = MethodDeclaration(name, value, site)
            _refuse_second(
                check,
                f"method {name!r}",
                declaration,
                self.methods.get(name),
                remedy="rename one of them.",
            )
            self.methods[name] = declaration
            self.version += 1
            return value

        _refuse_bare("@method", name, "name", "@method('name')")
        return decorate

    def update(self, level: str, **unknown: Never) -> Callable[[F], F]:
        """Declares the rule by which a level steps, in place of an optimizer.

        A function ``(params, grads, state, ...) -> (params, state)`` of tensors by parameter
        name: ``params``, their gradients ``grads`` (an upper level's: its hypergradient), and
        ``state``, which is what it returned last. It takes those that it needs, by these names,
        and at least one of the first two; other arguments name levels and are their modules.
        What it computes may be differentiated through, so that levels above can learn what it
        reads of them: a learned optimizer. Reads of lower levels are constants, as in Reptile:
        ``@update("init") def reptile(params, weights)``.

        Args:
            level: the level that steps by it.
            **unknown: refused.

        Raises:
            DeclarationError: it cannot be a rule, or the level has one.
        """

        def decorate(function: F) -> F:
            declaration, check = declare_update(level, function, unknown)
            _refuse_second(
                check,
                f"update rule of {level!r}",
                declaration,
                self.updates.get(level),
                remedy="remove one of them.",
            )
            self.updates[level] = declaration
            self.version += 1
            return function

        _refuse_bare("@update", level, "level", "@update('weights')")
        return decorate

    def track(self, name: str, value: T) -> T:
        """Registers an object whose state belongs to the program's checkpoints; returns it.

        Its ``state_dict()`` is saved with each, and given to its ``load_state_dict()`` when a run
        goes on. It may hold numbers, strings, bytes, tensors, NumPy arrays, and lists, tuples,
        sets and dictionaries of these. Each process saves its own.

        Args:
            name: of the object, in the checkpoints.
            value: the object.

        Raises:
            DeclarationError: it has no such methods, or the name is taken.
        """
        site = locate_call(str(name))
        check = Checker("track", None, site)
        if not isinstance(name, str) or not name:
            raise check.error(
                f"the name of a tracked object is {name!r}.",
                expected="a non-empty string.",
                remedy="write track('curriculum', curriculum).",
            )
        methods = ("state_dict", "load_state_dict")
        if isinstance(value, type) or not all(callable(getattr(value, m, None)) for m in methods):
            raise check.error(
                f"the object {name!r} to track is a {type(value).__name__}.",
                expected="an object with state_dict() and load_state_dict(state).",
                remedy="give its class these two methods.",
            )
        if self.tracked.get(name, value) is not value and not site.interactive:
            raise check.error(
                f"the program tracks another object under the name {name!r}.",
                remedy="rename one of them.",
            )
        self.tracked[name] = value
        return value

    def __repr__(self) -> str:
        parts = [
            (self.sources, "source"),
            (self.hooks, "hook"),
            (self.validations, "validation"),
            (self.methods, "method"),
            (self.updates, "update rule"),
        ]
        others = ", ".join(counted(len(part), what) for part, what in parts if part)
        levels = f"levels {quoted(self.levels)}"
        return f"<{type(self).__name__}: {'; '.join(filter(None, (levels, others)))}>"

    def __enter__(self) -> Self:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _current.reset(self._tokens.pop())

    def _give_up_former_monitor(self, new: ValidationDeclaration, check: Checker) -> None:
        """Refuses a second monitored validation; a later input at a prompt replaces the first."""
        rivals = [
            old
            for old in self.validations
            if new.monitor and old.monitor and not _is_declared_again(old, new)
        ]
        for old in rivals:
            remedy = "leave monitor= out of one of them."
            if not _is_later(old.site, new.site):
                raise check.error(
                    f"monitor={new.monitor!r}, and the validation at {old.site} monitors "
                    f"{old.monitor!r} already.",
                    expected="one monitored metric, which decides what the best is.",
                    remedy=remedy,
                )
            _warn_of_replacement(describe_validation(old), old.site, new.site, remedy)
            self.validations.remove(old)

    def _add_source(self, declaration: SourceDeclaration, check: Checker) -> None:
        name = declaration.name
        level, taken = self.levels.get(name), self.sources.get(name)
        if level is not None:
            raise check.error(
                f"the source has the name of the level {name!r}, declared at {level.site}.",
                remedy="rename one of them: an argument of that name would be ambiguous.",
            )
        _refuse_second(
            check,
            f"source {name!r}",
            declaration,
            taken,
            remedy="rename one of them, or use a Program for each.",
        )
        self.sources[name] = declaration
        self.version += 1

    def _add_level(self, declaration: LevelDeclaration, check: Checker) -> None:
        name = declaration.name
        source = self.sources.get(name)
        if source is not None:
            raise check.error(
                f"the level has the name of the source {name!r}, declared at {source.site}.",
                remedy="rename one of them: an argument of that name would be ambiguous.",
            )
        lower = {known.name: known.lower for known in self.levels.values()}
        cycle = find_cycle({**lower, name: declaration.lower})
        if cycle is not None:
            raise GraphError(
                f"lower= closes a circle: {' -> '.join(cycle)}.",
                expected="lower levels that do not lead back to the level.",
                remedy="remove one of these from lower=; a level reads an upper one "
                "by naming it as an argument.",
                level=name,
                site=str(declaration.site),
            )
        _refuse_second(
            check,
            f"level {name!r}",
            declaration,
            self.levels.get(name),
            remedy="rename one of them, or use a Program for each.",
        )
        self.levels[name] = declaration
        self.version += 1


def current_registry() -> Registry | None:
    """The innermost program entered by ``with``, else the default one, if there is one."""
    current = _current.get()
    return Registry.default if current is None else current


def require_levels(registry: Registry) -> None:
    """Refuses a program without levels.

    Raises:
        RunError: nothing was declared in it.
    """
    if not registry.levels:
        raise RunError(
            "the program has no levels.",
            remedy="decorate a loss function with @level('name', module=..., ...); levels "
            "declared inside 'with Program() as p' belong to p: pass program=p.",
        )


def _refuse_bare(decorator: str, given: object, missing: str, example: str) -> None:
    if callable(given):
        raise Checker(decorator, None, locate(given)).error(
            f"{decorator} was used without {'an' if missing == 'event' else 'a'} {missing}.",
            remedy=f"write {example} above the function.",
        )


def _refuse_second(
    check: Checker,
    what: str,
    new: LevelDeclaration | SourceDeclaration | MethodDeclaration | UpdateDeclaration,
    old: LevelDeclaration | SourceDeclaration | MethodDeclaration | UpdateDeclaration | None,
    *,
    remedy: str,
) -> None:
    """Refuses a second declaration of one name in a module; at a prompt it replaces the first.

    Quietly if a cell was run again, edited perhaps: the same function, declared anew.
    """
    if old is None:
        return
    if not (new.site.interactive and old.site.interactive):
        raise check.error(f"the {what} is declared twice, first at {old.site}.", remedy=remedy)
    if new.site.entry == old.site.entry or not new.site.names_as(old.site):
        _warn_of_replacement(what, old.site, new.site)


def _is_later(old: Site, new: Site) -> bool:
    """Whether both are of a prompt, and not of one input."""
    return old.interactive and new.interactive and old.entry != new.entry


def _is_declared_again(
    old: HookDeclaration | ValidationDeclaration, new: HookDeclaration | ValidationDeclaration
) -> bool:
    """Whether a later input at a prompt declares the same function: its cell was run again.

    Functions have a name in common by chance if that is no name: these must be the same. Callables
    of one code object, as methods of two objects, have theirs in common in any case: these must be
    the same, or declared by the same statement.
    """
    if not _is_later(old.site, new.site) or not new.site.names_as(old.site):
        return False
    before, now = (getattr(underlying(one.function), "__code__", None) for one in (old, new))
    if before is now:
        return is_one_callable(old.function, new.function) or _reads_as(old.site, new.site)
    return new.site.name not in _NO_NAMES or before == now


def _reads_as(old: Site, new: Site) -> bool:
    return old.entry is not None and new.entry is not None and new.entry.reads_as(old.entry)


def _put(
    declarations: list[HookDeclaration] | list[ValidationDeclaration],
    new: HookDeclaration | ValidationDeclaration,
) -> None:
    """Appends a declaration; one of a cell that was run again takes the place of the former.

    It stands behind those that its cell has declared already. All former ones of the function go.
    """
    known: list[Any] = declarations
    former = [old for old in known if _is_declared_again(old, new)]
    if former and not any(_place(old) == _place(new) for old in former):
        _warn_of_replacement(describe_hook(former[0]), former[0].site, new.site)
    places = [known.index(old) for old in former[:1]]
    if new.site.interactive:
        places += [n + 1 for n, old in enumerate(known) if old.site.entry == new.site.entry]
    known.insert(max(places, default=len(known)), new)
    known[:] = [old for old in known if old not in former]


def _place(declaration: Any) -> tuple[Any, ...]:
    """What a hook listens to; the same for all validations."""
    return getattr(declaration, "event", None), getattr(declaration, "level", None)


def _warn_of_replacement(
    what: str,
    old: Site,
    new: Site,
    remedy: str = "if both are meant, give them different names.",
) -> None:
    warnings.warn_explicit(
        f"{what} ({old}) is replaced by {new.name!r} ({new}). Remedy: {remedy}",
        RedeclarationWarning,
        new.file,
        new.line,
    )


def _plain(value: object) -> bool:
    return not hasattr(value, "param_groups")


def _lower(check: Checker, name: str, lower: Iterable[str]) -> tuple[str, ...]:
    names = check.names("lower", lower)
    if name in names:
        raise check.error(
            f"lower= names the level itself, {name!r}.",
            remedy="name other levels, whose solutions this one depends on.",
        )
    return names


def _module(check: Checker, name: str, module: Any) -> Any:
    if module is None:
        raise check.error(
            "the level has no module.",
            expected="module=: an nn.Module, a factory of one, a mapping of names to tensors, "
            "or the name of a level whose module is shared.",
            remedy="give the parameters that this level optimizes, e.g. module=Net "
            "or module={'log_decay': torch.zeros(3)}.",
        )
    if module == name if isinstance(module, str) else False:
        raise check.error(
            f"module={module!r} names the level itself.",
            remedy="name another level, or give a module.",
        )
    if isinstance(module, str | Mapping) or callable(module):
        _warn_of_held_layers(check, module)
        return module
    raise check.error(
        f"module={module!r}.",
        expected="an nn.Module, a factory of one, a mapping of names to tensors, or the name "
        "of a level.",
        remedy="wrap single tensors in a mapping: module={'name': tensor}.",
    )


def _warn_of_held_layers(check: Checker, module: Any) -> None:
    """Warns of ``partial(nn.Sequential, nn.Linear(1, 32))``, which makes no layers anew."""
    if not isinstance(module, functools.partial):
        return
    held = [*module.args, *module.keywords.values()]
    if any(_has_parameters(value) for value in held):
        check.warn(
            "module= is a partial of layers that are there already: every use of it, and the "
            "module after program.reset(), has the same ones.",
            ModuleWarning,
            remedy="build them in the factory, module=lambda: nn.Sequential(nn.Linear(...)), or "
            "give the module itself.",
        )


def _has_parameters(value: Any) -> bool:
    """Whether it is a module (not a class of them) with parameters."""
    if isinstance(value, type) or not hasattr(value, "named_parameters"):
        return False
    return any(True for _ in value.parameters())


def _params(check: Checker, params: Any) -> Any:
    if params is None or callable(params):
        return params
    items = None if isinstance(params, str) else check.items("params", params)
    if items is None:
        raise check.error(
            f"params={params!r}.",
            expected="a predicate on parameter names, or an iterable of parameters or names.",
            remedy="write params=lambda name: name.startswith('head'), "
            "params=['head.weight', 'head.bias'], or params=model.head.parameters().",
        )
    return items
