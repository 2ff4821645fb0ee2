"""Notes that processes leave for each other in the store of the launcher.

Slower than collectives, and they need no partner: a process that has failed says so here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.distributed_c10d import Store

from mlodeco.errors import RunError

_PATIENCE = 1800.0
"""Seconds to wait for the notes of processes that have not failed."""

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
        self._round = 0
        self._has_ended = False
        self._gone: list[int] = []

    def report(self, error: BaseException) -> None:
        """Tells the others of an error, the first one's that has some, and lets them read it.

        Does nothing at the second call: an error passes several frames.
        """
        if self._has_ended:
            return
        self._has_ended = True
        text = "\n  ".join((f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())))
        try:
            self._store.compare_set("error", "", json.dumps([self._rank, text]))
            self._store.add("ended", 1)
            if isinstance(error, Exception):
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
            rank, text = json.loads(self._store.get("error"))
            if rank != self._rank:
                raise RunError(
                    f"process {rank} ended with {text}",
                    remedy="mend that; the traceback is in the output of that process.",
                )

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; they are such that JSON can hold.

        Raises:
            RunError: another process has failed.
        """
        self._round += 1
        self._store.set(f"{self._round}/{self._rank}", json.dumps(value))
        found = [self._read(f"{self._round}/{rank}", rank) for rank in range(self._count)]
        # all others have read the last round, since they are in this one
        self._store.delete_key(f"{self._round - 1}/{self._rank}")
        return found

    def _read(self, key: str, rank: int) -> Any:
        until = time.monotonic() + _PATIENCE
        pause = 0.0005
        while not self._store.check([key]):
            if time.monotonic() > until:
                raise RunError(
                    f"process {rank} has not answered for {_PATIENCE:.0f} s.",
                    remedy="look into its output; all processes must run the same program.",
                )
            time.sleep(pause)
            pause = min(2.0 * pause, 0.05)
            self.check()
        return json.loads(self._store.get(key))

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
