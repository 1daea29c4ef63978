"""The history of a run, as fit returns it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopwright.metrics import Metrics
    from loopwright.state import State


class History:
    """The rows of a run: one for each epoch, and one for an epoch that a fit has left half way.

    A row is there at once. Its values are where some were put off filled in as soon as somebody reads.

    Args:
        metrics: What the rows are about.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._rows: list[dict[str, float]] = []
        self._mark = 0  # the mark of the newest value that a finished epoch's row holds
        self._finished = 0  # epochs

    def __getstate__(self) -> dict[str, object]:
        """What is copied or pickled, with every row filled in."""
        self._metrics.catch_up()
        return self.__dict__

    def finish_epoch(self, state: State) -> None:
        """Add the row of the epoch that has ended."""
        self._add(state, {}, finished=True)
        self._finished = state.progress.epoch

    def catch_up(self, state: State) -> None:
        """Add the row of an epoch that was counted, but in whose end a hook failed."""
        if state.progress.epoch > self._finished:
            self.finish_epoch(state)

    def leave_epoch(self, state: State, means: Mapping[str, float]) -> None:
        """Add the row of an epoch that a later fit may go on with; ``means`` are those of its batches so far."""
        self._add(state, {f"train/{name}": mean for name, mean in means.items()}, finished=False)

    def steps_by(self, epoch: int) -> int | None:
        """The optimizer steps of the run by the end of an epoch, counted from 1; 0 before the first."""
        for row in reversed(self._rows):  # the newest first, since there may be thousands
            if row["epoch"] <= epoch:
                return int(row["step"]) if row["epoch"] == epoch else None
        return None if epoch else 0

    def state_dict(self) -> dict[str, Any]:
        """The rows, and how far the metrics are in them."""
        return {"rows": self.rows(), "mark": self._mark, "finished": self._finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._rows = [dict(row) for row in state["rows"]]
        self._mark, self._finished = state["mark"], state["finished"]

    def rows(self) -> list[dict[str, float]]:
        """A copy of all rows."""
        self._metrics.catch_up()
        return [dict(row) for row in self._rows]

    def _add(self, state: State, means: Mapping[str, float], *, finished: bool) -> None:
        number = state.progress.epoch_number
        if self._rows and self._rows[-1]["epoch"] == number:
            self._rows.pop()  # the row of when the last fit left this epoch
        row: dict[str, float] = {"epoch": number, "step": state.progress.step}
        self._rows.append(row)
        self._metrics.afterwards(partial(self._fill, row, means, finished=finished))

    def _fill(self, row: dict[str, float], means: Mapping[str, float], *, finished: bool) -> None:
        row.update(self._metrics.since(self._mark))
        row.update(means)
        if finished:
            self._mark = self._metrics.mark
