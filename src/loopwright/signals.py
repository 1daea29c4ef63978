"""SIGTERM and Ctrl-C, taken note of while a run can save itself."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_ASKED = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Takes note of a first SIGTERM or Ctrl-C, for the loop to act on after the batch in hand.

    A second Ctrl-C is out at once. Handlers are installed in the main thread only, call the ones that were there
    when a signal is not theirs to handle, never act in forked children such as a loader's workers, and
    are put back at the end. A signal to the whole process group kills a loader's workers too; the error that torch
    raises about their death is held back once a stop has been asked for.

    Attributes:
        asked: The signal that asked for a stop, or None.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (*_ASKED, signal.SIGCHLD):
                before = signal.getsignal(number)
                if before is not None:  # None: it was installed by other than python, and could not be put back
                    self._before[number] = before
            for number in self._before:
                signal.signal(number, self._child if number is signal.SIGCHLD else self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGTERM:  # a worker that is told to end does so
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # Ctrl-C: the parent finishes its batch, and ends its workers itself
        if self.asked is not None and number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = signal.Signals(number)
        before = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def _child(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(signal.SIGCHLD)
        if self.asked is None and callable(before):
            before(number, frame)
