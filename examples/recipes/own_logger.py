"""A logger for a tracker of your own: where it writes to is all that has to be said. Here it is a table of SQLite."""

import contextlib
import os
import sqlite3
from collections.abc import Mapping

import torch
from torch import nn

from loopwright import Every, State, Trainer
from loopwright.callbacks import LearningRateMonitor, Logger


class SQLiteLogger(Logger):
    def __init__(self, path: str | os.PathLike[str], *, every: Every = Every(epochs=1)) -> None:  # noqa: B008  # frozen
        super().__init__(every=every)
        self._path = path

    def open(self, state: State, *, fresh: bool) -> None:
        self._table = sqlite3.connect(self._path)
        if fresh:  # a new run; one that goes on keeps what it has written
            self._table.execute("drop table if exists run")
        self._table.execute("create table if not exists run (epoch int, step int, name text, value real)")
        self._table.execute("delete from run where step > ?", [state.progress.step])  # written after the checkpoint

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        rows = [(epoch, step, name, value) for name, value in values.items()]
        self._table.executemany("insert into run values (?, ?, ?, ?)", rows)

    def flush(self) -> None:
        self._table.commit()

    def close(self) -> None:
        if hasattr(self, "_table"):  # close is called also where open failed
            self._table.close()
            del self._table  # so that the callback can be pickled


def train(path: str | os.PathLike[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = nn.Linear(3, 1)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        callbacks=[LearningRateMonitor(), SQLiteLogger(path)],
        device="cpu",
    )
    trainer.fit([(part, part.sum(1, keepdim=True)) for part in torch.split(x, 16)], epochs=3)


if __name__ == "__main__":
    train("run.sqlite")
    with contextlib.closing(sqlite3.connect("run.sqlite")) as table:
        for epoch, step, name, value in table.execute("select * from run where epoch = 3 order by name"):
            print(f"epoch {epoch}, step {step}: {name} {value:.3f}")
