"""What is said of torch's errors of dtypes, shapes and ranges: what was found, and the cure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere

from helpers import At, small_trainer
from loopwright import ShapeMismatchError, Trainer
from loopwright.mismatch import likely_cause

X = torch.zeros(4, 3)
Y = torch.tensor([0, 1, 2, 1])
Case = tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor], Tensor, Tensor]


def linear() -> nn.Module:
    return nn.Linear(3, 3)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 3))


CE, BCE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
ONE_HOT = F.one_hot(Y, 3)
FOUND: Mapping[str, tuple[Case, type[Exception], str, str]] = {
    "labels float": (
        (linear, CE, X, Y.float()),
        RuntimeError,
        "cross_entropy was given targets of float32 and shape (4,); for predictions of shape (4, 3) it takes the "
        "numbers of the classes, int64 of shape (4,)",
        "targets.long(), in the dataset",
    ),
    "labels int32": ((linear, CE, X, Y.int()), RuntimeError, "targets of int32 and shape (4,)", "targets.long(), "),
    "labels bool": ((linear, CE, X, Y > 0), RuntimeError, "targets of bool and shape (4,)", "targets.long(), "),
    "labels not whole": ((linear, CE, X, Y / 2), RuntimeError, "not all of them are whole", "such as nn.MSELoss()"),
    "labels in a column": (
        (linear, CE, X, Y[:, None]),
        RuntimeError,
        "targets of int64 and shape (4, 1); for predictions of shape (4, 3)",
        "targets.squeeze(1), in the dataset",
    ),
    "labels int32 in a column": (
        (linear, CE, X, Y[:, None].int()),
        RuntimeError,
        "int32",
        "targets.squeeze(1).long(),",
    ),
    "labels float in a column": (
        (linear, CE, X, Y[:, None].float()),
        ShapeMismatchError,
        "the loss was given targets of float32 and shape (4, 1)",
        "targets.squeeze(1).long(), in the dataset",
    ),
    "labels float, as many as classes": (
        (linear, CE, X[:3], Y[:3].float()),
        ShapeMismatchError,
        "the loss was given targets of float32 and shape (3,)",
        "targets.long(), in the dataset",
    ),
    "labels one-hot": ((linear, CE, X, ONE_HOT), RuntimeError, "int64 and shape (4, 3)", "targets.argmax(1), if they"),
    "labels one-hot, nll": (
        (linear, F.nll_loss, X, ONE_HOT),
        RuntimeError,
        "nll_loss was given targets of int64 and shape (4, 3)",
        "targets.argmax(1), if they are one-hot",
    ),
    "a mask with a channel": (
        (lambda: nn.Conv2d(1, 3, 1), CE, torch.zeros(2, 1, 5, 5), torch.zeros(2, 1, 5, 5).long()),
        RuntimeError,
        "int64 of shape (2, 5, 5)",
        "targets.squeeze(1), in the dataset",
    ),
    "classes last": (
        (lambda: nn.Linear(3, 5), CE, torch.zeros(4, 7, 3), torch.zeros(4, 7).long()),
        RuntimeError,
        "predictions of shape (4, 7, 5); the classes are to be the second dimension",
        "predictions.movedim(-1, 1)",
    ),
    "a label too large": (
        (linear, CE, X, torch.tensor([0, 1, 7, 1])),
        IndexError,
        "cross_entropy was given targets from 0 to 7, for 3 classes: 0 to 2",
        "or 8 outputs at the end of the model",
    ),
    "labels from 1": ((linear, CE, X, Y + 1), IndexError, "from 1 to 3, for 3", "subtract 1 from each"),
    "a label below 0": ((linear, CE, X, Y - 1), IndexError, "from -1 to 1", "ignore_index="),
    "binary labels int64": (
        (linear, BCE, X, ONE_HOT),
        RuntimeError,
        "binary_cross_entropy_with_logits was given targets of int64 and shape (4, 3); for predictions of float32",
        "targets.float(), in the dataset",
    ),
    "binary labels bool": ((linear, BCE, X, ONE_HOT > 0), RuntimeError, "targets of bool", "targets.float(), in the"),
    "probabilities float64": (
        (lambda: nn.Sequential(linear(), nn.Sigmoid()), nn.BCELoss(), X, ONE_HOT.double()),
        RuntimeError,
        "binary_cross_entropy was given targets of float64",
        "targets.float(), in the dataset",
    ),
    "inputs int64": (
        (linear, CE, X.long(), Y),
        RuntimeError,
        "the inputs are int64; the parameters are float32",
        "inputs.float() in the dataset",
    ),
    "inputs float64": (
        (linear, CE, X.double(), Y),
        RuntimeError,
        "the inputs are float64, as numpy's arrays are unless told otherwise; the parameters are float32",
        "inputs.float() in the dataset",
    ),
    "inputs float32, weights float64": (
        (lambda: linear().double(), CE, X, Y),
        RuntimeError,
        "the inputs are float32; the parameters are float64",
        "inputs.double() in the dataset",
    ),
    "pictures uint8": (
        (convolution, CE, torch.zeros(4, 1, 4, 4, dtype=torch.uint8), Y),
        RuntimeError,
        "the inputs are uint8",
        "inputs.float() in the dataset",
    ),
    "a batch norm": (
        (lambda: nn.Sequential(nn.BatchNorm1d(3), linear()), CE, X.double(), Y),
        RuntimeError,
        "the inputs are float64",
        "inputs.float() in the dataset",
    ),
    "features too many": (
        (linear, CE, torch.zeros(4, 5), Y),
        RuntimeError,
        "Linear(in_features=3, out_features=3, bias=True) was given float32 of shape (4, 5), whose last dimension",
        "nn.Linear(5, 3), or what it is given with 3 features",
    ),
    "pictures not flat": (
        (lambda: nn.Linear(16, 3), CE, torch.zeros(4, 1, 4, 4), Y),
        RuntimeError,
        "was given float32 of shape (4, 1, 4, 4), whose last dimension is to be 16",
        "nn.Flatten() before it",
    ),
    "indices float": ((lambda: nn.Embedding(3, 3), CE, Y.float(), Y), RuntimeError, "indices of float32", ".long()"),
    "an index too large": (
        (lambda: nn.Embedding(3, 3), CE, Y + 2, Y),
        IndexError,
        "an embedding was given indices from 2 to 4, for 3 rows: 0 to 2",
        "or 5 rows in it",
    ),
    "a loss that goes back from one type only": (
        (linear, nn.HuberLoss(), X, ONE_HOT),
        RuntimeError,
        "the predictions are float32 and the targets int64",
        "targets.float(), in the dataset",
    ),
}


def trainer_of(case: Case) -> Trainer:
    model = case[0]()
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), case[1], device="cpu")


def said(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", ()) if "\n  fix: " in note]


@pytest.mark.parametrize("name", FOUND)
def test_an_error_of_torchs_keeps_its_type_and_is_given_what_was_found_and_the_cure(name: str) -> None:
    case, kind, found, cure = FOUND[name]
    with pytest.raises(kind) as caught:
        trainer_of(case).fit([case[2:]], epochs=1)
    if kind is ShapeMismatchError:
        assert isinstance(caught.value, ShapeMismatchError)
        what, fix = caught.value.why, caught.value.fix
    else:
        assert type(caught.value) is kind
        (note,) = said(caught.value)
        what, fix = note.split("\n  fix: ")
    assert found in what
    assert cure in fix


@pytest.mark.parametrize("name", FOUND)
def test_a_preflight_says_the_same_before_a_step_is_made(name: str) -> None:
    case, kind, found, cure = FOUND[name]
    row = trainer_of(case).preflight([case[2:]])["a training step runs"]
    assert row.verdict == "failed"
    if kind is IndexError:  # which it keeps from being raised, with words of its own
        assert row.cause
        assert row.fix.startswith("count from 0")
    else:
        assert found in row.cause
        assert cure in row.fix


def test_evaluate_and_predict_say_it_too() -> None:
    trainer = trainer_of((linear, CE, X, Y))
    with pytest.raises(RuntimeError) as caught:
        trainer.evaluate([(X, Y.float())])
    assert "targets.long()" in said(caught.value)[0]
    with pytest.raises(RuntimeError) as caught:
        trainer.predict([X.long()])
    assert "float()" in said(caught.value)[0]


def test_the_loss_in_a_step_of_the_users_own_is_found_as_well() -> None:
    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch["x"]), batch["y"])

    trainer = small_trainer(step=step)
    for targets, cure in ((Y, "targets.unsqueeze(-1).float(), "), (Y.float(), "targets.unsqueeze(-1), ")):
        with pytest.raises(ValueError, match="Target size") as caught:
            trainer.fit([{"x": X, "y": targets}], epochs=1)
        assert cure in said(caught.value)[0]
    with pytest.raises(RuntimeError) as wrong:
        trainer.fit([{"x": X.double(), "y": Y}], epochs=1)
    assert "inputs.float() in the dataset" in said(wrong.value)[0]


def test_what_a_model_made_of_its_inputs_is_not_called_the_inputs() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.layer(inputs.double())
            return out

    with pytest.raises(RuntimeError) as caught:
        trainer_of((Doubles, CE, X, Y)).fit([(X, Y)], epochs=1)
    (note,) = said(caught.value)
    assert note.startswith("Linear(in_features=3, out_features=3, bias=True) was given float64 of shape (4, 3)")
    assert note.endswith("fix: .float() on what it is given")


def fails(error: Exception) -> Callable[[Any, Any], Tensor]:
    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        raise error

    return loss


@pytest.mark.parametrize(
    "case",
    [
        (linear, fails(RuntimeError("dtype double, type float")), X, Y.float()),
        (linear, fails(ValueError("no")), X.long().float(), Y),
        (linear, fails(IndexError("Target 7 is out of bounds.")), X, Y + 7),
        (linear, CE, X, Y[:3]),  # another number of samples
        (linear, nn.CrossEntropyLoss(weight=torch.ones(2)), X, Y),
        (linear, nn.CrossEntropyLoss(weight=torch.ones(3).double()), X, Y),
    ],
)
def test_nothing_is_said_of_an_error_whose_cause_is_not_certain(case: Case) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
        trainer_of(case).fit([case[2:]], epochs=1)
    assert said(caught.value) == []


def test_labels_that_the_loss_leaves_out_are_not_out_of_range() -> None:
    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(predictions, targets, ignore_index=-1)

    with pytest.raises(IndexError) as caught:
        trainer_of((linear, loss, X, Y)).fit([(X, torch.tensor([-1, 0, 1, 5]))], epochs=1)
    assert "from 0 to 5, for 3 classes" in said(caught.value)[0]


def test_a_mistake_in_a_hook_is_named_beside_its_callback() -> None:
    def measure(state: Any) -> None:
        F.cross_entropy(X, Y.float())

    with pytest.raises(RuntimeError) as caught:
        small_trainer(At(on_fit_start=measure)).fit([(X, X[:, :1])], epochs=1)
    assert any("in its hook on_fit_start" in note for note in caught.value.__notes__)
    assert len(said(caught.value)) == 1


def test_a_tensor_that_cannot_be_looked_at_does_not_hide_the_error() -> None:
    class Shy(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise RuntimeError("not with me")

    with pytest.raises(RuntimeError, match="not with me") as caught:
        F.cross_entropy(X, torch.zeros(4).as_subclass(Shy))
    assert likely_cause(caught.value) is None
