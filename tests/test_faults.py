"""R10: whatever is raised, wherever, reaches the caller as it was, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import pickle
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import Unsized, all_equal, small_model, small_trainer, some_batches, weights_of
from loopwright import Callback, Every, Output, State, Trainer
from loopwright.callback import HOOKS
from loopwright.testing import HookRecorder


class Demanding(Exception):  # noqa: N818  # it is no name of a real error
    """An exception that cannot be made anew from its args."""

    def __init__(self, code: int, *, place: str) -> None:
        super().__init__(f"{code} at {place}")
        self.code = code


class Falsy(Exception):  # noqa: N818
    """An exception that is false where somebody asks for its truth."""

    def __bool__(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):  # noqa: N818
    """An exception that refuses every attribute that somebody sets."""

    sample: int


KINDS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("planted"),
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
    "StopIteration": lambda: StopIteration("planted"),
    "StopAsyncIteration": StopAsyncIteration,
    "GeneratorExit": GeneratorExit,
    "ExceptionGroup": lambda: ExceptionGroup("planted", [ValueError("one"), TypeError("two")]),
    "BaseExceptionGroup": lambda: BaseExceptionGroup("planted", [KeyboardInterrupt(), TypeError("two")]),
    "one with arguments that it needs": lambda: Demanding(7, place="here"),
    "one that is false": lambda: Falsy("planted"),
    "one that is frozen": lambda: Frozen(3),
}
IN_A_FIT = [hook for hook in HOOKS if hook != "on_exception"]
IN_AN_EVALUATION = ["setup", "on_eval_start", "on_eval_batch_end", "on_eval_end", "teardown"]


class Failing(HookRecorder):
    """Raises ``error`` in one hook, once, or as often as it is called."""

    def __init__(self, hook: str, error: BaseException, *, once: bool = True) -> None:
        super().__init__()
        self.hook, self.error, self.once = hook, error, once

    def record(self, hook: str, state: State) -> None:
        super().record(hook, state)
        if hook == self.hook:
            if self.once:
                self.hook = ""
            raise self.error


class Witness(HookRecorder):
    """Takes down its own calls, the errors it was told of, and the order in which several are torn down."""

    def __init__(self, name: str, torn_down: list[str]) -> None:
        super().__init__()
        self.name, self.torn_down = name, torn_down
        self.told: list[BaseException] = []

    def on_exception(self, state: State, error: BaseException) -> None:
        self.record("on_exception", state)
        self.told.append(error)

    def teardown(self, state: State) -> None:
        self.record("teardown", state)
        self.torn_down.append(self.name)


def raised_by(action: Callable[[], object]) -> BaseException:
    """What the action raises."""
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def named(error: BaseException) -> list[str]:
    """The notes of an error that name a callback."""
    return [note for note in getattr(error, "__notes__", []) if "in its hook" in note]


def fit(trainer: Trainer) -> object:
    return trainer.fit(some_batches(2), some_batches(1, seed=1), epochs=1)


def three(failing: Failing) -> tuple[Witness, Witness, list[str], Trainer]:
    """A trainer with a witness before the failing callback, and one after."""
    torn_down: list[str] = []
    before, after = Witness("before", torn_down), Witness("after", torn_down)
    return before, after, torn_down, small_trainer(before, failing, after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", IN_A_FIT)
def test_an_error_in_any_hook_reaches_the_caller_as_it_is_and_all_are_torn_down(hook: str, kind: str) -> None:
    planted = KINDS[kind]()
    args = planted.args
    before, after, torn_down, trainer = three(failing := Failing(hook, planted))
    caught = raised_by(lambda: fit(trainer))
    assert caught is planted
    assert caught.args == args
    assert caught.__cause__ is None
    assert caught.__context__ is None
    assert named(caught) == [f"raised by Failing in its hook {hook}"]

    set_up = [before] if hook == "setup" else [before, after]
    assert torn_down == [witness.name for witness in reversed(set_up)]
    assert failing.hooks.count("teardown") == (hook != "setup")
    for witness in set_up:
        assert witness.hooks.count("teardown") == 1
        assert witness.hooks[-1] == "teardown"
        # A teardown that fails after all went well has nobody left to tell.
        assert witness.told == ([] if hook == "teardown" else [planted])
    if hook == "setup":
        assert after.hooks == []


@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt", "StopIteration", "GeneratorExit"])
@pytest.mark.parametrize("hook", IN_AN_EVALUATION)
def test_an_error_in_any_hook_of_an_evaluation_reaches_the_caller_as_well(hook: str, kind: str) -> None:
    planted = KINDS[kind]()
    before, _, torn_down, trainer = three(Failing(hook, planted))
    assert raised_by(lambda: trainer.evaluate(some_batches(2))) is planted
    assert named(planted) == [f"raised by Failing in its hook {hook}"]
    assert torn_down == (["before"] if hook == "setup" else ["after", "before"])
    assert before.told == ([] if hook == "teardown" else [planted])
    assert trainer.state.stage == "train"
    assert trainer.state.model.training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["train", "val", "test", "predict"])
def test_an_error_in_the_step_reaches_the_caller_and_names_no_callback(where: str, kind: str) -> None:
    planted = KINDS[kind]()

    def step(model: nn.Module, batch: Any) -> Output:
        if where == "train" or not model.training:
            raise planted
        predictions = model(batch[0])
        return Output(predictions.mean(), predictions=predictions)

    torn_down: list[str] = []
    witness = Witness("one", torn_down)
    trainer = small_trainer(witness, step=step)
    calls: dict[str, Callable[[], object]] = {
        "train": lambda: fit(trainer),
        "val": lambda: fit(trainer),
        "test": lambda: trainer.evaluate(some_batches(2)),
        "predict": lambda: trainer.predict(some_batches(2)),
    }
    assert raised_by(calls[where]) is planted
    assert planted.__cause__ is planted.__context__ is None
    assert named(planted) == []
    assert torn_down == ([] if where == "predict" else ["one"])
    assert witness.told == ([] if where == "predict" else [planted])


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_loader_reaches_the_caller_unless_it_says_that_the_data_has_ended(kind: str) -> None:
    planted = KINDS[kind]()

    class Breaks:
        def __iter__(self) -> Iterator[Any]:
            return self.Iterator()

        class Iterator:
            left = 2

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> Any:
                if self.left == 0:
                    raise planted
                self.left -= 1
                return some_batches(1)[0]

    torn_down: list[str] = []
    trainer = small_trainer(Witness("one", torn_down))
    if isinstance(planted, StopIteration):  # here it is what it says
        assert trainer.fit(Breaks(), epochs=1).progress.step == 2
    else:
        assert raised_by(lambda: trainer.fit(Breaks(), epochs=1)) is planted
        assert planted.__cause__ is planted.__context__ is None
    assert torn_down == ["one"]


@pytest.mark.parametrize("where", ["step", *[hook for hook in IN_A_FIT if hook not in ("setup", "teardown")]])
@pytest.mark.parametrize("sized", [True, False])
def test_a_stop_iteration_never_ends_an_epoch_in_silence(where: str, sized: bool) -> None:
    planted = StopIteration()

    def step(model: nn.Module, batch: Any) -> Tensor:
        if where == "step":
            raise planted
        loss: Tensor = model(batch[0]).mean()
        return loss

    trainer = small_trainer(Failing(where, planted), step=step, accumulate=2)
    train = some_batches(3) if sized else Unsized(some_batches(3))
    assert raised_by(lambda: trainer.fit(train, Unsized(some_batches(1)), epochs=1)) is planted


# Errors while another error is on its way.


@pytest.mark.parametrize("second", ["on_exception", "teardown"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_further_error_neither_hides_the_first_nor_keeps_others_from_their_turn(
    second: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    further = KINDS[kind]()
    torn_down: list[str] = []
    first, last = Witness("first", torn_down), Witness("last", torn_down)
    planted = Falsy("planted")
    trainer = small_trainer(first, Failing(second, further), Failing("on_step_end", planted), last)
    with caplog.at_level(logging.ERROR, "loopwright"):
        assert raised_by(lambda: fit(trainer)) is planted
    assert torn_down == ["last", "first"]
    assert first.told == last.told == [planted]
    assert named(planted) == ["raised by Failing in its hook on_step_end"]
    assert any(f"Failing.{second}" in note and repr(further) in note for note in planted.__notes__)
    [record] = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is further


def test_every_teardown_may_raise_and_the_caller_gets_the_first_error_of_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = [Falsy("one"), KeyboardInterrupt(), Falsy("three")]
    failing = [Failing("teardown", error) for error in errors]
    assert raised_by(lambda: fit(small_trainer(*failing))) is errors[2]  # the last in the list is the first torn down
    assert all(callback.hooks.count("teardown") == 1 for callback in failing)
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [errors[1], errors[0]]


def test_a_set_up_that_fails_half_way_tears_down_what_was_set_up_even_if_that_fails_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    planted, torn_down = ValueError("planted"), list[str]()
    first, second, third = (Witness(name, torn_down) for name in ("first", "second", "third"))
    broken = Failing("teardown", RuntimeError("further"))
    trainer = small_trainer(first, broken, second, Failing("setup", planted), third)
    assert raised_by(lambda: fit(trainer)) is planted
    assert torn_down == ["second", "first"]
    assert broken.hooks == ["setup", "on_exception", "teardown"]
    assert third.hooks == []
    assert "further" in caplog.text


def test_an_error_raised_again_by_every_hook_that_follows_is_still_the_one_error() -> None:
    planted = ValueError("planted")

    class Stubborn(Callback):
        def on_step_end(self, state: State) -> None:
            raise planted

        def on_exception(self, state: State, error: BaseException) -> None:
            raise error

        def teardown(self, state: State) -> None:
            raise planted

    assert raised_by(lambda: fit(small_trainer(Stubborn()))) is planted
    assert planted.__context__ is None


def test_an_error_that_a_hook_has_handled_itself_is_nobodys_business() -> None:
    class Handles(Callback):
        def on_step_end(self, state: State) -> None:
            try:
                raise StopIteration
            except StopIteration:
                self.handled = True

    trainer = small_trainer(handles := Handles(), witness := Witness("one", []))
    fit(trainer)
    assert handles.handled
    assert witness.told == []


def test_the_note_names_the_outermost_hook_of_the_callback_where_hooks_call_one_another() -> None:
    class Inner(Callback):
        def on_step_end(self, state: State) -> None:
            raise ValueError("planted")

    class Outer(Callback):
        def __init__(self) -> None:
            self.inner = Inner()

        def on_batch_end(self, state: State, output: Output) -> None:
            self.inner.on_step_end(state)

    error = raised_by(lambda: fit(small_trainer(Outer())))
    assert [note.split("by ")[1] for note in named(error)] == [f"{Outer.__qualname__} in its hook on_batch_end"]


def test_the_note_tells_two_callbacks_of_different_classes_apart() -> None:
    class One(Failing): ...

    class Two(Failing): ...

    trainer = small_trainer(One("", KeyError()), Two("on_step_end", KeyError()))
    assert named(raised_by(lambda: fit(trainer))) == [f"raised by {Two.__qualname__} in its hook on_step_end"]
    trainer = small_trainer(One("on_step_end", KeyError()), Two("", KeyError()))
    assert named(raised_by(lambda: fit(trainer))) == [f"raised by {One.__qualname__} in its hook on_step_end"]


# What is put back.


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, as it imports its compiler
@pytest.mark.parametrize("hook", IN_A_FIT)
@pytest.mark.parametrize("gradients", [True, False])
def test_modes_gradient_mode_determinism_and_compilation_are_put_back_whatever_hook_raises(
    hook: str, gradients: bool
) -> None:
    model = small_model()
    trainer = small_trainer(
        Failing(hook, GeneratorExit()),
        model=model,
        deterministic=True,
        compile=hook in ("setup", "on_fit_start", "on_epoch_start", "on_batch_start"),  # nothing is compiled by then
    )
    flags = modes(model)
    assert len(set(flags)) == 2
    with torch.set_grad_enabled(gradients):
        assert isinstance(raised_by(lambda: fit(trainer)), GeneratorExit)
        assert torch.is_grad_enabled() == gradients
    assert modes(model) == flags
    assert not torch.are_deterministic_algorithms_enabled()
    assert model._compiled_call_impl is None
    assert not torch.is_autocast_enabled("cpu")
    assert trainer.state.stage == "train"


@pytest.mark.parametrize("where", ["train", "val", "test", "predict"])
def test_everything_is_put_back_after_a_step_that_raises(where: str) -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        if where == "train" or not model.training:
            torch.set_grad_enabled(not torch.is_grad_enabled())
            raise KeyboardInterrupt
        loss: Tensor = model(batch[0]).mean()
        return loss

    model = small_model()
    trainer = small_trainer(model=model, step=step, deterministic=True, precision="bf16")
    flags = modes(model)
    calls: dict[str, Callable[[], object]] = {
        "train": lambda: fit(trainer),
        "val": lambda: fit(trainer),
        "test": lambda: trainer.evaluate(some_batches(1)),
        "predict": lambda: trainer.predict(some_batches(1)),
    }
    assert isinstance(raised_by(calls[where]), KeyboardInterrupt)
    assert torch.is_grad_enabled()
    assert modes(model) == flags
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_fit_called_without_gradients_trains_all_the_same_and_leaves_them_off() -> None:
    trainer, plain = small_trainer(seed=0), small_trainer(seed=0)
    with torch.no_grad():
        fit(trainer)
        assert not torch.is_grad_enabled()
    fit(plain)
    assert all_equal(weights_of(trainer), weights_of(plain))


def test_a_deterministic_setting_of_the_users_own_is_kept() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for deterministic in (True, False):
            with pytest.raises(KeyError):
                fit(small_trainer(Failing("on_step_end", KeyError()), deterministic=deterministic))
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_metric_that_raises_in_a_validation_leaves_modes_and_gradients_as_they_were() -> None:
    class Broken:
        def update(self, predictions: Any, targets: Any) -> None: ...

        def compute(self) -> float:
            raise StopIteration

        def reset(self) -> None: ...

    model = small_model()
    trainer, flags = small_trainer(model=model, metrics={"broken": Broken()}), modes(model)
    assert isinstance(raised_by(lambda: fit(trainer)), StopIteration)
    assert modes(model) == flags
    assert torch.is_grad_enabled()


def test_the_workers_of_a_loader_are_gone_as_soon_as_the_error_is_caught() -> None:
    loader = DataLoader(TensorDataset(*some_batches(1, size=8)[0]), batch_size=2, num_workers=2)
    trainer = small_trainer(Failing("on_eval_batch_end", ValueError("planted")))
    with pytest.raises(ValueError, match="planted") as caught:
        trainer.fit(loader, loader, epochs=1, validate=Every(steps=1))
    assert multiprocessing.active_children() == []
    assert caught.value.__traceback__ is not None  # it was still held above


def test_a_loader_that_raises_while_an_epoch_is_found_again_leaves_the_generators_where_they_were() -> None:
    class Breaks(Unsized):
        broken = False

        def __iter__(self) -> Iterator[Any]:
            for index, batch in enumerate(super().__iter__()):
                torch.rand(1), random.random(), np.random.rand()
                if self.broken and index == 1:
                    raise OSError("the disk is away")
                yield batch

    trainer, train = small_trainer(), Breaks(some_batches(5))
    trainer.fit(train, steps=3)
    torch.rand(7)
    before = (torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state()))
    train.broken = True
    with pytest.raises(OSError, match="the disk"):
        trainer.fit(train, steps=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]


# What comes after.


@pytest.mark.parametrize("hook", IN_A_FIT)
def test_a_fit_after_a_failed_one_finishes_the_run(hook: str) -> None:
    trainer = small_trainer(Failing(hook, ValueError("planted")), recorder := HookRecorder(), seed=0)
    assert isinstance(raised_by(lambda: fit(trainer)), ValueError)
    recorder.calls.clear()
    result = trainer.fit(some_batches(3), some_batches(2, seed=1), epochs=3)
    assert recorder.hooks[0] == "setup"
    assert recorder.hooks[-2:] == ["on_fit_end", "teardown"]
    assert result.stop_reason == "epochs"
    assert result.progress.epoch == 3
    assert result.progress.batch == 0
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert all({"train/loss", "val/loss"} <= row.keys() for row in result.history)
    assert all(parameter.isfinite().all() for parameter in trainer.state.model.parameters())


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_epoch_start", "on_batch_start"])
def test_a_run_that_failed_before_its_first_batch_begins_as_a_fresh_one(hook: str) -> None:
    unbroken = small_trainer(seed=3)
    history = fit_shuffled(unbroken)
    trainer = small_trainer(Failing(hook, ValueError("planted")), seed=3)
    assert isinstance(raised_by(lambda: fit_shuffled(trainer)), ValueError)
    assert fit_shuffled(trainer) == history
    assert all_equal(weights_of(trainer), weights_of(unbroken))


def fit_shuffled(trainer: Trainer) -> list[dict[str, float]]:
    loader = DataLoader(TensorDataset(*some_batches(1, size=6)[0]), batch_size=2, shuffle=True)
    return trainer.fit(loader, some_batches(1), epochs=2).history


@pytest.mark.parametrize("hook", ["on_eval_start", "on_eval_batch_end", "on_eval_end", "on_epoch_end", "on_fit_end"])
def test_a_run_that_failed_after_an_epochs_last_step_goes_on_to_the_weights_and_history_of_an_unbroken_one(
    hook: str,
) -> None:
    unbroken = small_trainer(seed=3)
    history = fit_shuffled(unbroken)
    trainer = small_trainer(Failing(hook, ValueError("planted")), seed=3)
    assert isinstance(raised_by(lambda: fit_shuffled(trainer)), ValueError)
    assert fit_shuffled(trainer) == history
    assert all_equal(weights_of(trainer), weights_of(unbroken))


@pytest.mark.parametrize("every", [Every(epochs=1), Every(steps=3)])
def test_a_validation_that_failed_is_made_up_for_by_a_later_fit_with_a_target_in_steps(every: Every) -> None:
    trainer = small_trainer(Failing("on_eval_batch_end", ValueError("planted")), recorder := HookRecorder())
    train, val = Unsized(some_batches(3)), some_batches(2, seed=1)
    assert isinstance(raised_by(lambda: trainer.fit(train, val, steps=5, validate=every)), ValueError)
    recorder.calls.clear()
    result = trainer.fit(train, val, steps=5, validate=every)
    assert result.progress.step == 5
    assert recorder.hooks.index("on_eval_start") < recorder.hooks.index("on_batch_start")
    assert "val/loss" in result.history[0]


def test_a_validation_that_failed_is_forgotten_by_a_fit_that_has_no_data_for_it() -> None:
    bad = False

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0]).square().mean()
        return loss * float("nan") if bad else loss

    failing = Failing("on_eval_start", ValueError("planted"))
    trainer = small_trainer(failing, step=step, on_nonfinite="skip", accumulate=2)
    train = Unsized(some_batches(3))
    assert isinstance(raised_by(lambda: trainer.fit(train, train, steps=1, validate=Every(steps=1))), ValueError)
    bad = True
    assert trainer.fit(train, epochs=1).progress.skipped == 1
    assert failing.hooks.count("on_eval_start") == 1


@pytest.mark.parametrize("call", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("hook", ["on_batch_start", "on_backward_end", "on_batch_end", "on_before_step"])
@pytest.mark.parametrize("sized", [True, False])
def test_a_window_that_an_error_left_open_is_begun_again_so_that_no_batch_is_lost(
    hook: str, call: int, sized: bool
) -> None:
    """Whatever the place of the error, each batch ends up in exactly one optimizer step."""
    seen: list[int] = []
    windows: list[list[int]] = []

    class Fails(HookRecorder):
        def record(self, hook_: str, state: State) -> None:
            super().record(hook_, state)
            if hook_ == hook and self.hooks.count(hook) == call:
                raise ValueError("planted")

    class Windows(Callback):
        def on_fit_start(self, state: State) -> None:
            seen.clear()

        def on_step_end(self, state: State) -> None:
            windows.append(list(seen))
            seen.clear()

    def step(model: nn.Module, batch: Any) -> Tensor:
        number, (inputs, _) = batch
        seen.append(number)
        loss: Tensor = model(inputs).square().mean()
        return loss

    def size(model: nn.Module, batch: Any) -> Output:
        return Output(step(model, batch), weight=len(batch[1][0]))

    numbered = list(enumerate(some_batches(7)))
    trainer = small_trainer(Windows(), Fails(), step=size, accumulate=3)
    train = numbered if sized else Unsized(numbered)
    failed = None if hook == "on_before_step" and call > 3 else raised_by(lambda: trainer.fit(train, epochs=1))
    result = trainer.fit(train, epochs=1)
    assert failed is None or isinstance(failed, ValueError)
    assert windows == [[0, 1, 2], [3, 4, 5], [6]]
    assert result.progress.samples == 14
    assert result.history[0]["step"] == 3


def test_an_evaluation_and_a_prediction_work_after_a_failed_fit() -> None:
    trainer = small_trainer(Failing("on_backward_end", ValueError("planted")))
    assert isinstance(raised_by(lambda: fit(trainer)), ValueError)
    assert set(trainer.evaluate(some_batches(1))) == {"test/loss"}
    assert len(trainer.predict(some_batches(2))) == 2


def test_a_call_from_within_a_hook_is_refused_and_does_not_unlock_the_trainer() -> None:
    class Calls(Callback):
        def on_step_end(self, state: State) -> None:
            for call in (lambda: trainer.evaluate(some_batches(1)), lambda: trainer.predict(some_batches(1))):
                with pytest.raises(ValueError, match="at work"):
                    call()
            with pytest.raises(ValueError, match="at work"):
                fit(trainer)

    trainer = small_trainer(Calls())
    fit(trainer)
    assert trainer.state.progress.step == 2


def test_the_message_of_an_error_is_printed_once_and_its_notes_below() -> None:
    planted = Demanding(7, place="here")
    text = "".join(traceback.format_exception(raised_by(lambda: fit(small_trainer(Failing("on_step_end", planted))))))
    assert text.count("7 at here") == 1
    assert text.rstrip().endswith("raised by Failing in its hook on_step_end")
    assert "During handling" not in text


def test_an_error_does_not_lose_what_it_carries() -> None:
    @dataclasses.dataclass
    class Carrying(Exception):  # noqa: N818
        data: list[int]

    planted = Carrying([1, 2])
    planted.add_note("the user's own note")
    caught = raised_by(lambda: fit(small_trainer(Failing("on_step_end", planted))))
    assert caught is planted
    assert planted.data == [1, 2]
    assert planted.__notes__[0] == "the user's own note"
