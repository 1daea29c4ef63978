"""Where files go: a leading ~ is a home, and what is no path is an error in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import small_trainer, some_batches
from loopwright import ConfigError, best_checkpoint, latest_checkpoint, load_weights
from loopwright.callbacks import Checkpoint, CSVLogger, GradientInspector, TensorBoardLogger


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return home


@pytest.mark.parametrize("form", [str, Path])
def test_a_path_that_begins_with_a_tilde_is_below_the_users_home(form: type[Any], home: Path) -> None:
    inspector = GradientInspector()
    callbacks = [
        Checkpoint(form("~/run/checkpoints"), monitor="train/loss", mode="min"),
        CSVLogger(form("~/run/metrics.csv")),
        TensorBoardLogger(form("~/run/board")),
        inspector,
    ]
    trainer = small_trainer(*callbacks)
    trainer.fit(some_batches(3), epochs=2).plot(form("~/run/curves.png"))
    inspector.plot(form("~/run/gradients.png"))

    written = {path.name for path in (home / "run").iterdir()}
    assert written == {"checkpoints", "metrics.csv", "board", "curves.png", "gradients.png"}
    assert list(Path.cwd().iterdir()) == []
    newest = latest_checkpoint(form("~/run/checkpoints"))
    assert newest is not None
    assert newest.parent == home / "run" / "checkpoints"
    assert best_checkpoint(form("~/run/checkpoints")) is not None

    resumed = small_trainer()
    load_weights(form(f"~/run/checkpoints/{newest.name}"), resumed.state.model)
    assert all(map(torch.equal, resumed.state.model.parameters(), trainer.state.model.parameters()))
    resumed = small_trainer(
        CSVLogger("~/run/metrics.csv"), Checkpoint("~/run/checkpoints", monitor="train/loss", mode="min")
    )
    resumed.fit(some_batches(3), epochs=3, resume=form(f"~/run/checkpoints/{newest.name}"))
    assert resumed.state.progress.epoch == 3


@pytest.mark.parametrize("path", [None, 3, "", b"curves.png"])
def test_a_picture_that_goes_nowhere_is_an_error(path: Any) -> None:
    inspector = GradientInspector()
    result = small_trainer(inspector).fit(some_batches(3), epochs=1)
    for plot in (result.plot, inspector.plot):
        with pytest.raises(ConfigError, match="must be a path"):
            plot(path)
