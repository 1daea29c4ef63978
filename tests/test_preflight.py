"""The preflight: what it finds, what it leaves alone, and that everything is afterwards as it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fundamentals
import linear_regression
import real_data
import synthetic_regression
import training_loop
import workflow
from helpers import At, Outcome, assert_same_run, small_model, small_trainer, some_batches, weights_of
from loopwright import Check, ConfigError, Preflight, Result, Schedule, Trainer
from loopwright.callbacks import Checkpoint
from loopwright.checks import CHECKS
from loopwright.checks.recorder import fingerprint
from loopwright.data import Loader
from loopwright.randomness import generators_of
from loopwright.testing import HookRecorder
from preflight_cases import FAULTS, HEALTHY
from small_problems import PROBLEMS, RARER, loss_of, make_loader, make_optimizer, samples


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_check(name: str) -> None:
    fault = FAULTS[name]
    trainer, train, val = fault.problem()
    report = trainer.preflight(train, val)
    row = report[fault.check]
    assert row.verdict == "failed", str(report)
    assert fault.words in f"{row.evidence} {row.cause} {row.fix}", row
    assert row.fix
    assert not report.ok
    assert row in report.failed


def test_every_check_has_two_planted_faults() -> None:
    trainer, train, val = HEALTHY["mlp"]()
    names = [check.name for check in trainer.preflight(train, val).checks]
    assert len(names) == len(CHECKS) == len(set(names))
    planted = [fault.check for fault in FAULTS.values()]
    assert [name for name in names if planted.count(name) < 2] == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_problem_raises_no_alarm(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    trainer, train, val = HEALTHY[name]()
    report = trainer.preflight(train, val)
    assert report.ok, str(report)
    assert report["a training step runs"].verdict == "passed"


class DoneError(Exception):
    """In place of a fit."""


@pytest.mark.parametrize(
    "train",
    [
        synthetic_regression.train,
        linear_regression.train,
        training_loop.train,
        workflow.train,
        lambda: fundamentals.train(0.02),
        lambda: real_data.compare(1),
    ],
    ids=["000", "001", "002", "004", "003", "diabetes"],
)
def test_the_documents_examples_raise_no_alarm(train: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Preflight] = []

    def instead(trainer: Trainer, train: Any, val: Any = None, **targets: Any) -> Result:
        reports.append(trainer.preflight(train, val))
        raise DoneError

    monkeypatch.setattr(Trainer, "fit", instead)
    with pytest.raises(DoneError):
        train()
    (report,) = reports
    assert report.ok, str(report)
    assert sum(check.verdict == "passed" for check in report.checks) >= 7


def _generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def _states(trainer: Trainer, train: Any) -> list[Any]:
    model, optimizer = trainer.state.model, trainer.state.optimizer
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        copy.deepcopy(optimizer.state_dict()),
        [g.get_state() for g in generators_of(train)],
        dataclasses.replace(trainer.state.progress),
        trainer.state.stage,
        trainer.state.plan,
        dict(trainer.state.metrics),
    ]


def assert_alike(one: Any, other: Any) -> None:
    """Equal, where tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor):
        assert fingerprint([one]) == fingerprint([other])
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("name", [*HEALTHY, *FAULTS])
def test_everything_is_afterwards_as_it_was(name: str) -> None:
    trainer, train, val = HEALTHY[name]() if name in HEALTHY else FAULTS[name].problem()
    model = trainer.state.model
    if name in ("mlp", "residual", "tokens"):
        trainer.fit(train, steps=3)  # there are momenta and gradients, and the epoch is left within
    gradients = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    found, states = _generators(), _states(trainer, train)
    trainer.preflight(train, val)
    assert _generators() == found
    assert_alike(_states(trainer, train), states)
    after = [p.grad for p in model.parameters()]
    assert all(a is b for a, b in zip(after, gradients, strict=True))
    assert_alike([None if g is None else g.clone() for g in after], values)


@pytest.mark.parametrize("name", sorted(HEALTHY.keys() - {"compiled"}))  # test_compile.py compiles
def test_a_fit_after_a_preflight_has_the_bits_of_one_without(name: str) -> None:
    outcomes = []
    for first in (False, True):
        torch.manual_seed(3)
        trainer, train, val = HEALTHY[name]()
        if first:
            trainer.preflight(train, val)
        result = trainer.fit(train, val, steps=7)
        outcomes.append(Outcome(weights_of(trainer), result))
    assert_same_run(*outcomes)


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(
        [
            "shuffled",
            "own generator",
            "list",
            "without length",
            "weighted sampler",
            "augmented",
            "iterable dataset",
            *(kind for kind in RARER if "workers" not in kind and kind != "batches of one"),
        ]
    ),
    problem=st.sampled_from(sorted(PROBLEMS)),
    optimizer=st.sampled_from(["sgd", "nesterov", "adam", "adamw", "rmsprop"]),
    steps=st.integers(1, 4),
    before=st.integers(0, 4),
)
def test_a_preflight_anywhere_in_a_run_changes_nothing(
    kind: str, problem: str, optimizer: str, steps: int, before: int
) -> None:
    outcomes = []
    for looks in (False, True):
        torch.manual_seed(5)
        model = PROBLEMS[problem]()
        data = samples(problem, 14)
        trainer = Trainer(model, make_optimizer(optimizer, model), loss_of(problem), device="cpu")
        train, val = make_loader(kind, data, drop_last=True), make_loader(kind, data)
        if before:
            trainer.fit(train, val, steps=before)
        if looks:
            trainer.preflight(train, val, steps=steps)
        result = trainer.fit(train, val, steps=before + 4)
        outcomes.append(Outcome(weights_of(trainer), result))
    assert_same_run(*outcomes)


def test_an_iterator_is_not_read() -> None:
    batches = (batch for batch in some_batches(5))
    report = small_trainer().preflight(batches)
    assert report["a training step runs"].verdict == "not applicable"
    assert "read only once" in report["a training step runs"].evidence
    assert report["parameters in the optimizer"].verdict == "passed"
    assert report.ok
    assert len(list(batches)) == 5


class HoldsAnIterator:
    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def test_what_holds_an_iterator_is_not_read_either() -> None:
    inner = iter(some_batches(5))
    report = small_trainer().preflight(HoldsAnIterator(inner))
    assert report["a training step runs"].verdict == "not applicable"
    assert len(list(inner)) == 5


class KeepsPlace:
    """A loader with a state of its own, which must not be asked for a batch."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it was read")


def test_a_loader_that_keeps_its_own_state_is_not_read() -> None:
    report = small_trainer().preflight(KeepsPlace(), KeepsPlace())
    assert report["a training step runs"].verdict == "not applicable"
    assert report["a validation step runs"].verdict == "not applicable"
    assert report.ok


def test_our_own_loader_is_looked_at_without_moving_its_place() -> None:
    data = Loader(TensorDataset(torch.randn(12, 3), torch.randn(12, 1)), batch_size=4, seed=1)
    next(iter(data))
    place = data.state_dict()
    report = small_trainer().preflight(data)
    assert report["a training step runs"].verdict == "passed"
    assert data.state_dict() == place


class DrawsForItself(Dataset[Any]):
    """Keeps generators, a count and a list of what was asked of it."""

    def __init__(self) -> None:
        self.rng, self.own, self.numpy = random.Random(1), torch.Generator(), np.random.default_rng(1)
        self.count = 0
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        self.asked.append(index)
        noise = self.rng.random() + self.numpy.random()
        return torch.randn(3, generator=self.own) + noise, torch.randn(1, generator=self.own)


def test_a_dataset_with_generators_and_counts_of_its_own_keeps_them() -> None:
    data = DrawsForItself()
    before = data.rng.getstate(), data.own.get_state().tolist(), str(data.numpy.bit_generator.state)
    assert small_trainer().preflight(DataLoader(data, batch_size=4, shuffle=True))["loss is finite"].verdict == "passed"
    assert (data.rng.getstate(), data.own.get_state().tolist(), str(data.numpy.bit_generator.state)) == before
    assert (data.count, data.asked) == (0, [])


class CannotBeCopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.lock = threading.Lock()
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.layers(inputs)
        return out


def test_a_model_that_cannot_be_copied_is_looked_at_in_place_and_put_back() -> None:
    model = CannotBeCopied()
    model.eval()
    trainer = small_trainer(model=model)
    states = _states(trainer, [])
    report = trainer.preflight(some_batches(3), some_batches(1))
    assert report["two runs give the same bits"].verdict == "not applicable"
    assert "cannot pickle" in report["two runs give the same bits"].evidence
    assert report["parameters get a gradient"].verdict == "passed"
    assert report["a validation step runs"].verdict == "passed"
    assert_alike(_states(trainer, []), states)
    assert model.calls == 0
    assert [p.grad for p in model.parameters()] == [None] * 6


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_scripted_model_whose_copy_has_parameters_unknown_to_the_optimizer_is_looked_at_in_place() -> None:
    trainer = small_trainer(model=torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))))
    states = _states(trainer, [])
    report = trainer.preflight(some_batches(3))
    assert report.ok, str(report)
    assert report["two runs give the same bits"].verdict == "not applicable"
    assert_alike(_states(trainer, []), states)


def test_a_lazy_model_stays_without_its_weights() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))
    report = small_trainer(model=model).preflight(some_batches(3), some_batches(1, seed=1))
    assert report.ok, str(report)
    assert isinstance(next(model.parameters()), nn.UninitializedParameter)


def test_a_step_that_holds_the_original_model_leaves_no_trace_in_it() -> None:
    model = small_model().train()

    def step(_: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    trainer = small_trainer(model=model, step=step)
    states = _states(trainer, [])
    trainer.preflight(some_batches(3))
    assert_alike(_states(trainer, []), states)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_that_changes_its_batch_does_not_change_the_data() -> None:
    batches = some_batches(3)
    before = copy.deepcopy(batches)

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        batch[0].mul_(2)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    assert small_trainer(step=step).preflight(batches, batches[:1])["a training step runs"].verdict == "passed"
    assert_alike(batches, before)


def test_no_hook_is_called_and_no_metric_updated() -> None:
    recorder, metric = HookRecorder(), Seen()
    trainer = small_trainer(recorder, metrics={"seen": metric})
    assert trainer.preflight(some_batches(3), some_batches(1, seed=1)).ok
    assert recorder.hooks == []
    assert metric.updates == 0


class Seen:
    updates = 0

    def reset(self) -> None:
        self.updates = 0

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        self.updates += 1

    def compute(self) -> float:
        return 0.0


def test_fit_with_a_preflight_trains_where_no_check_fails() -> None:
    runs = []
    for preflight in (False, True):
        torch.manual_seed(2)
        trainer, train, val = HEALTHY["two parts"]()
        runs.append(Outcome(weights_of(trainer), trainer.fit(train, val, epochs=2, preflight=preflight)))
    assert_same_run(*runs)


def test_fit_with_a_preflight_raises_before_anything_is_done_where_a_check_fails() -> None:
    recorder = HookRecorder()
    model = small_model()
    optimizer = torch.optim.SGD(list(model.parameters())[4:], lr=0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[recorder], device="cpu")
    with pytest.raises(ConfigError, match=r"1 of 16 checks failed(?s:.*)SGD does not hold 4.*") as caught:
        trainer.fit(some_batches(3), epochs=1, preflight=True)
    assert "two runs give the same bits" in str(caught.value)
    assert recorder.hooks == []
    assert trainer.state.progress.fresh
    assert trainer.fit(some_batches(3), epochs=1).stop_reason == "epochs"


def test_a_run_that_goes_on_is_not_checked_again(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        model = small_model()
        optimizer = torch.optim.SGD(list(model.parameters())[4:], lr=0.1)
        return Trainer(model, optimizer, nn.MSELoss(), callbacks=[Checkpoint(tmp_path / "saved")], device="cpu")

    with pytest.raises(ConfigError):
        trainer().fit(some_batches(3), epochs=1, resume="auto", preflight=True)  # there is nothing to go on from
    first = trainer()
    first.fit(some_batches(3), epochs=1)
    assert first.fit(some_batches(3), epochs=2, preflight=True).progress.epoch == 2
    assert trainer().fit(some_batches(3), epochs=3, resume="auto", preflight=True).progress.epoch == 3


def test_a_preflight_within_a_fit_is_refused() -> None:
    trainer = small_trainer(At(on_epoch_start=lambda state: trainer.preflight(some_batches(1))))
    with pytest.raises(ConfigError, match="at work"):
        trainer.fit(some_batches(2), epochs=1)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_the_number_of_steps_is_checked(steps: Any) -> None:
    with pytest.raises(ConfigError, match="steps"):
        small_trainer().preflight(some_batches(2), steps=steps)


def test_data_that_is_no_loader_is_refused() -> None:
    data: Any = TensorDataset(torch.randn(4, 3), torch.randn(4, 1))
    with pytest.raises(ConfigError, match="dataset"):
        small_trainer().preflight(data)


def test_the_first_difference_names_step_and_layer() -> None:
    trainer, train, val = FAULTS["noise of its own"].problem()
    evidence = trainer.preflight(train, val)["two runs give the same bits"].evidence
    assert evidence == "step 1: the output of second differs first"


def test_the_table_is_aligned_and_names_cause_and_fix() -> None:
    checks = (
        Check("short", "passed", "well"),
        Check("a longer name", "failed", "seen " * 30, "a cause", "a fix"),
        Check("nothing", "not applicable", "no data"),
    )
    report = Preflight(checks)
    lines = str(report).split("\n")
    assert lines[0] == "short          passed          well"
    assert lines[1].startswith("a longer name  failed          seen seen")
    assert f"{' ' * 31}cause: a cause" in lines
    assert f"{' ' * 31}fix: a fix" in lines
    assert lines[-1] == "1 passed, 1 failed, 1 not applicable"
    assert max(map(len, lines)) <= 120
    assert report.failed == (checks[1],)
    with pytest.raises(KeyError) as caught:
        report["longer name"]
    said = (
        "there is no check 'longer name'; did you mean 'a longer name'?; there are 'short', 'a longer name', 'nothing'"
    )
    assert caught.value.args == (said,)


def test_the_copy_is_stepped_where_a_scheduler_has_wrapped_the_step_of_the_original() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=Schedule(scheduler, each="step"), device="cpu")
    row = trainer.preflight(some_batches(3))["loss is finite"]
    assert (row.verdict, row.cause) == ("failed", "the steps before have made it so")
    assert scheduler.last_epoch == 0


def _classifier(x: torch.Tensor, *, shuffle: bool = False) -> tuple[Trainer[Any, Any], DataLoader[Any]]:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), device="cpu")
    return trainer, DataLoader(TensorDataset(x, torch.arange(len(x)) * 3 // len(x)), 10, shuffle=shuffle)


def test_checks_that_need_a_step_say_that_it_did_not_come_to_its_end() -> None:
    trainer, train = _classifier(torch.randn(30, 5))  # the model takes 6
    report = trainer.preflight(train)
    assert {check.evidence for check in report.checks if check.verdict == "not applicable"} == {
        "the step did not come to its end",
        "there is no validation data",
    }
    assert report["labels and indices"].evidence == report["loss at the start"].evidence


_TARGETS: dict[str, Any] = {
    "squeezed": lambda y: y.squeeze(1),
    "a column": lambda y: y[:, 0],
    "selected": lambda y: y.select(1, 0),
    "viewed": lambda y: y.view(-1),
    "of its transpose": lambda y: y.T[0],
    "in double precision": lambda y: y.view(-1).double(),
    "in single precision": lambda y: y.view(-1).double().float(),
    "moved": lambda y: y.to(torch.float64, copy=True).reshape(-1),
    "copied": lambda y: y.flatten().clone().detach(),
    "in another order": lambda y: y[torch.arange(len(y) - 1, -1, -1), 0],
    "scaled": lambda y: (y[:, 0] - y.mean()) / y.std(),
    "written into another": lambda y: _written(y),
}


def _written(y: torch.Tensor) -> torch.Tensor:
    into = torch.zeros(len(y))
    into[:] = y[:, 0]
    return into


@pytest.mark.parametrize("name", _TARGETS)
@pytest.mark.parametrize("scripted", [False, True])
def test_a_column_less_a_row_is_found_in_whatever_form_the_target_is(name: str, scripted: bool) -> None:
    x = torch.randn(32, 3)
    y = x.sum(1, keepdim=True)

    def off(model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = (model(batch[0]) - _TARGETS[name](batch[1])).square().mean()
        return loss

    model: nn.Module = nn.Linear(3, 1)
    if scripted:  # what goes on inside is not seen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.jit.script(model)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=off, device="cpu")
    row = trainer.preflight(DataLoader(TensorDataset(x, y), 16))["shapes of prediction and target"]
    assert (row.verdict, row.evidence) == ("failed", "the difference of a prediction (16, 1) and a target (16,)")


def test_a_column_of_targets_less_a_row_of_predictions_is_found_too() -> None:
    def off(model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.sub(batch[1][:, None], model(batch[0])[:, 0]).square().mean()

    model = nn.Linear(3, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=off, device="cpu")
    row = trainer.preflight([(torch.randn(16, 3), torch.randn(16))])["shapes of prediction and target"]
    assert (row.verdict, row.evidence) == ("failed", "the difference of a prediction (16,) and a target (16, 1)")


@pytest.mark.parametrize(
    ("loss", "ending", "shape"),
    [
        (nn.BCEWithLogitsLoss(), (), (40, 1)),
        (nn.functional.binary_cross_entropy_with_logits, (), (40, 1)),
        (nn.BCELoss(), (nn.Sigmoid(), nn.Flatten(0)), (40,)),
        (lambda p, y: nn.functional.binary_cross_entropy(p, y), (nn.Sigmoid(), nn.Flatten(0)), (40,)),
    ],
)
@pytest.mark.parametrize("sorted_by_class", [True, False])
def test_the_labels_of_a_binary_loss_are_those_of_two_classes(
    loss: Any, ending: Any, shape: tuple[int, ...], sorted_by_class: bool
) -> None:
    y = (torch.arange(40) > 19 if sorted_by_class else torch.arange(40) % 2).float().reshape(shape)
    model = nn.Sequential(nn.Linear(3, 1), *ending)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, device="cpu")
    row = trainer.preflight(DataLoader(TensorDataset(torch.randn(40, 3), y), 10))["order of the classes"]
    assert row.verdict == ("failed" if sorted_by_class else "passed"), row


def test_a_loss_that_classifies_twice_is_judged_by_its_classes() -> None:
    def both(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        any_of = nn.functional.binary_cross_entropy_with_logits(out.logsumexp(1), (y > 0).float())
        return nn.functional.cross_entropy(out, y) + any_of

    model = nn.Linear(3, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), both, device="cpu")
    data = TensorDataset(torch.randn(42, 3), torch.arange(42) // 14)
    row = trainer.preflight(DataLoader(data, 6))["order of the classes"]
    assert (row.verdict, row.evidence[:14]) == ("failed", "all 42 samples")


@pytest.mark.parametrize("targets", [torch.zeros(8), torch.full((8, 1), 0.5)])
@pytest.mark.parametrize("model", [nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())])
def test_what_a_loss_of_probabilities_refuses_is_not_judged_by_its_size(
    model: nn.Module, targets: torch.Tensor
) -> None:
    model = copy.deepcopy(model)
    nn.init.constant_(next(model.parameters()), 0.0)
    nn.init.constant_([*model.parameters()][1], -2.0)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.BCELoss(), device="cpu")
    row = trainer.preflight([(torch.randn(8, 3), targets)])["loss at the start"]
    sound = targets.ndim == 2 and not isinstance(model, nn.Linear)
    assert row.verdict == ("passed" if sound else "not applicable"), row
    assert "the check itself" not in row.evidence


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_the_order_of_the_classes_is_judged_without_a_step(loss: Any) -> None:
    model = nn.Linear(6, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, device="cpu")
    _, sorted_by_class = _classifier(torch.randn(30, 5))
    _, shuffled = _classifier(torch.randn(30, 5), shuffle=True)
    row = trainer.preflight(sorted_by_class)["order of the classes"]
    assert (row.verdict, row.fix) == ("failed", "shuffle=True in the training loader")
    assert trainer.preflight(shuffled)["order of the classes"].verdict == "passed"


def test_an_error_of_our_own_is_told_by_what_why_and_fix_without_a_line_of_the_library() -> None:
    batches = [(torch.randn(4, 3), torch.randn(4))]
    model = nn.Sequential(nn.Linear(3, 1))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device="cpu")
    report = trainer.preflight(batches)
    row, shapes = report["a training step runs"], report["shapes of prediction and target"]
    what = "the prediction has shape (4, 1), the target (4,)"
    assert row.evidence == f"{what}; batch[0] (4, 3) float32, batch[1] (4,) float32"
    assert shapes.evidence == what
    assert (row.cause, row.fix) == (shapes.cause, shapes.fix)
    assert row.cause.startswith("they would be broadcast")


def test_the_line_shown_is_the_users_own() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        total: torch.Tensor = model(batch["x"][:, :2]).sum()  # the model takes 3
        return total

    trainer = small_trainer(step=step)
    row = trainer.preflight([{"x": torch.randn(4, 3)}])["a training step runs"]
    line = step.__code__.co_firstlineno + 1
    assert f"(test_preflight.py, line {line}, in step: total: torch.Tensor = model(batch" in row.evidence
    assert row.evidence.endswith("; batch['x'] (4, 3) float32")


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_inputs_of_another_type_than_the_weights_are_named_with_the_cast(dtype: str) -> None:
    trainer, train = _classifier(torch.randn(30, 6).to(getattr(torch, dtype)))
    report = trainer.preflight(train, list(train))
    for name in ("a training step runs", "a validation step runs"):
        row = report[name]
        assert row.evidence.endswith(f"batch[0] (10, 6) {dtype}, batch[1] (10,) int64")
        assert row.cause.startswith(f"the inputs are {dtype}")
        assert row.cause.endswith("; the parameters are float32")
        assert row.fix == "inputs.float() in the dataset"
        assert ("numpy" in row.cause) == (dtype == "float64")


def test_with_weights_in_double_precision_the_cast_is_to_that() -> None:
    trainer, train = _classifier(torch.randn(30, 6))
    trainer.state.model.double()
    fix = trainer.preflight(train)["a training step runs"].fix
    assert fix == "inputs.double() in the dataset; or model.float()"


def test_an_error_of_shapes_is_not_taken_for_one_of_types() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(inputs.float())
            return out

    row = small_trainer(model=Casts()).preflight([(torch.randn(4, 2).double(), torch.randn(4, 1))])
    assert row["a training step runs"].fix == "nn.Linear(2, 1), or what it is given with 3 features"


def test_an_error_that_nothing_is_known_of_is_told_as_it_is() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("some type is wrong")

    row = small_trainer(step=step).preflight([(torch.randn(4, 3), torch.randn(4, 1))])["a training step runs"]
    assert (row.cause, row.fix) == ("", "mend it; fit would end with the same error")


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 7]), torch.tensor([-1, 1, 2])])
def test_labels_out_of_range_have_cause_and_fix_in_both_rows(labels: torch.Tensor) -> None:
    model = nn.Linear(3, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), device="cpu")
    report = trainer.preflight([(torch.randn(3, 3), labels)])
    for name in ("a training step runs", "labels and indices"):
        assert report[name].cause.startswith("a loss outside its range")
        assert report[name].fix.startswith("count from 0, and give the model one output for each class")


def test_the_batch_named_is_the_one_that_failed() -> None:
    batches = [(torch.randn(4, 3), torch.randn(4, 1)), (torch.randn(5, 3), torch.randn(5))]
    row = small_trainer().preflight(batches)["a training step runs"]
    assert row.evidence.endswith("batch[0] (5, 3) float32, batch[1] (5,) float32")


def test_fit_names_a_fix_once_for_all_the_checks_that_it_mends() -> None:
    batches = [(torch.randn(4, 3), torch.randn(4))]
    with pytest.raises(ConfigError) as caught:
        small_trainer().fit(batches, [(torch.randn(4, 3), torch.randn(4))], epochs=1, preflight=True)
    fixes = caught.value.fix.split("\n    ")
    names = "a training step runs, shapes of prediction and target, a validation step runs: "
    assert [fix[: len(names)] for fix in fixes] == [names, "or preflight=False, to train all the same"]


def test_the_name_that_the_docstring_of_a_check_gives_is_one() -> None:
    named = re.findall(r'such as ``"(.*?)"``', Check.__doc__ or "")
    assert len(named) == 1
    assert small_trainer().preflight(some_batches(1))[named[0]].verdict == "passed"


def _vmapped(model: nn.Module, batch: Any) -> torch.Tensor:
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())

    def loss_of_one(inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        prediction = torch.func.functional_call(model, parameters, (inputs[None],))
        return nn.functional.mse_loss(prediction, target[None])

    losses: torch.Tensor = torch.func.vmap(loss_of_one)(*batch)
    return losses.mean()


def _with_gradients_of_samples(model: nn.Module, batch: Any) -> torch.Tensor:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss_of_one(values: Any, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        prediction = torch.func.functional_call(model, values, (inputs[None],))
        return nn.functional.mse_loss(prediction, target[None])

    gradients = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(parameters, *batch)
    weights = 1 / (1 + torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1).square().sum(1))
    loss: torch.Tensor = (weights[:, None] * (model(batch[0]) - batch[1]).square()).mean()
    return loss


@pytest.mark.parametrize("step", [_vmapped, _with_gradients_of_samples])
def test_a_step_with_transforms_of_functions_is_looked_at(step: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    report = small_trainer(model=model, step=step).preflight(some_batches(3), some_batches(1))
    assert report.ok, str(report)
    for name in ("a training step runs", "parameters get a gradient", "two runs give the same bits"):
        assert report[name].verdict == "passed"
    assert not [check for check in report.checks if "the check itself" in check.evidence]


def _next_word(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[0].flatten())


@pytest.mark.parametrize("ending", [(), (nn.Threshold(1e9, 0.0), nn.Linear(5, 5))], ids=["sound", "cut off"])
@pytest.mark.parametrize("step", [_next_word, None], ids=["each word", "a text"])
def test_whole_numbers_are_inputs_too(ending: tuple[nn.Module, ...], step: Any) -> None:
    texts = torch.randint(5, (8, 3))
    model = nn.Sequential(nn.Embedding(5, 5), *(() if step else (nn.Flatten(), nn.Linear(15, 5))), *ending)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, None if step else nn.CrossEntropyLoss(), step=step, device="cpu")
    row = trainer.preflight([(texts, texts[:, 0]), (texts, texts[:, 1])])["outputs depend on the inputs"]
    assert row.verdict == ("failed" if ending else "passed"), row


class Placed(nn.Module):
    """It is given places beside its samples, as many as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(inputs)
        return out


def test_whole_numbers_that_are_not_of_the_samples_do_not_make_these_differ() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0], torch.arange(5)), batch[1])

    model, batch = Placed(), (torch.ones(8, 3), torch.randn(8, 1))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, device="cpu")
    row = trainer.preflight([batch, batch])["outputs depend on the inputs"]
    assert (row.verdict, row.evidence) == ("not applicable", "no predictions for samples that differ were seen")


def test_one_class_and_one_row_are_no_range() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    labels = torch.tensor([0, 1, 1, 0])
    trainer = small_trainer(model=nn.Linear(3, 1), step=step)
    row = trainer.preflight([(torch.randn(4, 3), labels)])["labels and indices"]
    assert row.evidence == "labels from 0 to 1, with 1 class, which is 0"
    trainer = small_trainer(model=nn.Sequential(nn.Embedding(1, 3), nn.Linear(3, 2)), step=step)
    row = trainer.preflight([(labels, labels)])["labels and indices"]
    assert row.evidence == "indices of an embedding from 0 to 1, with 1 row, which is 0"


def test_values_that_are_not_finite_are_counted_among_those_that_can_be_so() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0], torch.arange(5)), batch[1])

    inputs = torch.ones(8, 3)
    inputs[0, 0] = math.nan
    model = Placed()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, device="cpu")
    row = trainer.preflight([(inputs, torch.ones(8, 1))])["loss is finite"]
    assert row.cause == "1 of 24 input values are not finite"


def test_the_checks_go_by_their_names() -> None:
    report = small_trainer().preflight(some_batches(3), some_batches(1))
    assert [check.name for check in report.checks] == list(CHECKS)


def test_an_error_of_a_check_is_told_in_its_row_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_: object) -> Check:
        raise ZeroDivisionError("of the check's own")

    monkeypatch.setitem(CHECKS, "loss at the start", check)
    report = small_trainer().preflight(some_batches(3), some_batches(1))
    assert report.ok
    assert report["loss at the start"].verdict == "not applicable"
    assert "ZeroDivisionError: of the check's own" in report["loss at the start"].evidence
    assert report["a training step runs"].verdict == "passed"


class Distillation:
    """A step's surroundings: a teacher that follows, a head with an optimizer of its own, generators."""

    def __init__(self) -> None:
        self.teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
        self.head = nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=0.1)
        self.rng, self.older, self.own = np.random.default_rng(0), np.random.RandomState(1), random.Random(2)
        self.torchs = torch.Generator().manual_seed(3)
        self.lock = threading.Lock()  # cannot be copied

    def states(self) -> list[Any]:
        return [
            copy.deepcopy(self.teacher.state_dict()),
            copy.deepcopy(self.head.state_dict()),
            copy.deepcopy(self.optimizer.state_dict()),
            [p.grad for p in self.head.parameters()],
            str(self.rng.bit_generator.state),
            str(self.older.get_state()),
            self.own.getstate(),
            self.torchs.get_state(),
        ]

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return distilled(
            model, batch, self.teacher, self.head, self.optimizer, self.rng, self.older, self.own, self.torchs
        )


def distilled(
    model: nn.Module,
    batch: Any,
    teacher: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    older: np.random.RandomState,
    own: random.Random,
    torchs: torch.Generator,
) -> torch.Tensor:
    inputs = batch[0] + 0.01 * torch.from_numpy(rng.normal(size=batch[0].shape)).float()
    inputs = inputs + 0.01 * (older.rand() + own.random() + torch.rand((), generator=torchs).item())
    with torch.no_grad():
        target = teacher(inputs)
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    if torch.is_grad_enabled():
        optimizer.zero_grad()
        nn.functional.mse_loss(head(target), batch[1]).backward()  # type: ignore[no-untyped-call]  # not annotated
        optimizer.step()
    return nn.functional.mse_loss(model(inputs), head(target).detach())


AROUND = Distillation()  # named as globals by a step below
TEACHER, HEAD, OPTIMIZER = AROUND.teacher, AROUND.head, AROUND.optimizer
GENERATORS = (AROUND.rng, AROUND.older, AROUND.own, AROUND.torchs)


def _of_globals(model: nn.Module, batch: Any) -> torch.Tensor:
    def within() -> torch.Tensor:
        return distilled(model, batch, TEACHER, HEAD, OPTIMIZER, *GENERATORS)

    return within()


def _of_closure(around: Distillation) -> Any:
    teacher, head, optimizer = around.teacher, around.head, around.optimizer
    rng = around.rng
    others: dict[str, Any] = {"older": around.older, "own": around.own, "torchs": around.torchs}
    return lambda model, batch: distilled(model, batch, teacher, head, optimizer, rng, **others)


def _of_partial(around: Distillation) -> Any:
    rest: dict[str, Any] = {"rng": around.rng, "older": around.older, "own": around.own, "torchs": around.torchs}
    return functools.partial(distilled, teacher=around.teacher, head=around.head, optimizer=around.optimizer, **rest)


@pytest.mark.parametrize(
    "step_in",
    [_of_closure, _of_partial, lambda around: around, lambda around: around.__call__, lambda _: _of_globals],
    ids=["closure", "partial", "object", "method", "globals"],
)
@pytest.mark.parametrize("begun", [False, True])
def test_what_a_step_refers_to_is_put_back_and_rewound_between_the_runs(step_in: Any, begun: bool) -> None:
    around = AROUND if step_in(AROUND) is _of_globals else Distillation()
    step = step_in(around)
    if begun:
        step(small_model(), some_batches(1)[0])  # the optimizer has states, the head has gradients
    before = around.states()
    report = small_trainer(step=step).preflight(some_batches(3), some_batches(1))
    assert_alike(around.states(), before)
    assert report.ok, str(report)
    bits = report["two runs give the same bits"]
    in_place = getattr(step, "__self__", step) is around  # for its lock
    assert bits.verdict == ("not applicable" if in_place else "passed"), bits


class Dropping(nn.Module):
    """Layers that are dropped at random, as a whole."""

    def __init__(self, *, copied: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.out = nn.Linear(3, 1)
        self.lock = None if copied else threading.Lock()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.5:
                inputs = inputs + layer(inputs).relu()
        out: torch.Tensor = self.out(inputs)
        return out


class Routing(nn.Module):
    """Sixteen experts, of which each sample goes to one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 16)
        self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(16))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weights = self.gate(inputs).softmax(1)
        rows = zip(inputs, weights, weights.argmax(1).tolist(), strict=True)
        return torch.stack([self.experts[chosen](row) * weight[chosen] for row, weight, chosen in rows])


@pytest.mark.parametrize(
    ("model", "steps"),
    [(Dropping, 3), (Dropping, 1), (lambda: Dropping(copied=False), 1), (Routing, 3)],
    ids=["dropped", "dropped, one batch", "dropped, in place", "routed"],
)
def test_parameters_that_some_passes_reach_and_others_do_not_are_no_failure(model: Any, steps: int) -> None:
    report = small_trainer(model=model()).preflight(some_batches(3), some_batches(1), steps=steps)
    check = report["parameters get a gradient"]
    assert report.ok, str(report)
    assert check.verdict == "not applicable"
    assert "differs from batch to batch, or with the random numbers" in check.evidence


def test_parameters_that_no_pass_reaches_fail_where_all_reach_the_same_ones() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1))
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    check = small_trainer(model=model).preflight(some_batches(3))["parameters get a gradient"]
    assert check.verdict == "failed"
    assert "1 of 5 got none in 3 batches: unused" in check.evidence


@dataclasses.dataclass
class Features:
    x: torch.Tensor


class Moved:
    """A batch class of the kind that moves itself."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Moved:
        return Moved(self.x.to(device))


class OfFeatures(nn.Module):
    """It takes its inputs in an object, and returns one, with what is added to the outputs."""

    def __init__(self, added: Iterator[float]) -> None:
        super().__init__()
        self.layer, self.added = nn.Linear(3, 1), added

    def forward(self, features: Features | Moved) -> Features:
        return Features(self.layer(features.x) + next(self.added))


def _of_objects(added: Iterator[float]) -> Trainer[Any, Any]:
    model = nn.Sequential(OfFeatures(added))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, step=lambda model, batch: model(batch).x.square().mean(), device="cpu")


@pytest.mark.parametrize("make", [Features, Moved])
def test_input_values_are_looked_at_in_whatever_object_the_model_is_given(make: Any) -> None:
    x = torch.randn(8, 3)
    x[2, 1] = torch.nan
    report = _of_objects(itertools.repeat(0.0)).preflight([make(x)])
    assert report["loss is finite"].cause == "1 of 24 input values are not finite"


def test_what_a_layer_returns_in_an_object_is_compared_between_two_runs() -> None:
    class Unheld:  # which a copy shares
        def __init__(self) -> None:
            self.count = 0

        def __deepcopy__(self, known: Any) -> Unheld:
            return self

        def __next__(self) -> float:
            self.count += 1
            return self.count

        def __iter__(self) -> Unheld:
            return self

    row = _of_objects(Unheld()).preflight([Features(torch.randn(8, 3))])["two runs give the same bits"]
    assert row.evidence == "step 1: the output of 0 differs first"
