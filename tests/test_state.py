"""What State and its metrics do and refuse (S3), and which devices there are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loopwright
from helpers import At, line, line_trainer, ragged
from loopwright import (
    Callback,
    ConfigError,
    Output,
    Progress,
    State,
    Trainer,
    UnknownMetricError,
)
from loopwright.callbacks import EarlyStopping
from loopwright.device import resolve_device
from loopwright.metrics import Metrics, check_name
from loopwright.testing import tiny_state


@pytest.fixture
def state() -> State:
    return tiny_state()


# Metrics: a mapping of names to floats.


def test_metrics_are_a_mapping_of_floats(state: State) -> None:
    state.log("a", torch.tensor(1.5))
    state.log("b", 2)
    half: Any = np.float32(0.5)
    state.log("c", half)
    assert isinstance(state.metrics, Mapping)
    assert dict(state.metrics) == {"a": 1.5, "b": 2.0, "c": 0.5}
    assert all(type(value) is float for value in state.metrics.values())
    assert list(state.metrics) == ["a", "b", "c"]
    assert len(state.metrics) == 3
    assert "a" in state.metrics
    assert "d" not in state.metrics
    assert state.metrics.get("d") is None
    assert state.metrics.get("d", 4.0) == 4.0
    assert "1.5" in repr(state.metrics)


def test_metrics_cannot_be_written_past_log(state: State) -> None:
    with pytest.raises(TypeError):
        state.metrics["a"] = 1.0  # type: ignore[index]  # that is what is tested
    assert not hasattr(Metrics, "update")


def test_the_newest_value_counts(state: State) -> None:
    state.log("a", 1.0)
    state.log("b", 2.0)
    state.log("a", torch.tensor(3.0))
    assert dict(state.metrics) == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_kept_as_they_are(state: State, value: float) -> None:
    state.log("number", value)
    state.log("tensor", torch.tensor(value))
    assert repr(state.metrics["number"]) == repr(state.metrics["tensor"]) == repr(value)


def test_a_tensor_is_taken_as_it_is_when_it_is_logged(state: State) -> None:
    value = torch.ones(1, 1, requires_grad=True)
    state.log("a", value)
    with torch.no_grad():
        value.fill_(7)
    assert state.metrics["a"] == 1.0


def test_an_unknown_metric_is_a_key_error_that_lists_the_names_and_the_nearest(state: State) -> None:
    state.log("val/loss", 1.0)
    state.log("train/loss", 1.0)
    with pytest.raises(UnknownMetricError) as caught:
        state.metrics["val/lose"]
    assert isinstance(caught.value, KeyError)
    assert "'val/lose'" in caught.value.what
    assert "train/loss, val/loss" in caught.value.why
    assert "did you mean 'val/loss'?" in caught.value.fix
    assert str(caught.value).startswith("[unknown-metric] ")


def test_an_unknown_metric_before_anything_was_logged_says_so(state: State) -> None:
    with pytest.raises(UnknownMetricError, match="none yet"):
        state.metrics["loss"]


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), torch.tensor(1j), "1.5", None, [1.0], 1j, 10**400])
def test_what_is_no_real_number_is_refused_by_name(state: State, value: Any) -> None:
    with pytest.raises(ConfigError, match="'train/accuracy'") as caught:
        state.log("train/accuracy", value)
    assert caught.value.why
    assert caught.value.fix
    assert len(state.metrics) == 0


# Names (S3).

REFUSED: list[Any] = [
    "",
    " ",
    "a ",
    "=1+1",
    "+a",
    "-a",
    "@a",
    "\ta",
    "a\tb",
    "a\nb",
    "a\rb",
    "a\x00b",
    "a\x7fb",
    "a\u2028b",
    "a\ud800b",
    "a\u202eb",
    "_a",
    "'a",
    '"a',
    "../a",
    "a/../b",
    "a/..",
    "a/./b",
    "/a",
    "a//b",
    "a/",
    "a\\b",
    "epoch",
    "step",
    "a" * 201,
    3,
    None,
    b"a",
    ("a",),
]
TAKEN = [
    "a",
    "loss",
    "train/loss",
    "val/top 5",
    "lr/group 0",
    "größe",
    "準確率",
    "0",
    "a.b",
    "a..b",
    "f1@0.5",
    "a=b",
    "a,b",
]


@pytest.mark.parametrize("name", REFUSED, ids=repr)
def test_a_name_that_would_leave_the_folder_or_start_a_formula_is_refused(state: State, name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a metric") as caught:
        state.log(name, 1.0)
    assert caught.value.fix
    assert len(state.metrics) == 0


@pytest.mark.parametrize("name", TAKEN)
def test_a_name_of_letters_and_digits_of_any_script_is_taken(state: State, name: str) -> None:
    state.log(name, 1.0)
    assert state.metrics[name] == 1.0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.text(max_size=30))
def test_every_name_taken_is_a_path_below_its_folder_and_a_cell_that_reads_back(name: str) -> None:
    try:
        check_name(name)
    except ConfigError:
        return
    parts = name.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert name.encode().decode() == name
    assert name[0] not in "=+-@\t\r"
    assert name == name.strip()
    assert len(name.splitlines()) == 1


def test_a_name_is_refused_wherever_it_comes_from() -> None:
    bad = "../loss"
    step: Callable[..., Any] = lambda model, batch: loopwright.Output(model(batch[0]).mean(), metrics={bad: 1.0})  # noqa: E731
    calls: list[Callable[[], object]] = [
        lambda: line_trainer(metrics={bad: torchmetrics.MeanAbsoluteError()}),
        lambda: line_trainer().evaluate(ragged(2), name=bad),
        lambda: line_trainer(step=step).fit(ragged(2), epochs=1),
        lambda: EarlyStopping(bad, mode="min"),
        lambda: line_trainer(callbacks=[At(on_step_end=lambda state: state.log(bad, 1.0))]).fit(ragged(2), epochs=1),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="cannot be the name of a metric"):
            call()


# The rest of the state.


def test_a_stop_needs_words_and_the_first_ones_stand(state: State) -> None:
    for reason in ("", None, 3):
        with pytest.raises(ConfigError, match="the reason to stop"):
            state.stop(reason)  # type: ignore[arg-type]  # that is what is tested
    assert state.stop_reason is None
    state.stop("first")
    state.stop("second")
    assert state.stop_reason == "first"


def test_the_state_is_that_of_what_the_trainer_was_given() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = line_trainer(model, optimizer=optimizer)
    assert trainer.state.model is model
    assert trainer.state.optimizer is optimizer
    assert trainer.state.device == torch.device("cpu")
    assert trainer.state.progress == Progress()
    assert trainer.state.stage == "train"


def test_a_result_is_a_snapshot_that_a_later_fit_does_not_change() -> None:
    trainer = line_trainer()
    first = trainer.fit(ragged(2), epochs=1)
    kept = copy.deepcopy(first)
    trainer.fit(ragged(2), epochs=3)
    assert first == kept
    first.history[0]["train/loss"] = -1.0
    assert trainer.fit(ragged(2), epochs=3).history[0]["train/loss"] != -1.0


# Devices.


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "CPU", None, 1.5, 99, "auto "])
def test_a_device_that_is_not_to_be_had_is_an_error_when_the_trainer_is_made(device: Any) -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="device=") as caught:
        Trainer(model, optimizer, nn.MSELoss(), device=device)
    assert caught.value.why
    assert 'device="auto"' in caught.value.fix
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("device", "fix"),
    [("gpu", "did you mean 'cuda'?"), ("GPU:0", "did you mean 'cuda'?"), ("metal", "did you mean 'mps'?")],
)
def test_a_device_that_nobody_calls_so_is_answered_with_the_nearest(device: str, fix: str) -> None:
    model = line()
    with pytest.raises(ConfigError, match="no device of torch's is called so") as caught:
        Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device=device)
    assert fix in caught.value.fix


class Reads(Callback):
    """Reads a metric at the end of each batch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_batch_end(self, state: State, output: Output) -> None:
        state.metrics[self.name]


@pytest.mark.parametrize("name", ["val/loss", "val_loss"])
def test_a_name_of_the_validation_read_before_the_first_one_is_said_to_be_still_to_come(name: str) -> None:
    with pytest.raises(UnknownMetricError) as caught:
        line_trainer(callbacks=[Reads(name)]).fit(ragged(2), ragged(2), epochs=1)
    assert "there has been none yet" in caught.value.why
    assert caught.value.fix == "read 'val/loss' in on_eval_end, or in on_epoch_end after a validation"


def test_without_validation_data_no_validation_is_said_to_come() -> None:
    trainer = line_trainer(callbacks=[Reads("val/loss")])
    with pytest.raises(UnknownMetricError) as caught:
        trainer.fit(ragged(2), epochs=1)
    assert "validation" not in caught.value.why
    assert caught.value.fix == "log it with state.log('val/loss', value) before it is read"  # not: train/loss


def test_after_a_validation_a_misspelt_name_of_it_is_answered_with_the_nearest() -> None:
    trainer = line_trainer()
    trainer.fit(ragged(2), ragged(2), epochs=1)
    for name in ("val/los", "val_loss"):
        with pytest.raises(UnknownMetricError, match="did you mean 'val/loss'"):
            trainer.state.metrics[name]


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device(torch.device("cpu")) == resolve_device("cpu") == torch.device("cpu")


# What a callback cannot write.


@pytest.mark.parametrize("name", ["model", "optimizer", "device"])
def test_what_the_loop_holds_cannot_be_replaced(state: State, name: str) -> None:
    before = getattr(state, name)
    with pytest.raises(ConfigError, match=f"state.{name} cannot be replaced"):
        setattr(state, name, copy.copy(before))
    assert getattr(state, name) is before


@pytest.mark.parametrize("reason", [True, 1, "", ["enough"]])
def test_a_reason_to_stop_that_is_no_words_is_refused_however_it_is_given(state: State, reason: Any) -> None:
    with pytest.raises(ConfigError, match="must be words"):
        state.stop_reason = reason
    with pytest.raises(ConfigError, match="must be words"):
        state.stop(reason)


def test_a_state_may_be_copied_and_its_copy_guards_itself_too(state: State) -> None:
    twin = copy.deepcopy(state)
    assert twin.progress == state.progress
    assert twin.model is not state.model
    with pytest.raises(ConfigError, match="cannot be replaced"):
        twin.model = state.model


def test_a_state_for_a_test_of_a_callback_takes_any_progress(state: State) -> None:
    state.progress = Progress(epoch=3, step=7)
    assert state.progress.step == 7


@pytest.mark.parametrize("hook", ["on_batch_start", "on_step_end", "on_eval_end", "on_epoch_end"])
def test_a_callback_that_writes_to_the_count_of_epochs_is_told_how_to_end_a_run(hook: str) -> None:
    def write(state: State, *_: object) -> None:
        state.progress.epoch = 100

    hooks: dict[str, Any] = {hook: write}
    trainer = line_trainer(callbacks=[At(**hooks)])
    with pytest.raises(ConfigError, match="set to 100, where the loop has counted") as caught:
        trainer.fit(ragged(2), ragged(2), epochs=3)
    assert "state.stop(reason)" in caught.value.fix
    assert trainer.state.progress.epoch < 2
