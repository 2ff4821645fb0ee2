"""Validations: metrics in eval mode, the best of them, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mlodeco.calculus.precision import autocasting
from mlodeco.calculus.randomness import preserved_randomness
from mlodeco.declare.records import ValidationDeclaration
from mlodeco.errors import DataError, LossError, counted, did_you_mean, quoted
from mlodeco.runtime.build import Build
from mlodeco.runtime.context import Context
from mlodeco.runtime.data import Placer, Where, count_samples, open_source
from mlodeco.runtime.fsdp import gathered
from mlodeco.runtime.generators import preserved_generators
from mlodeco.runtime.history import as_number
from mlodeco.runtime.hooks import bind_validation, describe_validation
from mlodeco.runtime.modules import preserved_modes
from mlodeco.runtime.position import guarded_workers
from mlodeco.runtime.processes import Apart, Processes
from mlodeco.runtime.shares import share_all


def _summed(found: list[dict[str, float]]) -> dict[str, float]:
    """The sums over processes, in their order: the same on all of them."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: sum(one.get(name, 0.0) for one in found) for name in names}


def _mean_of_all(found: list[dict[str, float]]) -> dict[str, float]:
    """The means over the processes that have a metric; of equal values that value."""
    values: dict[str, list[float]] = {}
    for one in found:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    return {
        name: all_[0] if len(set(all_)) == 1 else sum(all_) / len(all_)
        for name, all_ in values.items()
    }


class Validation:
    """One validation function in a run."""

    def __init__(
        self,
        declaration: ValidationDeclaration,
        built: Build,
        place: Placer,
        processes: Processes,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.declaration = declaration
        self._dtype = dtype
        self._processes = processes
        self._modules: dict[str, nn.Module] = {n: lv.module for n, lv in built.levels.items()}
        self._arguments = bind_validation(declaration, built.levels)
        self._place = place
        self._where = Where(str(declaration.site), None)
        self._source = (
            None
            if declaration.data is None
            else share_all(open_source(declaration.data, self._where), processes)
        )
        self.last_tick = 0
        self.best: float | None = None
        self.without_best = 0

    def run(self, ctx: Context) -> dict[str, float]:
        """The metrics now; modes, random numbers and gradients are as before afterwards."""
        generators = preserved_generators(self.declaration.data)
        with preserved_modes(self._modules.values()):
            for module in self._modules.values():
                for child in module.modules():
                    child.training = False
            with preserved_randomness(), generators, torch.no_grad(), self._shown_whole():
                return self._measure(ctx)

    def _shown_whole(self) -> AbstractContextManager[Any]:
        """Sharded modules whole where processes call them for batches that differ in number."""
        if self._source is None:
            return nullcontext()
        return gathered(m for name, m in self._modules.items() if name in self._arguments)

    def _measure(self, ctx: Context) -> dict[str, float]:
        if self._source is None:
            return _mean_of_all(self._processes.exchange(self._call({"ctx": ctx})))
        apart = Context(
            tick=ctx.tick,
            device=ctx.device,
            generator=ctx.generator,
            accelerator=ctx.accelerator,
            processes=Apart(self._processes),
        )
        sums: dict[str, float] = {}
        samples = 0
        with guarded_workers(self._source):
            for raw in self._source:
                batch = self._place(raw)
                size = count_samples(batch)
                samples += size
                for name, value in self._call({"ctx": apart, "batch": batch}).items():
                    sums[name] = sums.get(name, 0.0) + size * value
        ctx.adopt(apart)
        found = self._processes.exchange([sums, samples])
        sums, samples = _summed([one for one, _ in found]), sum(size for _, size in found)
        if not samples:
            raise self._where.error(
                f"the data of {describe_validation(self.declaration)} are empty.",
                "give at least one batch as data=.",
            )
        return {name: value / samples for name, value in sums.items()}

    def _call(self, offered: Mapping[str, Any]) -> dict[str, float]:
        values = {**self._modules, **offered}
        device = offered["ctx"].device.type
        with autocasting(self._dtype, device):
            found = self.declaration.function(**{name: values[name] for name in self._arguments})
        site, what = str(self.declaration.site), describe_validation(self.declaration)
        if not isinstance(found, Mapping):
            raise LossError(
                f"{what} returned {type(found).__name__}.",
                expected="a dictionary of metrics.",
                remedy="return {'accuracy': value}.",
                site=site,
            )
        metrics: dict[str, float] = {}
        for name, value in found.items():
            number = as_number(value)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise LossError(
                    f"the metric {name!r} of {what} is a {type(value).__name__}.",
                    expected="a number.",
                    remedy="return numbers or tensors of one element.",
                    site=site,
                )
            try:
                metrics[str(name)] = float(number)
            except OverflowError:  # an integer beyond the floats
                metrics[str(name)] = math.inf if number > 0 else -math.inf
        return metrics

    def judge(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are the best so far; counts the validations without a best.

        Raises:
            DataError: the monitored metric is not among them.
        """
        name = self.declaration.monitor
        if name is None:
            return False
        if name not in metrics:
            raise DataError(
                f"monitor={name!r} is not among the metrics of "
                f"{describe_validation(self.declaration)}.",
                expected=f"one of {quoted(metrics)}.",
                remedy=f"return it, or correct monitor=.{did_you_mean(name, metrics)}",
                site=str(self.declaration.site),
            )
        value = metrics[name]
        sign = 1.0 if self.declaration.mode == "min" else -1.0
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best):
            self.best, self.without_best = value, 0
            return True
        self.without_best += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """What it compares with."""
        names = ("last_tick", "best", "without_best")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from that state."""
        self.last_tick, self.best = state["last_tick"], state["best"]
        self.without_best = state["without_best"]

    @property
    def is_exhausted(self) -> bool:
        """Whether the patience has run out."""
        patience = self.declaration.patience
        return patience is not None and self.without_best >= patience

    @property
    def why_exhausted(self) -> str:
        """What was waited for in vain."""
        sought = "smaller" if self.declaration.mode == "min" else "larger"
        times = counted(self.without_best, "validation")
        return f"{self.declaration.monitor!r} has not become {sought} in {times}"
