"""What a metric raises says which metric it was, and what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from helpers import line_trainer, ragged
from loopwright import ConfigError, Output


class Fails:
    """A metric that raises an error in one of its methods."""

    def __init__(self, method: str, error: BaseException) -> None:
        self.method, self.error = method, error

    def _maybe(self, method: str) -> None:
        if method == self.method:
            raise self.error

    def reset(self) -> None:
        self._maybe("reset")

    def update(self, predictions: Any, targets: Any) -> None:
        self._maybe("update")

    def compute(self) -> float:
        self._maybe("compute")
        return 0.0


def notes(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", ()) if note.startswith("raised by the metric")]


@pytest.mark.parametrize("call", ["validation", "evaluate"])
@pytest.mark.parametrize(
    ("method", "more"),
    [("reset", ""), ("update", ", given predictions (4, 1) float32, targets (4, 1) float32"), ("compute", "")],
)
def test_what_a_metric_raises_is_the_same_error_and_names_the_metric(call: str, method: str, more: str) -> None:
    error = KeyError("as it was")
    metrics = {"before": torchmetrics.MeanAbsoluteError(), "odd": Fails(method, error)}
    trainer = line_trainer(metrics=metrics)
    with pytest.raises(KeyError) as caught:
        trainer.fit(ragged(4), ragged(4), epochs=1) if call == "validation" else trainer.evaluate(ragged(4))
    assert caught.value is error
    assert error.args == ("as it was",)
    assert notes(error) == [f"raised by the metric 'odd' (Fails) in {method}{more}"]


def test_a_metric_that_does_not_fit_the_labels_is_named_with_what_it_was_given() -> None:
    model = nn.Linear(3, 2)
    batch = torch.zeros(10, 3), torch.arange(10) % 2
    metrics = {"acc": torchmetrics.classification.BinaryAccuracy()}
    trainer = line_trainer(model, loss=nn.CrossEntropyLoss(), metrics=metrics)
    with pytest.raises(RuntimeError) as caught:
        trainer.evaluate([batch])
    (note,) = notes(caught.value)
    assert note == (
        "raised by the metric 'acc' (BinaryAccuracy) in update, given predictions (10, 2) float32, targets (10,) int64"
    )


class Shapeless(Tensor):
    """A tensor without one shape, as a nested one is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.shape:
            raise RuntimeError("it has none")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, "predictions['a'] (2, 3) float32 and predictions['b'] (2,)"),
        ((torch.zeros(2).long(), 5), "predictions[0] (2,) int64, targets a list of 2: (int, int)"),
        ("ab", "predictions an object of type str, targets a list"),
        (torch.zeros(2).as_subclass(Shapeless), "predictions an object of type Shapeless, targets"),
    ],
    ids=["dict", "tuple", "text", "a tensor that cannot be looked at"],
)
def test_what_is_no_tensor_is_told_in_other_words_and_does_not_hide_the_error(predictions: Any, words: str) -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Output:
        return Output(model(batch[0]).mean(), weight=4, predictions=predictions, targets=[1, 2])

    trainer = line_trainer(step=step, metrics={"odd": Fails("update", ZeroDivisionError("mine"))})
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        trainer.evaluate(ragged(4))
    assert words in notes(caught.value)[0]


def test_an_interrupt_is_not_the_metrics() -> None:
    trainer = line_trainer(metrics={"odd": Fails("update", KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.evaluate(ragged(4))
    assert notes(caught.value) == []


def test_an_error_beside_the_metrics_is_not_said_to_be_of_one() -> None:
    def step(model: nn.Module, batch: Any) -> Output:
        raise ValueError("of the step")

    trainer = line_trainer(step=step, metrics={"odd": Fails("", ValueError())})
    with pytest.raises(ValueError, match="of the step") as caught:
        trainer.evaluate(ragged(4))
    assert notes(caught.value) == []


def test_numbers_on_another_device_keep_their_own_error() -> None:
    error = RuntimeError("Expected all tensors to be on the same device, but found two")
    with pytest.raises(ConfigError, match="the metric 'odd' keeps its numbers on another device") as caught:
        line_trainer(metrics={"odd": Fails("update", error)}).evaluate(ragged(4))
    assert caught.value.__cause__ is error


def test_a_preflight_says_which_metric_it_was() -> None:
    metrics = {"odd": Fails("update", LookupError("no such thing"))}
    row = line_trainer(metrics=metrics).preflight(ragged(4), ragged(4))["a validation step runs"]
    assert row.verdict == "failed"
    assert "no such thing" in row.evidence
    assert row.cause.startswith("raised by the metric 'odd' (Fails) in update, given predictions (4, 1) float32")
