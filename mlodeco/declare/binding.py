"""What each argument of a user's function stands for, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from mlodeco.declare.records import (
    RESERVED,
    RULE_ARGUMENTS,
    Function,
    LevelDeclaration,
    SourceDeclaration,
    UpdateDeclaration,
)
from mlodeco.declare.site import Site
from mlodeco.errors import BindingError, closest, did_you_mean, quoted

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Role(Enum):
    """What an argument stands for."""

    OWN = "the level's own module"
    LEVEL = "another level's module"
    BATCH = "the batch"
    CONTEXT = "the step's context"
    FIELD = "a part of the batch"
    DATA = "the item of a loader"
    SOURCE = "the item of a source"


@dataclass(frozen=True)
class Argument:
    """One argument that the library fills in."""

    name: str
    role: Role
    target: str
    positional: bool


@dataclass(frozen=True)
class Binding:
    """All arguments of a level's functions that the library fills in, in their order.

    ``tune_reads`` are the levels from which each option in ``tune=`` is computed.
    """

    arguments: tuple[Argument, ...]
    reads: tuple[str, ...]
    tune_reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, *roles: Role) -> tuple[Argument, ...]:
        """The arguments with one of the roles."""
        return tuple(argument for argument in self.arguments if argument.role in roles)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources whose items the function takes."""
        return tuple(dict.fromkeys(argument.target for argument in self.of(Role.SOURCE)))


@dataclass(frozen=True)
class BoundSource:
    """A source and the levels whose modules its function takes."""

    declaration: SourceDeclaration
    levels: tuple[str, ...]


@dataclass(frozen=True)
class BoundUpdate:
    """An update rule: which of its own arguments it takes, and the levels that it reads."""

    declaration: UpdateDeclaration
    takes: tuple[str, ...]
    reads: tuple[str, ...]


def parameters_of(function: Function) -> list[inspect.Parameter]:
    """The named parameters; ``*args`` and ``**kwargs`` receive nothing."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.kind not in _VARIADIC]


def bind(
    declaration: LevelDeclaration, levels: Collection[str], sources: Collection[str] = ()
) -> Binding:
    """Binds a level function's arguments to levels, batch, context, fields, data and sources.

    Raises:
        BindingError: an argument names nothing, or two things share a name.
    """
    _refuse_shared_names(declaration, levels, sources)
    arguments: list[Argument] = []
    parameters = parameters_of(declaration.function)
    names = {parameter.name for parameter in parameters}
    _refuse_unknown_reads(declaration, names, levels, sources)
    own_is_named = declaration.name in names - set(declaration.argument_reads)
    left_out = ""
    for position, parameter in enumerate(parameters):
        found = _role(declaration, parameter.name, levels, sources)
        if found is None and position == 0 and not own_is_named:
            found = (Role.OWN, declaration.name)
        if found is None:
            _refuse_unmatched(declaration, parameter, names, (*levels, *sources))
            left_out = parameter.name
            continue
        role, target = found
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        if positional and left_out:
            raise BindingError(
                f"argument {parameter.name!r} is positional-only and comes after {left_out!r}, "
                "which keeps its default.",
                remedy=f"put {parameter.name!r} before {left_out!r}, or remove the '/'.",
                level=declaration.name,
                site=str(declaration.site),
            )
        arguments.append(Argument(parameter.name, role, target, positional))
    read = [a.target for a in arguments if a.role is Role.LEVEL]
    reads = tuple(dict.fromkeys([*read, *declaration.extra_reads]))
    return Binding(tuple(arguments), reads, bind_tune(declaration, levels))


def bind_source(declaration: SourceDeclaration, levels: Collection[str]) -> BoundSource:
    """Binds the arguments of a source's function to levels.

    Raises:
        BindingError: an argument names no level.
    """
    if not declaration.is_function:
        return BoundSource(declaration, ())
    reads = bind_offered(
        declaration.value,
        levels,
        what="the function",
        site=declaration.site,
        source=declaration.name,
    )
    return BoundSource(declaration, reads)


def bind_tune(declaration: LevelDeclaration, levels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Binds the arguments of the functions in ``tune=`` to levels other than their own.

    Raises:
        BindingError: an argument names no such level, or a function has none.
    """
    others = [name for name in levels if name != declaration.name]
    found: dict[str, tuple[str, ...]] = {}
    for option, function in declaration.tune.items():
        what = f"tune[{option!r}]"
        found[option] = bind_offered(
            function, others, what=what, site=declaration.site, level=declaration.name
        )
        if not found[option]:
            raise BindingError(
                f"{what} takes no level, so that no level can learn {option!r}.",
                expected=f"an argument among {quoted(others)}.",
                remedy="take the level that it is computed from as an argument, or give the "
                "constant to the optimizer in optimizer=.",
                level=declaration.name,
                site=str(declaration.site),
            )
    return found


def bind_update(declaration: UpdateDeclaration, levels: Collection[str]) -> BoundUpdate:
    """Binds an update rule's arguments to what it steps and to other levels.

    Raises:
        BindingError: an argument names nothing, the level itself, or two things at once.
    """
    names = [parameter.name for parameter in parameters_of(declaration.function)]
    if declaration.level in names:
        raise BindingError(
            f"the update rule takes {declaration.level!r}, the level itself.",
            expected="its parameters by name: a rule returns new ones and changes no module.",
            remedy="take params in its place.",
            level=declaration.level,
            site=str(declaration.site),
        )
    doubled = next((name for name in names if name in RULE_ARGUMENTS and name in levels), None)
    if doubled is not None:
        raise BindingError(
            f"the update rule takes {doubled!r}, which is a level too.",
            remedy="rename the level.",
            level=declaration.level,
            site=str(declaration.site),
        )
    wanted = bind_offered(
        declaration.function,
        (*RULE_ARGUMENTS, *(name for name in levels if name != declaration.level)),
        what="the update rule",
        site=declaration.site,
        level=declaration.level,
    )
    return BoundUpdate(
        declaration,
        takes=tuple(name for name in RULE_ARGUMENTS if name in wanted),
        reads=tuple(name for name in wanted if name not in RULE_ARGUMENTS),
    )


def _role(
    declaration: LevelDeclaration, name: str, levels: Collection[str], sources: Collection[str]
) -> tuple[Role, str] | None:
    if name in declaration.argument_reads:
        target = declaration.argument_reads[name]
        return (Role.SOURCE if target in sources else Role.LEVEL), target
    if name == declaration.name:
        return Role.OWN, name
    if name == "batch":
        return Role.BATCH, name
    if name == "ctx":
        return Role.CONTEXT, name
    if name in declaration.fields:
        return Role.FIELD, name
    if name in declaration.data_keys:
        return Role.DATA, name
    if name in levels:
        return Role.LEVEL, name
    if name in sources:
        return Role.SOURCE, name
    return None


def _known_names(declaration: LevelDeclaration, shared: Collection[str]) -> list[str]:
    return [*shared, *declaration.fields, *declaration.data_keys, *RESERVED]


def _refuse_unmatched(
    declaration: LevelDeclaration,
    parameter: inspect.Parameter,
    arguments: Collection[str],
    shared: Collection[str],
) -> None:
    known = _known_names(declaration, shared)
    if parameter.default is not inspect.Parameter.empty:
        free = [n for n in known if n != declaration.name and n not in arguments]
        resembles = closest(parameter.name, free, cutoff=0.8)
        if resembles is None:
            return
        raise BindingError(
            f"argument {parameter.name!r} names no level, source, field or loader, and resembles "
            f"{resembles!r}.",
            remedy="correct it, or give an option of your own a name that differs more."
            f"{did_you_mean(parameter.name, [resembles])}",
            level=declaration.name,
            site=str(declaration.site),
        )
    raise BindingError(
        f"argument {parameter.name!r} names no level, source, field or loader.",
        expected=f"one of {quoted(known)}; the level's own module is the first argument or named "
        f"{declaration.name!r}.",
        remedy="rename the argument, declare a level or a source of that name, map it by "
        f"reads={{{parameter.name!r}: 'name'}} to one, or give it a default of its own."
        f"{did_you_mean(parameter.name, known)}",
        level=declaration.name,
        site=str(declaration.site),
    )


def _refuse_unknown_reads(
    declaration: LevelDeclaration,
    arguments: Collection[str],
    levels: Collection[str],
    sources: Collection[str],
) -> None:
    for argument in declaration.argument_reads:
        if argument not in arguments:
            raise BindingError(
                f"reads= maps the argument {argument!r}, which the function does not have.",
                expected=f"one of its arguments: {quoted(sorted(arguments))}.",
                remedy="write reads={'argument': 'level'} with an argument of the function."
                f"{did_you_mean(argument, arguments)}",
                level=declaration.name,
                site=str(declaration.site),
            )
    for name in declaration.extra_reads:
        if name in sources:
            raise BindingError(
                f"reads= names the source {name!r}.",
                expected="an argument of the function: a source's item is nowhere else.",
                remedy=f"take {name!r} as an argument, or map one by "
                f"reads={{'argument': {name!r}}}.",
                level=declaration.name,
                site=str(declaration.site),
            )
    read = (name for name in declaration.argument_reads.values() if name not in sources)
    for name in (*read, *declaration.extra_reads):
        if name == declaration.name or name not in levels:
            what = "the level itself" if name == declaration.name else "no level or source"
            others = [*(n for n in levels if n != declaration.name), *sources]
            raise BindingError(
                f"reads= names {name!r}, {what}.",
                expected=f"one of {quoted(others)}."
                if others
                else "another level or a source; the program has none.",
                remedy=f"name a declared level or source.{did_you_mean(name, others)}",
                level=declaration.name,
                site=str(declaration.site),
            )


def _refuse_shared_names(
    declaration: LevelDeclaration, levels: Collection[str], sources: Collection[str]
) -> None:
    for what, names in (("field", declaration.fields), ("loader", declaration.data_keys)):
        for name in names:
            clash = "a level" if name in levels else "reserved" if name in RESERVED else ""
            clash = "a source" if name in sources else clash
            if name in declaration.fields and name in declaration.data_keys:
                clash = "a field and a loader at once"
            if clash:
                raise BindingError(
                    f"the {what} {name!r} is {clash}: an argument of that name would be ambiguous.",
                    remedy=f"rename the {what}.",
                    level=declaration.name,
                    site=str(declaration.site),
                )


def bind_offered(
    function: Function,
    offered: Iterable[str],
    *,
    what: str,
    site: Site,
    level: str | None = None,
    source: str | None = None,
    remedies: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """The names, among those offered, that a user's function asks for.

    Args:
        function: the function.
        offered: the names.
        what: it, in words.
        site: its place.
        level: the level that it belongs to.
        source: the source that it gives items of.
        remedies: how names that are not offered would be.

    Raises:
        BindingError: it asks for something that is not offered.
    """
    known = list(dict.fromkeys(offered))
    wanted: list[str] = []
    parameters = parameters_of(function)
    free = set(known) - {parameter.name for parameter in parameters}
    for parameter in parameters:
        if parameter.name in known:
            wanted.append(parameter.name)
        elif parameter.default is inspect.Parameter.empty or closest(
            parameter.name, free, cutoff=0.8
        ):
            raise BindingError(
                f"{what} asks for {parameter.name!r}, which is not offered to it.",
                expected=f"any of {quoted(known)}.",
                remedy=(remedies or {}).get(parameter.name)
                or f"rename or remove the argument.{did_you_mean(parameter.name, known)}",
                level=level,
                source=source,
                site=str(site),
            )
    return tuple(wanted)
