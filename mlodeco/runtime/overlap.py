"""The ordinary passes of one level, during which torch's DDP averages gradients already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from mlodeco.runtime.build import BuiltLevel
from mlodeco.runtime.processes import Processes, SeveralProcesses

_OWN = ("broadcast_buffers", "find_unused_parameters", "static_graph")
"""Options that are not a person's: there are no buffers, and what a loss touches may change."""


class Passes:
    """The ordinary passes of a level in this process alone.

    Args:
        level: the level.
    """

    def __init__(self, level: BuiltLevel) -> None:
        self._level = level

    def call(self, items: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The loss and its metrics, as of :meth:`StatelessLoss.call`."""
        return self._level.loss.call(items)

    def kept_local(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Where gradients are summed up; those of the last micro-batch end it."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds to ``.grad``."""
        torch.autograd.backward(loss, inputs=list(self._level.parameters.values()))

    def take_loss(self) -> float | None:
        """The mean over processes and micro-batches, if it has come with the gradients."""
        return None


class Overlap(Passes):
    """The ordinary passes of a level, whose gradients DDP averages in buckets as they come.

    DDP sees the level's own parameters alone, so that modules shared or read stay out of it, and
    all buffers. It waits for its buckets in C++, where nobody looks whether another process has
    failed; so a callback that the backward pass calls before waits for them.

    Args:
        level: the level.
        processes: those that average.
        given: how a person wants DDP to be; its bucket size, views and communication hook.
    """

    def __init__(
        self,
        level: BuiltLevel,
        processes: SeveralProcesses,
        given: DistributedDataParallelKwargs | None,
    ) -> None:
        super().__init__(level)
        self._processes = processes
        self._module = _OfOwnParameters(level)
        self._inputs = list(self._module.parameters())
        options = {} if given is None else given.to_kwargs()
        self._ddp = DistributedDataParallel(
            self._module,
            init_sync=False,
            find_unused_parameters=True,
            **{name: value for name, value in options.items() if name not in _OWN},
        )
        self._reduction = reduction = _Reduction(processes)
        if given is not None:
            given.register_comm_hook(reduction)
        # not a method of this object: no cycle that leads through C++ is ever collected
        self._ddp.register_comm_hook(None, lambda _, bucket: reduction.begin(bucket))

    def call(self, items: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The loss and its metrics."""
        loss: Tensor = self._ddp(items)
        return loss, self._module.metrics

    def kept_local(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Nothing is averaged before the last micro-batch."""
        return nullcontext() if is_last else self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds to ``.grad``, which the last micro-batch's pass averages.

        Raises:
            RunError: another process has failed, or is gone.
        """
        reduction = self._reduction
        reduction.is_over = False
        try:
            torch.autograd.backward(loss, inputs=self._inputs)
        except RuntimeError as error:
            if reduction.is_over:  # a collective of DDP's own, behind the buckets
                raise self._processes.why_lost(error) from error
            raise
        finally:
            reduction.begun.clear()
        if reduction.is_over:
            self._processes.await_device()

    def take_loss(self) -> float:
        """The mean, which the gradient of the tally holds."""
        tally = self._module.tally
        grad, tally.grad = tally.grad, None
        if grad is None:
            raise RuntimeError("no gradients have been averaged")
        total, weight = grad.tolist()
        return float(total / weight)


class _Reduction:
    """The buckets of one backward pass.

    Attributes:
        begun: for each bucket what waits for it.
        is_over: whether all have come.
    """

    def __init__(self, processes: SeveralProcesses) -> None:
        self._processes = processes
        self._average: Callable[[Any], Future[Tensor]] = self._mean
        self.begun: list[Callable[[], None]] = []
        self.is_over = False

    def register_comm_hook(self, state: Any, hook: Callable[[Any, Any], Future[Tensor]]) -> None:
        """Takes the hook of a person, as DDP would."""
        self._average = partial(self._hooked, partial(hook, state))

    def begin(self, bucket: Any) -> Future[Tensor]:
        """Begins to average a bucket."""
        if not self.begun:
            # called before DDP's own, which it queues behind its last bucket
            torch.autograd.Variable._execution_engine.queue_callback(self._wait)
        with self._processes.explained():
            return self._average(bucket)

    def _mean(self, bucket: Any) -> Future[Tensor]:
        """The mean in a future of our own: torch's would call Python from a thread of its own."""
        average: Tensor = bucket.buffer()
        work = self._processes.begin_mean(average)
        devices: list[int | str | torch.device] = [average.device] if average.is_cuda else []
        future: Future[Tensor] = Future(devices=devices)

        def finish() -> None:
            self._processes.await_work(work)
            future.set_result(average)

        self.begun.append(finish)
        return future

    def _hooked(self, hook: Callable[[Any], Future[Tensor]], bucket: Any) -> Future[Tensor]:
        future = hook(bucket)
        self.begun.append(partial(self._processes.await_future, future))
        return future

    def _wait(self) -> None:
        for wait in self.begun:
            wait()
        self.is_over = True


class _OfOwnParameters(nn.Module):
    """A level's loss as a module of the level's own parameters, and of a tally at zero.

    The tally's gradient is the loss and one: so their mean comes with the last bucket, and every
    process has some gradient to begin with, whatever its loss touches.
    """

    def __init__(self, level: BuiltLevel) -> None:
        super().__init__()
        self._call = level.loss.call
        self.owned = nn.ParameterList(level.parameters.values())
        some = next(iter(self.owned))
        dtype = torch.promote_types(some.dtype, torch.float32)
        self.tally = nn.Parameter(some.new_zeros(2, dtype=dtype))
        # torch says in each process that there was no need to look, where all are touched
        self.untouched = nn.Parameter(some.new_zeros(1))
        self.metrics: dict[str, Any] = {}

    def forward(self, items: Mapping[str, Any]) -> Tensor:
        loss, self.metrics = self._call(items)
        known = loss.detach()
        return loss + (self.tally * torch.stack([known, torch.ones_like(known)])).sum()


def passes_of(
    level: BuiltLevel, processes: Processes, given: DistributedDataParallelKwargs | None
) -> Passes:
    """The passes of a level that has its first gradients: DDP's where it serves.

    That is in several processes, unless one has gradients that are sparse or sharded.
    """
    if not isinstance(processes, SeveralProcesses):
        return Passes(level)
    found = [p.grad for p in level.parameters.values() if p.grad is not None]
    is_odd = any(type(grad) is not Tensor or grad.is_sparse for grad in found)
    is_refused = processes.first_with(is_odd) is not None
    return Passes(level) if is_refused else Overlap(level, processes, given)
