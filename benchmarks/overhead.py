"""What the trainer costs on top of the loop written by hand, on models so small that it shows.

Each case is trained by hand, by the trainer alone ("bare"), and with a bar, a CSV file and early stopping ("as used").
All are timed in turns, in an order that is reversed every round, so that whatever slows the machine slows each of
them. Before a round counts, the weights and the state of the random generator have to be those of the loop by hand,
bit for bit.

$ python benchmarks/overhead.py --json overhead.json --markdown overhead.md
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping, ProgressBar
from measuring import Spread, Table, aligned, freeze, machine, markdown, seconds


@dataclass(frozen=True)
class Problem:
    """Something to train, once: what the trainer is given, and the same loop by hand over the same objects."""

    model: nn.Module
    optimizer: optim.Optimizer
    loss: nn.Module
    data: Iterable[Any]
    by_hand: Callable[[int], None]  # called with the number of epochs


def document_000() -> Problem:
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    optimizer, criterion = optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    features = torch.randn(100, 10)
    labels = features @ torch.randn(10) + 0.1 * torch.randn(100)
    dataloader = DataLoader(TensorDataset(features, labels), batch_size=10, shuffle=True)

    def by_hand(epochs: int) -> None:
        for _ in range(epochs):
            running_loss = 0.0
            for feature, target in dataloader:
                optimizer.zero_grad()
                pred = model(feature).squeeze()
                loss = criterion(pred, target)
                loss.backward()
                optimizer.step()
                running_loss += loss.item()

    # The trainer has no line for the squeeze: the model that it gets does the same, as in the example.
    return Problem(nn.Sequential(*model, nn.Flatten(start_dim=0)), optimizer, criterion, dataloader, by_hand)


def document_001() -> Problem:
    x = torch.randn(100, 1)
    y = 3 * x + 0.5 * torch.randn(100, 1)
    model = nn.Linear(1, 1)
    optimizer, criterion = optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()

    def by_hand(epochs: int) -> None:
        running_loss = 0.0
        for _ in range(epochs):
            y_pred = model(x)
            loss = criterion(y_pred, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running_loss += loss.item()

    return Problem(model, optimizer, criterion, [(x, y)], by_hand)


class SimpleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(x)
        return outputs


def document_002() -> Problem:
    dataset = TensorDataset(torch.randn(100, 10), torch.randn(100, 1))
    dataloader = DataLoader(dataset, batch_size=32, shuffle=True)
    model = SimpleModel()
    optimizer, criterion = optim.Adam(model.parameters(), lr=0.001), nn.MSELoss()

    def by_hand(epochs: int) -> None:
        for _ in range(epochs):
            model.train()
            running_loss = 0.0
            for inputs_batch, targets_batch in dataloader:
                optimizer.zero_grad()
                outputs = model(inputs_batch)
                loss = criterion(outputs, targets_batch)
                loss.backward()
                optimizer.step()
                running_loss += loss.item()

    return Problem(model, optimizer, criterion, dataloader, by_hand)


def ready_made(batches: int) -> Problem:
    """Document 000's network on a list of batches: no loader, so that what is left is the loop's own cost."""
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    optimizer, criterion = optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    data = [(torch.randn(10, 10), torch.randn(10, 1)) for _ in range(batches)]

    def by_hand(epochs: int) -> None:
        for _ in range(epochs):
            running_loss = 0.0
            for inputs, targets in data:
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                loss.backward()
                optimizer.step()
                running_loss += loss.item()

    return Problem(model, optimizer, criterion, data, by_hand)


@dataclass(frozen=True)
class Case:
    """A problem, and for how many epochs it is trained."""

    name: str
    problem: Callable[[], Problem]
    epochs: int
    batches: int  # in an epoch

    @property
    def steps(self) -> int:
        """Optimizer steps in one run."""
        return self.epochs * self.batches


CASES = (
    Case("document 000", document_000, epochs=20, batches=10),
    Case("document 001", document_001, epochs=100, batches=1),
    Case("document 002", document_002, epochs=10, batches=4),
    Case("ready-made batches", partial(ready_made, 100), epochs=3, batches=100),
    Case("a single step", partial(ready_made, 1), epochs=1, batches=1),
)


class Terminal(io.TextIOWrapper):
    """A terminal that nobody looks at: the bar draws on it as on any other."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115  # closed with this one

    def isatty(self) -> bool:
        return True


def by_hand(problem: Problem, case: Case) -> Callable[[], object]:
    return partial(problem.by_hand, case.epochs)


def bare(problem: Problem, case: Case) -> Callable[[], object]:
    return _fit(problem, case, [])


def as_used(problem: Problem, case: Case, *, screen: Terminal, folder: Path) -> Callable[[], object]:
    path = folder / f"{len(os.listdir(folder))}.csv"
    stopping = EarlyStopping("train/loss", mode="min", patience=case.epochs)  # too patient to stop anything
    return _fit(problem, case, [ProgressBar(file=screen), CSVLogger(path), stopping])


def _fit(problem: Problem, case: Case, callbacks: list[Callback]) -> Callable[[], object]:
    trainer = Trainer(problem.model, problem.optimizer, problem.loss, callbacks=callbacks, device="cpu")
    return partial(trainer.fit, problem.data, epochs=case.epochs)


Way = Callable[[Problem, Case], Callable[[], object]]
"""A way to train a problem: what is to be timed, with everything built."""


class OtherBits(Exception):
    """A way of training has not ended where the loop by hand has, so that its time says nothing."""


def measure(case: Case, ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """The seconds that each way took, round by round; the first of ``ways`` is the one to be equal to.

    Raises:
        OtherBits: One of them came to other weights, or drew other random numbers.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(-1, rounds):
        ends = {}
        for way in ways if number % 2 else reversed(list(ways)):
            torch.manual_seed(number + 1)
            problem = case.problem()
            run = ways[way](problem, case)
            times[way].append(seconds(run))
            ends[way] = {**problem.model.state_dict(), "the random generator's state": torch.get_rng_state()}
        first, *others = ways
        for other in others:
            for name, value in ends[first].items():
                if not torch.equal(value, ends[other][name]):
                    raise OtherBits(f"{case.name}, round {number}: {name} is not that of the loop by hand in {other!r}")
        if number < 0:  # the round in which everything is loaded and warm
            times = {way: [] for way in ways}
    return times


def report(case: Case, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """What the measurements say, each way compared with the first within its own round."""
    microseconds = {way: [1e6 * t / case.steps for t in taken] for way, taken in times.items()}
    (_, hand), *others = microseconds.items()
    return {
        "case": case.name,
        "epochs": case.epochs,
        "steps": case.steps,
        "by_hand_us_per_step": asdict(Spread.of(hand)),
        "loopwright": {
            way: {
                "rounds_with_equal_bits": len(taken),  # measure saw to it
                "ratio": asdict(Spread.of([a / b for a, b in zip(taken, hand, strict=True)])),
                "added_us_per_step": asdict(Spread.of([a - b for a, b in zip(taken, hand, strict=True)])),
            }
            for way, taken in others
        },
    }


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    rows = [["case", "steps", "by hand, us a step", "loopwright", "ratio", "added, us a step"]]
    for found in reports:
        for way, figures in found["loopwright"].items():
            hand, ratio, added = (
                Spread(**spread)
                for spread in (found["by_hand_us_per_step"], figures["ratio"], figures["added_us_per_step"])
            )
            cells = [found["case"], str(found["steps"]), hand.text(1), way, ratio.text(2), added.text(1)]
            rows.append(cells)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="how often each case is timed (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that all works; the times mean little")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table there, for a page")
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else options.rounds
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    torch.set_num_threads(1)
    freeze()
    with tempfile.TemporaryDirectory() as folder, Terminal() as screen:
        ways: dict[str, Way] = {
            "by hand": by_hand,
            "bare": bare,
            "as used": partial(as_used, screen=screen, folder=Path(folder)),
        }
        try:
            reports = [report(case, measure(case, ways, rounds)) for case in CASES]
        except OtherBits as error:
            sys.exit(str(error))

    facts, table = machine(), as_table(reports)
    print(*(f"{name}: {fact}" for name, fact in facts.items()), f"rounds: {rounds}", "", aligned(table), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts, "rounds": rounds, "cases": reports}, indent=2) + "\n")
    if options.markdown is not None:
        listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        options.markdown.write_text(f"{markdown(table)}\n\nMeasured with {rounds} rounds on:\n\n{listed}\n")


if __name__ == "__main__":
    main()
