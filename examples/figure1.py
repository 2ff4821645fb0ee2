"""The four-level program of Figure 1 in Betty's paper, with every term of its hypergradient.

Four levels, each with a small quadratic loss, and the edges of the figure (Choe et al. 2023,
arXiv:2207.02849):

    one, two -> three -> four     lower to upper: what training leads to flows up
    four -> three, four -> one    upper to lower: a constant while the lower level trains
    three -> one                  likewise

Eq. (2) of the paper is the direct gradient and a sum over paths: from level four down one edge,
and back up. Here each path's term is a product of explicit matrices; `mlodeco.hypergradient`,
which builds no matrix and walks no path, has to find their sum.

Level three acts on level one below it. Eq. (2) holds level one constant where it takes the Hessian
of level three, so that the sum is an approximation. `nested=True` gives the true derivative: how
the loss of level four changes when its parameters are moved and all levels below are solved anew.

    python examples/figure1.py
"""

import argparse
from functools import partial, reduce
from itertools import pairwise

import torch
from torch import Tensor

import mlodeco
from mlodeco import level
from mlodeco.hypergrad import Dense

TOLERANCE = 1e-9

torch.manual_seed(1)
randn = partial(torch.randn, dtype=torch.float64)


def positive(size: int) -> Tensor:
    """A symmetric matrix whose eigenvalues are at least 1."""
    root = randn(size, size)
    return torch.eye(size, dtype=torch.float64) + root @ root.T / size


# The second derivatives of the losses: A within a level, B between a level and one that it reads.
A1, A2, A3, A4 = positive(3), positive(2), positive(4), positive(3)
B13, B14, B31, B32, B34, B43 = (
    randn(*shape) / 2 for shape in ((3, 4), (3, 3), (4, 3), (4, 2), (4, 3), (3, 4))
)
c1, c2, c3, c4 = randn(3), randn(2), randn(4), randn(3)
goal3, goal4 = randn(3), randn(4)


def loss_one(w1: Tensor, w3: Tensor, w4: Tensor) -> Tensor:
    return w1 @ A1 @ w1 / 2 + w1 @ (B13 @ w3 + B14 @ w4 + c1)


def loss_two(w2: Tensor) -> Tensor:
    return w2 @ A2 @ w2 / 2 + w2 @ c2


def loss_three(w3: Tensor, w1: Tensor, w2: Tensor, w4: Tensor) -> Tensor:
    fit = (w1 - goal3).square().sum() / 2
    return w3 @ A3 @ w3 / 2 + w3 @ (B31 @ w1 + B32 @ w2 + B34 @ w4 + c3) + fit


def loss_four(w4: Tensor, w3: Tensor) -> Tensor:
    return w4 @ A4 @ w4 / 2 + w4 @ (B43 @ w3 + c4) + (w3 - goal4).square().sum() / 2


# How a solution moves with what its level reads, the levels below it held constant: -A^-1 B.
MOVES = {
    ("four", "three"): -torch.linalg.solve(A3, B34),
    ("four", "one"): -torch.linalg.solve(A1, B14),
    ("three", "one"): -torch.linalg.solve(A1, B13),
    ("one", "three"): -torch.linalg.solve(A3, B31),
    ("two", "three"): -torch.linalg.solve(A3, B32),
}


def solved(w4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The solutions of levels one, two and three for given parameters of level four.

    Level three's total derivative, level one responding, is linear in its parameters.
    """
    w2 = -torch.linalg.solve(A2, c2)

    def respond(w3: Tensor) -> Tensor:
        return -torch.linalg.solve(A1, B13 @ w3 + B14 @ w4 + c1)

    def total_gradient(w3: Tensor) -> Tensor:
        w1 = respond(w3)
        direct = A3 @ w3 + B31 @ w1 + B32 @ w2 + B34 @ w4 + c3
        return direct + MOVES["three", "one"].T @ (B31.T @ w3 + w1 - goal3)

    zero = torch.zeros(4, dtype=torch.float64)
    hessian = torch.func.jacrev(total_gradient)(zero)
    w3 = -torch.linalg.solve(hessian, total_gradient(zero))
    return respond(w3), w2, w3


def declare(w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor) -> mlodeco.Program:
    """The same losses as a program. Which level depends on which follows from the arguments."""
    with mlodeco.Program() as program:

        @level("one", module={"w": w1})
        def _(one, three, four):
            return loss_one(one.w, three.w, four.w)

        @level("two", module={"w": w2})
        def _(two):
            return loss_two(two.w)

        @level("three", lower=["one", "two"], hypergrad=Dense(), module={"w": w3})
        def _(three, one, two, four):
            return loss_three(three.w, one.w, two.w, four.w)

        @level("four", lower=["three"], hypergrad=Dense(), module={"w": w4})
        def _(four, three):
            return loss_four(four.w, three.w)

    return program


def contribution(path: tuple[str, ...], upward: Tensor) -> Tensor:
    """The term of one path: the derivatives along it, multiplied.

    Args:
        path: from level four down to a level that reads it, and up again to level four.
        upward: the derivative of level four's loss in the parameters of the last level before it.
    """
    moves = [MOVES[pair] for pair in pairwise(path[:-1])]
    return reduce(lambda row, move: row @ move, reversed(moves), upward)


def by_finite_differences(w4: Tensor, step: float = 0.5) -> Tensor:
    """Central differences, which have no error but rounding for a quadratic: the step is free."""

    def loss(moved: Tensor) -> Tensor:
        return loss_four(moved, solved(moved)[2])

    moves = step * torch.eye(len(w4), dtype=w4.dtype)
    return torch.stack([(loss(w4 + move) - loss(w4 - move)) / (2 * step) for move in moves])


def agree(left: Tensor, right: Tensor) -> float:
    """The largest difference; it may not exceed the tolerance."""
    difference = (left - right).abs().max().item()
    assert difference < TOLERANCE, f"{left.tolist()} and {right.tolist()} differ"
    return difference


def show(what: str, vector: Tensor) -> None:
    numbers = "".join(f"{number:13.8f}" for number in vector.tolist())
    print(f"{what:32}{numbers}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    w4 = randn(3)
    w1, w2, w3 = solved(w4)
    program = declare(w1, w2, w3, w4)
    print(program.graph(), end="\n\n")

    print("The derivative of level four's loss in its three parameters")
    direct = A4 @ w4 + B43 @ w3 + c4
    upward = B43.T @ w4 + w3 - goal4  # of that loss, in the parameters of level three
    show("direct", direct)
    terms = {path: contribution(path, upward) for path in program.graph().paths("four")}
    for path, term in terms.items():
        show(" -> ".join(path), term)
    total = direct + sum(terms.values())
    show("sum, Eq. (2)", total)
    found = mlodeco.hypergradient("four", program=program)["w"]
    show("mlodeco.hypergradient", found)
    print(f"largest difference: {agree(found, total):.0e}", end="\n\n")

    true = mlodeco.hypergradient("four", program=program, nested=True)["w"]
    differences = by_finite_differences(w4)
    show("nested=True", true)
    show("all levels solved anew", differences)
    print(f"largest difference: {agree(true, differences):.0e}", end="\n\n")

    show("Eq. (2) minus nested=True", found - true)
    angle = torch.cosine_similarity(found, true, dim=0).item()
    size = ((found - true).norm() / true.norm()).item()
    print(f"Eq. (2) is {100 * size:.0f} % off here, and its cosine with the truth is {angle:.3f}.")


if __name__ == "__main__":
    main()
