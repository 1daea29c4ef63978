"""TensorBoardLogger, read back with TensorBoard's own readers: each metric once at its step; hyperparameters."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]  # it comes without types
    event_accumulator,
    plugin_event_accumulator,
)
from tensorboard.plugins.hparams import metadata  # type: ignore[import-untyped]  # as above
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from loopwright import Callback, ConfigError, Every, Output, Schedule, State, Trainer
from loopwright.callbacks import TensorBoardLogger
from loopwright.metrics import Metrics
from loopwright.testing import tiny_data, tiny_model, tiny_state, two_step_fit

Points = dict[str, list[tuple[int, float]]]


def reader_of(folder: Path) -> Any:
    reader = event_accumulator.EventAccumulator(str(folder), {event_accumulator.SCALARS: 0})
    reader.Reload()
    return reader


def points_of(folder: Path) -> Points:
    reader = reader_of(folder)
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def hyperparameters_of(folder: Path) -> tuple[dict[str, float | str | bool], list[str]]:
    """The hyperparameters as TensorBoard's own tab takes them, and the names of the metrics beside them."""
    reader = plugin_event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    content = {
        tag: reader.SummaryMetadata(tag).plugin_data.content
        for tag in (metadata.SESSION_START_INFO_TAG, metadata.EXPERIMENT_TAG, metadata.SESSION_END_INFO_TAG)
    }
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    return settings, [info.name.tag for info in experiment.metric_infos]


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


class Logs(Callback[Any]):
    """Logs a value for each epoch when it ends."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = values

    def on_epoch_end(self, state: State) -> None:
        for name, value in self.values.items():
            state.log(name, value)


def test_every_metric_is_a_scalar_of_its_name_at_its_step(tmp_path: Path) -> None:
    _, result = two_step_fit(TensorBoardLogger(tmp_path / "runs" / "line"), epochs=3)
    points = points_of(tmp_path / "runs" / "line")
    assert list(points) == ["epoch", "train/loss", "val/loss"]
    assert points["epoch"] == [(2, 1), (4, 2), (6, 3)]
    for name in ("train/loss", "val/loss"):
        assert points[name] == [(row["step"], float32(row[name])) for row in result.history]


@pytest.mark.parametrize("name", ["val/top 5", "a, b", "größe/µ", "f(x)=1"])
def test_a_name_is_the_tag_letter_for_letter(tmp_path: Path, name: str) -> None:
    two_step_fit(Logs({name: 1.0}), TensorBoardLogger(tmp_path))
    assert points_of(tmp_path)[name] == [(2, 1.0)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e-30])
def test_extreme_values_are_points_as_well(tmp_path: Path, value: float) -> None:
    two_step_fit(Logs({"own": value}), TensorBoardLogger(tmp_path))
    assert points_of(tmp_path)["own"] == [(2, float32(value))]


def test_nan_is_a_point_as_well(tmp_path: Path) -> None:
    two_step_fit(Logs({"own": math.nan}), TensorBoardLogger(tmp_path))
    ((step, value),) = points_of(tmp_path)["own"]
    assert step == 2
    assert math.isnan(value)


def test_a_cadence_in_steps_gives_one_point_a_step_and_the_epochs_mean_at_its_end(tmp_path: Path) -> None:
    _, result = two_step_fit(TensorBoardLogger(tmp_path, every=Every(steps=1)), epochs=2)
    points = points_of(tmp_path)
    assert [step for step, _ in points["train/loss"]] == [1, 2, 3, 4]
    assert points["train/loss"][1::2] == [(row["step"], float32(row["train/loss"])) for row in result.history]
    assert [step for step, _ in points["val/loss"]] == [2, 4]
    assert points["epoch"] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_what_a_later_callback_logs_at_an_epochs_end_is_at_that_step(tmp_path: Path) -> None:
    two_step_fit(TensorBoardLogger(tmp_path), Logs({"own": 1.0}), epochs=2)
    points = points_of(tmp_path)
    assert points["own"] == [(2, 1.0), (4, 1.0)]
    assert points["epoch"] == [(2, 1), (4, 2)]


def test_there_is_no_graph(tmp_path: Path) -> None:
    two_step_fit(TensorBoardLogger(tmp_path))
    tags = reader_of(tmp_path).Tags()
    assert (tags["graph"], tags["meta_graph"]) == (False, False)


def test_hyperparameters_and_final_metrics_are_in_the_same_folder(tmp_path: Path) -> None:
    trainer, _ = two_step_fit(TensorBoardLogger(tmp_path), epochs=3, accumulate=2)
    settings, metrics = hyperparameters_of(tmp_path)
    assert (
        settings.items()
        >= {
            "model": "Sequential",
            "parameters": sum(parameter.numel() for parameter in trainer.state.model.parameters()),
            "optimizer": "SGD",
            "lr": 0.01,
            "momentum": 0,
            "nesterov": False,
            "epochs": 3,
            "batches": 2,
            "accumulate": 2,
        }.items()
    )
    assert "steps" not in settings  # none were asked for
    assert metrics == ["train/loss", "val/loss"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_learning_rate_among_the_hyperparameters_is_that_before_the_schedule(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, betas=(0.8, 0.9))
    schedule = Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1), each="step")
    trainer = Trainer(
        model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=[TensorBoardLogger(tmp_path)], device="cpu"
    )
    trainer.fit(tiny_data(), epochs=1)
    trainer.fit(tiny_data(), epochs=2)
    settings, _ = hyperparameters_of(tmp_path)
    assert settings["lr"] == 0.5
    assert settings["betas"] == "(0.8, 0.9)"


def test_a_second_fit_continues_without_double_points(tmp_path: Path) -> None:
    trainer, _ = two_step_fit(TensorBoardLogger(tmp_path))
    trainer.evaluate(tiny_data())
    result = trainer.fit(tiny_data(), tiny_data(), epochs=3)
    points = points_of(tmp_path)
    assert points["epoch"] == [(2, 1), (4, 2), (6, 3)]
    assert points["train/loss"] == [(row["step"], float32(row["train/loss"])) for row in result.history]
    assert hyperparameters_of(tmp_path)[0]["epochs"] == 3
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_fit_after_a_partial_epoch_goes_on(tmp_path: Path) -> None:
    trainer, _ = two_step_fit(TensorBoardLogger(tmp_path))
    trainer.fit(tiny_data(), steps=3)
    trainer.fit(tiny_data(), epochs=2)
    assert points_of(tmp_path)["epoch"] == [(2, 1), (3, 2), (4, 2)]


@pytest.mark.parametrize("killed_at", [2, 3, 5])
@pytest.mark.parametrize("every", [Every(steps=1), Every(epochs=1)])
def test_going_on_from_a_saved_state_gives_the_points_of_an_unbroken_run(
    tmp_path: Path, every: Every, killed_at: int
) -> None:
    def train(logger: TensorBoardLogger, first: int, last: int) -> tuple[dict[str, Any], Metrics]:
        """Epochs of one step, through the hooks; what is saved when the epoch before the last has ended."""
        state.progress.epoch = state.progress.step = state.progress.samples = first
        saved: tuple[dict[str, Any], Metrics] = {}, Metrics()
        logger.on_fit_start(state)
        for epoch in range(first, last):
            logger.on_epoch_start(state)
            state.progress.batch, state.progress.step = 1, epoch + 1
            state.log("train/loss", epoch)
            logger.on_batch_end(state, Output(torch.zeros(())))
            state.log("train/loss", -epoch)
            state.progress.epoch, state.progress.batch = epoch + 1, 0
            logger.on_epoch_end(state)
            state.log("late", epoch)  # as by a callback that stands later in the list
            if epoch == last - 2:
                saved = logger.state_dict(), copy.deepcopy(state.metrics)
        logger.teardown(state)
        return saved

    state = tiny_state()
    train(TensorBoardLogger(tmp_path / "unbroken", every=every), 0, 6)

    state = tiny_state()
    saved, metrics = train(TensorBoardLogger(tmp_path / "killed", every=every), 0, killed_at + 1)

    state = tiny_state()
    state.metrics = metrics
    resumed = TensorBoardLogger(tmp_path / "killed", every=every)
    resumed.load_state_dict(saved)
    train(resumed, killed_at, 6)

    assert points_of(tmp_path / "killed") == points_of(tmp_path / "unbroken")


def test_a_value_that_had_not_been_handed_on_may_still_change_after_going_on(tmp_path: Path) -> None:
    killed = TensorBoardLogger(tmp_path)
    killed.open(tiny_state(), fresh=True)
    killed.write(1, 1, {"own": 0.5})
    saved = killed.state_dict()
    killed.flush()
    killed.close()
    resumed = TensorBoardLogger(tmp_path)
    resumed.load_state_dict(saved)
    resumed.open(tiny_state(), fresh=False)
    resumed.write(1, 1, {"own": 0.25})  # such as the epoch's mean, in place of the newest value
    resumed.flush()
    resumed.close()
    assert points_of(tmp_path) == {"epoch": [(1, 1)], "own": [(1, 0.25)]}


def test_a_fresh_run_sets_earlier_event_files_aside_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    two_step_fit(TensorBoardLogger(tmp_path), epochs=1)
    with caplog.at_level(logging.INFO, "loopwright"):
        two_step_fit(TensorBoardLogger(tmp_path), epochs=2)
    two_step_fit(TensorBoardLogger(tmp_path), epochs=3)
    folders = [tmp_path / "previous-1", tmp_path / "previous-2", tmp_path]
    assert [len(points_of(folder)["epoch"]) for folder in folders] == [1, 2, 3]
    assert [hyperparameters_of(folder)[0]["epochs"] for folder in folders] == [1, 2, 3]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    said = [record for record in caplog.records if "previous-1" in record.getMessage()]
    assert [(record.name, record.levelname) for record in said] == [("loopwright", "INFO")]


def tags_of(folder: Path) -> set[str]:
    tags = reader_of(folder).Tags()
    return {tag for kind in ("scalars", "tensors") for tag in tags[kind]}


def test_what_a_writer_of_ones_own_adds_to_the_run_stays_in_it_also_when_a_cell_runs_again(tmp_path: Path) -> None:
    class Writes(Callback[Any]):
        def setup(self, state: State) -> None:
            self.writer = SummaryWriter(str(tmp_path))
            self.writer.add_text("of a callback", name)

        def on_step_end(self, state: State) -> None:
            self.writer.add_scalar("beside", state.progress.step, state.progress.step)

        def teardown(self, state: State) -> None:
            self.writer.close()

    left_open = []
    for name in ("one", "two", "three"):  # a cell of a notebook, in one process
        with SummaryWriter(str(tmp_path)) as closed:
            closed.add_text(f"closed {name}", name)
        writer = SummaryWriter(str(tmp_path))
        left_open.append(writer)  # as by a notebook, which keeps what it has shown
        writer.add_text(f"config {name}", name)
        writer.flush()
        two_step_fit(TensorBoardLogger(tmp_path), Writes())
        writer.add_scalar(f"after {name}", 1.0, 1)
        writer.flush()
    folders = {"one": tmp_path / "previous-1", "two": tmp_path / "previous-2", "three": tmp_path}
    for name, folder in folders.items():
        own = {f"{tag} {name}" for tag in ("closed", "config", "after")}
        found = {tag.removesuffix("/text_summary") for tag in tags_of(folder)}
        assert found >= {*own, "of a callback", "beside", "train/loss"}
        assert not {tag for tag in found if tag.endswith(("one", "two", "three"))} - own
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["previous-1", "previous-2"]
    for writer in left_open:
        writer.close()


def test_a_run_that_failed_is_an_earlier_one_too(tmp_path: Path) -> None:
    class Fails(Callback[Any]):
        def on_step_end(self, state: State) -> None:
            raise RuntimeError("mine")

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("config", "one")
    with pytest.raises(RuntimeError, match="mine"):
        two_step_fit(TensorBoardLogger(tmp_path, every=Every(steps=1)), Fails())
    two_step_fit(TensorBoardLogger(tmp_path))
    assert "config/text_summary" in tags_of(tmp_path / "previous-1")
    assert "config/text_summary" not in tags_of(tmp_path)


def test_files_of_another_process_are_an_earlier_runs_whatever_its_number(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("config", "mine")
    (own,) = tmp_path.iterdir()
    when, rest = own.name.removeprefix("events.out.tfevents.").split(".", 1)
    others = [
        f"events.out.tfevents.{when}.{rest.replace(f'.{os.getpid()}.', f'.{os.getpid() + 1}.')}",
        f"events.out.tfevents.{when}.another-{rest}",
        f"events.out.tfevents.{int(when) - 10**6}.{rest}",  # of one that had this number, as a container's first has
    ]
    for name in others:
        shutil.copy(own, tmp_path / name)
    two_step_fit(TensorBoardLogger(tmp_path))
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == sorted(others)
    assert own.exists()


def test_two_trainers_with_one_logger_get_a_run_each(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    two_step_fit(logger, epochs=2)
    two_step_fit(logger, epochs=2)
    assert points_of(tmp_path / "previous-1") == points_of(tmp_path)


def test_points_are_to_be_seen_as_soon_as_an_epoch_ends(tmp_path: Path) -> None:
    class Sees(Callback[Any]):
        def on_epoch_end(self, state: State) -> None:
            seen.append(len(points_of(tmp_path)["train/loss"]))

    seen: list[int] = []
    two_step_fit(TensorBoardLogger(tmp_path), Sees(), epochs=3)
    assert seen == [1, 2, 3]


def test_an_error_leaves_all_points_up_to_it_and_no_hyperparameters(tmp_path: Path) -> None:
    class Fails(Callback[Any]):
        def on_step_end(self, state: State) -> None:
            if state.progress.step == 3:
                raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        two_step_fit(TensorBoardLogger(tmp_path, every=Every(steps=1)), Fails(), epochs=3)
    assert [step for step, _ in points_of(tmp_path)["train/loss"]] == [1, 2, 3]
    assert not list(tmp_path.glob("*.hparams"))


def test_a_file_as_folder_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = Trainer(
        model := tiny_model(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        callbacks=[TensorBoardLogger(tmp_path / "file")],
        device="cpu",
    )
    with pytest.raises(ConfigError, match="which is a file"):
        trainer.fit(tiny_data(), epochs=1)
    assert trainer.state.progress.samples == 0


def test_two_loggers_on_one_folder_are_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="two TensorBoardLoggers in the list write to"):
        two_step_fit(TensorBoardLogger("run"), TensorBoardLogger(tmp_path / "run"))
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file. is a file"):
        two_step_fit(TensorBoardLogger(tmp_path / "file" / "line"))


def test_constructing_one_and_evaluating_makes_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, nn.MSELoss(), callbacks=[TensorBoardLogger(tmp_path / "line")]).evaluate(tiny_data())
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_logger_goes_on_in_its_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    two_step_fit(logger)
    other = pickle.loads(pickle.dumps(logger))
    other.open(tiny_state(), fresh=False)
    other.write(2, 4, {"train/loss": 0.5})
    other.flush()
    other.close()
    assert points_of(tmp_path)["epoch"] == [(2, 1), (4, 2)]


def test_a_fit_within_the_same_second_is_read_after_the_one_before(tmp_path: Path) -> None:
    trainer, _ = two_step_fit(TensorBoardLogger(tmp_path))
    (file,) = (path for path in tmp_path.iterdir() if path.suffix != ".hparams")
    # The name that a process of another machine would have given it in this very second.
    shutil.move(file, tmp_path / f"events.out.tfevents.{int(time.time()):010d}.zzz.1.0")
    trainer.fit(tiny_data(), tiny_data(), epochs=2)
    assert points_of(tmp_path)["epoch"] == [(2, 1), (4, 2)]


def test_an_event_file_from_the_future_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = two_step_fit(TensorBoardLogger(tmp_path))
    (tmp_path / "events.out.tfevents.9999999999.host.1.0").touch()
    trainer.fit(tiny_data(), tiny_data(), epochs=2)
    assert "from the future" in caplog.text
