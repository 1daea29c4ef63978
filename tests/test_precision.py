"""bf16, and fp16 with its scaler, on the CPU: the plain loop's bits, and skipped steps (C5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

from loopwright import Callback, Every, NonFiniteError, Output, Schedule, State, Trainer
from plain_loops import plain_loop

Samples = tuple[Tensor, Tensor]
Setup = tuple[nn.Module, torch.optim.Optimizer, list[Samples]]


class WithoutLength:
    def __init__(self, batches: Sequence[Samples]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Samples]:
        yield from self.batches


def problem(
    scale: float = 1.0,
    *,
    optimizer: str = "adam",
    sizes: Sequence[int] = (4, 4, 4, 4, 4, 4, 2),
    dropout: float = 0.2,
) -> Setup:
    """With targets of a large scale the first gradients overflow in float16, and their steps are skipped."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))
    made: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.01)
        if optimizer == "adam"
        else torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    )
    return model, made, [(torch.randn(n, 5), scale * torch.randn(n, 1)) for n in sizes]


OVERFLOWING = 6.0


class Watch(Callback):
    """The losses, and what each step was seen to be."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.steps: list[int] = []  # in on_step_end
        self.evaluated: list[int] = []  # the step at which each validation ended
        self.rates: list[float] = []

    def on_step_end(self, state: State) -> None:
        self.steps.append(state.progress.step)

    def on_batch_end(self, state: State, output: Output) -> None:
        self.losses.append(output.loss)
        self.rates.append(state.optimizer.param_groups[0]["lr"])

    def on_eval_end(self, state: State) -> None:
        self.evaluated.append(state.progress.step)


def assert_same_losses(expected: list[Tensor], found: list[Tensor]) -> None:
    assert [loss.dtype for loss in found] == [loss.dtype for loss in expected]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def assert_same_state(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[name], value), name
        elif isinstance(value, dict):
            assert_same_state(value, found[name])
        else:
            assert found[name] == value, name


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {str(index): value for index, value in optimizer.state_dict()["state"].items()}


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=50)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("scale", [0.01, OVERFLOWING])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("accumulate", "known"), [(1, True), (2, True), (3, True), (4, True), (4, False)])
def test_the_bits_are_those_of_the_loop_written_by_hand(
    precision: Literal["bf16", "fp16"],
    scale: float,
    optimizer: str,
    clip_norm: float | None,
    accumulate: int,
    known: bool,
) -> None:
    def data(batches: list[Samples]) -> Any:
        return batches if known else WithoutLength(batches)

    model, made, batches = problem(scale, optimizer=optimizer)
    scheduler = one_cycle(made)
    trace = plain_loop(
        model,
        made,
        nn.MSELoss(),
        data(batches),
        epochs=3,
        val=batches[:2],
        validate_steps=2,
        scheduler=scheduler,
        each="step",
        accumulate=accumulate,
        clip_norm=clip_norm,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float16,
    )
    generator = torch.get_rng_state()

    twin, twin_optimizer, batches = problem(scale, optimizer=optimizer)
    twin_scheduler = one_cycle(twin_optimizer)
    watch = Watch()
    trainer = Trainer(
        twin,
        twin_optimizer,
        nn.MSELoss(),
        schedule=Schedule(twin_scheduler, each="step"),
        callbacks=[watch],
        device="cpu",
        precision=precision,
        accumulate=accumulate,
        clip_norm=clip_norm,
    )
    result = trainer.fit(data(batches), batches[:2], epochs=3, validate=Every(steps=2))
    assert_same_losses(trace.losses, watch.losses)
    assert_same_state(dict(model.state_dict()), dict(twin.state_dict()))
    assert_same_state(optimizer_state(made), optimizer_state(twin_optimizer))
    assert twin_scheduler.state_dict() == scheduler.state_dict()
    assert torch.equal(generator, torch.get_rng_state())
    assert [row["train/loss"] for row in result.history] == trace.train_means
    assert (result.progress.step, result.progress.skipped) == (trace.steps, trace.skipped)
    assert len(watch.evaluated) == len(trace.val_means)
    assert (trace.skipped > 1) == (precision == "fp16" and scale == OVERFLOWING)
    assert trace.steps > 1


def fp16_trainer(
    scheduler_kind: Literal["step", "epoch", "none"] = "none", **settings: Any
) -> tuple[Trainer, Any, Any]:
    model, optimizer, batches = problem(OVERFLOWING)
    scheduler: LRScheduler | None = None
    schedule = None
    if scheduler_kind == "step":
        scheduler = one_cycle(optimizer)
        schedule = Schedule(scheduler, each="step")
    elif scheduler_kind == "epoch":
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        schedule = Schedule(scheduler, each="epoch")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, device="cpu", precision="fp16", **settings)
    return trainer, scheduler, batches


def test_a_skipped_step_moves_neither_scheduler_nor_step_and_is_counted() -> None:
    seen: list[tuple[int, int, int]] = []

    class Seen(Callback):
        def on_batch_end(self, state: State, output: Output) -> None:
            seen.append((state.progress.step, state.progress.skipped, scheduler.last_epoch))

    trainer, scheduler, batches = fp16_trainer("step", callbacks=[Seen()])
    progress = trainer.fit(batches, epochs=2).progress
    assert progress.skipped > 0
    assert progress.step + progress.skipped == 14
    assert all(moved == step for step, _, moved in seen)
    assert [step + skipped for step, skipped, _ in seen] == list(range(1, 15))
    assert seen[0] == (0, 1, 0)


def test_a_skipped_step_leaves_the_weights_as_they_were() -> None:
    kept: list[Tensor] = []

    class Weights(Callback):
        def on_batch_end(self, state: State, output: Output) -> None:
            if state.progress.step == 0:
                kept.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))

    trainer, _, batches = fp16_trainer(callbacks=[Weights()])
    initial = torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()])
    trainer.fit(batches, epochs=1)
    assert kept
    assert all(torch.equal(weights, initial) for weights in kept)
    assert not torch.equal(torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()]), initial)


def test_a_target_in_steps_counts_only_the_steps_that_were_made() -> None:
    trainer, scheduler, batches = fp16_trainer("step")
    progress = trainer.fit(batches, steps=5).progress
    assert progress.step == scheduler.last_epoch == 5
    assert progress.skipped > 0
    assert 7 * progress.epoch + progress.batch == progress.step + progress.skipped


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_skipped_step_brings_no_second_validation(accumulate: int) -> None:
    """Step 0 is a multiple of everything, and stays the step while all the first ones are skipped."""
    watch = Watch()
    trainer, _, batches = fp16_trainer(callbacks=[watch], accumulate=accumulate)
    progress = trainer.fit(batches, batches[:1], epochs=4, validate=Every(steps=2)).progress
    assert progress.skipped > 0
    assert watch.evaluated == list(range(2, progress.step + 1, 2))


def test_a_schedule_of_epochs_moves_at_an_epochs_end_that_had_skipped_steps() -> None:
    trainer, scheduler, batches = fp16_trainer("epoch")
    progress = trainer.fit(batches, epochs=3).progress
    assert progress.skipped > 0
    assert scheduler.last_epoch == 3


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_overflow_of_the_scaled_gradients_is_no_error_under_raise(clip_norm: float | None) -> None:
    trainer, _, batches = fp16_trainer(clip_norm=clip_norm, on_nonfinite="raise")
    assert trainer.fit(batches, epochs=1).progress.skipped > 0


def test_a_nan_loss_is_an_error_under_fp16_too() -> None:
    trainer, _, batches = fp16_trainer(on_nonfinite="raise")
    batches[3] = (batches[3][0], batches[3][1] * float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.fit(batches, epochs=1)


def test_the_scale_goes_on_from_one_fit_to_the_next() -> None:
    model, optimizer, batches = problem(OVERFLOWING)
    trace = plain_loop(model, optimizer, nn.MSELoss(), batches, epochs=3, dtype=torch.float16)
    trainer, _, batches = fp16_trainer()
    for epochs in (1, 2, 3):
        progress = trainer.fit(batches, epochs=epochs).progress
    assert progress.skipped == trace.skipped > 0
    assert_same_state(dict(model.state_dict()), dict(trainer.state.model.state_dict()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_scaled_in_on_backward_end_and_unscaled_before_the_step(accumulate: int) -> None:
    norms: dict[str, list[float]] = {"backward": [], "before": [], "after": []}

    def norm(state: State) -> float:
        return float(nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]))

    class Norms(Callback):
        def on_backward_end(self, state: State, output: Output) -> None:
            norms["backward"].append(norm(state))

        def on_before_step(self, state: State) -> None:
            norms["before"].append(norm(state))

        def on_step_end(self, state: State) -> None:
            norms["after"].append(norm(state))

    def run(precision: Literal["fp32", "fp16"]) -> dict[str, list[float]]:
        nonlocal norms
        norms = {"backward": [], "before": [], "after": []}
        model, optimizer, batches = problem(0.1, sizes=(4, 4, 4, 4), optimizer="sgd", dropout=0.0)
        Trainer(
            model,
            optimizer,
            nn.MSELoss(),
            callbacks=[Norms()],
            device="cpu",
            precision=precision,
            accumulate=accumulate,
            clip_norm=1e-3,
        ).fit(batches, epochs=1)
        return norms

    half, full = run("fp16"), run("fp32")
    assert half["before"] == pytest.approx(full["before"], rel=0.02)
    assert half["backward"] == pytest.approx([65536 * value for value in full["backward"]], rel=0.02)
    assert half["after"] == pytest.approx([1e-3] * len(half["after"]), rel=1e-3)
    assert min(half["before"]) > 2e-3


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_is_around_the_whole_step_in_training_evaluation_and_prediction(
    precision: Literal["fp32", "bf16", "fp16"], dtype: torch.dtype
) -> None:
    model, optimizer, batches = problem()
    seen: list[torch.dtype] = []

    def step(model: nn.Module, batch: Samples) -> Output:
        predictions = model(batch[0])
        seen.append((predictions @ predictions.T).dtype)
        assert torch.is_autocast_enabled("cpu") == (precision != "fp32")
        return Output(nn.functional.mse_loss(predictions, batch[1]), predictions=predictions)

    trainer = Trainer(model, optimizer, step=step, device="cpu", precision=precision)
    trainer.fit(batches[:2], batches[2:3], epochs=1)
    trainer.evaluate(batches[:1])
    predictions = trainer.predict(batches[:1])
    assert seen == [dtype] * 5
    assert predictions[0].dtype == dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_callbacks_and_backward_run_outside_of_autocast() -> None:
    model, optimizer, batches = problem()
    seen: list[bool] = []

    class Looks(Callback):
        def on_batch_start(self, state: State, batch: Any) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))

        def on_backward_end(self, state: State, output: Output) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))

        def on_eval_batch_end(self, state: State, output: Output) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))

    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[Looks()], device="cpu", precision="bf16")
    trainer.fit(batches, batches[:1], epochs=1)
    assert seen == [False] * 15


def test_the_second_evaluation_of_a_precision_is_not_of_stale_cast_weights() -> None:
    """Autocast keeps the cast weights until it is left: one context over several steps would train on old ones."""
    model, optimizer, batches = problem()
    trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu", precision="bf16")
    first = trainer.evaluate(batches)["test/loss"]
    trainer.fit(batches, epochs=5)
    assert trainer.evaluate(batches)["test/loss"] != first
