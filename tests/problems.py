"""Bilevel problems in float64: a program, and the same losses on the real modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from mlodeco import Program


@dataclass
class Problem:
    program: Program
    top: Callable[[], Tensor]
    low: Callable[[], Tensor]
    top_parameters: list[Tensor]
    low_parameters: list[Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def spd(size: int, seed: int, low: float = 0.5, high: float = 2.0) -> Tensor:
    q, _ = torch.linalg.qr(randn(size, size, seed=seed))
    return q @ torch.diag(torch.linspace(low, high, size, dtype=torch.float64)) @ q.T


def bilevel(
    low: Callable[..., Any],
    top: Callable[..., Any],
    low_module: Any,
    top_module: Any,
    low_batch: Any,
    top_batch: Any,
    **options: Any,
) -> Problem:
    """Declares levels ``low`` and ``top``; both functions take (module, batch, other)."""
    program = Program()
    program.level(
        "low", module=low_module, data=[low_batch], reads={_third(low): "top"}, **options
    )(low)
    program.level(
        "top",
        lower=["low"],
        module=top_module,
        data=[top_batch],
        reads={_third(top): "low"},
        optimizer=partial(SGD, lr=0.01),
    )(top)
    w, h = program.module("low"), program.module("top")
    return Problem(
        program,
        lambda: top(h, top_batch, w),
        lambda: low(w, low_batch, h),
        list(h.parameters()),
        [p for p in w.parameters() if p.requires_grad],
    )


def _third(function: Callable[..., Any]) -> str:
    code = function.__code__
    return code.co_varnames[2]


def quadratic() -> Problem:
    a, b, c = spd(20, 1, 0.2, 2.0), randn(20, 10, seed=2), randn(20, seed=3)

    def low(m: Any, batch: Any, h: Any) -> Tensor:
        return m.w @ a @ m.w / 2 + m.w @ (b @ h.x) + c @ m.w

    def top(h: Any, batch: Any, m: Any) -> Tensor:
        return ((m.w - batch) ** 2).sum() / 2 + (h.x**4).sum() + (h.x * m.w[:10]).sum()

    modules = {"w": randn(20, seed=4)}, {"x": randn(10, seed=5)}
    return bilevel(low, top, *modules, randn(1), randn(20, seed=6))


def half_read() -> Problem:
    """The upper level reads one of two parameters that the lower loss couples."""
    a, b = spd(20, 1, 0.2, 2.0), randn(20, 10, seed=2)

    def low(m: Any, batch: Any, h: Any) -> Tensor:
        w = torch.cat([m.u, m.v])
        return w @ a @ w / 2 + w @ (b @ h.x)

    def top(h: Any, batch: Any, m: Any) -> Tensor:
        return ((m.u - batch) ** 2).sum() / 2 + (h.x**2).sum()

    modules = {"u": randn(12, seed=3), "v": randn(8, seed=4)}, {"x": randn(10, seed=5)}
    return bilevel(low, top, *modules, randn(1), randn(12, seed=6))


def ridge_samples() -> Problem:
    """Ridge regression with a learnt weight for each sample."""
    data = randn(30, 6, seed=1), randn(30, seed=2)

    def low(m: Any, batch: Any, h: Any) -> Tensor:
        x, y = batch
        return (h.s.sigmoid() * (x @ m.w - y) ** 2).mean() + 0.1 * (m.w**2).sum()

    def top(h: Any, batch: Any, m: Any) -> Tensor:
        x, y = batch
        return ((x @ m.w - y) ** 2).mean()

    modules = {"w": randn(6, seed=3)}, {"s": randn(30, seed=4)}
    return bilevel(low, top, *modules, data, (randn(20, 6, seed=5), randn(20, seed=6)))


def ridge_decay() -> Problem:
    """Ridge regression with a learnt decay for each feature."""
    data = randn(30, 6, seed=1), randn(30, seed=2)

    def low(m: Any, batch: Any, h: Any) -> Tensor:
        x, y = batch
        return ((x @ m.w - y) ** 2).mean() / 2 + (h.log_decay.exp() * m.w**2).sum() / 2

    def top(h: Any, batch: Any, m: Any) -> Tensor:
        x, y = batch
        return ((x @ m.w - y) ** 2).mean() / 2

    modules = {"w": randn(6, seed=3)}, {"log_decay": randn(6, seed=4)}
    return bilevel(low, top, *modules, data, (randn(20, 6, seed=5), randn(20, seed=6)))


def network(*sizes: int, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def classification(
    low_module: nn.Module | None = None, *, detach: bool = True, **options: Any
) -> Problem:
    """A network whose sample losses are weighted by a network, as in Meta-Weight-Net."""

    def low(model: Any, batch: Any, net: Any) -> Tensor:
        x, y = batch
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        fed = losses.detach() if detach else losses
        weights = net(fed[:, None])[:, 0].sigmoid()
        decay = sum((p**2).sum() for p in model.parameters())
        return (weights * losses).mean() + 0.2 * decay

    def top(net: Any, batch: Any, model: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    labels = torch.randint(0, 3, (24,), generator=generator(7))
    return bilevel(
        low,
        top,
        low_module or network(2, 3, 3, seed=1),
        network(1, 2, 1, seed=2),
        (randn(16, 2, seed=3), labels[:16]),
        (randn(8, 2, seed=4), labels[16:]),
        **options,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic": quadratic,
    "half_read": half_read,
    "ridge_samples": ridge_samples,
    "ridge_decay": ridge_decay,
    "detached_weights": classification,
    "live_weights": lambda: classification(detach=False),
}
