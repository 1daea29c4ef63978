"""When a logger writes, and what: the part that all loggers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loopwright.callback import Callback
from loopwright.errors import ConfigError
from loopwright.schedule import Every

if TYPE_CHECKING:
    from loopwright.state import State
    from loopwright.step import Output


class Logger(Callback[Any], ABC):
    """Writes the fresh values of ``state.metrics`` at each log point and at the last step.

    A log point is whatever ``every`` says, and never less than one an epoch when it counts steps. Subclass it
    to write somewhere else: implement ``write``, and ``open`` and ``close`` if there is something to.

    Args:
        every: How often to write.

    Example:
        >>> class PrintLogger(Logger):
        ...     def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        ...         print(epoch, step, dict(values))
    """

    def __init__(self, *, every: Every = Every(epochs=1)) -> None:  # noqa: B008  # it is frozen
        if not isinstance(every, Every):
            raise ConfigError(f"every is {every!r}", fix="every=Every(steps=50), or every=Every(epochs=1)")
        self.every = every
        self._written = 0  # the mark of the newest value written

    @abstractmethod
    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one record.

        Args:
            epoch: The number of the epoch, from 1.
            step: The number of optimizer steps made. A second call with the same step adds to that record.
            values: The names logged since the last record, with their newest values; never empty.
        """

    def open(self, state: State, *, fresh: bool) -> None:
        """Open what is written to. ``fresh``: a new run begins, so nothing written before belongs to it."""

    def close(self) -> None:
        """Close what ``open`` opened. Called also when it was never opened, or failed to."""

    def state_dict(self) -> dict[str, Any]:
        """How far the metrics have been written."""
        return {"written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what had been written."""
        self._written = state["written"]

    def record(self, state: State) -> None:
        """Write what is fresh, if anything is."""
        values = state.metrics.since(self._written)
        self._written = state.metrics.mark
        if values:
            self.write(state.progress.epoch_number, state.progress.step, values)

    def on_fit_start(self, state: State) -> None:
        """Open the destination."""
        if state.progress.fresh:
            self._written = 0
        self.open(state, fresh=state.progress.fresh)

    def on_batch_end(self, state: State, output: Output) -> None:
        """Write where a number of steps is due."""
        if self.every.steps is not None and state.progress.step and self.every.due_at_step(state.progress):
            self.record(state)

    def on_eval_end(self, state: State) -> None:
        """Add a validation that was made at a log point to the record of that step."""
        if state.stage == "val" and state.progress.batch and self.every.due_at_step(state.progress):
            self.record(state)

    def on_epoch_end(self, state: State) -> None:
        """Write where this epoch is due."""
        if self.every.steps is not None or self.every.due_at_epoch(state.progress.epoch):
            self.record(state)

    def on_fit_end(self, state: State) -> None:
        """Write what is left."""
        self.record(state)

    def on_exception(self, state: State, error: BaseException) -> None:
        """Write what is left: the last values before an error are the ones that explain it."""
        if state.stage in ("train", "val"):
            self.record(state)

    def teardown(self, state: State) -> None:
        """Close the destination."""
        self.close()
