"""Counts the steps that are skipped, says so, and ends a run that makes no others."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from loopwright.errors import NonFiniteError
from loopwright.guard import NORM, NonFinitePolicy, error_at
from loopwright.nonfinite.census import census, joined
from loopwright.nonfinite.culprit import Culprit
from loopwright.state import State

_WHY = {
    "losses": "their losses were not finite",
    "gradients": "their gradients were not finite",
    "scale": "their gradients did not fit into fp16 at any scale",
    "weights": "their batches had the weight 0",
}
_SMALLEST = 2.0**-16  # a loss scale that only gradients above a billion would need; it begins at 2**16
_IN_A_ROW = 1000  # windows without end that may be skipped with no step between them

logger: logging.Logger = logging.getLogger("loopwright")


class Skips:
    """Counts the windows that are dropped, and says so: a warning for the first, and one at the end of fit.

    Args:
        state: The run's.
        culprit: Looks into the first one. Its batch is not run again: the run goes on, and what a step of the
            user's keeps for itself would change by that.
        policy: What to do about gradients that are not finite at whatever scale.
        scaler: Of fp16.
    """

    def __init__(
        self, state: State[Any], culprit: Culprit, policy: NonFinitePolicy, scaler: torch.amp.GradScaler | None
    ) -> None:
        self._state, self._culprit, self._policy, self._scaler = state, culprit, policy, scaler
        self.begin()

    def begin(self) -> None:
        """A fit begins."""
        self._counts: Counter[str] = Counter()
        self._steps = self._begun = self._state.progress.step  # when the present row of skipped windows began
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
            NonFiniteError: A great many in a row were, in data that may have no end. Or gradients are not finite at so
                small a scale that it is not at fault, and the policy is ``"raise"``.
        """
        progress = self._state.progress
        progress.skipped += 1
        self._counts[kind] += 1
        if progress.step != self._steps:
            self._steps = progress.step
            self._row.clear()
        self._row[kind] += 1
        if kind == "scale":
            self._look_at_scale()
        if self._row.total() >= _IN_A_ROW and self._state.plan.batches is None:
            raise NonFiniteError(
                f"{self._row.total()} steps in a row were skipped, up to epoch {progress.epoch + 1}, "
                f"batch {progress.batch + 1}: {_WHY[self._row.most_common(1)[0][0]]}",
                why="the data has no length, so that the run might never end",
                fix="look at the data, or take a smaller learning rate",
            )

    def _look_at_scale(self) -> None:
        """Gradients that are not finite at the smallest scale would not be so at any."""
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        if scale >= _SMALLEST or self._policy == "ignore":
            return
        progress, accumulate = self._state.progress, self._state.plan.accumulate
        batch = progress.batch // accumulate * accumulate
        error = error_at(NORM, None, progress.epoch, batch, progress.step)
        error.what += f"; it has been so {self._row['scale']} times in a row, down to a loss scale of {scale:g}"
        error.compose()
        if self._policy == "raise":
            raise error
        self.found(error)

    def end(self) -> None:
        """The fit has ended well."""
        if self._counts["scale"] and self._state.progress.step == self._begun:
            logger.warning(
                "no optimizer step was made in this fit: %d were skipped, for their gradients were infinite or NaN at "
                "the loss scale of the time; it begins large, and more steps bring it down; if it is not the scale, "
                'precision="fp32" with clip_norm=1.0 says which gradient',
                self._counts["scale"],
            )
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
