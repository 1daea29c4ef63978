"""R9, R13, R14: signals, workers that fail, and two processes at one folder."""

from __future__ import annotations

import copy
import gc
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import signal_runs
from broken_runs import Case, broken, build, dataset, differences, fit
from broken_runs import unbroken as whole_run
from helpers import (
    At,
    Outcome,
    RaisesSignal,
    assert_same_run,
    line_trainer,
    small_model,
    small_trainer,
    some_batches,
    weights_of,
)
from loopwright import Every, Result, State, Trainer, latest_checkpoint
from loopwright.callbacks import Checkpoint
from loopwright.checkpoint.folder import list_checkpoints
from loopwright.checkpoint.lock import FolderLock
from loopwright.errors import LockedError
from loopwright.testing import HookRecorder
from nursery import Nursery, nursery, until

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    with nursery() as found:
        yield found


@pytest.fixture(autouse=True)
def _handlers_are_left_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    found = [signal.getsignal(number) for number in HANDLED]
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)
    assert found[:2] == before[:2]


@pytest.fixture(scope="module")
def unbroken(children: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    found = {}
    for workers in (0, 2):
        folder = tmp_path_factory.mktemp("unbroken")
        assert children.run(signal_runs.whole, str(folder), workers, output=folder / "output.txt") == 0
        found[workers] = _result(folder)
    return found


def _result(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize(("group", "workers"), [(False, 0), (True, 2)], ids=["to the process", "to it and its workers"])
def test_a_signal_ends_the_run_after_the_batch_in_hand_and_nothing_is_lost(
    children: Nursery,
    tmp_path: Path,
    unbroken: dict[int, dict[str, str]],
    stage: str,
    number: signal.Signals,
    code: int,
    group: bool,
    workers: int,
) -> None:
    output = tmp_path / "output.txt"
    pid = children.start(signal_runs.lingers, str(tmp_path), stage, workers, output=output)
    until(tmp_path / "there")
    (os.killpg if group else os.kill)(pid, number)
    (tmp_path / "go").touch()
    assert children.wait(pid) == code, output.read_text()
    assert "Traceback" not in output.read_text()
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None, "it saved itself"
    assert children.run(signal_runs.whole, str(tmp_path), workers, output=output) == 0, output.read_text()
    found = _result(tmp_path)
    assert [name for name, value in unbroken[workers].items() if found[name] != value] == []


def test_a_second_ctrl_c_is_out_at_once(children: Nursery, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    pid = children.start(signal_runs.lingers, str(tmp_path), "train", 0, output=output)
    until(tmp_path / "there")
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    begin = time.monotonic()
    assert children.wait(pid) == 130, output.read_text()
    assert time.monotonic() - begin < 30
    assert list_checkpoints(tmp_path / "checkpoints") == [], "it did not stay to save"


def _sends(number: signal.Signals) -> Callable[..., None]:
    def send(state: State, *_: object) -> None:
        if state.progress.step in (0, 2):
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_the_handler_that_was_there_is_called_too_and_is_back_afterwards(
    tmp_path: Path, number: signal.Signals, ending: type[BaseException]
) -> None:
    called: list[int] = []

    def mine(found: int, frame: object) -> None:
        called.append(found)

    signal.signal(number, mine)
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path), At(on_batch_end=_sends(number))])
    try:
        with pytest.raises(ending) as caught:
            trainer.fit(some_batches(5), epochs=1)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    assert called == [number]
    assert trainer.state.progress.batch == 2, "the batch in hand was finished, and no other begun"
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 143
    saved = latest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.name == "step-000000002"


def test_a_signal_in_any_hook_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    case = Case(samples=9, batch_size=3, epochs=2, validate=Every(steps=2), save=Every(epochs=5), patience=2)
    expected, calls = whole_run(case, tmp_path / "unbroken")
    for at in range(1, calls + 1):
        folder, recorder = tmp_path / str(at), RaisesSignal(signal.SIGTERM, at)
        with pytest.raises(SystemExit) as caught:
            fit(build(case, folder, None, recorder), case)
        assert caught.value.code == 143
        assert differences(expected, broken(case, folder, [])) == [], f"call {at} of a hook"


@pytest.mark.parametrize("hook", ["on_fit_start", "on_fit_end"])
def test_a_signal_before_the_first_batch_or_after_the_last_ends_the_run_as_well(tmp_path: Path, hook: str) -> None:
    hooks: dict[str, Any] = {hook: _sends(signal.SIGTERM)}
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path), At(**hooks)])
    with pytest.raises(SystemExit) as caught:
        trainer.fit(some_batches(2), epochs=1)
    assert caught.value.code == 143
    assert latest_checkpoint(tmp_path) is not None


def test_without_a_checkpoint_sigterm_is_left_alone_and_ctrl_c_too_where_the_caller_handles_it() -> None:
    seen: list[Any] = []

    def look(state: State, *_: object) -> None:
        seen.append([signal.getsignal(number) for number in HANDLED])

    def mine(number: int, frame: object) -> None: ...

    before = [signal.getsignal(number) for number in HANDLED]
    line_trainer(callbacks=[At(on_fit_start=look)]).fit(some_batches(2), epochs=1)
    signal.signal(signal.SIGINT, mine)
    line_trainer(callbacks=[At(on_fit_start=look)]).fit(some_batches(2), epochs=1)
    signal.signal(signal.SIGINT, before[1])
    assert [seen[0][0], seen[0][2]] == [before[0], before[2]]
    assert seen[1] == [before[0], mine, before[2]]


def _in_parts(fit: Callable[[Trainer], Result], trainer: Trainer) -> tuple[Outcome, int]:
    """What a run comes to that is called again after each Ctrl-C, and how many there were."""
    torch.manual_seed(3)
    interruptions = 0
    while True:
        try:
            result = fit(trainer)
            break
        except KeyboardInterrupt:
            interruptions += 1
    return Outcome(weights_of(trainer), result), interruptions


class Interrupted(nn.Module):
    """Batch norm and dropout, with a Ctrl-C within the forward pass of some calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.inner, self.calls, self.count = small_model().train(), calls, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.count += 1
        hidden = self.inner(inputs)
        if self.count in self.calls:
            signal.raise_signal(signal.SIGINT)
        out: Tensor = self.inner(inputs) + hidden
        return out


@pytest.mark.parametrize("how", [{}, {"accumulate": 3}, {"precision": "fp16"}, {"lbfgs": True}], ids=str)
def test_ctrl_c_within_a_batch_and_fit_again_end_with_the_bits_of_an_unbroken_run(how: dict[str, Any]) -> None:
    settings = {key: value for key, value in how.items() if key != "lbfgs"}
    if "lbfgs" in how:
        settings["optimizer"] = lambda parameters: torch.optim.LBFGS(parameters, max_iter=2)

    def fit(trainer: Trainer) -> Result:
        loader = DataLoader(dataset(21), batch_size=3, shuffle=True)
        return trainer.fit(loader, some_batches(2), epochs=3, validate=Every(steps=2))

    expected, none = _in_parts(fit, small_trainer(model=Interrupted(), **settings))
    found, interruptions = _in_parts(fit, small_trainer(model=Interrupted(2, 15, 29), **settings))
    assert (none, interruptions) == (0, 3)
    assert_same_run(found, expected)


def test_ctrl_c_in_any_hook_and_fit_again_end_with_the_bits_of_an_unbroken_run() -> None:
    def fit(trainer: Trainer) -> Result:
        loader = DataLoader(dataset(9), batch_size=3, shuffle=True)
        return trainer.fit(loader, some_batches(2), epochs=2, validate=Every(steps=2))

    recorder = HookRecorder()
    expected, _ = _in_parts(fit, small_trainer(recorder))
    for at in range(1, len(recorder.hooks) + 1):
        found, interruptions = _in_parts(fit, small_trainer(RaisesSignal(signal.SIGINT, at)))
        assert interruptions == 1
        assert_same_run(found, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["forked", "as a spawned one, which dies"])
def test_ctrl_c_that_reaches_the_workers_too_and_fit_again_end_with_the_bits_of_an_unbroken_run(
    number: signal.Signals,
) -> None:
    def fit(trainer: Trainer) -> Result:
        return trainer.fit(DataLoader(dataset(21), batch_size=3, shuffle=True, num_workers=1), epochs=2)

    def ask(state: State, *_: object) -> None:
        if asking and state.progress.step == 9:
            asking.clear()
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, number)
            os.kill(os.getpid(), signal.SIGINT)

    asking: list[bool] = []
    expected, _ = _in_parts(fit, small_trainer())
    asking.append(True)
    found, interruptions = _in_parts(fit, small_trainer(At(on_backward_end=ask)))
    assert interruptions == 1
    assert_same_run(found, expected)


def test_a_second_ctrl_c_is_out_at_once_without_a_checkpoint_too() -> None:
    model, recorder = Interrupted(2), HookRecorder()
    before = signal.getsignal(signal.SIGINT)

    def again(module: nn.Module, inputs: object, output: Tensor) -> None:
        if model.count == 2 and signal.getsignal(signal.SIGINT) is not before:
            signal.raise_signal(signal.SIGINT)

    trainer = small_trainer(recorder, model=model)
    model.register_forward_hook(again)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(some_batches(3), epochs=1)
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.state.progress.batch == 1
    assert recorder.hooks[-3:] == ["on_batch_start", "on_exception", "teardown"]


def test_a_second_ctrl_c_within_a_window_has_its_batches_trained_on_again() -> None:
    model = Interrupted(2)

    def again(module: nn.Module, inputs: object, output: Tensor) -> None:
        if model.count == 2:
            signal.raise_signal(signal.SIGINT)

    trainer = small_trainer(model=model, accumulate=3)
    handle = model.register_forward_hook(again)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(some_batches(3), epochs=1)
    handle.remove()
    trainer.fit(some_batches(3), epochs=1)
    assert model.count == 2 + 3


def test_ctrl_c_in_a_run_within_a_run_ends_both(tmp_path: Path) -> None:
    inner = line_trainer(callbacks=[At(on_step_end=lambda state: signal.raise_signal(signal.SIGINT))])
    within = At(on_epoch_end=lambda state: inner.fit(some_batches(3), epochs=1))
    outer = line_trainer(callbacks=[within])
    with pytest.raises(KeyboardInterrupt):
        outer.fit(some_batches(2), epochs=3)
    assert (inner.state.progress.batch, outer.state.progress.step) == (1, 2)


@pytest.mark.parametrize("inner_saves", [False, True])
@pytest.mark.parametrize("outer_saves", [False, True])
def test_who_catches_the_ctrl_c_of_a_run_within_a_run_goes_on_with_the_outer_one(
    tmp_path: Path, inner_saves: bool, outer_saves: bool
) -> None:
    interrupted: list[int] = []

    def within(state: State) -> None:
        ask = At(on_step_end=lambda state: signal.raise_signal(signal.SIGINT))
        callbacks = [ask, *([Checkpoint(tmp_path / "inner")] if inner_saves else [])]
        try:
            line_trainer(callbacks=callbacks).fit(some_batches(3), epochs=1)
        except KeyboardInterrupt:
            interrupted.append(state.progress.step)

    callbacks = [At(on_step_end=within), *([Checkpoint(tmp_path / "outer")] if outer_saves else [])]
    outer = line_trainer(callbacks=callbacks)
    try:
        outer.fit(some_batches(2), epochs=2)
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("the outer run ends too")
    assert interrupted == [1, 2, 3, 4]
    assert outer.state.progress.epoch == 2


def test_ctrl_c_in_an_evaluation_within_a_run_ends_the_run_after_its_batch() -> None:
    other = line_trainer(callbacks=[At(on_eval_batch_end=lambda state, output: signal.raise_signal(signal.SIGINT))])
    scores: list[dict[str, float]] = []
    within = At(on_step_end=lambda state: scores.append(other.evaluate(some_batches(1))))
    outer = line_trainer(callbacks=[within])
    with pytest.raises(KeyboardInterrupt):
        outer.fit(some_batches(3), epochs=1)
    assert [score.keys() for score in scores] == [{"test/loss"}]
    assert outer.state.progress.batch == 1


class Listens(logging.Handler):
    """Keeps what is logged, and lets others wait for the first of it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.messages = threading.Event(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.heard.set()


@pytest.fixture
def log() -> Iterator[Listens]:
    handler, logger = Listens(), logging.getLogger("loopwright")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.mark.parametrize("saves", [False, True])
def test_the_first_ctrl_c_is_answered_before_the_batch_is_finished(tmp_path: Path, log: Listens, saves: bool) -> None:
    def ask(state: State, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        assert log.heard.wait(60), "nothing is said while the batch is in hand"

    callbacks = [At(on_backward_end=ask), *([Checkpoint(tmp_path)] if saves else [])]
    trainer = line_trainer(callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(some_batches(3), epochs=1)
    assert log.messages[0] == (
        "Ctrl-C: the batch in hand is finished and the run saved, then fit ends; another Ctrl-C ends it at once, "
        "and saves nothing"
        if saves
        else "Ctrl-C: the batch in hand is finished, then fit ends; another Ctrl-C ends it at once"
    )
    assert [message.split()[0] for message in log.messages[1:]] == (["interrupted:"] if saves else [])


def test_a_trainer_whose_fit_a_ctrl_c_has_ended_can_be_copied() -> None:
    trainer = line_trainer(callbacks=[RaisesSignal(signal.SIGINT, 6)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(some_batches(3), epochs=1)
    assert copy.deepcopy(trainer).fit(some_batches(3), epochs=1).progress.step == 3


def test_a_second_ctrl_c_and_a_run_around_the_interrupted_one_say_nothing_more(log: Listens) -> None:
    def twice(state: State, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    inner = line_trainer(callbacks=[At(on_backward_end=twice)])
    outer = line_trainer(callbacks=[At(on_epoch_end=lambda state: inner.fit(some_batches(3), epochs=1))])
    with pytest.raises(KeyboardInterrupt):
        outer.fit(some_batches(2), epochs=3)
    assert len(log.messages) == 1


def test_ctrl_c_while_the_log_is_written_is_answered_and_nobody_waits_for_himself(log: Listens) -> None:
    class Locks(logging.Handler):
        """Takes a lock that its own thread cannot take again, as a queue does."""

        def __init__(self) -> None:
            super().__init__()
            self.own, self.free = threading.Lock(), list[bool]()

        def emit(self, record: logging.LogRecord) -> None:
            taken = self.own.acquire(timeout=60)
            self.free.append(taken)
            if len(self.free) == 1:
                signal.raise_signal(signal.SIGINT)
            self.own.release()

    handler, logger = Locks(), logging.getLogger("loopwright")
    logger.addHandler(handler)
    trainer = line_trainer(callbacks=[At(on_step_end=lambda state: logger.warning("something else"))])
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(some_batches(3), epochs=1)
    finally:
        logger.removeHandler(handler)
    assert handler.free == [True, True]
    assert [message.split()[0] for message in log.messages] == ["something", "Ctrl-C:"]


def test_fit_in_a_thread_saves_and_leaves_the_handlers_alone(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    seen: list[Any] = []

    def look(state: State, *_: object) -> None:
        seen.extend(signal.getsignal(number) for number in HANDLED)

    trainer = line_trainer(callbacks=[Checkpoint(tmp_path), At(on_batch_end=look)])
    thread = threading.Thread(target=lambda: trainer.fit(some_batches(1), epochs=1))
    thread.start()
    thread.join()
    assert seen == before
    assert latest_checkpoint(tmp_path) is not None


class Failing(Dataset[tuple[Tensor, Tensor]]):
    """Fails in a given way when it is asked for its sample number 7."""

    def __init__(self, way: str) -> None:
        self.way, self.samples = way, dataset(12)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 7:
            if self.way == "raises":
                raise ValueError("sample 7 is damaged")
            assert get_worker_info() is not None, "only a worker may die or hang here"
            if self.way == "dies":
                time.sleep(0.5)  # what it has sent before is received: torch raises a death in whatever batch it can
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        x, y = self.samples[index]
        return x, y


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize(
    ("way", "workers", "kind", "words"),
    [
        ("raises", 0, ValueError, "sample 7 is damaged"),
        ("raises", 1, ValueError, "sample 7 is damaged"),
        ("dies", 1, RuntimeError, "DataLoader worker"),
        ("hangs", 1, RuntimeError, "timed out"),
    ],
)
def test_a_loader_that_fails_is_named_with_its_epoch_and_batch(
    tmp_path: Path, way: str, workers: int, kind: type[Exception], words: str, saves: bool
) -> None:
    loader = DataLoader(Failing(way), batch_size=3, num_workers=workers, timeout=1.0 if way == "hangs" else 0)
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path)] if saves else [])
    with pytest.raises(kind, match=words) as caught:
        trainer.fit(loader, epochs=1)
    assert any("epoch 1, batch 3 of" in note and "samples 6, 7, 8" in note for note in caught.value.__notes__), (
        caught.value.__notes__
    )
    assert trainer.state.progress.batch == 2


def test_a_second_writer_is_refused_at_once_and_the_first_goes_on(
    children: Nursery, tmp_path: Path, unbroken: dict[int, dict[str, str]]
) -> None:
    first = children.start(signal_runs.lingers, str(tmp_path), "train", 0, output=tmp_path / "first.txt")
    until(tmp_path / "there")
    second = children.run(signal_runs.whole, str(tmp_path), 0, output=tmp_path / "second.txt")
    assert second == 1
    assert "LockedError: [locked]" in (tmp_path / "second.txt").read_text()
    (tmp_path / "go").touch()
    assert children.wait(first) == 0, (tmp_path / "first.txt").read_text()
    found = _result(tmp_path)
    assert [name for name, value in unbroken[0].items() if found[name] != value] == []


def test_a_run_goes_on_beside_the_workers_that_a_killed_one_has_left(children: Nursery, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    first = children.start(signal_runs.stuck, str(tmp_path), 1, output=output)
    until(tmp_path / "worker")
    until(tmp_path / "checkpoints" / "step-000000002")
    os.kill(first, signal.SIGKILL)
    assert children.wait(first) == -signal.SIGKILL
    worker = int((tmp_path / "worker").read_text())
    try:
        assert children.run(signal_runs.stuck, str(tmp_path), 0, output=output) == 0, output.read_text()
        os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)


def test_of_two_folders_of_which_one_is_in_use_neither_stays_locked(tmp_path: Path) -> None:
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")])
    (tmp_path / "b").mkdir()
    lock = FolderLock(tmp_path / "b")
    with pytest.raises(LockedError):
        trainer.fit(some_batches(2), epochs=1)
    lock.release()
    assert trainer.fit(some_batches(2), epochs=1).progress.step == 2


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_step_end", "on_eval_batch_end", "on_fit_end", "teardown"]
)
@pytest.mark.parametrize("error", [ValueError("planted"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_after_an_exception_in_a_hook_descriptors_threads_and_handlers_are_as_before(
    tmp_path: Path, hook: str, error: BaseException
) -> None:
    def fail(state: State, *_: object) -> None:
        raise error

    def own() -> tuple[Any, ...]:
        gc.collect()  # what earlier tests have left
        handlers = [signal.getsignal(number) for number in HANDLED]
        return len(os.listdir("/dev/fd")), threading.enumerate(), handlers

    hooks: dict[str, Any] = {hook: fail}
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path, every=Every(steps=1)), At(**hooks)])
    before = own()
    with pytest.raises(type(error)) as caught:
        trainer.fit(some_batches(3), some_batches(2), epochs=2)
    assert caught.value is error
    assert own() == before


def test_resumes_say_nothing_of_workers_that_end_as_they_should(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = DataLoader(dataset(12), batch_size=3, num_workers=1)
    with caplog.at_level(logging.WARNING):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(loader, epochs=1)
    assert caplog.records == []
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        ask = At(on_step_end=lambda state: signal.raise_signal(number))
        assert line_trainer(callbacks=[ask, Checkpoint(tmp_path)]).fit(some_batches(3), epochs=1).progress.step == 3
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("ending", [SystemExit(7), KeyboardInterrupt("mine")], ids=repr)
def test_a_handler_that_ends_the_process_does_so_after_the_batch_and_the_save(
    tmp_path: Path, ending: BaseException
) -> None:
    def handler(number: int, frame: object) -> None:
        raise ending

    before = signal.signal(signal.SIGTERM, handler)
    try:
        ask = At(on_backward_end=lambda state, output: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(type(ending)) as caught:
            line_trainer(callbacks=[ask, Checkpoint(tmp_path)]).fit(some_batches(3), epochs=1)
        assert caught.value is ending
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000001"]
    finally:
        signal.signal(signal.SIGTERM, before)
