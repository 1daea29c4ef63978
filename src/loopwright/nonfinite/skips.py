"""Counts the steps that are skipped, says so, and ends a run that makes no others."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from loopwright.errors import NonFiniteError
from loopwright.nonfinite.census import census, joined
from loopwright.nonfinite.culprit import Culprit
from loopwright.state import State

_WHY = {
    "losses": "their losses were not finite",
    "gradients": "their gradients were not finite",
    "scale": "their gradients did not fit into fp16 at any scale",
    "weights": "their batches had the weight 0",
}
_IN_A_ROW = 1000  # windows without end that may be skipped with no step between them

logger: logging.Logger = logging.getLogger("loopwright")


class Skips:
    """Counts the windows that are dropped, and says so: a warning for the first, and one at the end of fit.

    Args:
        state: The run's.
        culprit: Looks into the first one. Its batch is not run again: the run goes on, and what a step of the
            user's keeps for itself would change by that.
    """

    def __init__(self, state: State[Any], culprit: Culprit) -> None:
        self._state, self._culprit = state, culprit
        self.begin()

    def begin(self) -> None:
        """A fit begins."""
        self._counts: Counter[str] = Counter()
        self._steps = self._state.progress.step  # when the present row of skipped windows began
        self._row: Counter[str] = Counter()
        self._warned = False
        self._last = ""

    def found(self, error: NonFiniteError, batch: Any = None) -> None:
        """A loss, or a gradient, is not finite, and its window will be dropped; the first is looked into."""
        self._last = error.place
        if self._warned:
            return
        self._warned = True
        self._culprit.look(error, batch, again=False)
        buffers = [name for name, b in self._state.model.named_buffers() if (c := census(b)) is not None and c.nan]
        if buffers:
            error.details.append(f"buffers: {joined(buffers)} hold NaN, which the forward has written, and skip leaves")
        error.fix = 'nothing, if such batches are expected; on_nonfinite="raise" looks for the operation that made it'
        error.compose()
        logger.warning("a step is skipped, and more may be, which are counted in progress.skipped: %s", error)

    def count(self, kind: str) -> None:
        """A window has been dropped.

        Args:
            kind: What was at fault: ``"losses"``, ``"gradients"``, ``"scale"`` or ``"weights"``.

        Raises:
            NonFiniteError: A great many in a row were, in data that may have no end.
        """
        progress = self._state.progress
        progress.skipped += 1
        self._counts[kind] += 1
        if progress.step != self._steps:
            self._steps = progress.step
            self._row.clear()
        self._row[kind] += 1
        if self._row.total() >= _IN_A_ROW and self._state.plan.batches is None:
            raise NonFiniteError(
                f"{self._row.total()} steps in a row were skipped, up to epoch {progress.epoch + 1}, "
                f"batch {progress.batch + 1}: {_WHY[self._row.most_common(1)[0][0]]}",
                why="the data has no length, so that the run might never end",
                fix="look at the data, or take a smaller learning rate",
            )

    def end(self) -> None:
        """The fit has ended well."""
        skipped = self._counts["losses"] + self._counts["gradients"]
        if self._warned and skipped > 1:
            logger.warning(
                "%d steps were skipped in this fit, %d for their loss and %d for their gradients, and %d steps made in "
                "all; the last one skipped was in %s",
                skipped,
                self._counts["losses"],
                self._counts["gradients"],
                self._state.progress.step,
                self._last,
            )
