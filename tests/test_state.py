"""What State and its metrics do and refuse (S3), and every setting that cannot work (U7)."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loopwright
from helpers import At, line, line_trainer, ragged
from loopwright import (
    Callback,
    ConfigError,
    Every,
    LoopwrightError,
    Progress,
    Schedule,
    State,
    Trainer,
    UnknownMetricError,
)
from loopwright.callbacks import CSVLogger, EarlyStopping
from loopwright.device import resolve_device
from loopwright.state import Metrics, check_name
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


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device(torch.device("cpu")) == resolve_device("cpu") == torch.device("cpu")


# Settings that cannot work (U7): what, why and the fix, before anything begins.


class NoStep:
    pass


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _make(**changed: Any) -> Trainer:
    model = changed.pop("model", line())
    optimizer = changed.pop("optimizer", None) or _sgd(model)
    loss = changed.pop("loss", None if "step" in changed else nn.MSELoss())
    return Trainer(model, optimizer, loss, device="cpu", **changed)


def _plateau(**settings: Any) -> Schedule:
    return Schedule(torch.optim.lr_scheduler.ReduceLROnPlateau(_sgd(line())), **settings)


def _lbfgs(**settings: Any) -> Trainer:
    model = line()
    return _make(model=model, optimizer=torch.optim.LBFGS(model.parameters()), **settings)


def _twice() -> Trainer:
    callback = Callback[Any]()
    return _make(callbacks=[callback, callback])


MAE = torchmetrics.MeanAbsoluteError
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "model is a class": (lambda: Trainer(nn.Linear, _sgd(line()), nn.MSELoss()), "the model is the class Linear"),  # type: ignore[type-var]
    "model is no module": (lambda: Trainer(3, _sgd(line()), nn.MSELoss()), "the model is of type int"),  # type: ignore[type-var]
    "optimizer is a class": (lambda: Trainer(line(), torch.optim.SGD, nn.MSELoss()), "optimizer is the class SGD"),  # type: ignore[arg-type]
    "optimizer is none": (lambda: Trainer(line(), 0.1, nn.MSELoss()), "the optimizer is of type float"),  # type: ignore[arg-type]
    "optimizer of another model": (lambda: _make(optimizer=_sgd(line())), "no parameter of this Linear"),
    "neither loss nor step": (lambda: _make(loss=None), "neither loss nor step"),
    "both loss and step": (lambda: _make(step=lambda m, b: m(b), loss=nn.MSELoss()), "both loss and step"),
    "loss is a class": (lambda: _make(loss=nn.MSELoss), "loss is the class MSELoss"),
    "loss is no function": (lambda: _make(loss=3), "loss is of type int"),
    "step is no function": (lambda: _make(step="step"), "step is of type str"),
    "step is a class": (lambda: _make(step=NoStep), "step is the class NoStep"),
    "schedule is a scheduler": (
        lambda: _make(schedule=torch.optim.lr_scheduler.StepLR(_sgd(line()), 1)),
        "schedule is of type StepLR",
    ),
    "schedule of another optimizer": (
        lambda: _make(schedule=Schedule(torch.optim.lr_scheduler.StepLR(_sgd(line()), 1), "step")),
        "built on another optimizer",
    ),
    "scheduler without step": (lambda: Schedule(NoStep(), "step"), "and not a scheduler"),  # type: ignore[arg-type]
    "each is neither": (lambda: Schedule(torch.optim.lr_scheduler.StepLR(_sgd(line()), 1), "batch"), "each is 'batch'"),  # type: ignore[arg-type]
    "plateau without monitor": (lambda: _plateau(each="epoch"), "has no metric to follow"),
    "monitor without plateau": (
        lambda: Schedule(torch.optim.lr_scheduler.StepLR(_sgd(line()), 1), "epoch", "val/loss"),
        "its step() takes no metric",
    ),
    "metrics is a list": (lambda: _make(metrics=[MAE()]), "metrics is a list"),
    "metrics is a metric": (lambda: _make(metrics=MAE()), "metrics is of type MeanAbsoluteError"),
    "metrics is a collection": (lambda: _make(metrics=torchmetrics.MetricCollection([MAE()])), "metrics is of type"),
    "metric is a class": (lambda: _make(metrics={"mae": MAE}), "the metric 'mae' is"),
    "metric is a function": (lambda: _make(metrics={"mae": lambda p, t: 0.0}), "the metric 'mae' is"),
    "metric named loss": (lambda: _make(metrics={"loss": MAE()}), "the metric 'loss' is"),
    "metric without a name": (lambda: _make(metrics={"": MAE()}), "cannot be the name of a metric"),
    "callbacks is a callback": (lambda: _make(callbacks=Callback()), "callbacks is of type Callback"),
    "callbacks is None": (lambda: _make(callbacks=None), "callbacks is of type NoneType"),
    "callback is a class": (lambda: _make(callbacks=[EarlyStopping]), "EarlyStopping is a class"),
    "callback is none": (lambda: _make(callbacks=[print]), "is not a callback"),
    "callback is there twice": (_twice, "in the list twice"),
    "two restore the best": (
        lambda: _make(callbacks=[EarlyStopping("val/loss", mode="min", restore_best=True) for _ in range(2)]),
        "2 callbacks have restore_best=True",
    ),
    "precision misspelt": (lambda: _make(precision="fp61"), "precision is 'fp61'"),
    "precision is a dtype": (lambda: _make(precision=torch.bfloat16), "precision is torch.bfloat16"),
    "accumulate 0": (lambda: _make(accumulate=0), "accumulate is 0"),
    "accumulate True": (lambda: _make(accumulate=True), "accumulate is True"),
    "accumulate 2.0": (lambda: _make(accumulate=2.0), "accumulate is 2.0"),
    "clip_norm 0": (lambda: _make(clip_norm=0), "clip_norm is 0"),
    "clip_norm negative": (lambda: _make(clip_norm=-1.0), "clip_norm is -1.0"),
    "clip_norm NaN": (lambda: _make(clip_norm=math.nan), "clip_norm is nan"),
    "clip_norm True": (lambda: _make(clip_norm=True), "clip_norm is True"),
    "clip_norm a string": (lambda: _make(clip_norm="1"), "clip_norm is '1'"),
    "compile is a string": (lambda: _make(compile="max-autotune"), "compile is 'max-autotune'"),
    "seed negative": (lambda: _make(seed=-1), "seed is -1"),
    "seed too large": (lambda: _make(seed=2**32), "seed is 4294967296"),
    "seed a float": (lambda: _make(seed=1.0), "seed is 1.0"),
    "seed True": (lambda: _make(seed=True), "seed is True"),
    "deterministic is a number": (lambda: _make(deterministic=1), "deterministic is 1"),
    "on_nonfinite misspelt": (lambda: _make(on_nonfinite="rise"), "on_nonfinite is 'rise'"),
    "LBFGS and accumulate": (lambda: _lbfgs(accumulate=2), "accumulate does not go with LBFGS"),
    "LBFGS and fp16": (lambda: _lbfgs(precision="fp16"), "precision='fp16' does not go with LBFGS"),
    "LBFGS and skip": (lambda: _lbfgs(on_nonfinite="skip"), "on_nonfinite='skip' does not go with LBFGS"),
    "fit without a target": (lambda: _make().fit(ragged(2)), "fit has no target"),
    "epochs 0": (lambda: _make().fit(ragged(2), epochs=0), "epochs is 0"),
    "epochs a float": (lambda: _make().fit(ragged(2), epochs=1.5), "epochs is 1.5"),  # type: ignore[arg-type]
    "steps negative": (lambda: _make().fit(ragged(2), steps=-1), "steps is -1"),
    "steps True": (lambda: _make().fit(ragged(2), steps=True), "steps is True"),
    "validate a number": (lambda: _make().fit(ragged(2), ragged(2), epochs=1, validate=10), "validate is 10"),  # type: ignore[arg-type]
    "Every of nothing": (lambda: Every(), "is not one cadence"),
    "Every of both": (lambda: Every(steps=1, epochs=1), "is not one cadence"),
    "Every 0 steps": (lambda: Every(steps=0), "steps is 0"),
    "Every half an epoch": (lambda: Every(epochs=0.5), "epochs is 0.5"),  # type: ignore[arg-type]
    "patience 0": (lambda: EarlyStopping("val/loss", mode="min", patience=0), "patience is 0"),
    "mode misspelt": (lambda: EarlyStopping("val/loss", mode="minimum"), "mode is 'minimum'"),  # type: ignore[arg-type]
    "min_delta negative": (lambda: EarlyStopping("val/loss", mode="min", min_delta=-1), "min_delta is -1"),
    "min_delta NaN": (lambda: EarlyStopping("val/loss", mode="min", min_delta=math.nan), "min_delta is nan"),
    "val monitored without val": (
        lambda: _make(callbacks=[EarlyStopping("val/loss", mode="min")]).fit(ragged(2), epochs=1),
        "no validation data",
    ),
    "CSVLogger every number": (lambda: CSVLogger("metrics.csv", every=10), "every is 10"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_a_setting_that_cannot_work_is_an_error_that_says_what_why_and_the_fix(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        make()
    error = caught.value
    assert words in error.what
    assert error.why
    assert error.fix
    assert str(error).startswith("[config] ")
    assert isinstance(error, ValueError)


def test_a_misspelt_choice_names_the_nearest() -> None:
    wrong: dict[str, dict[str, Any]] = {"'bf16'": {"precision": "bf-16"}, "'raise'": {"on_nonfinite": "rise"}}
    for nearest, setting in wrong.items():
        with pytest.raises(ConfigError) as caught:
            _make(**setting)
        assert nearest in caught.value.fix


def test_settings_that_do_nothing_together_are_taken() -> None:
    assert _make(clip_norm=math.inf, seed=0, accumulate=7).fit(ragged(2), epochs=1).progress.step == 1
    assert _make(seed=2**32 - 1, metrics={}, callbacks=()).fit(ragged(2), steps=1).progress.step == 1
    assert _make(callbacks=iter([Callback[Any]()])).fit(ragged(2), epochs=1).stop_reason == "epochs"


def test_a_change_of_the_lists_that_were_given_changes_nothing() -> None:
    fired: list[str] = []
    callbacks: list[Callback[Any]] = []
    metrics: dict[str, Any] = {}
    trainer = _make(callbacks=callbacks, metrics=metrics)
    callbacks.append(At(setup=lambda state: fired.append("setup")))
    metrics["mae"] = MAE()
    assert set(trainer.fit(ragged(2), ragged(2), epochs=1).history[0]) == {"epoch", "step", "train/loss", "val/loss"}
    assert not fired


# The exceptions.

ERRORS = [
    value
    for name, value in vars(loopwright).items()
    if isinstance(value, type) and issubclass(value, LoopwrightError) and name in loopwright.__all__
]


def test_every_exception_has_an_id_of_its_own_that_opens_its_message() -> None:
    ids = [error.id for error in ERRORS]
    assert len(set(ids)) == len(ids) == 9
    for kind in ERRORS:
        error = kind("what is wrong", why="it cannot be", fix="type this")
        assert str(error) == f"[{kind.id}] what is wrong\n  why: it cannot be\n  fix: type this"
        assert str(kind("what is wrong")) == f"[{kind.id}] what is wrong"


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_exception_survives_a_worker_process(kind: type[LoopwrightError]) -> None:
    error = kind("what", why="why", fix="fix")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert (twin.what, twin.why, twin.fix) == ("what", "why", "fix")


def test_the_python_exceptions_that_users_catch_are_the_bases() -> None:
    bases = {
        "ConfigError": ValueError,
        "NonFiniteError": FloatingPointError,
        "ShapeMismatchError": ValueError,
        "UnknownMetricError": KeyError,
        "SaveError": OSError,
    }
    for name, base in bases.items():
        assert issubclass(getattr(loopwright, name), base)
    for one, other in itertools.permutations(ERRORS, 2):
        allowed = {(loopwright.SaveError, loopwright.CheckpointError)}
        assert other is LoopwrightError or not issubclass(one, other) or (one, other) in allowed


# What a step may return.


def _without_gradients(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(batch[0]).mean()


STEPS: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "nothing": (lambda model, batch: None, "the step returned of type NoneType"),
    "a number": (lambda model, batch: 1.0, "the step returned of type float"),
    "a dict": (lambda model, batch: {"loss": model(batch[0]).mean()}, "the step returned a dict"),
    "a tuple": (lambda model, batch: (model(batch[0]).mean(), 1), "the step returned a tuple"),
    "a vector": (lambda model, batch: model(batch[0]), "the loss is a tensor of shape (2, 1)"),
    "whole numbers": (lambda model, batch: torch.tensor(3), "torch.int64"),
    "a loss that is no tensor": (lambda model, batch: loopwright.Output(1.0), "the loss is of type float"),  # type: ignore[arg-type]
    "a detached loss": (lambda model, batch: model(batch[0]).mean().detach(), "does not depend on any trainable"),
    "a loss without gradients": (_without_gradients, "does not depend on any trainable"),
    "a metric of two": (
        lambda model, batch: loopwright.Output(model(batch[0]).mean(), metrics={"a": torch.ones(2)}),
        "the value of 'a'",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_returns_something_else_is_an_error_that_says_what(case: str) -> None:
    step, words = STEPS[case]
    trainer = line_trainer(step=step)
    with pytest.raises(ConfigError) as caught:
        trainer.fit(ragged(2), epochs=1)
    assert words in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    assert trainer.state.progress.step == 0


def test_a_loss_of_one_element_in_any_shape_will_do() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0]).mean().reshape(1, 1)
        return loss

    (row,) = line_trainer(step=step).fit(ragged(2), epochs=1).history
    assert type(row["train/loss"]) is float
