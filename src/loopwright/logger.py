"""When a logger writes, and what: the part that all loggers share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

from loopwright.callback import Callback, without_output
from loopwright.errors import ConfigError
from loopwright.forms import Count, check_form
from loopwright.schedule import Every, check_every

if TYPE_CHECKING:
    from torch import Tensor

    from loopwright.state import State
    from loopwright.step import Output


@runtime_checkable
class Histograms(Protocol):
    """Something that draws the values of a tensor, such as a TensorBoardLogger."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Take in the values of one name at one step."""


class _Written(TypedDict):
    written: Count
    begun: bool


class Logger(Callback[Any], ABC):
    """Writes the fresh values of ``state.metrics`` at each log point and at the last step.

    A log point is whatever ``every`` says, and never less than one an epoch when it counts steps. What other
    callbacks log when an epoch ends still reaches that epoch's record, wherever in the list they stand. Subclass it
    to write somewhere else: implement ``write``, and ``open``, ``flush`` and ``close`` if there is something to.

    Args:
        every: How often to write.

    Raises:
        ConfigError: ``every`` is no ``Every``.

    Examples:
        >>> class PrintLogger(Logger):
        ...     def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        ...         print(epoch, step, dict(values))
    """

    def __init__(self, *, every: Every = Every(epochs=1)) -> None:  # noqa: B008  # it is frozen
        check_every("every", every, "every=Every(steps=50), or every=Every(epochs=1)")
        self.every = every
        self._written = 0  # the mark of the newest value written
        self._begun = False  # whether what open opens holds records of this run
        self._is_open = False
        self._batched = 0  # the newest step that on_batch_end has seen

    @abstractmethod
    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one record.

        Args:
            epoch: The number of the epoch, from 1.
            step: The number of optimizer steps made. A second call with the same step adds to that record.
            values: The names logged since the last record, with their newest values; never empty.
        """

    def open(self, state: State, *, fresh: bool) -> None:
        """Open what is written to.

        Args:
            state: What the run knows.
            fresh: Nothing written there before belongs to this run.
        """

    def flush(self) -> None:
        """Hand what was written on to the system: an epoch or the fit has ended, or an error is on its way."""

    def close(self) -> None:
        """Close what ``open`` opened. Called also when it was never opened, or failed to."""

    def _destination(self) -> Path | None:
        """The file or the folder that is written to, where there is one: a trainer takes no two with the same."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """How far the metrics have been written."""
        return {"written": self._written, "begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what had been written."""
        check_form({"written": state.get("written"), "begun": state.get("begun")}, _Written)
        self._written, self._begun = state["written"], state["begun"]

    def record(self, state: State) -> None:
        """Write what is fresh, if anything is.

        Args:
            state: What the run knows.
        """
        values = state.metrics.since(self._written)
        self._written = state.metrics.mark
        if values:
            self.write(state.progress.epoch_number, state.progress.step, values)

    def on_fit_start(self, state: State) -> None:
        """Open the destination."""
        fresh = state.progress.fresh or not self._begun
        if fresh:
            # A logger that joins a run under way has no place for what was logged before.
            self._written = 0 if state.progress.fresh else state.metrics.mark
        self.open(state, fresh=fresh)
        self._begun = self._is_open = True
        self._batched = state.progress.step

    def on_epoch_start(self, state: State) -> None:
        """Add what was logged after the last record, at the same step: by callbacks that come later in the list."""
        if state.progress.batch == 0 and self._epoch_due(state):
            self.record(state)

    @without_output
    def on_batch_end(self, state: State, output: Output) -> None:
        """Write where a number of steps is due: once, though a step may be followed by more than one batch."""
        if self.every.steps is not None and state.progress.step != self._batched:
            self._batched = state.progress.step
            if self.every.due_at_step(state.progress):
                self.record(state)

    def on_eval_end(self, state: State) -> None:
        """Add a validation that was made at a log point to the record of that step."""
        if state.stage == "val" and state.progress.batch and self.every.due_at_step(state.progress):
            self.record(state)

    def on_epoch_end(self, state: State) -> None:
        """Write where this epoch is due."""
        if self._epoch_due(state):
            self.record(state)
            self.flush()

    def on_fit_end(self, state: State) -> None:
        """Write what is left."""
        self.record(state)
        self.flush()

    def on_exception(self, state: State, error: BaseException) -> None:
        """Write what is left: the last values before an error are the ones that explain it."""
        if self._is_open:
            self.record(state)
            self.flush()

    def teardown(self, state: State) -> None:
        """Close the destination."""
        self._is_open = False
        self.close()

    def _epoch_due(self, state: State) -> bool:
        return self.every.steps is not None or self.every.due_at_epoch(state.progress.epoch)


def check_apart(callbacks: Iterable[Callback[Any]]) -> None:
    """Raise ConfigError where two loggers would write to one destination."""
    taken: dict[str, str] = {}
    for callback in callbacks:
        if not isinstance(callback, Logger) or (path := type(callback)._destination(callback)) is None:
            continue
        place, kind = os.path.realpath(path), type(callback).__name__
        if (other := taken.get(place)) is not None:
            raise ConfigError(
                f"two {kind}s in the list write to {str(path)!r}"
                if kind == other
                else f"a {other} and a {kind} in the list both write to {str(path)!r}",
                why="each would take the other's records for those of an earlier run, or write over them",
                fix="a path for each",
            )
        taken[place] = kind
