"""Stopping when a metric has ceased to improve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from loopwright.callback import Callback
from loopwright.errors import ConfigError, counted
from loopwright.forms import Count, check_form
from loopwright.monitor import Mode, Monitor, check_validated
from loopwright.schedule import check_count
from loopwright.weights import snapshot

if TYPE_CHECKING:
    from loopwright.state import State


class _Saved(TypedDict):
    monitor: dict[str, Any]
    waited: Count
    best_epoch: Count | None
    best_weights: dict[str, Any] | None


class EarlyStopping(Callback[Any]):
    """Stops when ``patience`` evaluations in a row brought no improvement of more than ``min_delta``.

    The count is that of Keras and Lightning: the first value is always an improvement, unless it is NaN or infinite,
    which never is. A ``train/`` metric is judged at the end of every epoch, any other after every validation.
    Test passes are ignored.

    Args:
        monitor: The metric's name, for example ``"val/loss"``.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is. There is no default.
        patience: How many evaluations without improvement to bear, at least 1.
        min_delta: An improvement is a change for the better by more than this.
        restore_best: Whether the model holds the best weights when fit returns, whatever ended the run.
            ``result.restored_epoch`` then says which epoch they are from. A copy of the weights is kept for it.

    Raises:
        ConfigError: An argument is not of these.
        UnknownMetricError: In fit, when nothing has logged the metric by its first check.

    Examples:
        >>> EarlyStopping("val/loss", mode="min", patience=5, restore_best=True).patience
        5
    """

    def __init__(
        self,
        monitor: str,
        *,
        mode: Mode,
        patience: int = 3,
        min_delta: float = 0.0,
        restore_best: bool = False,
    ) -> None:
        check_count("patience", patience)
        self._monitor = Monitor(monitor, mode, min_delta)
        self.patience = patience
        self.restore_best = restore_best
        self._forget()

    def _forget(self) -> None:
        self._monitor.reset()
        self.waited: int = 0
        self.best_epoch: int | None = None
        self.best_weights: dict[str, Any] | None = None

    @property
    def monitor(self) -> str:
        """The name of the metric."""
        return self._monitor.name

    @property
    def best(self) -> float | None:
        """The best value so far, or None before the first finite one."""
        return self._monitor.best

    def on_fit_start(self, state: State) -> None:
        """Start counting afresh in a fresh run."""
        check_validated(self.monitor, state)
        if state.progress.fresh:
            self._forget()

    def on_eval_end(self, state: State) -> None:
        """Judge the validation."""
        if state.stage == "val" and not self.monitor.startswith("train/"):
            self._judge(state)

    def on_epoch_end(self, state: State) -> None:
        """Judge what has not been judged after a validation."""
        self._judge(state)

    def _judge(self, state: State) -> None:
        value = self._monitor.fresh(state)
        if value is None:
            return
        if self._monitor.improve(value):
            self.waited = 0
            self.best_epoch = state.progress.epoch_number
            self.best_weights = snapshot(state.model) if self.restore_best else None
            return
        self.waited += 1
        if self.waited >= self.patience:
            best = "none was finite" if self.best is None else f"the best is {self.best:.6g} in epoch {self.best_epoch}"
            state.stop(f"{self.monitor} did not improve in {counted(self.waited, 'evaluation')}; {best}")

    def state_dict(self) -> dict[str, Any]:
        """The count, the best value, its epoch and its weights."""
        return {
            "monitor": self._monitor.state_dict(),
            "waited": self.waited,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        check_form(state, _Saved)
        if not self._monitor.load_state_dict(state["monitor"]):
            self._forget()
            return
        self.waited = state["waited"]
        self.best_epoch = state["best_epoch"]
        self.best_weights = state["best_weights"]


def restoring(callbacks: Iterable[Callback[Any]]) -> EarlyStopping | None:
    """The one callback whose best weights the loop puts back at the end, if there is one.

    Raises:
        ConfigError: There are several.
    """
    found = [callback for callback in callbacks if isinstance(callback, EarlyStopping) and callback.restore_best]
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} callbacks have restore_best=True",
            why="the model can hold only one of their weights",
            fix="restore_best=True on one EarlyStopping only",
        )
    return found[0] if found else None
