"""The runs that the tests kill: each a kind of data, accumulation and stopping, over real processes and real files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from broken_runs import Case, build, dataset, fit, left_behind
from loopwright import Every
from loopwright.data import Loader


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise from all three generators that a dataset may draw from."""

    def __init__(self, samples: int) -> None:
        self.samples = dataset(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.samples[index]
        return x + 0.1 * torch.randn(3) + random.random() + np.random.rand(), y


def augmented(workers: int) -> Iterable[Any]:
    """A plain loader over samples with noise."""
    return DataLoader(Augmented(26), batch_size=4, shuffle=True, num_workers=workers)


def _own(workers: int) -> Iterable[Any]:
    return Loader(Augmented(26), 4, seed=3, workers=workers)


KINDS: dict[str, Case] = {
    "a plain loader": Case(samples=34, batch_size=3, save=Every(steps=2), epochs=4),
    "accumulation with a short window": Case(samples=29, batch_size=3, accumulate=4, save=Every(steps=1), epochs=6),
    "early stopping": Case(samples=20, batch_size=3, save=Every(epochs=1), epochs=90, patience=2),
    "augmentation": Case(save=Every(steps=2), epochs=4, train=lambda: augmented(0)),
    "augmentation in 2 workers": Case(save=Every(steps=3), epochs=2, train=lambda: augmented(2)),
    "loopwright's loader, its workers changing": Case(save=Every(steps=2), epochs=3),
}


def case_of(kind: str, workers: int) -> Case:
    """The settings of one kind of run."""
    case = KINDS[kind]
    if kind.startswith("loopwright"):
        return Case(save=case.save, epochs=case.epochs, train=lambda: _own(workers))
    return case


def run(kind: str, folder: str, workers: int) -> None:
    """Run it, or what is left of it, and leave in ``result.json`` all that there is to compare."""
    place = Path(folder)
    case = case_of(kind, workers)
    trainer = build(case, place)
    result = fit(trainer, case)
    found = {name: value.hex() for name, value in left_behind(trainer, result, place).items()}
    (place / "result.tmp").write_text(json.dumps(found))
    (place / "result.tmp").rename(place / "result.json")
