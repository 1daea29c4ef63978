"""Ctrl-C, and SIGTERM where a run can save itself, taken note of until the batch in hand is finished."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

_ASKED = (signal.SIGTERM, signal.SIGINT)
_CTRL_C = (signal.SIGINT,)
_ON_ITS_WAY = 0.2  # seconds within which a signal to a whole group reaches this process, too
_SAYING = 1.0  # seconds that the log may take for one line before nobody waits for it

logger: logging.Logger = logging.getLogger("loopwright")


class Signals:
    """Takes note of a first SIGTERM or Ctrl-C, for the loop to act on after the batch in hand.

    The first Ctrl-C is answered in the log, and a second one is out at once. Handlers are installed in the main thread
    only, call the ones that were there, never act in forked children such as a loader's workers, and are put back at
    the end. Of a fit within a fit, Ctrl-C asks the inner one alone: its KeyboardInterrupt ends the outer one unless
    somebody catches it in between, as without a trainer. A signal to the whole process group kills a loader's workers
    too; what is raised about their death is held back where a stop is asked for.

    Args:
        saves: Whether the run can save itself. Else SIGTERM ends the process as it would without a trainer, and Ctrl-C
            is taken note of only where it would have raised a KeyboardInterrupt in the midst of a batch: by Python's
            own handler, or by that of a run around this one.

    Attributes:
        asked: The signal that asked for a stop, or None.
        ending: What a handler that was there before has raised: what the run is to end with in place of its own.
    """

    def __init__(self, *, saves: bool) -> None:
        self._saves = saves
        self.asked: signal.Signals | None = None
        self.ending: BaseException | None = None
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._saying: _thread.LockType | None = None  # held while the answer to a Ctrl-C is on its way

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKED if self._saves else _CTRL_C:
                before = signal.getsignal(number)
                ours = before is signal.default_int_handler or _is_a_fits(before)
                # None: it was installed by other than python, and could not be put back. What is ignored stays so.
                if before is not None and before is not signal.SIG_IGN and (self._saves or ours):
                    self._before[number] = before
                    signal.signal(number, self._ask)
        return self

    def watch_workers(self) -> None:
        """Come before the handler with which torch raises a worker's death, now that it is there."""
        if self._before and callable(before := signal.getsignal(signal.SIGCHLD)) and before != self._child:
            self._before[signal.SIGCHLD] = before
            signal.signal(signal.SIGCHLD, self._child)

    def soon(self) -> bool:
        """Whether a stop has been asked for, or is within the moment in which a signal reaches a whole group."""
        end = time.monotonic() + _ON_ITS_WAY
        while self._before and self.asked is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.asked is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def said(self) -> None:
        """Return when the answer to a Ctrl-C is in the log, so that nothing comes before it."""
        saying, self._saying = self._saying, None
        if saying is not None:
            saying.acquire(timeout=_SAYING)

    def _answer(self) -> None:
        # From another thread: this one may be within the log, or hold what the log writes to. And not from one of
        # threading's, which takes a lock to start that this one may hold too.
        saying = _thread.allocate_lock()
        saying.acquire()
        try:
            _thread.start_new_thread(self._say, (saying,))
        except RuntimeError:  # there are too many: what is said at the end has to do
            return
        self._saying = saying

    def _say(self, saying: _thread.LockType) -> None:
        try:
            logger.warning(
                "Ctrl-C: the batch in hand is finished%s, then fit ends; another Ctrl-C ends it at once%s",
                *((" and the run saved", ", and saves nothing") if self._saves else ("", "")),
            )
        finally:
            saying.release()

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
            if number == signal.SIGINT:
                self._answer()
        before = self._before.get(signal.Signals(number))
        if number == signal.SIGINT and _is_a_fits(before):
            return  # the fit around this one gets the KeyboardInterrupt, if nobody catches it
        if callable(before) and before is not signal.default_int_handler:
            try:
                before(number, frame)
            except BaseException as error:  # a handler that ends the process may do so once all is saved
                self.ending = self.ending or error

    def _child(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(signal.SIGCHLD)
        if self.asked is None and callable(before):
            try:
                before(number, frame)
            except RuntimeError:
                if os.getpid() != self._owner or not self.soon():
                    raise


def _is_a_fits(handler: object) -> bool:
    return isinstance(getattr(handler, "__self__", None), Signals)
