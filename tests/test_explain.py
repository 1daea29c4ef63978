"""A3: ``explain()`` is the plain PyTorch loop of a configuration, and run on its own it gives the same bits."""

from __future__ import annotations

import copy
import math
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from helpers import Spare, StopsIn, Unsized, all_equal, line, line_trainer, ragged, weights_of
from loopwright import Every, NonFiniteError, Output, Schedule, Trainer
from loopwright.callback import HOOKS
from loopwright.callbacks import Checkpoint, EarlyStopping, ProgressBar
from loopwright.explaining.facts import Facts
from loopwright.explaining.source import source
from loopwright.layout import PAIRS, Layout, layout_of
from loopwright.testing import HookRecorder
from small_problems import PROBLEMS, cut, loss_of, make_loader, make_optimizer, samples
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
STEPS = ["loss", "loss", "loss", "bare", "output", "fractions", "masked", "tensor weight", "measures", "dict"]
SCHEDULES = [
    "none",
    "step",
    "epoch",
    *(f"{m} {each}" for m in ("train/loss", "val/loss") for each in ("step", "epoch")),
]


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
    def pick(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    optimizer, precision, policy = (
        pick(*OPTIMIZERS),
        pick("fp32", "fp32", "bf16", "fp16"),
        pick("raise", "skip", "ignore"),
    )
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
        "gradients": [parameter.grad for parameter in parts.model.parameters()],
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
    trainer = Trainer(parts.model, parts.optimizer, **how, schedule=schedule, metrics=parts.metrics, **case.settings)
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


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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


def many_texts() -> list[str]:
    """Texts of unlike facts, each fact in many of them."""
    chance = random.Random(0)
    found = []
    for _ in range(400):
        steps, custom = chance.choice([None, 7]), chance.random() < 0.5
        validation: Any = chance.choice(["given", "maybe", None])
        by_steps = validation == "given" and chance.random() < 0.5
        metrics = chance.random() < 0.3
        schedule: Any = chance.choice([None, "step", "epoch"])
        moves, closure = chance.random() < 0.3, chance.random() < 0.15
        recorders = chance.choice([0, 0, 1, 9])
        facts = Facts(
            custom_step=custom,
            measures=custom and chance.random() < 0.5,
            ignores=not custom and chance.random() < 0.5,
            layout=chance.choice([None, PAIRS]),
            sized=chance.random() < 0.6,
            epochs=3 if steps is None else chance.choice([None, 3]),
            steps=steps,
            validation=validation,
            validate_steps=2 if by_steps else None,
            validate_epochs=None if by_steps or validation is None else chance.choice([1, 2]),
            metrics=metrics,
            nested_metrics=chance.random() < 0.5,
            schedule=schedule,
            monitor=chance.choice([None, "train/loss", *(["val/loss"] if validation else [])]) if schedule else None,
            accumulate=1 if closure else chance.choice([1, 4]),
            clip_norm=chance.choice([None, 0.5, math.inf]),
            precision="fp32" if closure else chance.choice(["fp32", "bf16", "fp16"]),
            device="cuda:0" if moves else "cpu",
            moves=moves,
            modules=(*([] if custom else ["loss_fn"]), *(["metrics"] if metrics else [])),
            policy="raise" if closure else chance.choice(["raise", "skip", "ignore"]),
            seed=chance.choice([None, 3]),
            deterministic=chance.random() < 0.3,
            compile=chance.choice([None, None, "module", "wrapped"]),
            mixed_modes=chance.random() < 0.3,
            beside=chance.random() < 0.3,
            foreign=chance.random() < 0.3,
            sparse=chance.random() < 0.3,
            lazy=chance.random() < 0.3,
            closure=closure,
            hooks={hook: ["ARatherLongNameOfACallback"] * recorders for hook in HOOKS if recorders},
            saves=["Checkpoint"] * (recorders > 0),
            restores="EarlyStopping" if recorders else None,
        )
        found.append(source(facts))
    return found


def test_ruff_would_leave_every_text_as_it_is_and_finds_no_unknown_or_unused_name(tmp_path: Path) -> None:
    texts = many_texts()
    for number, text in enumerate(texts):
        (tmp_path / f"loop_{number}.py").write_text(text)
    ran = subprocess.run([*RUFF, "format", "--isolated", "--diff", tmp_path], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[:4000]
    checked = subprocess.run(
        [*RUFF, "check", "--isolated", "--select", "E,F,W,I,UP", tmp_path], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout[:4000]


PLAIN = '''\
"""The loop of a loopwright Trainer in plain PyTorch: the same bits, by itself."""

import torch


def train(model, optimizer, loss_fn, train_loader, *, epochs=2):
    """Train the model in place; what is returned has a row of means for each epoch."""
    model.train()  # dropout is on, and batch norm uses the batch's statistics
    history = []
    step = 0  # optimizer steps made
    for epoch in range(1, epochs + 1):
        total, count = 0.0, 0
        for inputs, targets in train_loader:
            optimizer.zero_grad()  # else gradients would add up over batches
            loss = loss_fn(model(inputs), targets)
            loss.backward()  # fills in .grad, and changes no weight
            optimizer.step()  # the only line that changes the weights
            step += 1
            total += loss.item() * len(targets)
            count += len(targets)
        row = {"epoch": epoch, "step": step, "train/loss": total / count}
        history.append(row)
    return history
'''


def test_a_plain_configuration_is_the_loop_that_one_writes_by_hand_and_not_a_line_more() -> None:
    trainer = line_trainer(on_nonfinite="ignore")
    trainer.fit(ragged(4, 4), epochs=2)
    assert trainer.explain() == PLAIN


def test_only_what_a_configuration_needs_is_in_its_text() -> None:
    trainer = line_trainer()
    trainer.fit(ragged(4, 4), epochs=2)
    text = trainer.explain()
    words = ["autocast", "scaler", "clip", "accumulate", "scheduler", "evaluate", "seed", "device", "steps=", "compile"]
    assert [word for word in words if word in text] == []


def test_before_a_fit_epochs_and_validation_are_left_to_the_caller() -> None:
    text = line_trainer().explain()
    assert "def train(model, optimizer, loss_fn, train_loader, val_loader=None, *, epochs):" in text
    train, val = ragged(4, 3), ragged(5)
    for held in ([], [val]):
        trainer = line_trainer()
        result = trainer.fit(train, *held, epochs=2)
        model = line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert run_alone(text, model, optimizer, nn.MSELoss(), train, *held, epochs=2) == result.history
        assert all_equal([model.weight], weights_of(trainer)[:1])


def test_a_step_before_a_fit_gets_batches_of_any_nesting() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = (model(batch["in"][0]) - batch["out"]).square().mean()
        return loss

    batches = [{"name": "a", "in": (x, None), "out": y} for x, y in ragged(4, 3, 2)]
    model, twin = line(), line()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, device="cpu", accumulate=2)
    text = trainer.explain()
    result = trainer.fit(batches, epochs=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    assert run_alone(text, twin, optimizer, step, batches, epochs=2) == result.history
    assert torch.equal(model.weight, twin.weight)
    assert 'weight = len(batch["in"][0])' not in text
    assert 'weight = len(batch["out"])' in trainer.explain()  # seen in the fit


def test_a_measure_that_is_still_in_the_graph_is_read_without_a_warning() -> None:
    def step(model: nn.Module, batch: Any) -> Output:
        error = model(batch[0]) - batch[1]
        return Output(error.square().mean(), metrics={"mae": error.abs().mean(), "size": len(batch[0])})

    model, twin = line(), line()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = trainer.fit(ragged(4, 3), epochs=2)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        assert run_alone(trainer.explain(), twin, optimizer, step, ragged(4, 3)) == result.history


def test_the_size_of_a_batch_is_read_where_the_fit_has_seen_it() -> None:
    def supervised(inputs: Any, targets: Any) -> Tensor:
        loss: Tensor = (inputs - targets["y"]).square().mean()
        return loss

    class OfDict(nn.Linear):
        def forward(self, inputs: Any) -> Tensor:
            return super().forward(inputs["x"])

    batches = [({"x": x}, {"y": y}) for x, y in ragged(4, 3, 2)]
    histories, weights, text = [], [], ""
    for explained in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = OfDict(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if explained:
            histories.append(run_alone(text, model, optimizer, supervised, batches))
        else:
            trainer = Trainer(model, optimizer, supervised, device="cpu")
            histories.append(trainer.fit(batches, epochs=2).history)
            text = trainer.explain()
            assert 'count += len(targets["y"])' in text
        weights.append(model.weight)
    assert histories[0] == histories[1]
    assert torch.equal(*weights)


def test_what_was_seen_of_a_batch_says_how_to_bring_it_to_a_device() -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
    assert layout_of((x, y)) == Layout("len(batch[0])", "sequence", "len(targets)", "tensor", "tensor", True)
    assert layout_of({"x": x, "n": 3}) == Layout('len(batch["x"])', "other")
    assert layout_of({"x": x, "y": y}) == Layout('len(batch["x"])', "mapping")
    assert layout_of(x) == Layout("len(batch)", "tensor")
    assert layout_of([{"x": x}, [y, None]]) == Layout(
        "len(batch[1][0])", "other", "len(targets[0])", "mapping", "other"
    )
    assert layout_of(packed).size is None
    assert layout_of({"it's": x}).size is None


@pytest.mark.parametrize("form", ["pair", "dict", "nested"])
def test_the_lines_that_move_a_batch_keep_what_it_is(form: str) -> None:
    """Tried on the CPU: the device is an argument of the text."""
    batches: list[Any] = ragged(4, 3)
    step: Any = None
    if form != "pair":
        batches = [{"x": x, "y": y} if form == "dict" else {"x": [x, 1], "y": (y,)} for x, y in batches]

        def step(model: nn.Module, batch: Any) -> Tensor:
            x, y = (batch["x"], batch["y"]) if form == "dict" else (batch["x"][0], batch["y"][0])
            loss: Tensor = (model(x) - y).square().mean()
            return loss

    text = source(
        Facts(custom_step=form != "pair", epochs=2, validation="given", validate_epochs=1, device="cuda:0", moves=True,
              layout=layout_of(batches[0]), precision="bf16", modules=("loss_fn",) if form == "pair" else ())
    )  # fmt: skip
    assert ("to_device(" in text) == (form == "nested")
    model, twin = line(), line()
    how: dict[str, Any] = {"loss": nn.MSELoss()} if form == "pair" else {"step": step}
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), **how, device="cpu", precision="bf16")
    result = trainer.fit(batches, batches, epochs=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    found = run_alone(text, twin, optimizer, step or nn.MSELoss(), batches, batches, device="cpu")
    assert found == result.history
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("kind", ["sized", "without length"])
@pytest.mark.parametrize("validate", [Every(epochs=1), Every(steps=2)], ids=str)
def test_the_hooks_are_shown_where_the_run_calls_them(settings: dict[str, Any], kind: str, validate: Every) -> None:
    recorder = HookRecorder()
    batches: Any = ragged(4, 4, 3, 2, 1)
    batches = batches if kind == "sized" else Unsized(batches)
    trainer = line_trainer(callbacks=[recorder], **settings)
    trainer.fit(batches, ragged(3, 2), epochs=2, validate=validate)
    text = trainer.explain(callbacks=True)
    assert text.replace("HookRecorder", "").count("#") > trainer.explain().count("#")

    def called(found: re.Match[str]) -> str:
        condition = "if batch is not None: " if "unless the data is over" in found[3] else ""
        return f"{found[1]}{condition}hooks.append({found[2]!r})"

    live = re.sub(r"^( *)# (on_\w+|setup|teardown)(.*): HookRecorder$", called, text, flags=re.MULTILINE)
    live = live.replace("hooks.append('on_exception')", "pass")
    model = line()
    hooks: list[str] = []
    namespace: dict[str, Any] = {"hooks": hooks}
    exec(live, namespace)
    namespace["train"](model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), batches, ragged(3, 2))
    assert hooks == recorder.hooks
    assert set(hooks) == set(HOOKS) - {"on_exception"}


def test_only_overridden_hooks_are_shown_and_what_the_loop_does_for_a_callback(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", mode="min", restore_best=True)
    trainer = line_trainer(callbacks=[ProgressBar(), stopping, Checkpoint(tmp_path), ProgressBar()])
    text = trainer.explain(callbacks=True)
    assert "# on_batch_end: ProgressBar, ProgressBar-2\n" in text
    assert "# on_fit_start: ProgressBar, EarlyStopping, Checkpoint, ProgressBar-2\n" in text
    assert "on_backward_end" not in text
    assert "# EarlyStopping: the best weights are put back here\n" in text
    assert "# Checkpoint: a save, where a step is due\n" in text
    assert "EarlyStopping" not in trainer.explain()


def test_a_text_runs_where_loopwright_cannot_be_imported(tmp_path: Path) -> None:
    trainer = line_trainer(accumulate=2, clip_norm=0.5, precision="bf16", seed=4)
    trainer.fit(ragged(4, 3, 2), ragged(4), epochs=2)
    (tmp_path / "explained.py").write_text(trainer.explain())
    torch.save({"batches": ragged(4, 3, 2), "val": ragged(4), "line": line().state_dict()}, tmp_path / "given.pt")
    program = (
        "import sys; sys.modules['loopwright'] = None\n"
        "import torch; from explained import train\n"
        "given = torch.load('given.pt')\n"
        "model = torch.nn.Linear(3, 1); model.load_state_dict(given['line'])\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "train(model, optimizer, torch.nn.MSELoss(), given['batches'], given['val'])\n"
        "torch.save(model.state_dict(), 'weights.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    weights = torch.load(tmp_path / "weights.pt")
    assert all_equal([weights["weight"]], weights_of(trainer)[:1])


def test_a_seed_is_set_as_the_trainer_sets_it() -> None:
    class Drawing(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            noise = random.random() + np.random.random() + torch.rand(())
            return super().forward(inputs) * noise

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Drawing(3, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    model, optimizer = make()
    trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu", seed=11)
    result = trainer.fit(ragged(4, 3), epochs=2)
    model, optimizer = make()
    assert run_alone(trainer.explain(), model, optimizer, nn.MSELoss(), ragged(4, 3)) == result.history


def test_deterministic_kernels_are_asked_for() -> None:
    trainer = line_trainer(deterministic=True)
    trainer.fit(ragged(4, 3), epochs=1)
    before = torch.are_deterministic_algorithms_enabled()
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        run_alone(trainer.explain(), model, optimizer, nn.MSELoss(), ragged(4, 3))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all_equal([model.weight], weights_of(trainer)[:1])


def test_a_model_of_ones_own_is_compiled_in_place_and_one_of_torchs_through_a_wrapper() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.compiled = line(), 0

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.layer(inputs)
            return out

        def compile(self, *args: Any, **kwargs: Any) -> None:
            self.compiled += 1

    model = Own()
    text = line_trainer(model, compile=True).explain()
    assert "    model.compile()  #" in text
    run_alone(text, model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), ragged(4), epochs=1)
    assert model.compiled == 1
    text = line_trainer(compile=True).explain()
    assert "compiled = torch.compile(model)" in text
    assert "loss = loss_fn(compiled(inputs), targets)" in text


def test_explaining_changes_nothing() -> None:
    trainer, twin = (line_trainer(seed=1, accumulate=2) for _ in range(2))
    for one in (trainer, twin):
        one.fit(ragged(4, 3, 2), epochs=1)
    before = torch.get_rng_state()
    assert trainer.explain() == trainer.explain()
    assert torch.equal(before, torch.get_rng_state())
    histories = [one.fit(ragged(4, 3, 2), epochs=2).history for one in (trainer, twin)]
    assert histories[0] == histories[1]
    assert all_equal(weights_of(trainer), weights_of(twin))


def test_the_text_is_that_of_the_latest_fit_also_after_an_evaluation() -> None:
    trainer = line_trainer()
    trainer.fit(ragged(4, 3), epochs=1)
    trainer.fit(ragged(4, 3), ragged(2), steps=9, validate=Every(steps=4))
    trainer.evaluate(ragged(2))
    assert "val_loader, *, steps=9, validate_every=4" in " ".join(trainer.explain().split())


@pytest.mark.parametrize(("hook", "call"), [("on_epoch_end", 2), ("on_step_end", 5), ("on_batch_end", 4)])
def test_where_a_callback_ended_the_fit_the_text_ends_there_too(hook: str, call: int) -> None:
    trainer = line_trainer(callbacks=[StopsIn(hook, call)])
    start = copy.deepcopy(trainer.state.model)
    result = trainer.fit(ragged(4, 3), epochs=9)
    assert result.stop_reason == "enough"
    assert "# A callback ended the fit" in trainer.explain()
    optimizer = torch.optim.SGD(start.parameters(), lr=trainer.state.optimizer.param_groups[0]["lr"])
    history = run_alone(trainer.explain(), start, optimizer, nn.MSELoss(), ragged(4, 3))
    assert_same_history(result.history, history)
    assert all_equal(trainer.state.model.parameters(), start.parameters())


def test_where_the_best_weights_were_put_back_the_text_says_whose() -> None:
    trainer = line_trainer(callbacks=[EarlyStopping("train/loss", mode="max", patience=1, restore_best=True)])
    result = trainer.fit(ragged(4, 3), epochs=9)
    assert f"# The fit went back to the weights of epoch {result.restored_epoch} here." in trainer.explain()


@pytest.mark.parametrize("policy", ["skip", "ignore"])
def test_weights_that_are_ruined_end_the_text_as_they_end_the_run(policy: Any) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = line()
        with torch.no_grad():
            model.weight.fill_(math.inf)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = make()
    trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu", on_nonfinite=policy)
    if policy == "ignore":
        trainer.fit(ragged(4), epochs=1)
        run_alone(trainer.explain(), *make(), nn.MSELoss(), ragged(4))
        return
    with pytest.raises(NonFiniteError):
        trainer.fit(ragged(4), epochs=1)
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        run_alone(trainer.explain(), *make(), nn.MSELoss(), ragged(4))


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_run_by_steps_that_never_makes_one_ends_in_an_error(policy: Any) -> None:
    def masked(model: nn.Module, batch: Any) -> Output:
        loss = (model(batch[0]) - batch[1]).square().mean()
        return Output(loss * math.nan if policy == "skip" else loss, weight=0 if policy == "raise" else None)

    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, step=masked, device="cpu", on_nonfinite=policy, accumulate=2)
    with pytest.raises(NonFiniteError, match="not one optimizer step"):
        trainer.fit(ragged(4, 4), steps=3)
    with pytest.raises(FloatingPointError, match="every step of epoch 1 was skipped"):
        run_alone(trainer.explain(), model, optimizer, masked, ragged(4, 4))


def test_sparse_gradients_are_looked_at_too() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    torch.manual_seed(0)
    batches = cut(samples("embedding", 22))
    model, optimizer = make()
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), device="cpu", on_nonfinite="skip", accumulate=3)
    result = trainer.fit(batches, epochs=2)
    twin, optimizer = make()
    assert run_alone(trainer.explain(), twin, optimizer, nn.CrossEntropyLoss(), batches) == result.history
    assert_same(dict(model.state_dict()), dict(twin.state_dict()), "weights")


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_a_lazy_part_that_is_never_called_does_not_stop_the_text(policy: Any) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = Spare()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = make()
    trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu", on_nonfinite=policy, clip_norm=1.0)
    result = trainer.fit(ragged(4, 3), epochs=2)
    text = trainer.explain()
    twin, its_own = make()
    assert run_alone(text, twin, its_own, nn.MSELoss(), ragged(4, 3)) == result.history
    assert torch.equal(cast(Spare, model).used.weight, cast(Spare, twin).used.weight)
    assert ("is_lazy" in text) == (policy != "ignore")


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_the_gradients_are_left_as_they_came_where_their_norm_ends_the_text(optimizer: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        if optimizer == "lbfgs":
            return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(predictions, targets) + (predictions * 0).sum().detach()

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * math.inf

    left = []
    for explained in (False, True):
        model, held = make()
        trainer = Trainer(model, held, loss, device="cpu", clip_norm=1.0)
        model[0].bias.register_hook(spoil)  # type: ignore[index]  # it is a Sequential
        if explained:
            with pytest.raises(FloatingPointError, match="the gradients' norm is"):
                run_alone(trainer.explain(), model, held, loss, ragged(4, 4), epochs=1)
        else:
            with pytest.raises(NonFiniteError, match="norm of the gradients"):
                trainer.fit(ragged(4, 4), epochs=1)
        left.append([parameter.grad for parameter in model.parameters()])
    assert_alike(left[0], left[1])
    assert [bool(g.isfinite().all()) for g in left[1] if g is not None] == [True, False, True, True]


def test_under_fp16_gradients_that_no_scale_makes_finite_end_the_text_as_they_end_the_run() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0]).mean()
        return out + (out * 0).sqrt()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = line()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    batches = ragged(4, 4, 4)
    trainer = Trainer(*make(), step=step, device="cpu", precision="fp16")
    with pytest.raises(NonFiniteError, match="at optimizer step 1; it has been so 33 times in a row"):
        trainer.fit(batches, epochs=12)
    with pytest.raises(FloatingPointError, match="bad gradients at step 1"):
        run_alone(trainer.explain(), *make(), step, batches)


def test_a_score_of_an_epoch_whose_steps_were_all_skipped_waits_for_the_next_move_of_the_schedule() -> None:
    case = Case(
        problem="plain",
        step="loss",
        optimizer="sgd",
        loader="list",
        accumulate=3,
        clip_norm=None,
        precision="fp32",
        schedule="val/loss epoch",
        validate=Every(epochs=2),
        epochs=3,
        steps=None,
        policy="skip",
        bad=frozenset([6, 9]),
        seed=None,
        frozen=True,
        metrics=True,
        ignored=True,
    )
    assert "fresh = row[monitor]" in check(case)
