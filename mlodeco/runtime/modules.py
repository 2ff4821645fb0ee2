"""From what ``module=`` and ``params=`` say to real modules and the parameters a level owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mlodeco.declare.calls import call, misfit
from mlodeco.declare.records import LevelDeclaration
from mlodeco.errors import GraphError, ModuleError, did_you_mean, quoted


def materialize(
    declarations: Mapping[str, LevelDeclaration], kept: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The module of every level; those in ``kept`` are not built again.

    Raises:
        ModuleError: something that should be a module is not one.
        GraphError: ``module=`` names no level, or names lead in a circle.
    """
    modules: dict[str, nn.Module] = {}
    for name, declaration in declarations.items():
        if not isinstance(declaration.module, str):
            known = kept.get(name)
            modules[name] = known if known is not None else _make(declaration)
    for name in declarations:
        modules.setdefault(name, modules[_owner(name, declarations)])
    return {name: modules[name] for name in declarations}


def _owner(name: str, declarations: Mapping[str, LevelDeclaration]) -> str:
    """The level whose declaration gives the module that ``name`` shares."""
    path = [name]
    while isinstance(declarations[path[-1]].module, str):
        shared = declarations[path[-1]].module
        declaration = declarations[path[-1]]
        if shared not in declarations or shared in path:
            what = "no known level" if shared not in declarations else "a level that shares its own"
            raise GraphError(
                f"module={shared!r} names {what}.",
                expected=f"one of {quoted(n for n in declarations if n != name)}.",
                remedy="name a level that has a module, or give a module."
                f"{did_you_mean(shared, declarations)}",
                level=declaration.name,
                site=str(declaration.site),
            )
        path.append(shared)
    return path[-1]


def _make(declaration: LevelDeclaration) -> nn.Module:
    module = declaration.module
    if not isinstance(module, nn.Module | Mapping):
        if why := misfit(module):
            raise _error(
                declaration,
                f"the factory given as module= cannot be called without arguments: {why}.",
                "give a function without arguments, such as module=lambda: nn.Linear(2, 1).",
            )
        module = call("module=", f"level {declaration.name!r} ({declaration.site})", module)
    if isinstance(module, Mapping) and not isinstance(module, nn.Module):
        module = _from_mapping(declaration, module)
    if not isinstance(module, nn.Module):
        raise _error(
            declaration,
            f"the factory given as module= returned {type(module).__name__}.",
            "return an nn.Module or a mapping of names to tensors.",
        )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise _error(
                declaration,
                f"the parameter {name!r} of the lazy module has no shape yet.",
                "run the module once on a batch before the level is used.",
            )
        if parameter.is_meta:
            raise _error(
                declaration,
                f"the parameter {name!r} is on the meta device, without numbers.",
                "build the module on a real device, or give it numbers: module.to_empty(...).",
            )
    return module


def _from_mapping(declaration: LevelDeclaration, mapping: Mapping[Any, Any]) -> nn.ParameterDict:
    parameters = nn.ParameterDict()
    for name, value in mapping.items():
        if not isinstance(name, str) or not name or "." in name:
            raise _error(
                declaration,
                f"module= has the key {name!r}.",
                "name each tensor by a string without dots.",
            )
        if hasattr(parameters, name):
            raise _error(
                declaration,
                f"module= has the key {name!r}, which is an attribute of nn.ParameterDict.",
                f"rename it, for instance {name + '_value'!r}.",
            )
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise _error(
                declaration,
                f"module= maps {name!r} to {kind}.",
                f"give a tensor of floating point numbers: torch.tensor(...) for {name!r}.",
            )
        trained = value.requires_grad if isinstance(value, nn.Parameter) else True
        parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=trained)
    return parameters


def _is_chosen(declaration: LevelDeclaration, predicate: Any, name: str) -> bool:
    """What a predicate says of a name.

    Raises:
        ModuleError: it does not take one.
    """
    if why := misfit(predicate, name):
        raise _error(
            declaration,
            f"the function given as params= cannot be called with a parameter's name: {why}.",
            "write params=lambda name: name.startswith('head').",
        )
    where = f"level {declaration.name!r} ({declaration.site})"
    return bool(call("params=", where, bool, call("params=", where, predicate, name)))


def select_parameters(declaration: LevelDeclaration, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the level optimizes, by their names in its module.

    Raises:
        ModuleError: the selection is empty, frozen, complex, or not of the module.
    """
    named = dict(module.named_parameters())
    params = declaration.params
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in named.items() if _is_chosen(declaration, params, name)}
    else:
        wanted = {id(_parameter(declaration, module, one)) for one in params}
        chosen = {name: p for name, p in named.items() if id(p) in wanted}
        missing = len(wanted) - len(chosen)
        if missing:
            entries = "1 entry that is not a parameter" if missing == 1 else ""
            raise _error(
                declaration,
                f"params= has {entries or f'{missing} entries that are not parameters'} of "
                "the level's module.",
                f"select among its parameters: {quoted(named)}.",
            )
    if not chosen:
        raise _error(
            declaration,
            "the level has no parameters to optimize.",
            f"select some of {quoted(named)} by params=, or let them require gradients.",
        )
    complex_ones = [name for name, p in chosen.items() if p.is_complex()]
    if complex_ones:
        raise _error(
            declaration,
            f"the parameters {quoted(complex_ones)} are complex.",
            "store real and imaginary parts: torch.view_as_real(p), and view_as_complex in use.",
        )
    sparse = [name for name, p in chosen.items() if p.layout is not torch.strided]
    if sparse:
        raise _error(
            declaration,
            f"the parameters {quoted(sparse)} are sparse.",
            "give dense ones: p.to_dense(); a mask times a dense one keeps entries at zero.",
        )
    stiff = [name for name, p in chosen.items() if not p.requires_grad]
    if stiff:
        raise _error(
            declaration,
            f"params= selects {quoted(stiff)}, which do not require gradients.",
            "leave them out, or call requires_grad_() on them.",
        )
    return chosen


def _parameter(declaration: LevelDeclaration, module: nn.Module, entry: Any) -> Any:
    """What an entry of ``params=`` stands for: the parameter of that name, or itself."""
    if not isinstance(entry, str):
        return entry
    named = dict(module.named_parameters(remove_duplicate=False))
    if entry not in named:
        parts = [name for name in named if name.startswith(f"{entry}.")]
        hint = f" Did you mean {quoted(parts)}?" if parts else did_you_mean(entry, named)
        raise _error(
            declaration,
            f"params= names {entry!r}, which is not a parameter of the level's module.",
            f"select among its parameters: {quoted(named)}.{hint}",
        )
    return named[entry]


def find_owners(
    declarations: Mapping[str, LevelDeclaration],
    owned: Mapping[str, Mapping[str, nn.Parameter]],
) -> dict[int, tuple[str, str]]:
    """For the identity of each optimized parameter, its level and its name there.

    Raises:
        ModuleError: two levels optimize the same parameter.
    """
    owners: dict[int, tuple[str, str]] = {}
    for level, parameters in owned.items():
        for name, parameter in parameters.items():
            other = owners.setdefault(id(parameter), (level, name))
            if other[0] != level:
                raise _error(
                    declarations[level],
                    f"the parameter {name!r} is optimized by level {other[0]!r} too.",
                    "divide the module's parameters between the levels by params=, "
                    f"e.g. params=lambda name: name != {name!r}; or, if each is to have its own, "
                    "build the layers in the factory: "
                    "module=lambda: nn.Sequential(nn.Linear(...)).",
                )
    return owners


def _error(declaration: LevelDeclaration, found: str, remedy: str) -> ModuleError:
    return ModuleError(found, remedy=remedy, level=declaration.name, site=str(declaration.site))


@contextmanager
def preserved_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the train/eval modes of modules on leaving."""
    modes = [(child, child.training) for child in _children(modules)]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def preserved_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the buffers of modules on leaving, also where new tensors were assigned."""
    saved = [
        (child._buffers, name, buffer, buffer.detach().clone())
        for child in _children(modules)
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for holder, name, buffer, value in saved:
                holder[name] = buffer.copy_(value)


def copy_into(module: nn.Module, other: nn.Module) -> None:
    """Copies the parameters and buffers of another module of the same kind."""
    with torch.no_grad():
        theirs = _named_tensors(other)
        for name, tensor in _named_tensors(module).items():
            tensor.copy_(theirs[name])


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def _children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(child): child for m in modules for child in m.modules()}.values())


def device_of(module: nn.Module) -> torch.device:
    """The device of the module's first parameter, the CPU if it has none."""
    first = next(module.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
