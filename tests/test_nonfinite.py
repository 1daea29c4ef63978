"""NaN and infinity (C11): found, said where, never trained on, never returned; at every step and at log points."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import At, Samples, Unsized, line, line_trainer, ragged
from loopwright import Callback, Every, NonFiniteError, Output, Schedule, State, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping
from loopwright.guard import NonFinitePolicy, all_finite

BAD = [math.nan, math.inf, -math.inf]
POLICIES: list[NonFinitePolicy] = ["raise", "skip", "ignore"]


@pytest.fixture(params=[True, False], ids=["read each step", "read at log points"])
def cadence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(Trainer, "_read_each_step", request.param)
    return bool(request.param)


class Poisoned:
    """Batches of which some, by epoch and index counted from 0, have a value that is not finite in their targets."""

    def __init__(self, batches: list[Samples], *bad: tuple[int, int], value: float = math.nan) -> None:
        self.batches, self.bad, self.value = batches, bad, value
        self.epoch = -1

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Samples]:
        self.epoch += 1
        for index, (inputs, targets) in enumerate(self.batches):
            poison = self.value if (self.epoch, index) in self.bad else 0.0
            yield inputs, targets + poison


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def place(error: NonFiniteError) -> tuple[int, int, int]:
    """The epoch, batch and optimizer step that an error names."""
    found = re.search(r"in epoch (\d+), batch (\d+), at optimizer step (\d+)", error.what)
    assert found is not None, error
    epoch, batch, step = map(int, found.groups())
    return epoch, batch, step


def sqrt_of_zero(model: nn.Module) -> Tensor:
    """It is 0, and its gradient is NaN."""
    weight = next(model.parameters())
    return (weight * 0).sum().sqrt()


# "raise"


@pytest.mark.parametrize("value", BAD)
@pytest.mark.usefixtures("cadence")
def test_by_default_a_loss_that_is_not_finite_ends_the_run_with_an_error_that_says_where(value: float) -> None:
    trainer = line_trainer()
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(Poisoned(ragged(2, 2, 2), (1, 1), value=value), epochs=4)
    assert "the loss" in caught.value.what
    assert place(caught.value) == (2, 2, 5)
    assert caught.value.why
    assert "on_nonfinite" in caught.value.fix
    assert isinstance(caught.value, FloatingPointError)


def test_the_loss_is_checked_before_its_backward() -> None:
    model = line()
    trainer = line_trainer(model)
    trainer.fit(ragged(2), epochs=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match="is nan in epoch 2"):
        trainer.fit(Poisoned(ragged(2), (0, 0)), epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.weight.grad is None  # zeroed for the new window, and nothing went backward since


class Reads(Callback[Any]):
    """Logs a tensor and reads it after every so many batches: on an accelerator that waits for the device."""

    def __init__(self, every: int, hook: str) -> None:
        self.every, self.count = every, 0
        setattr(self, hook, self.read)

    def read(self, state: State, *_: object) -> None:
        self.count += 1
        if self.count % self.every == 0:
            state.log("seen", torch.zeros(()))
            assert state.metrics["seen"] == 0.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    accumulate=st.integers(1, 4),
    batches=st.integers(1, 7),
    bad=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=2),
    read=st.sampled_from([1, 2, 3, 5, 1000]),
    hook=st.sampled_from(["on_batch_end", "on_step_end", "on_before_step", "on_batch_start"]),
    known=st.booleans(),
    eager=st.booleans(),
)
def test_the_error_names_the_first_bad_batch_however_often_values_are_read(
    accumulate: int, batches: int, bad: list[tuple[int, int]], read: int, hook: str, known: bool, eager: bool
) -> None:
    bad = [(epoch, index % batches) for epoch, index in bad]
    epoch, index = min(bad)
    data: Any = Poisoned(ragged(*[2] * batches), *bad)
    trainer = with_cadence(eager, accumulate=accumulate, callbacks=[Reads(read, hook)], lr=0.01)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(data if known else Hidden(data), ragged(2), epochs=3, validate=Every(steps=2))
    steps_an_epoch = math.ceil(batches / accumulate)
    assert "the loss" in caught.value.what
    assert place(caught.value) == (epoch + 1, index + 1, epoch * steps_an_epoch + index // accumulate + 1)


@pytest.mark.parametrize("read", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_a_read_in_the_middle_of_a_window_does_not_shift_the_step_that_an_error_names(
    accumulate: int, read: int
) -> None:
    for bad in range(8):
        trainer = with_cadence(False, accumulate=accumulate, callbacks=[Reads(read, "on_batch_end")], lr=0.01)
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit(Poisoned(ragged(*[2] * 8), (0, bad)), epochs=1)
        assert place(caught.value) == (1, bad + 1, bad // accumulate + 1)


class Hidden:
    """Gives on what another gives, but not its length."""

    def __init__(self, data: Poisoned) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Samples]:
        return iter(self.data)


def with_cadence(eager: bool, model: nn.Module | None = None, **made: Any) -> Trainer:
    """A trainer that reads values at each step, or only where somebody asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_read_each_step", eager)
        return line_trainer(model, **made)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    accumulate=st.integers(1, 3),
    batches=st.integers(1, 7),
    window=st.integers(0, 6),
    read=st.sampled_from([1, 2, 3, 1000]),
    known=st.booleans(),
    eager=st.booleans(),
    later=st.booleans(),
)
def test_where_clipping_looks_a_bad_gradient_is_found_in_its_own_window(
    accumulate: int, batches: int, window: int, read: int, known: bool, eager: bool, later: bool
) -> None:
    """Although the loss of the next batch is not finite either, for the weights are ruined by then."""
    windows = math.ceil(batches / accumulate)
    window %= windows
    at = accumulate * window + (1 if later and accumulate * window + 1 < min(batches, accumulate * (window + 1)) else 0)

    def step(model: nn.Module, batch: tuple[Samples, bool]) -> Tensor:
        (inputs, targets), bad = batch
        loss = F.mse_loss(model(inputs), targets)
        return loss + sqrt_of_zero(model) if bad else loss

    data: Any = [(batch, index == at) for index, batch in enumerate(ragged(*[2] * batches))]
    trainer = with_cadence(
        eager, accumulate=accumulate, clip_norm=1.0, step=sized(step), callbacks=[Reads(read, "on_batch_end")]
    )
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(data if known else Unsized(data), epochs=1)
    assert "norm of the gradients" in caught.value.what
    epoch, batch, optimizer_step = place(caught.value)
    assert (epoch, optimizer_step) == (1, window + 1)
    assert window * accumulate < batch <= min(batches, (window + 1) * accumulate)


def sized(step: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Output]:
    return lambda model, batch: Output(step(model, batch), weight=2)


@pytest.mark.usefixtures("cadence")
def test_without_clipping_weights_ruined_in_the_last_step_are_found_at_the_end_of_fit() -> None:
    model = line()
    ended: list[str] = []
    with pytest.raises(NonFiniteError, match=r"1 of 2 trainable parameters .* weight") as caught:
        line_trainer(
            model,
            step=lambda model, batch: model(batch[0]).mean() + sqrt_of_zero(model),
            callbacks=[At(on_fit_end=lambda state: ended.append("well"))],
        ).fit(ragged(2), steps=1)
    assert not ended
    assert caught.value.fix


@pytest.mark.usefixtures("cadence")
def test_a_learning_rate_that_diverges_is_caught() -> None:
    with pytest.raises(NonFiniteError, match="loss"):
        line_trainer(lr=1e6).fit(ragged(4, 4, 4), epochs=50)


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("kind", ["buffer", "frozen parameter"])
def test_what_is_not_trained_may_hold_infinities(kind: str) -> None:
    model = line()
    mask = torch.full((3,), -math.inf)
    if kind == "buffer":
        model.register_buffer("mask", mask)
    else:
        model.register_parameter("mask", nn.Parameter(mask, requires_grad=False))
    result = line_trainer(model).fit(ragged(2), epochs=2)
    assert result.stop_reason == "epochs"


# The log.


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("read", [1, 1000])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_log_shows_the_nan_of_the_loss_that_ended_the_run(accumulate: int, read: int, tmp_path: Path) -> None:
    """Also where it is found before its window has come to its step."""
    path = tmp_path / "metrics.csv"
    trainer = line_trainer(callbacks=[CSVLogger(path), Reads(read, "on_batch_end")], accumulate=accumulate)
    with pytest.raises(NonFiniteError):
        trainer.fit(Poisoned(ragged(2, 2, 2, 2), (1, 2)), epochs=3)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert math.isfinite(float(rows[0]["train/loss"]))
    assert math.isnan(float(rows[-1]["train/loss"]))
    assert math.isnan(trainer.state.metrics["train/loss"])


@pytest.mark.usefixtures("cadence")
def test_a_nan_in_validation_is_logged_and_no_improvement_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopping = EarlyStopping("val/loss", mode="min", patience=2, restore_best=True)
    val = Poisoned(ragged(3), (1, 0), (2, 0))
    result = line_trainer(callbacks=[stopping]).fit(ragged(2, 2), val, epochs=9)
    assert [math.isfinite(row["val/loss"]) for row in result.history] == [True, False, False]
    assert result.restored_epoch == 1
    assert "val/loss" in result.stop_reason
    assert len([record for record in caplog.records if "val/loss is nan" in record.getMessage()]) == 1


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", BAD)
def test_nothing_that_is_not_finite_becomes_the_best(value: float, mode: Any) -> None:
    stopping = EarlyStopping("val/loss", mode=mode, patience=1)
    trainer = line_trainer(callbacks=[stopping], step=lambda model, batch: model(batch[0]).mean() * 0 + batch[1].mean())
    result = trainer.fit([(torch.zeros(2, 3), torch.ones(2))], [(torch.zeros(2, 3), torch.full((2,), value))], epochs=5)
    assert stopping.best is None
    assert result.progress.epoch == 1
    assert "none was finite" in result.stop_reason


# "skip"


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("value", BAD)
def test_skip_drops_the_whole_window_from_weights_and_means(value: float, accumulate: int) -> None:
    batches = ragged(2, 3, 1, 2, 2, 4, 2)
    model, twin = line(), line()
    data = Poisoned(batches, (0, 3), value=value)
    trainer = line_trainer(model, accumulate=accumulate, on_nonfinite="skip")
    result = trainer.fit(data, epochs=1)
    first = 3 // accumulate * accumulate
    kept = batches[:first] + batches[first + accumulate :]
    expected = line_trainer(twin, accumulate=accumulate).fit(kept, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert result.history[0]["train/loss"] == pytest.approx(expected.history[0]["train/loss"], rel=1e-12)
    assert result.progress.step == expected.progress.step
    assert result.progress.skipped == 1
    assert result.progress.batch == 0
    assert result.progress.samples == 16  # seen, all the same


def test_skip_looks_at_the_gradients_at_every_step() -> None:
    batches = ragged(2, 2, 2)
    model, twin = line(), line()

    def step(model: nn.Module, batch: Samples) -> Tensor:
        loss = F.mse_loss(model(batch[0]), batch[1])
        return loss + sqrt_of_zero(model) if batch is batches[1] else loss

    trainer = line_trainer(model, step=step, on_nonfinite="skip")
    result = trainer.fit(batches, epochs=1)
    expected = line_trainer(twin).fit([batches[0], batches[2]], epochs=1)
    assert torch.equal(model.weight, twin.weight)
    assert result.history[0]["train/loss"] == pytest.approx(expected.history[0]["train/loss"], rel=1e-12)
    assert (result.progress.step, result.progress.skipped) == (2, 1)


def test_a_skipped_step_fires_no_step_hook_and_moves_no_schedule() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "step")
    steps: list[int] = []
    at = At(on_step_end=lambda state: steps.append(state.progress.step))
    line_trainer(model, optimizer=optimizer, schedule=schedule, callbacks=[at], on_nonfinite="skip").fit(
        Poisoned(ragged(2, 2, 2), (0, 0), (0, 2)), epochs=1
    )
    assert steps == [1]
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_an_epoch_in_which_every_step_was_skipped_has_nan_for_its_mean() -> None:
    result = line_trainer(on_nonfinite="skip").fit(Poisoned(ragged(2, 2), (0, 0), (0, 1)), epochs=2)
    assert math.isnan(result.history[0]["train/loss"])
    assert math.isfinite(result.history[1]["train/loss"])


def test_a_run_for_a_number_of_steps_in_which_all_are_skipped_ends() -> None:
    every = [(epoch, index) for epoch in range(9) for index in range(2)]
    with pytest.raises(NonFiniteError, match="every one was skipped"):
        line_trainer(on_nonfinite="skip").fit(Poisoned(ragged(2, 2), *every), steps=5)


@pytest.mark.usefixtures("cadence")
def test_skip_does_not_go_on_for_ever_with_weights_that_are_ruined() -> None:
    """On data without end no epoch ever ends, and with such weights no step would be made again."""
    model = line()
    batches = ragged(2)

    class Forever:
        def __iter__(self) -> Iterator[Samples]:
            for _ in range(1000):
                yield from batches
            raise AssertionError("the run went on and on")

    def ruin(state: State) -> None:
        if state.progress.step == 3:
            with torch.no_grad():
                model.weight.fill_(math.inf)

    with pytest.raises(NonFiniteError, match="trainable parameters"):
        line_trainer(model, on_nonfinite="skip", callbacks=[At(on_step_end=ruin)]).fit(Forever(), steps=10)


# "ignore"


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_ignore_trains_on_as_the_plain_loop_would(clip_norm: float | None) -> None:
    model = line()
    result = line_trainer(model, on_nonfinite="ignore", clip_norm=clip_norm).fit(
        Poisoned(ragged(2, 2), (0, 1)), epochs=2
    )
    assert result.stop_reason == "epochs"
    assert result.progress.step == 4
    assert result.progress.skipped == 0
    assert all(math.isnan(row["train/loss"]) for row in result.history)
    assert bool(model.weight.isnan().all())


# All of them.


def error_of(trainer: Trainer, data: Any, targets: dict[str, Any]) -> NonFiniteError | None:
    try:
        trainer.fit(data, **targets)
    except NonFiniteError as error:
        return error
    return None


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=st.sampled_from(POLICIES[:2]),
    eager=st.booleans(),
    accumulate=st.integers(1, 3),
    clip_norm=st.sampled_from([None, 1.0]),
    batches=st.integers(1, 5),
    targets=st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 3}, {"epochs": 2, "steps": 4}]),
    ruin=st.sampled_from(["loss", "gradient", "weights", "nothing"]),
    bad=st.tuples(st.integers(0, 2), st.integers(0, 4)),
    value=st.sampled_from(BAD),
    optimizer=st.sampled_from([torch.optim.SGD, torch.optim.Adam]),
)
def test_no_fit_returns_with_parameters_that_are_not_finite(
    policy: NonFinitePolicy,
    eager: bool,
    accumulate: int,
    clip_norm: float | None,
    batches: int,
    targets: dict[str, int],
    ruin: str,
    bad: tuple[int, int],
    value: float,
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    calls = 0
    bad = (bad[0], bad[1] % batches)

    def step(model: nn.Module, batch: Samples) -> Tensor:
        nonlocal calls
        calls += 1
        assert calls < 60, "it does not end"
        loss = F.mse_loss(model(batch[0]), batch[1])
        due = calls - 1 == bad[0] * batches + bad[1]
        if due and ruin == "weights":
            with torch.no_grad():
                next(model.parameters()).fill_(value)
        return loss + sqrt_of_zero(model) if due and ruin == "gradient" else loss

    data: Any = Poisoned(ragged(*[2] * batches), *([bad] if ruin == "loss" else []), value=value)
    model = line()
    trainer = with_cadence(
        eager,
        model,
        optimizer=optimizer(model.parameters(), lr=0.01),
        step=step,
        accumulate=accumulate,
        clip_norm=clip_norm,
        on_nonfinite=policy,
    )
    error = error_of(trainer, data, targets)
    if error is None:
        assert finite(model)
    if ruin == "nothing":
        assert error is None


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_the_error_a_repaired_run_can_go_on(accumulate: int) -> None:
    model = line()
    trainer = line_trainer(model, accumulate=accumulate)
    with pytest.raises(NonFiniteError):
        trainer.fit(Poisoned(ragged(2, 2), (1, 0)), epochs=3)
    model.load_state_dict(line().state_dict())
    result = trainer.fit(ragged(2, 2), epochs=3)
    assert result.progress.epoch == 3
    assert finite(model)


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("validate", [Every(epochs=1), Every(steps=1)], ids=str)
def test_no_evaluation_of_ruined_weights_hides_the_error(validate: Every) -> None:
    """The validation that is due comes after the look, so that nothing is judged by such weights."""
    judged: list[int] = []
    at = At(on_eval_start=lambda state: judged.append(state.progress.step))
    with pytest.raises(NonFiniteError, match="in epoch 1, batch 2, at optimizer step 2"):
        line_trainer(callbacks=[at]).fit(Poisoned(ragged(2, 2, 2), (0, 1)), ragged(2), epochs=2, validate=validate)
    assert judged == ([1] if validate.steps else [])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    accumulate=st.integers(1, 3),
    weights=st.lists(st.sampled_from([0, 2]), min_size=1, max_size=8),
    bad=st.integers(0, 7),
    eager=st.booleans(),
    clip=st.booleans(),
)
def test_batches_that_count_for_nothing_do_not_shift_the_place_that_an_error_names(
    accumulate: int, weights: list[int], bad: int, eager: bool, clip: bool
) -> None:
    def step(model: nn.Module, batch: tuple[Samples, int, bool]) -> Output:
        (inputs, targets), weight, poisoned = batch
        loss = F.mse_loss(model(inputs), targets)
        if poisoned:
            loss = loss + sqrt_of_zero(model) if clip else loss * math.nan
        return Output(loss, weight=weight)

    bad %= len(weights)
    weights[bad] = 2
    if accumulate == 1:
        weights = [2] * len(weights)
    data = [
        (batch, weight, index == bad)
        for index, (batch, weight) in enumerate(zip(ragged(*[2] * len(weights)), weights, strict=True))
    ]
    windows = [weights[start : start + accumulate] for start in range(0, len(weights), accumulate)]
    window = bad // accumulate
    made = sum(any(each) for each in windows[:window])
    trainer = with_cadence(eager, step=step, accumulate=accumulate, clip_norm=1.0 if clip else None)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(data, epochs=1)
    assert ("norm" if clip else "loss") in caught.value.what
    batch = window * accumulate if clip else bad  # a norm is that of a window, which its first batch stands for
    assert place(caught.value) == (1, batch + 1, made + 1)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_one_bad_element_of_a_large_tensor_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for size, fill in itertools.product((100, 2**15, 2**15 + 1, 2**15 + 31), (0.5, torch.finfo(dtype).max)):
        for place in (0, 1, 7, size // 2, size - 2, size - 1):
            tensor = torch.full((size,), fill, dtype=dtype)  # the sum of the largest is not finite
            assert all_finite([torch.ones(1), tensor])
            tensor[place] = value
            assert not all_finite([tensor, torch.ones(1)])


def test_what_is_bad_in_two_tensors_does_not_add_up_to_what_is_good() -> None:
    good, inf = torch.ones(2), torch.tensor([math.inf])
    assert all_finite([torch.tensor([torch.finfo(torch.float32).max])] * 3), "only their sum is not finite"
    assert all_finite([good.half(), good.double(), good.bfloat16(), good.int(), good.to(torch.complex64)])
    for pair in ([inf, -inf], [good, inf, good], [good.int(), inf.half()], [inf.double(), good, -inf.bfloat16()]):
        assert not all_finite(pair)
    assert all_finite([])
