"""Runs that say when they have come to a chosen place, and linger there, so that a signal finds them in it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

import kill_runs
from broken_runs import Case, build, dataset, fit, left_behind, scramble
from helpers import At, small_model
from loopwright import Every, State, Trainer
from loopwright.callbacks import Checkpoint
from nursery import until

HOOKS = {"train": "on_batch_end", "val": "on_eval_batch_end"}


def case_of(workers: int) -> Case:
    """A run of three epochs of seven batches that saves at its end alone."""
    train = (lambda: kill_runs.augmented(2)) if workers else None
    return Case(samples=20, batch_size=3, save=Every(epochs=50), epochs=3, train=train)


def lingers(folder: str, stage: str, workers: int) -> None:
    """The run; in its second epoch it writes ``there`` in a batch of the stage, and stays until ``go`` appears."""
    place = Path(folder)

    def linger(state: State, output: object) -> None:
        if state.progress.epoch == 1 and state.progress.batch >= 2 and not (place / "there").exists():
            (place / "there").touch()
            until(place / "go")  # a signal's handler runs within it

    hooks: dict[str, Any] = {HOOKS[stage]: linger}
    _run(case_of(workers), place, At(**hooks))


def whole(folder: str, workers: int) -> None:
    """The run, or what is left of it; what it leaves goes into ``result.json``."""
    _run(case_of(workers), Path(folder))


def _run(case: Case, place: Path, *callbacks: Any) -> None:
    trainer = build(case, place, None, *callbacks)
    result = fit(trainer, case)
    found = {name: value.hex() for name, value in left_behind(trainer, result, place).items()}
    (place / "result.json").write_text(json.dumps(found))


class Stuck(Dataset[tuple[Tensor, Tensor]]):
    """Its worker says who it is and then does not come back for a long time, whatever becomes of its parent."""

    def __init__(self, place: Path) -> None:
        self.place, self.samples = place, dataset(20)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if get_worker_info() is not None and index > 6:
            (self.place / "worker.tmp").write_text(str(os.getpid()))
            (self.place / "worker.tmp").rename(self.place / "worker")
            time.sleep(60)
        x, y = self.samples[index]
        return x, y


def stuck(folder: str, workers: int) -> None:
    """A run whose worker is stuck in its third batch."""
    scramble()
    place, model = Path(folder), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(Stuck(place), batch_size=3, num_workers=workers)
    saves = Checkpoint(place / "checkpoints", every=Every(steps=1))
    Trainer(model, optimizer, torch.nn.MSELoss(), callbacks=[saves], device="cpu").fit(loader, epochs=1, resume="auto")
