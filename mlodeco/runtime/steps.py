"""How levels step other than by a plain optimizer: update rules, tuned options, replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from mlodeco.calculus.rule import Rule, RuleOfEach
from mlodeco.calculus.stateless import LevelModule, StatelessLoss
from mlodeco.calculus.tuning import Tuning
from mlodeco.declare.binding import Binding, BoundUpdate, bind_update
from mlodeco.declare.records import LevelDeclaration, UpdateDeclaration
from mlodeco.errors import DeclarationError, GraphError, ModuleError, did_you_mean, quoted
from mlodeco.graph import Graph


def bind_updates(
    updates: Mapping[str, UpdateDeclaration], declarations: Mapping[str, LevelDeclaration]
) -> dict[str, BoundUpdate]:
    """The update rule of each level that has one.

    Raises:
        GraphError: the level is not known.
        DeclarationError: the level has an option for an optimizer.
        BindingError: an argument of the rule names nothing.
    """
    for name, update in updates.items():
        if name not in declarations:
            raise GraphError(
                f"@update names {name!r}, not a known level.",
                expected=f"one of {quoted(declarations)}.",
                remedy="correct the name, or import the module that declares it first."
                f"{did_you_mean(name, declarations)}",
                site=str(update.site),
            )
        _refuse_optimizer(update, declarations[name])
    return {name: bind_update(update, declarations) for name, update in updates.items()}


def _refuse_optimizer(update: UpdateDeclaration, declaration: LevelDeclaration) -> None:
    given = {
        "optimizer": declaration.optimizer is not None,
        "scheduler": declaration.scheduler is not None,
        "tune": bool(declaration.tune),
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise DeclarationError(
            f"the level has {option}= and the update rule at {update.site}.",
            expected="one of them: a rule takes the place of the optimizer.",
            remedy=f"leave {option} out, or remove the rule.",
            level=declaration.name,
            site=str(declaration.site),
        )


def check_tuned(
    declarations: Mapping[str, LevelDeclaration], bindings: Mapping[str, Binding], graph: Graph
) -> None:
    """Refuses options that are computed from levels that are not above.

    Raises:
        GraphError: there is one.
    """
    for name, binding in bindings.items():
        above = [other for other in graph.levels if name in graph.below(other)]
        for option, levels in binding.tune_reads.items():
            for read in (read for read in levels if read not in above):
                raise GraphError(
                    f"tune[{option!r}] takes {read!r}, a level that is not above it.",
                    expected=f"some of {quoted(above)}.",
                    remedy=f"add {name!r} to lower= of {read!r}, which then learns {option!r}.",
                    level=name,
                    site=str(declarations[name].site),
                )


def check_replicas(
    declarations: Mapping[str, LevelDeclaration],
    modules: Mapping[str, nn.Module],
    owned: Mapping[str, Mapping[str, nn.Parameter]],
) -> None:
    """Refuses replicas of parameters that are in the module of another level too.

    Raises:
        ModuleError: there are some.
    """
    for name, declaration in declarations.items():
        if declaration.replicas is None:
            continue
        own = {id(parameter): key for key, parameter in owned[name].items()}
        for other in (other for other in declarations if other != name):
            shared = [own[id(p)] for p in modules[other].parameters() if id(p) in own]
            if shared:
                raise ModuleError(
                    f"replicas= is given, and level {other!r} has {quoted(shared[:3])} in its "
                    "module too.",
                    expected="a module of its own: the other level has one copy of these.",
                    remedy=f"give {other!r} another module; it may take {name!r} as an argument.",
                    level=name,
                    site=str(declaration.site),
                )


def check_counts(
    declarations: Mapping[str, LevelDeclaration], copied: Mapping[str, Iterable[str]]
) -> None:
    """Refuses levels that see different numbers of replicas.

    Raises:
        GraphError: there is one.
    """
    for name, levels in copied.items():
        site = str(declarations[name].site)
        _refuse_unequal(_counts(declarations, levels), "the level", name, site)


def _counts(declarations: Mapping[str, LevelDeclaration], levels: Iterable[str]) -> dict[str, int]:
    """How many replicas those of the levels have that have some."""
    specs = {name: declarations[name].replicas for name in levels}
    return {name: spec.count for name, spec in specs.items() if spec is not None}


def _refuse_unequal(counts: Mapping[str, int], what: str, level: str, site: str) -> None:
    if len(set(counts.values())) > 1:
        raise GraphError(
            f"{what} sees different numbers of replicas: {dict(counts)}.",
            expected="one number: it is evaluated once for each replica.",
            remedy="give these levels the same replicas=.",
            level=level,
            site=site,
        )


Owners = Mapping[int, tuple[str, str]]
"""For the identity of a parameter, its level and its name there."""


def make_tuning(
    declaration: LevelDeclaration,
    binding: Binding,
    modules: Mapping[str, nn.Module],
    owners: Owners,
) -> Tuning | None:
    """The options that ``tune=`` computes, all by one function."""
    if not declaration.tune:
        return None
    wanted = binding.tune_reads
    reads = dict.fromkeys(name for names in wanted.values() for name in names)

    def compute(**given: nn.Module) -> dict[str, Any]:
        return {
            option: function(**{name: given[name] for name in wanted[option]})
            for option, function in declaration.tune.items()
        }

    function = _module(compute, reads, (), modules)
    return Tuning(StatelessLoss(declaration.name, str(declaration.site), function, owners))


def make_rule(
    declaration: LevelDeclaration,
    update: BoundUpdate | None,
    modules: Mapping[str, nn.Module],
    owners: Owners,
    declarations: Mapping[str, LevelDeclaration],
) -> Rule | RuleOfEach | None:
    """The level's own update rule.

    Raises:
        GraphError: it reads levels with different numbers of replicas.
    """
    if update is None:
        return None
    function = _module(update.declaration.function, update.reads, update.takes, modules)
    site = str(update.declaration.site)
    stateless = StatelessLoss(declaration.name, site, function, owners)
    rule = Rule(stateless, update.takes, declaration.clip_norm)
    counts = _counts(declarations, (declaration.name, *rule.reads))
    _refuse_unequal(counts, "the update rule", declaration.name, site)
    if not counts:
        return rule
    return RuleOfEach(rule, next(iter(counts.values())), frozenset(counts))


def _module(
    function: Callable[..., Any],
    reads: Iterable[str],
    items: tuple[str, ...],
    modules: Mapping[str, nn.Module],
) -> LevelModule:
    """A function of levels' modules and of items, as one of the items alone."""
    read = {name: modules[name] for name in reads}
    names = {name: name for name in read}
    return LevelModule(function, read, (*items, *read), names, frozenset())
