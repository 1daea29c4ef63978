"""What the trainer does beside the loop by hand, counted: its functions entered per step, epoch and fit (P1, P4)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright
from loopwright import Callback, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping
from loopwright.history import History
from loopwright.metrics import Metrics

HERE = str(Path(loopwright.__file__).parent)


def entered(call: Callable[[], object]) -> int:
    """How many of the library's own functions are entered, by each resumption of a generator again."""
    count = 0

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(HERE):
            count += 1

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def loader(batches: int) -> Iterable[Any]:
    dataset = TensorDataset(torch.randn(10 * batches, 3), torch.randn(10 * batches, 1))
    return DataLoader(dataset, batch_size=10, shuffle=True)


def ready_made(batches: int) -> Iterable[Any]:
    return [(torch.randn(10, 3), torch.randn(10, 1)) for _ in range(batches)]


def cost(data: Callable[[int], Iterable[Any]], batches: int, epochs: int, callbacks: Callable[[], list[Any]]) -> int:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    listed: list[Callback[Any]] = callbacks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=listed, device="cpu")
    given = data(batches)
    return entered(lambda: trainer.fit(given, epochs=epochs))


def none() -> list[Any]:
    return []


@pytest.fixture
def as_used(tmp_path: Path) -> Callable[[], list[Any]]:
    def made() -> list[Any]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        return [CSVLogger(path), EarlyStopping("train/loss", mode="min", patience=100)]

    return made


@pytest.mark.parametrize(("data", "most"), [(ready_made, 20), (loader, 23)])
def test_a_step_enters_few_functions(data: Callable[[int], Iterable[Any]], most: int) -> None:
    cost(data, 2, 1, none)  # what is done once in a process
    assert (cost(data, 12, 1, none) - cost(data, 2, 1, none)) / 10 <= most


def test_loggers_and_early_stopping_cost_a_step_nothing(as_used: Callable[[], list[Any]]) -> None:
    bare = cost(loader, 12, 1, none) - cost(loader, 2, 1, none)
    assert cost(loader, 12, 1, as_used) - cost(loader, 2, 1, as_used) <= bare


def test_an_epoch_and_a_fit_enter_few_functions_beside_their_steps() -> None:
    cost(loader, 2, 1, none)  # what is done once in a process
    one, two, many = (cost(loader, 2, epochs, none) for epochs in (1, 2, 12))
    step = (cost(loader, 12, 1, none) - one) / 10
    assert (many - two) / 10 - 2 * step <= 62
    assert one - 2 * step <= 227


def test_a_long_history_is_not_walked_through_at_each_epoch() -> None:
    looked = 0

    class Row(dict[str, float]):
        def __getitem__(self, name: str) -> float:
            nonlocal looked
            looked += 1
            return super().__getitem__(name)

    history = History(Metrics())
    history._rows = [Row(epoch=n, step=4 * n) for n in range(1, 1001)]
    assert [history.steps_by(n) for n in (1000, 999, 1001)] == [4000, 3996, None]
    assert looked < 20
    assert [history.steps_by(n) for n in (1, 0)] == [4, 0]
