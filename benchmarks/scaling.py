"""Whether what the trainer adds to a step stays the same as the model, the batch and the list of callbacks grow.

The trainer and the loop by hand take turns within one fit: after every ten batches that the trainer has got, the loop
by hand makes ten steps, on a model of its own with the same weights. So what is compared is only milliseconds apart.
The first steps of a turn do not count: code that has not run for a while is slow. A round's figure is the median over
its turns. Every round starts with new models, and does not count unless both end with the same bits.

The control is the same measurement with the loop by hand in the trainer's place, and what is added is the difference
to it. Where the quartiles of the two lie far apart, the machine itself varies by more than the trainer adds. A model
that fills the processor's caches slows whatever runs between its steps, the more of it the more there is.

$ python benchmarks/scaling.py --json scaling.json --markdown scaling.md --plot scaling.png
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn, optim

from loopwright import Callback, State, Trainer
from measuring import Spread, Table, add_outputs, freeze, machine, plain_axes, put_out
from overhead import OtherBitsError, small_network

TURN = 10  # steps
SETTLING = 4  # of them, which do not count
TURNS = 50  # of a round, where it takes less than SECONDS
FEWEST = 3  # however long they take; the first does not count
SECONDS = 1.0

BLUE, GREY = "#2f6db3", "0.45"


class Idle(Callback[Any]):
    """Has nothing to do in a step, like most callbacks."""

    def on_epoch_end(self, state: State) -> None:
        pass


class Busy(Callback[Any]):
    """Is called at every step."""

    def on_step_end(self, state: State) -> None:
        pass


def network(parameters: int) -> nn.Module:
    """Three layers with about this number of parameters, or a single one with ten."""
    if parameters == 10:
        return nn.Linear(9, 1)
    width = round((36 + parameters - 1) ** 0.5 - 6)  # parameters = width ** 2 + 12 * width + 1
    return nn.Sequential(nn.Linear(9, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


@dataclass(frozen=True)
class Point:
    """What is trained at one point of a curve."""

    value: int
    model: Callable[[], nn.Module]
    shape: tuple[int, int]  # of the inputs
    callbacks: tuple[Callback[Any], ...] = ()


def by_parameters(value: int) -> Point:
    return Point(value, partial(network, value), (32, 9))


def by_batch(value: int) -> Point:
    return Point(value, small_network, (value, 10))


def by_callbacks(kind: type[Callback[Any]], value: int) -> Point:
    return Point(value, small_network, (10, 10), tuple(kind() for _ in range(value)))


@dataclass(frozen=True)
class Curve:
    """A cost over something that grows."""

    name: str
    point: Callable[[int], Point]
    values: tuple[int, ...]


CURVES = (
    Curve("parameters", by_parameters, (10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)),
    Curve("batch size", by_batch, (1, 4, 16, 64, 256, 1_024, 4_096)),
    Curve("callbacks, idle in a step", partial(by_callbacks, Idle), (0, 1, 2, 5, 10, 20, 50)),
    Curve("callbacks, called in a step", partial(by_callbacks, Busy), (0, 1, 2, 5, 10, 20, 50)),
)


class Side:
    """A model and its optimizer; there are two alike."""

    def __init__(self, point: Point, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = point.model()
        self.optimizer = optim.SGD(self.model.parameters(), lr=1e-3)
        self.loss = nn.MSELoss()

    def fit(self, point: Point, data: Turns) -> None:
        """The trainer."""
        callbacks = point.callbacks
        Trainer(self.model, self.optimizer, self.loss, callbacks=callbacks, device="cpu").fit(data, epochs=1)

    def by_hand(self, point: Point, data: Turns) -> None:
        """The control."""
        del point
        for _ in self.steps(data):
            pass

    def steps(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """The loop by hand; it halts after each step."""
        model, optimizer, criterion = self.model, self.optimizer, self.loss
        running_loss = 0.0
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            yield


Pair = tuple[float, float]
"""The seconds of a step by hand, and of the other's in the same turn."""


class Turns:
    """The batches that the trainer gets, which the loop by hand trains on too, a turn after a turn."""

    def __init__(self, hand: Side, point: Point, turns: int) -> None:
        rows, _ = point.shape
        batches = [(torch.randn(point.shape), torch.randn(rows, 1)) for _ in range(5)]
        self.turn = batches * (TURN // len(batches))
        self.hand = hand
        self.turns = turns
        self.pairs: list[Pair] = []

    def __len__(self) -> int:
        return self.turns * TURN

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.turns):
            asked = []
            for batch in self.turn:
                asked.append(perf_counter())
                yield batch
            asked.append(perf_counter())
            by_hand = [perf_counter() for _ in self.hand.steps(self.turn)]
            self.pairs.append((step(by_hand), step(asked)))


def step(times: Sequence[float]) -> float:
    """The seconds from one to the next, once it has settled."""
    return median(b - a for a, b in itertools.pairwise(times[SETTLING:]))


def one_round(point: Point, way: Callable[[Side, Point, Turns], None], number: int, turns: int) -> list[Pair]:
    """The pairs of a round, without that in which everything gets warm.

    Raises:
        OtherBitsError: The two came to other weights.
    """
    sides = [Side(point, number), Side(point, number)]
    hand, other = sides if number % 2 else reversed(sides)  # where a model lies in memory may matter
    data = Turns(hand, point, turns)
    way(other, point, data)
    for name, weight in hand.model.state_dict().items():
        if not torch.equal(weight, other.model.state_dict()[name]):
            raise OtherBitsError(f"{point.value:,}, round {number}: other bits than by hand in {name}")
    return data.pairs[1:]


def measure(point: Point, rounds: int, most: int) -> dict[str, Any]:
    """What a step takes, and what the trainer adds to it, in microseconds."""
    trial = sum(one_round(point, Side.fit, 0, 2)[0])
    turns = max(min(most, int(SECONDS / trial / TURN)), FEWEST)
    found: list[tuple[float, float, float]] = []
    for number in range(1, rounds + 1):
        control, pairs = (one_round(point, way, number, turns) for way in (Side.by_hand, Side.fit))
        bias = median(1e6 * (b - a) for a, b in control)
        found.append((median(1e6 * a for a, _ in pairs), median(1e6 * (b - a) for a, b in pairs) - bias, bias))
    hand, added, bias_of = zip(*found, strict=True)
    return {
        "value": point.value,
        "turns": turns - 1,
        "by_hand_us_per_step": asdict(Spread.of(hand)),
        "added_us_per_step": asdict(Spread.of(added)),
        "control_us_per_step": asdict(Spread.of(bias_of)),
        "added_percent": asdict(Spread.of([100 * b / a for a, b in zip(hand, added, strict=True)])),
    }


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    names = "by_hand_us_per_step", "added_us_per_step", "control_us_per_step", "added_percent"
    rows = [["what grows", "to", "by hand, us a step", "added, us", "control, us", "added, % of the step"]]
    for curve in reports:
        rows += [
            [curve["curve"], f"{each['value']:,}", *(Spread(**each[name]).text(1) for name in names)]
            for each in curve["points"]
        ]
    return rows


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Above, a step by hand and in the trainer; below, what is added and the control, with their quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(reports), 6.2), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(reports), squeeze=False, sharex="col", sharey="row")
    for (above, below), curve in zip(axes.T, reports, strict=True):
        points = curve["points"]
        values = [each["value"] for each in points]
        hand = [each["by_hand_us_per_step"]["median"] for each in points]
        fit = [a + each["added_us_per_step"]["median"] for a, each in zip(hand, points, strict=True)]
        style: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.6}
        above.plot(values, hand, "o-", color=GREY, label="by hand; below, the control", **style)
        above.plot(values, fit, "o-", color=BLUE, label="loopwright", **style)
        above.set_yscale("log")
        above.set_title(curve["curve"], fontsize=11)
        for name, color in (("control_us_per_step", GREY), ("added_us_per_step", BLUE)):
            spreads = [Spread(**each[name]) for each in points]
            quartiles = [each.quartile1 for each in spreads], [each.quartile3 for each in spreads]
            below.fill_between(values, *quartiles, color=color, alpha=0.25, linewidth=0)
            below.plot(values, [each.median for each in spreads], "o-", color=color, **style)
        below.set_yscale("symlog", linthresh=10)
        above.set_xscale("log" if min(values) > 0 else "linear")
        for ax in (above, below):
            plain_axes(ax)
    axes[0][0].set_ylabel("a step, us")
    axes[1][0].set_ylabel("added to it, us")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds for each point (default: 10)")
    parser.add_argument("--quick", action="store_true", help="two rounds of few steps: they show bits, not times")
    parser.add_argument("--up-to", type=int, default=10_000_000, metavar="N", help="leave out what is larger")
    add_outputs(parser, plot=True)
    options = parser.parse_args(arguments)
    rounds, turns = (2, FEWEST) if options.quick else (options.rounds, TURNS)
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    torch.set_num_threads(1)
    freeze()
    try:
        reports = [
            {
                "curve": curve.name,
                "points": [measure(curve.point(n), rounds, turns) for n in curve.values if n <= options.up_to],
            }
            for curve in CURVES
        ]
    except OtherBitsError as error:
        sys.exit(str(error))

    facts, table = machine() | {"rounds": str(rounds)}, as_table(reports)
    put_out(options, {"machine": facts, "rounds": rounds, "curves": reports}, table, draw=partial(draw, reports))


if __name__ == "__main__":
    main()
