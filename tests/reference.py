"""Hypergradients by plain autograd on real modules and dense algebra: the slow twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
Solve = Callable[[Tensor, Tensor], Tensor]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def gradients(loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros(sum(t.numel() for t in inputs), dtype=loss.dtype)
    found = torch.autograd.grad(
        loss, list(inputs), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return flat(found)


def jacobian(vector: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    size = sum(t.numel() for t in inputs)
    rows = []
    for entry in vector:
        if entry.requires_grad:
            found = torch.autograd.grad(
                entry, list(inputs), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(flat(found))
        else:
            rows.append(torch.zeros(size, dtype=vector.dtype))
    return torch.stack(rows)


def exact(h: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(h, b)


def scaled(factor: float) -> Solve:
    return lambda h, b: factor * b


def neumann(terms: int, step: float, damping: float = 0.0) -> Solve:
    def solve(h: Tensor, b: Tensor) -> Tensor:
        eye = torch.eye(len(h), dtype=h.dtype)
        power = eye - step * (h + damping * eye)
        return step * sum(torch.linalg.matrix_power(power, k) @ b for k in range(terms))

    return solve


def krylov(steps: int, damping: float = 0.0) -> Solve:
    """What CG gives after some steps: the Galerkin solution in the Krylov space of b."""

    def solve(h: Tensor, b: Tensor) -> Tensor:
        h = h + damping * torch.eye(len(h), dtype=h.dtype)
        basis = torch.stack([torch.linalg.matrix_power(h, k) @ b for k in range(steps)], dim=1)
        q, _ = torch.linalg.qr(basis)
        return q @ torch.linalg.solve(q.T @ h @ q, q.T @ b)

    return solve


def minimal_residual(steps: int, damping: float = 0.0) -> Solve:
    """What MINRES and GMRES give after some steps: the smallest residual in the Krylov space."""

    def solve(h: Tensor, b: Tensor) -> Tensor:
        h = h + damping * torch.eye(len(h), dtype=h.dtype)
        basis = torch.stack([torch.linalg.matrix_power(h, k) @ b for k in range(steps)], dim=1)
        q, _ = torch.linalg.qr(basis)
        return q @ torch.linalg.lstsq(h @ q, b[:, None]).solution[:, 0]

    return solve


def bilevel(
    top: Loss,
    low: Loss,
    top_parameters: Sequence[Tensor],
    low_parameters: Sequence[Tensor],
    solve: Solve = exact,
) -> Tensor:
    """Direct gradient minus ``cross^T solve(H, b)``, flat, touched low parameters given."""
    value = top()
    both = gradients(value, [*top_parameters, *low_parameters])
    size = sum(t.numel() for t in top_parameters)
    direct, b = both[:size], both[size:]
    g = gradients(low(), low_parameters, create_graph=True)
    h = jacobian(g, low_parameters)
    cross = jacobian(g, top_parameters)
    return direct - cross.T @ solve(h.T, b)
