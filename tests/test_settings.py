"""Every setting that cannot work, the exceptions, and what a step may return (U7)."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import loopwright
from helpers import At, line, line_trainer, ragged
from loopwright import (
    Callback,
    ConfigError,
    Every,
    LoopwrightError,
    Schedule,
    Trainer,
)
from loopwright.callbacks import CSVLogger, EarlyStopping


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


def _sparse(**settings: Any) -> Trainer:
    return _make(model=nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1)), **settings)


class TurnsSparse(nn.Module):
    """Something of the user's own whose gradient is sparse, as no class of torch's tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.embedding(torch.zeros(len(x), dtype=torch.int64), self.weight, sparse=True)
        return (rows * x).sum(1, keepdim=True)


def _twice() -> Trainer:
    callback = Callback[Any]()
    return _make(callbacks=[callback, callback])


MAE = torchmetrics.MeanAbsoluteError
# Each is ignored by the type checker on purpose: it would refuse what the library has to refuse at run time too.
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "model is a class": (lambda: Trainer(nn.Linear, _sgd(line()), nn.MSELoss()), "the model is the class Linear"),  # type: ignore[type-var]
    "model is no module": (lambda: Trainer(3, _sgd(line()), nn.MSELoss()), "of type int"),  # type: ignore[type-var]
    "optimizer is a class": (lambda: Trainer(line(), torch.optim.SGD, nn.MSELoss()), "optimizer is the class SGD"),  # type: ignore[arg-type]
    "optimizer is none": (lambda: Trainer(line(), 0.1, nn.MSELoss()), "of type float"),  # type: ignore[arg-type]
    "optimizer of another model": (lambda: _make(optimizer=_sgd(line())), "no parameter of this Linear"),
    "neither loss nor step": (lambda: _make(loss=None), "neither loss nor step"),
    "both loss and step": (lambda: _make(step=lambda m, b: m(b), loss=nn.MSELoss()), "both loss and step"),
    "loss is a class": (lambda: _make(loss=nn.MSELoss), "loss is the class MSELoss"),
    "loss is no function": (lambda: _make(loss=3), "of type int"),
    "step is no function": (lambda: _make(step="step"), "of type str"),
    "step is a class": (lambda: _make(step=NoStep), "step is the class NoStep"),
    "schedule is a scheduler": (
        lambda: _make(schedule=torch.optim.lr_scheduler.StepLR(_sgd(line()), 1)),
        "of type StepLR",
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
    "metrics is a metric": (lambda: _make(metrics=MAE()), "of type MeanAbsoluteError"),
    "metrics is a collection": (
        lambda: _make(metrics=torchmetrics.MetricCollection([MAE()])),
        "of type MetricCollection",
    ),
    "metric is a class": (lambda: _make(metrics={"mae": MAE}), "the metric 'mae' is"),
    "metric is a function": (lambda: _make(metrics={"mae": lambda p, t: 0.0}), "the metric 'mae' is"),
    "metric named loss": (lambda: _make(metrics={"loss": MAE()}), "named 'loss'"),
    "metric without a name": (lambda: _make(metrics={"": MAE()}), "cannot be the name of a metric"),
    "callbacks is a callback": (lambda: _make(callbacks=Callback()), "of type Callback"),
    "callbacks is None": (lambda: _make(callbacks=None), "callbacks is None"),
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
    "clip_norm and a sparse layer": (lambda: _sparse(clip_norm=1.0), "sparse gradients, as 0.weight has them"),
    "clip_norm and a gradient that turns out sparse": (
        lambda: _make(model=TurnsSparse(), clip_norm=1.0).fit(ragged(2), epochs=1),
        "sparse gradients, as weight has them",
    ),
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


class Unreset:
    def update(self, predictions: Any, targets: Any) -> None: ...

    def compute(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("metrics", "what", "fix"),
    [
        ({"accuracy": MAE}, "the class MeanAbsoluteError, and not an instance", "{'accuracy': MeanAbsoluteError()}"),
        ({"acc": Unreset()}, "of type Unreset, which has no reset", "metrics={'acc': ...}"),
        ({"acc": print}, "which has no reset, no update, no compute", "metrics={'acc': ...}"),
        ({"val/acc": MAE()}, "a metric is named 'val/acc'", "metrics={'acc': ...}"),
        ([MAE()], "metrics is a list", "{'mean_absolute_error': MeanAbsoluteError()}"),
        (Unreset, "metrics is the class Unreset", "{'accuracy': Accuracy()}"),
    ],
)
def test_what_is_said_of_a_metric_uses_the_name_that_was_given(metrics: Any, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _make(metrics=metrics)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_prefix_in_a_metrics_name_is_said_to_be_added() -> None:
    with pytest.raises(ConfigError, match="the prefix is added: 'acc' is logged as 'val/acc'"):
        _make(metrics={"val/acc": MAE()})


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ("5", "epochs=5, without the quotes"),
        (2.5, "epochs=2"),
        (10.0, "epochs=10, without the point"),
        (0.5, "for example epochs=1"),
        ("0", "for example epochs=1"),
        ("many", "for example epochs=1"),
        (math.inf, "for example epochs=1"),
        (math.nan, "for example epochs=1"),
    ],
)
def test_a_count_that_is_nearly_one_is_answered_with_that_count(value: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _make().fit(ragged(2), epochs=value)
    assert caught.value.fix == fix


def test_a_numpy_array_for_a_loader_is_answered_with_the_loader_to_make_of_it() -> None:
    array = torch.randn(8, 3).numpy()
    for data in ((array,), (ragged(2), array)):
        with pytest.raises(ConfigError, match=r"is an array of shape \(8, 3\)") as caught:
            _make().fit(*data, epochs=1)
        assert "DataLoader(TensorDataset(torch.from_numpy(inputs)" in caught.value.fix


def test_the_class_of_arrays_is_a_class_and_no_array() -> None:
    kind: Any = type(torch.zeros(1).numpy())
    with pytest.raises(ConfigError, match="train is the class ndarray"):
        _make().fit(kind, epochs=1)


def test_a_trainer_prints_as_one_line_with_its_model_optimizer_and_progress() -> None:
    trainer = _make()
    trainer.fit(ragged(2), epochs=1)
    assert repr(trainer) == f"Trainer(Linear, SGD, {trainer.state.progress})"


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
    "nothing": (lambda model, batch: None, "the step returned None"),
    "a number": (lambda model, batch: 1.0, "of type float"),
    "a dict": (lambda model, batch: {"loss": model(batch[0]).mean()}, "the step returned a dict"),
    "a tuple": (lambda model, batch: (model(batch[0]).mean(), 1), "the step returned a tuple"),
    "a vector": (lambda model, batch: model(batch[0]), "the loss is a tensor of shape (2, 1)"),
    "whole numbers": (lambda model, batch: torch.tensor(3), "torch.int64"),
    "a loss that is no tensor": (lambda model, batch: loopwright.Output(1.0), "of type float"),  # type: ignore[arg-type]
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


# What can be meant, and seldom is.


class AboutCentre(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(1))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = (predictions - self.centre - targets).square().mean()
        return loss

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = self(model(batch[0]), batch[1])
        return loss


def _warnings(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What two fits of the trainer warn of."""
    for epochs in (1, 2):
        trainer.fit(ragged(2, 2), epochs=epochs)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _make(loss=nn.MSELoss(reduction="sum"), accumulate=2), "MSELoss has reduction='sum', and accumulate"),
        (lambda: _lbfgs(clip_norm=1.0), "clip_norm=1 with LBFGS"),
        (lambda: _make(loss=AboutCentre()), "SGD does not hold centre of AboutCentre"),
    ],
    ids=["a sum over a window", "clipping for LBFGS", "a loss's parameters"],
)
def test_what_is_seldom_meant_is_warned_of_once_when_the_fit_begins(
    make: Callable[[], Trainer], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = _warnings(make(), caplog)
    assert words in warning


def test_a_sum_without_accumulation_and_a_loss_whose_parameters_are_held_or_frozen_are_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, held, frozen = line(), AboutCentre(), AboutCentre()
    frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *held.parameters()], lr=0.1)
    assert _warnings(_make(model=model, optimizer=optimizer, loss=held), caplog) == []
    assert _warnings(_make(loss=frozen), caplog) == []
    assert _warnings(_make(loss=nn.MSELoss(reduction="sum")), caplog) == []


class Adversaries(nn.Module):
    """Two that are trained against each other, the second by its own optimizer within the step of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = line(), line()
        self.optimizer = torch.optim.SGD(self.other.parameters(), lr=0.1)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.other(batch[0]).square().mean()
        loss.backward()
        self.optimizer.step()
        out: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return out


def test_what_a_step_trains_itself_is_neither_warned_of_nor_a_failure_of_the_preflight(
    caplog: pytest.LogCaptureFixture,
) -> None:
    both = Adversaries()
    before = both.other.weight.clone()
    trainer = _make(model=both.one, step=both.step)
    assert trainer.preflight(ragged(4, 4)).failed == ()
    assert _warnings(trainer, caplog) == []
    assert not torch.equal(both.other.weight, before)


class WithClosure(torch.optim.SGD):
    """An optimizer of one's own that evaluates the loss itself."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]  # it cannot do without one
        loss = closure()
        super().step()
        return loss


def test_what_is_said_of_lbfgs_under_clipping_is_said_of_no_other_optimizer_with_a_closure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = line()
    assert _warnings(_make(model=model, optimizer=WithClosure(model.parameters(), lr=0.1), clip_norm=1.0), caplog) == []


def test_parameters_that_the_optimizer_gets_before_the_fit_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    loss = AboutCentre()
    trainer = _make(loss=loss)
    trainer.state.optimizer.add_param_group({"params": [*loss.parameters()]})
    assert _warnings(trainer, caplog) == []


def test_what_is_said_of_a_sum_over_a_window_is_so() -> None:
    batches, model, summed = ragged(4, 2), line(), nn.MSELoss(reduction="sum")
    gradients = [torch.autograd.grad(summed(model(x), y), model.weight)[0] for x, y in batches]
    trainer = _make(model=model, loss=summed, accumulate=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.fit(batches, epochs=1)
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, (4 * gradients[0] + 2 * gradients[1]) / 6)


def test_a_preflight_says_the_same_of_a_sum_over_a_window_and_lets_it_train(caplog: pytest.LogCaptureFixture) -> None:
    trainer = _make(loss=nn.MSELoss(reduction="sum"), accumulate=2)
    trainer.fit(ragged(4, 2), epochs=1, preflight=True)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    check = trainer.preflight(ragged(4, 2))["reduction of the loss"]
    assert (check.verdict, check.evidence) == ("passed", warning)


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("16-mixed", "precision='fp16'"),
        ("bf16-mixed", "precision='bf16'"),
        (16, "precision='fp16'"),
        (torch.bfloat16, "precision='bf16'"),
        (torch.float16, "precision='fp16'"),
        ("float32", "precision='fp32'"),
        ("fp8", "'bf16' and 'fp16' run the step under autocast"),
        (torch.float64, "'fp32' leaves model and data in the formats that they have"),
    ],
)
def test_a_precision_by_another_name_is_answered_with_ours(given: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _make(precision=given)
    assert fix in caught.value.fix


def test_several_optimizers_are_answered_with_what_to_do_instead() -> None:
    model = line()
    several: list[tuple[Any, str]] = [
        ([_sgd(model)], "Trainer(model, optimizer, ...), the SGD itself"),
        ([_sgd(model), _sgd(model)], "one SGD with a parameter group for each part"),
        ({"generator": _sgd(model), "critic": _sgd(model)}, "a loop by hand"),
    ]
    for given, fix in several:
        with pytest.raises(ConfigError, match="a run has one optimizer") as caught:
            Trainer(model, given, nn.MSELoss())
        assert fix in caught.value.fix


def test_a_device_without_values_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match="device='meta' cannot be trained on"):
        Trainer(model := line(), _sgd(model), nn.MSELoss(), device="meta")


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_preflight_that_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="preflight is"):
        _make().fit(ragged(2), epochs=1, preflight=value)


def test_a_loss_of_whole_numbers_is_not_told_to_take_a_mean_that_torch_refuses() -> None:
    def wrong(predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions > targets).long().sum()

    with pytest.raises(ConfigError, match=r"torch\.int64") as caught:
        _make(loss=wrong).fit(ragged(2), epochs=1)
    assert "mean" not in caught.value.fix
    assert "have a gradient" in caught.value.fix


def test_a_sparse_layer_that_is_not_trained_may_be_there_where_others_are_clipped() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    batches = [(torch.tensor([[0, 1], [2, 3]]), torch.randn(2, 1))] * 2
    for optimizer in (torch.optim.SGD(model[2].parameters(), lr=0.1), _sgd(model)):
        _make(model=model, optimizer=optimizer, clip_norm=1.0).fit(batches, epochs=1)
        model[0].requires_grad_(False)
        model.zero_grad()
