"""Parameters of several replicas in one tensor each, beside the module that shows the first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mlodeco.tree import Tree


def spread(tree: Tree, count: int) -> Tree:
    """The same for every replica."""
    return {key: value.expand(count, *value.shape).clone() for key, value in tree.items()}


def stack_parameters(template: Mapping[str, nn.Parameter], count: int) -> dict[str, nn.Parameter]:
    """Parameters of all replicas, which start equal."""
    found = spread({key: p.detach() for key, p in template.items()}, count)
    return {key: nn.Parameter(value) for key, value in found.items()}


def tie(template: Mapping[str, nn.Parameter], stacked: Mapping[str, nn.Parameter]) -> None:
    """Makes the module's own parameters views of the first replica."""
    for key, parameter in template.items():
        parameter.data = stacked[key].data[0]


def spread_again(template: Mapping[str, nn.Parameter], stacked: Mapping[str, nn.Parameter]) -> None:
    """Makes all replicas equal to the module's parameters; writes where they are not alone."""
    with torch.no_grad():
        for key, parameter in template.items():
            if not bool((stacked[key] == parameter).all()):
                stacked[key].copy_(parameter.detach().clone().expand_as(stacked[key]))
    tie(template, stacked)
