"""C1: the trainer's bits are those of the loop written by hand."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from all_pairs import Config, all_pairs, every_pair, pairs_of
from loopwright import Callback, Every, Output, Schedule, State, Trainer
from loopwright.callbacks import EarlyStopping
from plain_loops import (
    Trace,
    plain_loop,
    textbook_accumulating_loop,
    textbook_clipping_loop,
    textbook_loop,
)
from small_problems import (
    BATCH,
    PROBLEMS,
    RARER,
    Loss,
    cut,
    generator_of,
    loss_of,
    make_loader,
    make_optimizer,
    make_scheduler,
    samples,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

EPOCHS = 3
FACTORS = {
    "optimizer": ["sgd", "nesterov", "adam", "adamw", "rmsprop"],
    "problem": list(PROBLEMS),
    "schedule": ["none", "steplr each epoch", "onecycle each step", "cosine each step", "plateau each epoch"],
    "clip": ["no clip", "clip 0.5"],
    "accumulate": ["by 1", "by 2", "by 3", "by 4"],
    "precision": ["fp32", "bf16"],
    # 7 whole batches of 4; 7 and 6 with a last one of 2; 6 whole ones, the rest dropped.
    "samples": ["28", "26", "22", "26 drop last"],
    "validation": ["no validation", "val each epoch", "val every 2 steps"],
    "callbacks": ["no callbacks", "several callbacks", "early stopping"],
    "loader": [
        "shuffled",
        "own generator",
        "list",
        "without length",
        "weighted sampler",
        "augmented",
        "iterable dataset",
    ],
}
MATRIX = all_pairs(FACTORS, times=3)
# From python 3.12 on, forking beside other threads, such as torch's, is warned of.
FORKS = pytest.mark.filterwarnings("default:This process:DeprecationWarning")


class Losses(Callback):
    """Keeps the loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_batch_end(self, state: State, output: Output) -> None:
        assert not output.loss.requires_grad
        self.seen.append(output.loss.clone())


class Nosy(Callback):
    """Overrides every hook, and looks at and logs all that it may."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def setup(self, state: State) -> None:
        self.calls["setup"] += 1

    def on_fit_start(self, state: State) -> None:
        self.calls["on_fit_start"] += 1

    def on_epoch_start(self, state: State) -> None:
        self.calls["on_epoch_start"] += 1

    def on_batch_start(self, state: State, batch: Any) -> None:
        self.calls["on_batch_start"] += 1
        state.log("nosy/largest_input", batch[0].max().float())

    def on_backward_end(self, state: State, output: Output) -> None:
        self.calls["on_backward_end"] += 1
        state.log("nosy/loss", output.loss)

    def on_before_step(self, state: State) -> None:
        self.calls["on_before_step"] += 1
        state.log("nosy/norm", nn.utils.get_total_norm(p.grad for p in state.model.parameters() if p.grad is not None))

    def on_step_end(self, state: State) -> None:
        self.calls["on_step_end"] += 1
        assert all(math.isfinite(value) for value in state.metrics.values())

    def on_batch_end(self, state: State, output: Output) -> None:
        self.calls["on_batch_end"] += 1
        state.log("nosy/loss", output.loss.item())

    def on_eval_start(self, state: State) -> None:
        self.calls["on_eval_start"] += 1

    def on_eval_batch_end(self, state: State, output: Output) -> None:
        self.calls["on_eval_batch_end"] += 1

    def on_eval_end(self, state: State) -> None:
        self.calls["on_eval_end"] += 1

    def on_epoch_end(self, state: State) -> None:
        self.calls["on_epoch_end"] += 1

    def on_fit_end(self, state: State) -> None:
        self.calls["on_fit_end"] += 1

    def on_exception(self, state: State, error: BaseException) -> None:
        self.calls["on_exception"] += 1

    def teardown(self, state: State) -> None:
        self.calls["teardown"] += 1


class RecordingLoss:
    """A loss function that keeps what it returned in training: for runs without any callback."""

    def __init__(self, loss_fn: Loss) -> None:
        self.loss_fn = loss_fn
        self.seen: list[Tensor] = []

    def __call__(self, predictions: Any, targets: Any) -> Tensor:
        loss = self.loss_fn(predictions, targets)
        if torch.is_grad_enabled():
            self.seen.append(loss.detach().clone())
        return loss


@dataclass
class Setup:
    """One configuration, built; building it again gives the same, and leaves the generators the same."""

    model: nn.Module
    optimizer: Optimizer
    loss_fn: Loss
    train: Any
    val: Any
    validate_steps: int | None
    scheduler: LRScheduler | None
    each: Literal["step", "epoch"]
    monitor: str
    accumulate: int
    clip_norm: float | None
    precision: Literal["fp32", "bf16"]

    @property
    def schedule(self) -> Schedule | None:
        if self.scheduler is None:
            return None
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        return Schedule(self.scheduler, each=self.each, monitor=self.monitor if plateau else None)


def build(config: Config, seed: int) -> Setup:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    problem, (n, *drop) = config["problem"], config["samples"].split(" ", 1)
    model = PROBLEMS[problem]()
    optimizer = make_optimizer(config["optimizer"], model)
    drop_last, accumulate = bool(drop), int(config["accumulate"].removeprefix("by "))
    batches = int(n) // BATCH if drop_last else -(-int(n) // BATCH)
    data, val = samples(problem, int(n)), samples(problem, 10)
    has_val = config["validation"] != "no validation"
    return Setup(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_of(problem),
        train=make_loader(config["loader"], data, drop_last=drop_last),
        # A DataLoader draws a seed from the global generator whenever it is iterated over.
        val=make_loader("in order", val) if has_val else None,
        validate_steps=2 if config["validation"] == "val every 2 steps" else None,
        scheduler=make_scheduler(config["schedule"], optimizer, EPOCHS * -(-batches // accumulate)),
        each="step" if config["schedule"].endswith("step") else "epoch",
        monitor="val/loss" if has_val else "train/loss",
        accumulate=accumulate,
        clip_norm=0.5 if config["clip"] == "clip 0.5" else None,
        precision="bf16" if config["precision"] == "bf16" else "fp32",
    )


def callbacks_of(config: Config, setup: Setup) -> list[Callback]:
    if config["callbacks"] == "several callbacks":
        return [Nosy(), Losses(), Nosy()]
    if config["callbacks"] == "early stopping":
        return [Losses(), EarlyStopping(setup.monitor, mode="min", patience=100)]
    return []


def run_by_hand(setup: Setup) -> Trace:
    return plain_loop(
        setup.model,
        setup.optimizer,
        setup.loss_fn,
        setup.train,
        epochs=EPOCHS,
        val=setup.val,
        validate_steps=setup.validate_steps,
        scheduler=setup.scheduler,
        each=setup.each,
        monitor=setup.monitor,
        accumulate=setup.accumulate,
        clip_norm=setup.clip_norm,
        dtype=torch.bfloat16 if setup.precision == "bf16" else None,
    )


def trainer_of(setup: Setup, loss_fn: Loss, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        setup.model,
        setup.optimizer,
        loss_fn,
        schedule=setup.schedule,
        callbacks=callbacks,
        device="cpu",
        precision=setup.precision,
        accumulate=setup.accumulate,
        clip_norm=setup.clip_norm,
    )


def validate_of(setup: Setup) -> Every:
    return Every(steps=setup.validate_steps) if setup.validate_steps else Every(epochs=1)


def generators(setup: Setup) -> dict[str, Any]:
    """The state of every generator there is."""
    own = generator_of(setup.train)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "loader": own.get_state() if own is not None else None,
    }


def assert_same(expected: Any, found: Any, path: str) -> None:
    """Fail unless the two are equal in structure, types and bits."""
    assert type(found) is type(expected), path
    if isinstance(expected, (Tensor, np.ndarray)):
        assert found.dtype == expected.dtype, path
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), f"{path}: {found} != {expected}"
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(expected[key], found[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    else:
        assert found == expected, path


def snapshot(setup: Setup) -> dict[str, Any]:
    """All that a run leaves behind."""
    scheduler = setup.scheduler
    return {
        "model": dict(copy.deepcopy(setup.model.state_dict())),
        "optimizer": copy.deepcopy(setup.optimizer.state_dict()),
        "scheduler": copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None,
        "generators": generators(setup),
        "modes": [module.training for module in setup.model.modules()],
    }


def assert_trainer_equals_plain_loop(
    config: Config, seed: int, *, means_within: float = 0.0
) -> tuple[Trace, list[Callback]]:
    setup = build(config, seed)
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    trace = run_by_hand(setup)
    expected = snapshot(setup)
    assert any(not torch.equal(before[name], value) for name, value in expected["model"].items())

    setup = build(config, seed)
    assert_same(before, dict(setup.model.state_dict()), "initial weights")
    callbacks = callbacks_of(config, setup)
    loss_fn = setup.loss_fn if callbacks else RecordingLoss(setup.loss_fn)
    result = trainer_of(setup, loss_fn, callbacks).fit(
        setup.train, setup.val, epochs=EPOCHS, validate=validate_of(setup)
    )
    if isinstance(loss_fn, RecordingLoss):
        losses = loss_fn.seen
    else:
        losses = next(callback.seen for callback in callbacks if isinstance(callback, Losses))
    assert_same(trace.losses, losses, "losses")
    assert_same(expected, snapshot(setup), "after the run")
    train_means = [row["train/loss"] for row in result.history]
    assert train_means == pytest.approx(trace.train_means, rel=means_within, abs=0.0)
    assert result.progress.step == trace.steps
    if setup.val is not None and setup.validate_steps is None:
        val_means = [row["val/loss"] for row in result.history]
        assert val_means == pytest.approx(trace.val_means, rel=means_within, abs=0.0)
    return trace, callbacks


def name_of(config: Config) -> str:
    return ", ".join(level for level in config.values() if level != "none")


@pytest.mark.parametrize("index", range(len(MATRIX)), ids=[name_of(config) for config in MATRIX])
def test_the_trainer_leaves_the_bits_of_the_loop_written_by_hand(index: int) -> None:
    trace, callbacks = assert_trainer_equals_plain_loop(MATRIX[index], seed=index)
    for callback in callbacks:
        if isinstance(callback, Nosy):
            assert callback.calls["on_batch_end"] == len(trace.losses)
            assert callback.calls["on_step_end"] == callback.calls["on_before_step"] == trace.steps
            assert callback.calls["on_eval_end"] == len(trace.val_means)


@pytest.mark.parametrize("index", range(0, len(MATRIX), 3), ids=[name_of(config) for config in MATRIX[::3]])
def test_the_bits_are_the_same_where_values_are_read_as_rarely_as_on_an_accelerator(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_read_each_step", False)
    # The losses are summed in another order there, and only their means may show it.
    assert_trainer_equals_plain_loop(MATRIX[index], seed=index, means_within=1e-12)


def test_the_matrix_holds_every_pair_of_settings_three_times_in_a_hundred_configurations_or_more() -> None:
    met = Counter(pair for config in MATRIX for pair in pairs_of(config))
    assert set(met) == set(every_pair(FACTORS))
    assert min(met.values()) >= 3
    assert len({name_of(config) for config in MATRIX}) == len(MATRIX) >= 100


BASE = {name: levels[0] for name, levels in FACTORS.items()} | {"problem": "dropout", "samples": "26"}


@pytest.mark.parametrize("accumulate", ["by 1", "by 3"])
@pytest.mark.parametrize("loader", RARER)
@FORKS
def test_the_bits_are_the_same_over_rarer_loaders(loader: str, accumulate: str) -> None:
    config = BASE | {"loader": loader, "accumulate": accumulate, "callbacks": "several callbacks"}
    assert_trainer_equals_plain_loop(config, seed=len(loader))


def test_the_bits_are_the_same_with_sparse_gradients_in_ragged_windows() -> None:
    def build_sparse() -> tuple[nn.Module, Optimizer, list[tuple[Tensor, Tensor]]]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
        return model, torch.optim.SGD(model.parameters(), lr=0.1), cut(samples("embedding", 22))

    model, optimizer, batches = build_sparse()
    trace = plain_loop(model, optimizer, nn.CrossEntropyLoss(), batches, epochs=2, accumulate=3)
    twin, optimizer, batches = build_sparse()
    losses = Losses()
    Trainer(twin, optimizer, nn.CrossEntropyLoss(), callbacks=[losses], device="cpu", accumulate=3).fit(
        batches, epochs=2
    )
    assert_same(trace.losses, losses.seen, "losses")
    assert_same(dict(model.state_dict()), dict(twin.state_dict()), "model")


def test_a_step_that_returns_the_bare_loss_gives_the_same_bits() -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = BASE | {"accumulate": "by 4", "clip": "clip 0.5"}
    setup = build(config, seed=5)
    run_by_hand(setup)
    expected = snapshot(setup)
    setup = build(config, seed=5)
    trainer = Trainer(setup.model, setup.optimizer, step=step, device="cpu", accumulate=4, clip_norm=0.5)
    trainer.fit(setup.train, epochs=EPOCHS)
    assert_same(expected, snapshot(setup), "after the run")


def test_a_seed_given_to_the_trainer_is_set_when_the_run_begins() -> None:
    config = BASE | {"loader": "augmented"}
    setup = build(config, seed=6)
    torch.manual_seed(1234)
    random.seed(1234)
    np.random.seed(1234)
    run_by_hand(setup)
    expected = snapshot(setup)
    setup = build(config, seed=6)
    trainer = Trainer(setup.model, setup.optimizer, setup.loss_fn, device="cpu", seed=1234)
    torch.rand(5)
    trainer.fit(setup.train, epochs=EPOCHS)
    assert_same(expected, snapshot(setup), "after the run")


@pytest.mark.parametrize("loader", ["shuffled", "own generator", "list", "without length", "augmented"])
@pytest.mark.parametrize("accumulate", ["by 1", "by 2"])
def test_a_run_in_two_fits_leaves_the_bits_of_the_loop_written_by_hand(loader: str, accumulate: str) -> None:
    config = BASE | {
        "loader": loader,
        "accumulate": accumulate,
        "schedule": "cosine each step",
        "validation": "val each epoch",
        "optimizer": "adam",
    }
    setup = build(config, seed=7)
    trace = run_by_hand(setup)
    expected = snapshot(setup)

    setup = build(config, seed=7)
    losses = Losses()
    trainer = trainer_of(setup, setup.loss_fn, [losses])
    trainer.fit(setup.train, setup.val, epochs=1)
    result = trainer.fit(setup.train, setup.val, epochs=EPOCHS)
    assert_same(trace.losses, losses.seen, "losses")
    assert_same(expected, snapshot(setup), "after the run")
    assert [row["val/loss"] for row in result.history] == trace.val_means


@pytest.mark.parametrize("loader", [*FACTORS["loader"], "sampler with its own generator", "two workers"])
@pytest.mark.parametrize("steps", [3, 7, 8, 10])
@FORKS
def test_a_run_that_ends_in_mid_epoch_goes_on_at_its_next_batch(loader: str, steps: int) -> None:
    config = BASE | {"loader": loader, "validation": "val each epoch", "problem": "recurrent"}
    setup = build(config, seed=8)
    trace = run_by_hand(setup)
    expected = snapshot(setup)

    setup = build(config, seed=8)
    losses = Losses()
    trainer = trainer_of(setup, setup.loss_fn, [losses])
    assert trainer.fit(setup.train, setup.val, steps=steps).progress.step == steps
    result = trainer.fit(setup.train, setup.val, epochs=EPOCHS)
    assert_same(trace.losses, losses.seen, "losses")
    assert_same(expected, snapshot(setup), "after the run")
    assert result.progress.step == trace.steps
    assert [row["train/loss"] for row in result.history] == trace.train_means
    assert [row["val/loss"] for row in result.history] == trace.val_means


def textbook_case(seed: int, *, optimizer: str = "adam") -> tuple[nn.Module, Optimizer, Loss, list[Any]]:
    torch.manual_seed(seed)
    model = PROBLEMS["dropout"]()
    return model, make_optimizer(optimizer, model), nn.CrossEntropyLoss(), cut(samples("dropout", 24))


TEXTBOOKS: dict[str, tuple[Callable[..., list[Tensor]], dict[str, Any]]] = {
    "canonical": (textbook_loop, {}),
    "clipping": (partial(textbook_clipping_loop, max_norm=0.5), {"clip_norm": 0.5}),
    "by 2": (partial(textbook_accumulating_loop, accumulate=2), {"accumulate": 2}),
    "by 3": (partial(textbook_accumulating_loop, accumulate=3), {"accumulate": 3}),
    "by 6": (partial(textbook_accumulating_loop, accumulate=6), {"accumulate": 6}),
}


@pytest.mark.parametrize("name", TEXTBOOKS)
def test_trainer_and_plain_loop_both_leave_the_bits_of_the_textbook_loop(name: str) -> None:
    loop, settings = TEXTBOOKS[name]
    model, optimizer, loss_fn, batches = textbook_case(9)
    expected = loop(model, optimizer, loss_fn, batches, epochs=2)

    plain, optimizer, loss_fn, batches = textbook_case(9)
    assert_same(expected, plain_loop(plain, optimizer, loss_fn, batches, epochs=2, **settings).losses, "plain losses")
    assert_same(dict(model.state_dict()), dict(plain.state_dict()), "plain weights")

    twin, optimizer, loss_fn, batches = textbook_case(9)
    losses = Losses()
    Trainer(twin, optimizer, loss_fn, callbacks=[losses], device="cpu", **settings).fit(batches, epochs=2)
    assert_same(expected, losses.seen, "losses")
    assert_same(dict(model.state_dict()), dict(twin.state_dict()), "weights")


def test_clipping_and_the_learning_rate_matter_in_the_matrix() -> None:
    """Or the matrix would prove nothing about them."""
    plain = build(BASE, seed=10)
    run_by_hand(plain)
    weights = plain.model.state_dict()["0.weight"]
    for factor in ("clip", "schedule", "precision", "accumulate", "loader"):
        for level in FACTORS[factor][1:]:
            changed = build(BASE | {factor: level}, seed=10)
            run_by_hand(changed)
            assert not torch.equal(weights, changed.model.state_dict()["0.weight"]), level
