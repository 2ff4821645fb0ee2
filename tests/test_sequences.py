"""Attention, recurrent networks and activation checkpointing, by every exact method."""

import gc
import weakref
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import mlodeco
from mlodeco import Program
from mlodeco.errors import LossError
from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    Dense,
    Identity,
    Neumann,
    Nystrom,
    Sama,
    Unroll,
    UnrollForward,
)
from tests.problems import randn

METHODS = {
    "identity": Identity(scale=0.1),
    "identity_by_duals": Identity(scale=0.1, product="reverse_over_forward"),
    "identity_forward": Identity(scale=0.1, product="forward"),
    "neumann": Neumann(damping=2.0),
    "cg": CG(damping=2.0),
    "cg_forward": CG(damping=2.0, product="forward"),
    "minres": MINRES(damping=2.0),
    "gmres": GMRES(damping=2.0),
    "nystrom": Nystrom(rank=5, damping=2.0),
    "dense": Dense(damping=2.0),
    "sama": Sama(),
    "unroll": Unroll(),
    "unroll_by_duals": Unroll(product="forward"),
    "unroll_with_graphs": Unroll(keep_graph=True),
    "unroll_forward": UnrollForward(),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        x = x + self.mix(x, x, x, need_weights=False)[0]
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)
        return self.out(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(4, 3, batch_first=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, *, is_on, use_reentrant=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.shift = nn.Parameter(torch.zeros(4))
        self.is_on, self.use_reentrant = is_on, use_reentrant

    def forward(self, x):
        def block(z):
            return F.dropout(torch.tanh(self.first(z)), 0.2)

        x = x + self.shift
        h = checkpoint(block, x, use_reentrant=self.use_reentrant) if self.is_on else block(x)
        return self.second(h.mean(1))


MODELS = {
    "attention": Attention,
    "lstm": partial(Recurrent, nn.LSTM),
    "gru": partial(Recurrent, nn.GRU),
    "checkpointed": partial(Checkpointed, is_on=True),
}


def samples(count, seed):
    x = randn(count, 3, 4, seed=seed)
    return x, (x[:, :, 0].sum(1) > 0).long()


def weighted(model, batch, hyper):
    x, y = batch
    losses = F.cross_entropy(model(x), y, reduction="none")
    decay = sum((p**2).sum() for p in model.parameters())
    return (hyper.logits.sigmoid()[y] * losses).mean() + 0.01 * hyper.decay.exp() * decay


def clean(hyper, batch, model):
    x, y = batch
    return F.cross_entropy(model(x), y)


def program(make, method, *, inner_steps=1, **options):
    torch.manual_seed(2)
    found = Program()
    found.level(
        "model",
        module=make().double(),
        optimizer=partial(SGD, lr=0.5),
        data=[samples(8, 1)],
        inner_steps=inner_steps,
        reads={"hyper": "hyper"},
        **options,
    )(weighted)
    upper = {"logits": randn(2, seed=3), "decay": randn(1, seed=4)[0]}
    found.level(
        "hyper",
        lower=["model"],
        hypergrad=method,
        module=upper,
        optimizer=partial(SGD, lr=0.1),
        data=[samples(6, 2)],
    )(clean)
    return found


@cache
def descent(model):
    """Where the upper loss falls, seen by differences over the two lower steps before it."""

    def after(shift):
        made = program(MODELS[model], None, inner_steps=2)
        with torch.no_grad():
            made.module("hyper").logits += shift
        history = mlodeco.run(2, program=made, seed=0, progress="off").history
        return history.of("hyper")[0].loss

    shifts = 1e-4 * torch.eye(2, dtype=torch.float64)
    return torch.tensor([after(-shift) - after(shift) for shift in shifts], dtype=torch.float64)


@pytest.mark.slow
# on a few samples the curvature is negative now and then, of which a run warns
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_trains_without_any_setting(method, model):
    made = program(MODELS[model], METHODS[method], inner_steps=2)
    logits = made.module("hyper").logits
    start = logits.detach().clone()
    history = mlodeco.run(12, program=made, seed=0, progress="off").history
    losses = [record.loss for record in history.steps if record.level == "model"]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert F.cosine_similarity(logits.detach() - start, descent(model), dim=0) > 0.5


@pytest.mark.parametrize("model", ["attention", "lstm", "gru"])
@pytest.mark.parametrize("method", METHODS)
def test_every_product_is_that_of_dense_algebra(method, model):
    chosen = METHODS[method]
    if isinstance(chosen, CG | MINRES | GMRES):
        chosen = type(chosen)(max_steps=300, rtol=1e-13, damping=2.0, product=chosen.product)
        same = Dense(damping=2.0, product="reverse")
    elif isinstance(chosen, Identity):
        same = Identity(scale=0.1, product="reverse")
    elif isinstance(chosen, Unroll | UnrollForward):
        same = Unroll(product="reverse")
    elif isinstance(chosen, Dense):
        same = CG(max_steps=300, rtol=1e-13, damping=2.0, product="reverse")
    else:
        pytest.skip("an approximation of its own")
    made = program(MODELS[model], chosen, inner_steps=2)
    torch.manual_seed(5)
    found = mlodeco.hypergradient("hyper", program=made)
    torch.manual_seed(5)
    wanted = mlodeco.hypergradient("hyper", program=made, hypergrad=same)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_changes_nothing(method):
    found = []
    for is_on in (True, False):
        made = program(partial(Checkpointed, is_on=is_on), METHODS[method], inner_steps=2)
        torch.manual_seed(5)
        found.append(mlodeco.hypergradient("hyper", program=made))
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-10, atol=1e-14)
        assert found[0][key].abs().max() > 0.0


CALLS = {
    "hyper": lambda made: mlodeco.hypergradient("hyper", program=made),
    "model": lambda made: mlodeco.run(1, program=made, seed=0, progress="off"),
}
"""By the level whose loss each of them takes first."""


@pytest.mark.parametrize("level", CALLS)
@pytest.mark.parametrize("method", [*METHODS, None])
def test_reentrant_checkpointing_is_refused_at_its_level(method, level):
    make = partial(Checkpointed, is_on=True, use_reentrant=True)
    made = program(make, METHODS.get(method), inner_steps=2)
    with pytest.raises(LossError, match="use_reentrant=True") as caught:
        CALLS[level](made)
    assert caught.value.level == level
    assert "use_reentrant=False" in caught.value.remedy


ALIVE = weakref.WeakSet()
"""The tokens of the nodes of :class:`Marked` that live."""


class Token:
    """Lives as long as a node of a graph."""


class Marked(torch.autograd.Function):
    """The identity, whose nodes can be counted while they live."""

    @staticmethod
    def forward(ctx, x):
        ctx.token = Token()
        ALIVE.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


class Watched(Attention):
    """Notes at each pass how many nodes of earlier ones are alive."""

    def __init__(self):
        super().__init__()
        self.found = []

    def forward(self, x):
        self.found.append(len(ALIVE))
        return Marked.apply(super().forward(x))


@pytest.mark.parametrize("method", METHODS)
def test_no_graph_outlives_a_hypergradient(method):
    made = program(Watched, METHODS[method], inner_steps=2)
    gc.collect()
    gc.disable()  # what only the collector frees is freed late
    try:
        assert mlodeco.hypergradient("hyper", program=made)
        assert not ALIVE
    finally:
        gc.enable()


def test_the_graph_of_hessian_products_is_freed_before_a_cross_product_by_duals():
    made = program(Watched, CG(damping=2.0))
    mlodeco.hypergradient("hyper", program=made)
    assert made.module("model").found[-1] == 0


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


def arrays(batch):
    return {"x": batch[0].numpy(), "y": batch[1].numpy()}


def of_any_kind(model, batch, hyper):
    if isinstance(batch, dict):
        batch = torch.as_tensor(batch["x"]), torch.as_tensor(batch["y"])
    if isinstance(batch, Frozen):
        batch = batch.x, batch.y
    return weighted(model, batch, hyper)


@pytest.mark.parametrize("kind", [arrays, lambda batch: Frozen(*batch)], ids=["numpy", "dataclass"])
@pytest.mark.parametrize(
    "method", [CG, MINRES, GMRES, Neumann, Nystrom, Dense], ids=lambda method: method.__name__
)
def test_a_part_of_a_batch_of_any_kind(method, kind):
    found = []
    for change in (lambda batch: batch, kind):
        made = program(partial(Recurrent, nn.GRU), method(damping=2.0, curvature_batch=0.5))
        batches = {"model": change(samples(8, 1)), "hyper": samples(6, 2)}
        with Program() as other:
            other.level("model", module=made.module("model"), reads=["hyper"])(of_any_kind)
            other.level(
                "hyper",
                lower=["model"],
                module=made.module("hyper"),
                hypergrad=method(damping=2.0, curvature_batch=0.5),
            )(clean)
        found.append(mlodeco.hypergradient("hyper", program=other, batches=batches))
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key])
        assert found[0][key].abs().max() > 0.0
