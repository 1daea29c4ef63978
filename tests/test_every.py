"""Every and Schedule check what they are given; C19: a cadence of steps holds across epochs, fits and skips."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from helpers import At, Unsized, all_equal, line_trainer, ragged, small_trainer, some_batches, weights_of
from loopwright import Callback, ConfigError, Every, Progress, Schedule, State
from loopwright.testing import HookRecorder

NO_COUNT: list[Any] = [0, -1, 1.0, 2.5, True, False, "3", float("nan"), [1]]


class Validations(HookRecorder):
    """The epoch, batch and step at which each validation begins."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[tuple[int, int, int]] = []

    def on_eval_start(self, state: State) -> None:
        self.at.append((state.progress.epoch, state.progress.batch, state.progress.step))

    @property
    def steps(self) -> list[int]:
        return [step for _, _, step in self.at]


@pytest.mark.parametrize("value", NO_COUNT)
@pytest.mark.parametrize("name", ["steps", "epochs"])
def test_a_cadence_is_a_whole_number_of_at_least_one_and_the_error_shows_the_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Every(**{name: value})
    assert f"{name} is {value!r}" in str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"steps": 2, "epochs": 1}, {"steps": None, "epochs": None}])
def test_a_cadence_counts_exactly_one_thing(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
        Every(**arguments)


def test_a_cadence_says_what_it_counts_and_never_changes() -> None:
    every: Any = Every
    with pytest.raises(TypeError):
        every(100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Every(steps=3).steps = 4  # type: ignore[misc]  # the wrong use under test
    assert Every(steps=3) == Every(steps=3) != Every(epochs=3)
    assert len({Every(steps=3), Every(steps=3), Every(epochs=3)}) == 2


def test_a_cadence_of_steps_is_never_due_at_an_epoch_and_the_other_way_round() -> None:
    assert not any(Every(steps=1).due_at_epoch(epoch) for epoch in range(1, 5))
    assert not any(Every(epochs=1).due_at_step(Progress(step=step)) for step in range(1, 5))
    assert [step for step in range(1, 10) if Every(steps=3).due_at_step(Progress(step=step))] == [3, 6, 9]
    assert [epoch for epoch in range(1, 10) if Every(epochs=4).due_at_epoch(epoch)] == [4, 8]


@pytest.mark.parametrize("validate", [1, "epoch", None, (3,), {"steps": 3}, Every])
def test_fit_takes_no_other_cadence_and_says_so_before_the_first_step(validate: Any) -> None:
    trainer = small_trainer(recorder := HookRecorder())
    with pytest.raises(ConfigError, match=r"validate is[\s\S]*Every\(steps=100\)"):
        trainer.fit(some_batches(2), some_batches(1), epochs=1, validate=validate)
    assert recorder.hooks == []


@pytest.mark.parametrize("value", NO_COUNT)
@pytest.mark.parametrize("name", ["epochs", "steps"])
def test_a_target_is_a_whole_number_of_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        small_trainer().fit(some_batches(2), **{name: value})
    assert f"{name} is {value!r}" in str(caught.value)


def test_a_fit_without_a_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no target[\s\S]*epochs=10"):
        small_trainer().fit(some_batches(2))


# C19


def test_validating_every_hundred_steps_of_epochs_of_24_does_so_at_100_200_and_300() -> None:
    trainer = small_trainer(validations := Validations(), model=nn.Linear(3, 1))
    trainer.fit(some_batches(24, size=1), some_batches(1), epochs=13, validate=Every(steps=100))
    assert validations.at == [(4, 4, 100), (8, 8, 200), (12, 12, 300)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batches=st.integers(1, 7),
    accumulate=st.integers(1, 4),
    every=st.integers(1, 9),
    epochs=st.integers(1, 4),
    sized=st.booleans(),
)
def test_a_validation_comes_after_each_nth_step_whatever_the_epochs_and_the_windows(
    batches: int, accumulate: int, every: int, epochs: int, sized: bool
) -> None:
    data = some_batches(batches, size=1)
    trainer = small_trainer(validations := Validations(), model=nn.Linear(3, 1), accumulate=accumulate)
    result = trainer.fit(data if sized else Unsized(data), some_batches(1), epochs=epochs, validate=Every(steps=every))
    total = -(-batches // accumulate) * epochs
    assert result.progress.step == total
    assert validations.steps == list(range(every, total + 1, every))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    targets=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    every=st.integers(1, 6),
    sized=st.booleans(),
)
def test_the_cadence_goes_on_from_fit_to_fit(targets: list[int], every: int, sized: bool) -> None:
    data = some_batches(5, size=1)
    trainer = small_trainer(validations := Validations(), model=nn.Linear(3, 1))
    for steps in targets:
        train = data if sized else Unsized(data)
        trainer.fit(train, some_batches(1), steps=steps, validate=Every(steps=every))
    assert trainer.state.progress.step == max(targets)
    assert validations.steps == list(range(every, max(targets) + 1, every))


def test_a_skipped_step_brings_no_validation_a_second_time() -> None:
    number = iter(range(1, 100))

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0]).square().mean()
        bad = model.training and next(number) in (3, 4, 9)
        return loss * float("nan") if bad else loss

    trainer = small_trainer(validations := Validations(), step=step, on_nonfinite="skip")
    trainer.fit(some_batches(6), some_batches(1), epochs=2, validate=Every(steps=2))
    assert trainer.state.progress.skipped == 3
    assert validations.steps == [2, 4, 6, 8]


def test_validating_every_two_epochs_counts_the_epochs_of_the_whole_run() -> None:
    trainer = small_trainer(validations := Validations())
    for epochs in (1, 3, 4, 5, 8):
        trainer.fit(some_batches(2), some_batches(1), epochs=epochs, validate=Every(epochs=2))
    assert validations.at == [(1, 2, 4), (3, 2, 8), (5, 2, 12), (7, 2, 16)]


def test_the_epoch_of_a_cadence_is_validated_once_though_a_fit_ended_within_it() -> None:
    trainer = small_trainer(validations := Validations())
    for steps in (1, 2, 3, 4):
        trainer.fit(some_batches(3), some_batches(1), steps=steps)
    assert validations.at == [(0, 3, 3)]


def test_a_validation_due_at_the_last_step_of_a_fit_is_made_before_it_ends_and_not_again_after() -> None:
    trainer = small_trainer(validations := Validations())
    data, val = some_batches(5), some_batches(1)
    trainer.fit(data, val, steps=4, validate=Every(steps=4))
    assert validations.steps == [4]
    trainer.fit(data, val, steps=5, validate=Every(steps=4))
    assert validations.steps == [4]


def test_a_changed_cadence_holds_from_the_next_fit_on() -> None:
    trainer = small_trainer(validations := Validations())
    data, val = some_batches(5), some_batches(1)
    trainer.fit(data, val, steps=5, validate=Every(steps=2))
    trainer.fit(data, val, steps=10, validate=Every(steps=3))
    trainer.fit(data, steps=15)  # there is nothing to validate on
    assert validations.steps == [2, 4, 6, 9]


@pytest.mark.parametrize("validate", [Every(steps=1), Every(epochs=5)])
def test_a_cadence_of_validations_without_data_for_them_is_warned_of_once_and_the_run_is_trained(
    caplog: pytest.LogCaptureFixture, validate: Every
) -> None:
    trainer, plain = line_trainer(), line_trainer()
    for epochs in (1, 2):
        trainer.fit(ragged(2, 2), epochs=epochs, validate=validate)
        plain.fit(ragged(2, 2), epochs=epochs)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("loopwright", "WARNING")
    assert record.getMessage().startswith(f"validate={validate} has no effect: fit was given no validation data")
    assert all_equal(weights_of(trainer), weights_of(plain))


def test_the_default_cadence_given_by_hand_needs_no_validation_data(caplog: pytest.LogCaptureFixture) -> None:
    assert small_trainer().fit(some_batches(2), epochs=1, validate=Every(epochs=1)).stop_reason == "epochs"
    assert caplog.records == []


# Schedule


def an_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)


def test_a_schedule_is_frozen_and_its_cadence_has_no_default() -> None:
    scheduler = StepLR(an_optimizer(), 1)
    schedule: Any = Schedule
    with pytest.raises(TypeError, match="each"):
        schedule(scheduler)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule(scheduler, each="step").each = "epoch"  # type: ignore[misc]  # the wrong use under test


@pytest.mark.parametrize("scheduler", [None, 0.1, StepLR, "StepLR", an_optimizer])
def test_what_is_no_scheduler_is_refused(scheduler: Any) -> None:
    with pytest.raises(ConfigError):
        Schedule(scheduler, each="step")


@pytest.mark.parametrize("monitor", ["", " val/loss", "epoch", 3])
def test_a_schedule_cannot_follow_a_name_that_no_metric_can_have(monitor: Any) -> None:
    optimizer = torch.optim.SGD((model := nn.Linear(3, 1)).parameters(), lr=0.1)
    schedule = Schedule(ReduceLROnPlateau(optimizer), each="epoch", monitor=monitor)
    with pytest.raises(ConfigError, match="cannot be the name of a metric"):
        small_trainer(model=model, optimizer=lambda parameters: optimizer, schedule=schedule)


def test_a_scheduler_of_the_users_own_that_takes_a_metric_is_given_it() -> None:
    class Follows:
        def __init__(self) -> None:
            self.given: list[float] = []

        def step(self, metrics: float) -> None:
            self.given.append(metrics)

    scheduler: Any = Follows()
    trainer = small_trainer(schedule=Schedule(scheduler, each="epoch", monitor="train/loss"))
    history = trainer.fit(some_batches(2), epochs=2).history
    assert scheduler.given == [row["train/loss"] for row in history]


def test_a_scheduler_on_a_lambda_is_asked_for_each_rate_once() -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 1.0

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(LambdaLR(optimizer, rate), each="step")
    small_trainer(model=model, optimizer=lambda parameters: optimizer, schedule=schedule).fit(some_batches(4), epochs=1)
    assert asked == [0, 1, 2, 3, 4]


def test_a_schedule_does_not_keep_a_callback_from_the_final_rate_of_an_epoch() -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_epoch_end(self, state: State) -> None:
            rates.append(state.optimizer.param_groups[0]["lr"])

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = Schedule(StepLR(optimizer, 1, gamma=0.5), each="epoch")
    trainer = small_trainer(Rates(), model=model, optimizer=lambda parameters: optimizer, schedule=schedule)
    trainer.fit(some_batches(2), epochs=2)
    assert rates == [0.5, 0.25]


@pytest.mark.parametrize("targets", [{"epochs": 3}, {"steps": 7}, {"epochs": 2, "steps": 7}, {"epochs": 4, "steps": 5}])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_fit_ends_with_the_epoch_and_the_step_that_its_plan_foresees(
    targets: dict[str, Any], accumulate: int, count: int
) -> None:
    foreseen: set[tuple[float, float]] = set()

    def note(state: State) -> None:
        foreseen.add(state.plan.end(state.progress))

    trainer = line_trainer(
        callbacks=[At(on_fit_start=note, on_epoch_start=note, on_epoch_end=note)], accumulate=accumulate
    )
    progress = trainer.fit(ragged(*[2] * count), **targets).progress
    assert foreseen == {(progress.epoch, progress.step)}
