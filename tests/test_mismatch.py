"""What is said of torch's errors of dtypes, shapes and ranges: what was found, and the cure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere

from helpers import At, small_trainer
from loopwright import ShapeMismatchError, Trainer
from loopwright.mismatch import likely_cause

LINEAR = "Linear(in_features=3, out_features=3, bias=True)"
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
    "labels from 1": (
        (linear, CE, X, Y + 1),
        IndexError,
        "from 1 to 3, for 3",
        "subtract 1 from each, if they count from 1; or, if they count from 0, 4 outputs at the end of the model",
    ),
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
        f"{LINEAR} was given float32 of shape (4, 5), whose last dimension",
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
    "indices not whole": (
        (lambda: nn.Embedding(3, 3), CE, Y / 2, Y),
        RuntimeError,
        "indices of float32 and shape (4,), and not all of them are whole",
        "nn.Linear in its place",
    ),
    "indices float, in bags": (
        (lambda: nn.EmbeddingBag(3, 3), CE, torch.zeros(4, 2), Y),
        RuntimeError,
        "an embedding was given indices of float32; indices are int64",
        "indices.long()",
    ),
    "labels one-hot float, nll": (
        (linear, F.nll_loss, X, ONE_HOT.float()),
        RuntimeError,
        "nll_loss was given targets of float32 and shape (4, 3)",
        "targets.argmax(1), if they are one-hot",
    ),
    "labels one-hot for others": (
        (linear, CE, X, F.one_hot(Y, 5)),
        RuntimeError,
        "(4, 5), one-hot for 5 classes, and predictions of shape (4, 3)",
        "5 outputs at the end of the model, and targets.argmax(1)",
    ),
    "labels of two classes, and one output": (
        (lambda: nn.Linear(3, 1), F.nll_loss, X, (Y > 0).long()),
        IndexError,
        "targets from 0 to 1, for predictions of one class, which is 0",
        "nn.BCEWithLogitsLoss() as the loss",
    ),
    "weights of the classes float64": (
        (linear, nn.CrossEntropyLoss(weight=torch.ones(3).double()), X, Y),
        RuntimeError,
        "weights of the classes of float64, for predictions of float32",
        "weight=weights.float()",
    ),
    "binary labels in a row": (
        (lambda: nn.Linear(3, 1), BCE, X, Y),
        ShapeMismatchError,
        "the loss was given targets of int64 and shape (4,); for predictions of float32 and shape (4, 1)",
        "targets.unsqueeze(-1).float(), in the dataset",
    ),
    "binary labels, and two outputs": (
        (lambda: nn.Linear(3, 2), BCE, X, (Y > 0).float()),
        ValueError,
        "for predictions of shape (4, 2) it takes targets of that shape",
        "nn.CrossEntropyLoss() in place of it, if a target is the number of one of 2 classes; or one output",
    ),
    "no probabilities": (
        (linear, nn.BCELoss(), X + 9, ONE_HOT.float()),
        RuntimeError,
        "; it takes probabilities, from 0 to 1",
        "nn.BCEWithLogitsLoss() in place of nn.BCELoss()",
    ),
    "targets that are no probabilities": (
        (lambda: nn.Sequential(linear(), nn.Sigmoid()), nn.BCELoss(), X, 2.0 * ONE_HOT - 1),
        RuntimeError,
        "binary_cross_entropy was given targets from -1 to 1",
        "targets from 0 to 1",
    ),
    "classes as quantities": (
        (linear, nn.MSELoss(), X, Y),
        RuntimeError,
        "mse_loss was given predictions of shape (4, 3) and targets of shape (4,)",
        "or nn.CrossEntropyLoss() as the loss, if a target is the number of one of 3 classes",
    ),
    "other quantities": (
        (linear, nn.L1Loss(), X, torch.zeros(4, 2)),
        RuntimeError,
        "l1_loss was given predictions of shape (4, 3) and targets of shape (4, 2); it takes one shape for both",
        "an output of the model for each target",
    ),
    "one feature without its dimension": (
        (lambda: nn.Linear(1, 3), CE, X[:, 0], Y),
        RuntimeError,
        "of shape (4,), whose last dimension is to be 1",
        ".unsqueeze(-1) on what it is given",
    ),
    "pictures neither flat nor of that size": (
        (lambda: nn.Linear(100, 3), CE, torch.zeros(4, 2, 4, 4), Y),
        RuntimeError,
        "(4, 2, 4, 4), whose last dimension is to be 100",
        "or nn.Flatten() before it, and nn.Linear(32, 3)",
    ),
    "pictures with the channels last": (
        (lambda: nn.Conv2d(3, 3, 1), CE, torch.zeros(2, 5, 5, 3), torch.zeros(2, 5, 5).long()),
        RuntimeError,
        "of shape (2, 5, 5, 3); it takes the shape (batch, 3, height, width)",
        ".movedim(-1, 1) on what it is given",
    ),
    "pictures without a channel": (
        (convolution, CE, torch.zeros(4, 4, 4), Y),
        RuntimeError,
        "(4, 4, 4); it takes",
        "1)",
    ),
    "pictures that are flat": (
        (convolution, CE, torch.zeros(4, 16), Y),
        RuntimeError,
        "it takes the shape (batch, 1, height, width)",
        ".unflatten(1, (1, height, width))",
    ),
    "pictures of other channels": (
        (convolution, CE, torch.zeros(4, 3, 4, 4), Y),
        RuntimeError,
        "of shape (4, 3, 4, 4); it takes",
        "nn.Conv2d(3, 1, ...), or what it is given with 1 channel",
    ),
    "a batch norm of other features": (
        (lambda: nn.Sequential(linear(), nn.BatchNorm1d(5)), CE, X, Y),
        RuntimeError,
        "whose second dimension is to be its 5 features",
        "nn.BatchNorm1d(3), or what it is given with 5",
    ),
    "a batch norm over a sequence": (
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 3)), CE, torch.zeros(4, 5, 3), Y),
        RuntimeError,
        "whose second dimension is to be its 3 features",
        ".movedim(-1, 1) on what it is given",
    ),
    "a batch norm, and one sample": (
        (lambda: nn.Sequential(nn.BatchNorm1d(3), linear()), CE, X[:1], Y[:1]),
        ValueError,
        "one value for each feature, of which there is no variance",
        "drop_last=True in the training loader",
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


def by_hand(name: str) -> Callable[..., Tensor]:
    """A step that calls a loss of torch's itself."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = getattr(F, name)(model(batch[0]), batch[1])
        return loss

    return step


OUTPUTS = "as many outputs at the end of the model as there are classes"
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize(
    ("targets", "cure"),
    [
        (
            LABELS[:, None],
            f"{OUTPUTS}, and targets.squeeze(1); or, for two classes by one output, nn.BCEWithLogitsLoss() as the loss "
            "and targets.float()",
        ),
        (LABELS[:, None].int(), f"{OUTPUTS}, and targets.squeeze(1).long(); or, for two"),
        (LABELS[:, None] > 0, f"{OUTPUTS}, and targets.squeeze(1).long(); or, for two"),
        (Y[:, None], f"{OUTPUTS}, and targets.squeeze(1)"),
        (ONE_HOT, "3 outputs at the end of the model, and targets.argmax(1)"),
    ],
    ids=["two classes", "int32", "bool", "three classes", "one-hot"],
)
def test_labels_that_meet_a_single_output_are_not_taken_for_probabilities(
    name: str, targets: Tensor, cure: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        small_trainer(model=nn.Linear(3, 1), step=by_hand(name)).fit([(X, targets)], epochs=1)
    (note,) = said(caught.value)
    assert "for predictions of shape (4, 1), which are of one class\n  fix: " in note
    assert note.partition("fix: ")[2].startswith(cure)
    assert ("BCEWithLogitsLoss" in note) is (targets.shape == (4, 1) and int(targets.max()) == 1)


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's own, before its error
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
    assert note.startswith(f"{LINEAR} was given float64 of shape (4, 3)")
    assert note.endswith("fix: .float() on what it is given")


def stack(*types: torch.dtype) -> nn.Sequential:
    """Layers of these number formats, from 3 features to 3."""
    return nn.Sequential(*(nn.Linear(3, 3, dtype=dtype) for dtype in types))


F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("types", "inputs", "which", "cure"),
    [
        (
            (F32, F64),
            F32,
            "not of one type: '0' is float32, '1' is float64",
            "model.float(), for one type in all layers;",
        ),
        (
            (F64, F32),
            F32,
            "not of one type: '0' is float64, '1' is float32",
            "model.float(), for one type in all layers;",
        ),
        ((F32, F32, F64), F32, "'2' is float64, and the others float32", "or .double() on what this layer is given"),
        ((F64, F32, F32), F32, "'0' is float64, and the others float32", "or .double() on what this layer is given"),
        ((F64, F32, F64, F64), F64, "'1' is float32, and the others float64", "model.double(), for one type"),
        (
            (F64, F32, F32),
            F64,
            "'0' is float64, and the others float32",
            "model.float(), for one type in all layers, and ",
        ),
        ((F16, F32, F64), F32, "'0' is float16, '1' is float32, '2' is float64", "model.float(), for one type"),
    ],
)
def test_of_layers_that_are_of_several_types_those_that_differ_are_named_and_the_inputs_are_not_blamed(
    types: tuple[torch.dtype, ...], inputs: torch.dtype, which: str, cure: str
) -> None:
    model = stack(*types)
    with pytest.raises(RuntimeError) as caught:
        trainer_of((lambda: model, CE, X, Y)).fit([(X.to(inputs), Y)], epochs=1)
    what, fix = said(caught.value)[0].split("\n  fix: ")
    assert which in what
    assert "the inputs" not in what
    assert cure in fix
    one_type = fix.partition(",")[0].removeprefix("model.").removesuffix("()")
    getattr(model, one_type)()
    again = X.to(next(model.parameters()).dtype) if "inputs." in fix else X.to(inputs)
    assert trainer_of((lambda: model, CE, X, Y)).fit([(again, Y)], epochs=1).stop_reason == "epochs"


class Calls(nn.Module):
    """Of parts, and what calls them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self._call = forward
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Any) -> Tensor:
        return self._call(self, *inputs)


def note_on(model: nn.Module, batch: Any, step: Any = None, **settings: Any) -> str:
    """What is said of the error of a fit, and the same of a preflight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, None if step else CE, step=step, device="cpu", **settings)
    with pytest.raises((RuntimeError, TypeError, AttributeError)) as caught:
        trainer.fit([batch], epochs=1)
    note = "".join(said(caught.value))
    row = trainer.preflight([batch])["a training step runs"]
    assert note in ("", f"{row.cause}\n  fix: {row.fix}")
    return note


def part(name: str) -> Callable[..., Any]:
    return lambda model, inputs: getattr(model, name)(inputs)


def named(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["more"]), Y)


@pytest.mark.parametrize(
    ("model", "batch", "step", "starts", "ends"),
    [
        (
            Calls(lambda m, x: m.layer(x + m.place), layer=linear(), place=torch.zeros(3).double()),
            (X, Y),
            None,
            "Linear(",
            "'place' is float64, as numpy's arrays are unless told otherwise\n  fix: .float() on 'place', where it is "
            "registered; or on what the layer is given",
        ),
        (
            Calls(lambda m, x: m.layer(x / 255), layer=linear()),
            (X.double(), Y),
            None,
            "the inputs are float64",
            "fix: inputs.float() in the dataset",
        ),
        (
            Calls(lambda m, x: x @ m.weight, weight=nn.Parameter(torch.ones(3, 3))),
            (X.double(), Y),
            None,
            "the inputs are float64",
            "fix: inputs.float() in the dataset",
        ),
        (
            Calls(lambda m, x: m.layer((x > 0).long()), layer=linear(), look=nn.Embedding(3, 3)),
            (X.long(), Y),
            None,
            f"{LINEAR} was given int64 of shape (4, 3); its weights are float32",
            "fix: .float() on what it is given",
        ),
        (
            Calls(part("layer"), layer=linear(), look=nn.Embedding(3, 3)),
            (X.long(), Y),
            None,
            "the inputs are int64",
            f"fix: .float() on what {LINEAR} is given",
        ),
        (
            Calls(lambda m, x: m.layer(x, x, x)[0], layer=nn.MultiheadAttention(3, 1)),
            (X.double(), Y),
            None,
            "the inputs are float64",
            "fix: inputs.float() in the dataset",
        ),
        (
            Calls(lambda m, x, more: m.layer(x + more), layer=linear()),
            {"x": X, "more": X.double()},
            named,
            "Linear(",
            "of the inputs batch['more'] is float64, as numpy's arrays are unless told otherwise\n  fix: .float() on "
            "batch['more'] in the dataset; or on what the layer is given",
        ),
        (
            Calls(lambda m, x: m.layer(x.double()), layer=linear()),
            {"x": X, "y": torch.zeros(4, 3).double()},
            lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
            f"{LINEAR} was given float64 of shape (4, 3); its weights are float32",
            "fix: .float() on what it is given",
        ),
        (
            Calls(part("layer"), layer=linear()),
            {"x": X.double(), "y": Y},
            lambda model, batch: F.cross_entropy(model.layer(batch["x"]), batch["y"]),
            "batch['x'] is float64",
            "fix: batch['x'].float() in the dataset",
        ),
        (
            Calls(part("layer"), layer=linear()),
            {"x": X.double(), "y": Y},
            lambda model, batch: F.cross_entropy(model(batch["x"] * 2), batch["y"]),
            f"{LINEAR} was given float64 of shape (4, 3); its weights are float32",
            "fix: .float() on what it is given",
        ),
        (
            linear(),
            {"x": X, "y": Y},
            lambda model, batch: F.cross_entropy(nn.Linear(3, 3).double()(batch["x"]), batch["y"]),
            f"{LINEAR} was given float32 of shape (4, 3); its weights are float64",
            "fix: .double() on what it is given",
        ),
        (
            nn.Linear(3, 3, dtype=torch.complex64),
            (X, Y),
            None,
            f"{LINEAR} was given float32 of shape (4, 3); its weights are complex64",
            "fix: .to(torch.complex64) on what it is given",
        ),
        (
            linear(),
            (X.to(torch.complex64), Y),
            None,
            f"{LINEAR} was given complex64 of shape (4, 3); its weights are",
            "or a layer with dtype=torch.complex64",
        ),
        (
            linear().half(),
            (X, Y),
            None,
            "the inputs are float32; the parameters are float16",
            "fix: inputs.half() in the dataset; or model.float()",
        ),
        (
            Calls(lambda m, x: m.layer(torch.zeros(4, 3, device="meta")), layer=linear()),
            (X, Y),
            None,
            f"{LINEAR} was given a tensor on meta; its weights are on cpu",
            "register_buffer() for one that the model keeps",
        ),
        (
            nn.Sequential(nn.LSTM(3, 3), linear()),
            (X, Y),
            None,
            f"{LINEAR} was given a tuple of 2: (Tensor, tuple); it takes a tensor",
            "the first is what an nn.LSTM and its like put out, for example",
        ),
        (
            nn.LSTM(3, 3),
            (X, Y),
            None,
            "cross_entropy was given a tuple of 2: (Tensor, tuple) for predictions; it takes a tensor",
            "for example",
        ),
        (
            Calls(lambda m, x: None, layer=linear()),  # type: ignore[arg-type, return-value]  # that is the mistake
            (X, Y),
            None,
            "cross_entropy was given None for predictions; it takes a tensor",
            "fix: return what is computed, in the forward of the model",
        ),
        (
            linear(),
            ({"x": X}, Y),
            None,
            f"{LINEAR} was given a dict with the keys 'x'; it takes a tensor",
            "fix: the tensor in it that is meant",
        ),
        (linear(), (X.numpy(), Y), None, "Linear(", "torch.from_numpy(array), in the dataset"),
        (
            linear(),
            (X, [0, 1, 2, 1]),
            None,
            "cross_entropy was given a list of 4: (int, int, int, ...) for targets",
            "set",
        ),
    ],
)
def test_nothing_is_said_of_the_inputs_but_what_is_certain(
    model: nn.Module, batch: Any, step: Any, starts: str, ends: str
) -> None:
    note = note_on(model, batch, step)
    assert note.startswith(starts)
    assert note.endswith(ends)


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("make", [dict, Batch, collections.namedtuple("Pair", "x y")])
def test_the_inputs_are_found_in_batches_of_every_kind(make: Any) -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)
        return F.cross_entropy(model(x), y)

    assert note_on(linear(), make(x=X.double(), y=Y), step).endswith("fix: inputs.float() in the dataset")


def test_what_autocast_brings_together_is_not_called_the_cause() -> None:
    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        raise RuntimeError("expected scalar type Float but found Half")

    assert note_on(Calls(forward, layer=linear()), (X.half(), Y), precision="bf16") == ""
    assert note_on(Calls(forward, layer=linear()), (X.half(), Y)).startswith("the inputs are float16; the parameters")
    assert "inputs.float()" in note_on(linear(), (X.double(), Y), precision="bf16")
    assert note_on(linear().double(), (X, Y), precision="bf16").endswith(
        "fix: model.float(), for bf16 begins with that"
    )


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
        (linear, nn.BCEWithLogitsLoss(), X, X[:2]),  # another number of samples
        (lambda: nn.LSTM(5, 3), CE, X, Y),
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
