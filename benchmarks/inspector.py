"""What GradientInspector costs at its default cadence, on models so small that it shows and on a million parameters.

Each case is trained by hand, by the trainer alone ("bare") and by the trainer with a GradientInspector ("inspected").
These take turns, in an order that is reversed every round, and all have to come to the bits of the loop by hand.

$ python benchmarks/inspector.py --json inspector.json --markdown inspector.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import overhead
from loopwright import Trainer
from loopwright.callbacks import GradientInspector
from measuring import Spread, Table, aligned, freeze, machine, markdown
from overhead import Case, OtherBitsError, Problem, Way


def million() -> Problem:
    """An MLP of a million parameters, over batches of 64."""
    model = nn.Sequential(
        nn.Linear(128, 896), nn.ReLU(), nn.Linear(896, 896), nn.ReLU(), nn.Linear(896, 80), nn.ReLU(), nn.Linear(80, 1)
    )
    optimizer, criterion = optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    dataloader = DataLoader(TensorDataset(torch.randn(640, 128), torch.randn(640, 1)), batch_size=64, shuffle=True)

    def by_hand(epochs: int) -> None:
        for _ in range(epochs):
            for inputs, targets in dataloader:
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                loss.backward()
                optimizer.step()
                loss.item()

    return Problem(model, optimizer, criterion, dataloader, by_hand)


@dataclass(frozen=True)
class Measured:
    """A case, and how often it is timed."""

    case: Case
    rounds: int


CASES = (
    Measured(Case("document 000, its 20 epochs", overhead.document_000, epochs=20, steps=200), 60),
    Measured(Case("document 000, 400 epochs", overhead.document_000, epochs=400, steps=4000), 20),
    Measured(Case("a million parameters, 50 epochs", million, epochs=50, steps=500), 11),
)


def inspected(problem: Problem, case: Case) -> Callable[[], object]:
    """The trainer with an inspector as it comes."""
    trainer = Trainer(problem.model, problem.optimizer, problem.loss, callbacks=[GradientInspector()], device="cpu")
    return partial(trainer.fit, problem.data, epochs=case.epochs)


WAYS: dict[str, Way] = {"by hand": overhead.by_hand, "bare": overhead.bare, "inspected": inspected}


def report(case: Case, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What the measurements say, always within one round."""
    pairs = list(zip(times["bare"], times["inspected"], strict=True))
    return {
        "case": case.name,
        "steps": case.steps,
        "by_hand_us_per_step": asdict(Spread.of([1e6 * t for t in times["by hand"]])),
        "bare_us_per_step": asdict(Spread.of([1e6 * a for a, _ in pairs])),
        "added_us_per_step": asdict(Spread.of([1e6 * (b - a) for a, b in pairs])),
        "added_percent_of_bare": asdict(Spread.of([100 * (b / a - 1) for a, b in pairs])),
        "added_percent_of_by_hand": asdict(
            Spread.of([100 * (b - a) / h for h, (a, b) in zip(times["by hand"], pairs, strict=True)])
        ),
    }


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    rows = [
        ["case", "steps", "by hand, us a step", "bare, us a step", "added, us a step", "added, % of bare", "of by hand"]
    ]
    for found in reports:
        columns = ("by_hand_us_per_step", "bare_us_per_step", "added_us_per_step")
        shares = ("added_percent_of_bare", "added_percent_of_by_hand")
        spreads = [Spread(**found[name]).text(1) for name in columns] + [Spread(**found[n]).text(2) for n in shares]
        rows += [[found["case"], str(found["steps"]), *spreads]]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="how often each case is timed (default: each case's own number)")
    parser.add_argument("--quick", action="store_true", help="two rounds of an epoch: they show bits, not times")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table there, for a page")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")
    cases = [Measured(m.case, options.rounds or m.rounds) for m in CASES]
    if options.quick:
        cases = [Measured(m.case.shortened(), 2) for m in CASES]

    torch.set_num_threads(1)
    os.environ.update(TQDM_DISABLE="1")
    freeze()
    try:
        reports = [report(m.case, overhead.measure(m.case, WAYS, m.rounds)) for m in cases]
    except OtherBitsError as error:
        sys.exit(str(error))

    facts, table = machine(), as_table(reports)
    print(*(f"{name}: {fact}" for name, fact in facts.items()), "", aligned(table), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": facts, "cases": reports}, indent=2) + "\n")
    if options.markdown is not None:
        listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        options.markdown.write_text(f"{markdown(table)}\n\n{listed}\n")


if __name__ == "__main__":
    main()
