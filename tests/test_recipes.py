"""The recipes: at most 60 lines each, listed and shown with what they print, and true to what they say.

That they run and print what docs/recipes.md shows is seen to by conftest.py, which runs the page.
"""

from __future__ import annotations

import importlib
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clean_environment import ROOT
from loopwright import Trainer
from loopwright.callbacks import Checkpoint, ProgressBar
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
        "char_transformer", "config", "digits", "export", "lbfgs", "notebook", "own_logger", "transfer"
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
