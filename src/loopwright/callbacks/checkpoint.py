"""Deciding when to save; the loop does it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from loopwright.callback import Callback
from loopwright.errors import ConfigError
from loopwright.forms import Count, check_form
from loopwright.monitor import Mode, Monitor, check_validated
from loopwright.paths import path_of
from loopwright.schedule import Every, check_count, check_every

if TYPE_CHECKING:
    from loopwright.state import State


class _Saved(TypedDict):
    monitor: dict[str, Any] | None
    score: tuple[float, Count] | None


class Checkpoint(Callback[Any]):
    """Saves the whole run, so that ``fit(..., resume="auto")`` goes on from there, bit for bit.

    The loop saves after every callback has handled the event that made a save due, after a validation that is due at
    the same step, and at the end of fit; not on an exception. While a Checkpoint is in the list, SIGTERM and Ctrl-C
    finish the batch in hand, save, and then end the run.

    Args:
        folder: Where checkpoints go, ``folder/step-000000120/`` and so on. It belongs to one run: a fresh run sets
            aside what it finds there.
        every: How often to save.
        monitor: A metric whose best checkpoint is kept whatever its age. Its value is stored with the weights that
            it was measured on.
        mode: ``"min"`` or ``"max"``, with ``monitor``: which is better.
        keep: How many of the newest to keep, at least 1.

    Raises:
        ConfigError: An argument is not of these.

    Examples:
        >>> Checkpoint("runs/line/checkpoints", monitor="val/loss", mode="min", keep=3).keep
        3
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: Every = Every(epochs=1),  # noqa: B008  # it is frozen
        monitor: str | None = None,
        mode: Mode | None = None,
        keep: int = 3,
    ) -> None:
        check_every("every", every, "every=Every(steps=50), or every=Every(epochs=1)")
        if (monitor is None) != (mode is None):
            raise ConfigError(
                f"monitor is {monitor!r} and mode is {mode!r}",
                why="what is monitored, and whether smaller or larger is better, are said together",
                fix='monitor="val/loss", mode="min"',
            )
        check_count("keep", keep)
        self.folder: Path = path_of("folder", folder, 'Checkpoint("runs/line/checkpoints")').absolute()
        self.every = every
        self.keep = keep
        self.mode: Mode | None = mode
        self._monitor = None if monitor is None or mode is None else Monitor(monitor, mode)
        self._score: tuple[float, int] | None = None  # the newest value, and the step whose weights it judges

    @property
    def monitor(self) -> str | None:
        """The name of the metric, or None."""
        return None if self._monitor is None else self._monitor.name

    def score(self, step: int) -> float | None:
        """The metric's value if it is finite and was measured on the weights of ``step``.

        Args:
            step: The number of optimizer steps that the weights have behind them.

        Returns:
            The value, or None where there is none.
        """
        if self._score is None or self._score[1] != step or not math.isfinite(self._score[0]):
            return None
        return self._score[0]

    def on_fit_start(self, state: State) -> None:
        """Start afresh in a fresh run."""
        check_validated(self.monitor, state)
        if state.progress.fresh:
            self._score = None
            if self._monitor is not None:
                self._monitor.reset()

    def on_eval_end(self, state: State) -> None:
        """Take down the score of a validation."""
        if state.stage == "val" and self.monitor is not None and not self.monitor.startswith("train/"):
            self._judge(state)

    def on_epoch_end(self, state: State) -> None:
        """Take down what was not yet logged in the validation."""
        self._judge(state)

    def _judge(self, state: State) -> None:
        if self._monitor is not None and (value := self._monitor.fresh(state)) is not None:
            self._score = (value, state.progress.step)

    def state_dict(self) -> dict[str, Any]:
        """The newest score, and what has been judged."""
        return {"monitor": None if self._monitor is None else self._monitor.state_dict(), "score": self._score}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        check_form(state, _Saved)
        same = False
        if self._monitor is not None and state["monitor"] is not None:
            same = self._monitor.load_state_dict(state["monitor"])
        self._score = state["score"] if same else None
