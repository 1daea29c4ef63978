"""Every example trains as the loop beside it does, bit for bit, and prints what its first page says."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import r2_score
from torch import nn

import fundamentals
import linear_regression
import real_data
import synthetic_regression
import training_loop
import workflow
from loopwright import Callback, NonFiniteError, Output, ShapeMismatchError, State, Trainer
from plain import fundamentals as plain_fundamentals
from plain import linear_regression as plain_linear_regression
from plain import linear_regression_numpy
from plain import synthetic_regression as plain_synthetic_regression
from plain import training_loop as plain_training_loop
from plain import workflow as plain_workflow

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGES = sorted(EXAMPLES.glob("*.py"))
PLAIN = sorted((EXAMPLES / "plain").glob("*.py"))


class Record(Callback):
    """What the pairs are compared by: the loss of every batch, and the parameters before and after each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.parameters: list[list[float]] = []

    def on_fit_start(self, state: State) -> None:
        self._keep(state)

    def on_batch_end(self, state: State, output: Output) -> None:
        self.losses.append(output.loss.item())
        self._keep(state)

    def _keep(self, state: State) -> None:
        self.parameters.append([x for p in state.model.parameters() for x in p.flatten().tolist()])


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# 000


def test_document_000_trains_with_the_losses_and_weights_of_its_loop() -> None:
    record = Record()
    model, _ = synthetic_regression.train(record)
    plain_model, losses = plain_synthetic_regression.train()
    assert record.losses == losses
    assert len(losses) == synthetic_regression.EPOCHS * 10
    assert same_weights(model, plain_model)


def test_document_000_prints_what_its_loop_prints(capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_regression.train()
    ours = capsys.readouterr().out
    plain_synthetic_regression.train()
    assert ours == capsys.readouterr().out
    assert len(ours.splitlines()) == synthetic_regression.EPOCHS


def test_document_000_without_its_squeeze_is_refused_and_not_broadcast() -> None:
    model = plain_synthetic_regression.make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss(), device="cpu")
    with pytest.raises(ShapeMismatchError, match=r"\(10, 1\).*\(10,\)"):
        trainer.fit(synthetic_regression.make_loader(), epochs=1)


# 001


def test_document_001_trains_with_the_losses_and_weights_of_its_loop() -> None:
    record = Record()
    model, _ = linear_regression.train(record)
    plain_model, losses = plain_linear_regression.train()
    assert record.losses == losses
    assert len(losses) == linear_regression.EPOCHS
    assert same_weights(model, plain_model)


def test_document_001_by_hand_in_numpy_is_equal_within_float32_rounding_at_every_step() -> None:
    record = Record()
    linear_regression.train(record)
    x, y = (tensor.numpy() for tensor in linear_regression.make_data())
    weight, bias = record.parameters[0]
    steps = linear_regression_numpy.train(x, y, weight, bias)
    assert all(number.dtype == np.float32 for step in steps for number in step)
    ours = np.column_stack([record.losses, record.parameters[1:]])
    np.testing.assert_allclose(ours, np.array(steps), rtol=1e-5, atol=1e-6)


def test_document_001_learns_a_weight_close_to_3() -> None:
    model, _ = linear_regression.train()
    assert model.weight.item() == pytest.approx(3, abs=0.05)
    assert model.bias.item() == pytest.approx(0, abs=0.05)


def test_document_001_shows_the_gradient_that_a_loop_without_zero_grad_would_step_along(
    capsys: pytest.CaptureFixture[str],
) -> None:
    linear_regression.train(linear_regression.ShowSteps(2))
    shown = re.findall(r"\(without zero_grad .* = (\S+)\)", capsys.readouterr().out)

    torch.manual_seed(0)
    x, y = linear_regression.make_data()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for _ in range(linear_regression.EPOCHS):
        torch.autograd.backward(nn.functional.mse_loss(model(x), y))
        assert model.weight.grad is not None
        gradients.append(model.weight.grad.item())
        optimizer.step()
    assert shown == [f"{gradients[1]:.4f}"]
    assert abs(model.weight.item() - 3) > 1  # and where that ends: nowhere near


# 002


def test_document_002_trains_with_the_losses_and_weights_of_its_loop() -> None:
    record = Record()
    trainer, _ = training_loop.train(record)
    plain_model, losses = plain_training_loop.train()
    assert record.losses == losses
    assert len(losses) == 10 * 4
    assert same_weights(trainer.state.model, plain_model)


def test_document_002_shows_its_own_epoch_mean_and_the_one_weighted_by_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain_training_loop.train()
    as_documented = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]

    record = Record()
    _, result = training_loop.train(record)
    shown = re.findall(r"over batches: (\S+), over samples: (\S+)", capsys.readouterr().out)
    over_batches = [row["train/loss_over_batches"] for row in result.history]
    over_samples = [row["train/loss"] for row in result.history]
    assert over_batches == as_documented
    assert shown == [(f"{b:.4f}", f"{s:.4f}") for b, s in zip(over_batches, over_samples, strict=True)]

    losses = np.array(record.losses).reshape(10, 4)
    assert over_samples == pytest.approx((losses @ [32, 32, 32, 4] / 100).tolist())
    assert all(abs(b - s) > 0.01 for b, s in zip(over_batches, over_samples, strict=True))
    assert over_samples == sorted(over_samples, reverse=True)  # as the page says of this one
    assert over_batches != sorted(over_batches, reverse=True)


def test_document_002_evaluates_as_its_loop_does_and_leaves_the_model_in_training_mode() -> None:
    trainer, _ = training_loop.train()
    outputs, loss = training_loop.evaluate(trainer)
    plain_model, _ = plain_training_loop.train()
    plain_outputs, plain_loss = plain_training_loop.evaluate(plain_model)
    assert torch.equal(outputs, plain_outputs)
    assert loss == plain_loss
    assert not outputs.requires_grad
    assert trainer.state.model.training
    assert not plain_model.training


# 003


def test_document_003_trains_with_the_losses_and_weights_of_its_loop() -> None:
    record = Record()
    model, _ = fundamentals.train(0.02, record)
    plain_model, losses = plain_fundamentals.train(0.02)
    assert record.losses == losses
    assert len(losses) == 20 * 10
    assert same_weights(model, plain_model)


def test_document_003_stops_where_the_loss_has_converged() -> None:
    result = fundamentals.learning()
    losses = [row["train/loss"] for row in result.history]
    assert "did not improve" in result.stop_reason
    assert 5 < len(losses) < 20
    assert losses[0] > 1 > 0.02 > losses[-1]


def test_document_003_is_stopped_at_the_first_loss_that_is_not_finite_and_its_loop_is_not() -> None:
    _, losses = plain_fundamentals.train(2.0)
    first = next(index for index, loss in enumerate(losses) if not np.isfinite(loss))
    assert len(losses) == 20 * 10
    assert np.isnan(losses[-1])

    record = Record()
    with pytest.raises(NonFiniteError) as caught:
        fundamentals.train(2.0, record)
    assert record.losses == losses[:first]
    assert f"in epoch {first // 10 + 1}, batch {first % 10 + 1}" in str(caught.value)


def test_document_003_has_a_callback_for_a_loss_that_rises_and_stays_finite() -> None:
    _, unwatched = fundamentals.train(1.0)
    assert unwatched.stop_reason == "epochs"
    assert 1e26 < unwatched.history[-1]["train/loss"] < float("inf")

    result = fundamentals.diverging()
    assert result.stop_reason.startswith("diverging: the loss rose from")
    assert result.progress.epoch == 2

    _, healthy = fundamentals.train(0.02, fundamentals.StopOnDivergence())
    assert healthy.stop_reason == "epochs"


def test_document_003_is_deterministic() -> None:
    assert fundamentals.deterministic()


# 004


def test_document_004_trains_with_the_losses_and_weights_of_its_loop() -> None:
    record = Record()
    model, before, after = workflow.train(record)
    plain_model, losses, plain_before, plain_after = plain_workflow.train()
    assert record.losses == losses
    assert len(losses) == workflow.EPOCHS
    assert same_weights(model, plain_model)
    assert torch.equal(before, plain_before)
    assert torch.equal(after, plain_after)


def test_document_004_draws_training_data_test_data_and_predictions(tmp_path: Path) -> None:
    _, before, after = workflow.train()
    workflow.plot(tmp_path / "folder" / "picture.png", before, after)
    picture = np.round(imread(tmp_path / "folder" / "picture.png")[..., :3] * 255)
    for color in ("2f6db3", "3f9b57", "999999", "d9731a"):
        dots = np.all(picture == list(bytes.fromhex(color)), axis=-1)
        assert dots.sum() > 50, color


# Real data


def test_the_network_on_real_data_is_about_as_good_as_ridge_regression_on_the_held_out_part() -> None:
    rows, result = real_data.compare(0)
    assert list(rows) == ["ridge regression", "network"]
    (ridge_mae, ridge_r2), (mae, r2) = rows.values()
    assert 40 < ridge_mae < 50
    assert 0.3 < ridge_r2 < 0.5
    assert mae < 1.05 * ridge_mae
    assert r2 > ridge_r2 - 0.05
    losses = {row["epoch"]: row["val/loss"] for row in result.history}
    assert result.restored_epoch == min(losses, key=losses.__getitem__)
    assert "did not improve in 20 evaluations" in result.stop_reason


def test_the_parts_of_the_real_data_are_disjoint_and_standardised_by_the_first() -> None:
    parts, spread = real_data.make_data(0)
    train, val, test = (torch.cat(part.tensors, dim=1) for part in parts)
    assert [len(train), len(val), len(test)] == [265, 88, 89]
    assert len(set(map(tuple, torch.cat([train, val, test]).tolist()))) == 442
    torch.testing.assert_close(train.mean(dim=0), torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(dim=0, correction=0), torch.ones(11), atol=1e-5, rtol=0)
    assert spread == pytest.approx(77, abs=5)


def test_a_score_of_two_batches_is_that_of_all_samples_and_begins_anew_after_reset() -> None:
    predictions, targets = torch.randn(5, 1), torch.randn(5, 1)
    score = real_data.Score(r2_score, unit=2.0)
    for _ in range(2):
        score.reset()
        score.update(predictions[:3], targets[:3])
        score.update(predictions[3:], targets[3:])
        assert score.compute() == pytest.approx(2 * r2_score(targets, predictions))


# All of them


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_an_example_is_a_page_of_at_most_80_lines_without_argparse(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert "argparse" not in text


def test_the_plain_loops_import_torch_alone() -> None:
    allowed = {path.name: {"torch"} for path in PLAIN} | {"linear_regression_numpy.py": {"numpy", "typing"}}
    assert {path.name: _imported(path) for path in PLAIN} == allowed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_an_example_imports_from_loopwright_by_its_front_door(path: Path) -> None:
    modules = {
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("loopwright")
    }
    assert "loopwright" in modules
    assert modules <= {"loopwright", "loopwright.callbacks"}


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names.add(node.module.partition(".")[0])
    return names


# A socket that is opened inside the script is an error there: an example needs no network.
OFFLINE = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(refuse)
"""
PICTURES = {"workflow": {"runs/workflow.png"}, "real_data": {"runs/real_data.png"}}


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_an_example_runs_as_a_script_offline_and_prints_what_it_says(path: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OFFLINE, encoding="utf-8")
    (tmp_path / "work").mkdir()
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Dropout draws other masks on other processors, so that of the real data only the form of the table is compared.
    _compare(_promised(path), done.stdout, tolerance=0.5 if path.stem == "real_data" else 1e-3)
    written = {found.relative_to(tmp_path / "work").as_posix() for found in (tmp_path / "work").rglob("*.*")}
    assert written == PICTURES.get(path.stem, set())


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_a_plain_loop_runs_as_a_script(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    if "$ python" in path.read_text(encoding="utf-8"):
        _compare(_promised(path), printed, tolerance=1e-3)


def _promised(path: Path) -> str:
    """The output that the docstring of an example shows under its command."""
    page = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert page is not None
    _, command, output = page.partition(f"$ python {path.relative_to(EXAMPLES.parent).as_posix()}\n")
    assert command, "the docstring shows no command"
    return textwrap.dedent(output)


def _compare(promised: str, printed: str, *, tolerance: float) -> None:
    """``...`` stands for anything; a number with a point may differ by ``tolerance``, relative or absolute."""
    parts = re.split(r"(-?\d+(?:\.\d+)?|\.\.\.)", promised)
    numbers = [part for part in parts[1::2] if part != "..."]
    patterns = {"...": "(?s:.*?)"}
    pattern = "".join(
        patterns.get(part, r"(-?\d+(?:\.\d+)?)") if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )
    found = re.fullmatch(pattern + r"\n?", printed)
    assert found is not None, f"promised:\n{promised}\nprinted:\n{printed}"
    for expected, number in zip(numbers, found.groups(), strict=True):
        allowed = tolerance if "." in expected or tolerance > 0.1 else 0
        assert float(number) == pytest.approx(float(expected), rel=allowed, abs=allowed)


def test_the_index_names_every_example() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([\w/]+\.py)\)", index))
    assert links == {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
