"""Workers of DataLoaders that live on when a signal ends the run behind its tick."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from mlodeco.runtime.checkpoint.signals import Signals


def signals_are_noted() -> bool:
    """Whether a run waits for the end of its tick where a signal asks it to end."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(getattr(handler, "__self__", None), Signals)


@contextmanager
def lasting_workers(loader: DataLoader[Any] | None) -> Iterator[None]:
    """Workers that the loader starts inside heed no signal but its own.

    A terminal and a launcher send their signals to a whole group of processes. A worker that
    ended by one would take the run with it, before its checkpoint.
    """
    if loader is None or not loader.num_workers or isinstance(loader.worker_init_fn, _Lasting):
        yield
        return
    given = loader.worker_init_fn
    loader.worker_init_fn = _Lasting(given)
    try:
        yield
    finally:
        loader.worker_init_fn = given


@dataclass(frozen=True)
class _Lasting:
    """A ``worker_init_fn`` before that of the user; it is pickled where workers are spawned."""

    given: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # which tells who has sent a signal; not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
        if self.given is not None:
            self.given(worker)


def _leave_with(parent: int) -> None:
    """Ends this process at the SIGTERM by which its loader ends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
