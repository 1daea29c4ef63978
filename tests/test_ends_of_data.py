"""R6, R9: what is saved as an epoch's data begins or comes to its end goes on to the bits of an unbroken run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from helpers import Samples, all_equal, weights_of
from loopwright import Callback, Every, State, Trainer
from loopwright.callbacks import Checkpoint
from loopwright.data import Loader


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def trainer(folder: Path, *callbacks: Callback[Any], every: Every = Every(epochs=1), **settings: Any) -> Trainer:  # noqa: B008  # it is frozen
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(folder, every=every)
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=[checkpoint, *callbacks], device="cpu", **settings)


def data(size: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 2, generator=generator)
    return TensorDataset(inputs, inputs[:, :1])


class Ending(Loader[Any]):
    """A loader at whose end a signal comes, as while workers are waited for."""

    armed = True

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        if self.armed:
            self.armed = False
            sigterm()


class KeepsPlace:
    """A loader with a state and no length, which after an epoch's last batch is at the next epoch."""

    def __init__(self) -> None:
        self.epoch = self.batch = 0

    def __iter__(self) -> Iterator[Samples]:
        while self.batch < 5:
            self.batch += 1
            inputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(100 * self.epoch + self.batch))
            yield inputs, inputs[:, :1]
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("val", [False, True], ids=["", "with validation"])
def test_a_signal_as_an_epochs_data_ends_lets_the_epoch_be_over(accumulate: int, val: bool, tmp_path: Path) -> None:
    def fit(loader: type[Loader[Any]], folder: Path) -> Trainer:
        made = trainer(folder, accumulate=accumulate)
        held_out = [(torch.ones(3, 2), torch.ones(3, 1))] if val else None
        made.fit(loader(data(), batch_size=5, seed=1), held_out, epochs=3, resume="auto")
        return made

    unbroken = fit(Loader, tmp_path / "unbroken")
    with pytest.raises(SystemExit, match="143"):
        fit(Ending, tmp_path / "run")
    resumed = fit(Loader, tmp_path / "run")
    assert resumed.state.progress == unbroken.state.progress
    assert all_equal(weights_of(resumed), weights_of(unbroken))


class FailsOnce(Callback[Any]):
    """Ends the run in one hook of the first epoch."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_epoch_end(self, state: State) -> None:
        if self.hook == "on_epoch_end":
            raise RuntimeError("planted")

    def on_eval_batch_end(self, state: State, output: Any) -> None:
        if self.hook == "on_eval_batch_end" and state.progress.step == 2:
            sigterm()


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_eval_batch_end"])
def test_a_save_after_a_short_window_is_not_of_a_loader_that_is_at_the_next_epoch(hook: str, tmp_path: Path) -> None:
    val = [(torch.ones(3, 2), torch.ones(3, 1))] * 2

    def fit(folder: Path, *callbacks: Callback[Any]) -> tuple[Trainer, list[dict[str, float]]]:
        made = trainer(folder, *callbacks, every=Every(steps=1), accumulate=3)
        result = made.fit(KeepsPlace(), val, epochs=3, validate=Every(steps=2), resume="auto")
        return made, result.history

    unbroken, history = fit(tmp_path / "unbroken")
    with pytest.raises((RuntimeError, SystemExit), match=r"planted|143"):
        fit(tmp_path / "run", FailsOnce(hook))
    resumed, found = fit(tmp_path / "run")
    assert resumed.state.progress == unbroken.state.progress
    assert all_equal(weights_of(resumed), weights_of(unbroken))
    assert found == history


class TermAt(Callback[Any]):
    """Sends a signal after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_batch_end(self, state: State, output: Any) -> None:
        self.left -= 1
        if self.left == 0:
            sigterm()


@pytest.mark.parametrize("batches", range(1, 12))
def test_a_script_of_several_fits_that_was_stopped_within_a_window_can_be_run_again(
    batches: int, tmp_path: Path
) -> None:
    def script(folder: Path, *callbacks: Callback[Any]) -> Trainer:
        made = trainer(folder, *callbacks, accumulate=4)
        train = DataLoader(data(30), batch_size=5, shuffle=True)
        targets: list[dict[str, Any]] = [{"steps": 1}, {"epochs": 1}, {"epochs": 2}]
        for target in targets:
            made.fit(train, resume="auto", **target)
        return made

    unbroken = script(tmp_path / "unbroken")
    with pytest.raises(SystemExit, match="143"):
        script(tmp_path / "run", TermAt(batches))
    resumed = script(tmp_path / "run")
    assert resumed.state.progress == unbroken.state.progress
    assert all_equal(weights_of(resumed), weights_of(unbroken))


class Interrupted(Dataset[Samples]):
    """Data of which a sample is never finished: a signal has reached whoever makes it, too."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0:
            self.fail()
        return torch.full((2,), index / 12), torch.ones(1) * index / 12

    def fail(self) -> None:
        sigterm()
        raise RuntimeError("the worker has gone")


@pytest.mark.parametrize("at", [1, 4, 12, 13, 15, 16, 25])
def test_data_that_a_signal_cuts_off_is_drawn_anew_as_for_the_first_time(at: int, tmp_path: Path) -> None:
    def fit(folder: Path, at: int) -> Trainer:
        made = trainer(folder, every=Every(epochs=2))
        made.fit(DataLoader(Interrupted(at), batch_size=3, shuffle=True), epochs=3, resume="auto")
        return made

    unbroken = fit(tmp_path / "unbroken", 0)
    with pytest.raises(SystemExit, match="143"):
        fit(tmp_path / "run", at)
    resumed = fit(tmp_path / "run", 0)
    assert resumed.state.progress == unbroken.state.progress
    assert all_equal(weights_of(resumed), weights_of(unbroken))


@pytest.mark.parametrize("at", [1, 3, 4, 12, 13, 15, 16, 25])
def test_a_fit_after_a_sample_that_failed_sees_the_samples_that_it_would_have_seen(at: int, tmp_path: Path) -> None:
    class Fails(Interrupted):
        def fail(self) -> None:
            raise RuntimeError("planted")

    def fit(at: int) -> Trainer:
        made = trainer(tmp_path / str(at))
        train = DataLoader(Fails(at), batch_size=3, shuffle=True)
        if at:
            with pytest.raises(RuntimeError, match="planted"):
                made.fit(train, epochs=3)
        made.fit(train, epochs=3)
        return made

    assert all_equal(weights_of(fit(at)), weights_of(fit(0)))
