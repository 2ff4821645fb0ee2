"""What a level optimizes and what it is given: every form of an option against a loop by hand."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from functools import partial
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

import mlodeco
from mlodeco import Program
from mlodeco.hypergrad import Dense, Neumann
from tests import reference
from tests.methods import damped
from tests.problems import generator, network, randn

SGD_MOMENTUM = partial(SGD, lr=0.2, momentum=0.9, weight_decay=0.05)
ADAM = partial(Adam, lr=0.03)


NEUMANN = Neumann(num_terms=2, step_size=0.2)


def gradients(outputs, inputs, weights=None, *, create_graph=False):
    return torch.autograd.grad(
        outputs,
        inputs,
        weights,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


class Side:
    """One level by hand: the loss of a batch, what it trains, how, and on what."""

    def __init__(self, loss, parameters, optimizer, data, *, scheduler=None, **options):
        self.loss, self.parameters = loss, list(parameters)
        self.optimizer = optimizer(self.parameters)
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.micro, self.clip = options.get("accumulate", 1), options.get("clip_norm")
        self.data, self.last, self.losses = cycle(data), [], []

    def mean(self):
        return sum(self.loss(batch) for batch in self.last) / len(self.last)

    def draw(self):
        self.last = [next(self.data) for _ in range(self.micro)]

    def step(self, low=None):
        """An ordinary step, or one by the hypergradient of ``NEUMANN`` through ``low``."""
        value = self.mean()
        self.losses.append(value.item())
        grads = gradients(
            value, self.parameters if low is None else self.parameters + low.parameters
        )
        if low is not None:
            b = grads[len(self.parameters) :]
            g = gradients(low.mean(), low.parameters, create_graph=True)
            hb = gradients(g, low.parameters, b)
            v = [0.2 * (2 * left - 0.2 * right) for left, right in zip(b, hb, strict=True)]
            cross = gradients(g, self.parameters, v)
            grads = [left - right for left, right in zip(grads, cross, strict=False)]
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad.clone()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def save(self):
        steppers = [s for s in (self.optimizer, self.scheduler) if s is not None]
        states = [(s, copy.deepcopy(s.state_dict())) for s in steppers]
        values = [(p, p.detach().clone()) for p in self.parameters]

        def restore():
            for s, state in states:
                s.load_state_dict(state)
            for p, value in values:
                p.data.copy_(value)

        return restore


def by_hand(low, *tops, ticks=6, inner=1, warmup=0, repeat=1, rollback=False):
    since = -warmup
    restore = low.save()
    for _ in range(ticks):
        restore = low.save() if since <= 0 else restore
        low.draw()
        low.step()
        since += 1
        if since < inner:
            continue
        since = 0
        for top in tops:
            for _ in range(repeat):
                top.draw()
                top.step(low)
        if rollback:
            restore()
            low.step()


def run(program, ticks=6):
    return mlodeco.run(ticks, program=program, progress="off")


def same(module, twin, tolerance=1e-10):
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= tolerance, name


def hypergradient(program, level="top"):
    return mlodeco.hypergradient(level, program=program, hypergrad="dense")


def exact(top, low, names, solve=reference.exact):
    """The exact hypergradient at the twins' present parameters, by name."""
    flat = reference.bilevel(top.mean, low.mean, top.parameters, low.parameters, solve)
    parts = flat.split([p.numel() for p in top.parameters])
    return {n: g.reshape(p.shape) for n, g, p in zip(names, parts, top.parameters, strict=True)}


def assert_close(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-8, atol=1e-11), name


def batches(count, seed, size=6):
    return [
        (
            randn(size, 3, seed=100 * seed + i),
            torch.randint(0, 2, (size,), generator=generator(100 * seed + i)),
        )
        for i in range(count)
    ]


LOWS, TOPS = batches(3, 1), batches(2, 2)


def weighted(model, batch, net):
    x, y = batch
    losses = F.cross_entropy(model(x), y, reduction="none")
    decay = sum((p**2).sum() for p in model.parameters())
    return (net(losses[:, None])[:, 0].sigmoid() * losses).mean() + 0.2 * decay


def clean(net, batch, model):
    x, y = batch
    return F.cross_entropy(model(x), y) + 0.01 * sum((p**2).sum() for p in net.parameters())


def classifier():
    return network(3, 4, 2, seed=1)


def weigher():
    return network(1, 3, 1, seed=2)


def bilevel(low=weighted, top=clean, **options):
    """Levels ``low`` and ``top``; options as low_*= and top_*=."""
    program = Program()
    lows = {k.removeprefix("low_"): v for k, v in options.items() if k.startswith("low_")}
    tops = {k.removeprefix("top_"): v for k, v in options.items() if k.startswith("top_")}
    low_defaults = {
        "module": classifier,
        "optimizer": SGD_MOMENTUM,
        "data": LOWS,
        "reads": {"net": "top"},
    }
    top_defaults = {"module": weigher, "optimizer": ADAM, "data": TOPS, "reads": {"model": "low"}}
    program.level("low", **{**low_defaults, **lows})(low)
    program.level("top", lower=["low"], hypergrad=NEUMANN, **{**top_defaults, **tops})(top)
    return program


def twins(model, net, low=weighted, top=clean, **options):
    """The same by hand, on the modules given."""
    lows = {k.removeprefix("low_"): v for k, v in options.items() if k.startswith("low_")}
    tops = {k.removeprefix("top_"): v for k, v in options.items() if k.startswith("top_")}
    low_defaults = {"parameters": model.parameters(), "optimizer": SGD_MOMENTUM, "data": LOWS}
    top_defaults = {"parameters": net.parameters(), "optimizer": ADAM, "data": TOPS}
    return (
        Side(lambda batch: low(model, batch, net), **{**low_defaults, **lows}),
        Side(lambda batch: top(net, batch, model), **{**top_defaults, **tops}),
    )


# params


class Lora(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Parameter(randn(2, linear.in_features, seed=7))
        self.up = nn.Parameter(0.1 * randn(linear.out_features, 2, seed=8))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(module):
    module[0] = Lora(module[0])
    return lambda name: "lora" in name or name in ("0.down", "0.up")


def frozen(module):
    module[0].requires_grad_(False)


def frozen_bias(module):
    module[2].bias.requires_grad_(False)
    return lambda name: name == "2.weight"


SELECTIONS = {
    "predicate": lambda m: lambda name: name.startswith("2."),
    "predicate_that_excludes": lambda m: lambda name: "bias" not in name,
    "list_in_another_order": lambda m: [m[2].bias, m[0].weight],
    "generator": lambda m: m[2].parameters(),
    "set_of_one": lambda m: {m[0].weight},
    "frozen": frozen,
    "frozen_and_predicate": frozen_bias,
    "lora": adapted,
}
CHOSEN = {
    "predicate": ["2.weight", "2.bias"],
    "predicate_that_excludes": ["0.weight", "2.weight"],
    "list_in_another_order": ["0.weight", "2.bias"],
    "generator": ["2.weight", "2.bias"],
    "set_of_one": ["0.weight"],
    "frozen": ["2.weight", "2.bias"],
    "frozen_and_predicate": ["2.weight"],
    "lora": ["0.down", "0.up"],
}


@pytest.mark.parametrize("where", ["low", "top"])
@pytest.mark.parametrize("form", SELECTIONS)
def test_selected_parameters_alone_are_optimized(form, where):
    """In steps, clipping, curvature and keys; the others keep their values and their .grad."""
    modules = {"low": classifier(), "top": weigher()}
    selected = modules[where]
    params = SELECTIONS[form](selected)
    names = CHOSEN[form]
    pair = {level: copy.deepcopy(module) for level, module in modules.items()}
    others = {n: p for n, p in selected.named_parameters() if n not in names}
    before = {n: p.detach().clone() for n, p in others.items()}
    for p in others.values():
        p.grad = torch.full_like(p, 7.0)
    both = {f"{where}_accumulate": 2, f"{where}_clip_norm": 0.05}
    program = bilevel(
        low_module=modules["low"], top_module=modules["top"], **{f"{where}_params": params}, **both
    )
    chosen = [dict(pair[where].named_parameters())[n] for n in names]
    low, top = twins(pair["low"], pair["top"], **{f"{where}_parameters": chosen}, **both)
    result = run(program)
    by_hand(low, top)
    for level in modules:
        same(modules[level], pair[level])
    assert result.history.losses("top") == pytest.approx(top.losses, rel=1e-10)
    for name, p in others.items():
        assert torch.equal(p, before[name])
        assert torch.equal(p.grad, torch.full_like(p, 7.0))
    keys = names if where == "top" else [n for n, _ in modules["top"].named_parameters()]
    assert_close(hypergradient(program), exact(top, low, keys))
    assert list(hypergradient(program, where)) == names


def test_a_mapping_keeps_what_is_frozen():
    fixed = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
    program = Program()
    program.level("low", module={"a": torch.ones(2), "b": fixed}, optimizer=partial(SGD, lr=0.1))(
        lambda m: (m.a * m.b).sum()
    )
    run(program, 1)
    module = program.module("low")
    assert torch.allclose(module.a, torch.full((2,), 0.7))
    assert torch.equal(module.b, fixed)
    assert not module.b.requires_grad
    assert list(hypergradient(program, "low")) == ["a"]


# shared modules


class Mixed(nn.Module):
    """Weights, two kinds of architecture parameters, and a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(randn(2, seed=6))
        self.net = network(3, 3, seed=1)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64, momentum=0.3)
        self.skip = nn.Parameter(randn(2, 3, seed=5))
        self.beta = nn.Parameter(randn(3, seed=7))

    def forward(self, x):
        a = self.alpha.softmax(0)
        mixed = a[0] * self.net(x) + a[1] * x * self.beta.sigmoid()
        return self.norm(mixed) @ self.skip.T


def test_parameters_are_selected_by_names():
    def trained(params):
        program = Program()
        program.level("w", module=partial(nn.Linear, 2, 1), params=params, optimizer=SGD_MOMENTUM)(
            lambda m: (m.weight**2).sum() + (m.bias**2).sum()
        )
        return list(mlodeco.hypergradient("w", program=program))

    assert trained(["bias"]) == ["bias"]
    assert trained(["bias", "weight", "bias"]) == ["weight", "bias"]
    assert trained(iter(["weight"])) == ["weight"]


def test_a_tied_parameter_is_selected_by_either_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    program = Program()
    program.level("w", module=model, params=["1.weight", model[1].bias])(
        lambda m: sum((p**2).sum() for p in m.parameters())
    )
    assert list(mlodeco.hypergradient("w", program=program)) == ["0.weight", "1.bias"]


def only(*names):
    return lambda name: name in names


def is_weight(name):
    return name not in ("alpha", "beta")


def of_weights(m, batch):
    return F.cross_entropy(m(batch[0]), batch[1]) + 0.3 * sum((p**2).sum() for p in m.parameters())


def of_alpha(m, batch):
    return F.cross_entropy(m(batch[0]), batch[1]) + (m.alpha**2).sum() + (m.alpha[0] * m.beta).sum()


def of_beta(m, batch):
    return F.cross_entropy(m(batch[0]), batch[1]) + 0.1 * (m.beta**2).sum()


@pytest.mark.parametrize(
    ("order", "modules"),
    [
        ("wab", {"alpha": "weights", "beta": "weights"}),
        ("abw", {"alpha": "weights", "beta": "weights"}),
        ("awb", {"alpha": "beta", "beta": "weights"}),
        ("wab", {"alpha": None, "beta": None}),
        ("wab", {"alpha": None, "beta": "alpha"}),
    ],
    ids=["names", "names_before_the_module", "chain", "one_object", "object_and_name"],
)
@pytest.mark.parametrize("rollback", [False, True])
def test_levels_that_share_one_module(order, modules, rollback):
    factory, made = None not in modules.values(), []

    def make():
        made.append(Mixed())
        return made[-1]

    model = make if factory else Mixed()
    twin = Mixed()
    program = Program()
    options = {"accumulate": 2, "clip_norm": 0.3, "inner_steps": 2, "rollback": rollback}

    def declare(letter):
        if letter == "w":
            program.level(
                "weights",
                module=model,
                params=is_weight,
                optimizer=SGD_MOMENTUM,
                data=LOWS,
                **options,
            )(of_weights)
        else:
            name = {"a": "alpha", "b": "beta"}[letter]
            program.level(
                name,
                lower=["weights"],
                module=modules[name] or model,
                params=only(name),
                optimizer=ADAM,
                data=TOPS,
                hypergrad=NEUMANN,
                clip_norm=0.1,
            )({"a": of_alpha, "b": of_beta}[letter])

    for letter in order:
        declare(letter)
    run(program, 8)
    weights = [p for n, p in twin.named_parameters() if is_weight(n)]
    low = Side(lambda b: of_weights(twin, b), weights, SGD_MOMENTUM, LOWS, **options)
    alpha, beta = (
        Side(lambda b, loss=loss: loss(twin, b), [p], ADAM, TOPS, clip_norm=0.1)
        for loss, p in ((of_alpha, twin.alpha), (of_beta, twin.beta))
    )
    by_hand(low, alpha, beta, ticks=8, inner=2, rollback=rollback)
    shared = program.module("weights")
    assert program.module("alpha") is program.module("beta") is shared
    assert len(made) == int(factory)
    same(shared, twin)
    # two micro-batches at each of its own steps that stand, and none at the others'
    assert shared.norm.num_batches_tracked == (8 if rollback else 16)
    assert program.graph().reads["weights"] == ("alpha", "beta")
    for name, side in (("alpha", alpha), ("beta", beta)):
        assert_close(hypergradient(program, name), exact(side, low, [name]))


def test_a_chain_of_names_leads_to_its_own_module():
    program = Program()
    program.level("first", module=Mixed)(of_weights)
    program.level("last", module="middle", params=only("alpha"))(of_alpha)
    program.level("middle", module="owner", params=only("beta"))(of_beta)
    program.level("owner", module=Mixed, params=is_weight)(of_weights)
    modules = [program.module(name) for name in ("last", "middle", "owner")]
    assert modules[0] is modules[1] is modules[2] is not program.module("first")


def test_buffers_of_a_shared_module_are_those_of_its_weights():
    """Neither an upper nor a leaf that shares the module touches them."""
    program, model = Program(), Mixed()
    twin = copy.deepcopy(model.norm)
    inputs = []
    sgd = partial(SGD, lr=0.1)
    program.level("leaf", module="weights", params=only("beta"), optimizer=sgd, data=TOPS)(of_beta)
    program.level("weights", module=model, params=is_weight, optimizer=sgd, data=LOWS)(of_weights)
    program.level(
        "alpha",
        lower=["weights"],
        module="weights",
        params=only("alpha"),
        optimizer=sgd,
        data=TOPS,
        hypergrad="identity",
    )(of_alpha)

    @program.on("before_step", level="weights")
    def keep(batch, weights):
        a = weights.alpha.softmax(0)
        x = batch[0]
        inputs.append((a[0] * weights.net(x) + a[1] * x * weights.beta.sigmoid()).detach())

    run(program, 4)
    for value in inputs:
        twin(value)
    assert torch.equal(twin.running_mean, model.norm.running_mean)
    assert torch.equal(twin.running_var, model.norm.running_var)


def test_one_level_has_the_module_and_another_a_part_of_it():
    model = classifier()
    twin = copy.deepcopy(model)
    program = Program()

    def body_loss(m, batch):
        return F.cross_entropy(m(batch[0]), batch[1]) + 0.2 * sum(
            (p**2).sum() for p in m.parameters()
        )

    def head_loss(m, batch, body):
        return F.cross_entropy(body(batch[0]), batch[1]) + 0.1 * (m.weight**2).sum()

    program.level(
        "body",
        module=model,
        params=lambda name: name.startswith("0."),
        optimizer=SGD_MOMENTUM,
        data=LOWS,
    )(body_loss)
    program.level(
        "head", lower=["body"], module=model[2], optimizer=ADAM, data=TOPS, hypergrad=NEUMANN
    )(head_loss)
    run(program)
    low = Side(lambda b: body_loss(twin, b), twin[0].parameters(), SGD_MOMENTUM, LOWS)
    top = Side(lambda b: head_loss(twin[2], b, twin), twin[2].parameters(), ADAM, TOPS)
    by_hand(low, top)
    same(model, twin)
    assert_close(hypergradient(program, "head"), exact(top, low, ["weight", "bias"]))
    assert program.graph().reads == {"body": ("head",), "head": ("body",)}


def test_one_module_under_two_arguments():
    """``weights`` and ``alpha`` are one object, and both uses are differentiated."""
    program, model = Program(), Mixed()
    twin = copy.deepcopy(model)

    def low_loss(weights, batch, alpha):
        return of_weights(weights, batch) + 0.1 * (alpha.alpha.exp() * weights.skip[0, :2]).sum()

    def top_loss(alpha, batch, weights):
        return of_alpha(alpha, batch) + of_beta(weights, batch)

    program.level("weights", module=model, params=is_weight, optimizer=SGD_MOMENTUM, data=LOWS)(
        low_loss
    )
    program.level(
        "alpha",
        lower=["weights"],
        module="weights",
        params=only("alpha"),
        optimizer=ADAM,
        data=TOPS,
        hypergrad=NEUMANN,
    )(top_loss)
    run(program)
    weights = [p for n, p in twin.named_parameters() if is_weight(n)]
    low = Side(lambda b: low_loss(twin, b, twin), weights, SGD_MOMENTUM, LOWS)
    top = Side(lambda b: top_loss(twin, b, twin), [twin.alpha], ADAM, TOPS)
    by_hand(low, top)
    same(model, twin)
    assert model.norm.num_batches_tracked == 6


class Tied(nn.Module):
    """Encoder and decoder with one weight."""

    def __init__(self, size, out):
        super().__init__()
        self.encode = nn.Linear(size, size, dtype=torch.float64)
        self.decode = nn.Linear(size, size, dtype=torch.float64)
        self.head = nn.Linear(size, out, dtype=torch.float64)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(randn(*p.shape, seed=40 + i))
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.head(self.decode(self.encode(x).tanh()).tanh())


@pytest.mark.parametrize("where", ["low", "top"])
@pytest.mark.parametrize("params", [None, "predicate", "iterable"])
def test_tied_weights_are_one_parameter(where, params):
    tied = Tied(3, 2) if where == "low" else Tied(1, 1)
    modules = {"low": classifier(), "top": weigher(), where: tied}
    names = [n for n, _ in tied.named_parameters()]
    option = None
    if params == "predicate":
        names = ["encode.weight", "head.bias"]
        option = {f"{where}_params": only(*names)}
    elif params == "iterable":
        names = ["encode.weight", "decode.bias"]
        option = {f"{where}_params": tied.decode.parameters()}
    pair = {level: copy.deepcopy(module) for level, module in modules.items()}
    chosen = [dict(pair[where].named_parameters())[n] for n in names]
    clip = {f"{where}_clip_norm": 0.05}
    program = bilevel(
        low_module=modules["low"], top_module=modules["top"], **(option or {}), **clip
    )
    low, top = twins(pair["low"], pair["top"], **{f"{where}_parameters": chosen}, **clip)
    run(program)
    by_hand(low, top)
    for level in modules:
        same(modules[level], pair[level])
    assert tied.decode.weight is tied.encode.weight
    assert list(hypergradient(program, where)) == names
    if where == "top":
        assert_close(hypergradient(program), exact(top, low, names))


def test_a_module_that_holds_parameters_of_another_level():
    """An upper with an embedding tied to the lower level's reads it without naming it."""

    class Head(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first = first
            self.gain = nn.Parameter(randn(4, seed=9))

    def low_loss(m, batch, top):
        return of_weights(m, batch) + 0.2 * (top.gain.exp() * m[0].weight.sum(1) ** 2).sum()

    def top_loss(m, batch):
        return ((m.first(batch[0]).tanh() * m.gain).sum(1) - batch[1]).square().mean()

    model = classifier()
    head = Head(model[0])
    twin, other = copy.deepcopy((model, head))
    program = bilevel(
        low_loss,
        top_loss,
        low_module=model,
        low_reads=(),
        top_module=head,
        top_params=only("gain"),
        top_reads=(),
    )
    run(program)
    low = Side(lambda b: low_loss(twin, b, other), twin.parameters(), SGD_MOMENTUM, LOWS)
    top = Side(lambda b: top_loss(other, b), [other.gain], ADAM, TOPS)
    by_hand(low, top)
    same(model, twin)
    same(head, other)
    assert program.graph().reads == {"low": ("top",), "top": ("low",)}
    assert_close(hypergradient(program), exact(top, low, ["gain"]))


# optimizer groups


def grouped_sgd(model):
    named = dict(model.named_parameters())
    groups = [
        {"params": [named["0.bias"], named["2.weight"]], "lr": 0.3, "momentum": 0.5},
        {"params": [named["0.weight"]], "weight_decay": 0.2},
        {"params": [named["2.bias"]], "lr": 0.02, "nesterov": True, "momentum": 0.8},
    ]
    return SGD(groups, lr=0.1)


def grouped_adamw(model):
    named = dict(model.named_parameters())
    groups = [
        {"params": [named["2.weight"]], "lr": 0.05, "betas": (0.5, 0.9)},
        {"params": [named["0.bias"], named["0.weight"]], "weight_decay": 0.3},
        {"params": [named["2.bias"]], "lr": 0.2, "amsgrad": True},
    ]
    return AdamW(groups, lr=0.02)


def per_group(optimizer):
    return LambdaLR(
        optimizer, [lambda n: 0.9**n, lambda n: 1.0 / (1 + n), lambda n: float(n % 3 != 1)]
    )


def of_module(make):
    def optimizer(module):
        assert isinstance(module, nn.Module)
        return make(module)

    return optimizer


def keyword_only(make):
    def optimizer(*, module):
        return make(module)

    return optimizer


def bound(make):
    def optimizer(module, how):
        return how(module)

    return partial(optimizer, how=make)


class OfModule:
    def __init__(self, make):
        self.make = make

    def __call__(self, module):
        return self.make(module)


def of_parameters(make):
    """From the list of parameters: a module is made of it again."""

    def optimizer(params):
        names = ("0.weight", "0.bias", "2.weight", "2.bias")
        listed = nn.Module()
        listed.named_parameters = lambda: zip(names, params, strict=True)
        return make(listed)

    return optimizer


GROUPINGS = {
    "instance": None,
    "function_of_module": of_module,
    "keyword_only": keyword_only,
    "partial": bound,
    "object": OfModule,
    "function_of_parameters": of_parameters,
}


@pytest.mark.parametrize("where", ["low", "top"])
@pytest.mark.parametrize("make", [grouped_sgd, grouped_adamw])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_are_kept_by_optimizer_scheduler_and_clipping(grouping, make, where):
    modules = {"low": classifier(), "top": weigher()}
    pair = {level: copy.deepcopy(module) for level, module in modules.items()}
    wrap = GROUPINGS[grouping]
    optimizer = make(modules[where]) if wrap is None else wrap(make)
    options = {
        f"{where}_scheduler": per_group,
        f"{where}_accumulate": 2,
        f"{where}_clip_norm": 0.05,
    }
    program = bilevel(
        low_module=modules["low"],
        top_module=modules["top"],
        low_inner_steps=2,
        low_warmup=1,
        top_repeat=2,
        **{f"{where}_optimizer": optimizer},
        **options,
    )
    seen = []
    program.on("after_step", level=where)(lambda optimizer: seen.append(optimizer))
    result = run(program, 9)
    low, top = twins(
        pair["low"],
        pair["top"],
        **{f"{where}_optimizer": lambda params: make(pair[where])},
        **options,
    )
    by_hand(low, top, ticks=9, inner=2, warmup=1, repeat=2)
    for level in modules:
        same(modules[level], pair[level])
    twin = {"low": low, "top": top}[where]
    assert (seen[-1] is optimizer) == (wrap is None)
    for mine, other in zip(seen[-1].param_groups, twin.optimizer.param_groups, strict=True):
        assert len(mine.pop("params")) == len(other.pop("params"))
        assert mine == other
    first = make(modules[where]).param_groups[0]["lr"]
    rates = [r.learning_rate for r in result.history.of(where)]
    assert rates == pytest.approx([first * 0.9**n for n in range(len(rates))])


@pytest.mark.parametrize("grouping", ["instance", "function_of_module"])
@pytest.mark.parametrize("make", [grouped_sgd, grouped_adamw])
def test_rollback_restores_every_group(grouping, make):
    model, net = classifier(), weigher()
    twin, other = copy.deepcopy((model, net))
    options = {"low_scheduler": per_group, "low_accumulate": 2, "low_clip_norm": 0.05}
    program = bilevel(
        low_module=model,
        top_module=net,
        low_optimizer=make(model) if grouping == "instance" else of_module(make),
        low_inner_steps=3,
        low_warmup=2,
        low_rollback=True,
        **options,
    )
    result = run(program, 11)
    low, top = twins(twin, other, low_optimizer=lambda params: make(twin), **options)
    by_hand(low, top, ticks=11, inner=3, warmup=2, rollback=True)
    same(model, twin)
    same(net, other)
    # the repeated steps are not recorded
    assert len(result.history.of("low")) == 11


def test_groups_of_a_shared_module_and_of_a_selection():
    model = Mixed()
    twin = copy.deepcopy(model)

    def make(module):
        named = dict(module.named_parameters())
        rest = [p for n, p in named.items() if is_weight(n) and n != "skip"]
        return SGD([{"params": [named["skip"]], "lr": 0.4}, {"params": rest}], lr=0.05)

    program = Program()
    program.level("weights", module=model, params=is_weight, optimizer=of_module(make), data=LOWS)(
        of_weights
    )
    program.level(
        "alpha",
        lower=["weights"],
        module="weights",
        params=only("alpha"),
        optimizer=Adam([model.alpha], lr=0.03),
        data=TOPS,
        hypergrad=NEUMANN,
    )(of_alpha)
    run(program)
    weights = [p for n, p in twin.named_parameters() if is_weight(n)]
    low = Side(lambda b: of_weights(twin, b), weights, lambda params: make(twin), LOWS)
    top = Side(lambda b: of_alpha(twin, b), [twin.alpha], ADAM, TOPS)
    by_hand(low, top)
    same(model, twin)


def test_an_instance_goes_on_with_its_state_in_a_second_run():
    model, net = classifier(), weigher()
    twin, other = copy.deepcopy((model, net))
    program = bilevel(low_module=model, top_module=net, low_optimizer=grouped_sgd(model))
    low, top = twins(twin, other, low_optimizer=lambda params: grouped_sgd(twin))
    for _ in range(2):
        run(program, 3)
        by_hand(low, top, ticks=3)
        # the data start anew, and a factory makes a fresh optimizer
        low.data, top.data = cycle(LOWS), cycle(TOPS)
        top.optimizer = ADAM(other.parameters())
    same(model, twin)
    same(net, other)


# fields

Named = namedtuple("Named", "y x factor")
FACTORS = [1.0, 0.5, 2.0]


def parts(number):
    x, y = LOWS[number]
    return {"x": x, "y": y, "factor": FACTORS[number]}


def keyed(kind, *order):
    return lambda p: kind((key, p[key]) for key in order)


BATCHES = {
    "tuple": (("x", "y", "factor"), lambda p: (p["x"], p["y"], p["factor"])),
    "list_in_another_order": (("factor", "x", "y"), lambda p: [p["factor"], p["x"], p["y"]]),
    "namedtuple": (("y", "x", "factor"), lambda p: Named(p["y"], p["x"], p["factor"])),
    "named_otherwise": (("factor", "y", "x"), lambda p: Named(p["factor"], p["y"], p["x"])),
    "dict": (("x", "y", "factor"), keyed(dict, "factor", "y", "x")),
    "ordered_dict": (("y", "factor", "x"), keyed(OrderedDict, "x", "factor", "y")),
    "user_dict": (("y", "factor", "x"), keyed(UserDict, "x", "y", "factor")),
    "dict_with_more": (
        ("factor", "x", "y"),
        lambda p: {"id": 3, "y": p["y"], "x": p["x"], "w": p["y"], "factor": p["factor"]},
    ),
    "tuple_with_a_part_unused": (
        ("id", "y", "x", "factor"),
        lambda p: (p["x"].sum(1), p["y"], p["x"], p["factor"]),
    ),
}


def by_parts(model, y, net, factor, x):
    return factor * weighted(model, (x, y), net)


def reads_scaled(net, model, y, x):
    return clean(net, (x, y), model)


@pytest.mark.parametrize("kind", BATCHES)
def test_fields_give_each_argument_its_part_of_every_micro_batch(kind):
    fields, build = BATCHES[kind]
    program = bilevel(
        by_parts,
        reads_scaled,
        low_data=[build(parts(i)) for i in range(3)],
        low_fields=fields,
        low_accumulate=2,
        top_data=[(y, x) for x, y in TOPS],
        top_fields=("y", "x"),
        top_accumulate=2,
    )
    run(program)
    model, net = classifier(), weigher()
    low, top = twins(
        model,
        net,
        low=lambda model, i, net: FACTORS[i] * weighted(model, LOWS[i], net),
        low_data=range(3),
        low_accumulate=2,
        top_accumulate=2,
    )
    by_hand(low, top)
    same(program.module("low"), model)
    same(program.module("top"), net)
    names = [n for n, _ in net.named_parameters()]
    assert_close(hypergradient(program), exact(top, low, names))


# reads


@pytest.mark.parametrize("fields", [True, False], ids=["fields", "loaders"])
@pytest.mark.parametrize(
    ("reads", "names"),
    [
        ({"first": "a", "second": "b"}, ("first", "second")),
        ({"b": "a", "a": "b"}, ("b", "a")),
        ({"a": "a", "b": "b"}, ("a", "b")),
        ({"batch": "a", "ctx": "b"}, ("batch", "ctx")),
        ({"y": "a", "b": "b"}, ("y", "b")),
        ({"y": "a", "low": "b"}, ("y", "low")),
        ({"other": "a"}, ("other", "b")),
    ],
    ids=["other_names", "names_crossed", "own_names", "reserved", "of_a_field", "own_name", "some"],
)
def test_reads_as_a_mapping_say_which_level_an_argument_is(reads, names, fields):
    loss = {}
    exec(
        f"def low(m, {names[1]}, x, {names[0]}):\n"
        f"    p, q = {names[0]}.x, {names[1]}.x\n"
        "    return ((m.x - p * x) ** 2).sum() + (q.exp() * m.x ** 2).sum()",
        loss,
    )
    program, sgd = Program(), partial(SGD, lr=0.1)
    xs = [randn(3, seed=i) for i in range(3)]
    start = {n: randn(3, seed=10 + i) for i, n in enumerate(("low", "a", "b"))}
    program.level(
        "low",
        module={"x": start["low"]},
        optimizer=sgd,
        reads=reads,
        **(
            {"data": [(x, 0) for x in xs], "fields": ("x", "y")}
            if fields
            else {"data": {"y": [0], "x": xs}}
        ),
    )(loss["low"])
    for name in ("a", "b"):
        program.level(
            name, lower=["low"], module={"x": start[name]}, optimizer=sgd, hypergrad=NEUMANN
        )(lambda m, low: ((low.x - 1) ** 2).sum() + (m.x**2).sum())
    run(program, 5)
    w, p, q = (nn.Parameter(start[n].clone()) for n in ("low", "a", "b"))

    def low_loss(x):
        return ((w - p * x) ** 2).sum() + (q.exp() * w**2).sum()

    low = Side(low_loss, [w], sgd, xs)
    tops = [
        Side(lambda _, v=v: ((w - 1) ** 2).sum() + (v**2).sum(), [v], sgd, [None]) for v in (p, q)
    ]
    by_hand(low, *tops, ticks=5)
    for name, value in (("low", w), ("a", p), ("b", q)):
        assert torch.allclose(program.module(name).x, value, rtol=1e-10), name


@pytest.mark.parametrize("kind", [list, tuple, set, iter])
@pytest.mark.parametrize("named", [False, True])
def test_reads_as_an_iterable_declare_what_a_closure_uses(kind, named):
    """Two global modules, in every pass of the run; one of them may be an argument too."""
    model, net, extra = classifier(), weigher(), nn.ParameterDict({"g": nn.Parameter(randn(1))})
    twin, twin_net, twin_extra = copy.deepcopy((model, net, extra))

    def with_gain(m, batch, n, e):
        return weighted(m, batch, n) + (e.g.exp() * m[0].bias ** 2).sum()

    def closed(batch):
        return with_gain(model, batch, net, extra)

    def half_closed(m, batch, extra):
        return with_gain(m, batch, net, extra)

    program = bilevel(
        half_closed if named else closed,
        lambda m, batch: clean(m, batch, model),
        low_module=model,
        low_reads=kind(["top", "extra"]),
        top_module=net,
        top_reads=kind(["low"]),
    )
    program.level(
        "extra",
        lower=["low"],
        module=extra,
        optimizer=SGD_MOMENTUM,
        data=TOPS,
        reads=kind(["low"]),
        hypergrad=NEUMANN,
    )(lambda batch: clean(extra, batch, model))
    run(program)
    low, top = twins(twin, twin_net, low=lambda m, b, n: with_gain(m, b, n, twin_extra))
    third = Side(lambda b: clean(twin_extra, b, twin), twin_extra.parameters(), SGD_MOMENTUM, TOPS)
    by_hand(low, top, third)
    same(model, twin)
    same(net, twin_net)
    same(extra, twin_extra)


# data


class ByIndex:
    def __getitem__(self, index):
        return LOWS[index]


class NoLength:
    def __iter__(self):
        yield from LOWS


class WithLength(NoLength):
    def __len__(self):
        return 3


class CallableToo(NoLength):
    def __call__(self):
        raise AssertionError("an iterable is no factory")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(LOWS)


def generating():
    yield from LOWS


FORMS = {
    "list": lambda: LOWS,
    "tuple": lambda: tuple(LOWS),
    "with_length": WithLength,
    "without_length": NoLength,
    "by_index": ByIndex,
    "iterable_that_can_be_called": CallableToo,
    "loader": lambda: DataLoader(LOWS, batch_size=None),
    "loader_with_collation": lambda: DataLoader(
        [(x, y) for xs, ys in LOWS for x, y in zip(xs, ys, strict=True)], batch_size=6
    ),
    "loader_without_length": lambda: DataLoader(Stream(), batch_size=None),
    "batches_as_lists": lambda: [list(batch) for batch in LOWS],
    "factory": lambda: lambda: LOWS,
    "factory_of_a_loader": lambda: lambda: DataLoader(LOWS, batch_size=None),
    "factory_of_no_length": lambda: NoLength,
    "factory_of_an_iterator": lambda: lambda: iter(LOWS),
    "factory_of_a_map": lambda: lambda: map(tuple, LOWS),
    "generator_function": lambda: generating,
    "partial_of_a_generator_function": lambda: partial(generating),
}


WITH_LENGTH = (
    *("list", "tuple", "with_length", "loader", "loader_with_collation", "batches_as_lists"),
    *("factory", "factory_of_a_loader"),
)


@pytest.mark.parametrize("product", ["reverse", "reverse_over_forward", "difference", "auto"])
def test_every_product_is_the_mean_over_the_micro_batches(product):
    program = bilevel(low_accumulate=3, top_accumulate=2)
    model, net = classifier(), weigher()
    low, top = twins(model, net, low_accumulate=3, top_accumulate=2)
    low.draw()
    top.draw()
    found = mlodeco.hypergradient(
        "top", program=program, hypergrad=Dense(product=product, damping=0.7)
    )
    wanted = exact(top, low, list(found), damped(0.7))
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("where", ["low", "top"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_run(form, where):
    """Micro-batches go on over the end of a pass."""
    options = {f"{where}_accumulate": 2}
    program = bilevel(**{f"{where}_data": FORMS[form]()}, **options, low_inner_steps=2)
    ends = []
    program.on("epoch_end", level=where)(lambda ctx: ends.append((ctx.step, ctx.epoch)))
    result = run(program, 8)
    model, net = classifier(), weigher()
    low, top = twins(model, net, **{f"{where}_data": LOWS}, **options)
    by_hand(low, top, ticks=8, inner=2)
    same(program.module("low"), model)
    same(program.module("top"), net)
    assert result.history.losses(where) == pytest.approx({"low": low, "top": top}[where].losses)
    names = [n for n, _ in net.named_parameters()]
    assert_close(hypergradient(program), exact(top, low, names))
    with_length = [(2, 1), (3, 2), (5, 3), (6, 4), (8, 5)]
    without = [(2, 1), (4, 2), (5, 3), (7, 4), (8, 5)]
    wanted = with_length if form in WITH_LENGTH else without
    assert ends == [end for end in wanted if end[0] <= len(result.history.of(where))]


@pytest.mark.parametrize("by", ["names", "batch"])
def test_the_loaders_of_a_mapping_go_each_at_its_own_pace(by):
    others = batches(5, 3)

    class Others:
        def __iter__(self):
            return iter(others)

    def mixed(model, noisy, pool, clean, net):
        return weighted(model, clean, net) + weighted(model, noisy, net) * pool[0].square().mean()

    def by_batch(model, batch, net):
        assert list(batch) == ["noisy", "clean", "pool"]
        return mixed(model, batch["noisy"], batch["pool"], batch["clean"], net)

    def top_loss(net, y, model, x):
        return clean(net, (x, y), model)

    program = bilevel(
        mixed if by == "names" else by_batch,
        top_loss,
        low_data={"noisy": lambda: iter(TOPS), "clean": LOWS, "pool": Others()},
        low_accumulate=2,
        low_inner_steps=2,
        low_rollback=True,
        top_data={
            "x": DataLoader([x for x, _ in TOPS], batch_size=None),
            "y": lambda: [y for _, y in TOPS] + [1 - TOPS[0][1]],
        },
    )
    run(program, 14)
    model, net = classifier(), weigher()
    low, top = twins(
        model,
        net,
        low=lambda model, i, net: mixed(model, TOPS[i % 2], others[i % 5], LOWS[i % 3], net),
        top=lambda net, i, model: top_loss(
            net, [TOPS[0][1], TOPS[1][1], 1 - TOPS[0][1]][i % 3], model, TOPS[i % 2][0]
        ),
        low_data=range(30),
        low_accumulate=2,
        top_data=range(6),
    )
    by_hand(low, top, ticks=14, inner=2, rollback=True)
    same(program.module("low"), model)
    same(program.module("top"), net)
    names = [n for n, _ in net.named_parameters()]
    assert_close(hypergradient(program), exact(top, low, names))


def test_epochs_of_a_mapping_are_those_of_its_first_loader():
    """And ``epoch_end`` comes with the end of any."""
    seen, ends = [], []

    def low_loss(model, a, b, net, ctx):
        seen.append((ctx.tick, ctx.epoch))
        return weighted(model, a, net) + weighted(model, b, net)

    program = bilevel(low_loss, low_data={"a": LOWS, "b": TOPS}, low_accumulate=2)
    program.on("epoch_end", level="low")(lambda ctx: ends.append((ctx.step, ctx.epoch)))
    run(program, 7)
    # a ends with the micro-batches 3, 6, 9, ..., and b with each second one
    assert dict(seen) == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3, 6: 3, 7: 4}
    assert ends == [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (6, 4), (7, 4)]


def test_epoch_ends_with_any_loader_of_a_mapping():
    ends = []
    program = bilevel(
        lambda model, a, b, net: weighted(model, a, net) + weighted(model, b, net),
        low_data={"b": batches(5, 4), "a": LOWS},
    )
    program.on("epoch_end", level="low")(lambda ctx: ends.append((ctx.step, ctx.epoch)))
    run(program, 10)
    assert ends == [(3, 0), (5, 1), (6, 1), (9, 1), (10, 2)]


def test_a_generator_function_is_asked_anew_for_each_pass():
    asked = []

    def generate():
        asked.append(None)
        yield from (LOWS if len(asked) % 2 else TOPS)

    program = bilevel(low_data=generate)
    run(program, 9)
    model, net = classifier(), weigher()
    low, top = twins(model, net)
    low.data = cycle([*LOWS, *TOPS])
    by_hand(low, top, ticks=9)
    same(program.module("low"), model)


def test_levels_may_share_a_loader_and_each_has_its_own_place_in_it():
    loader = DataLoader(LOWS, batch_size=None)
    program = bilevel(low_data=loader, top_data=loader, low_inner_steps=2)
    run(program)
    model, net = classifier(), weigher()
    low, top = twins(model, net, top_data=LOWS)
    by_hand(low, top, inner=2)
    same(program.module("low"), model)
    same(program.module("top"), net)


def test_last_batches_are_kept_by_a_declaration_after_the_run():
    program = bilevel()
    run(program, 2)
    before = hypergradient(program)
    program.level("other", module=weigher, data=LOWS)(lambda m, batch: clean(m, batch, m))
    after = hypergradient(program)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_data_is_the_same_loss_at_each_step(accumulate):
    def low_loss(model, net):
        return weighted(model, LOWS[0], net)

    def top_loss(net, model):
        return clean(net, TOPS[0], model)

    program = bilevel(low_loss, top_loss, low_data=None, top_data=None, low_accumulate=accumulate)
    run(program)
    model, net = classifier(), weigher()
    low, top = twins(model, net, low_data=LOWS[:1], top_data=TOPS[:1])
    by_hand(low, top)
    same(program.module("low"), model)
    same(program.module("top"), net)
    names = [n for n, _ in net.named_parameters()]
    assert_close(hypergradient(program), exact(top, low, names))


def test_the_first_inner_loop_starts_after_the_warmup():
    starts = []
    program = bilevel(low_warmup=2, low_inner_steps=2)
    program.on("loop_start", level="low")(lambda ctx: starts.append(ctx.tick))
    run(program, 7)
    assert starts == [3, 5, 7]
