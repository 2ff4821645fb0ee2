"""The hand-written loop: what a careful person writes in plain torch, without a framework.

Real modules are used in place. Multi-tensor arithmetic, one graph for all Hessian products,
no checks, no records and no care for BatchNorm's running statistics in second-order passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim import SGD

from tests.benchmarks.case import Case, Ticks

Tensors = list[Tensor]
Tail = Callable[["Loop", Tensors], Tensors]
"""Given the cotangent b, a product ``cross^T v`` with v near ``H^-1 b``."""


class Loop(Ticks):
    """A bilevel loop.

    Args:
        case: the problem.
        tail: the method.
        late: whether cross products are taken by a forward pass of duals, as suits a lambda
            that enters late, or from the graph of the gradient.
    """

    def __init__(self, case: Case, tail: Tail, *, late: bool) -> None:
        super().__init__(case)
        self.tail = tail
        self.late = late
        names = {id(p): None for p in self.own}
        self._slots = [
            (module._parameters, key)
            for module in case.lower.modules()
            for key, p in module._parameters.items()
            if id(p) in names
        ]

    def lower_loss(self) -> Tensor:
        """On the present batch."""
        return self.case.lower_loss(self.case.lower, self.lower_batch, self.case.upper)

    def lower_gradient(self) -> Tensors:
        """Lambda is held: no graph is built for it."""
        with held(self.hyper):
            return list(torch.autograd.grad(self.lower_loss(), self.own))

    def hypergradient(self) -> Tensors:
        """Direct gradient and cotangents in one backward, then the method."""
        loss = self.case.upper_loss(self.case.upper, self.upper_batch, self.case.lower)
        found = torch.autograd.grad(loss, [*self.own, *self.hyper], allow_unused=True)
        size = len(self.own)
        cross = self.tail(self, list(found[:size]))
        return [
            -c if direct is None else direct - c
            for direct, c in zip(found[size:], cross, strict=True)
        ]

    def gradient_graph(self) -> Tensors:
        """The gradient of the lower loss, with its graph."""
        if not self.late:
            return list(torch.autograd.grad(self.lower_loss(), self.own, create_graph=True))
        with held(self.hyper):
            return list(torch.autograd.grad(self.lower_loss(), self.own, create_graph=True))

    def cross(self, graph: Tensors, v: Tensors) -> Tensors:
        """``(dg/dlambda)^T v``; empties the list that it is given, to free the graph."""
        if not self.late:
            return list(torch.autograd.grad(graph, self.hyper, v))
        graph.clear()
        return self.cross_by_duals(v)

    def cross_by_duals(self, v: Tensors) -> Tensors:
        """The tangent of the loss along v is ``<g, v>``; its gradient in lambda is wanted."""
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, [p.detach() for p in self.own], v)
            with self._holding(list(duals)):
                tangent = forward_ad.unpack_dual(self.lower_loss()).tangent
            return list(torch.autograd.grad(tangent, self.hyper))

    @contextmanager
    def _holding(self, values: Tensors) -> Iterator[None]:
        """Puts tensors in the places of the lower parameters."""
        for (holder, key), value in zip(self._slots, values, strict=True):
            holder[key] = value
        try:
            yield
        finally:
            for (holder, key), parameter in zip(self._slots, self.own, strict=True):
                holder[key] = parameter


def identity(loop: Loop, b: Tensors) -> Tensors:
    """``v = b``."""
    if loop.late:
        return loop.cross_by_duals(b)
    return loop.cross(loop.gradient_graph(), b)


def finite_difference(loop: Loop, b: Tensors) -> Tensors:
    """``v = b``, the cross product by central differences on weights that need no gradient."""
    h = radius(loop.own) / size(b)
    kept = [p.data for p in loop.own]
    with held(loop.own):
        ahead = _shifted(loop, kept, b, h)
        behind = _shifted(loop, kept, b, -h)
    for parameter, value in zip(loop.own, kept, strict=True):
        parameter.data = value
    return list(torch._foreach_mul(torch._foreach_sub(ahead, behind), 0.5 / h))


def _shifted(loop: Loop, kept: Tensors, v: Tensors, h: float) -> Tensors:
    """The gradient in lambda at w + h v."""
    moved = torch._foreach_add(kept, v, alpha=h)
    for parameter, value in zip(loop.own, moved, strict=True):
        parameter.data = value
    return list(torch.autograd.grad(loop.lower_loss(), loop.hyper))


def sama(loop: Loop, b: Tensors) -> Tensors:
    """``v = -(dw'/dg)^T b``, w' behind the optimizer's next step: of SGD or Adam, undecayed."""
    group = loop.lower_optimizer.param_groups[0]
    if isinstance(loop.lower_optimizer, SGD):
        return identity(loop, list(torch._foreach_mul(b, group["lr"])))
    states = [loop.lower_optimizer.state[p] for p in loop.own]
    slopes = _adam_slopes(group, states, loop.lower_gradient())
    return identity(loop, list(torch._foreach_mul(b, slopes)))


def _adam_slopes(
    group: dict[str, Any], states: list[dict[str, Any]], grads: Tensors
) -> tuple[Tensor, ...]:
    """``-dw'/dg``, entry by entry; 0 where all gradients were zero and a root has no derivative."""
    beta, beta_squares = group["betas"]
    step = int(states[0]["step"]) + 1
    correction = math.sqrt(1 - beta_squares**step)
    mean = torch._foreach_lerp([state["exp_avg"] for state in states], grads, 1 - beta)
    squares = torch._foreach_mul(grads, grads)
    root = torch._foreach_lerp([s["exp_avg_sq"] for s in states], squares, 1 - beta_squares)
    torch._foreach_sqrt_(root)
    divisor = torch._foreach_div(root, correction)
    torch._foreach_add_(divisor, group["eps"])
    slopes = torch._foreach_mul(mean, grads)
    torch._foreach_div_(slopes, torch._foreach_mul(divisor, root))
    torch._foreach_mul_(slopes, -(1 - beta_squares) / correction)
    torch._foreach_add_(slopes, 1 - beta)
    torch._foreach_div_(slopes, divisor)
    torch._foreach_mul_(slopes, group["lr"] / (1 - beta**step))
    return tuple(s.masked_fill_(r == 0.0, 0.0) for s, r in zip(slopes, root, strict=True))


def neumann(loop: Loop, b: Tensors, *, terms: int, step: float) -> Tensors:
    """``v = step * sum_k (I - step H)^k b``."""
    graph = loop.gradient_graph()
    term = total = b
    for _ in range(terms - 1):
        product = torch.autograd.grad(graph, loop.own, term, retain_graph=True)
        term = torch._foreach_add(term, product, alpha=-step)
        total = torch._foreach_add(total, term)
    return loop.cross(graph, list(torch._foreach_mul(total, step)))


def cg(loop: Loop, b: Tensors, *, steps: int) -> Tensors:
    """Conjugate gradients on ``(H + damping I) v = b`` from zero."""
    graph = loop.gradient_graph()
    v = [torch.zeros_like(part) for part in b]
    residual = direction = b
    squared = dot(b, b)
    for _ in range(steps):
        product = torch.autograd.grad(graph, loop.own, direction, retain_graph=True)
        product = torch._foreach_add(product, direction, alpha=loop.case.damping)
        curvature = dot(direction, product)
        if curvature <= 0.0:
            break
        length = squared / curvature
        v = torch._foreach_add(v, direction, alpha=length)
        residual = torch._foreach_add(residual, product, alpha=-length)
        previous, squared = squared, dot(residual, residual)
        direction = torch._foreach_add(residual, direction, alpha=squared / previous)
    return loop.cross(graph, list(v))


@contextmanager
def held(parameters: Tensors) -> Iterator[None]:
    """The parameters need no gradient meanwhile."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def dot(left: Tensors, right: Tensors) -> float:
    """The inner product."""
    parts = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    return float(torch.stack(parts).sum())


def size(tensors: Tensors) -> float:
    """The Euclidean norm."""
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))))


def radius(own: Tensors) -> float:
    """The length of the shift: mlodeco's rule, so that both differences are the same."""
    with torch.no_grad():
        return torch.finfo(own[0].dtype).eps ** (1 / 3) * (1.0 + size(own))
