"""The optimizers of torch 2.13 by their formulas, for autograd to differentiate.

Each is ``step(w, g, state, **options) -> (w, state)`` on single tensors, and changes nothing that
it is given. The state has torch's names, and an empty one is that before the first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

State = dict[str, Any]
Rule = Callable[..., tuple[Tensor, State]]


def root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0 and not infinity."""
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def counted(state: Mapping[str, Any]) -> float:
    return float(state.get("step", 0.0)) + 1.0


def sgd(
    w,
    g,
    state,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
):
    g = (-g if maximize else g) + weight_decay * w
    if not momentum:
        return w - lr * g, {}
    buffer = state.get("momentum_buffer")
    buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
    step = g + momentum * buffer if nesterov else buffer
    return w - lr * step, {"momentum_buffer": buffer}


def adam(
    w,
    g,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    maximize=False,
    decoupled_weight_decay=False,
):
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    t = counted(state)
    m = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * g
    v = betas[1] * state.get("exp_avg_sq", 0.0) + (1 - betas[1]) * g**2
    after = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(v)), v)
        after["max_exp_avg_sq"] = v
    m_hat = m / (1 - betas[0] ** t)
    size = root(v) / (1 - betas[1] ** t) ** 0.5
    return w - lr * m_hat / (size + eps), after


def adamw(
    w,
    g,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.01,
    amsgrad=False,
    maximize=False,
):
    return adam(
        w,
        g,
        state,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
    )


def rmsprop(
    w,
    g,
    state,
    *,
    lr,
    alpha=0.99,
    eps=1e-8,
    weight_decay=0.0,
    momentum=0.0,
    centered=False,
    maximize=False,
):
    g = (-g if maximize else g) + weight_decay * w
    s = alpha * state.get("square_avg", 0.0) + (1 - alpha) * g**2
    after = {"step": counted(state), "square_avg": s}
    if centered:
        mean = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * g
        after["grad_avg"] = mean
        s = s - mean**2
    step = g / (root(s) + eps)
    if momentum:
        step = momentum * state.get("momentum_buffer", 0.0) + step
        after["momentum_buffer"] = step
    return w - lr * step, after


def adagrad(
    w,
    g,
    state,
    *,
    lr,
    lr_decay=0.0,
    weight_decay=0.0,
    initial_accumulator_value=0.0,
    eps=1e-10,
    maximize=False,
):
    g = (-g if maximize else g) + weight_decay * w
    t = counted(state)
    total = state.get("sum", initial_accumulator_value) + g**2
    rate = lr / (1 + (t - 1) * lr_decay)
    return w - rate * g / (root(total) + eps), {"step": t, "sum": total}


def nadam(
    w,
    g,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
    maximize=False,
):
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    t = counted(state)
    mu = betas[0] * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = float(state.get("mu_product", 1.0)) * mu
    m = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * g
    v = betas[1] * state.get("exp_avg_sq", 0.0) + (1 - betas[1]) * g**2
    step = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
    size = root(v / (1 - betas[1] ** t))
    after = {"step": t, "mu_product": product, "exp_avg": m, "exp_avg_sq": v}
    return w - lr * step / (size + eps), after


def radam(
    w,
    g,
    state,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
):
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    t = counted(state)
    m = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * g
    v = betas[1] * state.get("exp_avg_sq", 0.0) + (1 - betas[1]) * g**2
    step = m / (1 - betas[0] ** t)
    correction = 1 - betas[1] ** t
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * t * betas[1] ** t / correction
    if length > 5:
        above = (length - 4) * (length - 2) * longest
        below = (longest - 4) * (longest - 2) * length
        step = step * (above / below) ** 0.5 * correction**0.5 / (root(v) + eps)
    return w - lr * step, {"step": t, "exp_avg": m, "exp_avg_sq": v}


def adadelta(w, g, state, *, lr, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False):
    g = (-g if maximize else g) + weight_decay * w
    v = rho * state.get("square_avg", 0.0) + (1 - rho) * g**2
    moved = state.get("acc_delta", torch.zeros_like(g))
    delta = (moved + eps).sqrt() / (v + eps).sqrt() * g
    moved = rho * moved + (1 - rho) * delta**2
    return w - lr * delta, {"step": counted(state), "square_avg": v, "acc_delta": moved}


def adamax(w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False):
    g = (-g if maximize else g) + weight_decay * w
    t = counted(state)
    m = betas[0] * state.get("exp_avg", 0.0) + (1 - betas[0]) * g
    u = torch.maximum(betas[1] * state.get("exp_inf", torch.zeros_like(g)), g.abs() + eps)
    after = {"step": t, "exp_avg": m, "exp_inf": u}
    return w - lr / (1 - betas[0] ** t) * m / u, after


def asgd(w, g, state, *, lr, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0, maximize=False):
    g = (-g if maximize else g) + weight_decay * w
    t = counted(state)
    eta, mu = float(state.get("eta", lr)), float(state.get("mu", 1.0))
    w = w * (1 - lambd * eta) - eta * g
    mean = state.get("ax", torch.zeros_like(g))
    mean = w if mu == 1 else mean + (w - mean) * mu
    eta, mu = lr / (1 + lambd * lr * t) ** alpha, 1 / max(1.0, t - t0)
    return w, {"step": t, "eta": eta, "mu": mu, "ax": mean}


RULES: dict[type[Optimizer], Rule] = {
    SGD: sgd,
    Adam: adam,
    AdamW: adamw,
    RMSprop: rmsprop,
    Adagrad: adagrad,
    NAdam: nadam,
    RAdam: radam,
    Adadelta: adadelta,
    Adamax: adamax,
    ASGD: asgd,
}

OPTIONS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.3}),
    "sgd_decay": (SGD, {"lr": 0.3, "weight_decay": 0.2}),
    "sgd_momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd_dampened": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "sgd_nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "sgd_maximize": (SGD, {"lr": 0.005, "momentum": 0.5, "maximize": True}),
    "adam": (Adam, {"lr": 0.02}),
    "adam_options": (Adam, {"lr": 0.02, "betas": (0.6, 0.8), "eps": 1e-3, "weight_decay": 0.3}),
    "adam_amsgrad": (Adam, {"lr": 0.02, "betas": (0.6, 0.8), "amsgrad": True, "maximize": True}),
    "adamw": (AdamW, {"lr": 0.02, "weight_decay": 0.3}),
    "adamw_amsgrad": (AdamW, {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "amsgrad": True}),
    "rmsprop": (RMSprop, {"lr": 0.01}),
    "rmsprop_momentum": (
        RMSprop,
        {"lr": 0.01, "alpha": 0.7, "eps": 1e-3, "momentum": 0.5, "weight_decay": 0.1},
    ),
    "rmsprop_centered": (
        RMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-2, "momentum": 0.3, "centered": True},
    ),
    "adagrad": (Adagrad, {"lr": 0.05}),
    "adagrad_options": (
        Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1},
    ),
    "nadam": (NAdam, {"lr": 0.02, "betas": (0.7, 0.9), "momentum_decay": 0.2}),
    "nadam_decay": (NAdam, {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.3}),
    "nadam_decoupled": (
        NAdam,
        {"lr": 0.02, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    "radam": (RAdam, {"lr": 0.02}),
    "radam_early": (RAdam, {"lr": 0.02, "betas": (0.6, 0.5), "weight_decay": 0.3}),
    "radam_rectified": (
        RAdam,
        {
            "lr": 0.02,
            "betas": (0.6, 0.8),
            "eps": 1e-3,
            "weight_decay": 0.3,
            "decoupled_weight_decay": True,
        },
    ),
    "adadelta": (Adadelta, {"lr": 0.5, "rho": 0.7, "eps": 1e-4, "weight_decay": 0.1}),
    "adadelta_plain": (Adadelta, {"lr": 1.0}),
    "adamax": (Adamax, {"lr": 0.02, "betas": (0.6, 0.8), "eps": 1e-3, "weight_decay": 0.3}),
    "adamax_plain": (Adamax, {"lr": 0.02}),
    "asgd": (ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 3.0, "weight_decay": 0.1}),
    "asgd_plain": (ASGD, {"lr": 0.1}),
}
"""For tables of tests: every optimizer, with options that are not the default."""


def known(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group of torch's optimizer that the formula has."""
    names = inspect.signature(rule).parameters
    return {name: value for name, value in group.items() if name in names and name != "params"}


def clipped(grads: Mapping[str, Tensor], bound: float | None) -> dict[str, Tensor]:
    """As ``torch.nn.utils.clip_grad_norm_`` does, over all of them."""
    size = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
    if bound is None or size <= bound:
        return dict(grads)
    return {name: g * (bound / (size + 1e-6)) for name, g in grads.items()}
