"""SIGTERM and SIGINT while a run is on: noted, and acted upon between two ticks."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Notes signals inside a ``with`` block in the main thread; elsewhere it does nothing.

    A SIGINT behind another signal raises ``KeyboardInterrupt`` at once, in a function that hangs
    for instance. Signals that are ignored stay so.

    Attributes:
        received: the first of the signals that came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        try:
            self._install()
        except BaseException:  # an interrupt, which may come between two handlers
            self.__exit__()
            raise
        return self

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = self.received or number


class Interrupts:
    """Lets SIGINT (Ctrl-C, a notebook's stop button) wait for the end of short blocks.

    Within ``with interrupts:`` in the main thread, those of ``with interrupts.held:`` are ended
    before ``KeyboardInterrupt`` is raised; a second one does not wait. Other handlers than Python's
    are called as late.
    """

    def __init__(self) -> None:
        self.held = _Held(self)
        self._depth = 0
        self._before: Any = None
        self._is_held = False
        self._came: FrameType | None = None

    def __enter__(self) -> Self:
        self._depth += 1
        try:
            self._install()
        except BaseException:  # an interrupt, as soon as the handler is set
            self.__exit__()
            raise
        return self

    def _install(self) -> None:
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_held and self._came is None:
            self._came = frame
            return
        came, self._came = self._came, None
        if came is not None:
            self._before(number, came)
        self._before(number, frame)


class _Held:
    """The blocks that are ended first."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts._is_held = True

    def __exit__(self, *error: object) -> None:
        self._interrupts._is_held = False
        came, self._interrupts._came = self._interrupts._came, None
        if came is not None:
            self._interrupts._before(signal.SIGINT, came)
