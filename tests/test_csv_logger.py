"""CSVLogger: stable columns, nothing lost, each step once, the same bytes whatever interrupts the run."""

from __future__ import annotations

import collections
import csv
import errno
import logging
import math
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import At, small_trainer, some_batches
from loopwright import Callback, ConfigError, Every, NonFiniteError, Output, State, Trainer
from loopwright.callbacks import CSVLogger, LearningRateMonitor, Logger
from loopwright.paths import file_behind
from loopwright.testing import tiny_data, tiny_state, two_step_fit


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_of(path: Path) -> list[dict[str, float]]:
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows_of(path)]


def trainer_with(*callbacks: Callback[Any], **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, device="cpu", seed=0, **settings)


class LogsAtEpochEnd(Callback[Any]):
    """Logs the epoch's number under a name, from some epoch on."""

    def __init__(self, name: str, first: int = 1) -> None:
        self.name, self.first = name, first

    def on_epoch_end(self, state: State) -> None:
        if state.progress.epoch >= self.first:
            state.log(self.name, state.progress.epoch)


def test_each_epoch_is_a_row_that_reads_back_to_the_history(tmp_path: Path) -> None:
    _, result = two_step_fit(CSVLogger(tmp_path / "metrics.csv"), epochs=3)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "epoch,step,train/loss,val/loss"
    assert numbers_of(tmp_path / "metrics.csv") == result.history


def test_it_makes_the_folders_above_the_file(tmp_path: Path) -> None:
    two_step_fit(CSVLogger(tmp_path / "runs" / "line" / "metrics.csv"))
    assert len(rows_of(tmp_path / "runs" / "line" / "metrics.csv")) == 1


def test_constructing_one_makes_nothing(tmp_path: Path) -> None:
    CSVLogger(tmp_path / "runs" / "metrics.csv")
    assert list(tmp_path.iterdir()) == []


def test_every_step_has_one_row_and_the_last_of_an_epoch_holds_the_validation(tmp_path: Path) -> None:
    two_step_fit(CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1)), epochs=3)
    rows = rows_of(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["step"], row["val/loss"] != "") for row in rows] == [
        ("1", "1", False),
        ("1", "2", True),
        ("2", "3", False),
        ("2", "4", True),
        ("3", "5", False),
        ("3", "6", True),
    ]


def test_a_validation_in_mid_epoch_joins_the_row_of_its_step(tmp_path: Path) -> None:
    trainer = trainer_with(CSVLogger(tmp_path / "metrics.csv", every=Every(steps=2)))
    trainer.fit(tiny_data(20), tiny_data(), epochs=1, validate=Every(steps=2))
    rows = rows_of(tmp_path / "metrics.csv")
    assert [(row["step"], row["val/loss"] != "") for row in rows] == [("2", True), ("4", True), ("5", False)]


def test_a_run_shorter_than_the_cadence_still_has_a_row_an_epoch(tmp_path: Path) -> None:
    two_step_fit(CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1000)), epochs=2)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["2", "4"]


def test_the_last_step_has_a_row_where_no_epoch_is_due(tmp_path: Path) -> None:
    two_step_fit(CSVLogger(tmp_path / "metrics.csv", every=Every(epochs=2)), epochs=3)
    assert [row["epoch"] for row in rows_of(tmp_path / "metrics.csv")] == ["2", "3"]


def test_a_partial_last_epoch_has_a_row_with_its_number(tmp_path: Path) -> None:
    trainer_with(CSVLogger(tmp_path / "metrics.csv")).fit(tiny_data(), steps=3)
    rows = rows_of(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "3")]


def test_a_step_that_several_batches_follow_has_one_row_with_the_values_it_had(tmp_path: Path) -> None:
    class LogsEachBatch(Callback[Any]):
        def on_batch_end(self, state: State, output: Output) -> None:
            state.log("batch", state.progress.batch)

    logger = CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1))
    trainer_with(LogsEachBatch(), logger, accumulate=3).fit(tiny_data(28), epochs=1)  # 7 batches
    rows = rows_of(tmp_path / "metrics.csv")
    assert [(row["step"], row["batch"]) for row in rows] == [("1", "3.0"), ("2", "6.0"), ("3", "7.0")]


@pytest.mark.parametrize("before", [True, False])
def test_what_is_logged_at_an_epochs_end_is_in_its_row_wherever_the_callback_stands(
    tmp_path: Path, before: bool
) -> None:
    callbacks = [CSVLogger(tmp_path / "metrics.csv"), LogsAtEpochEnd("own")]
    two_step_fit(*(reversed(callbacks) if before else callbacks), epochs=3)
    assert [(row["epoch"], row["own"]) for row in rows_of(tmp_path / "metrics.csv")] == [
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "3.0"),
    ]


def test_what_is_evaluated_outside_of_fit_is_not_in_the_file(tmp_path: Path) -> None:
    trainer, _ = two_step_fit(CSVLogger(tmp_path / "metrics.csv"))
    trainer.evaluate(tiny_data())
    trainer.fit(tiny_data(), tiny_data(), epochs=2)
    assert list(rows_of(tmp_path / "metrics.csv")[0]) == ["epoch", "step", "train/loss", "val/loss"]


def test_a_late_metric_gets_its_column_and_nothing_is_lost(tmp_path: Path) -> None:
    _, result = two_step_fit(
        LogsAtEpochEnd("b", first=4), LogsAtEpochEnd("a", first=3), CSVLogger(tmp_path / "metrics.csv"), epochs=5
    )
    rows = rows_of(tmp_path / "metrics.csv")
    assert list(rows[0]) == ["epoch", "step", "train/loss", "val/loss", "a", "b"]
    assert [(row["a"], row["b"]) for row in rows] == [("", ""), ("", ""), ("3.0", ""), ("4.0", "4.0"), ("5.0", "5.0")]
    assert numbers_of(tmp_path / "metrics.csv") == result.history
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_late_metric_in_the_row_of_a_step_that_has_one_already_joins_it(tmp_path: Path) -> None:
    two_step_fit(CSVLogger(tmp_path / "metrics.csv"), LogsAtEpochEnd("own", first=3), epochs=3)
    rows = rows_of(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["own"]) for row in rows] == [("1", ""), ("2", ""), ("3", "3.0")]


def test_a_late_metric_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        two_step_fit(LogsAtEpochEnd("late", first=3), CSVLogger(tmp_path / "metrics.csv"), epochs=5)
    assert [row["epoch"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_behind_a_link_it_is_the_file_that_is_rewritten(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "metrics.csv").symlink_to(tmp_path / "data" / "real.csv")
    two_step_fit(LogsAtEpochEnd("late", first=2), CSVLogger(tmp_path / "metrics.csv"), epochs=2)
    assert (tmp_path / "metrics.csv").is_symlink()
    assert [row["late"] for row in rows_of(tmp_path / "data" / "real.csv")] == ["", "2.0"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1 + 0.2, 5e-324, -1.7976931348623157e308, 3])
def test_a_number_reads_back_to_the_same_float(tmp_path: Path, value: float) -> None:
    state, logger = tiny_state(), CSVLogger(tmp_path / "metrics.csv")
    logger.on_fit_start(state)
    state.log("value", value)
    logger.on_fit_end(state)
    logger.teardown(state)
    (cell,) = (row["value"] for row in rows_of(tmp_path / "metrics.csv"))
    assert cell == repr(float(value))


@pytest.mark.parametrize("name", ["a, b", 'the "best"', "größe/µ", "1+1", "a=b", "it's"])
def test_a_name_is_its_column_and_reads_back(tmp_path: Path, name: str) -> None:
    two_step_fit(LogsAtEpochEnd(name), CSVLogger(tmp_path / "metrics.csv"))
    assert rows_of(tmp_path / "metrics.csv")[0][name] == "1.0"


def test_no_cell_starts_a_formula(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a metric"):
        two_step_fit(LogsAtEpochEnd("=HYPERLINK(1)"), CSVLogger(tmp_path / "metrics.csv"))
    two_step_fit(LogsAtEpochEnd("x"), CSVLogger(tmp_path / "other.csv"), epochs=2)
    with (tmp_path / "other.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert cells
    assert not [cell for cell in cells if cell[:1] in "=+@\t\r" and cell]


def test_a_fresh_run_sets_an_existing_file_aside_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("mine\n")
    with caplog.at_level(logging.INFO, "loopwright"):
        two_step_fit(CSVLogger(path))
    second = path.read_bytes()
    two_step_fit(CSVLogger(path), epochs=2)
    assert (tmp_path / "metrics-1.csv").read_text() == "mine\n"
    assert (tmp_path / "metrics-2.csv").read_bytes() == second
    assert len(rows_of(path)) == 2
    said = [record for record in caplog.records if "metrics-1.csv" in record.getMessage()]
    assert [(record.name, record.levelname) for record in said] == [("loopwright", "INFO")]


def test_a_file_without_rows_is_not_set_aside(tmp_path: Path) -> None:
    class Fails(Callback[Any]):
        def on_epoch_start(self, state: State) -> None:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        two_step_fit(CSVLogger(tmp_path / "metrics.csv"), Fails())
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step\n"
    two_step_fit(CSVLogger(tmp_path / "metrics.csv"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("every", [Every(epochs=1), Every(epochs=2), Every(steps=1), Every(steps=3)])
@pytest.mark.parametrize("parts", [[1, 2, 5], [3, 5]])
def test_a_run_in_several_fits_writes_the_bytes_of_one(tmp_path: Path, every: Every, parts: list[int]) -> None:
    def write(path: Path, targets: list[int]) -> bytes:
        trainer = trainer_with(CSVLogger(path, every=every), LogsAtEpochEnd("late", first=4))
        for epochs in targets:
            trainer.fit(tiny_data(12, shuffle=True), tiny_data(), epochs=epochs)
        return path.read_bytes()

    unbroken, broken = write(tmp_path / "one.csv", [5]), write(tmp_path / "several.csv", parts)
    if every == Every(epochs=2):  # which has a row at the end of each fit as well
        ends = {str(epochs).encode() for epochs in parts if epochs % 2 and epochs != 5}
        broken = b"".join(line for line in broken.splitlines(True) if line.split(b",")[0] not in ends)
        assert [line.split(b",")[:2] for line in broken.splitlines()] == [
            line.split(b",")[:2] for line in unbroken.splitlines()
        ]
    else:
        assert broken == unbroken


def test_a_fit_after_a_partial_epoch_goes_on_in_the_file(tmp_path: Path) -> None:
    trainer = trainer_with(CSVLogger(tmp_path / "metrics.csv"))
    trainer.fit(tiny_data(), steps=3)
    trainer.fit(tiny_data(), epochs=3)
    rows = rows_of(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "3"), ("2", "4"), ("3", "6")]


def test_a_second_fit_refuses_a_file_that_the_run_has_not_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    trainer, _ = two_step_fit(CSVLogger(path))
    for other in ("epoch,step,other\n1,2,3\n", "", "epoch,step,train/loss,val/loss\n1,7,0.5,0.5\n"):
        path.write_text(other)
        with pytest.raises(ConfigError, match=r"is not the file that this run has written so far"):
            trainer.fit(tiny_data(), epochs=2)
        assert path.read_text() == other
    assert trainer.state.progress.step == 2  # it came before the first step


def test_a_second_fit_warns_of_a_file_that_is_gone_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = two_step_fit(CSVLogger(tmp_path / "metrics.csv"))
    (tmp_path / "metrics.csv").unlink()
    trainer.fit(tiny_data(), tiny_data(), epochs=2)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["4"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_second_fit_warns_of_rows_that_are_missing_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    trainer, _ = two_step_fit(CSVLogger(path), epochs=3)
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:2]) + lines[2][:5])  # as after a crash of the machine
    trainer.fit(tiny_data(), tiny_data(), epochs=4)
    assert [row["step"] for row in rows_of(path)] == ["2", "8"]
    assert "holds 1 of the 3 rows" in caplog.text


def test_a_trainer_that_joins_a_logger_to_a_run_under_way_sets_the_file_aside(tmp_path: Path) -> None:
    state, logger = tiny_state(), CSVLogger(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("epoch,step\n1,1\n")
    state.progress.epoch, state.progress.step, state.progress.samples = 2, 4, 16
    state.log("old", 1.0)
    logger.on_fit_start(state)
    state.log("new", 2.0)
    logger.on_fit_end(state)
    logger.teardown(state)
    assert rows_of(tmp_path / "metrics.csv") == [{"epoch": "2", "step": "4", "new": "2.0"}]
    assert (tmp_path / "metrics-1.csv").read_text() == "epoch,step\n1,1\n"


def test_two_trainers_with_one_logger_get_what_two_loggers_give(tmp_path: Path) -> None:
    shared = CSVLogger(tmp_path / "shared.csv")
    for name in ("one", "two"):
        two_step_fit(CSVLogger(tmp_path / f"{name}.csv"), epochs=2)
        two_step_fit(shared, epochs=2)
    assert (tmp_path / "shared-1.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_a_pickled_logger_goes_on_in_its_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "metrics.csv")
    two_step_fit(logger)
    copy = pickle.loads(pickle.dumps(logger))
    copy.open(tiny_state(), fresh=False)
    copy.write(2, 4, {"train/loss": 0.5})
    copy.close()
    assert [row["epoch"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "2"]


def test_a_folder_as_path_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_with(CSVLogger(tmp_path))
    with pytest.raises(ConfigError, match=r"which is a folder(?s:.*)metrics\.csv"):
        trainer.fit(tiny_data(), epochs=1)
    assert trainer.state.progress.samples == 0


def test_a_device_as_path_is_an_error_and_stays_where_it_is() -> None:
    with pytest.raises(ConfigError, match="no regular file"):
        two_step_fit(CSVLogger(os.devnull))
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("held", ["", "a line before\n"])
def test_the_standard_output_is_refused_whatever_it_goes_to(tmp_path: Path, held: str) -> None:
    # A stand-in for /dev/stdout, which is such a link: nothing in /dev itself is ever written to by a test.
    (output := tmp_path / "output.txt").write_text(held)
    program = (
        "import os\n"
        "from loopwright.callbacks import CSVLogger\n"
        "from loopwright.testing import two_step_fit\n"
        "os.symlink('/proc/self/fd/1', 'out')\n"
        "two_step_fit(CSVLogger('out'))\n"
    )
    with output.open("a") as file:
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, timeout=120, stdout=file, stderr=subprocess.PIPE, text=True
        )
    assert "CSVLogger is to write 'out', which is no regular file" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "output.txt"]
    assert os.readlink(tmp_path / "out") == "/proc/self/fd/1"
    assert output.read_text() == held


def test_of_a_link_the_file_behind_it_is_set_aside_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real.csv").write_text("mine\n")
    (tmp_path / "metrics.csv").symlink_to(Path("other.csv"))
    (tmp_path / "other.csv").symlink_to(Path("data", "real.csv"))
    two_step_fit(CSVLogger(tmp_path / "metrics.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "metrics.csv", "other.csv"]
    assert (tmp_path / "metrics.csv").is_symlink()
    assert (tmp_path / "data" / "real-1.csv").read_text() == "mine\n"
    assert len(rows_of(tmp_path / "data" / "real.csv")) == 1


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/new.csv", "/dev/new/a.csv"])
def test_no_place_of_the_systems_is_a_file(place: str) -> None:
    assert file_behind(Path(place)) is None  # it is only looked at


def test_shared_memory_is_a_place_for_files() -> None:
    assert file_behind(Path("/dev/shm/run/metrics.csv")) == Path(os.path.realpath("/dev/shm"), "run", "metrics.csv")


def annotated(path: Path, header: str, *notes: str, end: str = "\n") -> None:
    """Add cells to the right of each line, as somebody does in an editor."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{line},{cell}" for line, cell in zip(lines, (header, *notes), strict=True)) + end)


def test_columns_that_somebody_adds_stay_with_their_cells_when_the_run_goes_on(tmp_path: Path) -> None:
    path, late = tmp_path / "metrics.csv", LogsAtEpochEnd("late", first=4)
    trainer = trainer_with(CSVLogger(path), late)
    trainer.fit(tiny_data(), epochs=2)
    annotated(path, "note,mark", '"slow, too",2', '"two\nlines",')
    trainer.fit(tiny_data(), epochs=3)  # the rows go on
    trainer.fit(tiny_data(), epochs=5)  # a column of the run's own comes before those
    notes = [(row["epoch"], row["late"], row["note"], row["mark"]) for row in rows_of(path)]
    assert notes == [
        ("1", "", "slow, too", "2"),
        ("2", "", "two\nlines", ""),
        ("3", "", "", ""),
        ("4", "4.0", "", ""),
        ("5", "5.0", "", ""),
    ]
    assert path.read_text().startswith("epoch,step,train/loss,late,note,mark\n")
    whole = trainer_with(CSVLogger(tmp_path / "whole.csv"), late)
    whole.fit(tiny_data(), epochs=5)
    assert [row["train/loss"] for row in rows_of(path)] == [
        row["train/loss"] for row in rows_of(tmp_path / "whole.csv")
    ]


def test_a_note_in_the_last_row_stays_when_more_is_added_to_that_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CSVLogger(path)
    logger.open(tiny_state(), fresh=True)
    logger.write(1, 1, {"own": 0.5})
    logger.write(1, 2, {"own": 0.25})
    saved = logger.state_dict()
    logger.write(1, 2, {"of the error": 1.0})
    logger.close()
    annotated(path, "", "", "best", end="")  # by an editor that leaves out the last line break; without a header
    for _ in range(2):
        resumed = CSVLogger(path)
        resumed.load_state_dict(saved)
        resumed.open(tiny_state(), fresh=False)
        resumed.write(1, 2, {"own": 0.125, "more": 2.0})
        resumed.write(1, 3, {"own": 0.5})
        resumed.close()
        assert path.read_text() == "epoch,step,own,more,\n1,1,0.5,,\n1,2,0.125,2.0,best\n1,3,0.5,,\n"


def test_notes_in_another_encoding_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    trainer, _ = two_step_fit(CSVLogger(path))
    path.write_bytes(path.read_bytes().replace(b"val/loss\n", b"val/loss,gr\xfc\xdfe,\n")[:-1] + b",sch\xf6n,\n")
    trainer.fit(tiny_data(), tiny_data(), epochs=2)
    header, first, _ = path.read_bytes().splitlines()
    assert header.endswith(b"val/loss,gr\xfc\xdfe")
    assert first.endswith(b",sch\xf6n")


def test_a_column_in_between_is_refused_and_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    trainer, _ = two_step_fit(CSVLogger(path))
    path.write_text(path.read_text().replace("step,", "step,note,").replace("1,2,", "1,2,good,"))
    held = path.read_text()
    with pytest.raises(ConfigError, match="its columns are epoch, step, note, train/loss"):
        trainer.fit(tiny_data(), epochs=2)
    assert path.read_text() == held


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    trainer, _ = two_step_fit(CSVLogger(path))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r1"))
    with pytest.raises(ConfigError, match="it cannot be read: new-line character"):
        trainer.fit(tiny_data(), epochs=2)


@pytest.mark.parametrize("other", ["metrics.csv", "link/metrics.csv", "link.csv"])
def test_two_loggers_on_one_file_are_an_error_before_anything_is_written(tmp_path: Path, other: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "link.csv").symlink_to(tmp_path / "metrics.csv")
    with pytest.raises(ConfigError, match="two CSVLoggers in the list write to") as caught:
        trainer_with(CSVLogger(tmp_path / "metrics.csv"), CSVLogger(tmp_path / other))
    assert caught.value.fix == "a path for each"
    assert not (tmp_path / "metrics.csv").exists()


def test_two_loggers_on_a_file_each_write_the_same_rows(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    trainer_with(*map(CSVLogger, paths)).fit(tiny_data(), epochs=1)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_place_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = trainer_with(CSVLogger(tmp_path / "file" / "metrics.csv"))
    with pytest.raises(ConfigError, match=r"file. is a file"):
        trainer.fit(tiny_data(), epochs=1)
    assert trainer.state.progress.samples == 0


def test_the_row_of_an_error_shows_nan(tmp_path: Path) -> None:
    def explode(model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(batch[0]).mean()
        steps.append(1)
        return loss * (math.nan if len(steps) == 4 else 1.0)

    steps: list[int] = []
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, step=explode, callbacks=[CSVLogger(tmp_path / "metrics.csv")], device="cpu")
    with pytest.raises(NonFiniteError):
        trainer.fit(tiny_data(), epochs=5)
    last = rows_of(tmp_path / "metrics.csv")[-1]
    assert (last["epoch"], last["step"], last["train/loss"]) == ("2", "3", "nan")


def test_another_callbacks_error_at_the_start_is_not_hidden(tmp_path: Path) -> None:
    class Fails(Callback[Any]):
        def on_fit_start(self, state: State) -> None:
            state.log("own", 1.0)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        two_step_fit(Fails(), CSVLogger(tmp_path / "metrics.csv"))
    assert not [note for note in caught.value.__notes__ if "CSVLogger" in note]
    assert list(tmp_path.iterdir()) == []


class Sees(Callback[Any]):
    """Counts the lines of the file, and its sizes, as somebody beside the run sees them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at_epoch_end: list[int] = []
        self.at_eval_start: list[int] = []
        self.sizes: set[int] = set()

    def on_batch_end(self, state: State, output: Output) -> None:
        self.sizes.add(self.path.stat().st_size)

    def on_eval_start(self, state: State) -> None:
        self.at_eval_start.append(len(self.path.read_text().splitlines()))

    def on_epoch_end(self, state: State) -> None:
        self.at_epoch_end.append(len(self.path.read_text().splitlines()))


def test_others_see_the_rows_at_an_epochs_end_and_during_validation(tmp_path: Path) -> None:
    sees = Sees(tmp_path / "metrics.csv")
    two_step_fit(CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1)), sees, epochs=3)
    assert sees.at_eval_start == [3, 5, 7]
    assert sees.at_epoch_end == [3, 5, 7]


def test_rows_of_a_fast_run_are_handed_on_together(tmp_path: Path) -> None:
    sees = Sees(tmp_path / "metrics.csv")
    began = time.monotonic()
    trainer_with(CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1)), sees).fit(tiny_data(800), epochs=1)
    assert len(rows_of(tmp_path / "metrics.csv")) == 200
    assert len(sees.sizes) < 10 + 2 * (time.monotonic() - began)


def test_the_rows_that_a_state_tells_of_are_in_the_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "metrics.csv")
    logger.open(tiny_state(), fresh=True)
    for step in (1, 2, 3):
        logger.write(1, step, {"own": 0.5})
        assert logger.state_dict()["rows"] == len(rows_of(logger.path)) == step
    logger.close()


def test_rows_of_a_slow_run_wait_no_longer_than_a_second(tmp_path: Path) -> None:
    class Slow(Callback[Any]):
        def on_batch_start(self, state: State, batch: Any) -> None:
            if state.progress.step == 2:
                time.sleep(1.05)

    sees = Sees(tmp_path / "metrics.csv")
    trainer_with(Slow(), CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1)), sees).fit(tiny_data(12), steps=3)
    assert max(sees.sizes) == (tmp_path / "metrics.csv").stat().st_size


def test_a_killed_process_leaves_the_rows_of_its_epochs(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from loopwright import Callback\n"
        "from loopwright.callbacks import CSVLogger\n"
        "from loopwright.testing import two_step_fit\n"
        "class Dies(Callback):\n"
        "    def on_epoch_end(self, state):\n"
        "        if state.progress.epoch == 3:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "two_step_fit(CSVLogger('metrics.csv'), Dies(), epochs=5)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=120)
    assert ran.returncode == -9
    assert [row["epoch"] for row in rows_of(tmp_path / "metrics.csv")] == ["1", "2", "3"]


def test_a_column_that_came_after_the_saved_state_is_gone_again(tmp_path: Path) -> None:
    killed = CSVLogger(tmp_path / "metrics.csv")
    killed.open(tiny_state(), fresh=True)
    killed.write(1, 1, {"own": 0.5})
    saved = killed.state_dict()
    killed.write(1, 1, {"of the error": 1.0})
    killed.close()
    resumed = CSVLogger(tmp_path / "metrics.csv")
    resumed.load_state_dict(saved)
    resumed.open(tiny_state(), fresh=False)
    resumed.write(1, 2, {"own": 0.25})
    resumed.close()
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,own\n1,1,0.5\n1,2,0.25\n"


def test_a_rate_logged_each_step_is_there_at_every_row(tmp_path: Path) -> None:
    two_step_fit(LearningRateMonitor(), CSVLogger(tmp_path / "metrics.csv"), epochs=2)
    assert [row["lr"] for row in rows_of(tmp_path / "metrics.csv")] == ["0.01", "0.01"]


Record = tuple[int, dict[str, float]]  # how many steps after the record before, and what was logged
RECORDS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.dictionaries(st.sampled_from(["a", "b", "c, d", "e"]), st.floats(), min_size=1, max_size=3),
    ),
    max_size=12,
)


def play(logger: CSVLogger, records: list[Record], step: int) -> Iterator[int]:
    for steps, values in records:
        step += steps
        logger.write(1, step, values)
        yield step


@settings(deadline=None)  # machines are busy
@given(records=RECORDS, cut=st.integers(0, 12), beyond=st.integers(0, 12), torn=st.integers(0, 5))
def test_going_on_from_any_record_gives_the_bytes_of_an_unbroken_run(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], cut: int, beyond: int, torn: int
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    state = tiny_state()

    unbroken = CSVLogger(folder / "unbroken.csv")
    unbroken.open(state, fresh=True)
    list(play(unbroken, records, 1))
    unbroken.close()

    killed = CSVLogger(folder / "killed.csv")
    killed.open(state, fresh=True)
    step = max(play(killed, records[:cut], 1), default=1)
    saved = killed.state_dict()
    list(play(killed, records[cut : cut + beyond], step))
    killed.close()
    with killed.path.open("ab") as file:
        file.write(b"9,9,0.5\n"[:torn])  # a row of which only the beginning came to the disk

    resumed = CSVLogger(folder / "killed.csv")
    resumed.load_state_dict(saved)
    resumed.open(state, fresh=False)
    list(play(resumed, records[cut:], step))
    resumed.close()
    assert resumed.path.read_bytes() == unbroken.path.read_bytes()
    steps = [row["step"] for row in rows_of(resumed.path)]
    assert len(steps) == len(set(steps))


class Counted:
    """A file that counts what is asked of it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.asked: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self.file, name)


def test_a_row_is_one_call_to_the_file_and_that_of_an_epochs_end_is_written_over(tmp_path: Path) -> None:
    asked: list[dict[str, int]] = []
    logger = CSVLogger(tmp_path / "metrics.csv", every=Every(steps=1))

    def watch(state: State) -> None:
        if state.progress.epoch == 1:  # the columns are all there by now
            logger._file = cast("BinaryIO", Counted(logger._file))

    def note(state: State) -> None:
        if isinstance(logger._file, Counted):
            asked.append(dict(logger._file.asked))

    trainer_with(At(on_epoch_start=watch), logger, At(on_epoch_end=note)).fit(tiny_data(20), epochs=2)
    assert asked == [{"write": 5 + 1, "seek": 1, "truncate": 1, "flush": 1}]  # with the epoch's mean in the last row
    assert len(rows_of(logger.path)) == 10


class ElsewhereLogger(Logger):
    """A logger of one's own, whose attribute happens to have the name of a method of ours."""

    def __init__(self, destination: str) -> None:
        super().__init__()
        self._destination = destination  # type: ignore[method-assign, assignment]  # that is the accident
        self.records = 0

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self.records += 1


def test_a_logger_of_ones_own_may_use_any_name_for_its_attributes() -> None:
    one = ElsewhereLogger("there")
    trainer_with(one).fit(tiny_data(), epochs=2)
    assert one.records == 2


@pytest.mark.parametrize("room", [0, 1, 900, 2000, 5000, 6500])
def test_rows_that_a_full_disk_had_no_room_for_are_written_once_it_has(room: int, tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(state: State) -> None:
        if state.progress.step == 100:
            size = (tmp_path / "run.csv").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, usual[1]))

    def fit(name: str, *callbacks: Callback[Any]) -> None:
        torch.manual_seed(0)
        trainer = small_trainer(CSVLogger(tmp_path / name, every=Every(steps=1)), *callbacks)
        try:
            trainer.fit(some_batches(4), epochs=100)
        except OSError as error:
            said.append((error.errno, error.filename))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        trainer.fit(some_batches(4), epochs=100)

    said: list[object] = []
    fit("run.csv", At(on_step_end=fill))
    assert said == [(errno.EFBIG, str(tmp_path / "run.csv"))]
    fit("whole.csv")
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
