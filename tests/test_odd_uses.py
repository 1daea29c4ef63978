"""Odd uses that are likely all the same: what they are answered with is true, and names what to do."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import Samples, line, line_trainer, ragged
from loopwright import ConfigError, DataError, LoopwrightError, Trainer, latest_checkpoint, load_weights
from loopwright.callbacks import Checkpoint, CSVLogger, ProgressBar, TensorBoardLogger
from loopwright.errors import CheckpointError, SaveError


def trainer(**settings: Any) -> Trainer:
    """A trainer whose settings are looked at."""
    model = line()
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), **{"device": "cpu", **settings})


def batches() -> Iterator[Samples]:
    """A function that has not been called."""
    yield from ragged(2, 2)


ODD: dict[str, tuple[Callable[[], object], str, str]] = {
    "no list of callbacks": (lambda: trainer(callbacks=None), "callbacks is None", "leave it out, or callbacks=[]"),
    "one callback": (
        lambda: trainer(callbacks=ProgressBar()),
        "callbacks is an object of type ProgressBar",
        "callbacks=[ProgressBar(...)]",
    ),
    "a callback that was left out": (
        lambda: trainer(callbacks=[ProgressBar(), None]),
        "None is not a callback",
        "leave None out of the list of callbacks",
    ),
    "a list in the list": (
        lambda: trainer(callbacks=[[ProgressBar()]]),
        "a list of 1: (ProgressBar) is not a callback",
        "one flat list, as in callbacks=[*some, *others]",
    ),
    "a seed below 0": (lambda: trainer(seed=-1), "seed is -1", "seed=None to seed nothing"),
    "no device": (lambda: trainer(device=None), "device=None is not available here", 'device="auto"'),
    "ROCm": (lambda: trainer(device="rocm"), "device='rocm' is not available here", "did you mean 'cuda'?"),
    "HIP": (lambda: trainer(device="hip"), "device='hip' is not available here", "did you mean 'cuda'?"),
    "a TPU": (lambda: trainer(device="tpu"), "device='tpu' is not available here", "did you mean 'xla'?"),
    "a number as text": (lambda: trainer(device="0"), "device='0' is not available here", "did you mean 'cuda:0'?"),
    "a blank": (lambda: trainer(device="auto "), "device='auto ' is not available here", "did you mean 'auto'?"),
    "no path of a table": (lambda: CSVLogger(None), "path is None", "CSVLogger("),  # type: ignore[arg-type]  # a mistake
    "an empty path of a table": (lambda: CSVLogger(""), "path is ''", "CSVLogger("),
    "no folder of events": (lambda: TensorBoardLogger(None), "folder is None", "TensorBoardLogger("),  # type: ignore[arg-type]  # a mistake
    "a folder in bytes": (lambda: Checkpoint(b"runs"), "folder is b'runs'", "Checkpoint("),  # type: ignore[arg-type]  # a mistake
    "a generator function": (
        lambda: line_trainer().fit(batches, epochs=2),  # type: ignore[arg-type]  # a mistake
        "train is an object of type function",
        "batches(), if that makes a DataLoader or a list; else an object whose __iter__ calls it",
    ),
    "empty validation data": (
        lambda: line_trainer().fit(ragged(2), [], epochs=1),
        "the validation data gave no batch: it is an empty list",
        "fit(train, ...) trains without a validation",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_use_is_answered_with_what_why_and_a_fix_of_its_own(case: str) -> None:
    use, what, fix = ODD[case]
    with pytest.raises(LoopwrightError) as caught:
        use()
    assert caught.value.what == what
    assert caught.value.why
    assert fix in caught.value.fix


@pytest.mark.parametrize("device", ["mps", "hip"])
def test_a_device_that_torch_is_built_without_is_said_to_be_one(device: str) -> None:
    if torch.backends.mps.is_built():
        pytest.skip("this torch is built with Apple's devices")
    with pytest.raises(ConfigError) as caught:
        trainer(device=device)
    assert caught.value.why == "this torch is built without it"


def test_empty_training_data_is_not_told_to_be_left_out() -> None:
    with pytest.raises(DataError) as caught:
        line_trainer().fit([], epochs=1)
    assert "without a validation" not in caught.value.fix


def test_a_generator_that_never_gave_anything_is_at_its_end_too() -> None:
    with pytest.raises(DataError) as caught:
        line_trainer().fit(ragged(2), (batch for batch in ragged()), epochs=1)
    assert caught.value.why == "it is an iterator (generator), which can be read once, and is at its end"


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_file_above_what_a_logger_writes_is_named_before_the_first_step(
    tmp_path: Path, logger: Callable[[Path], Any]
) -> None:
    (tmp_path / "taken").write_text("no folder")
    run = line_trainer(callbacks=[logger(tmp_path / "taken" / "run" / "metrics")])
    with pytest.raises(ConfigError) as caught:
        run.fit(ragged(2), epochs=1)
    assert f"and {str(tmp_path / 'taken')!r} is a file" in caught.value.what
    assert run.state.progress.batch == 0
    assert (tmp_path / "taken").read_text() == "no folder"


@pytest.mark.parametrize(
    ("name", "fix"),
    [("ENOSPC", "make room"), ("EROFS", "get leave to write there"), ("EACCES", "get leave"), ("EIO", "mend what")],
)
def test_what_the_system_refuses_is_answered_with_what_mends_that(name: str, fix: str) -> None:
    number = getattr(errno, name)
    error = SaveError.of(OSError(number, os.strerror(number)), "runs/line")
    assert error.fix.startswith(fix)
    assert error.fix.endswith('go on with resume="auto"')


def test_a_name_that_is_too_long_is_answered_with_a_shorter_one(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as caught:
        line_trainer(callbacks=[Checkpoint(tmp_path / ("long" * 100))]).fit(ragged(2), epochs=1)
    assert caught.value.fix.startswith("take a folder with a shorter name")


def test_a_run_lives_in_a_folder_with_blanks_and_letters_of_any_script(tmp_path: Path) -> None:
    folder = tmp_path / "Läufe, die zählen" / "ü 漢字 🙂"

    def run(epochs: int) -> int:
        callbacks = [Checkpoint(folder / "saved"), CSVLogger(folder / "größe.csv"), TensorBoardLogger(folder)]
        return line_trainer(callbacks=callbacks).fit(ragged(2, 2), epochs=epochs, resume="auto").progress.step

    assert [run(1), run(2)] == [2, 4]
    assert latest_checkpoint(folder / "saved") == folder / "saved" / "step-000000004"
    assert len((folder / "größe.csv").read_text().splitlines()) == 3


def test_weights_of_a_folder_of_checkpoints_or_of_another_model_are_answered_without_a_word_of_resume(
    tmp_path: Path,
) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path / "run")]).fit(ragged(2), epochs=1)
    with pytest.raises(CheckpointError, match="a folder of checkpoints") as caught:
        load_weights(tmp_path / "run", line())
    assert caught.value.fix == f"the path of one, such as latest_checkpoint({str(tmp_path / 'run')!r})"
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        load_weights(latest_checkpoint(tmp_path / "run") or "", nn.Linear(7, 1))
    assert "strict=False" in caught.value.fix


def test_what_is_set_aside_is_counted_in_words_that_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loopwright"):
        for epochs in (1, 2, 1):
            line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(ragged(2), epochs=epochs)
    said = [record.getMessage().partition(" in ")[0] for record in caplog.records]
    assert said == ["1 checkpoint that is not of this run is", "2 checkpoints that are not of this run are"]


@pytest.mark.parametrize("array", ["input", "target"])
def test_arrays_of_numpy_in_a_batch_are_named_in_a_note(array: str) -> None:
    ((inputs, targets),) = ragged(2)
    batch: Any = (inputs.numpy(), targets) if array == "input" else (inputs, targets.numpy())
    with pytest.raises(TypeError) as caught:
        line_trainer().fit([batch], epochs=1)
    (note,) = (note for note in caught.value.__notes__ if "numpy" in note)
    assert "was given an array of numpy's" in note
    assert note.endswith("it takes a tensor\n  fix: torch.from_numpy(array), in the dataset")
