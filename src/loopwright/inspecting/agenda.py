"""Which steps are inspected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopwright.schedule import Every
    from loopwright.state import Plan, Progress

NEVER = 2**62
_FIRST = (1,)  # inspected whatever the cadence: the rules look at how a run began
_EARLY = (1, 4, 16)  # the same where the run may be over before the cadence has come round a few times
_AT_LEAST = 4  # inspections after the early ones, where the length of the run is known


class Agenda:
    """The steps to inspect: by a cadence of steps, or one of every so many epochs, and some beside them.

    Attributes:
        chosen: The step that was chosen for an epoch, made or not.
        began: How many steps were made before the present epoch.
        length: How many steps an epoch has, or the last one had; 0 where that is not known.
    """

    def __init__(self) -> None:
        self.chosen: int = 0
        self.began: int = 0
        self.length: int = 0
        self._steps = self._epochs = 0  # from one inspection to the next; 0 where it is not they that are counted
        self._early: tuple[int, ...] = _EARLY
        self._beside: tuple[int, ...] = _EARLY

    def start(self, every: Every, plan: Plan) -> None:
        """Begin a fit. One that is known to be too short for a few inspections gets them spread over it."""
        each = _steps_of_an_epoch(plan)
        length = min(plan.steps or math.inf, plan.epochs * each if plan.epochs is not None and each else math.inf)
        spread = 0 if length == math.inf else max(1, int(length) // _AT_LEAST)
        self._steps, self._epochs, self._early = spread, 0, _EARLY
        if every.steps is not None:
            if length >= _AT_LEAST * every.steps:
                self._steps, self._early = every.steps, _FIRST if spread else _EARLY
        elif every.epochs is not None:
            self._epochs = every.epochs
            if each and length >= (_AT_LEAST - 1) * every.epochs * each + min(2, each):
                self._steps = 0  # so many epochs reach their second step
            elif not each and plan.epochs is not None:
                self._epochs = min(every.epochs, max(1, plan.epochs // _AT_LEAST))
        self._beside = tuple(sorted({*self._early, self.chosen}))

    def start_epoch(self, plan: Plan, progress: Progress) -> bool:
        """Choose a step of the epoch: the second, for there is one before it to compare it with, or the only one.

        Returns:
            Whether the steps to inspect are others now.
        """
        step, every = progress.step, self._epochs
        if not every or progress.batch:
            return False
        known = _steps_of_an_epoch(plan)
        if known or step > self.began:  # else there was no epoch before this one, or all of its steps were skipped
            self.length = known or step - self.began
        self.began = step
        if self.chosen <= step and progress.epoch % every == 0:  # one that was not reached is still to come
            self.chosen = step + min(2, self.length or 2)
        # Where each epoch is one step, the step to compare with is in the epoch before, which has to know.
        ahead = step + 1 + every - progress.epoch % every if self.length == 1 else 0
        self._beside = tuple(sorted({*self._early, self.chosen, ahead}))
        return True

    def after(self, step: int) -> int:
        """The next step to inspect after this one."""
        due = (step // self._steps + 1) * self._steps if self._steps else NEVER
        for beside in self._beside:
            if step < beside < due:
                return beside
        return due


def _steps_of_an_epoch(plan: Plan) -> int:
    """How many there are if none is skipped; 0 where that is not known."""
    return 0 if plan.batches is None else math.ceil(plan.batches / plan.accumulate)
