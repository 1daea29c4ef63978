"""Checkpoints on the disk: what is written is read, what is damaged is not, and nothing else is touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from faults_table import Figures
from fixtures import make_checkpoint_v1
from helpers import At, line, small_model, small_trainer, some_batches
from hostile_checkpoints import TENSORS, put, seal, sealed
from loopwright import (
    CheckpointError,
    Every,
    LockedError,
    SaveError,
    Trainer,
    best_checkpoint,
    latest_checkpoint,
    load_weights,
)
from loopwright.callbacks import Checkpoint, EarlyStopping
from loopwright.checkpoint.folder import clear_leftovers, list_checkpoints, prune
from loopwright.checkpoint.format import FILES, MANIFEST, MODEL, STATE
from loopwright.checkpoint.lock import FolderLock
from loopwright.checkpoint.reading import read_checkpoint
from loopwright.checkpoint.writing import Snapshot, write_checkpoint
from loopwright.plain import encode
from loopwright.saver import Saver

FIXTURE = Path(make_checkpoint_v1.__file__).with_name("checkpoint-v1")


def snapshot(step: int = 1, *, score: float | None = None, mode: str | None = None, **state: Any) -> Snapshot:
    tree, tensors = encode({"step": step, **state})
    weights = {"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)}
    return Snapshot({"step": step, "score": score, "mode": mode}, weights, tree, tensors)


def write(folder: Path, *steps: int, **facts: Any) -> list[Path]:
    return [write_checkpoint(folder, snapshot(step, **facts)) for step in steps]


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a real run."""
    folder = tmp_path_factory.mktemp("run")
    trainer = small_trainer(Checkpoint(folder), EarlyStopping("val/loss", mode="min", restore_best=True), seed=1)
    trainer.fit(some_batches(), some_batches(), epochs=1)
    (path,) = list_checkpoints(folder)
    return path


# ------------------------------------------------------------------------------------------- writing and reading


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(120, value=(1, {2: torch.ones(3)})))
    assert path == tmp_path / "step-000000120"
    assert sorted(entry.name for entry in path.iterdir()) == sorted([MANIFEST, *FILES])
    contents = read_checkpoint(path)
    assert contents.facts == {"step": 120, "score": None, "mode": None}
    assert {name: value.tolist() for name, value in contents.weights.items()} == {
        "weight": [[120.0] * 3] * 2,
        "bias": [0.0, 0.0],
    }
    assert contents.state["step"] == 120
    assert contents.state["value"][1][2].tolist() == [1.0, 1.0, 1.0]


def test_tied_strided_and_expanded_weights_are_each_written_whole(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    weights = {"a": tied, "b": tied, "c": tied.t(), "d": tied[:, 1], "e": torch.ones(1).expand(4)}
    path = write_checkpoint(tmp_path, Snapshot({"step": 1}, weights, {}, {}))
    found = read_checkpoint(path).weights
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in weights.items()}


def test_a_second_one_at_a_step_gets_a_number(tmp_path: Path) -> None:
    names = [path.name for path in write(tmp_path, 7, 7, 7, 1_000_000_000)]
    assert names == ["step-000000007", "step-000000007-2", "step-000000007-3", "step-1000000000"]


def test_they_are_listed_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    written = write(tmp_path, 5, 40, 40, 300, 1_000_000_000)
    for _ in range(10):
        written += write(tmp_path, 1_000_000_000)
    assert list_checkpoints(tmp_path) == written


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = write_checkpoint(tmp_path, snapshot(a=1)), write_checkpoint(tmp_path / "other", snapshot(a=1))
    for name in (MANIFEST, *FILES):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_only_folders_with_the_names_that_are_given_out_count(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 3)
    for name in (
        "step-3", "step-0000000003", "step-000000003-1", "step-000000003-02", "step-000000003-", "step-00000000\u0663",
        "step-000000004.tmp", ".step-000000004", "STEP-000000004", "step-000000004 ", "last", "previous-1",
    ):  # fmt: skip
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000005").write_text("a file")
    (tmp_path / "step-000000006").symlink_to(path, target_is_directory=True)
    assert list_checkpoints(tmp_path) == [path]
    assert latest_checkpoint(tmp_path) == path


def test_there_are_none_where_there_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "none", tmp_path / "file", tmp_path):
        assert list_checkpoints(folder) == []
        assert latest_checkpoint(folder) is None
        assert best_checkpoint(folder) is None


def test_a_path_may_be_text(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    assert latest_checkpoint(str(tmp_path)) == path
    assert read_checkpoint(str(path)).facts["step"] == 1


@pytest.mark.parametrize("name", ["none", "file", "empty", "a\0b"])
def test_what_is_no_checkpoint_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name.replace("\0", ".")):
        read_checkpoint(tmp_path / name)


def test_a_newer_version_of_the_format_is_named_as_that(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    seal(path, lambda head: head.update(version=2))
    with pytest.raises(CheckpointError, match="has version 2 of the format") as caught:
        read_checkpoint(path)
    assert caught.value.fix == "a newer loopwright"


# --------------------------------------------------------------------------------------------- latest and best


def test_the_latest_is_the_newest_that_is_whole_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = write(tmp_path, 1, 2, 3)
    flip(third / MODEL, 0)
    (second / STATE).unlink()
    assert latest_checkpoint(tmp_path) == first
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert "step-000000003" in warned[0]
    assert "step-000000002" in warned[1]
    (first / MANIFEST).write_bytes(b"")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_the_best_is_the_first_with_the_best_finite_score(tmp_path: Path, mode: str, best: int) -> None:
    for step, score in enumerate([0.5, 0.1, 0.1, 0.9, 0.9, None, math.nan, -math.inf, math.inf], start=1):
        write_checkpoint(tmp_path, snapshot(step, score=score, mode=mode))
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert found.name == f"step-{best:09}"


def test_the_best_is_none_without_scores_and_never_a_damaged_one(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert best_checkpoint(tmp_path) is None
    good, bad = write_checkpoint(tmp_path, snapshot(2, score=2.0, mode="min")), snapshot(3, score=1.0, mode="min")
    flip(write_checkpoint(tmp_path, bad) / MANIFEST, 300)
    assert best_checkpoint(tmp_path) == good


# ------------------------------------------------------------------------------------------------- load_weights


def test_weights_are_loaded_into_a_model_of_the_same_architecture(of_a_run: Path) -> None:
    model = small_model()
    load_weights(of_a_run, model)
    expected = read_checkpoint(of_a_run).weights
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_do_not_fit_leave_the_model_as_it_was(of_a_run: Path, strict: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="do not fit this Sequential"):
        load_weights(of_a_run, model, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_that_only_one_has_are_an_error_unless_strict_is_off(of_a_run: Path) -> None:
    first = nn.Linear(3, 4)
    smaller = nn.Sequential(first)
    before = first.weight.clone()
    with pytest.raises(CheckpointError):
        load_weights(of_a_run, smaller)
    assert torch.equal(first.weight, before)
    load_weights(of_a_run, smaller, strict=False)
    assert torch.equal(first.weight, read_checkpoint(of_a_run).weights["0.weight"])


class Unusual(nn.Module):
    """Weights that safetensors does not hold, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line()
        self.turn = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j], dtype=torch.complex128))
        self.register_buffer("graph", torch.eye(3).to_sparse() * 2)
        self.register_buffer("mask", torch.tensor([1, 2], dtype=torch.uint8).view(torch.float8_e8m0fnu))
        self.vocabulary: dict[str, int] = {"a": 1}

    def get_extra_state(self) -> dict[str, int]:
        return self.vocabulary

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.vocabulary = state

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.line(inputs) * self.turn.abs().sum().float()
        return out


def test_weights_that_safetensors_does_not_hold_are_restored_too(tmp_path: Path) -> None:
    model = Unusual()
    model.vocabulary["b"] = 2
    small_trainer(Checkpoint(tmp_path), model=model).fit(some_batches(), epochs=1)
    (path,) = list_checkpoints(tmp_path)

    loaded = Unusual()
    load_weights(path, loaded)
    assert torch.equal(loaded.turn, model.turn)
    assert torch.equal(loaded.get_buffer("graph").to_dense(), torch.eye(3) * 2)
    assert torch.equal(loaded.get_buffer("mask").view(torch.uint8), model.get_buffer("mask").view(torch.uint8))
    assert loaded.vocabulary == {"a": 1, "b": 2}

    small_trainer(model=(unbroken := Unusual())).fit(some_batches(), epochs=2)
    small_trainer(model=(resumed := Unusual())).fit(some_batches(), epochs=2, resume=path)
    assert torch.equal(resumed.turn, unbroken.turn)
    assert resumed.vocabulary == {"a": 1, "b": 2}


# -------------------------------------------------------------------------------------------------- damage (R4)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def refused(path: Path) -> bool:
    """Whether a checkpoint is refused in every way that it can be read."""
    try:
        read_checkpoint(path)
    except CheckpointError:
        return latest_checkpoint(path.parent) != path
    return False


def count_of_used(checkpoint: Path, harms: Iterator[Callable[[Path], object]]) -> tuple[int, int]:
    count = used = 0
    for harm in harms:
        whole = {name: (checkpoint / name).read_bytes() for name in (MANIFEST, *FILES)}
        harm(checkpoint)
        count += 1
        used += not refused(checkpoint)
        for name, data in whole.items():
            (checkpoint / name).write_bytes(data)
    read_checkpoint(checkpoint)
    return count, used


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.faults)])
def test_no_flipped_bit_is_used(of_a_run: Path, tmp_path: Path, count: int, figures: Figures) -> None:
    checkpoint = Path(shutil.copytree(of_a_run, tmp_path / of_a_run.name))
    chosen = random.Random(count)
    sizes = {name: (checkpoint / name).stat().st_size for name in (MANIFEST, *FILES)}

    def flips() -> Iterator[Callable[[Path], object]]:
        for number in range(count):
            name = [MANIFEST, *FILES][number % 4]
            bit = chosen.randrange(8 * sizes[name])
            yield lambda path, name=name, bit=bit: flip(path / name, bit)  # type: ignore[misc]  # called at once

    figures("one bit flipped", *count_of_used(checkpoint, flips()))


def interesting(path: Path, *, all_of_them: bool) -> list[int]:
    """Lengths to cut a file to: around its ends, its header's end, its lines' ends; or every one."""
    data = path.read_bytes()
    if all_of_them:
        return list(range(0, len(data), max(1, len(data) // 500)))
    ends = {0, 1, 7, 8, 9, len(data) // 2, len(data)}
    if path.suffix == ".safetensors":
        ends.add(8 + int.from_bytes(data[:8], "little"))
    ends |= {index for index, byte in enumerate(data) if byte == 10}
    return sorted({end + off for end in ends for off in (-1, 0, 1) if 0 <= end + off < len(data)})


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_no_file_that_was_cut_off_or_grew_is_used(
    of_a_run: Path, tmp_path: Path, all_of_them: bool, figures: Figures
) -> None:
    checkpoint = Path(shutil.copytree(of_a_run, tmp_path / of_a_run.name))

    def cuts() -> Iterator[Callable[[Path], object]]:
        for name in (MANIFEST, *FILES):
            data = (checkpoint / name).read_bytes()
            for length in interesting(checkpoint / name, all_of_them=all_of_them):
                yield lambda path, name=name, length=length: os.truncate(path / name, length)  # type: ignore[misc]
            for more in (b"\0", b"\n", b" ", data):
                yield lambda path, name=name, grown=data + more: (path / name).write_bytes(grown)  # type: ignore[misc]

    figures("a file cut off or grown", *count_of_used(checkpoint, cuts()))


def test_a_file_of_another_checkpoint_is_not_used(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1, 2)
    for name in (MANIFEST, MODEL, STATE):
        kept = (second / name).read_bytes()
        (second / name).write_bytes((first / name).read_bytes())
        assert refused(second), name
        (second / name).write_bytes(kept)
    assert not refused(second)


# ------------------------------------------------------------------------------------------------ retention (S2)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, 2, 3, 4, 5)
    assert prune(tmp_path, 2, paths[1]) == []
    assert list_checkpoints(tmp_path) == [paths[1], paths[3], paths[4]]
    prune(tmp_path, 1, None)
    assert list_checkpoints(tmp_path) == [paths[4]]
    prune(tmp_path, 3, None)
    assert list_checkpoints(tmp_path) == [paths[4]]
    assert [entry.name for entry in tmp_path.iterdir()] == [paths[4].name]


def test_nothing_is_removed_that_is_not_its_own(tmp_path: Path) -> None:
    folder, outside = tmp_path / "checkpoints", tmp_path / "outside"
    folder.mkdir()
    write(folder, 1, 2, 3)
    for name in FILES:
        (tmp_path / name).write_text("precious")
    outside.mkdir()
    for name in (MANIFEST, *FILES):
        (outside / name).write_text("precious")
    (folder / "notes.txt").write_text("precious")
    (folder / "step-1").mkdir()
    (folder / "step-000000000").symlink_to(outside, target_is_directory=True)
    (folder / "previous-1").mkdir()
    for name in (".deleting-step-000000001", ".writing-step-000000004", ".deleting-step-000000002"):
        (folder / name).symlink_to(outside, target_is_directory=True)
    before = sorted(path.name for path in folder.iterdir() if not path.name.startswith("step-00000000"))

    with contextlib.suppress(OSError):  # a link in the place of its own folder is an error, or left alone
        prune(folder, 1, None)
    with contextlib.suppress(SaveError):
        write(folder, 4)
    clear_leftovers(folder)

    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("step-00000000")) == before
    assert {path.name for path in outside.iterdir()} == {MANIFEST, *FILES}
    assert {path.read_text() for path in (*outside.iterdir(), *(tmp_path / name for name in FILES))} == {"precious"}


def test_a_checkpoint_with_something_strange_in_it_is_left_alone_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path / "checkpoints", 1)
    try:
        for step in (1, 2, 3, 4):
            saver.save(snapshot(step))
            saver.wait()
            if step == 1:
                (tmp_path / "checkpoints" / "step-000000001" / "my notes.txt").write_text("precious")
    finally:
        saver.close()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000000001", "step-000000004"]
    assert (tmp_path / "checkpoints" / "step-000000001" / "my notes.txt").read_text() == "precious"
    assert [record.getMessage().count("step-000000001") for record in caplog.records] == [1]


def test_what_a_killed_process_left_half_done_is_cleared_away(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".writing-step-000000002")
    shutil.copytree(path, tmp_path / ".deleting-step-000000001-2")
    (tmp_path / ".deleting-step-000000001-2" / MODEL).unlink()
    (tmp_path / ".writing-notes").mkdir()
    clear_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".writing-notes", "step-000000001"]


def test_a_fresh_run_sets_what_it_finds_aside_under_the_next_number(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "previous-1").symlink_to("nowhere")
    saver = Saver(tmp_path, 1)
    try:
        saver.begin([], None, None)
    finally:
        saver.close()
    assert list_checkpoints(tmp_path) == []
    assert [path.name for path in list_checkpoints(tmp_path / "previous-2")] == ["step-000000001", "step-000000002"]


# --------------------------------------------------------------------------------------------------- the lock (R14)

HOLD = """
import sys, time
from pathlib import Path
from loopwright.checkpoint.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="is in use by another run"):
            FolderLock(tmp_path)
        process.kill()
        process.wait()
    FolderLock(tmp_path).release()


def test_a_second_lock_in_the_same_process_is_refused_until_the_first_is_released(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    with pytest.raises(LockedError):
        FolderLock(tmp_path)
    first.release()
    first.release()
    FolderLock(tmp_path).release()


def _wait(begun: Any, end: Any) -> None:
    begun.set()
    end.wait(60)


def test_a_forked_child_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    lock = FolderLock(tmp_path)
    child = context.Process(target=_wait, args=(begun, end))
    child.start()
    try:
        assert begun.wait(60)
        with pytest.raises(LockedError):  # a child that ends or begins does not release the parent's
            FolderLock(tmp_path)
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        end.set()
        child.join()


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("elsewhere"), Path.mkdir], ids=["a link", "a folder"])
def test_a_lock_that_is_no_file_is_an_error_and_nothing_is_made_behind_it(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(SaveError) as caught:
        FolderLock(tmp_path)
    assert caught.value.errno in (errno.ELOOP, errno.EISDIR)
    assert not (tmp_path / "elsewhere").exists()


def test_a_system_without_locks_is_an_error_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(SaveError) as caught:
        FolderLock(tmp_path)
    assert caught.value.errno == errno.ENOLCK
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------- readable without loopwright (R15)

READ = """
import hashlib, json, sys
from pathlib import Path
sys.modules["loopwright"] = None  # importing it is an error from here on
import torch
from safetensors.torch import load_file

folder = Path(sys.argv[1])
*_, digest = (folder / "manifest.json").read_bytes().splitlines()
head = (folder / "manifest.json").read_bytes()[: -len(digest) - 1]
assert hashlib.sha256(head).hexdigest() == digest.decode()
for name, entry in json.loads(head)["files"].items():
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
nn = torch.nn
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
model.load_state_dict(load_file(folder / "model.safetensors"))
optimizer = torch.optim.Adam(model.parameters())
state = json.loads((folder / "state.json").read_bytes())["optimizer"]
tensors = load_file(folder / "state.safetensors")
kept = {
    key: {name: tensors[value["$tensor"]] for name, value in values.items()} for key, values in state["state"]["$dict"]
}
groups = [{k: tuple(v["$tuple"]) if isinstance(v, dict) else v for k, v in g.items()} for g in state["param_groups"]]
optimizer.load_state_dict({"state": kept, "param_groups": groups})
print(json.dumps([[value.tolist() for value in model.state_dict().values()],
                  [value.tolist() for state in optimizer.state.values() for value in state.values()]]))
"""


def test_a_checkpoint_is_read_with_torch_and_safetensors_alone(tmp_path: Path) -> None:
    trainer = small_trainer(Checkpoint(tmp_path), optimizer=torch.optim.Adam)
    trainer.fit(some_batches(), epochs=1)
    (path,) = list_checkpoints(tmp_path)
    ran = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    weights, kept = json.loads(ran.stdout)
    assert weights == [value.tolist() for value in trainer.state.model.state_dict().values()]
    assert kept == [value.tolist() for state in trainer.state.optimizer.state.values() for value in state.values()]


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "distributed and compiled": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "compiled and distributed": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_keys_are_the_plain_modules_whatever_wrapped_it(name: str, tmp_path: Path) -> None:
    with alone(tmp_path):
        wrapped = WRAPPERS[name](small_model())
        small_trainer(Checkpoint(tmp_path / "checkpoints"), model=wrapped).fit(some_batches(), epochs=1)
        path = latest_checkpoint(tmp_path / "checkpoints")
        assert path is not None
        assert read_checkpoint(path).weights.keys() == small_model().state_dict().keys()

        plain, again = small_model(), WRAPPERS[name](small_model())
        load_weights(path, plain)
        load_weights(path, again)
        for other in (plain, again):
            assert [value.tolist() for value in other.state_dict().values()] == [
                value.tolist() for value in wrapped.state_dict().values()
            ]
        for other in (small_model(), WRAPPERS[name](small_model())):
            trainer = small_trainer(model=other)
            trainer.fit(some_batches(), epochs=2, resume=path)
            assert trainer.state.progress.step == 6


# ------------------------------------------------------------------------------------------ the released formats


def test_a_checkpoint_of_the_first_version_is_read() -> None:
    contents = read_checkpoint(FIXTURE)
    assert contents.facts["step"] == 6
    assert {name: tuple(value.shape) for name, value in contents.weights.items()} == {
        "0.weight": (2, 2), "0.bias": (2,), "1.weight": (2,), "1.bias": (2,), "1.running_mean": (2,),
        "1.running_var": (2,), "1.num_batches_tracked": (), "2.weight": (1, 2), "2.bias": (1,),
    }  # fmt: skip
    assert contents.weights["1.num_batches_tracked"].item() == 6


def test_a_run_goes_on_from_a_checkpoint_of_the_first_version() -> None:
    trainer, every_type = make_checkpoint_v1.make_trainer()
    result = trainer.fit(make_checkpoint_v1.BATCHES, make_checkpoint_v1.BATCHES[:2], steps=8, resume=FIXTURE)
    assert result.progress.step == 8
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert trainer.state.optimizer.param_groups[0]["lr"] == pytest.approx(0.0003125)
    assert repr(every_type.found) == repr(every_type.state_dict())


# ----------------------------------------------------------------------------------- resuming what does not fit


def other_model() -> Trainer:
    return small_trainer(model=nn.Linear(3, 1))


def other_shape() -> Trainer:
    return small_trainer(model=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1)))


def other_type() -> Trainer:
    return small_trainer(model=small_model().double())


def other_optimizer() -> Trainer:
    return small_trainer(optimizer=lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.05))


def frozen_parts() -> Trainer:
    return small_trainer(optimizer=lambda p: torch.optim.SGD(list(p)[:2], lr=0.05))


@pytest.mark.parametrize("make", [other_model, other_shape, other_type, other_optimizer, frozen_parts])
def test_a_checkpoint_of_another_run_is_refused_and_the_trainer_is_as_before(
    make: Callable[[], Trainer], of_a_run: Path
) -> None:
    trainer = make()
    before = repr(trainer._run.state_dict()["optimizer"]), {k: v.clone() for k, v in trainer._run.weights().items()}
    with pytest.raises(CheckpointError, match="of another"):
        trainer.fit(some_batches(), epochs=2, resume=of_a_run)
    assert repr(trainer._run.state_dict()["optimizer"]) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in trainer._run.weights().items())
    assert trainer.state.progress.fresh


def test_a_callback_that_fails_to_take_its_state_back_leaves_all_as_it_was(tmp_path: Path) -> None:
    class Trusting(At):
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: Any) -> None:
            self.value = state["value"]
            if self.value == 1:
                raise KeyError("another")

    failing = Trusting()
    failing.value = 1
    early = EarlyStopping("val/loss", mode="min")
    small_trainer(failing, early, Checkpoint(tmp_path)).fit(some_batches(), some_batches(), epochs=1)
    mine, stopping = Trusting(), EarlyStopping("val/loss", mode="min")
    trainer = small_trainer(stopping, mine, model=(model := small_model()))
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(CheckpointError, match=r"the callback .*Trusting cannot take back") as caught:
        trainer.fit(some_batches(), some_batches(), epochs=2, resume=list_checkpoints(tmp_path)[0])
    assert caught.value.why == "KeyError: 'another'"
    assert isinstance(caught.value.__cause__, KeyError)
    assert mine.value == 0
    assert stopping.best is None
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
    trainer.fit(some_batches(), some_batches(), epochs=1)
    assert trainer.state.progress.step == 3


def test_what_cannot_be_saved_is_found_before_the_first_step_with_its_path(tmp_path: Path) -> None:
    class Best(At):
        def state_dict(self) -> dict[str, Any]:
            import numpy as np

            return {"best": np.float64(1.0)}

    trainer = small_trainer(Best(), Checkpoint(tmp_path, every=Every(steps=1)))
    with pytest.raises(CheckpointError, match=r"\$\.callbacks\..*Best\.best: numpy\.float64 is not plain data"):
        trainer.fit(some_batches(), epochs=1)
    assert trainer.state.progress.step == 0
    assert list_checkpoints(tmp_path) == []


def test_a_run_saved_with_more_cuda_devices_than_there_are_goes_on_and_says_so(
    of_a_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(of_a_run, tmp_path / of_a_run.name))
    put("random/torch_cuda", [{"$tensor": "surplus"}] * 9)(path)
    tensors = safetensors.torch.load((path / TENSORS).read_bytes()) | {"surplus": torch.zeros(16, dtype=torch.uint8)}
    (path / TENSORS).write_bytes(safetensors.torch.save(tensors))
    seal(path)
    trainer = small_trainer(EarlyStopping("val/loss", mode="min", restore_best=True), seed=1)
    with caplog.at_level(logging.INFO, logger="loopwright"):
        trainer.fit(some_batches(), some_batches(), epochs=2, resume=path)
    assert trainer.state.progress.step == 6
    assert any("not exact: it was saved with 9 CUDA devices" in record.getMessage() for record in caplog.records)


def seal_with_size(path: Path, name: str, size: int) -> None:
    """Have the manifest say that a file is of this size."""
    head = json.loads((path / MANIFEST).read_bytes().split(b"\n")[0])
    head["files"][name]["size"] = size
    (path / MANIFEST).write_bytes(sealed(json.dumps(head).encode() + b"\n"))


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_huge_file_of_nothing_is_refused_before_it_is_read(of_a_run: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(of_a_run, tmp_path / of_a_run.name))
    os.truncate(path / name, 2**40)  # a terabyte, of which the disk holds nothing
    seal_with_size(path, name, 2**40)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path)
    assert time.monotonic() - begin < 10
