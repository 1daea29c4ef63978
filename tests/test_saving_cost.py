"""What a save costs, counted: threads, system calls, JSON, and what stays in the loop (P2, P8)."""

from __future__ import annotations

import collections
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import loopwright.saver
from helpers import At, line_trainer, some_batches
from loopwright import Callback, Every, Output, State
from loopwright.callbacks import Checkpoint, CSVLogger, EarlyStopping, ProgressBar
from loopwright.errors import SaveError

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")
SAVE = {"mkdir": 1, "open": 6, "write": 4, "fsync": 6, "rename": 1}  # four files, their folder, and the one around it
REMOVAL = {"open": 1, "rename": 1, "unlink": 4, "rmdir": 1}


class Calls:
    """Counts system calls by name, and by whether the main thread made them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_thread: collections.Counter[str] = collections.Counter()
        self.of_loop: collections.Counter[str] = collections.Counter()
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            in_loop = threading.current_thread() is threading.main_thread()
            (self.of_loop if in_loop else self.of_thread)[name] += 1
            return real(*arguments, **named)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def counted_saves(calls: Calls, folder: Path, saves: int, *, keep: int) -> tuple[dict[str, int], dict[str, int]]:
    """The system calls of the thread and of the loop, in training, for that many saves; the last is the epoch's."""
    begun: list[dict[str, int]] = []

    def note(state: State) -> None:
        trainer._saving._savers[0].wait()  # what is made durable as the fit begins is not a save's
        begun.extend((dict(calls.of_thread), dict(calls.of_loop)))

    trainer = line_trainer(callbacks=[Checkpoint(folder, every=Every(steps=1), keep=keep), At(on_epoch_start=note)])
    trainer.fit(some_batches(saves - 1), epochs=1)
    of_thread, of_loop = calls.of_thread - collections.Counter(begun[0]), calls.of_loop - collections.Counter(begun[1])
    return dict(of_thread), dict(of_loop)


def times(number: int, costs: dict[str, int]) -> collections.Counter[str]:
    return collections.Counter({name: number * count for name, count in costs.items()})


def test_a_small_save_is_as_few_system_calls_as_four_durable_files_take(calls: Calls, tmp_path: Path) -> None:
    of_thread, of_loop = counted_saves(calls, tmp_path / "new", 5, keep=9)
    assert of_thread == times(5, SAVE)
    assert of_loop == {}, "the loop waits for no disk"


def test_a_removal_is_as_few_system_calls_as_four_files_take(calls: Calls, tmp_path: Path) -> None:
    of_thread, of_loop = counted_saves(calls, tmp_path / "new", 5, keep=2)
    assert of_thread == times(5, SAVE) + times(3, REMOVAL)
    assert of_loop == {}


def test_a_large_save_is_as_many_system_calls_as_a_small_one(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loopwright.saver, "_SMALL", -1)
    of_thread, of_loop = counted_saves(calls, tmp_path / "new", 3, keep=9)
    assert of_thread == times(3, SAVE)
    assert of_loop == {}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that are started."""
    names: list[str] = []
    start = threading.Thread.start

    def noting(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noting)
    return names


def test_one_thread_makes_all_saves_of_a_fit_and_ends_with_it(tmp_path: Path, started: list[str]) -> None:
    before = threading.enumerate()
    line_trainer(callbacks=[Checkpoint(tmp_path, every=Every(steps=1))]).fit(some_batches(10), epochs=2)
    assert started == ["loopwright-save"]
    assert threading.enumerate() == before


def test_no_thread_is_started_where_nothing_is_saved(tmp_path: Path, started: list[str]) -> None:
    def fail(state: State) -> None:
        raise ValueError("planted")

    trainer = line_trainer(callbacks=[Checkpoint(tmp_path), At(on_epoch_end=fail)])
    with pytest.raises(ValueError, match="planted"):
        trainer.fit(some_batches(10), epochs=1)
    assert started == []


@pytest.fixture
def json_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``"written"`` and ``"read"``, for each text of JSON that is."""
    found: list[str] = []
    encode, loads = json.JSONEncoder.encode, json.loads

    def encoding(encoder: json.JSONEncoder, value: object) -> str:
        found.append("written")
        return encode(encoder, value)

    def loading(*arguments: Any, **named: Any) -> object:
        found.append("read")
        return loads(*arguments, **named)

    monkeypatch.setattr(json.JSONEncoder, "encode", encoding)
    monkeypatch.setattr(json, "loads", loading)
    return found


def test_a_save_writes_each_text_of_json_once_and_reads_none(tmp_path: Path, json_texts: list[str]) -> None:
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path, every=Every(steps=1), keep=2)])
    trainer.fit(some_batches(4), epochs=1)
    rehearsed, saves = 1, 4 + 1
    assert json_texts == ["written"] * (rehearsed + 4 * saves)  # two headers, the state, the manifest


class Counting(nn.Linear):
    """Counts how often it is asked for its state."""

    asked = 0

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        self.asked += 1
        return super().state_dict(*arguments, **named)


def asked_for_its_state(folder: Path, steps: int, every: Every) -> int:
    model = Counting(3, 1)
    line_trainer(model, callbacks=[Checkpoint(folder, every=every)]).fit(some_batches(steps), epochs=1)
    return model.asked


def test_a_step_without_a_save_asks_for_no_state(tmp_path: Path) -> None:
    few = asked_for_its_state(tmp_path / "few", 2, Every(epochs=1))
    assert asked_for_its_state(tmp_path / "many", 40, Every(epochs=1)) == few
    by_steps = asked_for_its_state(tmp_path / "steps", 2, Every(steps=100))
    assert asked_for_its_state(tmp_path / "more steps", 40, Every(steps=100)) == by_steps


def test_nothing_is_saved_twice_where_the_last_epoch_is_one_to_save(tmp_path: Path, calls: Calls) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path, every=Every(epochs=10))]).fit(some_batches(1), epochs=10)
    assert calls.of_thread["rename"] == 1
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000010"]


def test_the_folders_that_were_made_are_made_durable_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    trainer = line_trainer(callbacks=[Checkpoint(tmp_path / "new")])
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SaveError) as caught:
        trainer.fit(some_batches(4), epochs=1)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "new"))
    assert not list((tmp_path / "new").glob("step-*"))


# --------------------------------------------------------------------------------------- outputs for nobody


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """The outputs that the loop has detached."""
    found: list[Output] = []
    real = Output.detached

    def noting(output: Output) -> Output:
        found.append(output)
        return real(output)

    monkeypatch.setattr(Output, "detached", noting)
    return found


def watching(folder: Path) -> list[Callback[Any]]:
    return [
        ProgressBar(),
        CSVLogger(folder / "metrics.csv", every=Every(steps=1)),
        EarlyStopping("train/loss", mode="min"),
        Checkpoint(folder / "checkpoints"),
    ]


def test_no_output_is_detached_for_callbacks_that_look_at_none(tmp_path: Path, detached: list[Output]) -> None:
    line_trainer(callbacks=watching(tmp_path)).fit(some_batches(3), some_batches(2), epochs=2)
    assert detached == []


def test_whoever_looks_at_an_output_gets_a_detached_one(tmp_path: Path, detached: list[Output]) -> None:
    seen: list[bool] = []

    class Looks(ProgressBar):
        def on_batch_end(self, state: State, output: Output) -> None:
            super().on_batch_end(state, output)
            seen.append(output.loss.requires_grad)

    line_trainer(callbacks=[*watching(tmp_path)[1:], Looks()]).fit(some_batches(3), epochs=2)
    line_trainer(
        callbacks=[ProgressBar(), At(on_eval_batch_end=lambda state, output: seen.append(output.loss.requires_grad))]
    ).fit(some_batches(3), some_batches(2), epochs=1)
    assert seen == [False] * (6 + 2)
    assert len(detached) == len(seen)
