"""The problems that are measured, one section each: ``mlp``, ``resnet``, ``early``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.case import Batch, Case

BATCHES = 4
"""Batches of each level; more would only cost memory."""


# The loss of Meta-Weight-Net, shared by mlp and resnet.


class WeightNet(nn.Module):
    """1-100-1: a sample's loss in, its weight out (Shu et al. 2019, arXiv:1902.07379)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        return self.layers(losses[:, None])[:, 0]


def weighted(lower: nn.Module, batch: Batch, upper: nn.Module) -> Tensor:
    x, y = batch
    losses = F.cross_entropy(lower(x), y, reduction="none")
    return (upper(losses.detach()) * losses).mean()


def clean(upper: nn.Module, batch: Batch, lower: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(lower(x), y)


# mlp: the smallest that is not a toy; what a framework costs shows here.


def mlp(batch: int = 100) -> Case:
    """A 784-100-10 classifier with a weight network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    return Case(
        model,
        WeightNet(),
        weighted,
        clean,
        noise(batch, 784),
        noise(batch, 784, seed=1),
        damping=0.3,
    )


# resnet: the arithmetic dominates; what a method costs shows here.


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.skip = (
            nn.Identity()
            if before == after
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.skip(x))


def residual(blocks: int, width: int) -> nn.Module:
    """Three stages of so many blocks, each of twice the width; 6 * blocks + 2 layers."""
    widths = [width, *(width * factor for factor in (1, 2, 4) for _ in range(blocks))]
    stages = [Block(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*stem, *stages, *head)


def resnet(batch: int = 64) -> Case:
    """A ResNet-20 of 8, 16 and 32 channels, BatchNorm in train mode, with a weight network."""
    torch.manual_seed(0)
    shape = 3, 32, 32
    return Case(
        residual(blocks=3, width=8),
        WeightNet(),
        weighted,
        clean,
        noise(batch, *shape),
        noise(batch, *shape, seed=1),
        damping=10.0,
    )


# early: lambda stands before everything else, so that all of the graph depends on it.


class Mixture(nn.Module):
    """Logits of the mixture of first layers."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(1e-3 * torch.randn(4))


class MixedNet(nn.Module):
    """A small convolutional network whose first layer is a mixture of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Conv2d(3, 16, k, padding=k // 2) for k in (1, 3, 5, 7)])
        self.rest = nn.Sequential(
            *(nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32)),
            *(nn.GELU(), nn.Conv2d(32, 32, 3, 2, 1), nn.GroupNorm(4, 32)),
            *(nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        mixed = [share * layer(x) for share, layer in zip(shares, self.first, strict=True)]
        return self.rest(torch.stack(mixed).sum(0))


def mixed_lower(lower: nn.Module, batch: Batch, upper: nn.Module) -> Tensor:
    x, y = batch
    return F.cross_entropy(lower(x, upper.logits.softmax(0)), y)


def mixed_upper(upper: nn.Module, batch: Batch, lower: nn.Module) -> Tensor:
    return mixed_lower(lower, batch, upper)


def early(batch: int = 64) -> Case:
    """Architecture weights, as in DARTS (Liu et al. 2019, arXiv:1806.09055)."""
    torch.manual_seed(0)
    shape = 3, 32, 32
    return Case(
        MixedNet(),
        Mixture(),
        mixed_lower,
        mixed_upper,
        noise(batch, *shape),
        noise(batch, *shape, seed=1),
        damping=10.0,
    )


def noise(size: int, *shape: int, seed: int = 0) -> list[Batch]:
    """Inputs of a shape, and one of ten classes for each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


WORKLOADS: dict[str, Callable[..., Case]] = {"mlp": mlp, "resnet": resnet, "early": early}

LATE = {"resnet"}
"""Where a forward pass of duals gives the cheaper cross product: lambda enters late."""


def make(name: str, *, tiny: bool = False, double: bool = False) -> Case:
    """A workload by name.

    Args:
        name: a key of ``WORKLOADS``.
        tiny: with two samples a batch.
        double: in float64.
    """
    case = WORKLOADS[name](*([2] if tiny else []))
    if double:
        case.to(torch.float64)
    return case
