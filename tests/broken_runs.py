"""Runs that break off and go on: a run whose every choice can be set, and all that it leaves behind to compare."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Every, Result, Schedule, State, Trainer
from loopwright.adapters import plain_state
from loopwright.callbacks import Checkpoint, CSVLogger, EarlyStopping
from loopwright.plain import encode, to_json
from loopwright.testing import HookRecorder


class Interrupted(BaseException):
    """What ends a run in its midst here. Nothing is saved on an exception, so it is as if the run were killed."""


class Interrupt(HookRecorder):
    """Raises in the hook that is called as number ``at``, counted from 1; before or after the other callbacks."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at

    def record(self, hook: str, state: State) -> None:
        super().record(hook, state)
        if len(self.calls) == self.at:
            raise Interrupted


class CountSteps(HookRecorder):
    """Counts the optimizer steps that this process made, and is told of a count by what it restores."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def record(self, hook: str, state: State) -> None:
        self.steps += hook == "on_step_end"

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


_EACH_EPOCH, _EACH_SECOND_STEP = Every(epochs=1), Every(steps=2)


@dataclass(frozen=True)
class Case:
    """One run's settings."""

    samples: int = 11
    batch_size: int = 3
    drop_last: bool = False
    accumulate: int = 1
    save: Every = _EACH_SECOND_STEP
    validate: Every | None = _EACH_EPOCH
    epochs: int | None = 3
    steps: int | None = None
    keep: int = 2
    patience: int | None = None
    each: str = "epoch"
    log: Every = _EACH_SECOND_STEP
    settings: dict[str, Any] = field(default_factory=dict)
    train: Callable[[], Iterable[Any]] | None = None
    val: Callable[[], Iterable[Any]] | None = None


def dataset(samples: int) -> TensorDataset:
    """Inputs ``(3,)`` and targets ``(1,)``; always the same data."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator))


def scramble() -> None:
    """Put the random generators where no run has left them."""
    random.seed()
    np.random.seed(random.randrange(2**32))
    torch.manual_seed(random.randrange(2**32))


def build(case: Case, folder: Path, at: int | None = None, *more: Callback[Any]) -> Trainer:
    """A new trainer over a new model: nothing of an earlier process is left in it."""
    scramble()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3, 4], gamma=0.7)
    monitor = "train/loss" if case.validate is None else "val/loss"
    checkpoint = Checkpoint(folder / "checkpoints", every=case.save, monitor=monitor, mode="min", keep=case.keep)
    callbacks: list[Any] = [
        Interrupt(at),
        CountSteps(),
        checkpoint,
        CSVLogger(folder / "metrics.csv", every=case.log),
        *more,
    ]
    if case.patience is not None:
        callbacks.insert(1, EarlyStopping(monitor, mode="min", patience=case.patience, restore_best=True))
    return Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        schedule=Schedule(scheduler, each=case.each),  # type: ignore[arg-type]  # drawn from the two that there are
        callbacks=callbacks,
        device="cpu",
        seed=5,
        accumulate=case.accumulate,
        **case.settings,
    )


def fit(trainer: Trainer, case: Case, resume: Any = "auto") -> Result:
    """The run, or what is left of it."""
    if case.train is not None:
        train: Iterable[Any] = case.train()
    else:
        train = DataLoader(dataset(case.samples), batch_size=case.batch_size, shuffle=True, drop_last=case.drop_last)
    val: Iterable[Any] | None = DataLoader(dataset(case.samples), batch_size=4)
    if case.val is not None:
        val = case.val()
    if case.validate is None:
        val = None
    validate = case.validate or Every(epochs=1)
    return trainer.fit(train, val, epochs=case.epochs, steps=case.steps, validate=validate, resume=resume)


def left_behind(trainer: Trainer, result: Result, folder: Path) -> dict[str, bytes]:
    """All that a run leaves, by name, as bytes: two runs are the same if and only if all of these are."""
    state = trainer.state
    schedule = trainer._settings.schedule
    counter = next(c for c in trainer._settings.callbacks if isinstance(c, CountSteps))
    parts = {
        "weights": dict(state.model.state_dict()),
        "optimizer": plain_state(state.optimizer.state_dict()),
        "schedule": None if schedule is None else plain_state(schedule.lr_scheduler.state_dict()),
        "random": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()],  # type: ignore[index]  # the legacy form
        "history": result.history,
        "progress": vars(result.progress),
        "ending": [result.stop_reason, result.restored_epoch],
        "steps made": [counter.steps, result.progress.step],
        "metrics": dict(state.metrics),
    }
    found = {name: as_bytes(value) for name, value in parts.items()}
    return found | {"CSV": (folder / "metrics.csv").read_bytes()}


def as_bytes(value: Any) -> bytes:
    """The value, tensors and all, as bytes."""
    tree, tensors = encode(value)
    return to_json(tree) + b"".join(name.encode() + _bits(tensors[name]) for name in sorted(tensors))


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().numpy().tobytes())


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """The names of what is not the same."""
    return [name for name in one if one[name] != other[name]]


def unbroken(case: Case, folder: Path) -> tuple[dict[str, bytes], int]:
    """What the run leaves when nothing interrupts it, and how often a hook is called in it."""
    trainer = build(case, folder)
    result = fit(trainer, case)
    calls = next(c for c in trainer._settings.callbacks if isinstance(c, Interrupt)).calls
    return left_behind(trainer, result, folder), len(calls)


def broken(case: Case, folder: Path, interruptions: Iterable[int]) -> dict[str, bytes]:
    """What the run leaves when it breaks off in these calls of hooks, one in each process, and is resumed each time."""
    for at in (*interruptions, None):
        trainer = build(case, folder, at)
        try:
            result = fit(trainer, case)
        except Interrupted:
            continue
        return left_behind(trainer, result, folder)
    raise AssertionError("the last attempt has no interruption")
