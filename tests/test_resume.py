"""R4, R6, R7, R8, R11, R12, C14: a run that was left goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import errno
import logging
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

import kill_runs
from broken_runs import Case, Interrupt, Interrupted, broken, build, dataset, differences, fit, left_behind, unbroken
from faults_table import Figures
from helpers import At, Unsized, line_trainer, small_trainer, some_batches, weights_of
from loopwright import Callback, Every, Schedule, State, Trainer, best_checkpoint, latest_checkpoint, load_weights
from loopwright.callbacks import Checkpoint, EarlyStopping
from loopwright.checkpoint.folder import list_checkpoints
from loopwright.checkpoint.reading import read_checkpoint
from loopwright.data import Loader
from loopwright.errors import CheckpointError, ConfigError, DataError, SaveError
from loopwright.testing import HookRecorder


@st.composite
def cases(draw: st.DrawFn) -> Case:
    samples, batch_size = draw(st.integers(1, 11)), draw(st.integers(1, 5))
    drop_last = draw(st.booleans())
    assume(not drop_last or samples >= batch_size)
    cadence = st.one_of(
        st.builds(lambda n: Every(steps=n), st.integers(1, 5)), st.builds(lambda n: Every(epochs=n), st.integers(1, 2))
    )
    epochs = draw(st.one_of(st.none(), st.integers(1, 4)))
    steps = draw(st.integers(1, 12)) if epochs is None else draw(st.one_of(st.none(), st.integers(1, 12)))
    return Case(
        samples=samples,
        batch_size=batch_size,
        drop_last=drop_last,
        accumulate=draw(st.integers(1, 4)),
        save=draw(cadence),
        validate=draw(st.one_of(st.none(), cadence)),
        epochs=epochs,
        steps=steps,
        keep=draw(st.integers(1, 3)),
        patience=draw(st.one_of(st.none(), st.integers(1, 3))),
        each=draw(st.sampled_from(["step", "epoch"])),
        log=draw(cadence),
    )


def check_any_resume_point(count: int) -> int:
    """Run that many cases; how many there were."""
    done = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases(), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
    def check(case: Case, where: list[float]) -> None:
        nonlocal done
        with tempfile.TemporaryDirectory() as folder:
            one, other = Path(folder) / "unbroken", Path(folder) / "broken"
            expected, calls = unbroken(case, one)
            interruptions = [1 + int(calls * share) for share in where]
            found = broken(case, other, interruptions)
        assert differences(expected, found) == [], interruptions
        done += 1

    check()
    return done


@pytest.mark.parametrize("count", [pytest.param(25, id="25"), pytest.param(500, id="500", marks=pytest.mark.faults)])
def test_wherever_a_run_breaks_off_it_ends_as_the_unbroken_one(figures: Figures, count: int) -> None:
    assert check_any_resume_point(count) >= count
    figures("breaks off in any hook, any settings, up to 4 times", count, 0)


class Counting(TensorDataset):
    """Counts the samples that are fetched."""

    fetched = 0

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        self.fetched += 1
        return tuple(tensor[index] for tensor in self.tensors)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples with noise, one after the other, in one process."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in (dataset(17)[i] for i in range(17)):
            yield x + torch.randn(3) + np.random.rand(), y


class Noisy(Unsized):
    """Batches in a new order each time, by python's generator."""

    def __iter__(self) -> Iterator[Any]:
        yield from random.sample(self.batches, len(self.batches))


class Remembering:
    """A loader that keeps its own place, as torchdata's does: a state with which the same epoch goes on."""

    def __init__(self) -> None:
        self.batches, self.given = some_batches(6, 3), 0
        self.resumed = False

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.given = 0
        self.resumed = False
        while self.given < 6:
            self.given += 1
            yield self.batches[self.given - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given, self.resumed = state["given"], True


def _torchdatas(data: Any, **named: Any) -> Iterable[Any]:
    # Without a generator its order would come from the moment in which it is made.
    loader: Iterable[Any] = StatefulDataLoader(data, 3, shuffle=True, generator=_generator(), **named)
    return loader


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "shuffled": lambda: DataLoader(dataset(17), 3, shuffle=True),
    "in order": lambda: DataLoader(dataset(17), 3),
    "a generator of its own": lambda: DataLoader(dataset(17), 3, shuffle=True, generator=_generator()),
    "a sampler with a generator": lambda: DataLoader(
        dataset(17), 3, sampler=RandomSampler(range(17), generator=_generator())
    ),
    "with replacement": lambda: DataLoader(
        dataset(17), 3, sampler=RandomSampler(range(17), replacement=True, num_samples=40, generator=_generator())
    ),
    "weighted": lambda: DataLoader(dataset(17), 3, sampler=WeightedRandomSampler([1.0, 2.0] * 8, 17)),
    "a subset": lambda: DataLoader(dataset(17), 3, sampler=SubsetRandomSampler(range(3, 17))),
    "augmented": lambda: kill_runs.augmented(0),
    "augmented in 2 workers": lambda: kill_runs.augmented(2),
    "a stream": lambda: DataLoader(Stream(), 3),
    "a stream in a worker": lambda: DataLoader(Stream(), 3, num_workers=1),
    "a list": lambda: some_batches(6, 3),
    "without a length": lambda: Noisy(some_batches(6, 3)),
    "one that keeps its place": Remembering,
    "torchdata's": lambda: _torchdatas(dataset(17)),
    "torchdata's, augmented": lambda: _torchdatas(kill_runs.Augmented(17)),
    "torchdata's with 2 workers": lambda: _torchdatas(dataset(17), num_workers=2),
    "loopwright's": lambda: Loader(kill_runs.Augmented(17), 3, seed=4),
    "loopwright's with 2 workers": lambda: Loader(kill_runs.Augmented(17), 3, seed=4, workers=2),
}


@pytest.mark.parametrize("save", [Every(steps=1), Every(steps=2), Every(epochs=1)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", LOADERS)
def test_any_loader_goes_on_where_it_was_left(tmp_path: Path, name: str, accumulate: int, save: Every) -> None:
    case = Case(train=LOADERS[name], save=save, accumulate=accumulate, epochs=3, log=Every(epochs=1))
    expected, calls = unbroken(case, tmp_path / "unbroken")
    places = [calls // 2, calls // 3] if "worker" in name else [calls // 2, 7, calls // 3, calls // 2]
    assert differences(expected, broken(case, tmp_path / "broken", places)) == []


@pytest.mark.parametrize(
    "name",
    ["shuffled", "a generator of its own", "augmented", "loopwright's", "torchdata's", "torchdata's, augmented"],
)
def test_validation_data_may_be_drawn_at_random_too(tmp_path: Path, name: str) -> None:
    def noisy() -> Iterable[Any]:
        return Loader(kill_runs.Augmented(17), 3, seed=4) if name == "loopwright's" else LOADERS[name]()

    case = Case(val=noisy, validate=Every(steps=2), save=Every(steps=1), epochs=3)
    expected, calls = unbroken(case, tmp_path / "unbroken")
    for places in ([calls // 2, calls // 3, 17], [4, 9, 12], range(calls // 4, calls // 4 + 12)):
        folder = tmp_path / f"broken-{min(places)}"
        assert differences(expected, broken(case, folder, places)) == []


@pytest.mark.parametrize("name", ["shuffled", "loopwright's"])
def test_a_validation_that_failed_is_made_again_as_for_the_first_time(tmp_path: Path, name: str) -> None:
    def run(fail: int | None) -> dict[str, bytes]:
        passes = 0

        def count(state: State, output: object) -> None:
            nonlocal passes
            passes += 1
            if passes == fail:
                raise Interrupted

        case = Case(val=LOADERS[name], train=lambda: some_batches(4, 3), validate=Every(steps=1), epochs=1)
        trainer = build(case, tmp_path / str(fail), None, At(on_eval_batch_end=count))
        train, val = some_batches(4, 3), LOADERS[name]()
        how: dict[str, Any] = {"epochs": 2, "validate": Every(steps=1)}
        if fail is not None:
            with pytest.raises(Interrupted):
                trainer.fit(train, val, **how)
        result = trainer.fit(train, val, **how)
        found = left_behind(trainer, result, tmp_path / str(fail))
        return {part: found[part] for part in ("weights", "random", "history", "metrics")}

    expected = run(None)
    for fail in (2, 7, 15):
        assert run(fail) == expected, fail


@pytest.mark.parametrize("signalled", [1, 3, 8])
@pytest.mark.parametrize("name", ["loopwright's", "torchdata's, augmented", "augmented"])
def test_a_validation_given_up_for_a_signal_is_made_again_after_the_resume(
    tmp_path: Path, name: str, signalled: int
) -> None:
    case = Case(val=LOADERS[name], validate=Every(steps=2), save=Every(epochs=9), epochs=3)
    expected, _ = unbroken(case, tmp_path / "unbroken")
    passes = 0

    def ask(state: State, output: object) -> None:
        nonlocal passes
        passes += 1
        if passes == signalled:
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "broken"
    with pytest.raises(SystemExit):
        fit(build(case, folder, None, At(on_eval_batch_end=ask)), case)
    assert differences(expected, broken(case, folder, [])) == []


class Measured(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return ((self.scale * predictions - targets) ** 2).mean() + (self.scale**2).sum()


def test_parameters_that_only_the_optimizer_holds_are_part_of_the_run(tmp_path: Path) -> None:
    def run(*stops: int) -> list[Tensor]:
        folder = tmp_path / str(len(stops))
        for steps in stops:
            torch.manual_seed(0)
            model, loss = nn.Linear(3, 1), Measured()
            optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=0.1)
            trainer = Trainer(model, optimizer, loss, callbacks=[Checkpoint(folder)], device="cpu")
            trainer.fit(some_batches(8), steps=steps, resume="auto")
        return [*model.parameters(), *loss.parameters()]

    for expected, found in zip(run(7), run(3, 5, 7), strict=True):
        assert torch.equal(expected, found)

    model = nn.Linear(3, 1)
    trainer = Trainer(model, torch.optim.Adam(model.parameters()), nn.MSELoss(), callbacks=[Checkpoint(tmp_path / "1")])
    with pytest.raises(CheckpointError, match="parameter"):
        trainer.fit(some_batches(8), steps=9, resume="auto")


def test_a_run_whose_last_save_was_due_at_its_end_says_when_resumed_that_nothing_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="loopwright"):
            results.append(line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=3, resume="auto"))
    assert any("nothing to train" in record.message for record in caplog.records)
    assert results[0].history == results[1].history
    assert results[0].stop_reason == results[1].stop_reason == "epochs"


@pytest.mark.parametrize("name", ["a generator of its own", "loopwright's", "one that keeps its place"])
def test_every_checkpoint_of_a_run_leads_to_its_end(tmp_path: Path, name: str) -> None:
    # Also one that was written by a run which had itself just been resumed, before its first batch.
    case = Case(train=LOADERS[name], save=Every(steps=1), keep=99, epochs=2, validate=Every(steps=3))
    expected, calls = unbroken(case, tmp_path / "whole")
    for at in (calls // 2, calls // 4):
        with pytest.raises(Interrupted):
            fit(build(case, tmp_path / "broken", at), case)
    for path in list_checkpoints(tmp_path / "broken" / "checkpoints"):
        folder = tmp_path / path.name
        shutil.copytree(tmp_path / "broken", folder)
        trainer = build(case, folder)
        result = fit(trainer, case, folder / "checkpoints" / path.name)
        assert differences(expected, left_behind(trainer, result, folder)) == [], path.name


def test_a_plain_loader_finds_its_place_without_fetching_what_comes_before(tmp_path: Path) -> None:
    data = Counting(*dataset(40).tensors)
    case = Case(train=lambda: DataLoader(data, 4, shuffle=True), validate=None, epochs=1, save=Every(steps=1))
    with pytest.raises(Interrupted):
        fit(build(case, tmp_path, _call_of("on_batch_start", 9)), case)
    assert data.fetched == 36
    data.fetched = 0
    assert fit(build(case, tmp_path), case).progress.samples == 40
    assert data.fetched == 8, "the two batches that were left"


def _call_of(hook: str, number: int) -> int:
    """The number of the call of any hook that is this hook's ``number``-th, in one epoch without validation."""
    within = ["on_batch_start", "on_backward_end", "on_before_step", "on_step_end", "on_batch_end"]
    return 3 + (number - 1) * len(within) + within.index(hook) + 1


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (1, 2)])
def test_the_number_of_workers_of_loopwrights_loader_may_change(tmp_path: Path, workers: tuple[int, int]) -> None:
    count = workers[0]
    case = Case(train=lambda: Loader(kill_runs.Augmented(17), 3, seed=4, workers=count), save=Every(steps=1), epochs=2)
    expected, calls = unbroken(case, tmp_path / "unbroken")
    with pytest.raises(Interrupted):
        fit(build(case, tmp_path / "broken", calls // 3), case)
    count = workers[1]
    assert differences(expected, broken(case, tmp_path / "broken", [])) == []


def test_a_loader_that_kept_no_place_before_passes_over_what_is_done(tmp_path: Path) -> None:
    kinds = [LOADERS["in order"], LOADERS["loopwright's"]]
    for number, (first, then) in enumerate([kinds, kinds[::-1]]):
        case = Case(train=first, save=Every(steps=1), epochs=1, validate=None)
        folder = tmp_path / str(number)
        with pytest.raises(Interrupted):
            fit(build(case, folder, _call_of("on_batch_start", 4)), case)
        result = fit(build(case, folder), dataclasses.replace(case, train=then))
        assert (result.progress.step, result.progress.samples) == (6, 17)


class Holding(Callback[Any]):
    """Has a state of the test's choice."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


class Other(Holding):
    """Another class."""


@pytest.mark.parametrize(
    "value",
    [np.float64(1.0), {1, 2}, b"bytes", Path("x"), object(), np.zeros(2)],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_saved_is_refused_before_the_first_step_with_its_path(tmp_path: Path, value: Any) -> None:
    trainer = line_trainer(callbacks=[Holding([{"deep": value}]), Checkpoint(tmp_path)])
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match=r"\$\.callbacks\.Holding\.value\[0\]\.deep"):
        trainer.fit(some_batches(3), epochs=1)
    assert trainer.state.progress.batch == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))
    assert list_checkpoints(tmp_path) == []


def test_two_callbacks_of_one_class_keep_separate_states(tmp_path: Path) -> None:
    line_trainer(callbacks=[Holding(1), Holding(2), Checkpoint(tmp_path)]).fit(some_batches(2), epochs=1)
    found = [Holding(), Holding()]
    line_trainer(callbacks=[*found, Checkpoint(tmp_path)]).fit(some_batches(2), epochs=2, resume="auto")
    assert [callback.value for callback in found] == [1, 2]


def test_a_resume_says_in_one_record_what_was_restored_and_names_what_was_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line_trainer(callbacks=[Holding(1), Checkpoint(tmp_path)]).fit(some_batches(2), epochs=1)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="loopwright"):
        line_trainer(callbacks=[Other(1), Checkpoint(tmp_path)]).fit(some_batches(2), epochs=2, resume="auto")
    (record,) = [record for record in caplog.records if "resumed" in record.message]
    assert record.levelno == logging.INFO
    for words in ("step 2", "the model", "the optimizer", "the random generators", "Checkpoint", "as new: Other"):
        assert words in record.message
    assert "not in the list of callbacks: Holding" in record.message


class Backwards(Sampler[int]):
    """Nobody knows what it has in mind."""

    def __iter__(self) -> Iterator[int]:
        yield from range(16, -1, -1)


def _resumed(
    folder: Path,
    loader: Callable[[], Iterable[Any]],
    caplog: pytest.LogCaptureFixture,
    then: Callable[[], Iterable[Any]] | None = None,
) -> str:
    """What a run in this loader's data, left in mid-epoch, says when it is resumed, or goes on in other data."""
    line_trainer(callbacks=[Checkpoint(folder)]).fit(loader(), steps=1)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="loopwright"):
        line_trainer(callbacks=[Checkpoint(folder)]).fit((then or loader)(), steps=2, resume="auto")
    (message,) = [record.message for record in caplog.records if "resumed from" in record.message]
    return message


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (
            lambda: DataLoader(dataset(17), 3, num_workers=1, persistent_workers=True),
            "persistent workers go on with an order and a randomness of their own",
        ),
        (lambda: DataLoader(dataset(17), 3, sampler=Backwards()), "the sampler Backwards may keep a state"),
        (lambda: Noisy(some_batches(6, 3)), "a Noisy may keep a state"),
    ],
)
def test_what_cannot_be_found_again_exactly_is_named(
    tmp_path: Path, loader: Callable[[], Iterable[Any]], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert f"perhaps not exact: {why}" in _resumed(tmp_path, loader, caplog)


@pytest.mark.parametrize(
    "name", ["shuffled", "weighted", "a subset", "a list", "augmented", "loopwright's", "torchdata's"]
)
def test_of_what_is_exact_nothing_is_said(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert "not exact" not in _resumed(tmp_path, LOADERS[name], caplog)


def test_data_of_another_length_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = _resumed(tmp_path, lambda: some_batches(6), caplog, then=lambda: some_batches(5))
    assert "not exact: the training data had 6 batches, and now has 5 batches" in message


@pytest.mark.parametrize("kind", ["plain", "list", "own", "a generator"])
def test_data_that_ends_before_the_place_is_an_error(tmp_path: Path, kind: str) -> None:
    kinds: dict[str, Callable[[int], Iterable[Any]]] = {
        "plain": lambda n: DataLoader(dataset(n), 1),
        "list": lambda n: some_batches(n),
        "own": lambda n: Loader(dataset(n), 1),
        "a generator": lambda n: iter(some_batches(n)),
    }
    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(kinds[kind](6), steps=5)
    with pytest.raises((DataError, CheckpointError), match="5"):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(kinds[kind](3), steps=9, resume="auto")


def test_a_long_way_to_the_place_is_told_of_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopwright.batches._SAY_EACH", 0.0)
    _resumed(tmp_path, lambda: kill_runs.augmented(1), caplog)
    messages = [record.message for record in caplog.records]
    assert "going through the 1 batches of this epoch that are done, to find the place again" in messages
    assert "1 of the 1 batches that are done have been gone through" in messages


@pytest.mark.parametrize("resume", [3, True, "", b"auto", ["auto"]])
def test_what_says_no_place_to_resume_from_is_refused_before_anything(resume: Any, tmp_path: Path) -> None:
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path / "new")])
    with pytest.raises(ConfigError, match="resume is"):
        trainer.fit(some_batches(2), epochs=1, resume=resume)
    assert not (tmp_path / "new").exists()


def _damage(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_refused_with_a_warning_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(validate=None)
    expected, calls = unbroken(case, tmp_path / "unbroken")
    folder = tmp_path / "broken"
    with pytest.raises(Interrupted):
        fit(build(case, folder, calls - 5), case)
    older, newer = list_checkpoints(folder / "checkpoints")
    _damage(newer)
    with caplog.at_level(logging.INFO, logger="loopwright"):
        assert differences(expected, broken(case, folder, [])) == []
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert newer.name in warning.message
    (resumed,) = [record for record in caplog.records if "resumed" in record.message]
    assert older.name in resumed.message
    assert f"refused were {newer.name}" in resumed.message


def test_with_no_checkpoint_whole_auto_stops_and_changes_nothing(tmp_path: Path) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=2)
    for path in list_checkpoints(tmp_path):
        _damage(path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=3, resume="auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_path_given_by_hand_is_that_checkpoint_or_an_error(tmp_path: Path) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path, every=Every(steps=1))]).fit(some_batches(3), epochs=1)
    *_, path = list_checkpoints(tmp_path)
    _damage(path)
    with pytest.raises(CheckpointError, match="damaged"):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(3), epochs=2, resume=path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(3), epochs=2, resume=tmp_path / "none")


@pytest.mark.parametrize("form", ["as it is", "with a detour", "through a link"])
def test_a_run_rewound_by_a_path_sets_the_later_checkpoints_aside(tmp_path: Path, form: str) -> None:
    case = Case(keep=9, save=Every(steps=2))
    expected, _ = unbroken(case, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    parents = {"as it is": folder, "with a detour": folder / ".." / "checkpoints"}
    path = parents.get(form, tmp_path / "link" / "checkpoints") / "step-000000004"
    later = {path.name for path in list_checkpoints(folder)} - {"step-000000002", "step-000000004"}
    trainer = build(case, tmp_path / "run")
    result = fit(trainer, case, path)
    assert differences(expected, left_behind(trainer, result, tmp_path / "run")) == []
    assert {path.name for path in list_checkpoints(folder / "previous-1")} == later
    assert {"step-000000002", "step-000000004"} < {path.name for path in list_checkpoints(folder)}


def test_a_fresh_run_sets_a_used_folder_aside_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=1)
    names = [path.name for path in list_checkpoints(tmp_path)]
    with caplog.at_level(logging.INFO, logger="loopwright"):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=1)
    for number in (1, 2):
        assert [path.name for path in list_checkpoints(tmp_path / f"previous-{number}")] == names
    assert any("previous-2" in record.message for record in caplog.records)


def test_auto_starts_afresh_where_there_is_nothing_and_needs_exactly_one_checkpoint(tmp_path: Path) -> None:
    saves = [Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")]
    assert line_trainer(callbacks=saves[:1]).fit(some_batches(2), epochs=1, resume="auto").progress.step == 2
    for callbacks in ([], saves):
        with pytest.raises(ConfigError, match="Checkpoints in the list"):
            line_trainer(callbacks=callbacks).fit(some_batches(2), epochs=1, resume="auto")


@pytest.mark.parametrize("ending", ["epochs", "steps", "a callback"])
def test_a_finished_run_returns_at_once_with_what_it_returned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    case = Case(patience=1 if ending == "a callback" else 50, epochs=60 if ending == "a callback" else 2)
    case = dataclasses.replace(case, steps=7 if ending == "steps" else None, save=Every(epochs=50))
    expected, _ = unbroken(case, tmp_path)
    trainer = build(case, tmp_path)
    with caplog.at_level(logging.INFO, logger="loopwright"):
        result = fit(trainer, case)
    assert differences(expected, left_behind(trainer, result, tmp_path)) == []
    assert next(c for c in trainer._settings.callbacks if isinstance(c, Interrupt)).calls == []
    assert any("nothing to train" in record.message for record in caplog.records)
    assert fit(trainer, case).history == result.history, "also when it is asked once more"


def test_a_larger_target_goes_on_with_a_run_that_a_callback_has_stopped(tmp_path: Path) -> None:
    stop = At(on_step_end=lambda state: state.stop("enough") if state.progress.step == 3 else None)
    first = line_trainer(callbacks=[stop, Checkpoint(tmp_path)]).fit(some_batches(2), epochs=5)
    assert (first.stop_reason, first.progress.step) == ("enough", 3)
    again = line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=5, resume="auto")
    assert (again.stop_reason, again.progress.step) == ("enough", 3)
    more = line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=6, resume="auto")
    assert (more.stop_reason, more.progress.step) == ("epochs", 12)


def _scores(path: Path) -> list[float | None]:
    return [read_checkpoint(checkpoint).facts["score"] for checkpoint in list_checkpoints(path)]


def test_the_score_belongs_to_the_weights_it_is_stored_with(tmp_path: Path) -> None:
    batches, val = some_batches(4), some_batches(2, seed=3)
    saves = Checkpoint(tmp_path, every=Every(steps=1), monitor="val/loss", mode="min", keep=50)
    trainer = line_trainer(callbacks=[saves])
    trainer.fit(batches, val, steps=8, validate=Every(steps=2))
    found = {read_checkpoint(path).facts["step"]: path for path in list_checkpoints(tmp_path)}
    assert sorted(found) == list(range(1, 9))
    for step, path in found.items():
        contents = read_checkpoint(path)
        if step % 2:
            assert contents.facts["score"] is None, "nothing was measured on these weights"
            continue
        trainer.state.model.load_state_dict(contents.weights)
        assert contents.facts["score"] == trainer.evaluate(val)["test/loss"]


def test_the_newest_and_the_best_are_kept_also_over_a_resume(tmp_path: Path) -> None:
    values = iter([5.0, 1.0, 3.0, 2.0, 4.0, 3.5])
    callbacks: list[Any] = [At(on_epoch_end=lambda state: state.log("score", next(values)))]

    def saves() -> Checkpoint:
        return Checkpoint(tmp_path, monitor="score", mode="min", keep=1)

    line_trainer(callbacks=[*callbacks, saves()]).fit(some_batches(1), epochs=3)
    assert _scores(tmp_path) == [1.0, 3.0]
    line_trainer(callbacks=[*callbacks, saves()]).fit(some_batches(1), epochs=6, resume="auto")
    assert _scores(tmp_path) == [1.0, 3.5]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert read_checkpoint(best).facts["epoch"] == 2


@pytest.mark.parametrize(
    ("steps", "names"),
    [(4, ["step-000000002", "step-000000004"]), (5, ["step-000000002", "step-000000004", "step-000000005"])],
)
def test_the_end_is_saved_only_where_something_has_changed(tmp_path: Path, steps: int, names: list[str]) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path, every=Every(steps=2))]).fit(some_batches(9), steps=steps)
    assert [path.name for path in list_checkpoints(tmp_path)] == names


def test_an_exception_saves_nothing(tmp_path: Path) -> None:
    case = Case(save=Every(epochs=9))
    with pytest.raises(Interrupted):
        fit(build(case, tmp_path, 30), case)
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_a_validation_that_was_due_when_the_run_was_left_still_makes_its_weights_the_best(tmp_path: Path) -> None:
    def build_one(*callbacks: Any) -> Any:
        saves = Checkpoint(tmp_path, every=Every(steps=2), monitor="val/loss", mode="min", keep=9)
        return line_trainer(callbacks=[saves, *callbacks])

    def ask(state: State, *_: object) -> None:
        if state.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)

    val = some_batches(2, seed=3)
    with pytest.raises(SystemExit):
        build_one(At(on_eval_batch_end=ask)).fit(some_batches(5), val, steps=3, validate=Every(steps=2))
    assert _scores(tmp_path) == [None]
    build_one().fit(some_batches(5), val, steps=3, validate=Every(steps=2), resume="auto")
    scores = _scores(tmp_path)
    assert scores[0] is None
    assert scores[1] is not None, "saved again at its step, with its score"


def test_a_model_that_was_stopped_early_holds_its_best_weights_also_when_the_finished_run_is_resumed(
    tmp_path: Path,
) -> None:
    def run() -> tuple[Any, Any]:
        stopper = EarlyStopping("val/loss", mode="min", patience=2, restore_best=True)
        trainer = line_trainer(lr=2.0, callbacks=[stopper, Checkpoint(tmp_path)])
        return trainer, trainer.fit(some_batches(4), some_batches(2, seed=3), epochs=20, resume="auto")

    (first, one), (second, other) = run(), run()
    assert one.restored_epoch == other.restored_epoch is not None
    assert one.stop_reason == other.stop_reason
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))


def test_a_resumed_run_fits_on_in_the_same_process(tmp_path: Path) -> None:
    case = Case(epochs=2)
    unbroken(case, tmp_path / "two")
    trainer = build(case, tmp_path / "two")
    fit(trainer, dataclasses.replace(case, epochs=3))
    result = fit(trainer, dataclasses.replace(case, epochs=5))
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4, 5]
    expected, _ = unbroken(dataclasses.replace(case, epochs=5), tmp_path / "five")
    assert differences(expected, left_behind(trainer, result, tmp_path / "two")) == []


def test_a_recorder_of_hooks_sees_a_resumed_run_begin_with_everything_restored(tmp_path: Path) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(3), steps=2)
    recorder = HookRecorder()
    line_trainer(callbacks=[recorder, Checkpoint(tmp_path)]).fit(some_batches(3), epochs=1, resume="auto")
    assert recorder.hooks[:4] == ["setup", "on_fit_start", "on_epoch_start", "on_batch_start"]
    assert recorder.calls[1].progress.step == recorder.calls[1].progress.batch == 2


# R8: what saves, loads.


class IntKeys(Holding):
    def state_dict(self) -> dict[Any, Any]:
        return {0: 1.0, 1: (2, "x")}

    def load_state_dict(self, state: Any) -> None:
        self.value = state


class Listing(Holding):
    def state_dict(self) -> Any:
        return [1, float("nan"), None]

    def load_state_dict(self, state: Any) -> None:
        self.value = state


class Logs(Callback[Any]):
    """Logs numbers of every kind."""

    def on_step_end(self, state: State) -> None:
        values: tuple[Any, ...] = (True, 3, np.float32(0.5), np.bool_(True), torch.tensor(True), torch.tensor(7))
        for number, value in enumerate(values):
            state.log(f"kind/{number}", value)


@pytest.mark.parametrize("kind", [IntKeys, Listing, Logs])
def test_whatever_a_callback_may_save_or_log_comes_back(tmp_path: Path, kind: type[Callback[Any]]) -> None:
    first, second = kind(), kind()
    trainer = line_trainer(callbacks=[first, Checkpoint(tmp_path)])
    trainer.fit(some_batches(3), epochs=1)
    again = line_trainer(callbacks=[second, Checkpoint(tmp_path)])
    assert again.fit(some_batches(3), epochs=2, resume="auto").progress.step == 6
    if isinstance(second, Holding):
        assert repr(second.value) == repr(second.state_dict())
    else:
        values = {name: again.state.metrics[name] for name in again.state.metrics if name.startswith("kind/")}
        assert all(type(value) is float for value in values.values())
        assert list(values.values()) == [1.0, 3.0, 0.5, 1.0, 1.0, 7.0]


class Momentum(torch.optim.Optimizer):
    """An optimizer of one's own that keeps things where torch's do not."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch overloads it
        self.steps += 1
        kept: Any = self.state
        kept["global"]["norm"] = torch.tensor(float(self.steps))
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter]
                kept[0] = 0.5 * kept.get(0, 0) + parameter.grad
                parameter -= group["lr"] * kept[0] / self.steps

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]
        super().load_state_dict({key: value for key, value in state.items() if key != "steps"})


def test_an_optimizer_of_ones_own_keeps_what_it_likes(tmp_path: Path) -> None:
    def run(*stops: int) -> list[Tensor]:
        for steps in stops:
            torch.manual_seed(0)
            model = nn.Linear(3, 1)
            saves = Checkpoint(tmp_path / str(len(stops)))
            trainer = Trainer(model, Momentum(model.parameters()), nn.MSELoss(), callbacks=[saves], device="cpu")
            trainer.fit(some_batches(8), steps=steps, resume="auto")
        return list(model.parameters())

    for expected, found in zip(run(7), run(3, 5, 7), strict=True):
        assert torch.equal(expected, found)


class Growing(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler of one's own, with an attribute that begins on the class."""

    seen = 0

    def get_lr(self) -> list[Any]:
        self.seen += 1
        return [0.1 / self.seen for _ in self.base_lrs]


class Extra(nn.Linear):
    """Keeps as extra state a row that grows."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.row = torch.zeros(0)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.row = torch.cat([self.row, inputs.detach().mean().reshape(1)])
        return super().forward(inputs)

    def get_extra_state(self) -> Tensor:
        return self.row

    def set_extra_state(self, state: Any) -> None:
        self.row = state


def test_a_scheduler_and_an_extra_state_of_ones_own_come_back(tmp_path: Path) -> None:
    def run(*stops: int) -> list[Tensor]:
        for steps in stops:
            torch.manual_seed(0)
            model = Extra()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            trainer = Trainer(
                model,
                optimizer,
                nn.MSELoss(),
                schedule=Schedule(Growing(optimizer), each="step"),
                callbacks=[Checkpoint(tmp_path / str(len(stops)))],
                device="cpu",
            )
            trainer.fit(some_batches(8), steps=steps, resume="auto")
        return [*model.parameters(), model.row]

    for expected, found in zip(run(7), run(3, 5, 7), strict=True):
        assert torch.equal(expected, found)


class Unloadable(Callback[Any]):
    """Its own load refuses what it saves; that is found where it is loaded, and said."""

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: Any) -> None:
        raise ValueError("not that")


def test_a_callback_that_refuses_its_state_leaves_everything_as_it_was(tmp_path: Path) -> None:
    line_trainer(callbacks=[Unloadable(), Checkpoint(tmp_path)]).fit(some_batches(3), epochs=1)
    trainer = line_trainer(callbacks=[Unloadable(), Checkpoint(tmp_path)], seed=None)
    before = [parameter.clone() for parameter in trainer.state.model.parameters()]
    with pytest.raises(CheckpointError, match="the callback Unloadable cannot take back"):
        trainer.fit(some_batches(3), epochs=2, resume="auto")
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.state.model.parameters(), strict=True))


def test_with_two_checkpoints_each_keeps_what_this_run_has_saved_before(tmp_path: Path) -> None:
    def run(steps: int, resume: Path | None) -> None:
        often = Checkpoint(tmp_path / "often", every=Every(steps=2), keep=2)
        best = Checkpoint(tmp_path / "best", every=Every(steps=4), monitor="train/loss", mode="min", keep=1)
        line_trainer(callbacks=[often, best]).fit(some_batches(4), steps=steps, resume=resume)

    run(12, None)
    kept = {path.name for path in list_checkpoints(tmp_path / "best")}
    run(14, latest_checkpoint(tmp_path / "often"))
    assert not (tmp_path / "best" / "previous-1").exists()
    assert best_checkpoint(tmp_path / "best") is not None
    assert kept & {path.name for path in list_checkpoints(tmp_path / "best")}
    line_trainer(callbacks=[Checkpoint(tmp_path / "other")]).fit(some_batches(4), steps=6)
    run(16, latest_checkpoint(tmp_path / "often"))
    assert {path.name for path in list_checkpoints(tmp_path / "other")} >= {"step-000000006"}


# What fresh eyes found.


def test_a_fit_within_a_fit_of_the_same_trainer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    refused: list[Exception] = []

    def nest(state: State) -> None:
        try:
            trainer.fit(some_batches(2), epochs=9)
        except ConfigError as error:
            refused.append(error)

    trainer = line_trainer(callbacks=[At(on_epoch_end=nest), Checkpoint(tmp_path)])
    result = trainer.fit(some_batches(3), epochs=2)
    assert len(refused) == 2
    assert [sorted(row) for row in result.history] == [["epoch", "step", "train/loss"]] * 2
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_best_checkpoint_is_kept_also_where_a_step_and_an_epoch_meet(tmp_path: Path) -> None:
    saves = Checkpoint(tmp_path, every=Every(steps=4), monitor="val/loss", mode="min", keep=9)
    result = line_trainer(callbacks=[saves]).fit(some_batches(4), some_batches(2, seed=3), epochs=3)
    scores = [row["val/loss"] for row in result.history]
    assert _scores(tmp_path) == [*scores, scores[-1]], "the end of the last epoch is saved as well"


def test_two_runs_in_turns_in_one_folder_do_not_take_each_others_checkpoints(tmp_path: Path) -> None:
    one, other = (line_trainer(callbacks=[Checkpoint(tmp_path, keep=1)], seed=seed) for seed in (1, 2))
    one.fit(some_batches(4), epochs=1)
    other.fit(some_batches(4), epochs=5)
    one.fit(some_batches(4), epochs=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000008"]


class Averaged(nn.Linear):
    """Keeps a running mean in a buffer that its state_dict does not have."""

    ema: Tensor

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("ema", torch.zeros(1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.ema.mul_(0.9).add_(0.1 * inputs.mean())
        return super().forward(inputs) + self.ema


def _in_parts(folder: Path, make: Callable[[], nn.Module], *stops: int, **how: Any) -> list[Tensor]:
    """The tensors of a model after a run in these parts, each in a new trainer."""
    for steps in stops:
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        saves = Checkpoint(folder / str(len(stops)))
        trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[saves], device="cpu", **how)
        trainer.fit(some_batches(8), steps=steps, resume="auto")
    return [*model.parameters(), *model.buffers()]


def test_buffers_that_are_not_persistent_come_back(tmp_path: Path) -> None:
    whole, parts = _in_parts(tmp_path, Averaged, 7), _in_parts(tmp_path, Averaged, 3, 5, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("changed", [{"monitor": "train/loss"}, {"mode": "max"}])
def test_an_early_stopping_of_another_metric_begins_anew_and_says_so(
    tmp_path: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fit(epochs: int, **how: Any) -> EarlyStopping:
        settings: dict[str, Any] = {"monitor": "val/loss", "mode": "min", "patience": 3} | how
        stopper = EarlyStopping(**settings)
        trainer = line_trainer(callbacks=[stopper, Checkpoint(tmp_path)])
        trainer.fit(some_batches(3), some_batches(2, seed=3), epochs=epochs, resume="auto")
        return stopper

    fit(2)
    stopper = fit(3, **changed)
    assert (stopper.best_epoch, stopper.waited) == (3, 0)
    assert any("is followed from here on" in record.message for record in caplog.records)


def test_a_scheduler_may_begin_with_none_on_its_class(tmp_path: Path) -> None:
    class Late(torch.optim.lr_scheduler.LRScheduler):
        seen: int | None = None

        def get_lr(self) -> list[Any]:
            self.seen = 1 + (self.seen or 0)
            return [0.1 / self.seen for _ in self.base_lrs]

    def run(*stops: int) -> list[Tensor]:
        for steps in stops:
            torch.manual_seed(0)
            model = nn.Linear(3, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            trainer = Trainer(
                model,
                optimizer,
                nn.MSELoss(),
                schedule=Schedule(Late(optimizer), each="step"),
                callbacks=[Checkpoint(tmp_path / str(len(stops)))],
                device="cpu",
            )
            trainer.fit(some_batches(8), steps=steps, resume="auto")
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(7), run(3, 7), strict=True))


def test_ctrl_c_within_a_window_and_a_second_fit_are_the_unbroken_run(tmp_path: Path) -> None:
    def run(folder: Path, at: int | None) -> list[Tensor]:
        def ask(state: State, output: object) -> None:
            if state.progress.batch == at and state.progress.epoch == 0:
                signal.raise_signal(signal.SIGINT)

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.MSELoss(),
            callbacks=[Checkpoint(folder), At(on_batch_end=ask)],
            accumulate=3,
            device="cpu",
            seed=4,
        )
        if at is not None:
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(some_batches(8), epochs=2)
        trainer.fit(some_batches(8), epochs=2, resume="auto")
        return list(model.parameters())

    expected = run(tmp_path / "whole", None)
    for at in (1, 2, 4, 5):
        found = run(tmp_path / str(at), at)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), at


def test_a_window_under_fp16_goes_on_where_no_batch_is_left_of_it(tmp_path: Path) -> None:
    def ask(state: State, output: object) -> None:
        if state.progress.batch == 3:
            signal.raise_signal(signal.SIGTERM)

    def trainer(*callbacks: Any) -> Any:
        return line_trainer(callbacks=[Checkpoint(tmp_path), *callbacks], precision="fp16", accumulate=2)

    with pytest.raises(SystemExit):
        trainer(At(on_batch_end=ask)).fit(Unsized(some_batches(3)), epochs=1)
    progress = trainer().fit(Unsized(some_batches(3)), epochs=1, resume="auto").progress
    assert (progress.samples, progress.step + progress.skipped) == (6, 2)


def test_what_setup_makes_anew_does_not_replace_what_was_restored(tmp_path: Path) -> None:
    class Counter(Holding):
        def setup(self, state: State) -> None:
            self.value = 0

        def on_step_end(self, state: State) -> None:
            self.value += 1

    counter = Counter()
    line_trainer(callbacks=[Counter(), Checkpoint(tmp_path)]).fit(some_batches(4), steps=3)
    trainer = line_trainer(callbacks=[counter, Checkpoint(tmp_path)])
    trainer.fit(some_batches(4), steps=6, resume="auto")
    trainer.fit(some_batches(4), steps=8)
    assert counter.value == 8


def test_a_signal_during_a_replay_does_not_wait_for_its_end(tmp_path: Path) -> None:
    read: list[int] = []

    class Slow(Unsized):
        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(self.batches):
                read.append(number)
                if len(read) == 12:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(Slow(some_batches(20)), steps=9)
    with pytest.raises(SystemExit):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(Slow(some_batches(20)), steps=19, resume="auto")
    assert len(read) <= 14, "nine before, and two or three of the nine that were to be passed over"
    again = line_trainer(callbacks=[Checkpoint(tmp_path)])
    assert again.fit(Unsized(some_batches(20)), steps=19, resume="auto").progress.step == 19


def test_a_refused_resume_leaves_the_models_mode_as_it_was(tmp_path: Path) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=1)
    model = nn.Linear(2, 1).eval()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device="cpu")
    with pytest.raises(CheckpointError):
        trainer.fit(some_batches(2), epochs=2, resume=latest_checkpoint(tmp_path))
    assert not trainer.state.model.training


def test_a_best_checkpoint_of_a_validation_that_the_fit_ends_before_is_warned_of_also_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(epochs: int) -> list[str]:
        caplog.clear()
        trainer = small_trainer(Checkpoint(tmp_path / "run", monitor="val/loss", mode="min"))
        trainer.fit(some_batches(2), some_batches(1), epochs=epochs, validate=Every(epochs=4), resume="auto")
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    for epochs in (2, 3):  # the second begins where the first has ended
        (warning,) = fit(epochs)
        assert warning.startswith("Checkpoint follows 'val/loss', and gets no value of it unless a callback logs it: ")
        assert best_checkpoint(tmp_path / "run") is None
    assert fit(4) == []
    assert best_checkpoint(tmp_path / "run") is not None
    assert fit(5) == []


def test_one_folder_for_two_checkpoints_and_a_folder_in_place_of_a_checkpoint_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two Checkpoints"):
        line_trainer(callbacks=[Checkpoint(tmp_path), Checkpoint(tmp_path / ".")]).fit(some_batches(2), epochs=1)
    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(2), epochs=1)
    with pytest.raises(CheckpointError, match="latest_checkpoint"):
        line_trainer().fit(some_batches(2), epochs=1, resume=tmp_path)


def _of(optimizer: Callable[[Any], Any], folder: Path, schedule: Callable[[Any], Any] | None = None) -> Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
    made = optimizer(model.parameters())
    moves = None if schedule is None else Schedule(schedule(made), each="epoch")
    return Trainer(model, made, nn.MSELoss(), schedule=moves, callbacks=[Checkpoint(folder)], device="cpu")


def _halves(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@pytest.mark.parametrize(
    ("before", "after"), [("SGD", "Adam"), ("SGD", "RMSprop"), ("Adam", "SGD"), ("NAdam", "Adam"), ("AdamW", "Adagrad")]
)
def test_a_checkpoint_of_another_optimizer_is_refused_with_the_names_of_both(
    tmp_path: Path, before: str, after: str
) -> None:
    kinds = {name: getattr(torch.optim, name) for name in (before, after)}
    _of(lambda p: kinds[before](p, lr=0.01), tmp_path).fit(some_batches(2), epochs=1)
    with pytest.raises(CheckpointError, match="of another optimizer") as caught:
        _of(lambda p: kinds[after](p, lr=0.01), tmp_path).fit(some_batches(2), epochs=2, resume="auto")
    assert caught.value.why == f"its settings are those of {before}, and this one is {after}"
    assert "load_weights" in caught.value.fix


@pytest.mark.parametrize("new", [True, False])
def test_a_schedule_that_is_new_or_gone_is_said_to_be_so(tmp_path: Path, new: bool) -> None:
    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.1)

    _of(sgd, tmp_path, None if new else _halves).fit(some_batches(2), epochs=1)
    with pytest.raises(CheckpointError, match="it is new" if new else "it is gone") as caught:
        _of(sgd, tmp_path, _halves if new else None).fit(some_batches(2), epochs=2, resume="auto")
    assert caught.value.fix.startswith("no schedule=" if new else "the schedule= that")


@pytest.mark.parametrize(
    ("before", "after", "schedules", "words"),
    [
        ({"lr": 0.1}, {"lr": 0.01, "momentum": 0.9}, (None, None), "lr 0.1 (given: 0.01), momentum 0 (given: 0.9)"),
        ({"lr": torch.tensor(0.5)}, {"lr": torch.tensor(0.25)}, (None, None), "lr 0.5 (given: 0.25)"),
        (
            {"lr": 0.1},
            {"lr": 0.01},
            (_halves, lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1)),
            "initial_lr 0.1 (given: 0.01), the schedule's gamma 0.5 (given: 0.1), "
            "the schedule's step_size 1 (given: 2)",
        ),
        ({"lr": 0.1}, {"lr": 0.1}, (_halves, _halves), ""),
        ({"lr": 0.1}, {"lr": 0.1}, (None, None), ""),
    ],
)
def test_a_resume_names_the_settings_that_are_the_checkpoints_and_not_the_scripts(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    before: dict[str, Any],
    after: dict[str, Any],
    schedules: tuple[Any, Any],
    words: str,
) -> None:
    _of(lambda p: torch.optim.SGD(p, **before), tmp_path, schedules[0]).fit(some_batches(2), epochs=1)
    with caplog.at_level(logging.INFO, logger="loopwright"):
        trainer = _of(lambda p: torch.optim.SGD(p, **after), tmp_path, schedules[1])
        trainer.fit(some_batches(2), epochs=2, resume="auto")
    (message,) = [record.message for record in caplog.records if "resumed from" in record.message]
    said = "settings that are the checkpoint's, and not those given: "
    assert message.partition(said)[2].partition(";")[0] == words


def test_what_a_one_cycle_schedule_moves_is_no_setting_that_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(steps: int) -> None:
        _of(
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            tmp_path,
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=8),
        ).fit(some_batches(2), steps=steps, resume="auto")

    fit(3)
    with caplog.at_level(logging.INFO, logger="loopwright"):
        fit(5)
    assert "resumed from" in caplog.text
    assert "not those given" not in caplog.text


@pytest.mark.parametrize(
    ("resume", "fix"),
    [
        ("latest", 'did you mean resume="auto"?'),
        ("bestiary", 'did you mean resume="auto"?'),
        ("best", "best_checkpoint(folder)"),
        ("Best", "best_checkpoint(folder)"),
        ("runs/model_best.pt", "best_checkpoint(folder)"),
        ("runs/best-effort/checkpoints", "latest_checkpoint(folder)"),
        ("runs/best/step-000000120", "latest_checkpoint(folder)"),
    ],
)
def test_a_word_for_a_path_is_answered_with_what_was_meant(tmp_path: Path, resume: str, fix: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(1), epochs=1, resume=resume)
    assert fix in fix_of(caught.value)


def test_the_folder_of_a_run_given_for_a_checkpoint_is_answered_with_the_checkpoints_in_it(tmp_path: Path) -> None:
    for _ in range(2):  # the second sets aside what the first has saved
        line_trainer(callbacks=[Checkpoint(tmp_path / "best run" / "checkpoints")]).fit(some_batches(1), epochs=1)
    with pytest.raises(CheckpointError, match="holds no checkpoints") as caught:
        line_trainer().fit(some_batches(1), epochs=2, resume=tmp_path / "best run")
    fix = fix_of(caught.value)
    assert fix == f"resume=latest_checkpoint({str(tmp_path / 'best run' / 'checkpoints')!r}), the newest in there"
    with pytest.raises(CheckpointError, match="is a folder of checkpoints") as caught:
        line_trainer().fit(some_batches(1), epochs=2, resume=tmp_path / "best run" / "checkpoints")
    assert fix_of(caught.value).endswith(f"latest_checkpoint({str(tmp_path / 'best run' / 'checkpoints')!r})")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoints") as caught:
        line_trainer().fit(some_batches(1), epochs=2, resume=tmp_path / "empty")
    assert "step-000000120" in fix_of(caught.value)


def fix_of(error: CheckpointError) -> str:
    assert f"fix: {error.fix}" in str(error)
    return error.fix


def test_a_damaged_checkpoint_given_by_hand_says_what_else_to_take(tmp_path: Path) -> None:
    line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(1), epochs=1)
    (path,) = list_checkpoints(tmp_path)
    _damage(path)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(some_batches(1), epochs=2, resume=path)
    assert 'resume="auto"' in fix_of(caught.value)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_weights(path, nn.Linear(3, 1))
    assert "latest_checkpoint(folder)" in fix_of(caught.value)


@pytest.mark.parametrize(("below", "fix"), [("", "Checkpoint("), ("/a/b", "another path")])
def test_a_file_where_the_folder_of_checkpoints_should_be_is_named_before_the_first_step(
    tmp_path: Path, below: str, fix: str
) -> None:
    (tmp_path / "taken").write_text("")
    trainer = line_trainer(callbacks=[Checkpoint(f"{tmp_path}/taken{below}")])
    with pytest.raises(SaveError, match=r"taken is a file, and checkpoints go into a folder") as caught:
        trainer.fit(some_batches(1), epochs=1)
    assert caught.value.fix.startswith(fix)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOTDIR, f"{tmp_path}/taken{below}")
    assert trainer.state.progress.step == 0


def test_a_link_in_the_place_of_a_checkpoint_is_refused_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fit(epochs: int, **settings: Any) -> Trainer:
        trainer = small_trainer(Checkpoint(tmp_path / "run"))
        trainer.fit(some_batches(3), epochs=epochs, **settings)
        return trainer

    fit(2)
    _, newer = sorted((tmp_path / "run").glob("step-*"))
    newer.rename(tmp_path / "elsewhere")
    newer.symlink_to(tmp_path / "elsewhere")
    assert fit(2, resume="auto").state.progress.epoch == 2
    assert f"{newer} is a link" in caplog.text

    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    newer.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link.*\n.*by its own path"):
        fit(3, resume="auto")
    assert fit(3, resume=tmp_path / "elsewhere").state.progress.step == 9


def test_a_resume_by_path_in_the_same_process_finds_the_order_of_the_epochs_to_come(tmp_path: Path) -> None:
    def fit(trainer: Trainer, **settings: Any) -> Trainer:
        x = torch.arange(12.0).reshape(12, 1).expand(12, 3) / 12
        loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=3, shuffle=True)
        trainer.fit(loader, epochs=3, **settings)
        return trainer

    torch.manual_seed(0)
    unbroken = fit(small_trainer(Checkpoint(tmp_path, keep=5)))
    expected = weights_of(unbroken)
    again = fit(unbroken, resume=tmp_path / "step-000000008")
    assert all(map(torch.equal, weights_of(again), expected))
