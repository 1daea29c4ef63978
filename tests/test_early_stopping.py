"""Early stopping: how it counts, which names it takes, what it restores, and that trainers may share it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

from helpers import (
    Outcome,
    StopsIn,
    Unsized,
    all_equal,
    assert_same_run,
    small_model,
    small_trainer,
    some_batches,
    weights_of,
)
from loopwright import Callback, ConfigError, Every, Output, Schedule, State, Trainer, UnknownMetricError
from loopwright.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor
from small_problems import make_optimizer

Values = Sequence[float]
Target = dict[str, Any]  # epochs= and steps= of a fit


def scripted(values: Iterable[float]) -> Callable[[nn.Module, Any], Output]:
    """A step that trains, and whose loss in evaluation passes of one batch is one value after the other."""
    left = iter(values)

    def step(model: nn.Module, batch: Any) -> Output:
        if model.training:
            return Output((model(batch[0]) - batch[1]).square().mean(), len(batch[0]))
        return Output(torch.tensor(next(left), dtype=torch.float64), 1)

    return step


def stopping(values: Values, *others: Callback[Any], fit: dict[str, Any] | None = None, **how: Any) -> Any:
    """A fit over these validation losses, with an EarlyStopping made of ``how``; both of them, and the trainer."""
    callback = EarlyStopping(**{"monitor": "val/loss", "mode": "min", **how})
    trainer = small_trainer(callback, *others, step=scripted(values))
    return trainer.fit(some_batches(2), some_batches(1), **(fit or {"epochs": len(values)})), callback, trainer


def as_keras_counts(
    values: Values, mode: Literal["min", "max"], patience: int, min_delta: float
) -> tuple[int, float | None, int | None]:
    """Keras's EarlyStopping.on_epoch_end, written out; but what is not finite is no improvement (C11).

    Returns:
        The epochs trained, the best value, and its epoch.
    """
    best: float | None = None
    best_epoch: int | None = None
    wait = 0
    for epoch, current in enumerate(values, start=1):
        wait += 1
        if not math.isfinite(current):
            improved = False
        elif best is None:
            improved = True
        else:
            improved = current + min_delta < best if mode == "min" else current - min_delta > best
        if improved:
            best, best_epoch, wait = current, epoch, 0
        elif wait >= patience:
            return epoch, best, best_epoch
    return len(values), best, best_epoch


def as_lightning_counts(
    values: Values, mode: Literal["min", "max"], patience: int, min_delta: float
) -> tuple[int, float | None]:
    """Lightning's EarlyStopping._evaluate_stopping_criteria, written out, with the same exception.

    Returns:
        The epochs trained, and the best value.
    """
    sign = 1 if mode == "max" else -1
    best_score = -sign * math.inf
    wait_count = 0
    for epoch, current in enumerate(values, start=1):
        ahead = current - sign * min_delta
        if math.isfinite(current) and (ahead > best_score if mode == "max" else ahead < best_score):
            best_score, wait_count = current, 0
        else:
            wait_count += 1
            if wait_count >= patience:
                return epoch, best_score if math.isfinite(best_score) else None
    return len(values), best_score if math.isfinite(best_score) else None


NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
TENTHS = st.integers(-4, 9).map(lambda n: n / 10)  # differences of exactly min_delta, but for their rounding


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.one_of(TENTHS, TENTHS, NOT_FINITE), min_size=1, max_size=9),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.1, 0.2, 0.3]),
)
def test_early_stopping_counts_as_keras_and_lightning_do(
    values: list[float], mode: Literal["min", "max"], patience: int, min_delta: float
) -> None:
    result, callback, _ = stopping(values, mode=mode, patience=patience, min_delta=min_delta)
    epochs, best, best_epoch = as_keras_counts(values, mode, patience, min_delta)
    assert (result.progress.epoch, callback.best, callback.best_epoch) == (epochs, best, best_epoch)
    assert (epochs, best) == as_lightning_counts(values, mode, patience, min_delta)


@pytest.mark.parametrize(
    ("values", "how", "epochs"),
    [
        ([3, 2, 1, 1, 1, 0], {"patience": 2}, 5),  # equal is no improvement
        ([3, 4, 2, 3, 3, 3], {"patience": 2}, 5),  # an improvement begins the count anew
        ([3, 4], {"patience": 1}, 2),
        ([5, 4.9, 4.8, 4.7], {"patience": 2, "min_delta": 0.5}, 3),  # against the best, not the last
        ([5, 4.8, 4.4, 4.3], {"patience": 2, "min_delta": 0.5}, 4),  # small ones add up
        ([math.nan, math.nan, 1], {"patience": 2}, 2),
        ([math.nan, 2, math.nan, 3], {"patience": 2}, 4),
        ([-math.inf, -math.inf, 0], {"patience": 2}, 2),
        ([math.inf, math.inf, 0], {"patience": 2, "mode": "max"}, 2),
    ],
)
def test_early_stopping_stops_after_this_many_epochs(values: Values, how: dict[str, Any], epochs: int) -> None:
    result, _, _ = stopping(values, **how)
    assert result.progress.epoch == epochs


def test_the_reason_of_an_early_stop_says_what_was_waited_for() -> None:
    result, _, _ = stopping([3.0, 2.0, 2.5, 2.25], patience=2)
    assert result.stop_reason == "val/loss did not improve in 2 evaluations; the best is 2 in epoch 2"
    result, _, _ = stopping([math.nan, math.nan], patience=2)
    assert result.stop_reason == "val/loss did not improve in 2 evaluations; none was finite"


def test_patience_counts_evaluations_and_not_epochs() -> None:
    result, _, _ = stopping([1.0] * 9, patience=2, fit={"epochs": 9, "validate": Every(epochs=3)})
    assert result.progress.epoch == 9
    result, _, _ = stopping([1.0] * 9, patience=2, fit={"epochs": 9, "validate": Every(steps=1)})
    assert (result.progress.epoch, result.progress.step) == (1, 3)


def test_the_count_goes_on_in_a_later_fit() -> None:
    callback = EarlyStopping("val/loss", mode="min", patience=3)
    trainer = small_trainer(callback, step=scripted([1.0, 2.0, 2.0, 2.0, 2.0]))
    trainer.fit(some_batches(2), some_batches(1), epochs=3)
    assert trainer.fit(some_batches(2), some_batches(1), epochs=9).progress.epoch == 4


def test_a_run_that_stopped_early_is_judged_on_in_a_later_fit() -> None:
    callback = EarlyStopping("val/loss", mode="min", patience=2)
    trainer = small_trainer(callback, step=scripted([1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0]))
    assert trainer.fit(some_batches(2), some_batches(1), epochs=9).progress.epoch == 3
    assert trainer.fit(some_batches(2), some_batches(1), epochs=9).progress.epoch == 6


def test_a_training_metric_is_judged_at_the_end_of_each_epoch_by_its_mean() -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 3.0])  # means 2, 3, 4

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0]).mean()
        return loss - loss.detach() + next(losses) if model.training else loss

    callback = EarlyStopping("train/loss", mode="min", patience=2)
    trainer = small_trainer(callback, step=step)
    result = trainer.fit(some_batches(2), some_batches(1), epochs=9, validate=Every(steps=1))
    assert result.progress.epoch == 3
    assert callback.best == pytest.approx(2.0)


def test_a_test_pass_is_never_judged_whatever_its_name() -> None:
    callback = EarlyStopping("val/loss", mode="min", patience=1)
    trainer = small_trainer(callback, step=scripted([2.0, 1.0, 9.0, 1.5]))
    trainer.fit(some_batches(2), some_batches(1), epochs=1)
    assert trainer.evaluate(some_batches(1), name="val") == {"val/loss": 1.0}
    trainer.evaluate(some_batches(1), name="val")
    result = trainer.fit(some_batches(2), some_batches(1), epochs=2)
    assert (callback.best, result.stop_reason) == (1.5, "epochs")


@pytest.mark.parametrize("before", [0, 2])
def test_a_test_pass_named_val_does_not_make_a_validation_that_is_to_come_look_forgotten(before: int) -> None:
    trainer = small_trainer(EarlyStopping("val/loss", mode="min"))
    data, val, every = some_batches(2), some_batches(1), Every(epochs=2)
    if before:
        trainer.fit(data, val, epochs=before, validate=every)
    trainer.evaluate(val, name="val")
    assert trainer.fit(data, val, epochs=5, validate=every).stop_reason == "epochs"


# C12: names that do not exist, and modes.


class Logs(Callback):
    """Logs a value under a name at each call of one hook."""

    def __init__(self, name: str, hook: Literal["epoch", "step", "eval"]) -> None:
        self.name, self.hook = name, hook

    def on_epoch_end(self, state: State) -> None:
        if self.hook == "epoch":
            state.log(self.name, state.progress.epoch)

    def on_step_end(self, state: State) -> None:
        if self.hook == "step":
            state.log(self.name, state.progress.step)

    def on_eval_end(self, state: State) -> None:
        if self.hook == "eval":
            state.log(self.name, state.progress.step)


@pytest.mark.parametrize(
    ("name", "near", "val", "validate", "expected"),
    [
        ("val/los", "val/loss", True, Every(epochs=1), (0, 3, 3)),
        ("val/los", "val/loss", True, Every(steps=2), (0, 2, 2)),
        ("val/los", "val/loss", True, Every(epochs=2), (1, 3, 6)),
        ("train/los", "train/loss", True, Every(epochs=1), (1, 0, 3)),
        ("train/los", "train/loss", False, Every(epochs=1), (1, 0, 3)),
        ("train/los", "train/loss", True, Every(epochs=2), (1, 0, 3)),
        ("scor", "score", True, Every(epochs=1), (1, 0, 3)),
        ("scor", "score", False, Every(epochs=1), (1, 0, 3)),
    ],
)
def test_a_name_that_nothing_logs_is_an_error_at_the_first_check_that_lists_the_names_there_are(
    name: str, near: str, val: bool, validate: Every, expected: tuple[int, int, int]
) -> None:
    trainer = small_trainer(Logs("score", "step"), EarlyStopping(name, mode="min"))
    with pytest.raises(UnknownMetricError) as caught:
        trainer.fit(some_batches(3), some_batches(1) if val else None, epochs=5, validate=validate)
    message = str(caught.value)
    assert f"no metric '{name}'" in message
    assert f"did you mean '{near}'?" in message
    assert "score, train/loss" in message
    progress = trainer.state.progress
    assert (progress.epoch, progress.batch, progress.step) == expected


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("hook", ["epoch", "step"])
def test_a_name_that_a_callback_before_it_logs_is_judged(hook: Literal["epoch", "step"], val: bool) -> None:
    callback = EarlyStopping("score", mode="max", patience=1)
    trainer = small_trainer(Logs("score", hook), callback)
    result = trainer.fit(some_batches(3), some_batches(1) if val else None, epochs=2)
    assert result.stop_reason == "epochs"
    assert callback.best == (2 if hook == "epoch" else 6)


def test_a_name_that_is_logged_too_late_to_be_judged_is_an_error_that_says_where_to_log_it() -> None:
    trainer = small_trainer(EarlyStopping("score", mode="max"), Logs("score", "epoch"))
    with pytest.raises(UnknownMetricError, match="earlier in the list"):
        trainer.fit(some_batches(3), epochs=2)


def test_a_value_of_a_validation_that_a_callback_makes_is_judged_at_once() -> None:
    callback = EarlyStopping("val/f1", mode="max")
    small_trainer(Logs("val/f1", "eval"), callback).fit(some_batches(3), some_batches(1), epochs=2)
    assert callback.best == 6


def test_following_a_validation_in_a_fit_without_one_is_an_error_before_the_first_step() -> None:
    trainer = small_trainer(EarlyStopping("val/loss", mode="min"))
    with pytest.raises(ConfigError, match=r"no validation data[\s\S]*fit\(train, val"):
        trainer.fit(some_batches(3), epochs=1)
    assert trainer.state.progress.batch == 0


def test_the_validation_loss_written_otherwise_is_missed_before_the_first_step_too() -> None:
    trainer = small_trainer(EarlyStopping("val_loss", mode="min"))
    with pytest.raises(ConfigError, match=r"no validation data[\s\S]*monitor 'val/loss', with a slash"):
        trainer.fit(some_batches(3), epochs=1)
    assert trainer.state.progress.batch == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("val/accuracy", "metrics={'accuracy': ...}), which logs it as 'val/accuracy', or"),
        ("val/acc", "metrics={'acc': ...}), which logs it as 'val/acc', or"),
        ("val_accuracy", "metrics={'accuracy': ...}), which logs it as 'val/accuracy', with a slash"),
    ],
)
@pytest.mark.parametrize("val", [True, False])
def test_a_measure_of_the_validation_that_nothing_logs_is_answered_with_metrics(
    name: str, words: str, val: bool
) -> None:
    trainer = small_trainer(EarlyStopping(name, mode="max"))
    with pytest.raises(UnknownMetricError) as caught:
        trainer.fit(some_batches(3), some_batches(1) if val else None, epochs=1)
    assert words in caught.value.fix
    assert f"state.log({name!r}, value)" in caught.value.fix
    assert ("fit(train, val" in caught.value.fix) is not val


@pytest.mark.parametrize("name", ["val/error", "val_error", "val/error/worst"])
def test_following_what_metrics_measure_in_a_fit_without_validation_data_is_an_error_before_the_first_step(
    name: str,
) -> None:
    trainer = small_trainer(EarlyStopping(name, mode="min"), metrics={"error": MeanAbsoluteError()})
    with pytest.raises(ConfigError, match="no validation data") as caught:
        trainer.fit(some_batches(3), epochs=1)
    assert ("with a slash" in caught.value.fix) is (name == "val_error")
    assert trainer.state.progress.batch == 0


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("train/error", "val/error"),
        ("train_error", "val/error"),
        ("train/error/worst", "val/error/worst"),
        ("test/error", "val/error"),
        ("error", "val/error"),
    ],
)
@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("who", ["stopping", "checkpoint"])
def test_following_what_metrics_measure_as_if_it_were_of_the_training_is_told_the_name_that_it_has(
    name: str, logged: str, val: bool, who: str, tmp_path: Path
) -> None:
    stopping, saving = EarlyStopping(name, mode="min"), Checkpoint(tmp_path, monitor=name, mode="min")
    callback = stopping if who == "stopping" else saving
    trainer = small_trainer(callback, Logs("train/errors", "step"), metrics={"error": MeanAbsoluteError()})
    with pytest.raises(UnknownMetricError) as caught:
        trainer.fit(some_batches(3), some_batches(1) if val else None, epochs=1)
    assert caught.value.what == f"there is no metric {name!r}"
    assert caught.value.why.startswith("metrics= are measured in evaluation passes, and not in training")
    assert caught.value.fix.startswith(f"monitor {logged!r}" if val else "trainer.fit(train, val, ...), and monitor")
    assert ("Output(loss, metrics=" in caught.value.fix) is name.startswith("train")


def test_a_measure_that_the_training_logs_too_is_followed_there() -> None:
    callback = EarlyStopping("train/error", mode="max")
    trainer = small_trainer(Logs("train/error", "step"), callback, metrics={"error": MeanAbsoluteError()})
    trainer.fit(some_batches(3), some_batches(1), epochs=1)
    assert callback.best == 3


def test_a_measure_that_metrics_have_is_not_what_they_are_told_to_measure() -> None:
    class Two:
        def reset(self) -> None: ...

        def update(self, predictions: Tensor, targets: Tensor) -> None: ...

        def compute(self) -> dict[str, float]:
            return {"mean": 0.0, "worst": 1.0}

    trainer = small_trainer(EarlyStopping("val/error", mode="min"), metrics={"error": Two()})
    with pytest.raises(UnknownMetricError, match="val/error/mean, val/error/worst") as caught:
        trainer.fit(some_batches(3), some_batches(1), epochs=1)
    assert "metrics=" not in caught.value.fix


# A validation that cannot take place.

TOO_LATE: list[tuple[str, dict[str, Any], str]] = [
    (
        "val/loss",
        {"epochs": 3, "validate": Every(epochs=5)},
        "and this fit ends before, with epoch 3",
    ),
    ("val/loss", {"epochs": 2, "validate": Every(steps=99)}, "due at step 99, and this fit ends before, at step 8"),
    ("val/loss", {"steps": 3}, "due after epoch 1, and this fit ends before, at step 3"),
    ("val/loss", {"steps": 99, "epochs": 1, "validate": Every(epochs=2)}, "this fit ends before, with epoch 1"),
    ("val/loss", {"steps": 7, "validate": Every(epochs=2)}, "due after epoch 2, and this fit ends before, at step 7"),
    ("val/error", {"epochs": 3, "validate": Every(epochs=5)}, "ends before, with epoch 3"),
    ("val/mine", {"epochs": 3, "validate": Every(epochs=5)}, "ends before, with epoch 3"),
]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(("name", "asked", "words"), TOO_LATE)
def test_following_a_validation_that_the_fit_ends_before_is_warned_of(
    caplog: pytest.LogCaptureFixture, name: str, asked: dict[str, Any], words: str
) -> None:
    trainer = small_trainer(EarlyStopping(name, mode="min"), metrics={"error": MeanAbsoluteError()})
    trainer.fit(some_batches(4), some_batches(1), **asked)
    (warning,) = warnings_of(caplog)
    validate = asked.get("validate", Every(epochs=1))
    assert warning.startswith(
        f"EarlyStopping follows {name!r}, and gets no value of it unless a callback logs it: "
        f"with validate={validate} a validation is "
    )
    assert f"{words}; to have one, validate=" in warning
    assert "val/loss" not in trainer.state.metrics


def test_an_accumulated_step_counts_as_one_where_a_validation_is_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    data = some_batches(5)
    asked: dict[str, Any] = {"epochs": 2, "validate": Every(steps=7)}
    small_trainer(EarlyStopping("val/loss", mode="min"), accumulate=2).fit(data, some_batches(1), **asked)
    assert "this fit ends before, at step 6;" in warnings_of(caplog)[0]
    caplog.clear()
    small_trainer(EarlyStopping("val/loss", mode="min")).fit(data, some_batches(1), **asked)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("val/loss", {"epochs": 5, "validate": Every(epochs=5)}),
        ("val/loss", {"epochs": 2, "validate": Every(steps=8)}),
        ("val/loss", {"steps": 4}),
        ("train/loss", {"epochs": 3, "validate": Every(epochs=5)}),
        ("score", {"epochs": 3, "validate": Every(epochs=5)}),
    ],
)
def test_following_what_there_will_be_a_value_of_is_not_warned_of(
    caplog: pytest.LogCaptureFixture, name: str, asked: dict[str, Any]
) -> None:
    trainer = small_trainer(Logs("score", "step"), EarlyStopping(name, mode="min", patience=9))
    trainer.fit(some_batches(4), some_batches(1), **asked)
    assert warnings_of(caplog) == []


def test_a_fit_of_unknown_length_is_not_warned_of_unless_its_epochs_tell(caplog: pytest.LogCaptureFixture) -> None:
    stopping = EarlyStopping("val/loss", mode="min")
    small_trainer(stopping).fit(Unsized(some_batches(2)), some_batches(1), epochs=2, validate=Every(steps=5))
    small_trainer(stopping).fit(Unsized(some_batches(2)), some_batches(1), steps=2, validate=Every(epochs=2))
    assert warnings_of(caplog) == []
    small_trainer(stopping).fit(Unsized(some_batches(2)), some_batches(1), epochs=2, validate=Every(epochs=3))
    assert len(warnings_of(caplog)) == 1


def test_a_later_fit_of_a_run_that_was_validated_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    trainer = small_trainer(EarlyStopping("val/loss", mode="min"))
    trainer.fit(some_batches(2), some_batches(1), epochs=2, validate=Every(epochs=2))
    trainer.fit(some_batches(2), some_batches(1), epochs=3, validate=Every(epochs=2))
    assert warnings_of(caplog) == []


def test_a_later_fit_counts_from_where_the_run_is(caplog: pytest.LogCaptureFixture) -> None:
    trainer = small_trainer(EarlyStopping("val/loss", mode="min"))
    trainer.fit(some_batches(2), some_batches(1), epochs=2, validate=Every(epochs=3))
    trainer.fit(some_batches(2), some_batches(1), epochs=3, validate=Every(epochs=3))
    assert len(warnings_of(caplog)) == 1
    assert "val/loss" in trainer.state.metrics


def test_one_evaluation_is_counted_in_the_singular() -> None:
    result, _, _ = stopping([1.0, 2.0], patience=1)
    assert result.stop_reason == "val/loss did not improve in 1 evaluation; the best is 1 in epoch 1"


def test_mode_has_no_default_and_no_third_value() -> None:
    early_stopping: Any = EarlyStopping
    with pytest.raises(TypeError, match="mode"):
        early_stopping("val/loss")
    with pytest.raises(TypeError):
        early_stopping("val/loss", "min")
    for mode in ("auto", "MIN", "", None, "minimum"):
        with pytest.raises(ConfigError, match=r"mode is [\s\S]*'min' or 'max'"):
            early_stopping("val/loss", mode=mode)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patience": 0},
        {"patience": -1},
        {"patience": 2.5},
        {"patience": True},
        {"patience": None},
        {"min_delta": -0.1},
        {"min_delta": math.nan},
        {"min_delta": math.inf},
        {"min_delta": "0.1"},
        {"min_delta": True},
        {"monitor": ""},
        {"monitor": "../loss"},
        {"monitor": None},
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EarlyStopping(**{"monitor": "val/loss", "mode": "min", **wrong})


# C13: restore_best, and C14: the score belongs to the weights.


class KeepsWeights(Callback):
    """Copies of the weights that each validation was made with, and of the last ones."""

    def __init__(self) -> None:
        self.validated: list[list[Tensor]] = []
        self.last: list[Tensor] = []

    def on_eval_start(self, state: State) -> None:
        self.validated.append(self.copy(state))

    def on_fit_end(self, state: State) -> None:
        self.last = self.copy(state)

    def copy(self, state: State) -> list[Tensor]:
        return [value.clone() for value in state.model.state_dict().values()]


BEST_THIRD = [5.0, 4.0, 1.0, 3.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("cause", "fit", "patience", "others", "reason"),
    [
        ("a target of epochs", {"epochs": 5}, 9, [], "epochs"),
        ("a target of steps", {"steps": 9}, 9, [], "steps"),
        ("patience", {"epochs": 8}, 2, [], "val/loss did not improve in 2 evaluations; the best is 1 in epoch 3"),
        ("another callback", {"epochs": 8}, 9, [("on_step_end", 8)], "enough"),
        ("another callback in a validation", {"epochs": 8}, 9, [("on_eval_start", 4)], "enough"),
        ("a stop in the best validation", {"epochs": 8}, 9, [("on_eval_end", 3)], "enough"),
    ],
)
def test_the_best_weights_are_restored_whatever_ended_the_run(
    cause: str, fit: dict[str, int], patience: int, others: list[tuple[str, int]], reason: str
) -> None:
    keeps = KeepsWeights()
    stops = [StopsIn(*other) for other in others]
    result, _, trainer = stopping(BEST_THIRD, keeps, *stops, fit=fit, patience=patience, restore_best=True)
    assert result.stop_reason == reason
    assert result.restored_epoch == 3
    assert all_equal(weights_of(trainer), keeps.validated[2])
    assert all_equal(weights_of(trainer), keeps.last) == (cause == "a stop in the best validation")


def test_the_best_of_several_validations_in_one_epoch_is_restored() -> None:
    keeps = KeepsWeights()
    result, _, trainer = stopping(
        BEST_THIRD, keeps, fit={"steps": 7, "validate": Every(steps=1)}, patience=9, restore_best=True
    )
    assert result.restored_epoch == 2  # step 3, of epochs of two
    assert all_equal(weights_of(trainer), keeps.validated[2])


def test_buffers_are_restored_with_the_weights() -> None:
    model = small_model().train()
    callback = EarlyStopping("val/loss", mode="min", patience=1, restore_best=True)
    trainer = small_trainer(callback, keeps := KeepsWeights(), model=model, step=scripted([1.0, 2.0]))
    trainer.fit(some_batches(2), some_batches(1), epochs=2)
    assert not all_equal(keeps.validated[0], keeps.validated[1])
    assert int(model.state_dict()["1.num_batches_tracked"]) == 2
    assert all_equal(weights_of(trainer), keeps.validated[0])


def test_nothing_is_restored_where_it_was_not_asked_for_or_no_value_was_finite() -> None:
    result, _, trainer = stopping(BEST_THIRD, keeps := KeepsWeights(), patience=2)
    assert result.restored_epoch is None
    assert all_equal(weights_of(trainer), keeps.last)
    result, _, trainer = stopping([math.nan] * 3, keeps := KeepsWeights(), patience=9, restore_best=True)
    assert result.restored_epoch is None
    assert all_equal(weights_of(trainer), keeps.last)


def test_nothing_is_restored_on_an_error() -> None:
    class Breaks(Callback):
        def on_fit_end(self, state: State) -> None:
            raise OSError("planted")

    callback = EarlyStopping("val/loss", mode="min", patience=9, restore_best=True)
    trainer = small_trainer(callback, keeps := KeepsWeights(), Breaks(), step=scripted(BEST_THIRD))
    with pytest.raises(OSError, match="planted"):
        trainer.fit(some_batches(2), some_batches(1), epochs=5)
    assert all_equal(weights_of(trainer), keeps.last)


def test_callbacks_see_the_last_weights_to_the_end_and_the_caller_the_best() -> None:
    _, _, trainer = stopping(BEST_THIRD, keeps := KeepsWeights(), fit={"epochs": 5}, patience=9, restore_best=True)
    assert all_equal(keeps.validated[4], keeps.last)
    assert not all_equal(weights_of(trainer), keeps.last)


@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
@pytest.mark.parametrize("targets", [({"epochs": 4}, {"epochs": 8}), ({"steps": 7}, {"steps": 9}, {"epochs": 8})])
def test_going_on_after_restoring_trains_on_from_the_last_weights(optimizer: str, targets: tuple[Target, ...]) -> None:
    def whole(*parts: Target) -> tuple[Outcome, list[Tensor]]:
        keeps, model = KeepsWeights(), small_model()
        trainer = small_trainer(
            EarlyStopping("val/loss", mode="min", patience=9, restore_best=True),
            keeps,
            model=model,
            optimizer=lambda parameters: make_optimizer(optimizer, model),
            step=scripted(BEST_THIRD),
            seed=3,
        )
        for part in parts:
            result = trainer.fit(some_batches(2), some_batches(1), **part)
            assert result.restored_epoch == 3
        return Outcome(weights_of(trainer), result), keeps.last

    in_parts, last_in_parts = whole(*targets)
    unbroken, last = whole({"epochs": 8})
    assert_same_run(in_parts, unbroken)
    assert all_equal(last_in_parts, last)


def test_a_fit_with_nothing_left_keeps_the_restored_weights_and_says_so() -> None:
    result, _, trainer = stopping(BEST_THIRD, fit={"epochs": 5}, patience=9, restore_best=True)
    before = weights_of(trainer)
    again = trainer.fit(some_batches(2), some_batches(1), epochs=5)
    assert again.restored_epoch == result.restored_epoch == 3
    assert all_equal(before, weights_of(trainer))


def test_weights_that_the_user_changed_after_restoring_are_the_ones_trained_on() -> None:
    class AtStart(KeepsWeights):
        def on_fit_start(self, state: State) -> None:
            self.first = self.copy(state)

    _, _, trainer = stopping(BEST_THIRD, starts := AtStart(), fit={"epochs": 5}, patience=9, restore_best=True)
    with torch.no_grad():
        next(trainer.state.model.parameters()).fill_(0.5)
    mine = weights_of(trainer)
    result = trainer.fit(some_batches(2), some_batches(1), epochs=6)
    assert all_equal(starts.first, mine)
    assert result.progress.epoch == 6


def test_only_one_callback_may_restore() -> None:
    one, two = (EarlyStopping(name, mode="min", restore_best=True) for name in ("val/loss", "train/loss"))
    with pytest.raises(ConfigError, match="2 callbacks have restore_best=True"):
        small_trainer(one, two)
    small_trainer(one, EarlyStopping("train/loss", mode="min"))


# C15: one callback, two trainers.


class Remembers(Callback):
    """State of the usual kind: a list that grows, cleared where a fresh run begins."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_fit_start(self, state: State) -> None:
        if state.progress.fresh:
            self.losses.clear()

    def on_epoch_end(self, state: State) -> None:
        self.losses.append(state.metrics["train/loss"])

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: Any) -> None:
        self.losses = state["losses"]


def shared() -> list[Callback[Any]]:
    return [
        EarlyStopping("val/loss", mode="min", patience=2, restore_best=True),
        LearningRateMonitor(),
        Remembers(),
    ]


SCRIPTS = ([5.0, 4.0, 6.0, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0, 0.5], [1.0, 2.0, 0.5, 3.0, 2.0, 2.0])


def part(trainer: Trainer, epochs: int, callbacks: list[Callback[Any]]) -> tuple[Any, ...]:
    result = trainer.fit(some_batches(2), some_batches(1), epochs=epochs)
    remembers = callbacks[-1]
    assert isinstance(remembers, Remembers)
    said = result.history, result.stop_reason, result.progress, result.restored_epoch, list(remembers.losses)
    return (*said, [value.tolist() for value in weights_of(trainer)])


@pytest.mark.parametrize(
    "order",
    [
        [(0, 9), (1, 9)],
        [(0, 2), (1, 2), (0, 9), (1, 9)],
        [(0, 2), (1, 1), (0, 3), (1, 3), (0, 9), (1, 9)],
        [(0, 9), (1, 2), (0, 12), (1, 9)],
    ],
)
def test_a_callback_used_by_two_trainers_gives_what_two_fresh_ones_give(order: list[tuple[int, int]]) -> None:
    common, own = shared(), (shared(), shared())
    with_common = [small_trainer(*common, step=scripted(SCRIPTS[i]), seed=i) for i in (0, 1)]
    with_own = [small_trainer(*own[i], step=scripted(SCRIPTS[i]), seed=i) for i in (0, 1)]
    for which, epochs in order:
        torch.manual_seed(9)
        found = part(with_common[which], epochs, common)
        torch.manual_seed(9)
        assert found == part(with_own[which], epochs, own[which])


def test_an_evaluation_by_another_trainer_leaves_a_callback_as_it_is() -> None:
    callback = EarlyStopping("val/loss", mode="min", patience=2)
    one, two = (small_trainer(callback, step=scripted(values)) for values in ([1.0, 2.0, 2.0], [0.1]))
    one.fit(some_batches(2), some_batches(1), epochs=2)
    two.evaluate(some_batches(1), name="val")
    assert one.fit(some_batches(2), some_batches(1), epochs=9).progress.epoch == 3
    assert callback.best == 1.0


@given(
    target=st.fixed_dictionaries({}, optional={"epochs": st.integers(1, 3), "steps": st.integers(1, 9)}).filter(bool),
    validate=st.builds(Every, steps=st.integers(1, 12)) | st.builds(Every, epochs=st.integers(1, 4)),
    sized=st.booleans(),
    accumulate=st.integers(1, 2),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_warning_comes_where_no_validation_does_and_one_of_its_cadences_brings_one(
    caplog: pytest.LogCaptureFixture, target: Target, validate: Every, sized: bool, accumulate: int
) -> None:
    def fit(cadence: Every) -> tuple[list[str], bool]:
        caplog.clear()
        trainer = small_trainer(EarlyStopping("val/loss", mode="min", patience=99), accumulate=accumulate)
        data = some_batches(3)
        trainer.fit(data if sized else Unsized(data), some_batches(1), **target, validate=cadence)
        return warnings_of(caplog), "val/loss" in trainer.state.metrics

    warnings, validated = fit(validate)
    if sized:
        assert bool(warnings) is not validated
    for warning in warnings:
        assert not validated
        advised = re.findall(r"Every\((steps|epochs)=(\d+)\)", warning.partition("to have one, ")[2])
        assert any(fit(Every(**{kind: int(number)}))[1] for kind, number in advised)
        assert len(advised) == (1 if sized or len(target) == 1 else 2)


def test_a_run_in_stages_is_warned_once_for_each_cadence(caplog: pytest.LogCaptureFixture) -> None:
    trainer = small_trainer(EarlyStopping("val/loss", mode="min"))
    for epochs in (1, 2):
        trainer.fit(some_batches(2), some_batches(1), epochs=epochs, validate=Every(epochs=5))
    assert len(warnings_of(caplog)) == 1
    for epochs in (3, 4):
        trainer.fit(some_batches(2), some_batches(1), epochs=epochs, validate=Every(steps=50))
    assert len(warnings_of(caplog)) == 2


def test_all_who_follow_one_name_are_in_one_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), each="epoch", monitor="val/loss")
    callbacks = [
        *(EarlyStopping(name, mode="min") for name in ("val/loss", "val/loss", "val/mine")),
        Checkpoint(tmp_path / "run", monitor="val/loss", mode="min"),
        Checkpoint(tmp_path / "other"),
    ]
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=callbacks, device="cpu")
    trainer.fit(some_batches(2), some_batches(1), steps=1)
    assert [warning.partition(" of it")[0] for warning in warnings_of(caplog)] == [
        "EarlyStopping, Checkpoint and the schedule follow 'val/loss', and get no value",
        "EarlyStopping follows 'val/mine', and gets no value",
    ]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"steps": 3}, "at step 3, unless it skips steps; to have"),
        ({"epochs": 1, "validate": Every(steps=9)}, "at step 4 at the latest; to have"),
    ],
)
def test_where_steps_may_be_skipped_the_warning_says_what_depends_on_it(
    caplog: pytest.LogCaptureFixture, asked: dict[str, Any], words: str
) -> None:
    trainer = small_trainer(EarlyStopping("val/loss", mode="min"), on_nonfinite="skip")
    trainer.fit(some_batches(4), some_batches(1), **asked)
    assert words in warnings_of(caplog)[0]


def test_a_run_that_is_to_stop_at_once_is_not_warned_of_validations(caplog: pytest.LogCaptureFixture) -> None:
    trainer = small_trainer(StopsIn("on_fit_start"), EarlyStopping("val/loss", mode="min"))
    trainer.fit(some_batches(4), some_batches(1), steps=3)
    assert warnings_of(caplog) == []
