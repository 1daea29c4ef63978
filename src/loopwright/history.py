"""The history of a run, as fit returns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopwright.state import State


class History:
    """The rows of a run: one for each epoch, and one for an epoch that a fit has left half way."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._mark = 0  # the mark of the newest value that a finished epoch's row holds
        self._finished = 0  # epochs

    def finish_epoch(self, state: State) -> None:
        """Add the row of the epoch that has ended."""
        self._add(state, {})
        self._mark, self._finished = state.metrics.mark, state.progress.epoch

    def catch_up(self, state: State) -> None:
        """Add the row of an epoch that was counted, but in whose end a hook failed."""
        if state.progress.epoch > self._finished:
            self.finish_epoch(state)

    def leave_epoch(self, state: State, means: Mapping[str, float]) -> None:
        """Add the row of an epoch that a later fit may go on with; ``means`` are those of its batches so far."""
        self._add(state, {f"train/{name}": mean for name, mean in means.items()})

    def steps_by(self, epoch: int) -> int | None:
        """The optimizer steps of the run by the end of an epoch, counted from 1; 0 before the first."""
        steps = [row["step"] for row in self._rows if row["epoch"] == epoch]
        return int(steps[-1]) if steps else None if epoch else 0

    def state_dict(self) -> dict[str, Any]:
        """The rows, and how far the metrics are in them."""
        return {"rows": list(self._rows), "mark": self._mark, "finished": self._finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._rows = [dict(row) for row in state["rows"]]
        self._mark, self._finished = state["mark"], state["finished"]

    def rows(self) -> list[dict[str, float]]:
        """A copy of all rows."""
        return [dict(row) for row in self._rows]

    def _add(self, state: State, means: dict[str, float]) -> None:
        number = state.progress.epoch_number
        if self._rows and self._rows[-1]["epoch"] == number:
            self._rows.pop()  # the row of when the last fit left this epoch
        self._rows.append({"epoch": number, "step": state.progress.step, **state.metrics.since(self._mark), **means})
