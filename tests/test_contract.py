"""Every built-in callback, and the recorder itself, keeps the contract that loopwright.testing checks."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright.callbacks
from loopwright import Callback, Output, State
from loopwright.callbacks import (
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    Finding,
    GradientInspector,
    LearningRateMonitor,
    Logger,
    ProgressBar,
    TensorBoardLogger,
)
from loopwright.testing import HookRecorder, check_callback, tiny_state, two_step_fit

Make = Callable[[Path], Callback[Any]]
_numbers = itertools.count()

BUILT_IN: dict[str, Make] = {
    "ProgressBar": lambda folder: ProgressBar(),
    "CSVLogger": lambda folder: CSVLogger(folder / f"{next(_numbers)}.csv"),
    "TensorBoardLogger": lambda folder: TensorBoardLogger(folder / str(next(_numbers))),
    "LearningRateMonitor": lambda folder: LearningRateMonitor(),
    "Checkpoint": lambda folder: Checkpoint(folder / str(next(_numbers))),
    "GradientInspector": lambda folder: GradientInspector(),
    "EarlyStopping": lambda folder: EarlyStopping("val/loss", mode="min"),
}


def test_the_contract_test_covers_every_public_callback() -> None:
    names = set(loopwright.callbacks.__all__) - {
        Logger.__name__,
        Finding.__name__,
    }  # the abstract base, and what one of them finds
    assert names == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_callback_keeps_the_contract(name: str, tmp_path: Path) -> None:
    check_callback(lambda: BUILT_IN[name](tmp_path))


def test_an_early_stopping_that_keeps_weights_and_stops_keeps_the_contract() -> None:
    check_callback(lambda: EarlyStopping("val/loss", mode="max", patience=1, restore_best=True))


class _Mischief(Callback[Any]):
    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_end(self, state: State) -> None:
        if self.what == "weights":
            with torch.no_grad():
                next(state.model.parameters()).add_(1)
        elif self.what == "random state":
            torch.rand(1)
        elif self.what == "gradients":
            next(state.model.parameters()).grad = None
        elif self.what == "modes":
            state.model.eval()

    @torch.no_grad()
    def on_eval_start(self, state: State) -> None:
        if self.what == "weights in a pass":
            self.kept = next(state.model.parameters()).clone()
            next(state.model.parameters()).add_(1)

    @torch.no_grad()
    def on_eval_end(self, state: State) -> None:
        if self.what == "weights in a pass":
            next(state.model.parameters()).copy_(self.kept)

    def state_dict(self) -> dict[str, Any]:
        return {"set": {1}} if self.what == "state" else {}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "weights"),
        ("weights in a pass", "by on_eval_start .* weights"),
        ("random state", "torch's random state"),
        ("gradients", "gradients"),
        ("modes", "modes"),
        ("state", "set is neither plain data"),
    ],
)
def test_a_callback_that_meddles_fails_the_contract(what: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_callback(lambda: _Mischief(what))


def test_the_recorder_sees_stage_and_progress() -> None:
    recorder = HookRecorder()
    two_step_fit(recorder)
    validation = next(call for call in recorder.calls if call.hook == "on_eval_start")
    assert validation.stage == "val"
    assert (validation.progress.epoch, validation.progress.batch, validation.progress.step) == (0, 2, 2)


def test_a_hook_can_be_called_by_hand_on_a_tiny_state() -> None:
    state = tiny_state()
    LearningRateMonitor().on_step_end(state)
    assert state.metrics["lr"] == 0.1
    output = Output(torch.zeros(()))
    HookRecorder().on_batch_end(state, output)
