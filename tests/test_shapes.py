"""Predictions and targets of different shapes that torch would broadcast (C18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn

from helpers import At, line, line_trainer, ragged
from loopwright import ConfigError, DataError, ShapeMismatchError, Trainer

Shape = tuple[int, ...]


class Reshaped(nn.Module):
    """A model whose output has a shape of one's choice."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.scale, self.shape = nn.Parameter(torch.ones(())), shape

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * torch.ones(self.shape, dtype=inputs.dtype)


def trainer_of(shape: Shape, loss: Callable[[Any, Any], Tensor] | None = None) -> Trainer:
    return line_trainer(Reshaped(shape), loss=loss or nn.MSELoss())


MISMATCHES: list[tuple[Shape, Shape]] = [
    ((4, 1), (4,)),
    ((4,), (4, 1)),
    ((4,), ()),
    ((), (4,)),
    ((4, 1), (1, 4)),
    ((4, 3), (3,)),
    ((4, 3), (4, 1)),
    ((4, 1, 5), (4, 5)),
    ((1, 1), (1,)),
    ((4, 4), (4,)),
    ((2, 1, 3), (2, 5, 3)),
]
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "MSELoss": nn.MSELoss(),
    "L1Loss": nn.L1Loss(),
    "HuberLoss": nn.HuberLoss(),
    "SmoothL1Loss": nn.SmoothL1Loss(),
    "BCEWithLogitsLoss": nn.BCEWithLogitsLoss(),
    "a function": F.mse_loss,
    "a lambda": lambda predictions, targets: (predictions - targets).square().mean(),
}


@pytest.mark.parametrize(("predicted", "target"), MISMATCHES, ids=str)
def test_shapes_that_would_broadcast_are_an_error_that_names_both(predicted: Shape, target: Shape) -> None:
    trainer = trainer_of(predicted)
    with pytest.raises(ShapeMismatchError) as caught:
        trainer.fit([(torch.zeros(4, 2), torch.zeros(target))], epochs=1)
    assert f"the prediction has shape {predicted}" in caught.value.what
    assert f"the target {target}" in caught.value.what
    assert "broadcast" in caught.value.why
    assert "step=" in caught.value.fix
    assert trainer.state.progress.step == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_function_makes_no_difference(name: str) -> None:
    with pytest.raises(ShapeMismatchError):
        trainer_of((4, 1), LOSSES[name]).fit([(torch.zeros(4, 2), torch.zeros(4))], epochs=1)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss()], ids=repr)
def test_whole_numbers_as_targets_of_a_regression_are_no_classes(loss: nn.Module) -> None:
    with pytest.raises(ShapeMismatchError):
        trainer_of((4, 1), loss).fit([(torch.zeros(4, 2), torch.arange(4))], epochs=1)


def test_it_is_found_before_the_loss_is_computed_and_no_warning_of_torch_comes_first() -> None:
    called: list[int] = []

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        called.append(1)
        return F.mse_loss(predictions, targets)

    with pytest.raises(ShapeMismatchError):
        trainer_of((4, 1), loss).fit([(torch.zeros(4, 2), torch.zeros(4))], epochs=1)
    assert not called


def test_it_is_found_at_each_new_shape_also_of_a_last_batch_of_one() -> None:
    """A model that squeezes its output is right until a batch holds a single sample."""

    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.layer(inputs).squeeze()
            return out

    batches = [(inputs, targets.squeeze(1)) for inputs, targets in ragged(4, 4, 1)]
    steps: list[int] = []
    trainer = line_trainer(Squeezes(), callbacks=[At(on_step_end=lambda state: steps.append(state.progress.step))])
    with pytest.raises(ShapeMismatchError, match=r"prediction has shape \(\), the target \(1,\)"):
        trainer.fit(batches, epochs=1)
    assert steps == [1, 2]


@pytest.mark.parametrize("call", ["validation", "evaluate"])
def test_it_is_found_in_evaluations_too(call: str) -> None:
    trainer = line_trainer()
    flat = [(inputs, targets.squeeze(1)) for inputs, targets in ragged(4)]
    with pytest.raises(ShapeMismatchError):
        trainer.fit(ragged(4), flat, epochs=1) if call == "validation" else trainer.evaluate(flat)


def classes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


RIGHT: dict[str, tuple[Shape, Tensor, Callable[[Any, Any], Tensor]]] = {
    "same shapes": ((4, 1), torch.zeros(4, 1), nn.MSELoss()),
    "no dimension at all": ((), torch.tensor(1.0), nn.MSELoss()),
    "classes": ((4, 3), classes(4), nn.CrossEntropyLoss()),
    "as many classes as samples": ((4, 4), classes(4), nn.CrossEntropyLoss()),
    "one class, of a likelihood": ((4, 1), classes(4), nn.NLLLoss()),
    "one class, of margins": ((4, 1), classes(4), nn.MultiMarginLoss()),
    "classes of pixels": ((4, 3, 2, 2), classes(4, 2, 2), nn.CrossEntropyLoss()),
    "soft targets": ((4, 3), torch.ones(4, 3) / 3, nn.CrossEntropyLoss()),
    "log likelihood": ((4, 3), classes(4), nn.NLLLoss()),
    "margins": ((4, 3), classes(4), nn.MultiMarginLoss()),
    "shapes that only the loss can join": ((4, 6), torch.zeros(4), lambda p, t: (p.mean(1) - t).square().mean()),
}


@pytest.mark.parametrize("case", RIGHT)
def test_shapes_that_differ_by_right_or_not_at_all_are_left_alone(case: str) -> None:
    shape, targets, loss = RIGHT[case]
    result = trainer_of(shape, loss).fit([(torch.zeros(max(targets.shape[:1], default=2), 2), targets)], epochs=1)
    assert result.progress.step == 1


class Entropy(nn.CrossEntropyLoss):
    """A subclass that computes what torch does."""


class OfTwo(nn.CrossEntropyLoss):
    """A subclass whose single number stands for two classes."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(torch.cat([-input, input], 1), target)


OUTPUTS = "as many outputs at the end of the model as there are classes"
ONE: dict[str, tuple[Shape, Tensor, str]] = {
    "floats in a column": (
        (4, 1),
        torch.tensor([[0.0], [1.0], [1.0], [0.0]]),
        f"{OUTPUTS}, and targets.squeeze(1).long(); or, for two classes by one output, nn.BCEWithLogitsLoss() as the "
        "loss",
    ),
    "floats in a row": (
        (4, 1),
        torch.tensor([0.0, 1.0, 1.0, 0.0]),
        f"{OUTPUTS}, and targets.long(); or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss and "
        "targets.unsqueeze(1)",
    ),
    "probabilities": (
        (4, 1),
        torch.full((4, 1), 0.5),
        "nn.BCEWithLogitsLoss() as the loss, if a target is how probable one class of two is",
    ),
    "quantities": (
        (4, 1),
        torch.full((4,), 2.5),
        "a loss for quantities such as nn.MSELoss(), and targets.unsqueeze(1), if that is what the targets are",
    ),
    "labels in a row": (
        (4, 1),
        torch.tensor([0, 1, 1, 0]),
        f"{OUTPUTS}; or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss and "
        "targets.unsqueeze(1).float()",
    ),
    "labels that are all 0": (
        (4, 1),
        classes(4),
        f"{OUTPUTS}; or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss and "
        "targets.unsqueeze(1).float()",
    ),
    "labels of three classes": ((3, 1), torch.arange(3), OUTPUTS),
    "labels in a column": (
        (4, 1),
        torch.tensor([[0], [1], [1], [0]]),
        f"{OUTPUTS}, and targets.squeeze(1); or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss and "
        "targets.float()",
    ),
    "one-hot": ((4, 1), torch.eye(4), "4 outputs at the end of the model, and targets.argmax(1)"),
    "pixels": (
        (2, 1, 3, 3),
        classes(2, 3, 3),
        f"{OUTPUTS}; or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss and "
        "targets.unsqueeze(1).float()",
    ),
    "a sample without a batch": (
        (1,),
        torch.tensor(0),
        f"{OUTPUTS}; or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss and "
        "targets.unsqueeze(0).float()",
    ),
    "shapes that have nothing in common": ((4, 1), torch.zeros(4, 2, 2), OUTPUTS),
}


@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=0),
        nn.CrossEntropyLoss(reduction="sum"),
        F.cross_entropy,
        Entropy(),
    ],
    ids=["mean", "smoothed", "sum", "function", "subclass"],
)
def test_a_cross_entropy_of_one_class_is_an_error_that_says_what_the_targets_ask_for(
    case: str, loss: Callable[[Any, Any], Tensor]
) -> None:
    shape, targets, fix = ONE[case]
    trainer = trainer_of(shape, loss)
    for _ in range(2):  # the second fit is told as well
        with pytest.raises(ConfigError) as caught:
            trainer.fit([(torch.zeros(len(targets.reshape(-1)), 2), targets)], epochs=1)
        assert f"the prediction has shape {shape}, the target {tuple(targets.shape)}" in caught.value.what
        assert caught.value.fix == fix
    assert trainer.state.progress.step == 0


def test_a_cross_entropy_of_one_class_is_an_error_in_evaluate_too() -> None:
    with pytest.raises(ConfigError, match="over one class"):
        trainer_of((4, 1), nn.CrossEntropyLoss()).evaluate([(torch.zeros(4, 2), classes(4))])


def test_a_loss_that_makes_several_classes_of_one_number_is_left_alone() -> None:
    changed = nn.CrossEntropyLoss()
    changed.forward = OfTwo().forward  # type: ignore[method-assign]  # as some do
    for loss in (OfTwo(), changed):
        result = trainer_of((4, 1), loss).fit([(torch.zeros(4, 2), torch.tensor([0, 1, 1, 1]))], epochs=1)
        assert result.history[0]["train/loss"] > 0


def test_shapes_that_do_not_broadcast_are_torchs_own_error() -> None:
    with (
        pytest.raises(RuntimeError, match="must match the size"),
        pytest.warns(UserWarning, match="Using a target size"),
    ):
        trainer_of((4, 2)).fit([(torch.zeros(4, 2), torch.zeros(4, 3))], epochs=1)


def test_a_step_is_the_way_out_where_broadcasting_is_meant() -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return loss

    trainer = line_trainer(Reshaped((4, 1)), step=step)
    assert trainer.fit([(torch.zeros(4, 2), torch.zeros(4))], epochs=1).progress.step == 1


def test_predictions_that_are_no_tensor_are_the_losss_own_affair() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = line()

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            out = self.layer(inputs)
            return out, out.squeeze(1)

    def loss(predictions: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return F.mse_loss(predictions[0], targets) + F.mse_loss(predictions[1], targets.squeeze(1))

    assert line_trainer(Two(), loss=loss).fit(ragged(4), epochs=1).progress.step == 1


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.zeros(2, 3), "y": torch.zeros(2, 1)},
        (torch.zeros(2, 3),),
        (torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2)),
        torch.zeros(2, 3),
        torch.zeros(3, 3),
        7,
        None,
        "ab",
    ],
    ids=["dict of two", "one", "three", "tensor of two rows", "tensor", "number", "None", "two letters"],
)
def test_with_a_loss_a_batch_that_is_no_pair_is_an_error_that_names_step(batch: Any) -> None:
    with pytest.raises(DataError, match="not a pair of inputs and targets") as caught:
        line_trainer().fit([batch], epochs=1)
    assert "step=" in caught.value.fix
