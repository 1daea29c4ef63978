"""What better means: a metric to follow, its fresh values, and which of them is an improvement."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from loopwright.errors import ConfigError, UnknownMetricError
from loopwright.forms import Count, check_form
from loopwright.metrics import check_name, of_stage, unknown_metric
from loopwright.schedule import Every

if TYPE_CHECKING:
    from loopwright.state import State

Mode = Literal["min", "max"]

logger: logging.Logger = logging.getLogger("loopwright")


class Judged(TypedDict):
    """What a Monitor saves: the best value so far, and how far the metrics have been judged."""

    name: str
    mode: str
    best: float | None
    judged: Count


class Monitor:
    """Follows one metric. NaN and infinities are never an improvement.

    Args:
        name: The metric's name, for example ``"val/loss"``.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is. There is no default.
        min_delta: An improvement is a change for the better by more than this, at least 0.

    Raises:
        ConfigError: An argument is not of these.
    """

    def __init__(self, name: str, mode: Mode, min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(
                f"mode is {mode!r}, and must be 'min' or 'max'",
                why=f"whether a smaller or a larger {name!r} is better is not guessed",
                fix='mode="min" for a loss, mode="max" for an accuracy',
            )
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or not 0 <= min_delta < math.inf:
            raise ConfigError(
                f"min_delta is {min_delta!r}",
                why="it is the change for the better that is too small to count, and must be a number of at least 0",
                fix="for example min_delta=0.001",
            )
        self.name: str = check_name(name)
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None
        self._judged = 0  # the mark of the newest value that was looked at

    def reset(self) -> None:
        """Forget all values, as for a fresh run."""
        self.best = None
        self._judged = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and how far the metrics have been judged."""
        return {"name": self.name, "mode": self.mode, "best": self.best, "judged": self._judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from what ``state_dict`` returned; False, with a warning, where that followed another metric."""
        check_form(state, Judged)
        if (state["name"], state["mode"]) != (self.name, self.mode):
            logger.warning("%r is followed from here on: what was saved is of another metric or mode", self.name)
            self.reset()
            return False
        self.best, self._judged = state["best"], state["judged"]
        return True

    def fresh(self, state: State) -> float | None:
        """The metric's value if it was logged since the last look, else None.

        Called where a value may be due. A missing name is an error once everything that could have logged it has
        had its turn: a ``val/`` name after the first validation, every other at the first epoch's end.

        Raises:
            UnknownMetricError: Nothing has logged this name.
        """
        metrics = state.metrics
        mark = metrics.mark_of(self.name)
        if mark == 0:
            own = self.name.partition("/")[0]
            if own != "val" and state.stage == "val":
                return None  # whoever logs it may wait for the epoch's end
            if state.plan.validate is not None and not validated(state) and own != "train":
                return None  # the first validation is still to come
            _check_not_of_evaluation(self.name, state)
            forgotten = state.plan.validate is None and own.startswith("val")
            raise unknown_metric(
                self.name,
                metrics,
                why="fit was given no validation data, and " if forgotten else "",
                fix=("trainer.fit(train, val, ...); " if forgotten else "")
                + f"log it with state.log({self.name!r}, value), in a callback that stands earlier in the list, "
                f"{_by_metrics(self.name, state)}or monitor one that there is",
            )
        if mark <= self._judged:
            return None
        self._judged = mark
        return metrics[self.name]

    def improve(self, value: float) -> bool:
        """Whether ``value`` is better than the best so far; if so it becomes the best."""
        if not math.isfinite(value):
            return False
        if self.best is not None:
            # In this order of operations, as Keras and Lightning: it rounds another way than best - value would.
            worst = value + self.min_delta if self.mode == "min" else value - self.min_delta
            if not (worst < self.best if self.mode == "min" else worst > self.best):
                return False
        self.best = value
        return True


def _by_metrics(name: str, state: State) -> str:
    """How ``metrics=`` would log a name of the validation, as a part of a sentence; empty for any other name."""
    own = of_stage(name)
    if own is None or own[0] != "val" or own[1] == "loss" or own[1] in state.plan.measures:
        return ""
    logged = f"val/{own[1]}"
    as_what = f"as {logged!r}" if logged == name else f"as {logged!r}, with a slash: monitor that"
    return f"or give the measure to Trainer(..., metrics={{{own[1]!r}: ...}}), which logs it {as_what}, "


def _is_measured(rest: str, state: State) -> bool:
    """Whether ``metrics=`` measure what a name says after its stage."""
    return any(rest == measure or rest.startswith(f"{measure}/") for measure in state.plan.measures)


def _check_not_of_evaluation(name: str, state: State) -> None:
    """Raise UnknownMetricError where what is missed is measured by ``metrics=``, and has another stage's name there."""
    stage, rest = of_stage(name) or ("", name)
    if stage == "val" or not _is_measured(rest, state):
        return
    logged = f"val/{rest}"
    raise UnknownMetricError(
        f"there is no metric {name!r}",
        why=f"metrics= are measured in evaluation passes, and not in training; this one is logged as {logged!r}",
        fix=("trainer.fit(train, val, ...), and " if state.plan.validate is None else "")
        + f"monitor {logged!r}"
        + (
            "; or return it from a step, in Output(loss, metrics={...}), which logs it in training" * (stage == "train")
        ),
    )


def validated(state: State) -> bool:
    """Whether a value of a validation was logged, in this fit or before."""
    return any(name.startswith("val/") and state.metrics.mark_of(name) for name in state.metrics)


def _of_validation(name: str | None, state: State) -> str | None:
    """The rest of a name that the validation logs, and nothing else is known to; None of any other."""
    stage, rest = of_stage(name) or ("", "")
    return rest if stage == "val" and (rest == "loss" or _is_measured(rest, state)) else None


def check_validated(name: str | None, state: State) -> None:
    """Raise ConfigError where a value of the validation is followed in a fit without validation data."""
    own = _of_validation(name, state)
    if own is not None and state.plan.validate is None:
        logged = f"val/{own}"
        slash = "" if name == logged else f", and monitor {logged!r}, with a slash"
        raise ConfigError(
            f"{name!r} is monitored, but fit was given no validation data",
            why="nothing would ever log it",
            fix=f"trainer.fit(train, val, ...){slash}, or monitor 'train/loss'",
        )


def unvalidated(followers: Iterable[tuple[str, str | None]], state: State, *, skips: bool) -> dict[str, str]:
    """Warnings of values of the validation that are followed in a fit that ends before its first validation.

    Args:
        followers: Who follows a metric, and its name.
        state: What the run knows, with what a resume has restored.
        skips: Whether the run may skip optimizer steps, which then do not count.

    Returns:
        What each is about, which a later fit of the same run shares, and its words. Nothing where it is not certain
        that no validation is due.
    """
    validate, plan, progress = state.plan.validate, state.plan, state.progress
    follow: dict[str, list[str]] = {}
    for who, name in followers:
        if name is not None and (of_stage(name) or ("",))[0] == "val" and who not in follow.setdefault(name, []):
            follow[name].append(who)
    if not follow or validate is None or validated(state) or state.stop_reason is not None or plan.reached(progress):
        return {}
    epoch, step = plan.end(progress)
    each, done, last = validate.epochs or 1, progress.epoch, epoch
    if validate.steps is not None:
        if progress.step and validate.due_at_step(progress):
            return {}  # the one of this step may still be to come, where the run was left before it
        each, done, last = validate.steps, progress.step, step
    due = each * (done // each + 1)
    if due <= last:
        return {}
    ends, helps = _end_of_fit(state, skips=skips)
    if validate.steps is not None:
        surely = not skips and (plan.batches is not None or plan.epochs is None)
        ends = f"at step {last}" + ("" if surely else " at the latest")
    when = f"{'after epoch' if validate.steps is None else 'at step'} {due}"
    return {
        f"{name} {validate}": f"{' and '.join(', '.join(who).rsplit(', ', 1))} "
        f"{'follow' if who[1:] else 'follows'} {name!r}, and {'get' if who[1:] else 'gets'} no value of it unless a "
        f"callback logs it: with validate={validate} a validation is due {when}, and this fit ends before, {ends}; "
        f"to have one, validate={helps}"
        for name, who in follow.items()
    }


def _end_of_fit(state: State, *, skips: bool) -> tuple[str, str]:
    """Where the fit ends, and a cadence with which a validation is due by then, in words."""
    plan, progress = state.plan, state.progress
    epoch, step = plan.end(progress)
    if plan.steps is None or (plan.batches is not None and step < plan.steps):
        return f"with epoch {epoch}", str(Every(epochs=1))
    at_its_step = str(Every(steps=plan.steps))
    if plan.batches is None and plan.epochs is not None:  # nobody can tell which of the two comes first
        return (
            f"with epoch {epoch} at the latest",
            f"{Every(epochs=1)}, or {at_its_step} where no epoch ends before that step",
        )
    ends_one = plan.batches is not None and epoch > progress.epoch
    unless = ", unless it skips steps" if skips else ""
    return f"at step {plan.steps}{unless}", str(Every(epochs=1)) if ends_one else at_its_step
