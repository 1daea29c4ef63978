"""Which hooks fire, in which order, and what is valid in each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import unittest
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from helpers import Unsized, all_equal, gradients_of, sgd, small_trainer, some_batches
from loopwright import Callback, Every, Output, State, Trainer
from loopwright.callback import HOOKS
from loopwright.callbacks import ProgressBar
from loopwright.hook_names import ELSEWHERE
from loopwright.testing import HookRecorder

# A line for each batch or moment. The docs page "exactly what one epoch does" is made from these.
ORDER: dict[str, str] = {
    "two epochs of two batches": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_epoch_end
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "five batches accumulated by two": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "three batches of unknown number accumulated by two, a validation every two steps": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_batch_end
        on_before_step on_step_end
        on_eval_start
        on_eval_batch_end
        on_eval_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "a validation of two batches every epoch": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_eval_start
        on_eval_batch_end
        on_eval_batch_end
        on_eval_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "two epochs of three batches, a validation every two steps": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_eval_start
        on_eval_batch_end
        on_eval_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_epoch_end
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_eval_start
        on_eval_batch_end
        on_eval_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_eval_start
        on_eval_batch_end
        on_eval_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "the second loss is NaN and skipped": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "the second gradient is infinite and skipped": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "LBFGS evaluates each batch three times": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_backward_end on_backward_end on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_backward_end on_backward_end on_step_end on_batch_end
        on_epoch_end
        on_fit_end
        teardown
    """,
    "a stop in the first of three batches accumulated by two": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_fit_end
        teardown
    """,
    "an exception in the second on_step_end": """
        setup
        on_fit_start
        on_epoch_start
        on_batch_start on_backward_end on_before_step on_step_end on_batch_end
        on_batch_start on_backward_end on_before_step on_step_end
        on_exception
        teardown
    """,
    "evaluate over two batches": """
        setup
        on_eval_start
        on_eval_batch_end
        on_eval_batch_end
        on_eval_end
        teardown
    """,
    "predict": "",
}


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    # An evaluation at the start, and one after each of its iterations but the last.
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, tolerance_grad=0.0, tolerance_change=0.0)


def second_is_bad(what: Literal["loss", "gradient"]) -> Callable[[nn.Module, Any], Tensor]:
    """A step whose second loss is NaN, or has gradients that are infinite."""
    seen = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        loss: Tensor = model(batch[0]).square().mean()
        if len(seen) != 2:
            return loss
        if what == "loss":
            return loss * math.nan
        return loss + (loss - loss.detach()).sqrt()  # the slope of the root at zero is infinite

    return step


class Stops(Callback):
    def on_batch_start(self, state: State, batch: Any) -> None:
        state.stop("enough")


class RaisesInSecondStep(Callback):
    def on_step_end(self, state: State) -> None:
        if state.progress.step == 2:
            raise ValueError("planted")


def run(case: str, recorder: HookRecorder) -> None:
    two, three = some_batches(2), some_batches(3)
    match case:
        case "two epochs of two batches":
            small_trainer(recorder).fit(two, epochs=2)
        case "five batches accumulated by two":
            small_trainer(recorder, accumulate=2).fit(some_batches(5), epochs=1)
        case "three batches of unknown number accumulated by two, a validation every two steps":
            small_trainer(recorder, accumulate=2).fit(Unsized(three), two[:1], epochs=1, validate=Every(steps=2))
        case "a validation of two batches every epoch":
            small_trainer(recorder).fit(two, two, epochs=1)
        case "two epochs of three batches, a validation every two steps":
            small_trainer(recorder).fit(three, two[:1], epochs=2, validate=Every(steps=2))
        case "the second loss is NaN and skipped":
            small_trainer(recorder, step=second_is_bad("loss"), on_nonfinite="skip").fit(three, epochs=1)
        case "the second gradient is infinite and skipped":
            small_trainer(recorder, step=second_is_bad("gradient"), on_nonfinite="skip").fit(three, epochs=1)
        case "LBFGS evaluates each batch three times":
            small_trainer(recorder, optimizer=lbfgs).fit(two, epochs=1)
        case "a stop in the first of three batches accumulated by two":
            small_trainer(recorder, Stops(), accumulate=2).fit(three, epochs=1)
        case "an exception in the second on_step_end":
            with pytest.raises(ValueError, match="planted"):
                small_trainer(recorder, RaisesInSecondStep()).fit(three, epochs=1)
        case "evaluate over two batches":
            small_trainer(recorder).evaluate(two)
        case "predict":
            small_trainer(recorder).predict(two)
        case _:
            raise AssertionError(f"nobody runs {case!r}")


@pytest.mark.parametrize("case", ORDER)
def test_the_hooks_fire_in_this_order_where_there_are(case: str) -> None:
    recorder = HookRecorder()
    run(case, recorder)
    assert recorder.hooks == ORDER[case].split()


def test_there_are_these_hooks() -> None:
    assert HOOKS == (
        "setup",
        "on_fit_start",
        "on_epoch_start",
        "on_batch_start",
        "on_backward_end",
        "on_before_step",
        "on_step_end",
        "on_batch_end",
        "on_eval_start",
        "on_eval_batch_end",
        "on_eval_end",
        "on_epoch_end",
        "on_fit_end",
        "on_exception",
        "teardown",
    )


def test_callbacks_are_called_in_the_lists_order_and_torn_down_in_reverse() -> None:
    calls: list[str] = []

    class Named(HookRecorder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def record(self, hook: str, state: State) -> None:
            calls.append(f"{hook} {self.name}")

    small_trainer(Named("a"), Named("b"), Named("c")).fit(some_batches(1), epochs=1)
    expected = [f"{hook} {name}" for hook in ORDER["two epochs of two batches"].split()[:8] for name in "abc"]
    assert calls[: 3 * 8] == expected
    assert calls[-3:] == ["teardown c", "teardown b", "teardown a"]


def test_a_bar_is_called_after_the_others_at_an_epochs_end_and_explain_shows_it_so() -> None:
    calls: list[str] = []

    class Bar(ProgressBar):
        def _print_epoch(self, state: State) -> None:
            calls.append("bar")

    class Named(Callback):
        def on_epoch_end(self, state: State) -> None:
            calls.append("other")

    trainer = small_trainer(Bar(), Named())
    trainer.fit(some_batches(1), epochs=1)
    assert calls == ["other", "bar"]
    shown = " ".join(trainer.explain(callbacks=True).replace("#", " ").split())
    assert re.search(r"on_epoch_end: \S+\.Named, \S+\.Bar\b", shown)


def test_the_counters_in_hooks_are_these() -> None:
    seen: list[str] = []

    class Counters(HookRecorder):
        def record(self, hook: str, state: State) -> None:
            p = state.progress
            seen.append(f"{hook} {state.stage}: epoch {p.epoch}, batch {p.batch}, step {p.step}, samples {p.samples}")

    trainer = small_trainer(Counters(), accumulate=2)
    trainer.fit(some_batches(3, size=2), some_batches(1), epochs=1)
    assert seen == [
        "setup train: epoch 0, batch 0, step 0, samples 0",
        "on_fit_start train: epoch 0, batch 0, step 0, samples 0",
        "on_epoch_start train: epoch 0, batch 0, step 0, samples 0",
        "on_batch_start train: epoch 0, batch 0, step 0, samples 0",
        "on_backward_end train: epoch 0, batch 0, step 0, samples 0",
        "on_batch_end train: epoch 0, batch 1, step 0, samples 2",
        "on_batch_start train: epoch 0, batch 1, step 0, samples 2",
        "on_backward_end train: epoch 0, batch 1, step 0, samples 2",
        "on_before_step train: epoch 0, batch 1, step 0, samples 2",
        "on_step_end train: epoch 0, batch 1, step 1, samples 2",
        "on_batch_end train: epoch 0, batch 2, step 1, samples 4",
        "on_batch_start train: epoch 0, batch 2, step 1, samples 4",
        "on_backward_end train: epoch 0, batch 2, step 1, samples 4",
        "on_before_step train: epoch 0, batch 2, step 1, samples 4",
        "on_step_end train: epoch 0, batch 2, step 2, samples 4",
        "on_batch_end train: epoch 0, batch 3, step 2, samples 6",
        "on_eval_start val: epoch 0, batch 3, step 2, samples 6",
        "on_eval_batch_end val: epoch 0, batch 3, step 2, samples 6",
        "on_eval_end val: epoch 0, batch 3, step 2, samples 6",
        "on_epoch_end train: epoch 1, batch 0, step 2, samples 6",
        "on_fit_end train: epoch 1, batch 0, step 2, samples 6",
        "teardown train: epoch 1, batch 0, step 2, samples 6",
    ]
    seen.clear()
    trainer.evaluate(some_batches(1), name="holdout")
    assert [line.split(":")[0] for line in seen] == [
        "setup test",
        "on_eval_start test",
        "on_eval_batch_end test",
        "on_eval_end test",
        "teardown test",
    ]
    assert trainer.state.stage == "train"


def test_the_metrics_of_the_epoch_are_there_in_the_hooks_that_promise_them() -> None:
    seen: dict[str, set[str]] = {}

    class Names(HookRecorder):
        def record(self, hook: str, state: State) -> None:
            seen.setdefault(hook, set(state.metrics))

    small_trainer(Names()).fit(some_batches(2), some_batches(1), epochs=1)
    assert seen["on_batch_start"] == set()
    assert seen["on_batch_end"] == {"train/loss"}
    assert seen["on_eval_start"] == {"train/loss"}
    assert seen["on_eval_end"] == seen["on_epoch_end"] == seen["on_fit_end"] == {"train/loss", "val/loss"}


def test_the_model_is_in_eval_mode_and_without_gradients_exactly_in_the_hooks_of_an_evaluation() -> None:
    seen: set[tuple[str, bool, bool]] = set()

    class Modes(HookRecorder):
        def record(self, hook: str, state: State) -> None:
            if hook.startswith("on_"):
                seen.add((hook, state.model.training, torch.is_grad_enabled()))

    small_trainer(Modes()).fit(some_batches(1), some_batches(1), epochs=1)
    expected = {hook for hook in ORDER["a validation of two batches every epoch"].split() if hook.startswith("on_")}
    assert seen == {(hook, "eval" not in hook, "eval" not in hook) for hook in expected}


# What is bound, and when.


def test_a_hook_that_one_callback_overrides_is_called_by_the_loop_itself() -> None:
    callers: list[str] = []

    class Caller(Callback):
        def on_step_end(self, state: State) -> None:
            frame = inspect.currentframe()
            assert frame is not None
            assert frame.f_back is not None
            callers.append(Path(frame.f_back.f_code.co_filename).name)

    class Idle(Callback):
        def on_batch_end(self, state: State, output: Output) -> None: ...

    small_trainer(Idle(), Caller(), Idle()).fit(some_batches(2), epochs=1)
    assert callers == ["trainer.py", "trainer.py"]


def test_hooks_are_looked_up_once_when_the_call_begins() -> None:
    lookups: list[str] = []

    class Watched(HookRecorder):
        def __getattribute__(self, name: str) -> Any:
            if name in HOOKS:
                lookups.append(name)
            return super().__getattribute__(name)

    small_trainer(Watched()).fit(some_batches(5), some_batches(2), epochs=3)
    in_the_loop = [name for name in lookups if name not in ("setup", "teardown", "on_exception")]
    assert sorted(in_the_loop) == sorted(set(HOOKS) - {"setup", "teardown", "on_exception"})


def test_a_hook_replaced_in_mid_run_counts_from_the_next_fit_on() -> None:
    class Replaced(Callback):
        calls = 0

        def on_step_end(self, state: State) -> None:
            def other(state: State) -> None:
                self.calls += 1

            self.__dict__["on_step_end"] = other

    callback = Replaced()
    trainer = small_trainer(callback)
    trainer.fit(some_batches(3), epochs=1)
    assert callback.calls == 0
    trainer.fit(some_batches(3), epochs=2)
    assert callback.calls == 3


def test_hooks_may_be_any_callable_and_errors_in_them_name_the_hook() -> None:
    class Odd(Callback):
        def say(self, words: str, state: State) -> None:
            seen.append(words)

        on_fit_start = functools.partialmethod(say, "partial")
        on_epoch_end = lambda self, state: seen.append("lambda")  # noqa: E731

        @staticmethod
        def on_epoch_start(state: State) -> None:
            seen.append("static")

        @torch.no_grad()
        def on_step_end(self, state: State) -> None:
            raise ValueError("planted")

    seen: list[Any] = []
    odd = Odd()
    odd.__dict__["on_batch_start"] = lambda state, batch: seen.append("instance")
    with pytest.raises(ValueError, match="planted") as caught:
        small_trainer(odd).fit(some_batches(1), epochs=1)
    assert seen == ["partial", "static", "instance"]
    assert "Odd in its hook on_step_end" in "\n".join(caught.value.__notes__)


# What a class may not look like.


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_epoch_ends", "on_epoch_end"),
        ("on_epcoh_start", "on_epoch_start"),
        ("on_batch_begin", "on_batch_start"),  # as other libraries say
        ("on_epoch_begin", "on_epoch_start"),
        ("on_step_finished", "on_step_end"),
        ("on_fit_ended", "on_fit_end"),
        ("on_before_optimizer_step", "on_before_step"),
        ("on_eval_batch_ends", "on_eval_batch_end"),
        ("on_exceptions", "on_exception"),
        ("on_backward", "on_backward_end"),
        ("on_train_batch_end", "on_batch_end"),
        ("on_train_epoch_end", "on_epoch_end"),
        ("on_validation_end", "on_eval_end"),
        ("on_test_end", "on_eval_end"),
        ("on_step_begin", "on_batch_start"),
        ("on_save_checkpoint", "state_dict"),
    ],
)
def test_a_misspelt_hook_is_a_type_error_at_class_creation_that_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"Typo\.{wrong} is not a hook[\s\S]*did you mean '{right}'"):
        type("Typo", (Callback,), {wrong: lambda self, state: None})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("tear_down", "teardown"),
        ("setUp", "setup"),
        ("tearDown", "teardown"),
        ("Setup", "setup"),
        ("onEpochEnd", "on_epoch_end"),
        ("onfit_start", "on_fit_start"),
    ],
)
def test_a_hooks_name_in_other_letters_is_a_type_error_at_class_creation(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"Typo\.{wrong} is not a hook[\s\S]*did you mean '{right}'"):
        type("Typo", (Callback,), {wrong: lambda self, state: None})


class Widget:
    """A base that is no callback, whose methods have its own meanings."""

    opened = 0

    def set_up(self) -> None:
        self.opened += 1

    def on_click(self, x: int, y: int) -> None: ...


def test_the_methods_of_a_base_that_is_no_callback_are_its_own() -> None:
    class Probe(Callback, unittest.TestCase): ...

    class Shown(Widget, Callback):
        def set_up(self) -> None:
            super().set_up()

        def setup(self, state: State) -> None:
            self.set_up()

    class Overrides(Callback, unittest.TestCase):
        opened = 0

        def setUp(self) -> None:
            self.opened += 1

    class Derived(Overrides): ...

    shown, derived = Shown(), Derived()
    small_trainer(Probe(), shown, derived).fit(some_batches(1), epochs=1)
    assert (shown.opened, derived.opened) == (1, 0)


class Quiet(Callback): ...


@pytest.mark.parametrize("bases", [(Callback, unittest.TestCase), (Widget, Quiet), (Quiet, Widget)])
@pytest.mark.parametrize("wrong", ["on_epoch_ends", "tear_down", "onEpochEnd"])
def test_a_misspelling_beside_such_a_base_is_a_type_error_too(wrong: str, bases: tuple[type, ...]) -> None:
    with pytest.raises(TypeError, match=rf"Typo\.{wrong} is not a hook[\s\S]*did you mean"):
        type("Typo", bases, {wrong: lambda self, state: None})


def test_what_others_call_each_hook_is_one_of_ours_and_none_of_their_names_is() -> None:
    assert set(ELSEWHERE.values()) <= {*HOOKS, "state_dict", "load_state_dict"}
    assert not ELSEWHERE.keys() & set(HOOKS)
    for name, ours in ELSEWHERE.items():
        with pytest.raises(TypeError, match=rf"did you mean '{ours}'\?"):
            type("Elsewhere", (Callback,), {name: lambda self, state: None})


def test_a_hook_for_predictions_is_answered_with_there_being_none() -> None:
    with pytest.raises(TypeError, match="predict calls no hook"):
        type("Predicts", (Callback,), {"on_predict_batch_end": lambda self, state: None})


def test_helpers_of_the_users_own_are_free() -> None:
    class Fine(Callback):
        SETUP = "no method"

        class Setup: ...

        def setup_model(self) -> None: ...
        def _setup(self) -> None: ...
        def _tear_down(self) -> None: ...
        def once(self) -> None: ...
        def epoch_end(self) -> None: ...

    class Template(Callback):
        def on_epoch_end(self, state: State) -> None:
            self._on_epoch_end(state)

        def _on_epoch_end(self, state: State) -> None: ...

    class OfTemplate(Template):
        def _on_epoch_end(self, state: State) -> None: ...

    small_trainer(Fine(), OfTemplate()).fit(some_batches(1), epochs=1)


def test_a_subclass_of_a_callback_is_checked_as_well() -> None:
    with pytest.raises(TypeError, match="did you mean 'on_step_end'"):

        class Typo(HookRecorder):
            def on_step_ended(self, state: State) -> None: ...


@pytest.mark.parametrize(
    ("hook", "method"),
    [
        ("on_batch_end", lambda self, state: None),
        ("on_epoch_end", lambda self: None),
        ("on_step_end", lambda self, state, output: None),
        ("on_step_end", lambda self, state, *, verbose: None),
        ("on_exception", lambda self, state: None),
        ("setup", lambda self: None),
        ("teardown", lambda self, state, error: None),
        ("on_batch_start", lambda: None),
    ],
)
def test_a_hook_that_the_loop_cannot_call_is_a_type_error_that_shows_the_right_signature(
    hook: str, method: Callable[..., None]
) -> None:
    declared = ", ".join(inspect.signature(getattr(Callback, hook)).parameters)
    with pytest.raises(TypeError, match=rf"Wrong\.{hook} cannot be called[\s\S]*def {hook}\({declared}\)"):
        type("Wrong", (Callback,), {hook: method})


def test_a_hook_that_would_never_run_because_it_is_a_coroutine_or_a_generator_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="on_step_end"):

        class Coroutine(Callback):
            async def on_step_end(self, state: State) -> None: ...  # type: ignore[override]  # the wrong use under test

    with pytest.raises(TypeError, match="on_epoch_end"):

        class Generator(Callback):
            def on_epoch_end(self, state: State) -> Any:
                yield


def test_hooks_may_take_more_than_they_are_given_and_methods_of_other_names_are_free() -> None:
    class Fine(Callback):
        on_device = "cpu"  # no method

        def on_batch_end(self, *args: Any, **kwargs: Any) -> None: ...
        def on_step_end(self, state: State, verbose: bool = False) -> None: ...
        def epoch_ended(self) -> None: ...

    small_trainer(Fine()).fit(some_batches(1), epochs=1)


# What callbacks are given.


@dataclasses.dataclass
class Predicted:
    values: Tensor
    note: str


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_tensor_of_an_output_is_detached_and_its_loss_is_the_steps_own(accumulate: int) -> None:
    own: list[float] = []
    seen: list[tuple[str, float]] = []

    def step(model: nn.Module, batch: Any) -> Output:
        with torch.enable_grad():
            values = model(batch[0])
            loss = nn.functional.mse_loss(values, batch[1])
        own.append(loss.item())
        predictions = {"all": [Predicted(values, "kept")], "pair": (values, None)}
        return Output(loss, len(values), predictions, batch[1], {"spread": values.std()})

    class Checks(Callback):
        def check(self, hook: str, output: Output) -> None:
            predicted = output.predictions["all"][0]
            tensors = [output.loss, predicted.values, output.predictions["pair"][0], output.metrics["spread"]]
            assert not any(isinstance(x, Tensor) and (x.requires_grad or x.grad_fn is not None) for x in tensors)
            assert predicted.note == "kept"
            seen.append((hook, output.loss.item()))

        def on_backward_end(self, state: State, output: Output) -> None:
            self.check("backward", output)

        def on_batch_end(self, state: State, output: Output) -> None:
            self.check("batch", output)

        def on_eval_batch_end(self, state: State, output: Output) -> None:
            self.check("eval", output)

    small_trainer(Checks(), step=step, accumulate=accumulate).fit(some_batches(3), some_batches(1), epochs=1)
    hooks = ["backward", "batch"] * 3 + ["eval"]
    assert seen == list(zip(hooks, [own[0]] * 2 + [own[1]] * 2 + [own[2]] * 2 + [own[3]], strict=True))


def test_an_output_of_the_users_own_class_stays_one_and_is_detached_as_well() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Output):
        hidden: Tensor | None = None

    def step(model: nn.Module, batch: Any) -> Output:
        hidden = model(batch[0])
        return Mine(hidden.mean(), hidden=hidden)

    class Checks(Callback):
        def on_batch_end(self, state: State, output: Output) -> None:
            assert isinstance(output, Mine)
            assert output.hidden is not None
            assert not output.hidden.requires_grad
            assert not output.loss.requires_grad

    small_trainer(Checks(), step=step).fit(some_batches(1), epochs=1)


def test_the_predictions_may_be_a_mapping_that_refuses_to_be_updated() -> None:
    class Named(OrderedDict[str, Tensor]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    def step(model: nn.Module, batch: Any) -> Output:
        values = model(batch[0])
        named = Named()
        named["values"] = values
        return Output(values.mean(), predictions=named)

    class Checks(Callback):
        def on_batch_end(self, state: State, output: Output) -> None:
            assert type(output.predictions) is Named
            assert not output.predictions["values"].requires_grad

    small_trainer(Checks(), step=step).fit(some_batches(2), epochs=1)


def test_an_output_is_frozen() -> None:
    output = Output(torch.ones(()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.loss = torch.zeros(())  # type: ignore[misc]  # the wrong use under test


def test_on_batch_start_gets_the_very_batch_that_the_step_gets() -> None:
    given: list[Any] = []

    class Keeps(Callback):
        def on_batch_start(self, state: State, batch: Any) -> None:
            given.append(batch)

    def step(model: nn.Module, batch: Any) -> Tensor:
        assert batch is given[-1]
        loss: Tensor = model(batch[0]).mean()
        return loss

    small_trainer(Keeps(), step=step).fit(some_batches(2), epochs=1)
    assert len(given) == 2


# Which gradients and weights are valid where.


class Snapshots(HookRecorder):
    """Gradients and weights at every hook of training."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[tuple[str, list[Tensor]]] = []
        self.weights: list[tuple[str, list[Tensor]]] = []

    def record(self, hook: str, state: State) -> None:
        if hook in ("on_batch_start", "on_backward_end", "on_before_step", "on_step_end", "on_batch_end"):
            there = all(parameter.grad is not None for parameter in state.model.parameters())
            self.gradients.append((hook, gradients_of(state.model) if there else []))
            self.weights.append((hook, [p.detach().clone() for p in state.model.parameters()]))

    def at(self, hook: str) -> list[list[Tensor]]:
        return [gradients for name, gradients in self.gradients if name == hook]


def plain_gradients(model: nn.Module, batches: list[Any], count: int) -> list[Tensor]:
    """The gradients of ``count`` batches' part in a window, made by hand."""
    model.zero_grad()
    for inputs, targets in batches:
        (nn.functional.mse_loss(model(inputs), targets) / count).backward()  # type: ignore[no-untyped-call]  # torch's
    return gradients_of(model)


def test_gradients_stay_from_one_step_until_the_next_window_begins() -> None:
    snapshots = Snapshots()
    small_trainer(snapshots, model=nn.Linear(3, 1)).fit(some_batches(3), epochs=1)
    starts, steps, ends = snapshots.at("on_batch_start"), snapshots.at("on_step_end"), snapshots.at("on_batch_end")
    assert starts[0] == []
    for made, ended, next_start in zip(steps, ends, starts[1:], strict=False):
        assert all_equal(made, ended)
        assert all_equal(made, next_start)
        assert any(gradient.any() for gradient in made)


def test_the_gradients_of_a_window_grow_from_backward_to_backward() -> None:
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    batches, snapshots = some_batches(4), Snapshots()
    twin = nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    small_trainer(snapshots, model=model, accumulate=4).fit(batches, epochs=1)
    for done, gradients in enumerate(snapshots.at("on_backward_end"), start=1):
        assert all_equal(gradients, plain_gradients(twin, batches[:done], 4))
    assert all_equal(snapshots.at("on_before_step")[0], plain_gradients(twin, batches, 4))
    for before, after in zip(snapshots.at("on_batch_end"), snapshots.at("on_batch_start")[1:], strict=False):
        assert all_equal(before, after)


def test_on_before_step_sees_gradients_before_clipping_and_on_step_end_those_that_made_the_step() -> None:
    torch.manual_seed(3)
    model, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    batches, snapshots = some_batches(2), Snapshots()
    small_trainer(snapshots, model=model, accumulate=2, clip_norm=1e-3).fit(batches, epochs=1)
    unclipped = plain_gradients(twin, batches, 2)
    assert all_equal(snapshots.at("on_before_step")[0], unclipped)
    nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
    clipped = gradients_of(twin)
    assert not all_equal(clipped, unclipped)
    assert all_equal(snapshots.at("on_step_end")[0], clipped)
    assert all_equal(snapshots.at("on_batch_end")[-1], clipped)
    assert all_equal(gradients_of(model), clipped)


def test_on_before_step_sees_the_average_over_a_short_window_of_unknown_length() -> None:
    torch.manual_seed(3)
    model, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    batches, snapshots = some_batches(2), Snapshots()
    small_trainer(snapshots, model=model, accumulate=4).fit(Unsized(batches), epochs=1)
    assert [hook for hook, _ in snapshots.gradients][-2:] == ["on_before_step", "on_step_end"]
    for made, expected in zip(snapshots.at("on_before_step")[0], plain_gradients(twin, batches, 2), strict=True):
        torch.testing.assert_close(made, expected)


def test_on_before_step_sees_unscaled_gradients_under_fp16_and_on_backward_end_scaled_ones() -> None:
    snapshots = Snapshots()
    model = nn.Linear(3, 1, bias=False)
    trainer = small_trainer(snapshots, model=model, precision="fp16")
    trainer.fit([(x / 8, y / 8) for x, y in some_batches(1)], epochs=1)  # for which the first scale is not too large
    assert trainer.state.progress.step == 1
    ratios = {
        (scaled / unscaled).item()
        for scaled, unscaled in zip(
            torch.cat([g.flatten() for g in snapshots.at("on_backward_end")[0]]),
            torch.cat([g.flatten() for g in snapshots.at("on_before_step")[0]]),
            strict=True,
        )
    }
    assert ratios == {65536.0}


def test_weights_are_new_from_on_step_end_on() -> None:
    snapshots = Snapshots()
    small_trainer(snapshots, model=nn.Linear(3, 1)).fit(some_batches(1), epochs=1)
    start, backward, before, stepped, end = (weights for _, weights in snapshots.weights)
    assert all_equal(start, backward)
    assert all_equal(start, before)
    assert not all_equal(before, stepped)
    assert all_equal(stepped, end)


def test_setup_sees_the_model_on_its_device_and_the_state_that_the_trainer_has() -> None:
    states: list[State] = []

    class Keeps(Callback):
        def setup(self, state: State) -> None:
            assert {p.device for p in state.model.parameters()} == {state.device}
            states.append(state)

    model = nn.Linear(3, 1)
    trainer = Trainer(model, sgd(model.parameters()), nn.MSELoss(), callbacks=[Keeps()], device="cpu")
    trainer.fit(some_batches(1), epochs=1)
    trainer.evaluate(some_batches(1))
    assert states == [trainer.state, trainer.state]
    assert trainer.state.model is model


def test_every_hook_stands_in_one_of_the_orders() -> None:
    assert {name for order in ORDER.values() for name in order.split()} == set(HOOKS)


class InstanceOnly:
    """An attribute that may be read on an instance only."""

    def __get__(self, made: object, owner: type) -> object:
        if made is None:
            raise AttributeError("instance only")
        return made


def test_attributes_whose_names_are_like_no_hooks_are_not_read_when_a_class_is_created() -> None:
    class WithFolder(Callback):
        folder = InstanceOnly()

    callback = WithFolder()
    assert callback.folder is callback


def test_a_name_with_an_underscore_before_it_is_the_users_own() -> None:
    class Shares(Callback):
        def on_eval_end(self, state: State) -> None:
            self._on_fit_end(state)

        def _on_fit_end(self, state: State) -> None: ...

    assert Shares.on_fit_end is Callback.on_fit_end
