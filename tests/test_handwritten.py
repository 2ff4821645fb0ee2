"""The optimizers written out against those of torch."""

import copy

import pytest
import torch

from tests.handwritten import OPTIONS, RULES, clipped, known, root
from tests.problems import randn


@pytest.fixture(autouse=True)
def _double():
    """Some optimizers keep scalars in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_rule_has_a_row():
    assert {kind for kind, _ in OPTIONS.values()} == set(RULES)


@pytest.mark.parametrize("name", OPTIONS)
def test_twelve_steps_equal_those_of_torch(name):
    kind, options = OPTIONS[name]
    rule = RULES[kind]
    w = randn(6, seed=1).requires_grad_()
    optimizer = kind([w], **options)
    group = known(rule, optimizer.param_groups[0])
    assert set(options) <= set(group)
    ours, state = w.detach().clone(), {}
    for step in range(12):
        w.grad = randn(6, seed=2 + step)
        w.grad[0] = 0.0
        optimizer.step()
        ours, state = rule(ours, w.grad.clone(), state, **group)
        assert torch.allclose(ours, w.detach(), rtol=1e-12, atol=1e-13), step
        for key, value in optimizer.state[w].items():
            if value is not None:
                one = torch.as_tensor(state[key])
                assert torch.allclose(one, value, rtol=1e-12, atol=1e-13), (step, key)


@pytest.mark.parametrize("name", OPTIONS)
def test_going_on_from_the_state_of_torch(name):
    kind, options = OPTIONS[name]
    rule = RULES[kind]
    w = randn(6, seed=1).requires_grad_()
    optimizer = kind([w], **options)
    for step in range(5):
        w.grad = randn(6, seed=2 + step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state[w])
    start, w.grad = w.detach().clone(), randn(6, seed=9)
    ours, _ = rule(start, w.grad.clone(), state, **known(rule, optimizer.param_groups[0]))
    optimizer.step()
    assert torch.allclose(ours, w.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_are_finite_where_gradients_are_zero_and_right_elsewhere(name):
    kind, options = OPTIONS[name]
    w, other = randn(4, seed=1), randn(4, seed=2)
    other[0] = 0.0

    def end(start, scale):
        after, state = start, {}
        for step in range(7):
            # the centered second moment of one gradient again and again is nearly zero
            g = (1 + 0.1 * step) * scale * other + 0.1 * after**2 * (other != 0)
            after, state = RULES[kind](after, g, state, **options)
        return after

    x, s = w.clone().requires_grad_(), torch.ones(4, requires_grad=True)
    c = randn(4, seed=3)
    found = torch.autograd.grad(end(x, s) @ c, [x, s])
    assert all(g.isfinite().all() for g in found)
    h = 1e-6
    for e in torch.eye(4):
        for k, at in enumerate(((e, 0 * e), (0 * e, e))):
            up, down = (end(w + sign * h * at[0], 1 + sign * h * at[1]) for sign in (1, -1))
            numeric = (up - down) @ c / (2 * h)
            assert torch.allclose(found[k] @ e, numeric, rtol=1e-5, atol=1e-7)


def test_the_root_has_a_derivative_everywhere():
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    (found,) = torch.autograd.grad(root(x).sum(), x)
    assert found.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("bound", [None, 1e-3, 0.5, 100.0])
def test_clipping_is_that_of_torch(bound):
    grads = {"a": randn(3, seed=1), "b": randn(2, 2, seed=2)}
    ours = clipped(grads, bound)
    leaves = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    if bound is not None:
        torch.nn.utils.clip_grad_norm_(leaves, bound)
    for leaf, g in zip(leaves, ours.values(), strict=True):
        assert torch.allclose(leaf.grad, g, rtol=1e-14)
