"""What is answered in words though Python or torch would answer it too, and what looks like it and is taken (U7)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from helpers import line, ragged
from loopwright import ConfigError, Output, Schedule, Trainer


def _trainer(model: nn.Module | None = None, **changed: Any) -> Trainer:
    model = line() if model is None else model
    loss = None if "step" in changed else changed.pop("loss", nn.MSELoss())
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), loss, device="cpu", **changed)


def _step(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def _of_three(model: nn.Module, batch: Any, scale: float) -> Tensor:
    return scale * _step(model, batch)


def _of_batch(batch: Any) -> Tensor:
    raise AssertionError


def _with_model(function: Callable[[Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """A decorator that shows the signature of what it wraps, and takes another."""

    @functools.wraps(function)
    def wrapper(model: nn.Module, batch: Any) -> Tensor:
        return _step(model, batch)

    return wrapper


class Steps:
    @staticmethod
    def static(model: nn.Module, batch: Any) -> Tensor:
        return _step(model, batch)

    @classmethod
    def of_class(cls, model: nn.Module, batch: Any) -> Tensor:
        return _step(model, batch)

    def method(self, model: nn.Module, batch: Any, /, *, scale: float = 1.0) -> Tensor:
        return scale * _step(model, batch)

    def of_batch(self, batch: Any) -> Tensor:
        raise AssertionError

    def __call__(self, model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
        return scale * _step(model, batch)


class StaticCall:
    __call__ = staticmethod(_step)


class Shown:
    """As pydantic's models and some decorators do: what is shown is no more than that."""

    def __init__(self) -> None:
        self.__signature__ = inspect.signature(_of_batch)

    def __call__(self, *args: Any) -> Tensor:
        return _step(*args)


class OfBatch:
    def __call__(self, batch: Any) -> Tensor:
        raise AssertionError


class StepModule(nn.Module):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return _step(model, batch)


TAKEN: dict[str, Any] = {
    "a function": _step,
    "with a default": lambda model, batch, scale=1.0: _of_three(model, batch, scale),
    "with any number": lambda *args: _step(*args),
    "under other names": lambda m, b, **options: _step(m, b),
    "a static method": Steps().static,
    "a class method": Steps.of_class,
    "a method": Steps().method,
    "an object": Steps(),
    "an object with a static call": StaticCall(),
    "a module": StepModule(),
    "a partial by name": functools.partial(_of_three, scale=1.0),
    "a partial by place": functools.partial(lambda scale, model, batch: _of_three(model, batch, scale), 1.0),
    "a partial of a partial's method": functools.partial(functools.partial(Steps().method), scale=1.0),
    "a wrapper": _with_model(_of_batch),
    "a partial of a wrapper": functools.partial(_with_model(_of_batch)),
    "what shows another signature": Shown(),
}

REFUSED: dict[str, tuple[Any, str, str]] = {
    "of one": (_of_batch, "_of_batch(batch)", "def _of_batch(model, batch)"),
    "of none": (lambda: torch.zeros(()), "<lambda>()", "def step(model, batch)"),
    "of three": (_of_three, "_of_three(model, batch, scale)", "functools.partial"),
    "the batch by name only": (lambda model, *, batch: _step(model, batch), "<lambda>(model, *, batch)", "def step"),
    "a method of one": (Steps().of_batch, "of_batch(batch)", "def of_batch(self, model, batch)"),
    "an object of one": (OfBatch(), "OfBatch(batch)", "def __call__(self, model, batch)"),
    "a partial with one too many": (functools.partial(_of_three, line(), 2), "_of_three(scale)", "def _of_three("),
    "a partial that names the batch": (functools.partial(_step, batch=1), "_step(model, *, batch)", "def _step("),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_step_that_may_well_be_called_with_model_and_batch_is_taken_and_trains(case: str) -> None:
    assert _trainer(step=TAKEN[case]).fit(ragged(4, 3), epochs=1).progress.step == 2


@pytest.mark.parametrize("case", REFUSED)
def test_a_step_that_cannot_be_called_with_model_and_batch_is_refused_by_the_constructor(case: str) -> None:
    step, shown, fix = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        _trainer(step=step)
    assert caught.value.what.startswith(f"step is {shown}, which cannot be called with model and batch: ")
    assert fix in caught.value.fix
    with pytest.raises(TypeError):  # as the loop would have found
        step(line(), ragged(4, 3)[0])


def test_a_loss_and_a_forward_of_one_argument_are_refused_as_well() -> None:
    with pytest.raises(
        ConfigError, match=r"loss is <lambda>\(x\), which cannot be called with predictions and targets"
    ):
        _trainer(loss=lambda x: x.mean())
    with pytest.raises(ConfigError, match=r"forward is <lambda>\(x\), which cannot be called with model and batch"):
        _trainer().predict(ragged(4, 3), forward=lambda x: x)  # type: ignore[arg-type,misc]  # what a type checker says too


class Count:
    def reset(self) -> None:
        self.number = 0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.number += len(targets)

    def compute(self) -> float:
        return self.number


MAE = torchmetrics.MeanAbsoluteError


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda count, mae: {"n": count, "seen": count}, "'n' and 'seen' are one Count"),
        (lambda count, mae: {"a": mae, "b": Count(), "c": mae}, "'a' and 'c' are one MeanAbsoluteError"),
        (lambda count, mae: {"a": mae, "all": torchmetrics.MetricCollection([mae])}, "'a' and 'all' share one Mean"),
        (lambda count, mae: {"sum": mae + MAE(), "a": mae}, "'sum' and 'a' share one MeanAbsoluteError"),
    ],
)
def test_one_metric_under_two_names_is_refused_as_it_would_count_each_batch_twice(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _trainer(metrics=make(Count(), MAE()))
    assert words in caught.value.what


class Scaled(nn.Module):
    """A metric with a module in it that is none: such as the network that features are taken from."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.reset()

    def reset(self) -> None:
        self.sum = 0.0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.sum += float(self.network(predictions).sum())

    def compute(self) -> float:
        return self.sum


def test_metrics_of_one_class_or_that_share_what_is_no_metric_are_taken() -> None:
    network = nn.Linear(1, 1)
    metrics = {"n": Count(), "seen": Count(), "a": Scaled(network), "b": Scaled(network)}
    scores = _trainer(metrics=metrics).evaluate(ragged(4, 3))
    assert scores["test/n"] == scores["test/seen"] == sum(len(y) for _, y in ragged(4, 3))
    assert scores["test/a"] == scores["test/b"]


@pytest.mark.parametrize(
    ("each", "fix"),
    [
        ("epochs", 'Schedule(StepLR(...), each="epoch")'),
        ("Epoch", 'Schedule(StepLR(...), each="epoch")'),
        ("on_epoch_end", 'Schedule(StepLR(...), each="epoch")'),
        ("steps", 'Schedule(StepLR(...), each="step")'),
        ("batch", 'Schedule(StepLR(...), each="step")'),
        ("batches", 'Schedule(StepLR(...), each="step")'),
        ("iteration", 'Schedule(StepLR(...), each="step")'),
        ("epcoh", "did you mean 'epoch'?"),
        ("stpe", "did you mean 'step'?"),
        ("validation", 'Schedule(StepLR(...), each="step") or Schedule(StepLR(...), each="epoch")'),
        ("steps_per_epoch", 'Schedule(StepLR(...), each="step") or Schedule(StepLR(...), each="epoch")'),
        (None, 'Schedule(StepLR(...), each="step") or Schedule(StepLR(...), each="epoch")'),
    ],
)
def test_a_cadence_by_another_name_is_answered_with_the_one_that_was_meant(each: Any, fix: str) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(line().parameters(), lr=0.1), 1)
    with pytest.raises(ConfigError) as caught:
        Schedule(scheduler, each=each)
    assert caught.value.fix == fix


@pytest.mark.parametrize("metrics", [[1.0], torch.ones(2), torch.zeros(()), 0.5, ("mae", 1.0)])
def test_values_of_a_step_without_names_are_refused_where_the_output_is_made(metrics: Any) -> None:
    with pytest.raises(ConfigError, match="metrics of the Output is ") as caught:
        Output(torch.zeros(()), metrics=metrics)
    assert caught.value.fix == 'Output(loss, metrics={"name": value})'


class Mixed(nn.Module):
    """Float16 in a part, which the other part is trained beside."""

    def __init__(self, *, grad: bool) -> None:
        super().__init__()
        self.low = nn.Linear(3, 3).half()
        self.full = nn.Linear(3, 1)
        self.grad = grad

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            x = self.low(x)
        out: Tensor = self.full(x)
        return out


HALF = "precision='fp16' does not go with trained weights that are float16 themselves"


def test_weights_that_are_float16_themselves_are_refused_before_any_hook_also_where_they_were_made_so_later() -> None:
    model = line()
    trainer = _trainer(model, precision="fp16")
    model.half()
    trainer.evaluate(ragged(4, 3))  # nothing is unscaled there
    with pytest.raises(ConfigError, match=HALF) as caught:
        trainer.fit(ragged(4, 3), epochs=1)
    assert not hasattr(caught.value, "__notes__")  # no hook was called, nothing has begun
    model.float()
    trainer.fit(ragged(4, 3), epochs=1)


def test_a_part_that_is_float16_itself_is_refused_where_it_gets_a_gradient_before_anything_is_changed() -> None:
    model = Mixed(grad=True)
    before = model.full.weight.clone()
    with pytest.raises(ConfigError, match=HALF):
        _trainer(model, precision="fp16").fit(ragged(4, 3), epochs=1)
    assert torch.equal(model.full.weight, before)
    report = str(_trainer(model, precision="fp16").preflight(ragged(4, 3)))
    assert "a training step runs             failed" in report
    assert "leave out model.half()" in report


def test_a_part_that_is_float16_itself_and_gets_no_gradient_or_is_frozen_is_taken() -> None:
    _trainer(Mixed(grad=False), precision="fp16").fit(ragged(4, 3), epochs=1)
    model = Mixed(grad=True)
    model.low.requires_grad_(requires_grad=False)
    _trainer(model, precision="fp16").fit(ragged(4, 3), epochs=1)


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict", "preflight"])
def test_a_model_without_values_is_refused_in_words_by_each_call(call: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, device="meta"))
    trainer = _trainer(model)
    options = {"epochs": 1} if call == "fit" else {}
    with pytest.raises(ConfigError, match=r"2.weight, 2.bias of Sequential are on the meta device") as caught:
        getattr(trainer, call)(ragged(4, 3), **options)
    assert 'model.to_empty(device="cpu")' in caught.value.fix


def test_a_model_that_got_its_values_as_the_answer_says_is_trained() -> None:
    model = nn.Linear(3, 1, device="meta")
    model.to_empty(device="cpu").reset_parameters()
    assert _trainer(model).fit(ragged(4, 3), epochs=1).progress.step == 2
