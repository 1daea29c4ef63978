"""What the trainer costs on top of the loop written by hand, on models so small that it shows.

Each case is trained by hand, by the trainer alone ("bare"), with a bar, a CSV file and early stopping ("as used"), and
two of them with a checkpoint every ten epochs beside these ("with checkpoints"), whose last one is on the disk when the
clock stops. These take turns, in an order that is reversed every round, so that whatever slows the machine slows each
of them. Before a round counts, weights and random generator have to be where the loop by hand leaves them, bit for bit.

$ python benchmarks/overhead.py --json overhead.json --markdown overhead.md --plot overhead.png
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loopwright import Callback, Every, Trainer
from loopwright.callbacks import Checkpoint, CSVLogger, EarlyStopping, ProgressBar
from measuring import Spread, Table, add_outputs, disk, freeze, machine, plain_axes, put_out, seconds


@dataclass(frozen=True)
class Problem:
    """Something to train, once: what the trainer is given, and the same loop by hand over the same objects."""

    model: nn.Module
    optimizer: optim.Optimizer
    loss: nn.Module
    data: Iterable[Any]
    by_hand: Callable[[int], None]  # called with the number of epochs


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 3), nn.Linear(3, 1))


def larger_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of one's own, which is asked for sample by sample."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.features[number], self.labels[number]


def document_000(kind: Callable[[Tensor, Tensor], Dataset[Any]] = TensorDataset) -> Problem:
    model = small_network()
    optimizer, criterion = optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    features = torch.randn(100, 10)
    labels = features @ torch.randn(10) + 0.1 * torch.randn(100)
    dataloader = DataLoader(kind(features, labels), batch_size=10, shuffle=True)

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

    # The trainer has no line for the squeeze: as in the example, its model ends in a layer that does the same.
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


class Clocked:
    """A list of batches that notes when each is asked for: from one to the next is exactly one step of a loop."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.asked: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.asked.append(perf_counter())
            yield batch

    def step(self) -> float:
        """The seconds that a step took: the median, which the few between two epochs do not touch."""
        return statistics.median(b - a for a, b in zip(self.asked, self.asked[1:], strict=False))


def ready_made(network: Callable[[], nn.Sequential], batches: int, shape: tuple[int, int], *, clocked: bool) -> Problem:
    """A list of batches, and no loader: what is left is the loop's own cost."""
    model = network()
    optimizer, criterion = optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    made = [(torch.randn(shape), torch.randn(shape[0], 1)) for _ in range(batches)]
    data: Iterable[tuple[Tensor, Tensor]] = Clocked(made) if clocked else made

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
    """A problem, and for how long it is trained."""

    name: str
    problem: Callable[[], Problem]
    epochs: int
    steps: int  # in all
    checkpoints: bool = False  # whether it is trained with them too

    def shortened(self) -> Case:
        """The same for one epoch."""
        return replace(self, epochs=1, steps=self.steps // self.epochs)


CASES = (
    Case("document 000", document_000, epochs=20, steps=200),
    Case("document 000, 100 steps", document_000, epochs=10, steps=100, checkpoints=True),
    Case("document 000, 1,000 steps", document_000, epochs=100, steps=1_000, checkpoints=True),
    Case("document 000, own dataset", partial(document_000, Samples), epochs=20, steps=200),
    Case("document 001", document_001, epochs=100, steps=100),
    Case("document 002", document_002, epochs=10, steps=40),
    Case("ready-made batches", partial(ready_made, small_network, 100, (10, 10), clocked=True), epochs=3, steps=300),
    Case("larger network", partial(ready_made, larger_network, 25, (256, 64), clocked=True), epochs=3, steps=75),
    Case("a single step", partial(ready_made, small_network, 1, (10, 10), clocked=False), epochs=1, steps=1),
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
    own = folder / str(len(os.listdir(folder)))
    own.mkdir()
    return _fit(problem, case, usual_callbacks(case, screen, own))


def with_checkpoints(problem: Problem, case: Case, *, screen: Terminal, folder: Path) -> Callable[[], object]:
    own = folder / str(len(os.listdir(folder)))
    own.mkdir()
    checkpoint = Checkpoint(own / "checkpoints", every=Every(epochs=10))
    return _fit(problem, case, [*usual_callbacks(case, screen, own), checkpoint])


def usual_callbacks(case: Case, screen: Terminal, folder: Path) -> list[Callback]:
    stopping = EarlyStopping("train/loss", mode="min", patience=case.epochs)  # too patient to stop anything
    return [ProgressBar(file=screen), CSVLogger(folder / "metrics.csv"), stopping]


def _fit(problem: Problem, case: Case, callbacks: list[Callback]) -> Callable[[], object]:
    trainer = Trainer(problem.model, problem.optimizer, problem.loss, callbacks=callbacks, device="cpu")
    return partial(trainer.fit, problem.data, epochs=case.epochs)


Way = Callable[[Problem, Case], Callable[[], object]]
"""A way to train a problem: it builds what it needs, and returns what is to be timed."""


class OtherBitsError(Exception):
    """A way to train has not ended where the loop by hand has, so that its time says nothing."""


def measure(case: Case, ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """The seconds a step that each way took, round by round.

    Args:
        case: What to train.
        ways: Names to ways. The others have to come to the same bits as the first.
        rounds: How often to train it in each way.

    Raises:
        OtherBitsError: One of them came to other weights, or drew other random numbers.
    """
    first, *others = ways
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        ends = {}
        for way in ways if number % 2 else reversed(list(ways)):
            torch.manual_seed(number)
            problem = case.problem()
            took = seconds(ways[way](problem, case))
            times[way].append(problem.data.step() if isinstance(problem.data, Clocked) else took / case.steps)
            ends[way] = {**problem.model.state_dict(), "the random generator's state": torch.get_rng_state()}
        for way in others:
            for name, value in ends[first].items():
                if not torch.equal(value, ends[way][name]):
                    raise OtherBitsError(f"{case.name}, {way}, round {number}: other bits than {first} in {name}")
    return {way: taken[1:] for way, taken in times.items()}  # without the round in which everything gets warm


def report(case: Case, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What the measurements say: each way compared with the first, always within one round."""
    (_, first), *others = times.items()
    return {
        "case": case.name,
        "epochs": case.epochs,
        "steps": case.steps,
        "by_hand_us_per_step": asdict(Spread.of([1e6 * a for a in first])),
        "loopwright": {
            way: {
                "rounds_with_equal_bits": len(taken),  # measure lets no other pass
                "ratio": asdict(Spread.of([b / a for a, b in zip(first, taken, strict=True)])),
                "added_us_per_step": asdict(Spread.of([1e6 * (b - a) for a, b in zip(first, taken, strict=True)])),
            }
            for way, taken in others
        },
    }


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    rows = [["case", "steps", "by hand, us a step", "loopwright", "ratio", "added, us a step"]]
    for found in reports:
        for way, figures in found["loopwright"].items():
            hand = Spread(**found["by_hand_us_per_step"]).text(1)
            ratio, added = Spread(**figures["ratio"]).text(2), Spread(**figures["added_us_per_step"]).text(1)
            rows.append([found["case"], str(found["steps"]), hand, way, ratio, added])
    return rows


COLORS = {"bare": "#2f6db3", "as used": "#c8692b", "with checkpoints": "#3d8b53"}


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The ratios with their quartiles, a row a case."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8.4, 0.9 + 0.36 * len(reports)), dpi=150, layout="constrained")
    ax = figure.subplots()
    for y, found in enumerate(reversed(reports)):
        for shift, (way, color) in zip((0.2, 0.0, -0.2), COLORS.items(), strict=True):
            if way in found["loopwright"]:
                ratio = Spread(**found["loopwright"][way]["ratio"])
                ax.plot([ratio.quartile1, ratio.quartile3], [y + shift] * 2, color=color, linewidth=1.6)
                ax.plot(ratio.median, y + shift, "o", color=color, markersize=5, label=way)
    ax.axvline(1, color="0.35", linestyle=":", linewidth=1.4)
    ax.set_yticks(range(len(reports)), [found["case"] for found in reversed(reports)])
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7, 8, 9)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("time of the loop by hand = 1", fontsize=9)
    plain_axes(ax)
    lines = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # each label once
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="how often each case is timed (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two rounds of an epoch: they show bits, not times")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to save to (default: the current one)")
    add_outputs(parser, plot=True)
    options = parser.parse_args(arguments)
    rounds, cases = (2, [case.shortened() for case in CASES]) if options.quick else (options.rounds, CASES)
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    torch.set_num_threads(1)
    os.environ.update(TERM="xterm", TQDM_DISABLE="0")  # the bar is drawn, wherever this runs
    freeze()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Terminal() as screen:
        ways: dict[str, Way] = {
            "by hand": by_hand,
            "bare": bare,
            "as used": partial(as_used, screen=screen, folder=Path(folder)),
        }
        saving: dict[str, Way] = {"with checkpoints": partial(with_checkpoints, screen=screen, folder=Path(folder))}
        try:
            reports = [
                report(case, measure(case, ways | saving if case.checkpoints else ways, rounds)) for case in cases
            ]
        except OtherBitsError as error:
            sys.exit(str(error))

    facts, table = machine() | {"disk": disk(options.folder), "rounds": str(rounds)}, as_table(reports)
    put_out(options, {"machine": facts, "rounds": rounds, "cases": reports}, table, draw=partial(draw, reports))


if __name__ == "__main__":
    main()
