"""Notes that processes leave for each other in the store of the launcher.

Slower than collectives, and they need no partner: a process that has failed says so here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import Store

from mlodeco.errors import RunError

_FAREWELL = 10.0
"""Seconds that a process that has failed waits for the others to have read why."""


class Board:
    """The notes of one run.

    Args:
        store: the store, under a name of this run.
        rank: this process.
        count: all of them.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store = store
        self._rank = rank
        self._count = count
        self._has_ended = False
        self._gone: list[int] = []

    def report(self, error: BaseException) -> None:
        """Tells the others of an error, the first one's that has some, and lets them read it.

        Does nothing at the second call: an error passes several frames.
        """
        if self._has_ended:
            return
        self._has_ended = True
        words = type(error).__name__ + (f": {error}" if str(error) else "")
        text = "\n  ".join((words, *getattr(error, "__notes__", ())))
        is_mistake = isinstance(error, Exception)
        try:
            self._store.compare_set("error", "", json.dumps([self._rank, text, is_mistake]))
            self._store.add("ended", 1)
            if is_mistake:
                self._wait_for_others()
        except RuntimeError:  # the store is gone, with the process that held it
            return

    def _wait_for_others(self) -> None:
        """The store may end with this process, and a launcher ends the others then."""
        until = time.monotonic() + _FAREWELL
        alive = self._count - len(self._gone)
        while self._store.add("ended", 0) < alive and time.monotonic() < until:
            time.sleep(0.01)

    def check(self) -> None:
        """Refuses to go on where another process has failed.

        Raises:
            RunError: one has.
        """
        if self._store.check(["error"]):
            rank, text, is_mistake = json.loads(self._store.get("error"))
            if rank != self._rank:
                raise RunError(
                    f"process {rank} ended with {text}",
                    remedy="mend that; the traceback is in the output of that process."
                    if is_mistake
                    else "it was interrupted, or left by sys.exit(); ctx.stop() ends a run in all.",
                )

    def missing(self) -> list[int]:
        """The processes that do not answer within two seconds."""
        self._store.set(f"here/{self._rank}", "")
        waits = [rank for rank in range(self._count) if rank != self._rank]
        until = time.monotonic() + 2.0
        while waits and time.monotonic() < until:
            waits = [rank for rank in waits if not self._store.check([f"here/{rank}"])]
            time.sleep(0.02)
        self._gone = waits
        return waits

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the others of an error that leaves the block.

        Raises:
            RunError: a run of several processes goes on after an error.
        """
        if self._has_ended:
            raise RunError(
                "the run has ended by an error in one of its processes.",
                expected="one process, if a run is to go on behind an error.",
                remedy="start the script again.",
            )
        try:
            yield
        except BaseException as error:
            self.report(error)
            raise
