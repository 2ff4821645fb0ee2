"""The problems that are measured on a GPU: a network's samples are weighted by another network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from tests.benchmarks.case import Batch, Case
from tests.benchmarks.workloads import BATCHES, WeightNet, clean, noise, residual, weighted

CLASSES = 10


def resnet32(*, tiny: bool = False) -> Case:
    """A ResNet-32 of 16, 32 and 64 channels, BatchNorm in train mode, on 3x32x32."""
    torch.manual_seed(0)
    model = residual(blocks=1, width=4) if tiny else residual(blocks=5, width=16)
    shape = (4, 3, 8, 8) if tiny else (128, 3, 32, 32)
    batches, clean_batches = noise(*shape), noise(*shape, seed=1)
    return Case(model, WeightNet(), weighted, clean, batches, clean_batches, damping=100.0)


class Layer(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and around a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A classifier of sequences of tokens."""

    def __init__(self, layers: int, width: int, heads: int, words: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.words(tokens) + self.places)).mean(1))


class AdamCase(Case):
    """With the optimizer that transformers are trained by."""

    def lower_optimizer(self, parameters: object) -> Optimizer:
        return Adam(parameters, lr=1e-4, eps=1e-6)


def transformer(
    layers: int, width: int, heads: int, *, batch: int, words: int = 30_000, length: int = 128
) -> Case:
    torch.manual_seed(0)
    model = Encoder(layers, width, heads, words, length)
    batches, clean_batches = (_sentences(batch, length, words, seed) for seed in (0, 1))
    return AdamCase(model, WeightNet(), weighted, clean, batches, clean_batches, damping=100.0)


def transformer110m(*, tiny: bool = False) -> Case:
    """12 layers of width 768, as BERT-base."""
    return _tiny_transformer(layers=1) if tiny else transformer(12, 768, 12, batch=32)


def transformer350m(*, tiny: bool = False) -> Case:
    """24 layers of width 1024, as BERT-large."""
    return _tiny_transformer(layers=2) if tiny else transformer(24, 1024, 16, batch=16)


def _tiny_transformer(layers: int) -> Case:
    return transformer(layers, 16, 2, batch=4, words=50, length=6)


def _sentences(size: int, length: int, words: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(words, (size, length), generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


MODELS: dict[str, Callable[..., Case]] = {
    "resnet32": resnet32,
    "transformer110m": transformer110m,
    "transformer350m": transformer350m,
}
