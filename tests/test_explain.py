"""A3: ``explain()`` is the plain PyTorch loop of a configuration, and run on its own it gives the same bits."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from helpers import Unsized, line, line_trainer, ragged, small_model, some_batches
from loopwright import Every, NonFiniteError, Output, Schedule, Trainer
from loopwright.callbacks import EarlyStopping, ProgressBar
from loopwright.source import Facts, source
from loopwright.testing import HookRecorder
from small_problems import BATCH, PROBLEMS, WithoutLength, cut, loss_of, make_loader, make_optimizer, samples
from test_same_bits import EPOCHS, MATRIX, assert_same, build, name_of, snapshot, trainer_of, validate_of

RUFF = [sys.executable, "-m", "ruff"]


def run_alone(text: str, *arguments: Any, **keywords: Any) -> list[dict[str, float]]:
    """What the text's ``train`` returns, in a namespace of its own."""
    namespace: dict[str, Any] = {"__name__": "explained"}
    exec(compile(text, "explained.py", "exec"), namespace)
    history: list[dict[str, float]] = namespace["train"](*arguments, **keywords)
    return history


def assert_same_history(expected: list[dict[str, float]], found: list[dict[str, float]]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for one, other in zip(expected, found, strict=True):
        for name, value in one.items():
            assert value == other[name] or (math.isnan(value) and math.isnan(other[name])), (name, value, other[name])


@pytest.mark.parametrize("index", range(len(MATRIX)), ids=[name_of(config) for config in MATRIX])
def test_the_explained_loop_leaves_the_bits_of_every_configuration_of_the_matrix(index: int) -> None:
    setup = build(MATRIX[index], seed=index)
    trainer = trainer_of(setup, setup.loss_fn, [])
    result = trainer.fit(setup.train, setup.val, epochs=EPOCHS, validate=validate_of(setup))
    expected, text = snapshot(setup), trainer.explain()

    setup = build(MATRIX[index], seed=index)
    val = [] if setup.val is None else [setup.val]
    scheduled = {} if setup.scheduler is None else {"scheduler": setup.scheduler}
    found = run_alone(text, setup.model, setup.optimizer, setup.loss_fn, setup.train, *val, **scheduled)
    assert_same(expected, snapshot(setup), "after the run")
    assert_same_history(result.history, found)


# Everything else that a configuration can be.
OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw", "rmsprop", "lbfgs", "half", "foreign"]
STEPS = ["loss", "bare", "output", "fractions", "masked", "tensor weight", "measures", "dict"]
SCHEDULES = ["none", "step", "epoch", *(f"{m} {each}" for m in ("train/loss", "val/loss") for each in ("step", "epoch"))]


@dataclass
class Case:
    """A configuration; ``parts`` builds it, the same each time."""

    problem: str
    step: str
    optimizer: str
    loader: str
    accumulate: int
    clip_norm: float | None
    precision: Any
    schedule: str
    validate: Every | None
    epochs: int | None
    steps: int | None
    policy: Any
    bad: frozenset[int]
    seed: int | None
    frozen: bool
    metrics: bool
    ignored: bool

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "accumulate": self.accumulate,
            "clip_norm": self.clip_norm,
            "precision": self.precision,
            "seed": self.seed,
            "on_nonfinite": self.policy,
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    optimizer, precision, policy = pick(*OPTIMIZERS), pick("fp32", "fp32", "bf16", "fp16"), pick("raise", "skip", "ignore")
    accumulate, schedule = pick(1, 1, 2, 3, 4), pick(*SCHEDULES)
    if optimizer == "lbfgs":
        accumulate, precision, policy = 1, pick("fp32", "bf16"), pick("raise", "ignore")
    validate = pick(None, Every(epochs=1), Every(epochs=2), Every(steps=2), Every(steps=3))
    if schedule.startswith("val/") and validate is None:
        validate = Every(epochs=1)
    epochs, steps = pick((3, None), (None, 7), (None, 4), (2, 5), (2, 100))
    step = pick(*STEPS)
    return Case(
        problem=pick(*PROBLEMS),
        step=step,
        optimizer=optimizer,
        loader=pick("list", "without length", "shuffled", "own generator", "augmented", "iterable dataset"),
        accumulate=accumulate,
        clip_norm=pick(None, 0.5),
        precision=precision,
        schedule=schedule,
        validate=validate,
        epochs=epochs,
        steps=steps,
        policy=policy,
        bad=draw(st.frozensets(st.integers(0, 12), max_size=3)) if pick(True, False) else frozenset(),
        seed=pick(None, 3),
        frozen=pick(True, False),
        metrics=pick(True, False) and validate is not None and step in ("loss", "output", "measures"),
        ignored=pick(True, False),
    )


class Scaled(nn.Module):
    """A loss with a parameter of its own, and one that turns bad at some of its calls in training."""

    def __init__(self, loss_fn: Callable[[Any, Any], Tensor], bad: frozenset[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.loss_fn, self.bad, self.calls = loss_fn, bad, 0
        if hasattr(loss_fn, "ignore_index"):
            self.ignore_index = loss_fn.ignore_index

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss_fn(predictions, targets) * self.scale
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls - 1 in self.bad:
                # The first makes the loss bad, the second only its gradient.
                return loss * math.nan if self.calls % 2 else loss + (predictions.sum() * 0).sqrt()
        return loss


class Largest:
    """A metric over a whole pass, with two values."""

    def reset(self) -> None:
        self.values: list[float] = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.values.append(predictions.float().max().item())

    def compute(self) -> Any:
        return {"max": max(self.values), "count": {"all": len(self.values)}}


def step_of(kind: str, loss_fn: Any) -> Callable[[nn.Module, Any], Any]:
    def step(model: nn.Module, batch: Any) -> Any:
        inputs, targets = (batch["x"], batch["y"]) if kind == "dict" else batch
        predictions = model(inputs)
        loss = loss_fn(predictions, targets)
        if kind in ("bare", "dict"):
            return loss
        first = inputs.flatten()[0].item()
        weight: Any = None
        if kind == "fractions":
            weight = [0.1, 0.1, 0.7, 1 / 3][int(abs(first) * 10) % 4]
        elif kind == "masked":
            weight = int(abs(first) * 10) % 3
        elif kind == "tensor weight":
            weight = torch.tensor(abs(first) + 0.01)
        measured = {"size": len(inputs), "first": inputs.flatten()[0]} if kind == "measures" else {}
        return Output(loss, weight, predictions, targets, measured)

    return step


@dataclass
class Parts:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: Any
    train: Any
    val: Any
    scheduler: Any
    metrics: Any


class AsDicts:
    """A loader's batches as dicts, with a length where it has one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"x": inputs, "y": targets} for inputs, targets in self.loader)


def parts_of(case: Case) -> Parts:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    model = PROBLEMS[case.problem]()
    criterion: Any = Scaled(loss_of(case.problem), case.bad)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "lbfgs":
        optimizer: torch.optim.Optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
    elif case.optimizer == "half":
        optimizer = torch.optim.SGD(parameters[1:], lr=0.05, momentum=0.5)
    elif case.optimizer == "foreign":
        optimizer = torch.optim.SGD([criterion.scale, *parameters[::-1]], lr=0.05)
    else:
        optimizer = make_optimizer(case.optimizer, model)
    data, val = samples(case.problem, 22), samples(case.problem, 10)
    if case.ignored and not data[1].is_floating_point():
        for targets in (data[1], val[1]):
            targets[torch.rand(len(targets)) < 0.3] = -100
            targets[4:8] = -100
    train = make_loader(case.loader, data)
    held: Any = None if case.validate is None else make_loader("in order", val)
    if case.step == "dict":
        train, held = AsDicts(train), None if held is None else AsDicts(held)
    if case.frozen:
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.BatchNorm1d)):
                module.eval()
    scheduler: Any = None
    if "/" in case.schedule:
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
    elif case.schedule != "none":
        scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    if case.step != "loss":
        criterion = step_of(case.step, criterion)
    return Parts(model, optimizer, criterion, train, held, scheduler, {"largest": Largest()} if case.metrics else None)


def left_behind(parts: Parts) -> dict[str, Any]:
    generator = getattr(parts.train, "generator", None)
    return {
        "weights": dict(parts.model.state_dict()),
        "optimizer": parts.optimizer.state_dict(),
        "scheduler": None if parts.scheduler is None else parts.scheduler.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "loader": generator.get_state() if isinstance(generator, torch.Generator) else None,
        "modes": [module.training for module in parts.model.modules()],
    }


def assert_alike(expected: Any, found: Any) -> None:
    """As ``assert_same``, but a NaN equals a NaN."""
    assert type(found) is type(expected)
    if isinstance(expected, (Tensor, np.ndarray)):
        one, other = torch.as_tensor(expected), torch.as_tensor(found)
        assert torch.equal(torch.nan_to_num(one, 1234.5), torch.nan_to_num(other, 1234.5))
        assert torch.equal(one.isnan(), other.isnan())
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected:
            assert_alike(expected[key], found[key])
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(expected, found, strict=True):
            assert_alike(one, other)
    else:
        assert found == expected or (expected != expected and found != found)


def check(case: Case) -> str:
    """Run the trainer, explain it, run what it says, and compare; the text."""
    parts = parts_of(case)
    plateau = isinstance(parts.scheduler, ReduceLROnPlateau)
    monitor, _, each = case.schedule.rpartition(" ")
    schedule = None
    if parts.scheduler is not None:
        schedule = Schedule(parts.scheduler, each=each, monitor=monitor if plateau else None)  # type: ignore[arg-type]  # drawn from both
    how: dict[str, Any] = {"loss": parts.criterion} if case.step == "loss" else {"step": parts.criterion}
    trainer = Trainer(
        parts.model, parts.optimizer, **how, schedule=schedule, metrics=parts.metrics, **case.settings
    )
    plan: dict[str, Any] = {"epochs": case.epochs, "steps": case.steps}
    if case.validate is not None:
        plan["validate"] = case.validate
    history = None
    try:
        history = trainer.fit(parts.train, parts.val, **plan).history
    except (NonFiniteError, RuntimeError) as error:
        event(type(error).__name__)
        raised: Exception | None = error
    else:
        raised = None
    expected, made = left_behind(parts), trainer.state.progress.step
    text = trainer.explain()

    parts = parts_of(case)
    keywords = {"scheduler": parts.scheduler} if parts.scheduler is not None else {}
    keywords |= {"metrics": parts.metrics} if parts.metrics is not None else {}
    val = [] if parts.val is None else [parts.val]
    if isinstance(raised, NonFiniteError):
        with pytest.raises(FloatingPointError) as caught:
            run_alone(text, parts.model, parts.optimizer, parts.criterion, parts.train, *val, **keywords)
        assert not isinstance(caught.value, NonFiniteError)
        if "at optimizer step" in str(raised):
            assert f"at step {made + 1}" in str(caught.value)
    elif raised is not None:
        with pytest.raises(type(raised)):
            run_alone(text, parts.model, parts.optimizer, parts.criterion, parts.train, *val, **keywords)
    else:
        assert history is not None
        found = run_alone(text, parts.model, parts.optimizer, parts.criterion, parts.train, *val, **keywords)
        assert_same_history(history, found)
    assert_alike(expected, left_behind(parts))
    return text


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_run_on_its_own_the_explained_loop_gives_the_same_bits(case: Case) -> None:
    check(case)


@pytest.mark.faults
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_run_on_its_own_the_explained_loop_gives_the_same_bits_in_thousands_of_configurations(case: Case) -> None:
    check(case)
