"""Every built-in callback, and the recorder itself, keeps the contract that loopwright.testing checks."""

import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwright.callbacks
from loopwright import Callback, Output, State
from loopwright.callback import after_the_others
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
        ("state", r"state_dict\(\).set: set is not plain data"),
    ],
)
def test_a_callback_that_meddles_fails_the_contract(what: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_callback(lambda: _Mischief(what))


class _Late(Callback[Any]):
    """Meddles where the last probe of a list has been called already, or is not called at all."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _meddle(self, state: State) -> None:
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1)
                parameter.grad = None
        state.model.train(not state.model.training)
        torch.rand(1)

    def on_epoch_end(self, state: State) -> None:
        if self.where == "an epoch's end":
            self._meddle(state)

    def on_eval_end(self, state: State) -> None:
        if self.where == "an evaluation" and state.stage == "test":
            torch.rand(1)

    def on_exception(self, state: State, error: BaseException) -> None:
        if self.where == "on_exception":
            self._meddle(state)

    def teardown(self, state: State) -> None:
        if self.where == "teardown" or (self.where == "a failing teardown" and state.progress.step == 1):
            self._meddle(state)

    def state_dict(self) -> dict[str, Any]:
        if self.where == "state_dict":
            torch.rand(1)
        return {}


class _LastOfAll(_Late):
    on_epoch_end = after_the_others(_Late.on_epoch_end)


ALL = "gradients, modes, torch's random state, weights"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _Late("teardown"), r"by teardown \(call \d+\) it has changed: " + ALL),
        (lambda: _Late("a failing teardown"), r"by teardown \(call \d+\) it has changed: " + ALL),
        (lambda: _Late("on_exception"), r"by on_exception \(call \d+\) it has changed: " + ALL),
        (lambda: _Late("an evaluation"), r"by on_eval_end \(call \d+\) it has changed: torch's random state"),
        (lambda: _LastOfAll("an epoch's end"), r"by on_epoch_end \(call \d+\) it has changed: " + ALL),
        (lambda: _Late("state_dict"), r"between on_fit_end and teardown \(call \d+\) it has changed: torch's random"),
    ],
)
def test_what_is_changed_in_the_last_hooks_is_found_in_the_hook_that_did_it(make: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_callback(make)


class _BestAndMore(EarlyStopping):
    """Has its best weights put back by the loop, which is no harm, and then changes them."""

    harm = False

    @torch.no_grad()
    def teardown(self, state: State) -> None:
        if self.harm:
            next(state.model.parameters()).add_(1)


class _BestAndHarm(_BestAndMore):
    harm = True


def test_weights_that_the_loop_puts_back_are_told_from_those_that_a_teardown_changes() -> None:
    check_callback(lambda: _BestAndMore("val/loss", mode="max", restore_best=True))
    with pytest.raises(AssertionError, match=r"by teardown \(call \d+\) it has changed: weights"):
        check_callback(lambda: _BestAndHarm("val/loss", mode="max", restore_best=True))


class _Notes(Callback[Any]):
    def on_exception(self, state: State, error: BaseException) -> None:
        error.add_note(f"_Notes saw it at step {state.progress.step}")


class _Touches(Callback[Any]):
    def __init__(self, what: str) -> None:
        self.what = what

    def on_exception(self, state: State, error: BaseException) -> None:
        if self.what == "args":
            error.args = ("other words",)
        elif self.what == "cause":
            error.__cause__ = ValueError()
        elif self.what == "attributes":
            error.step = 1  # type: ignore[attr-defined]  # it has none
        elif self.what == "traceback":
            error.__traceback__ = None
        else:
            raise ValueError


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("args", "it has changed another callback's error: args"),
        ("cause", "it has changed another callback's error: __cause__"),
        ("attributes", "it has changed another callback's error: attributes"),
        ("traceback", "it has taken the traceback from another callback's error"),
        ("itself", "it failed as well"),
    ],
)
def test_an_error_of_another_that_is_not_the_same_afterwards_fails_the_contract(what: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_callback(lambda: _Touches(what))


def test_an_error_of_another_may_get_a_note() -> None:
    check_callback(_Notes)


class _Counts(Callback[Any]):
    """Counts steps, and logs the number or stops at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.last = last
        self.steps = 0

    def on_step_end(self, state: State) -> None:
        self.steps += 1
        if self.steps == self.last:
            state.stop(f"{self.last} steps are enough")

    def on_epoch_end(self, state: State) -> None:
        state.log("n", self.steps)


class _Remembers(_Counts):
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (None, "checkpoint of step 1, n of epoch 1 is 1.0, and 2.0 in one"),
        (3, "checkpoint of step 1, result.progress.epoch is 2, and 1 in one"),
    ],
)
def test_a_count_that_begins_again_at_a_resume_fails_the_contract(last: int | None, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_callback(lambda: _Counts(last))


@pytest.mark.parametrize("last", [None, 1, 2, 3, 4])
def test_a_count_that_goes_on_keeps_the_contract_wherever_it_stops(last: int | None) -> None:
    check_callback(lambda: _Remembers(last))


class _Clock(Callback[Any]):
    def on_epoch_end(self, state: State) -> None:
        state.log("seconds", time.perf_counter())


def test_a_time_that_is_logged_is_no_harm() -> None:
    check_callback(_Clock)


class _StopsAt(Callback[Any]):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_fit_start(self, state: State) -> None:
        if self.hook == "on_fit_start":
            state.stop("enough")

    def on_epoch_start(self, state: State) -> None:
        if self.hook == "on_epoch_start":
            state.stop("enough")

    def on_step_end(self, state: State) -> None:
        if self.hook == "on_step_end":
            state.stop("enough")

    def on_eval_end(self, state: State) -> None:
        if self.hook == "on_eval_end" and state.stage == "val":
            state.stop("enough")


@pytest.mark.parametrize("hook", ["on_fit_start", "on_epoch_start", "on_step_end", "on_eval_end"])
def test_a_callback_may_stop_the_run_anywhere(hook: str) -> None:
    check_callback(lambda: _StopsAt(hook))


class _StopsAndMeddles(_StopsAt):
    @torch.no_grad()
    def on_fit_end(self, state: State) -> None:
        next(state.model.parameters()).add_(1)


def test_what_is_changed_after_a_stop_is_found_too() -> None:
    with pytest.raises(AssertionError, match=r"by on_fit_end \(call \d+\) it has changed: weights"):
        check_callback(lambda: _StopsAndMeddles("on_step_end"))


class _Holds(Callback[Any]):
    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


KEPT = {
    "keys": {0.5: 1, None: 2, True: 3, "x": 4, 7: 5},
    "nan": [math.nan, torch.tensor([math.nan, 1.0])],
    "sparse": torch.eye(2).to_sparse(),
    "empty": torch.empty(0),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_checkpoint_keeps_may_be_in_a_state(name: str) -> None:
    check_callback(lambda: _Holds({name: KEPT[name]}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({(1, 2): 3}, "a key must be a str, an int, a float, a bool or None"),
        (OrderedDict(), "OrderedDict is not plain data"),
        (torch.nn.Linear(1, 1), "Linear is not plain data"),
    ],
)
def test_what_no_checkpoint_keeps_is_named_with_its_path(value: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=r"state_dict\(\)\.held.*" + words):
        check_callback(lambda: _Holds({"held": value}))


class _Locked(Callback[Any]):
    def setup(self, state: State) -> None:
        self.lock = threading.Lock()


class _Named(Callback[Any]):
    def __init__(self) -> None:
        self.function = lambda: 1


def _local() -> Callback[Any]:
    class Local(Callback[Any]):
        pass

    return Local()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_Locked, "after a fit it cannot be pickled: its attribute 'lock' cannot .*lock.* let go of it in teardown"),
        (_Named, "before a fit it cannot be pickled: its attribute 'function' cannot .*lambda"),
        (_local, "before a fit it cannot be pickled: its class has to stand at the top of a module"),
    ],
)
def test_what_cannot_be_pickled_is_answered_with_what_is_in_the_way(make: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_callback(make)


class _LeavesThread(Callback[Any]):
    """Lets a thread run on, which ends once ``over`` is set."""

    over = threading.Event()

    def setup(self, state: State) -> None:
        threading.Thread(target=self.over.wait, name="left behind", daemon=True).start()


def test_a_thread_that_is_left_fails_the_contract() -> None:
    try:
        with pytest.raises(AssertionError, match=r"it leaves threads running: .*left behind"):
            check_callback(_LeavesThread)
    finally:
        _LeavesThread.over.set()


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
