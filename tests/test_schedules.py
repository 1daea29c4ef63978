"""C6: a scheduler moves at the cadence that was stated, and at no other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from loopwright import Callback, ConfigError, Every, Output, Schedule, State, Trainer, UnknownMetricError

Samples = tuple[Tensor, Tensor]


class WithoutLength:
    def __init__(self, batches: list[Samples]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Samples]:
        yield from self.batches


class Rates(Callback):
    """The learning rate seen at each hook, as ``name: rate``."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def at(self, hook: str) -> list[float]:
        return [rate for name, rate in self.seen if name == hook]

    def _see(self, hook: str, state: State) -> None:
        self.seen.append((hook, state.optimizer.param_groups[0]["lr"]))

    def on_before_step(self, state: State) -> None:
        self._see("before_step", state)

    def on_step_end(self, state: State) -> None:
        self._see("step_end", state)

    def on_batch_end(self, state: State, output: Output) -> None:
        self._see("batch_end", state)

    def on_eval_start(self, state: State) -> None:
        self._see("eval_start", state)

    def on_eval_end(self, state: State) -> None:
        self._see("eval_end", state)

    def on_epoch_end(self, state: State) -> None:
        self._see("epoch_end", state)


def problem(batches: int = 7) -> tuple[nn.Module, torch.optim.SGD, list[Samples]]:
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    data = [(torch.randn(2, 3), torch.randn(2, 1)) for _ in range(batches)]
    return model, torch.optim.SGD(model.parameters(), lr=1.0), data


def halving(optimizer: torch.optim.Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, gamma=0.5)


class Follows(Callback):
    """Logs the given values one after the other under a name of its own."""

    def __init__(self, values: list[float], *, at: Literal["epoch_start", "step_end"] = "epoch_start") -> None:
        self.values = list(values)
        self.at = at

    def on_epoch_start(self, state: State) -> None:
        if self.at == "epoch_start" and self.values:
            state.log("followed", self.values.pop(0))

    def on_step_end(self, state: State) -> None:
        if self.at == "step_end" and self.values:
            state.log("followed", self.values.pop(0))


class Counting(ReduceLROnPlateau):
    """A plateau scheduler that keeps what it was given."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, factor=0.5, patience=1, threshold=0.0)
        self.given: list[float] = []

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as torch's own
        self.given.append(float(metrics))
        super().step(metrics)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batches=st.integers(1, 9), accumulate=st.integers(1, 5), epochs=st.integers(1, 3), known=st.booleans())
def test_one_cycle_over_n_steps_ends_after_exactly_n(batches: int, accumulate: int, epochs: int, known: bool) -> None:
    model, optimizer, data = problem(batches)
    total = -(-batches // accumulate) * epochs
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
    rates = Rates()
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        schedule=Schedule(scheduler, each="step"),
        callbacks=[rates],
        accumulate=accumulate,
        device="cpu",
    )
    progress = trainer.fit(data if known else WithoutLength(data), epochs=epochs).progress
    assert progress.step == scheduler.last_epoch == total

    _, optimizer, _ = problem()
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates.at("before_step") == expected
    assert trainer.state.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="Tried to step"):
        scheduler.step()


def test_each_step_moves_after_on_step_end() -> None:
    model, optimizer, data = problem(2)
    rates = Rates()
    schedule = Schedule(halving(optimizer), each="step")
    Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=[rates], device="cpu").fit(data, epochs=1)
    assert rates.seen == [
        ("before_step", 1.0),
        ("step_end", 1.0),
        ("batch_end", 0.5),
        ("before_step", 0.5),
        ("step_end", 0.5),
        ("batch_end", 0.25),
        ("epoch_end", 0.25),
    ]


def test_each_epoch_moves_after_the_validation_and_before_on_epoch_end() -> None:
    model, optimizer, data = problem(1)
    rates = Rates()
    schedule = Schedule(halving(optimizer), each="epoch")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=[rates], device="cpu")
    trainer.fit(data, data, epochs=2)
    names = ["before_step", "step_end", "batch_end", "eval_start", "eval_end", "epoch_end"]
    assert rates.seen == list(zip(names * 2, [1.0] * 5 + [0.5] * 6 + [0.25], strict=True))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_each_epoch_moves_once_an_epoch_whatever_the_number_of_steps(accumulate: int) -> None:
    model, optimizer, data = problem(7)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.1)
    rates = Rates()
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        schedule=Schedule(scheduler, each="epoch"),
        callbacks=[rates],
        accumulate=accumulate,
        device="cpu",
    )
    trainer.fit(data, epochs=5)
    assert scheduler.last_epoch == 5
    assert rates.at("epoch_end") == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])


def test_a_partial_epoch_moves_a_schedule_of_epochs_only_once_it_is_finished() -> None:
    model, optimizer, data = problem(4)
    scheduler = halving(optimizer)
    schedule = Schedule(scheduler, each="epoch")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    moved = []
    for steps in (3, 4, 6, 8, 9):
        trainer.fit(data, steps=steps)
        moved.append(scheduler.last_epoch)
    assert moved == [0, 1, 1, 2, 2]
    trainer.fit(data, epochs=3)
    assert scheduler.last_epoch == 3


def test_a_later_fit_and_an_evaluation_move_nothing_by_themselves() -> None:
    model, optimizer, data = problem(3)
    scheduler = halving(optimizer)
    schedule = Schedule(scheduler, each="step")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    trainer.fit(data, data, epochs=1)
    trainer.evaluate(data)
    trainer.predict(data)
    trainer.fit(data, data, epochs=1)
    assert scheduler.last_epoch == 3
    trainer.fit(data, data, epochs=2)
    assert scheduler.last_epoch == 6


@pytest.mark.parametrize("kind", ["lambda", "warm restarts", "sequential", "chained"])
@pytest.mark.parametrize("each", ["step", "epoch"])
def test_composed_schedules_give_the_rates_of_a_plain_loop(kind: str, each: Literal["step", "epoch"]) -> None:
    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        if kind == "lambda":
            return LambdaLR(optimizer, lambda n: 1 / (n + 1))
        if kind == "warm restarts":
            return CosineAnnealingWarmRestarts(optimizer, T_0=2)
        warm_up, decay = LinearLR(optimizer, 0.1, total_iters=2), ExponentialLR(optimizer, 0.9)
        if kind == "chained":
            return ChainedScheduler([warm_up, decay], optimizer=optimizer)
        return SequentialLR(optimizer, [warm_up, decay], milestones=[2])

    model, optimizer, data = problem(3)
    rates = Rates()
    schedule = Schedule(make(optimizer), each=each)
    Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=[rates], device="cpu").fit(data, epochs=3)

    model, optimizer, data = problem(3)
    scheduler = make(optimizer)
    expected = []
    for _ in range(3):
        for inputs, targets in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if each == "step":
                scheduler.step()
        if each == "epoch":
            scheduler.step()
    assert rates.at("before_step") == expected


def test_a_plateau_schedule_of_epochs_follows_each_validation_once() -> None:
    model, optimizer, data = problem(3)
    scheduler = Counting(optimizer)
    schedule = Schedule(scheduler, each="epoch", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    history = trainer.fit(data, data[:1], epochs=4).history
    assert scheduler.given == [row["val/loss"] for row in history]


def test_a_plateau_schedule_rests_in_epochs_without_a_validation() -> None:
    model, optimizer, data = problem(3)
    scheduler = Counting(optimizer)
    schedule = Schedule(scheduler, each="epoch", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    history = trainer.fit(data, data[:1], epochs=7, validate=Every(epochs=3)).history
    assert scheduler.given == [history[2]["val/loss"], history[5]["val/loss"]]


def test_a_plateau_schedule_of_steps_follows_each_validation_once() -> None:
    model, optimizer, data = problem(7)
    scheduler = Counting(optimizer)
    values: list[float] = []

    class Values(Callback):
        def on_eval_end(self, state: State) -> None:
            values.append(state.metrics["val/loss"])

    schedule = Schedule(scheduler, each="step", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=[Values()], device="cpu")
    trainer.fit(data, data[:1], epochs=2, validate=Every(steps=4))  # at steps 4, 8 and 12 of 14
    assert len(values) == 3
    assert scheduler.given == values


def test_a_plateau_schedule_of_epochs_follows_the_newest_of_several_validations() -> None:
    model, optimizer, data = problem(7)
    scheduler = Counting(optimizer)
    schedule = Schedule(scheduler, each="epoch", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    history = trainer.fit(data, data[:1], epochs=3, validate=Every(steps=3)).history
    assert scheduler.given == [row["val/loss"] for row in history]
    assert len(scheduler.given) == 3


def test_a_plateau_schedule_follows_the_epochs_mean_of_the_training_loss() -> None:
    model, optimizer, data = problem(5)
    scheduler = Counting(optimizer)
    schedule = Schedule(scheduler, each="epoch", monitor="train/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    history = trainer.fit(data, epochs=3).history
    assert scheduler.given == [row["train/loss"] for row in history]


def test_a_plateau_schedule_follows_what_a_callback_logs_and_only_when_it_does() -> None:
    model, optimizer, data = problem(2)
    scheduler = Counting(optimizer)
    schedule = Schedule(scheduler, each="epoch", monitor="followed")
    callbacks = [Follows([5.0, 4.0, 4.5])]
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=callbacks, device="cpu")
    trainer.fit(data, epochs=6)
    assert scheduler.given == [5.0, 4.0, 4.5]


def test_a_plateau_schedule_of_steps_sees_a_value_logged_in_on_step_end_at_once() -> None:
    model, optimizer, data = problem(6)
    scheduler = Counting(optimizer)
    rates = Rates()
    schedule = Schedule(scheduler, each="step", monitor="followed")
    callbacks = [Follows([3.0, 2.0, 2.0, 2.0, 1.0, 1.0], at="step_end"), rates]
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=callbacks, device="cpu")
    trainer.fit(data, epochs=1)
    assert scheduler.given == [3.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert rates.at("before_step") == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]


def test_a_plateau_schedule_rests_across_fits_until_the_next_value() -> None:
    model, optimizer, data = problem(2)
    scheduler = Counting(optimizer)
    schedule = Schedule(scheduler, each="epoch", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    first = trainer.fit(data, data[:1], epochs=2, validate=Every(epochs=2)).history[-1]["val/loss"]
    trainer.fit(data, data[:1], epochs=3, validate=Every(epochs=2))
    assert scheduler.given == [first]
    last = trainer.fit(data, data[:1], epochs=4, validate=Every(epochs=2)).history[-1]["val/loss"]
    assert scheduler.given == [first, last]


def test_a_name_that_a_plateau_schedule_follows_in_vain_is_an_error_naming_those_there_are() -> None:
    model, optimizer, data = problem(2)
    schedule = Schedule(Counting(optimizer), each="epoch", monitor="val/los")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    with pytest.raises(UnknownMetricError, match=r"train/loss, val/loss[\s\S]*did you mean 'val/loss'"):
        trainer.fit(data, data, epochs=1)


def test_following_a_validation_that_there_is_not_is_an_error_before_the_first_step() -> None:
    model, optimizer, data = problem(2)
    schedule = Schedule(Counting(optimizer), each="epoch", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    with pytest.raises(ConfigError, match="no validation data"):
        trainer.fit(data, epochs=1)
    assert trainer.state.progress.step == 0


def test_following_a_validation_that_the_fit_ends_before_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, data = problem(2)
    schedule = Schedule(Counting(optimizer), each="epoch", monitor="val/loss")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    trainer.fit(data, data[:1], epochs=2, validate=Every(epochs=3))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the schedule follows 'val/loss', and gets no value of it unless a callback logs it: "
        "with validate=Every(epochs=3) a validation is due after epoch 3, and this fit ends before, with epoch 2; "
        "to have one, validate=Every(epochs=1)"
    ]
    caplog.clear()
    trainer.fit(data, data[:1], epochs=3, validate=Every(epochs=3))
    assert "follows" not in caplog.text


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    model, optimizer, _ = problem()
    _, other, _ = problem()
    with pytest.raises(ConfigError, match="another optimizer"):
        Trainer(model, optimizer, nn.MSELoss(), schedule=Schedule(halving(other), each="step"))


@pytest.mark.parametrize("each", ["batch", "steps", "", None, 1])
def test_the_cadence_has_to_be_said_in_one_of_two_words(each: Any) -> None:
    _, optimizer, _ = problem()
    with pytest.raises(ConfigError, match="must be 'step' or 'epoch'"):
        Schedule(halving(optimizer), each=each)


def test_a_bare_scheduler_is_refused_and_never_guessed_about() -> None:
    model, optimizer, _ = problem()
    bare: Any = halving(optimizer)
    with pytest.raises(ConfigError, match="every step or every epoch"):
        Trainer(model, optimizer, nn.MSELoss(), schedule=bare)


def test_a_plateau_scheduler_needs_a_metric_and_others_take_none() -> None:
    _, optimizer, _ = problem()
    with pytest.raises(ConfigError, match="no metric to follow"):
        Schedule(Counting(optimizer), each="epoch")
    with pytest.raises(ConfigError, match="takes no metric"):
        Schedule(halving(optimizer), each="epoch", monitor="val/loss")


def test_no_schedule_brings_torch_to_warn_of_the_order_of_steps() -> None:
    model, optimizer, data = problem(3)
    schedule = Schedule(halving(optimizer), each="step")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu").fit(data, data, epochs=2)
    assert [str(warning.message) for warning in caught] == []
