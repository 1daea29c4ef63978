"""What each callback that comes with the library adds to a step: the figures of docs/callbacks.md.

The network of document 000 is trained on a list of 100 ready-made batches, 5 epochs, once without callbacks and once
with a single one, by turns. What is timed is the whole of ``fit``, so that opening a file and what happens at the end
of an epoch are shared out among the 500 steps. The cost is the difference of the two times of one round, by steps.

$ python benchmarks/callbacks.py --json benchmarks/results/callbacks.json
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopwright import Callback, Trainer
from loopwright.callbacks import (
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    GradientInspector,
    LearningRateMonitor,
    ProgressBar,
    TensorBoardLogger,
)
from measuring import Spread, aligned, freeze, machine, seconds

BATCHES, EPOCHS = 100, 5

MADE: dict[str, Callable[[Path], Callback[Any]]] = {
    "ProgressBar": lambda folder: ProgressBar(file=Terminal()),
    "CSVLogger": lambda folder: CSVLogger(folder / "metrics.csv"),
    "TensorBoardLogger": lambda folder: TensorBoardLogger(folder / "log"),
    "LearningRateMonitor": lambda folder: LearningRateMonitor(),
    "EarlyStopping": lambda folder: EarlyStopping("train/loss", mode="min", patience=EPOCHS),
    "Checkpoint": lambda folder: Checkpoint(folder / "checkpoints"),
    "GradientInspector": lambda folder: GradientInspector(),
}


class Terminal(io.StringIO):
    """Where a bar is drawn."""

    def isatty(self) -> bool:
        return True


def once(batches: list[tuple[Tensor, Tensor]], make: Callable[[Path], Callback[Any]] | None) -> float:
    """The time of one fit, in seconds, with this callback or with none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [] if make is None else [make(Path(folder))]
        trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, device="cpu")
        return seconds(lambda: trainer.fit(batches, epochs=EPOCHS))


def measure(rounds: int) -> dict[str, Spread]:
    """What each adds, in microseconds a step."""
    batches = [(torch.randn(10, 10), torch.randn(10, 1)) for _ in range(BATCHES)]
    added: dict[str, list[float]] = {name: [] for name in MADE}
    for make in (None, *MADE.values()):
        once(batches, make)  # whatever is imported or compiled at the first use
    freeze()
    for number in range(rounds):
        for name, make in MADE.items():
            turns = [None, make] if number % 2 else [make, None]
            times = {turn is None: once(batches, turn) for turn in turns}
            added[name].append((times[False] - times[True]) * 1e6 / (BATCHES * EPOCHS))
    return {name: Spread.of(values) for name, values in added.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="at least 2")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    added = measure(arguments.rounds)
    print(aligned([("callback", "added, us a step"), *((name, spread.text(1)) for name, spread in added.items())]))
    if arguments.json is not None:
        report = {
            "added_us_a_step": {name: asdict(spread) for name, spread in added.items()},
            "machine": {**machine(), "rounds": str(arguments.rounds)},
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
