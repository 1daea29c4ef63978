"""A later fit goes on as the same run, wherever and however the earlier one ended."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from helpers import At, Outcome, StopsIn, Unsized, all_equal, assert_same_run, small_trainer, some_batches, weights_of
from loopwright import Callback, Every, Output, Schedule, State, Trainer
from loopwright.callback import HOOKS
from loopwright.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor
from small_problems import PROBLEMS, RARER, generator_of, loss_of, make_loader, make_optimizer, samples

Target = dict[str, Any]  # epochs= and steps= of a fit

KINDS = ["shuffled", "own generator", "list", "without length", "weighted sampler", "augmented", "iterable dataset"]
KINDS += [kind for kind in RARER if "workers" not in kind]


def run(
    kind: str,
    targets: Iterable[Target],
    *,
    validate: Every = Every(epochs=1),  # noqa: B008
    count: int = 14,
    callbacks: Iterable[Callback[Any]] = (),
    **how: Any,
) -> Outcome:
    """A run in these parts."""
    torch.manual_seed(2)
    model = PROBLEMS["dropout"]()
    optimizer = make_optimizer("adam", model)
    train = make_loader(kind, samples("dropout", count))
    val = make_loader("shuffled", samples("dropout", 6))
    if how.pop("one_cycle", False):
        how["schedule"] = Schedule(OneCycleLR(optimizer, max_lr=0.1, total_steps=12), each="step")
    callbacks = [LearningRateMonitor(), *callbacks]
    trainer = Trainer(model, optimizer, loss_of("dropout"), callbacks=callbacks, seed=5, device="cpu", **how)
    for target in targets:
        with contextlib.suppress(SystemExit):
            result = trainer.fit(train, val, validate=validate, **target)
    own = generator_of(train)
    return Outcome(weights_of(trainer), result, [torch.get_rng_state(), *([] if own is None else [own.get_state()])])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_parts_of_steps_and_epochs_is_the_unbroken_run_bit_for_bit(kind: str) -> None:
    unbroken = run(kind, [{"epochs": 3}])
    assert_same_run(run(kind, [{"steps": 1}, {"steps": 3}, {"epochs": 1}, {"epochs": 3}]), unbroken)


@pytest.mark.parametrize("kind", [*KINDS[:6], "subset", "sampler with its own generator"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["steps", "stop", "signal", "signal at the target"])
def test_a_run_left_with_the_last_batch_of_an_epoch_of_full_batches_is_the_unbroken_one(
    kind: str, way: str, accumulate: int, tmp_path: Path
) -> None:
    end = math.ceil(3 / accumulate)

    def leave(state: State, output: Output) -> None:
        if state.progress.step == end and state.progress.batch == 3:
            if way.startswith("signal"):
                signal.raise_signal(signal.SIGTERM)
            if way == "stop":
                state.stop("enough")

    callbacks: list[Callback[Any]] = [At(on_batch_end=leave)]
    callbacks += [Checkpoint(tmp_path / "checkpoints")] if way.startswith("signal") else []
    first = {"steps": end} if way in ("steps", "signal at the target") else {"epochs": 3}
    parts: list[Target] = [first, {"epochs": 3}]
    if way == "signal at the target":  # and gone on with elsewhere
        run(kind, [first, first], count=12, callbacks=callbacks, accumulate=accumulate)
        parts[0] = {**first, "resume": "auto"}
    left = run(kind, parts, count=12, callbacks=callbacks, accumulate=accumulate)
    unbroken = run(kind, [{"epochs": 3}], count=12, callbacks=[At(on_batch_end=lambda *_: None)], accumulate=accumulate)
    assert_same_run(left, unbroken)


@pytest.mark.parametrize("kind", ["two workers", "two workers, augmented", "persistent workers"])
def test_a_run_in_parts_is_the_unbroken_one_with_workers_too(kind: str) -> None:
    assert_same_run(run(kind, [{"steps": 2}, {"steps": 6}, {"epochs": 2}]), run(kind, [{"epochs": 2}]))


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "without length", "augmented"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_run_in_parts_is_the_unbroken_one_under_accumulation_and_validations_by_steps(
    kind: str, accumulate: int
) -> None:
    how: dict[str, Any] = {"accumulate": accumulate, "validate": Every(steps=2)}
    parts = [{"steps": steps} for steps in range(1, 7)]
    assert_same_run(run(kind, parts, **how), run(kind, [{"steps": 6}], **how))


@pytest.mark.parametrize(
    "how",
    [
        {"precision": "bf16"},
        {"precision": "fp16", "accumulate": 2},
        {"clip_norm": 0.1, "one_cycle": True},
        {"on_nonfinite": "skip"},
    ],
)
def test_a_run_in_parts_is_the_unbroken_one_under_other_settings(how: dict[str, Any]) -> None:
    parts = [{"steps": 1}, {"steps": 3}, {"steps": 6}]
    assert_same_run(run("shuffled", parts, **how), run("shuffled", [{"steps": 6}], **how))


def test_a_run_in_parts_is_the_unbroken_one_at_the_cadence_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_read_each_step", False)
    assert_same_run(run("shuffled", [{"steps": 3}, {"epochs": 3}]), run("shuffled", [{"epochs": 3}]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["shuffled", "own generator", "with replacement", "without length", "augmented"]),
    accumulate=st.integers(1, 3),
    every=st.one_of(st.builds(lambda n: Every(steps=n), st.integers(1, 4)), st.just(Every(epochs=2))),
    stops=st.lists(st.integers(1, 11), max_size=5).map(sorted),
)
def test_whatever_its_parts_a_run_is_the_unbroken_one(
    kind: str, accumulate: int, every: Every, stops: list[int]
) -> None:
    how: dict[str, Any] = {"accumulate": accumulate, "validate": every}
    parts = [{"steps": steps} for steps in stops]
    assert_same_run(run(kind, [*parts, {"steps": 12}], **how), run(kind, [{"steps": 12}], **how))


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ("on_exception", "on_fit_end", "teardown")])
@pytest.mark.parametrize("sized", [True, False])
def test_a_run_stopped_in_any_hook_goes_on_as_the_unbroken_one(hook: str, sized: bool) -> None:
    def whole(*stops: StopsIn) -> Outcome:
        trainer = small_trainer(*stops, accumulate=2, seed=1)
        data = some_batches(5) if sized else Unsized(some_batches(5))
        for _ in range(len(stops) + 1):
            result = trainer.fit(data, some_batches(2), epochs=2)
        return Outcome(weights_of(trainer), result)

    assert_same_run(whole(StopsIn(hook)), whole())


@pytest.mark.parametrize("hook", ["on_step_end", "on_batch_end", "on_eval_batch_end", "on_eval_end", "on_epoch_end"])
@pytest.mark.parametrize("way", ["Ctrl-C", "error"])
@pytest.mark.parametrize("target", [{"steps": 6}, {"steps": 5}, {"epochs": 2}], ids=str)
def test_the_same_fit_again_makes_up_for_what_was_broken_off_at_its_target(target: Target, way: str, hook: str) -> None:
    def outcome(*, broken_off: bool) -> tuple[list[dict[str, float]], list[Tensor]]:
        done: list[int] = []

        def breaks(state: State, *rest: Any) -> None:
            if broken_off and not done and state.progress.step == target.get("steps", 6):
                done.append(state.progress.step)
                if way == "error":
                    raise ZeroDivisionError
                signal.raise_signal(signal.SIGINT)

        stopping = EarlyStopping("train/loss", mode="min", patience=9, restore_best=True)
        trainer = small_trainer(stopping, At(**{hook: breaks}), seed=1)
        with contextlib.suppress(KeyboardInterrupt, ZeroDivisionError):
            trainer.fit(some_batches(3), some_batches(2), **target)
        if broken_off and done:
            trainer.fit(some_batches(3), some_batches(2), **target)
        again = trainer.fit(some_batches(3), some_batches(2), **target)  # there is nothing left
        return again.history, weights_of(trainer)

    (rows, weights), (again, gone_on_with) = outcome(broken_off=False), outcome(broken_off=True)
    assert [list(row.items()) for row in again] == [list(row.items()) for row in rows]
    assert all_equal(gone_on_with, weights)


def test_an_iterator_is_gone_on_with_where_it_was_left() -> None:
    seen: list[int] = []

    def endless() -> Iterator[Any]:
        number = 0
        while True:
            yield number, some_batches(1, seed=number)[0]
            number += 1

    def step(model: nn.Module, batch: Any) -> Tensor:
        number, (inputs, _) = batch
        seen.append(number)
        loss: Tensor = model(inputs).square().mean()
        return loss

    trainer, data = small_trainer(step=step), endless()
    trainer.fit(data, steps=3)
    trainer.fit(data, steps=5)
    assert seen == [0, 1, 2, 3, 4]


def test_an_evaluation_and_a_prediction_between_two_fits_change_neither_history_nor_bits() -> None:
    def whole(between: Callable[[Trainer], object]) -> Outcome:
        trainer = small_trainer(LearningRateMonitor(), seed=1)
        trainer.fit(some_batches(3), some_batches(1), steps=4)
        between(trainer)
        result = trainer.fit(some_batches(3), some_batches(1), epochs=3)
        return Outcome(weights_of(trainer), result)

    def look(trainer: Trainer) -> None:
        trainer.evaluate(some_batches(2))
        trainer.evaluate(some_batches(2), name="val")
        trainer.evaluate(some_batches(2), name="train")
        trainer.predict(some_batches(2))

    assert_same_run(whole(look), whole(lambda trainer: None))
