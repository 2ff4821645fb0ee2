"""A program made real: modules, stateless losses, graph and methods, all checked together."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlodeco.calculus.point import Decisions
from mlodeco.calculus.response import Method, Status
from mlodeco.calculus.rule import Rule, RuleOfEach
from mlodeco.calculus.stateless import LevelModule, StatelessLoss, frozen
from mlodeco.calculus.tape import Origins
from mlodeco.calculus.tuning import Tuning
from mlodeco.declare.binding import (
    Binding,
    BoundSource,
    BoundUpdate,
    Role,
    bind,
    bind_source,
    parameters_of,
)
from mlodeco.declare.records import LevelDeclaration
from mlodeco.declare.registry import Registry, require_levels
from mlodeco.errors import GraphError, GraphWarning, MethodError, did_you_mean, quoted
from mlodeco.graph import Graph, NestPlan, SweepPlan, plan_nest, plan_sweep, sees_more
from mlodeco.hypergrad import NAMES, resolve
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.fsdp import gathered, rest, units
from mlodeco.runtime.in_place import ShardsInPlace
from mlodeco.runtime.initial import (
    check_copies,
    check_starts,
    find_origins,
    own_copies,
    refuse_closed_starts,
)
from mlodeco.runtime.modules import find_owners, materialize, select_parameters
from mlodeco.runtime.precision import set_precision
from mlodeco.runtime.sharding import check_sharded
from mlodeco.runtime.stacking import spread_again, stack_parameters, tie
from mlodeco.runtime.steps import (
    bind_updates,
    check_counts,
    check_replicas,
    check_tuned,
    make_rule,
    make_tuning,
)
from mlodeco.tree import Tree

Methods = dict[tuple[str, str], Method | None]
"""For each lower-to-upper edge (upper, lower) its method; None closes the edge."""


@dataclass
class BuiltLevel:
    """One level made real.

    ``parameters`` are those that are optimized, stacked where the level has replicas;
    ``template`` those in its module, which are then views of the first replica; ``origins`` says
    which parameters of levels above are copied into them by ``init_from``. ``copied`` names
    the replicated levels that its loss sees, itself included; ``is_looped`` says that it cannot
    be vmapped over them, ``is_settled`` that this has been found out. ``is_sharded`` says that
    FSDP2 shards its module.
    """

    declaration: LevelDeclaration
    binding: Binding
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    loss: StatelessLoss
    own_children: frozenset[int]
    decisions: Decisions = field(default_factory=Decisions)
    last_batches: tuple[Drawn, ...] | None = None
    optimizer: Optimizer | None = None
    scheduler: LRScheduler | None = None
    tuning: Tuning | None = None
    update: BoundUpdate | None = None
    rule: Rule | RuleOfEach | None = None
    rule_state: Mapping[str, Any] = field(default_factory=dict)
    recent: deque[tuple[Drawn, ...]] = field(default_factory=lambda: deque(maxlen=1))
    is_probed: bool = False
    reported: set[Status] = field(default_factory=set)
    template: dict[str, nn.Parameter] = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)
    copied: frozenset[str] = frozenset()
    is_looped: bool = False
    is_settled: bool = False
    is_sharded: bool = False

    @property
    def name(self) -> str:
        """The level's name."""
        return self.declaration.name

    @property
    def site(self) -> str:
        """Where its function stands."""
        return str(self.declaration.site)

    def last_micro_batches(self, count: int) -> tuple[Drawn, ...] | None:
        """The newest micro-batches, of several steps perhaps; None if there were not so many."""
        if self.last_batches is not None and count == len(self.last_batches):
            return self.last_batches
        found = tuple(chain.from_iterable(self.recent))
        return found[-count:] if len(found) >= count else None

    @property
    def replicas(self) -> int | None:
        """How many copies of the level there are, stacked; None for the level itself."""
        spec = self.declaration.replicas
        return spec.count if spec is not None and self.is_replicated else None

    @property
    def is_replicated(self) -> bool:
        """Whether its parameters are stacked."""
        return self.name in self.copied

    def follow_module(self) -> None:
        """Starts every replica at the module's parameters, until one has stepped.

        Somebody may have loaded some, which reach the first replica alone.
        """
        if self.is_replicated and self.last_batches is None:
            spread_again(self.template, self.parameters)

    def tie(self) -> None:
        """Lets the module show the first replica."""
        if self.is_replicated:
            tie(self.template, self.parameters)

    @property
    def init_from(self) -> str | None:
        """The level above from whose parameters each inner loop starts."""
        return self.declaration.init_from

    @property
    def tune_reads(self) -> tuple[str, ...]:
        """The levels from which options of the optimizer are computed."""
        return tuple(dict.fromkeys(n for reads in self.binding.tune_reads.values() for n in reads))

    @property
    def update_reads(self) -> tuple[str, ...]:
        """The levels that the update rule reads."""
        return self.update.reads if self.update else ()

    @property
    def seen(self) -> tuple[str, ...]:
        """The levels whose parameters its loss or its update depends on."""
        stepping = (part.reads for part in (self.tuning, self.rule) if part is not None)
        return tuple(dict.fromkeys((*self.loss.sees, *chain.from_iterable(stepping))))

    @property
    def step_reads(self) -> tuple[str, ...]:
        """The levels that its steps depend on otherwise than through its loss."""
        starts = (level for level, _ in self.origins.values())
        return tuple(dict.fromkeys((*starts, *self.tune_reads, *self.update_reads)))


@dataclass
class Build:
    """A program made real, at one version of its declarations."""

    version: int
    levels: dict[str, BuiltLevel]
    graph: Graph
    methods: Methods
    custom: dict[str, Any]
    sources: dict[str, BoundSource] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    run_seed: int = 0
    tick: int = 0
    fingerprint: tuple[Any, ...] = ()
    _plans: dict[str, SweepPlan] = field(default_factory=dict)
    _nests: dict[str, NestPlan] = field(default_factory=dict)

    def readers(self, source: str) -> tuple[str, ...]:
        """The levels that read a source."""
        return tuple(n for n, level in self.levels.items() if source in level.binding.sources)

    def is_kept(self, source: str) -> bool:
        """Whether all readers of a source see one item until it has been used up."""
        return self.sources[source].declaration.refresh == "loop"

    def remember(self, name: str, drawn: tuple[Drawn, ...]) -> None:
        """Records what a level's last step was computed on."""
        self.levels[name].last_batches = drawn
        self.levels[name].recent.append(drawn)
        items = drawn[-1].sources
        self.kept.update({source: items[source] for source in items if self.is_kept(source)})

    def plan(self, top: str, methods: Methods | None = None) -> SweepPlan:
        """The sweep for ``top`` under the methods given, else, and kept, those of the program."""
        if methods is not None:
            return plan_sweep(self.graph, top, lambda upper, low: methods[upper, low] is not None)
        if top not in self._plans:
            self._plans[top] = self.plan(top, self.methods)
        return self._plans[top]

    def nest(self, top: str, methods: Methods | None = None) -> NestPlan:
        """What responds to what under ``top``, for ``nested=True``.

        Raises:
            GraphError: a level responds to another that is not above it.
        """
        if methods is not None:
            return plan_nest(self.graph, top, lambda upper, low: methods[upper, low] is not None)
        if top not in self._nests:
            self._nests[top] = self.nest(top, self.methods)
        return self._nests[top]

    def needs_nesting(self, top: str, methods: Methods | None = None) -> bool:
        """Whether lower levels carry something to ``top`` with ``nested=True`` alone."""
        chosen = self.methods if methods is None else methods
        return not self.plan(top, methods).visits and sees_more(
            self.graph, top, lambda upper, low: chosen[upper, low] is not None
        )

    def responds_below(self, name: str, low: str) -> tuple[str, ...]:
        """The levels that ``name`` reads below it whose best responses depend on ``low``."""
        if low not in self.graph.best_responses(name):
            return ()
        try:
            nest = self.nest(name)
        except GraphError:
            return ()
        reads = self.graph.best_responses(name)
        return tuple(other for other in reads if low in nest.inputs[other])

    def reads_on_paths(self, name: str) -> tuple[str, ...]:
        """The levels whose parameters must enter the loss of ``name`` for some hypergradient.

        Those that enter its steps alone are left out.
        """
        found = dict.fromkeys(self.plan(name).lowers)
        for top in self.levels:
            for visit in self.plan(top).visits:
                if visit.level == name:
                    found.update(
                        dict.fromkeys((*visit.lowers, *((top,) if visit.feeds_top else ())))
                    )
        return tuple(other for other in found if other in self.levels[name].loss.sees)

    def values(self, levels: Iterable[str]) -> dict[str, Tree]:
        """The current parameters of the levels, without gradients; the storage is shared."""
        return {name: frozen(self.levels[name].parameters) for name in levels}

    @contextmanager
    def opened(self, levels: Iterable[str], *, whole: bool) -> Iterator[dict[str, Tree]]:
        """The same, for stateless passes; they must be wanted by all processes where sharded.

        Args:
            levels: their names.
            whole: whether sharded levels are gathered, and shown whole by their modules
                meanwhile.
        """
        values = self.values(levels)
        if not whole:
            yield values
            return
        modules = [self.levels[name].module for name in values if self.levels[name].is_sharded]
        with gathered(modules) as wholes:
            for name in values:
                for key, parameter in self.levels[name].parameters.items():
                    values[name][key] = wholes.get(id(parameter), values[name][key])
            yield values

    def methods_for(self, spec: Any) -> Methods:
        """One method on every edge, or by a mapping those of the lower levels that it names.

        Raises:
            MethodError: there is no such method, or a key names no lower level that is read.
        """
        if isinstance(spec, Mapping):
            lowers = dict.fromkeys(low for _, low in self.methods)
            for key in spec:
                if key not in lowers:
                    raise MethodError(
                        f"hypergrad= has the key {key!r}, which is no lower level that is read.",
                        expected=f"some of {quoted(lowers)}.",
                        remedy=f"name a lower level.{did_you_mean(str(key), lowers)}",
                    )
            chosen = {low: resolve(one, self.custom) for low, one in spec.items()}
            return {
                (upper, low): chosen.get(low, method)
                for (upper, low), method in self.methods.items()
            }
        method = resolve(spec, self.custom)
        return dict.fromkeys(self.methods, method)


def build(registry: Registry) -> Build:
    """The program made real; kept until a declaration changes it.

    Modules of levels that have not changed are kept, so are the last batches. Parameters are
    looked up anew where somebody has replaced, added or frozen some.

    Raises:
        RunError: no levels.
        GraphError, BindingError, MethodError, ModuleError, DeclarationError: the declarations
            do not fit.
    """
    current: Build | None = registry.built
    if current is not None and current.version == registry.version:
        modules = {name: level.module for name, level in current.levels.items()}
        if current.fingerprint == _fingerprint(modules):
            return current
    require_levels(registry)
    declarations = dict(registry.levels)
    _check_lower_names(declarations)
    bindings = {name: bind(d, declarations, registry.sources) for name, d in declarations.items()}
    sources = {name: bind_source(d, declarations) for name, d in registry.sources.items()}
    same = {
        name: level
        for name, level in (current.levels if current else {}).items()
        if declarations.get(name) is level.declaration
    }
    custom = {name: method.value for name, method in registry.methods.items()}
    _check_custom_names(registry)
    lower = {name: d.lower for name, d in declarations.items()}
    ordered = Graph(lower, {})
    _resolve_all(declarations, custom, ordered)
    check_starts(declarations, ordered)
    check_tuned(declarations, bindings, ordered)
    updates = bind_updates(registry.updates, declarations)
    modules = materialize(declarations, {name: level.module for name, level in same.items()})
    owned = {name: select_parameters(d, modules[name]) for name, d in declarations.items()}
    check_copies(declarations, modules)
    check_replicas(declarations, modules, owned)
    owners = own_copies(declarations, modules, find_owners(declarations, owned), ordered)
    buffer_owner = _buffer_owners(declarations, modules)
    replicated = frozenset(n for n, d in declarations.items() if d.replicas is not None)
    levels: dict[str, BuiltLevel] = {}
    for name, declaration in declarations.items():
        binding = bindings[name]
        loss = _stateless_loss(declaration, binding, modules, owners)
        own = frozenset(child for child, level in buffer_owner.items() if level == name)
        levels[name] = BuiltLevel(declaration, binding, modules[name], owned[name], loss, own)
        levels[name].template = owned[name]
        levels[name].origins = find_origins(declaration, modules, owned[name], owners, ordered)
        levels[name].copied = replicated.intersection((*loss.sees, name))
        levels[name].tuning = make_tuning(declaration, binding, modules, owners)
        levels[name].update = updates.get(name)
        levels[name].rule = make_rule(declaration, updates.get(name), modules, owners, declarations)
        if levels[name].is_replicated:
            _stack(levels[name], same.get(name))
        if name in same and _steps_all(same[name].optimizer, levels[name].parameters):
            _take_over_steps(levels[name], same[name])
    set_precision(levels.values(), "no")
    reads = {name: _reads(level, ordered.below(name)) for name, level in levels.items()}
    graph = Graph(lower, reads)
    check_counts(declarations, {name: level.copied for name, level in levels.items()})
    methods = _edge_methods(declarations, custom, graph)
    origins = {name: level.origins for name, level in levels.items()}
    refuse_closed_starts(declarations, graph, methods, updates, origins)
    result = Build(registry.version, levels, graph, methods, custom, sources)
    for level in levels.values():
        level.is_sharded = bool(units(level.module))
        level.loss.shards = ShardsInPlace(level.loss) if units(level.loss.module) else None
    check_sharded(result)
    result.fingerprint = _fingerprint(modules)
    if current is not None:
        result.run_seed, result.tick = current.run_seed, current.tick
        _take_over_items(result, current, same)
    _warn_of_closed_paths(result)
    _warn_of_parameter_hooks(result)
    _warn_of_unread_sources(result)
    _warn_of_short_lived_tasks(result)
    _warn_of_idle_options(result, registry)
    registry.built = result
    return result


def _reads(level: BuiltLevel, below: Collection[str]) -> tuple[str, ...]:
    """The levels that a level reads, by its loss or else by its steps.

    An update rule takes levels below as they are, which makes no best response of them.
    """
    by_loss = (*level.binding.reads, *level.loss.sees)
    by_steps = (other for other in level.step_reads if other not in below)
    return tuple(dict.fromkeys(other for other in (*by_loss, *by_steps) if other != level.name))


def _stack(level: BuiltLevel, earlier: BuiltLevel | None) -> None:
    """Gives a level the parameters of all its replicas, those of an earlier build if it can."""
    known = {} if earlier is None else earlier.parameters
    is_same = earlier is not None and all(
        key in known and p is earlier.template.get(key) for key, p in level.template.items()
    )
    count = level.declaration.replicas.count if level.declaration.replicas else 1
    level.parameters = known if is_same else stack_parameters(level.template, count)
    level.tie()


def _steps_all(optimizer: Optimizer | None, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether an optimizer steps just these parameters: somebody may have replaced some."""
    groups = optimizer.param_groups if optimizer is not None else ()
    return {id(p) for g in groups for p in g["params"]} == {id(p) for p in parameters.values()}


def _take_over_steps(level: BuiltLevel, earlier: BuiltLevel) -> None:
    """Takes over where the last run's updates stand."""
    level.optimizer, level.scheduler = earlier.optimizer, earlier.scheduler
    level.rule_state = earlier.rule_state


def _take_over_items(built: Build, earlier: Build, same: Iterable[str]) -> None:
    """Takes over the last batches of unchanged levels and the items of unchanged sources."""

    def unchanged(items: Mapping[str, Any]) -> dict[str, Any]:
        new, old = built.sources, earlier.sources
        return {
            name: item
            for name, item in items.items()
            if name in new and new[name].declaration is old[name].declaration
        }

    built.kept = unchanged(earlier.kept)
    for name in same:
        drawn = earlier.levels[name].last_batches
        if drawn is not None:
            kept = tuple(Drawn(one.batch, unchanged(one.sources)) for one in drawn)
            built.levels[name].last_batches = kept


def _fingerprint(modules: Mapping[str, nn.Module]) -> tuple[Any, ...]:
    """What changes when somebody replaces, adds, removes or freezes parameters."""
    distinct = {id(module): module for module in modules.values()}
    found: list[Any] = []
    for module in distinct.values():
        rest(module)
        for child in module.modules():
            found.append(id(child))
            for parameter in child._parameters.values():
                found += (id(parameter), parameter is not None and parameter.requires_grad)
            found += [buffer is None for buffer in child._buffers.values()]
    return tuple(found)


def _stateless_loss(
    declaration: LevelDeclaration,
    binding: Binding,
    modules: Mapping[str, nn.Module],
    owners: Mapping[int, tuple[str, str]],
) -> StatelessLoss:
    named = binding.of(Role.OWN, Role.LEVEL)
    module = LevelModule(
        declaration.function,
        {name: modules[name] for name in dict.fromkeys((declaration.name, *binding.reads))},
        arguments=tuple(a.name for a in binding.arguments),
        module_arguments={a.name: a.target for a in named},
        positional=frozenset(a.name for a in binding.arguments if a.positional),
    )
    return StatelessLoss(declaration.name, str(declaration.site), module, owners)


def _check_lower_names(declarations: Mapping[str, LevelDeclaration]) -> None:
    for declaration in declarations.values():
        for name in declaration.lower:
            if name not in declarations:
                raise GraphError(
                    f"lower= names {name!r}, not a known level.",
                    expected=f"one of {quoted(n for n in declarations if n != declaration.name)}.",
                    remedy="correct the name, or import the module that declares it first."
                    f"{did_you_mean(name, declarations)}",
                    level=declaration.name,
                    site=str(declaration.site),
                )


def _check_custom_names(registry: Registry) -> None:
    for name, declaration in registry.methods.items():
        if name in NAMES:
            raise MethodError(
                f"@method({name!r}) has the name of a method of the library.",
                remedy=f"choose another name, such as {'my_' + name!r}.",
                site=str(declaration.site),
            )


def _spec_for(declaration: LevelDeclaration, low: str) -> Any:
    spec = declaration.hypergrad
    if isinstance(spec, Mapping):
        return spec.get(low, "neumann")
    return spec


def _resolve_all(
    declarations: Mapping[str, LevelDeclaration], custom: Mapping[str, Any], graph: Graph
) -> None:
    """Checks every method spec, also on edges that turn out not to exist."""
    for declaration in declarations.values():
        site = str(declaration.site)
        spec = declaration.hypergrad
        below = graph.below(declaration.name)
        for low in spec if isinstance(spec, Mapping) else ():
            if low not in below:
                raise MethodError(
                    f"hypergrad= has the key {low!r}, which is not below the level.",
                    expected=f"one of {quoted(sorted(below))}.",
                    remedy=f"name a lower level.{did_you_mean(str(low), below)}",
                    level=declaration.name,
                    site=site,
                )
        for one in spec.values() if isinstance(spec, Mapping) else (spec,):
            resolve(one, custom, level=declaration.name, site=site)


def _edge_methods(
    declarations: Mapping[str, LevelDeclaration], custom: Mapping[str, Any], graph: Graph
) -> Methods:
    methods: Methods = {}
    made: dict[str, Method | None] = {}
    for name, declaration in declarations.items():
        for low in graph.best_responses(name):
            spec = _spec_for(declaration, low)
            key = repr(spec) if spec is None or isinstance(spec, str) else str(id(spec))
            if key not in made:
                made[key] = resolve(spec, custom, level=name, site=str(declaration.site))
            methods[name, low] = made[key]
    return methods


def _buffer_owners(
    declarations: Mapping[str, LevelDeclaration], modules: Mapping[str, nn.Module]
) -> dict[int, str]:
    """For the identity of each module object, the level whose own step updates its buffers.

    A shared module belongs to the level that brought it, not to those that name that level.
    """
    brings_first = sorted(declarations, key=lambda name: isinstance(declarations[name].module, str))
    owners: dict[int, str] = {}
    for name in brings_first:
        for child in modules[name].modules():
            owners.setdefault(id(child), name)
    return owners


def _warn_of_parameter_hooks(built: Build) -> None:
    """Hypergradients are taken at copies of the parameters, which have none of their hooks."""
    for name, level in built.levels.items():
        hooked = [key for key, p in level.template.items() if p._backward_hooks]
        if hooked and (built.graph.lower[name] or built.graph.uppers(name)):
            warnings.warn(
                f"level {name!r} ({level.site}): the hooks of {quoted(hooked)} do not act in "
                "hypergradients. Remedy: put what they do into the function or into a hook of "
                "the level, such as @on('after_backward').",
                GraphWarning,
                stacklevel=3,
            )


def _warn_of_unread_sources(built: Build) -> None:
    for name, source in built.sources.items():
        if not built.readers(name):
            warnings.warn(
                f"source {name!r} ({source.declaration.site}): no level reads it. Remedy: take "
                f"{name!r} as an argument of a level's function, or remove the source.",
                GraphWarning,
                stacklevel=3,
            )


def _warn_of_short_lived_tasks(built: Build) -> None:
    """Warns of a task that has changed by the time that the level above judges the loop."""
    for name, source in built.sources.items():
        if built.is_kept(name):
            continue
        readers = built.readers(name)
        for low in (low for low in readers if built.levels[low].init_from in readers):
            upper = built.levels[low].init_from
            warnings.warn(
                f"source {name!r} ({source.declaration.site}): {low!r} and {upper!r}, from which "
                "its inner loops start, read it, and it gives each of their steps another item. "
                'Remedy: write @source(refresh="loop") for a task that both see, or two sources.',
                GraphWarning,
                stacklevel=3,
            )


def _warn_of_idle_options(built: Build, registry: Registry) -> None:
    for name, level in built.levels.items():
        for idle, remedy in _idle_options(built, level, registry):
            warnings.warn(
                f"level {name!r} ({level.site}): {idle}, so that it has no effect. Remedy: "
                f"{remedy}, or leave the option out.",
                GraphWarning,
                stacklevel=3,
            )


def _idle_options(built: Build, level: BuiltLevel, registry: Registry) -> Iterator[tuple[str, str]]:
    """Options that a level has no use for, and how it would have one."""
    declaration, name = level.declaration, level.name
    fields = level.binding.of(Role.FIELD)
    taken = level.binding.of(Role.BATCH, Role.FIELD, Role.DATA)
    if declaration.fields and not fields:
        yield (
            "fields= is given and the function takes none of them",
            f"take them as arguments: {', '.join(declaration.fields)}",
        )
    elif declaration.data is not None and not taken and not _is_heard(registry, name):
        yield (
            "data= is given and the function takes nothing of it",
            f"take it as an argument: {', '.join(declaration.data_keys) or 'batch'}",
        )
    if not built.graph.uppers(name):
        for option, given in (
            ("inner_steps", declaration.inner_steps > 1),
            ("rollback", declaration.rollback),
        ):
            if given:
                yield (
                    f"{option}= is given and no level has {name!r} in its lower=",
                    f"add {name!r} to lower= of the level that waits for it",
                )


def _is_heard(registry: Registry, level: str) -> bool:
    """Whether a hook sees the batches of a level, or the ends of its passes over them."""
    return any(
        hook.event == "epoch_end" or "batch" in {p.name for p in parameters_of(hook.function)}
        for hook in registry.hooks
        if hook.level in (None, level)
    )


def _warn_of_closed_paths(built: Build) -> None:
    """Warns of levels whose lower levels carry nothing, for themselves or for one above."""
    plans = [built.plan(name) for name in built.levels]
    passes_on = {visit.level for plan in plans for visit in plan.visits if visit.lowers}
    passes_on.update(plan.top for plan in plans if plan.visits)
    for name, level in built.levels.items():
        if not level.declaration.lower or level.declaration.hypergrad is None:
            continue
        if name in passes_on or built.needs_nesting(name) or _steps_by_itself(built, level):
            continue
        reads = [low for low in level.declaration.lower if low in built.graph.reads[name]]
        if not reads:
            why = f"its function reads none of {quoted(level.declaration.lower)}"
            remedy = f"take one of them as an argument, e.g. ({level.declaration.lower[0]}, ...)"
        else:
            why = f"nothing below it reads {name!r} back"
            remedy = f"let a lower level take {name!r} as an argument"
        warnings.warn(
            f"level {name!r} ({level.site}) reaches its lower levels by no path: {why}. "
            f"Its hypergradient is the direct gradient. Remedy: {remedy}, or set hypergrad=None.",
            GraphWarning,
            stacklevel=2,
        )


def _steps_by_itself(built: Build, level: BuiltLevel) -> bool:
    """Whether its update rule has a use for the levels below, or none for a gradient."""
    update = level.update
    if update is None:
        return False
    below = built.graph.below(level.name)
    return "grads" not in update.takes or any(read in below for read in update.reads)
