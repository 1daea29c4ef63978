"""When a run ends, and why: orders to stop, and targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import StopsIn, Unsized, all_equal, small_trainer, some_batches, weights_of
from loopwright import Callback, ConfigError, Every, Result, State
from loopwright.callback import HOOKS
from loopwright.testing import HookRecorder

Target = dict[str, Any]  # epochs= and steps= of a fit


def place(result: Result) -> tuple[int, int, int]:
    progress = result.progress
    return progress.epoch, progress.batch, progress.step


# state.stop

FIVE_BY_TWO = {
    "setup": (0, 0, 0),
    "on_fit_start": (0, 0, 0),
    "on_epoch_start": (0, 0, 0),
    "on_batch_start": (0, 2, 1),
    "on_backward_end": (0, 2, 1),
    "on_batch_end": (0, 2, 1),
    "on_before_step": (0, 2, 1),
    "on_step_end": (0, 2, 1),
    "on_eval_start": (1, 0, 3),
    "on_eval_batch_end": (1, 0, 3),
    "on_eval_end": (1, 0, 3),
    "on_epoch_end": (1, 0, 3),
    "on_fit_end": (2, 0, 6),
    "teardown": (2, 0, 6),
}


@pytest.mark.parametrize("hook", FIVE_BY_TWO)
def test_a_stop_in_any_hook_takes_effect_after_the_current_optimizer_step(hook: str) -> None:
    stops = StopsIn(hook)
    result = small_trainer(stops, accumulate=2).fit(some_batches(5), some_batches(2), epochs=2)
    assert place(result) == FIVE_BY_TWO[hook]
    assert result.stop_reason == ("epochs" if hook in ("on_fit_end", "teardown") else "enough")
    assert stops.hooks[-2:] == ["on_fit_end", "teardown"]


def test_every_hook_but_that_for_errors_is_among_those() -> None:
    assert set(FIVE_BY_TWO) == set(HOOKS) - {"on_exception"}


@pytest.mark.parametrize("hook", ["on_eval_start", "on_eval_batch_end", "on_eval_end"])
def test_a_stop_in_a_validation_by_steps_lets_the_pass_be_finished_and_then_ends_the_run(hook: str) -> None:
    stops = StopsIn(hook)
    result = small_trainer(stops).fit(some_batches(5), some_batches(3), epochs=2, validate=Every(steps=2))
    assert place(result) == (0, 2, 2)
    assert stops.hooks.count("on_eval_batch_end") == 3
    assert "on_epoch_end" not in stops.hooks
    assert "val/loss" in result.history[-1]


@pytest.mark.parametrize("sized", [True, False])
def test_a_stop_in_a_short_window_takes_effect_after_its_step(sized: bool) -> None:
    data = some_batches(5) if sized else Unsized(some_batches(5))
    stops = StopsIn("on_batch_start", 5)
    result = small_trainer(stops, accumulate=2).fit(data, epochs=2)
    assert place(result) == (1, 0, 3)
    assert stops.hooks.count("on_epoch_end") == 1


def test_a_stop_in_an_epochs_last_batch_ends_the_epoch_where_the_length_says_that_it_is_the_last() -> None:
    sized = small_trainer(StopsIn("on_batch_end", 3)).fit(some_batches(3), epochs=2)
    assert place(sized) == (1, 0, 3)
    unsized = small_trainer(StopsIn("on_batch_end", 3)).fit(Unsized(some_batches(3)), epochs=2)
    assert place(unsized) == (0, 3, 3)


def test_a_stop_in_a_window_that_is_skipped_takes_effect_at_the_end_of_that_window() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0]).mean()
        return loss * math.nan

    trainer = small_trainer(StopsIn("on_batch_start", 3), step=step, on_nonfinite="skip", accumulate=2)
    result = trainer.fit(some_batches(6), epochs=1)
    assert place(result) == (0, 4, 0)
    assert result.progress.skipped == 2


def test_a_partial_epoch_gets_a_row_but_neither_an_epochs_end_nor_a_count() -> None:
    stops = StopsIn("on_step_end", 5)
    result = small_trainer(stops).fit(some_batches(3), epochs=4)
    assert stops.hooks.count("on_epoch_end") == 1
    assert [(row["epoch"], row["step"]) for row in result.history] == [(1, 3), (2, 5)]
    assert place(result) == (1, 2, 5)


def test_a_stop_before_the_first_batch_leaves_no_row() -> None:
    assert small_trainer(StopsIn("on_epoch_start")).fit(some_batches(3), epochs=1).history == []


def test_the_first_reason_to_stop_stands() -> None:
    callbacks = [StopsIn("on_step_end", 2, "first"), StopsIn("on_step_end", 2, "second")]
    assert small_trainer(*callbacks).fit(some_batches(3), epochs=1).stop_reason == "first"


def test_a_callbacks_words_stand_also_where_a_target_is_reached_in_the_same_step() -> None:
    assert small_trainer(StopsIn("on_step_end", 3)).fit(some_batches(3), epochs=1).stop_reason == "enough"


@pytest.mark.parametrize("reason", ["", None, 3, True, b"words", ["words"]])
def test_a_reason_to_stop_is_words(reason: Any) -> None:
    class Stops(Callback):
        def on_step_end(self, state: State) -> None:
            state.stop(reason)

    with pytest.raises(ConfigError, match="must be words"):
        small_trainer(Stops()).fit(some_batches(3), epochs=1)


@pytest.mark.parametrize("hook", ["on_step_end", "on_fit_end", "teardown"])
def test_an_old_order_to_stop_does_not_reach_the_next_fit(hook: str) -> None:
    trainer = small_trainer(StopsIn(hook, 1))
    trainer.fit(some_batches(3), epochs=1)
    result = trainer.fit(some_batches(3), epochs=2)
    assert place(result) == (2, 0, 6)
    assert result.stop_reason == "epochs"


def test_an_order_to_stop_that_was_given_in_an_evaluation_does_not_reach_the_next_fit() -> None:
    trainer = small_trainer(StopsIn("on_eval_end"))
    assert "test/loss" in trainer.evaluate(some_batches(2))
    assert trainer.fit(some_batches(3), epochs=1).stop_reason == "epochs"


# Targets


@pytest.mark.parametrize(
    ("targets", "reason", "expected"),
    [
        ({"epochs": 2}, "epochs", (2, 0, 6)),
        ({"steps": 4}, "steps", (1, 1, 4)),
        ({"steps": 6}, "steps", (2, 0, 6)),
        ({"epochs": 2, "steps": 100}, "epochs", (2, 0, 6)),
        ({"epochs": 100, "steps": 4}, "steps", (1, 1, 4)),
    ],
)
def test_the_first_target_reached_ends_the_run(targets: Target, reason: str, expected: tuple[int, int, int]) -> None:
    result = small_trainer().fit(some_batches(3), **targets)
    assert result.stop_reason == reason
    assert place(result) == expected


def test_targets_are_absolute() -> None:
    trainer = small_trainer(recorder := HookRecorder())
    targets: list[Target] = [{"epochs": 1}, {"steps": 5}, {"epochs": 3}]
    places = [place(trainer.fit(some_batches(3), **target)) for target in targets]
    assert places == [(1, 0, 3), (1, 2, 5), (3, 0, 9)]
    assert recorder.hooks.count("on_step_end") == 9
    assert recorder.hooks.count("on_epoch_end") == 3


def test_a_target_in_steps_counts_optimizer_steps_and_not_batches() -> None:
    result = small_trainer(accumulate=3).fit(some_batches(7), steps=4)
    assert place(result) == (1, 3, 4)  # windows of 3, 3 and 1, and one of the next epoch


@pytest.mark.parametrize(
    "targets", [{"epochs": 2}, {"epochs": 1}, {"steps": 6}, {"steps": 1}, {"epochs": 9, "steps": 2}]
)
def test_a_fit_with_nothing_left_to_do_returns_at_once(targets: Target, caplog: pytest.LogCaptureFixture) -> None:
    class Untouchable:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("it was iterated over")

    trainer = small_trainer(recorder := HookRecorder(), seed=1)
    first = trainer.fit(some_batches(3), epochs=2)
    recorder.calls.clear()
    trainer.state.model.eval()
    before, random_state = weights_of(trainer), torch.get_rng_state()
    with caplog.at_level(logging.INFO, "loopwright"):
        again = trainer.fit(Untouchable(), Untouchable(), **targets)
    assert again.history == first.history
    assert again.progress == first.progress
    assert again.stop_reason == ("epochs" if targets.get("epochs", 9) <= 2 else "steps")
    assert recorder.hooks == []
    assert not trainer.state.model.training
    assert all_equal(before, weights_of(trainer))
    assert torch.equal(random_state, torch.get_rng_state())
    assert "nothing to train" in caplog.text


def test_what_fit_has_returned_does_not_change_any_more() -> None:
    trainer = small_trainer()
    first = trainer.fit(some_batches(3), steps=2)
    kept = [dict(row) for row in first.history], place(first)
    first.history[0]["mine"] = 1.0
    second = trainer.fit(some_batches(3), epochs=3)
    assert [{k: v for k, v in row.items() if k != "mine"} for row in first.history] == kept[0]
    assert place(first) == kept[1]
    assert all("mine" not in row for row in second.history)
