"""R2, R3, R5: whatever a save meets, an older checkpoint is there, whole, and the run goes on from it."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import save_runs
from faults_table import Figures
from helpers import At, line_trainer, some_batches
from loopwright import Every, State, latest_checkpoint
from loopwright.callbacks import Checkpoint
from loopwright.checkpoint.folder import list_checkpoints
from loopwright.checkpoint.format import FILES, MANIFEST
from nursery import Nursery, nursery

ONE, ALL = pytest.param(False, id="some"), pytest.param(True, id="all", marks=pytest.mark.faults)


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    with nursery() as found:
        yield found


@pytest.fixture(scope="module")
def unbroken(children: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    code = children.run(save_runs.counted, str(folder), output=folder / "output.txt")
    assert code == 0, (folder / "output.txt").read_text()
    return folder


def _calls(unbroken: Path) -> list[str]:
    found: list[str] = json.loads((unbroken / "calls.json").read_text())
    return found


def _first_durable(calls: list[str]) -> int:
    """The number of the call from which on there is a checkpoint: the one after the first rename."""
    return calls.index("rename") + 2


def _goes_on(children: Nursery, folder: Path, unbroken: Path) -> str:
    """What is not as in the unbroken run, once this one was resumed."""
    code = children.run(save_runs.whole, str(folder), output=folder / "output.txt")
    if code != 0:
        return (folder / "output.txt").read_text()
    found, expected = (json.loads((path / "result.json").read_text()) for path in (folder, unbroken))
    return ", ".join(name for name in expected if expected[name] != found[name])


@pytest.mark.parametrize("everywhere", [ONE, ALL])
def test_a_process_gone_before_any_system_call_of_a_save_leaves_a_run_that_goes_on(
    children: Nursery, tmp_path: Path, unbroken: Path, figures: Figures, everywhere: bool
) -> None:
    calls = _calls(unbroken)
    assert set(calls) == set(save_runs.CALLS)
    points = range(1, len(calls) + 1)
    chosen = list(points) if everywhere else sorted(random.sample(points, 8))
    lost = []
    for at in chosen:
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        assert children.run(save_runs.dies, str(folder), at, output=folder / "output.txt") == 9
        if at >= _first_durable(calls) and latest_checkpoint(folder / "checkpoints") is None:
            lost.append(f"no checkpoint after death before call {at}, {calls[at - 1]}")
        if wrong := _goes_on(children, folder, unbroken):
            lost.append(f"death before call {at}, {calls[at - 1]}: {wrong}")
        hidden = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
        assert hidden == [".lock"], "what was left half done is cleared away"
    assert lost == []
    figures("death before a system call of a save, keep=1", len(chosen), len(lost))


@pytest.mark.parametrize("count", [pytest.param(4, id="4"), pytest.param(200, id="200", marks=pytest.mark.faults)])
def test_a_process_gone_at_any_byte_of_a_save_leaves_a_run_that_goes_on(
    children: Nursery, tmp_path: Path, unbroken: Path, figures: Figures, count: int
) -> None:
    newest = latest_checkpoint(unbroken / "checkpoints")
    assert newest is not None
    sizes = {name: (newest / name).stat().st_size for name in (*FILES, MANIFEST)}
    lost = []
    for number in range(count):
        file, save = random.choice(list(sizes)), random.randint(1, 3)
        byte = random.randrange(sizes[file] - 200)  # an earlier save's file may be a little shorter
        folder = tmp_path / f"byte-{number}"
        folder.mkdir()
        code = children.run(save_runs.dies_in_the_byte, str(folder), file, save, byte, output=folder / "output.txt")
        assert code == -signal.SIGXFSZ, (file, save, byte, (folder / "output.txt").read_text())
        if save > 1 and latest_checkpoint(folder / "checkpoints") is None:
            lost.append(f"no checkpoint after death at byte {byte} of {file} in save {save}")
        if wrong := _goes_on(children, folder, unbroken):
            lost.append(f"death at byte {byte} of {file} in save {save}: {wrong}")
    assert lost == []
    figures("death at a random byte of a save, keep=1", count, len(lost))


@pytest.mark.parametrize("everywhere", [ONE, ALL])
def test_a_system_that_refuses_a_save_is_a_typed_error_and_the_older_checkpoint_is_there(
    children: Nursery, tmp_path: Path, unbroken: Path, figures: Figures, everywhere: bool
) -> None:
    calls = _calls(unbroken)
    points = [(number, at) for number in save_runs.ERRORS for at in range(1, len(calls) + 1)]
    chosen = points if everywhere else sorted(random.sample(points, 8))
    lost = []
    for number, at in chosen:
        folder = tmp_path / f"{errno.errorcode[number]}-{at}"
        folder.mkdir()
        name = f"{errno.errorcode[number]} in call {at}, {calls[at - 1]}"
        code = children.run(save_runs.refused, str(folder), number, at, calls[at - 1], output=folder / "output.txt")
        assert code == 0, (folder / "output.txt").read_text()
        found = json.loads((folder / "refused.json").read_text())
        if not found["raised"] or found["errno"] != number or found["filename"] != str(folder / "checkpoints"):
            lost.append(f"{name}: {found}")
        elif found["steps late"] > 2:
            lost.append(f"{name}: the caller heard of it {found['steps late']} steps late")
        if at >= _first_durable(calls) and latest_checkpoint(folder / "checkpoints") is None:
            lost.append(f"{name}: no checkpoint left")
        if wrong := _goes_on(children, folder, unbroken):
            lost.append(f"{name}: {wrong}")
    assert lost == []
    figures("ENOSPC, EFBIG, EIO or EROFS in a system call of a save, keep=1", len(chosen), len(lost))


def test_a_failed_save_is_logged_where_another_error_is_on_its_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lose(state: State) -> None:
        shutil.rmtree(tmp_path / "checkpoints")

    def fail(state: State, batch: object) -> None:
        if state.progress.step == 1:
            raise ValueError("planted")

    saves = Checkpoint(tmp_path / "checkpoints", every=Every(steps=1))
    trainer = line_trainer(callbacks=[saves, At(on_step_end=lose, on_batch_start=fail)])
    with pytest.raises(ValueError, match="planted"):
        trainer.fit(some_batches(3), epochs=1)
    assert any("[save]" in record.message and record.levelname == "ERROR" for record in caplog.records)


def test_a_limit_of_the_system_on_a_files_size_is_a_typed_error(
    children: Nursery, tmp_path: Path, unbroken: Path
) -> None:
    code = children.run(save_runs.limited, str(tmp_path), 3000, output=tmp_path / "output.txt")
    assert code == 0, (tmp_path / "output.txt").read_text()
    found = json.loads((tmp_path / "refused.json").read_text())
    assert found == {"raised": True, "errno": errno.EFBIG, "filename": str(tmp_path / "checkpoints")}
    assert list_checkpoints(tmp_path / "checkpoints") == []
    assert _goes_on(children, tmp_path, unbroken) == ""


def test_a_save_is_announced_only_after_file_folder_and_parent_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    names: dict[int, str] = {}

    def noted(name: str, real: Any, *arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        if name == "open":
            names[found] = Path(arguments[0]).name
        elif name == "fsync":
            calls.append(f"sync {names[arguments[0]]}")
        elif name == "rename":
            calls.append(f"rename to {Path(arguments[1]).name}")
        return found

    for name in ("open", "fsync", "rename"):
        monkeypatch.setattr(os, name, functools.partial(noted, name, getattr(os, name)))

    class Announced(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("saved "):
                calls.append("announced")

    monkeypatch.setattr(logging.getLogger("loopwright"), "handlers", [Announced()])
    folder = tmp_path / "new" / "checkpoints"
    with caplog.at_level(logging.DEBUG, logger="loopwright"):
        line_trainer(callbacks=[Checkpoint(folder)]).fit(some_batches(2), epochs=1)
    writing = ".writing-step-000000002"
    assert calls == [
        f"sync {tmp_path.name}",  # in which the folders were made
        "sync new",
        *(f"sync {name}" for name in (*FILES, MANIFEST)),
        f"sync {writing}",
        "rename to step-000000002",
        "sync checkpoints",
        "announced",
    ]
