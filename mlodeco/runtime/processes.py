"""The processes of a run, and everything that they tell each other."""

from __future__ import annotations

import atexit
import json
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from threading import Event
from time import monotonic, sleep
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.futures import Future

from mlodeco.calculus.mean import Mean, Trees
from mlodeco.errors import MlodecoWarning, RunError, did_you_mean, quoted
from mlodeco.runtime.board import Board
from mlodeco.runtime.buckets import pack, pack_bytes, unpack, unpack_bytes
from mlodeco.tree import Tree

REDUCTIONS = ("exact", "once")
"""What ``reduce=`` may be."""

_LOOK = 0.25
"""Seconds between looks whether another process has failed, in a collective that takes long."""

_numbers = count()
"""Numbers of the runs, the same in all processes."""

_sent: deque[weakref.ref[Tensor]] = deque(maxlen=16)
"""What the newest collectives carry, as long as a thread of theirs holds it."""


@atexit.register
def _let_go() -> None:
    """Waits for threads to drop what they carried, which needs an interpreter that still runs.

    A process that exits before is aborted by torch 2.13.
    """
    until = monotonic() + 2.0
    while any(tensor() is not None for tensor in _sent) and monotonic() < until:
        sleep(0.001)


class Processes:
    """One process, which has nobody to talk to; several are :class:`SeveralProcesses`.

    Attributes:
        count: how many there are.
        rank: the number of this one.
        is_main: whether it is the one that prints.
        collectives: how many this one has taken part in.
    """

    count = 1
    rank = 0
    is_main = True
    collectives = 0

    @property
    def mean(self) -> Mean | None:
        """The mean over processes; None for one process."""
        return None

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites tensors with those of the main process."""

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; they are such that JSON can hold."""
        return [value]

    def first_with(self, flag: bool) -> int | None:
        """The first process whose flag is set, on all of them."""
        return 0 if flag else None

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, along the first dimension."""
        return tensor

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Where somebody else's code makes collectives."""
        yield

    @contextmanager
    def ended_together(self) -> Iterator[None]:
        """Ends all processes by an error of one."""
        yield


class Apart(Processes):
    """The processes of a run where they call a function, but not equally often.

    Args:
        processes: these.
    """

    def __init__(self, processes: Processes) -> None:
        self.rank, self.count, self.is_main = processes.rank, processes.count, processes.is_main

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor, in one process.

        Raises:
            RunError: there are several, which might wait for each other without end.
        """
        if self.count == 1:
            return tensor
        raise RunError(
            "ctx.gather in a validation with data=, of which processes may have different "
            "numbers of batches.",
            expected="metrics of the batch at hand, which are averaged over all processes.",
            remedy="return them without gathering, or leave data= out of @validate, iterate over "
            "the data in the function and gather behind that.",
        )


class SeveralProcesses(Processes):
    """Processes that talk by the collectives of torch's default group.

    Each waits for a collective in slices, between which it looks whether another process has
    failed: so none waits for one that will not come.

    Args:
        rank: this process.
        number: all of them.
        device: where its tensors are.
    """

    def __init__(self, rank: int, number: int, device: torch.device) -> None:
        self.rank, self.count, self.is_main = rank, number, rank == 0
        self.collectives = 0
        self._device = device
        store = distributed.distributed_c10d._get_default_store()
        prefix = f"mlodeco/{next(_numbers)}"
        self._board = Board(PrefixStore(prefix, store), rank, number)

    @property
    def mean(self) -> Mean | None:
        """The mean over processes."""
        return self._mean

    def _mean(self, trees: Trees, like: Trees) -> list[Tree]:
        """One all-reduce of one flat bucket."""
        bucket = pack(trees, like)
        self.await_work(self.begin_mean(bucket))
        return unpack(bucket, like)

    def mean_number(self, own: float) -> float:
        """The mean of a number, by one all-reduce."""
        number = torch.tensor([own], dtype=torch.float32, device=self._device)
        self.await_work(self.begin_mean(number))
        return float(number)

    def begin_mean(self, bucket: Tensor) -> Any:
        """Begins to average a tensor in place, for :meth:`await_work`."""
        with self.explained():
            return self._begin(
                partial(distributed.all_reduce, async_op=True), bucket.div_(self.count)
            )

    def await_work(self, work: Any) -> None:
        """Waits for a collective.

        Raises:
            RunError: another process has failed, or is gone.
        """
        with self.explained():
            self._wait(work)

    def copy_from_main(self, tensors: Sequence[Tensor]) -> None:
        """One broadcast of the bytes of all."""
        distinct = list({id(tensor): tensor for tensor in tensors if tensor.numel()}.values())
        if distinct:
            bucket = pack_bytes([tensor.to(self._device) for tensor in distinct])
            self._take_part(partial(distributed.broadcast, src=0, async_op=True), bucket)
            if not self.is_main:
                unpack_bytes(bucket, distinct)

    def exchange(self, value: Any) -> list[Any]:
        """Two all-gathers, of the lengths and of the texts: for what is small and rare."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes: list[int] = self.gather(torch.tensor([text.numel()])).tolist()
        own = text.new_zeros(1, max(sizes))
        own[0, : text.numel()] = text
        rows = self.gather(own).tolist()
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def first_with(self, flag: bool) -> int | None:
        """One all-reduce of a number."""
        first = torch.tensor([self.rank if flag else self.count], device=self._device)
        smallest = distributed.ReduceOp.MIN
        self._take_part(partial(distributed.all_reduce, op=smallest, async_op=True), first)
        found = int(first)
        return found if found < self.count else None

    def gather(self, tensor: Tensor) -> Tensor:
        """One all-gather; tensors of one shape on all processes. It cannot be differentiated."""
        own = tensor.detach().to(self._device)
        own = own.reshape(1) if own.dim() == 0 else own.contiguous()
        all_ = own.new_empty((self.count * own.shape[0], *own.shape[1:]))
        self._take_part(partial(distributed.all_gather_single, async_op=True), all_, own)
        return all_.to(tensor.device)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Where somebody else's code makes collectives, begun once all processes have come there.

        Raises:
            RunError: another process has failed, or is gone.
        """
        self.first_with(False)
        with self.explained():
            yield

    @contextmanager
    def ended_together(self) -> Iterator[None]:
        """Tells the others of an error that leaves the block, at which they end as well."""
        with self._board.told():
            try:
                yield
            except RuntimeError as error:
                if _is_lost_peer(error):  # in a collective of FSDP, which is not waited for here
                    self.explain(error)
                raise

    def _take_part(self, begin: Callable[..., Any], *tensors: Tensor) -> None:
        """Begins a collective of tensors and waits for it.

        Raises:
            RunError: another process has failed, or is gone.
        """
        with self.explained():
            self._wait(self._begin(begin, *tensors))

    def _begin(self, begin: Callable[..., Any], *tensors: Tensor) -> Any:
        self.collectives += 1
        carried = [tensor.detach() for tensor in tensors]
        _sent.extend(map(weakref.ref, carried))
        return begin(*carried)

    def _wait(self, work: Any) -> None:
        if self._device.type == "cpu":
            while True:
                try:
                    work.wait(timedelta(seconds=_LOOK))
                    return
                except RuntimeError:
                    if work.is_completed():  # just now, or by an error, which comes again
                        work.wait()
                        return
                self._board.check()
        self._poll(work.is_completed)
        work.wait()

    def _poll(self, is_over: Callable[[], bool]) -> None:
        look = monotonic() + _LOOK
        while not is_over():
            sleep(0)
            if monotonic() > look:
                self._board.check()
                look = monotonic() + _LOOK

    def await_future(self, future: Future[Tensor]) -> None:
        """Waits for a collective that somebody else has begun; on a GPU until it is in its stream.

        Raises:
            RunError: another process has failed, or is gone.
        """
        self.collectives += 1
        over = Event()
        future.add_done_callback(lambda _: over.set())
        with self.explained():
            while not over.wait(_LOOK):
                self._board.check()
            future.value()

    def await_device(self) -> None:
        """Waits for everything in the present stream of a GPU.

        Raises:
            RunError: another process has failed.
        """
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._poll(event.query)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Says what has ended a collective: the error of another process, or that it is gone.

        Raises:
            RunError: in place of torch's own error.
        """
        try:
            yield
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        """Says what has ended a collective; nothing where it is no collective's error.

        Raises:
            RunError: the error of another process, or that one does not answer.
        """
        try:
            self._board.check()
            missing = self._board.missing()
        except RunError as found:
            raise found from error
        except RuntimeError:
            missing = [0]  # the store is gone, which the first process may hold
        if not missing and not _is_lost_peer(error):
            return
        lost = ", ".join(map(str, missing)) or "unknown"
        raise RunError(
            f"a collective failed, and of the {self.count} processes these do not answer: {lost}. "
            f"({str(error).splitlines()[0][:200]})",
            remedy="look into their output; a process may have been killed, for memory perhaps.",
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective has failed, as the backends of torch say it."""
    return isinstance(error, distributed.DistError) or "by peer" in str(error)


def check_choice(option: str, value: object, known: Sequence[str]) -> None:
    """Refuses what is none of an option's words.

    Raises:
        RunError: it is none.
    """
    if not isinstance(value, str) or value not in known:  # an array compares by its entries
        raise RunError(
            f"{option}={value!r}.",
            expected=f"one of {quoted(known)}.",
            remedy=f"choose one of them.{did_you_mean(str(value), known)}",
        )


def processes_of(rank: int, number: int, device: torch.device) -> Processes:
    """The processes of a run, as its Accelerator sees them."""
    return Processes() if number == 1 else SeveralProcesses(rank, number, device)


@contextmanager
def quiet(processes: Processes) -> Iterator[None]:
    """Leaves the library's own warnings to the main process."""
    if processes.is_main:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MlodecoWarning)
        yield


def require_same(processes: Processes, what: str, value: Any) -> None:
    """Refuses processes that differ in what must be the same.

    Raises:
        RunError: they do.
    """
    found = processes.exchange(value)
    differing = [rank for rank, other in enumerate(found) if other != found[0]]
    if differing:
        raise RunError(
            f"of {processes.count} processes these differ from process 0 in {what}: "
            f"{', '.join(map(str, differing))}.",
            expected="the same program in all processes.",
            remedy="build modules and data in the same way whatever the process.",
        )
