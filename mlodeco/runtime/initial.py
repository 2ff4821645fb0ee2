"""Levels whose inner loops start from the parameters of a level above, ``init_from``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mlodeco.calculus.tape import Origins
from mlodeco.declare.records import LevelDeclaration
from mlodeco.errors import GraphError, MethodError, ModuleError, did_you_mean, quoted
from mlodeco.graph import Graph, plan_sweep


def check_starts(declarations: Mapping[str, LevelDeclaration], graph: Graph) -> None:
    """Refuses starts that are no level above.

    Raises:
        GraphError: there is one.
    """
    for name, declaration, start in _starting(declarations):
        above = [other for other in declarations if name in graph.below(other)]
        site = str(declaration.site)
        if start not in declarations:
            raise GraphError(
                f"init_from={start!r} names no known level.",
                expected=f"a level above, one of {quoted(above)}.",
                remedy="correct the name, or import the module that declares it first."
                f"{did_you_mean(start, declarations)}",
                level=name,
                site=site,
            )
        if start not in above:
            raise GraphError(
                f"init_from={start!r} names a level that is not above it.",
                expected=f"one of {quoted(above)}."
                if above
                else "a level above, which steps between two inner loops.",
                remedy=f"add {name!r} to lower= of {start!r}.",
                level=name,
                site=site,
            )


def check_copies(
    declarations: Mapping[str, LevelDeclaration], modules: Mapping[str, nn.Module]
) -> None:
    """Refuses modules that the module of the start cannot be copied into.

    Raises:
        ModuleError: a parameter or buffer is not there, or of another kind; two there are one
            here; or it is one module.
    """
    for name, declaration, start in _starting(declarations):
        own, other = modules[name], modules[start]
        if own is other:
            raise _error(
                declaration,
                f"init_from={start!r} names a level with the same module.",
                "two modules of one kind: each inner loop begins with a copy from one to the "
                "other.",
                "give each its own, such as module=Net to both.",
            )
        _check_copy(declaration, "parameter", _parameters(own), _parameters(other))
        _check_ties(declaration, _parameters(own), _parameters(other))
        _check_copy(declaration, "buffer", _buffers(own), _buffers(other))


def own_copies(
    declarations: Mapping[str, LevelDeclaration],
    modules: Mapping[str, nn.Module],
    owners: Mapping[int, tuple[str, str]],
    graph: Graph,
) -> dict[int, tuple[str, str]]:
    """The owners, with those of parameters that are copied in and not optimized by the level.

    Such a parameter is throughout the inner loop what it is above, and a loss that sees it
    sees the level that owns the original.
    """
    found = dict(owners)
    # a start may have copies itself, so that uppers come first
    for name in reversed(graph.order):
        start = declarations[name].init_from
        if start is None:
            continue
        originals = _parameters(modules[start])
        for key, parameter in _parameters(modules[name]).items():
            owner = found.get(id(originals[key]))
            if owner is not None and name in graph.below(owner[0]):
                found.setdefault(id(parameter), owner)
    return found


def find_origins(
    declaration: LevelDeclaration,
    modules: Mapping[str, nn.Module],
    owned: Mapping[str, Tensor],
    owners: Mapping[int, tuple[str, str]],
    graph: Graph,
) -> Origins:
    """For each parameter that is copied in, the level above that owns the original."""
    if declaration.init_from is None:
        return {}
    originals = _parameters(modules[declaration.init_from])
    found = {key: owners.get(id(originals[key])) for key in owned}
    return {
        key: owner
        for key, owner in found.items()
        if owner is not None and declaration.name in graph.below(owner[0])
    }


def refuse_closed_starts(
    declarations: Mapping[str, LevelDeclaration],
    graph: Graph,
    methods: Mapping[tuple[str, str], Any],
    with_rules: Iterable[str],
    origins: Mapping[str, Origins],
) -> None:
    """Refuses starts that cannot learn from the loops that start from them.

    Those that step by an update rule of their own need no hypergradient.

    Raises:
        MethodError: ``hypergrad=None`` closes the only way.
    """
    starts = {(name, owner) for name, found in origins.items() for owner, _ in found.values()}
    for name, start in sorted(starts):
        if start in with_rules:
            continue
        closed = [low for low in graph.best_responses(start) if methods[start, low] is None]
        plan = plan_sweep(graph, start, lambda upper, low: methods[upper, low] is not None)
        if closed and name not in {visit.level for visit in plan.visits}:
            raise MethodError(
                f"hypergrad=None closes the edge by which {start!r} learns from {name!r}, whose "
                "inner loops start from it.",
                expected="a method that differentiates through the loop.",
                remedy="use hypergrad=Unroll(first_order=True) for first-order MAML, or an "
                f"@update({start!r}) rule such as Reptile.",
                level=start,
                site=str(declarations[start].site),
            )


def _starting(
    declarations: Mapping[str, LevelDeclaration],
) -> Iterator[tuple[str, LevelDeclaration, str]]:
    for name, declaration in declarations.items():
        if declaration.init_from is not None:
            yield name, declaration, declaration.init_from


def _parameters(module: nn.Module) -> Mapping[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def _buffers(module: nn.Module) -> Mapping[str, Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def _check_copy(
    declaration: LevelDeclaration, what: str, own: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> None:
    start = declaration.init_from
    for key, tensor in own.items():
        if key not in other:
            raise _error(
                declaration,
                f"its {what} {key!r} is not in the module of {start!r}, which init_from= names.",
                f"every {what} there under the same name.",
                f"build both modules alike.{did_you_mean(key, other)}",
            )
        theirs = other[key]
        if (tensor.shape, tensor.dtype) != (theirs.shape, theirs.dtype):
            raise _error(
                declaration,
                f"its {what} {key!r} is {_kind(tensor)}, and that of {start!r}, which init_from= "
                f"names, {_kind(theirs)}.",
                "the same shape and dtype.",
                "build both modules alike.",
            )


def _check_ties(
    declaration: LevelDeclaration, own: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> None:
    """Refuses one parameter that two would be copied into."""
    first: dict[int, str] = {}
    for key, parameter in own.items():
        known = first.setdefault(id(parameter), key)
        if other[known] is not other[key]:
            raise _error(
                declaration,
                f"its parameters {quoted((known, key))} are one, and those of "
                f"{declaration.init_from!r}, which init_from= names, are two.",
                "one parameter there too: the copy of one would overwrite that of the other.",
                "build both modules alike.",
            )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _error(declaration: LevelDeclaration, found: str, expected: str, remedy: str) -> ModuleError:
    return ModuleError(
        found,
        expected=expected,
        remedy=remedy,
        level=declaration.name,
        site=str(declaration.site),
    )
