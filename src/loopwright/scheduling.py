"""Whether the schedule lasts as long as the fit: OneCycleLR has an end, and torch raises at the move after it.

It is the only scheduler of torch's that has one; all others go on with their last rate, or from the beginning.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, SequentialLR

from loopwright.errors import ConfigError, counted, note
from loopwright.schedule import Schedule
from loopwright.state import Plan, Progress


def check_lasts(
    schedule: Schedule, plan: Plan, progress: Progress, *, in_hand: bool = False, skips: bool = False
) -> str | None:
    """Raise ConfigError where the plan is certain to move the scheduler past its end.

    A callback might stop the run before; all the same it is refused, for whoever means that gives the target that the
    schedule was made for. Of an epoch whose batches, all of a window, count for nothing, nobody knows before.

    Args:
        schedule: The scheduler, and when it moves.
        plan: What fit is asked for.
        progress: How far the run has come.
        in_hand: Whether a batch's step is made that is not yet counted as a batch.
        skips: Whether the run may skip optimizer steps, which move no scheduler.

    Returns:
        The words of a warning, where it is so unless steps are skipped; else None.

    Raises:
        ConfigError: The scheduler ends before the fit does.
    """
    scheduler = _with_an_end(schedule.lr_scheduler)
    moves = 0 if scheduler is None else _moves(schedule.each, plan, progress, in_hand=in_hand)
    if scheduler is None or moves == 0 or scheduler.last_epoch + moves <= scheduler.total_steps:
        return None
    total, done = scheduler.total_steps, scheduler.last_epoch
    moved = f"{counted(moves, 'more time')}, after {done}" if done else counted(moves, "time")
    what = f"OneCycleLR has total_steps={total}, and this fit is to move it {moved}"
    fix = f"OneCycleLR(optimizer, ..., total_steps={done + moves})"
    if not progress.fresh:  # the schedule is part of the run by now, and comes back with a resume as it was
        left = counted(max(total - done, 0), _noun(schedule.each))
        fix += f" in a run that is planned so from its beginning; in this one it has {left} left"
    if skips and (plan.epochs is not None or schedule.each == "epoch"):
        return f"{what}, unless steps are skipped; torch raises at a move past its end; {fix}"
    raise ConfigError(what, why=f"{_moment(schedule.each)}, and torch raises at a move past its end", fix=fix)


def explain_end(error: ValueError, schedule: Schedule, plan: Plan) -> None:
    """Give torch's error a note that says what to do, where it comes of a OneCycleLR that is moved past its end."""
    scheduler, each = schedule.lr_scheduler, schedule.each
    for part in _parts(scheduler):
        if isinstance(part, OneCycleLR) and part.last_epoch > part.total_steps:
            moves = _whole(each, plan)
            fix = f"total_steps={moves or '...'})" + ("" if moves else f", with the {_noun(each)}s of the whole run")
            shared = ", less those of its other schedulers" if isinstance(scheduler, SequentialLR) else ""
            note(
                error,
                f"OneCycleLR has total_steps={part.total_steps}, and this was one move more; {_moment(each)}\n"
                f"  fix: OneCycleLR(optimizer, ..., {fix}{shared}",
            )
            return


def _with_an_end(scheduler: LRScheduler) -> OneCycleLR | None:
    """The scheduler, where it is torch's own OneCycleLR, or one that moves as that does."""
    if not isinstance(scheduler, OneCycleLR):
        return None
    kind = type(scheduler)
    return scheduler if (kind.step, kind.get_lr) == (OneCycleLR.step, OneCycleLR.get_lr) else None


def _parts(scheduler: LRScheduler) -> list[LRScheduler]:
    """A scheduler and those that it is made of."""
    parts = getattr(scheduler, "_schedulers", ())  # torch's own name, in SequentialLR and in ChainedScheduler
    return [scheduler, *(inner for part in parts for inner in _parts(part))]


def _noun(each: str) -> str:
    return "optimizer step" if each == "step" else "epoch"


def _moment(each: str) -> str:
    return f'with each="{each}" it moves after each {_noun(each)}'


def _whole(each: str, plan: Plan) -> int | None:
    """The moves of a run from its beginning to the plan's end, where the plan tells."""
    return _moves(each, plan, Progress(), in_hand=False) or None


def _moves(each: str, plan: Plan, progress: Progress, *, in_hand: bool) -> int:
    """How often the fit is to move the scheduler, if no step is skipped; 0 where that is not known."""
    if plan.reached(progress) is not None:
        return 0
    if plan.batches is None and plan.epochs is not None and plan.steps is not None:
        return 0  # nobody knows what comes first
    epoch, step = plan.end(replace(progress, batch=progress.batch + in_hand))
    moves = step - progress.step if each == "step" else epoch - progress.epoch
    return 0 if moves == math.inf else int(moves)
