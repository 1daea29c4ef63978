"""Logging the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopwright.callback import Callback

if TYPE_CHECKING:
    from loopwright.state import State


class LearningRateMonitor(Callback[Any]):
    """Logs the learning rate that made each step: as ``lr``, or ``lr/0``, ``lr/1``, ... for several groups.

    A parameter group that has a ``"name"`` is logged under it, ``lr/<name>``.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[LearningRateMonitor()])
        >>> trainer.fit(train_loader, epochs=1).history[-1]["lr"]
        0.01
    """

    def on_step_end(self, state: State) -> None:
        """Log the rate, before a schedule moves it."""
        groups = state.optimizer.param_groups
        if len(groups) == 1:
            state.log("lr", groups[0]["lr"])
            return
        for index, group in enumerate(groups):
            state.log(f"lr/{group.get('name', index)}", group["lr"])
