"""A OneCycleLR that ends before the run does is refused where that is certain, and explained where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from helpers import Unsized, some_batches
from loopwright import Callback, ConfigError, Schedule, State, Trainer
from loopwright.callbacks import Checkpoint
from loopwright.state import Plan, Progress

Each = Literal["step", "epoch"]


def one_cycle(total: int, each: Each = "step", **how: Any) -> tuple[Trainer, OneCycleLR]:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=Schedule(scheduler, each=each), device="cpu", **how)
    return trainer, scheduler


def notes(error: BaseException) -> list[str]:
    return [note for note in error.__notes__ if "total_steps" in note]


@pytest.mark.parametrize(
    ("each", "targets", "accumulate", "moves", "noun"),
    [
        ("step", {"epochs": 2}, 1, 8, "optimizer step"),
        ("step", {"epochs": 3}, 3, 6, "optimizer step"),
        ("step", {"epochs": 9, "steps": 5}, 1, 5, "optimizer step"),
        ("epoch", {"epochs": 5}, 1, 5, "epoch"),
        ("epoch", {"steps": 22}, 1, 5, "epoch"),
    ],
)
def test_a_schedule_that_is_too_short_is_refused_before_the_first_step_with_both_numbers(
    each: Each, targets: dict[str, Any], accumulate: int, moves: int, noun: str
) -> None:
    trainer, _ = one_cycle(4, each, accumulate=accumulate)
    with pytest.raises(ConfigError) as caught:
        trainer.fit(some_batches(4), **targets)
    assert str(caught.value) == (
        f"[config] OneCycleLR has total_steps=4, and this fit is to move it {moves} times\n"
        f'  why: with each="{each}" it moves after each {noun}, and torch raises at a move past its end\n'
        f"  fix: OneCycleLR(optimizer, ..., total_steps={moves})"
    )
    assert trainer.state.progress.fresh
    trainer, scheduler = one_cycle(moves, each, accumulate=accumulate)
    trainer.fit(some_batches(4), **targets)
    assert scheduler.last_epoch == moves


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    each=st.sampled_from(["step", "epoch"]),
    batches=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    sized=st.booleans(),
    first=st.integers(0, 7),
    epochs=st.none() | st.integers(1, 3),
    steps=st.none() | st.integers(1, 9),
)
def test_what_is_refused_would_have_failed_and_where_the_length_is_known_all_that_would_have_is(
    each: Each, batches: int, accumulate: int, sized: bool, first: int, epochs: int | None, steps: int | None
) -> None:
    if epochs is None and steps is None:
        epochs = 2
    data: Any = some_batches(batches) if sized else Unsized(some_batches(batches))

    def fit(total: int) -> int:
        """The moves of a run in two fits."""
        trainer, scheduler = one_cycle(total, each, accumulate=accumulate)
        if first:
            trainer.fit(data, steps=first)
        trainer.fit(data, epochs=epochs, steps=steps)
        return scheduler.last_epoch

    moves = fit(100)
    if moves:
        assert fit(moves) == moves
    if moves > 1:
        with pytest.raises(ValueError, match=r"total_steps=|Tried to step") as caught:
            fit(moves - 1)
        assert isinstance(caught.value, ConfigError) or (not sized and notes(caught.value))


def test_a_longer_fit_than_the_schedule_was_made_for_says_how_far_it_has_come() -> None:
    trainer, scheduler = one_cycle(6)
    trainer.fit(some_batches(4), epochs=1)
    with pytest.raises(ConfigError) as caught:
        trainer.fit(some_batches(4), epochs=2)
    assert caught.value.what == "OneCycleLR has total_steps=6, and this fit is to move it 4 more times, after 4"
    assert caught.value.fix == (
        "OneCycleLR(optimizer, ..., total_steps=8) in a run that is planned so from its beginning; "
        "in this one it has 2 optimizer steps left"
    )
    trainer.fit(some_batches(4), steps=6)
    assert scheduler.last_epoch == 6


def test_on_a_resume_the_saved_schedule_is_what_counts(tmp_path: Path) -> None:
    def fit(total: int, steps: int) -> Trainer:
        trainer, _ = one_cycle(total, callbacks=[Checkpoint(tmp_path)])
        trainer.fit(some_batches(4), steps=steps, resume="auto")
        return trainer

    fit(8, 6)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match="total_steps=8, and this fit is to move it 4 more times, after 6"):
        fit(10, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert fit(10, 8).state.progress.step == 8


def test_a_refused_fit_sets_no_checkpoints_aside(tmp_path: Path) -> None:
    one_cycle(4, callbacks=[Checkpoint(tmp_path)])[0].fit(some_batches(4), epochs=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match="total_steps=4"):
        one_cycle(4, callbacks=[Checkpoint(tmp_path)])[0].fit(some_batches(4), epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_a_length_nothing_is_known_before_and_torchs_error_says_what_to_do() -> None:
    trainer, _ = one_cycle(4)
    with pytest.raises(ValueError, match="Tried to step 5 times") as caught:
        trainer.fit(Unsized(some_batches(4)), epochs=2)
    assert notes(caught.value) == [
        'OneCycleLR has total_steps=4, and this was one move more; with each="step" it moves after each optimizer '
        "step\n  fix: OneCycleLR(optimizer, ..., total_steps=...), with the optimizer steps of the whole run"
    ]


@pytest.mark.parametrize("how", [{"on_nonfinite": "skip"}, {"precision": "fp16"}], ids=["skip", "fp16"])
def test_where_steps_may_be_skipped_it_is_a_warning(how: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = one_cycle(4, **how)
    with pytest.raises(ValueError, match="Tried to step 5 times") as caught:
        trainer.fit(some_batches(4), epochs=2)
    assert len(notes(caught.value)) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "OneCycleLR has total_steps=4, and this fit is to move it 8 times, unless steps are skipped; "
        "torch raises at a move past its end; OneCycleLR(optimizer, ..., total_steps=8)"
    ]


def test_a_run_that_skips_enough_steps_ends_well_and_steps_alone_as_the_target_are_certain() -> None:
    batches: list[tuple[Tensor, Tensor]] = some_batches(4)
    batches[1] = (batches[1][0] / 0, batches[1][1])
    trainer, scheduler = one_cycle(6, on_nonfinite="skip")
    assert trainer.fit(batches, epochs=2).progress.skipped == 2
    assert scheduler.last_epoch == 6
    with pytest.raises(ConfigError, match="move it 7 times"):
        one_cycle(6, on_nonfinite="skip")[0].fit(batches, steps=7)


@pytest.mark.parametrize("kind", ["sequential", "chained"])
def test_a_schedule_within_another_is_not_judged_before_and_its_error_is_explained(kind: str) -> None:
    def make(total: int) -> Trainer:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        scheduler = (
            SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), cycle], milestones=[2])
            if kind == "sequential"
            else ChainedScheduler([ExponentialLR(optimizer, 0.9), cycle], optimizer=optimizer)
        )
        schedule = Schedule(scheduler, each="step")
        return Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")

    needed = 6 if kind == "sequential" else 8
    assert make(needed).fit(some_batches(4), epochs=2).progress.step == 8
    with pytest.raises(ValueError, match=f"Tried to step {needed} times") as caught:
        make(needed - 1).fit(some_batches(4), epochs=2)
    (note,) = notes(caught.value)
    assert note.startswith(f"OneCycleLR has total_steps={needed - 1}, and this was one move more; ")
    fix = "  fix: OneCycleLR(optimizer, ..., total_steps=8)"
    assert note.splitlines()[1] == fix + (", less those of its other schedulers" if kind == "sequential" else "")


def test_a_subclass_that_goes_on_past_the_end_is_not_refused() -> None:
    class Flat(OneCycleLR):
        def get_lr(self) -> list[float | Tensor]:
            self.last_epoch = min(self.last_epoch, self.total_steps)
            return super().get_lr()

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(Flat(optimizer, max_lr=0.1, total_steps=4), each="step")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu")
    assert trainer.fit(some_batches(4), epochs=2).progress.step == 8


def test_another_error_of_a_scheduler_gets_no_note() -> None:
    def rate(step: int) -> float:
        if step == 3:
            raise ValueError("no rate")
        return 1.0

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(LambdaLR(optimizer, rate), each="step")
    with pytest.raises(ValueError, match="no rate") as caught:
        Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu").fit(some_batches(4), epochs=2)
    assert notes(caught.value) == []


@pytest.mark.parametrize("hook", ["on_step_end", "on_batch_end"])
def test_a_fit_that_goes_on_after_an_error_is_refused_only_for_the_moves_that_it_still_makes(hook: str) -> None:
    class Fails(Callback):
        def fail(self, state: State) -> None:
            if state.progress.step == 2:
                raise RuntimeError("once")

        def on_step_end(self, state: State) -> None:
            if hook == "on_step_end":
                self.fail(state)

        def on_batch_end(self, state: State, output: object) -> None:
            if hook == "on_batch_end":
                self.fail(state)

    moves = 7 if hook == "on_step_end" else 8  # the hook comes before the move, which then is not made
    for total in (moves, moves - 1):
        trainer, scheduler = one_cycle(total, callbacks=[Fails()])
        with pytest.raises(RuntimeError, match="once"):
            trainer.fit(some_batches(4), steps=3)
        if total == moves:
            assert trainer.fit(some_batches(4), epochs=2).progress.step == 8
            assert scheduler.last_epoch == moves
        else:
            with pytest.raises(ConfigError, match="total_steps"):
                trainer.fit(some_batches(4), epochs=2)


@pytest.mark.parametrize(("batch", "step"), [(0, 0), (3, 0), (4, 1), (6, 1), (7, 2)])
def test_the_end_of_a_plan_counts_the_short_last_window_of_an_epoch_that_is_gone_through(batch: int, step: int) -> None:
    plan = Plan(epochs=2, batches=7, accumulate=4)
    assert plan.end(Progress(batch=batch, step=step)) == (2, 4)
