"""The recipes: at most 60 lines each, listed and shown with what they print, and true to what they say.

That they run and print what docs/recipes.md shows is seen to by conftest.py, which runs the page.
"""

from __future__ import annotations

import importlib
import re
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clean_environment import ROOT
from loopwright import Callback, Every, State, Trainer
from loopwright.callbacks import Checkpoint, EarlyStopping, ProgressBar
from loopwright.testing import check_callback

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))


def load(name: str) -> dict[str, Any]:
    """The names of a recipe, imported so that its classes can be pickled."""
    path = str(ROOT / "examples" / "recipes")
    sys.path.insert(0, path)
    try:
        return vars(importlib.import_module(name))
    finally:
        sys.path.remove(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_at_most_60_lines_without_argparse_and_is_shown_with_its_output(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert "argparse" not in text
    assert f"](recipes/{path.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert re.search(rf'--8<-- "examples/recipes/{path.name}"\n```\n\n```text\n\S', page)


def test_there_is_a_recipe_for_each_thing_that_people_ask_for() -> None:
    assert {path.stem for path in RECIPES} == {
        "accuracy", "char_transformer", "config", "digits", "export", "lbfgs", "notebook", "own_logger", "transfer",
        "two_validations", "weight_average",
    }  # fmt: skip


def test_the_transformer_sees_no_letter_that_comes_later() -> None:
    names = load("char_transformer")
    torch.manual_seed(0)
    model = names["Transformer"]().eval()
    text = torch.randint(len(names["LETTERS"]), (1, 8))
    other = text.clone()
    other[0, 5] = (other[0, 5] + 1) % len(names["LETTERS"])
    same = (model(text) - model(other)).abs().amax(dim=-1)[0] < 1e-5
    assert same.tolist() == [True] * 5 + [False] * 3
    assert len(names["TEXT"]) > 1000


def test_the_frozen_layers_and_their_batch_norm_are_as_the_first_training_left_them() -> None:
    names = load("transfer")
    torch.manual_seed(0)
    frozen = names["backbone"]()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen.requires_grad_(False)
    head = nn.Linear(128, 5)
    model = nn.Sequential(frozen, head).train()
    frozen.eval()
    untrained = head.weight.clone()
    names["fit"](model, low=5, examples=30, epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not torch.equal(head.weight, untrained)


def test_the_logger_of_the_recipe_passes_the_contract_of_callbacks_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    names = load("own_logger")
    check_callback(lambda: names["SQLiteLogger"](tmp_path / "contract.sqlite"))

    def fit(epochs: int, *, resume: Any = None) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        saving = Checkpoint(tmp_path / "checkpoints")
        logger = names["SQLiteLogger"](tmp_path / "run.sqlite")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[logger, saving], device="cpu")
        trainer.fit([(torch.ones(2, 3), torch.ones(2, 1))], epochs=epochs, resume=resume)

    def rows() -> list[tuple[int, int]]:
        table = sqlite3.connect(tmp_path / "run.sqlite")
        found = table.execute("select epoch, step from run order by epoch").fetchall()
        table.close()
        return found

    fit(3)
    assert rows() == [(1, 1), (2, 2), (3, 3)]
    fit(5, resume=tmp_path / "checkpoints" / "step-000000002")
    assert rows() == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    fit(2)
    assert rows() == [(1, 1), (2, 2)]


class Fragile(nn.Module):
    """Dropout, batch norm, and something that can happen in its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.happens: Callable[[], object] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.happens is not None and not self.training:
            happens, self.happens = self.happens, None
            happens()
        out: Tensor = self.layers(x)
        return out


BATCHES = [(torch.ones(4, 3) * n + torch.arange(4)[:, None], torch.ones(4, 1) * n) for n in range(3)]


def averaging(*more: Callback, average: bool = True) -> tuple[Trainer[Fragile], Any]:
    model = Fragile()
    callback = load("weight_average")["WeightAverage"](model, decay=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    callbacks = [callback, *more] if average else more
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, seed=1, device="cpu"), callback


def test_the_training_is_the_same_with_and_without_the_average_and_the_scores_are_those_of_the_average() -> None:
    trainer, callback = averaging()
    plain, _ = averaging(average=False)
    rows = trainer.fit(BATCHES, BATCHES, epochs=3, validate=Every(steps=2)).history
    others = plain.fit(BATCHES, BATCHES, epochs=3, validate=Every(steps=2)).history
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in others]
    assert rows[0]["val/loss"] != others[0]["val/loss"]
    assert same_weights(trainer.state.model, plain.state.model)

    averaged = plain.state.model  # whose buffers are those of the training
    with torch.no_grad():
        for own, mean in zip(averaged.parameters(), callback.average.module.parameters(), strict=True):
            own.copy_(mean)
    assert trainer.evaluate(BATCHES) == plain.evaluate(BATCHES)
    assert not same_weights(averaged, trainer.state.model)


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step() -> None:
    seen: list[Tensor] = []

    class Seen(Callback):
        def on_step_end(self, state: State) -> None:
            seen.append(next(state.model.parameters()).detach().clone())

    trainer, callback = averaging(Seen())
    for epochs in (1, 2):  # in a second fit it goes on
        trainer.fit(BATCHES, BATCHES, epochs=epochs)
    mean = seen[0]
    for value in seen[1:]:
        mean = mean.lerp(value, 0.5)
    torch.testing.assert_close(next(callback.average.module.parameters()).detach(), mean)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise RuntimeError("in the evaluation")


@pytest.mark.parametrize(("happens", "error"), [(interrupt, KeyboardInterrupt), (fail, RuntimeError)])
@pytest.mark.parametrize("saves", [True, False], ids=["saving", "not saving"])
def test_the_average_survives_a_resume_and_an_evaluation_that_is_cut_short(
    happens: Callable[[], None], error: type[BaseException], saves: bool, tmp_path: Path
) -> None:
    third, _ = averaging()
    third.fit(BATCHES, BATCHES, epochs=3)
    whole, expected = averaging()
    whole.fit(BATCHES, BATCHES, epochs=4)
    saving = [Checkpoint(tmp_path)] if saves else []
    trainer, callback = averaging(*saving)
    trainer.fit(BATCHES, BATCHES, epochs=2)
    trainer.state.model.happens = happens
    with pytest.raises(error):
        trainer.fit(BATCHES, BATCHES, epochs=4)
    assert same_weights(trainer.state.model, third.state.model)
    if saves:  # as in another process
        trainer, callback = averaging(Checkpoint(tmp_path))
    trainer.fit(BATCHES, BATCHES, epochs=4, resume="auto" if saves else None)
    assert same_weights(trainer.state.model, whole.state.model)
    assert same_weights(callback.average, expected.average)
    assert trainer.evaluate(BATCHES) == whole.evaluate(BATCHES)


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("behind", [True, False])
def test_the_restored_weights_are_the_averaged_ones_where_the_average_stands_behind_early_stopping(
    *, behind: bool
) -> None:
    model = Fragile()
    average: Any = load("weight_average")["WeightAverage"](model, decay=0.5)
    stopping = EarlyStopping("val/loss", mode="min", restore_best=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    callbacks = [stopping, average] if behind else [average, stopping]
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, seed=1, device="cpu")
    trainer.fit(BATCHES, BATCHES, epochs=1)
    assert same_weights(model, average.average.module) == behind


def test_a_second_validation_changes_nothing_in_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    names = load("two_validations")
    rows = names["train"](epochs=3).history
    monkeypatch.setattr(names["AlsoEvaluate"], "on_epoch_end", Callback.on_epoch_end)
    monkeypatch.setitem(names, "EarlyStopping", lambda *_, **__: Callback())  # it would miss the name
    assert [{k: v for k, v in row.items() if k != "noisy/loss"} for row in rows] == names["train"](epochs=3).history


def test_the_two_ways_to_an_accuracy_train_the_same() -> None:
    names = load("accuracy")
    by_metric, by_step = names["train"](by_step=False), names["train"](by_step=True)
    assert by_step.pop("train/accuracy") > 0.8
    assert by_metric == pytest.approx(by_step)
    assert by_metric["train/loss"] == by_step["train/loss"]


def test_a_misspelt_name_in_a_saved_configuration_is_an_error(tmp_path: Path) -> None:
    config = load("config")["Config"]
    (tmp_path / "config.json").write_text('{"epochs": 3, "optimizer": {"lr": 0.5}}')
    read = config.read(tmp_path / "config.json")
    assert (read.epochs, read.width, read.optimizer.lr, read.optimizer.name) == (3, 16, 0.5, "AdamW")
    (tmp_path / "config.json").write_text('{"optimizer": {"rate": 0.5}}')
    with pytest.raises(TypeError, match="'rate'"):
        config.read(tmp_path / "config.json")


def test_the_notebook_shows_its_progress_and_its_cells_are_marked() -> None:
    text = (ROOT / "examples" / "recipes" / "notebook.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    assert [cell.startswith(" [markdown]") for cell in cells] == [True, False, True, False, True, False, False]
    assert ProgressBar.__name__ in text
