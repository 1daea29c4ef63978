"""Predictions and targets of different shapes that torch would broadcast (C18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn

from helpers import At, line, line_trainer, ragged
from loopwright import DataError, ShapeMismatchError, Trainer

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
    "one class": ((4, 1), classes(4), nn.CrossEntropyLoss()),
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
