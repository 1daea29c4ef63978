"""What evaluation and prediction cost, beside the loops without gradients that one writes by hand.

Each case is gone through by hand and by the trainer, which take turns in an order that is reversed every round. A turn
is some passes over the data, of which each is a call, so that what a call costs is shared out among its batches. The
outputs of a prediction and the state of the random generator have to be those by hand, bit for bit. A mean loss has to
agree to the last digits: the trainer adds with more of them than Python's sum has.

$ python benchmarks/passes.py --json passes.json --markdown passes.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Trainer
from measuring import Spread, Table, add_outputs, freeze, machine, put_out, seconds
from overhead import OtherBitsError, Problem, document_000, document_002, larger_network, ready_made, small_network

EVALUATE, PREDICT = "evaluate", "predict"


def larger_data(samples: int) -> Problem:
    """The larger network over a loader. It has no loop of its own: nothing is trained here."""
    model = larger_network()
    dataset = TensorDataset(torch.randn(samples, 64), torch.randn(samples, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Problem(model, optimizer, nn.MSELoss(), DataLoader(dataset, batch_size=256), lambda epochs: None)


@dataclass(frozen=True)
class Case:
    """Data to go through, how often in a turn, and how many batches that is in all."""

    name: str
    problem: Callable[[], Problem]
    passes: int
    batches: int

    def shortened(self) -> Case:
        """The same for one pass."""
        return replace(self, passes=1, batches=self.batches // self.passes)


CASES = (
    Case("document 000", document_000, passes=20, batches=200),
    Case("document 002", document_002, passes=20, batches=80),
    Case("ready-made batches", partial(ready_made, small_network, 100, (10, 10), clocked=False), passes=2, batches=200),
    Case("larger network", partial(larger_data, 10_240), passes=1, batches=40),
)


Run = Callable[[], list[Any]]
"""Goes through the data, and returns what came of each pass: a mean loss, or the outputs."""


def evaluated_by_hand(problem: Problem, passes: int) -> list[float]:
    model, criterion = problem.model, problem.loss
    means = []
    for _ in range(passes):
        model.eval()
        total, samples = 0.0, 0
        with torch.no_grad():
            for inputs, targets in problem.data:
                total += criterion(model(inputs), targets).item() * len(targets)
                samples += len(targets)
        model.train()
        means.append(total / samples)
    return means


def predicted_by_hand(problem: Problem, passes: int) -> list[Tensor]:
    model = problem.model
    found = []
    for _ in range(passes):
        model.eval()
        with torch.no_grad():
            found.append(torch.cat([model(inputs) for inputs, _ in problem.data]))
        model.train()
    return found


def evaluated(problem: Problem, passes: int, trainer: Trainer) -> list[float]:
    return [trainer.evaluate(problem.data)["test/loss"] for _ in range(passes)]


def predicted(problem: Problem, passes: int, trainer: Trainer) -> list[Tensor]:
    return [torch.cat(trainer.predict(problem.data)) for _ in range(passes)]


def runs(what: str, problem: Problem, passes: int) -> dict[str, Run]:
    """The two ways, ready to run."""
    trainer = Trainer(problem.model, problem.optimizer, problem.loss, device="cpu")
    if what == EVALUATE:
        return {
            "by hand": partial(evaluated_by_hand, problem, passes),
            "loopwright": partial(evaluated, problem, passes, trainer),
        }
    return {
        "by hand": partial(predicted_by_hand, problem, passes),
        "loopwright": partial(predicted, problem, passes, trainer),
    }


def keep(run: Run, found: list[Any]) -> None:
    """Run, and put what came of it into the list."""
    found.extend(run())


def measure(case: Case, what: str, rounds: int) -> dict[str, list[float]]:
    """The seconds a batch that each way took, round by round.

    Raises:
        OtherBitsError: The trainer came to something else than the loop by hand.
    """
    times: dict[str, list[float]] = {"by hand": [], "loopwright": []}
    for number in range(rounds + 1):  # in the first everything gets warm
        ends: dict[str, list[Any]] = {}
        states: dict[str, Tensor] = {}
        for way in times if number % 2 else reversed(list(times)):
            torch.manual_seed(number)
            run = runs(what, case.problem(), case.passes)[way]
            ends[way] = []
            took = seconds(partial(keep, run, ends[way]))
            states[way] = torch.get_rng_state()
            if number:
                times[way].append(took / case.batches)
        compare(f"{case.name}, {what}, round {number}", ends, states)
    return times


def compare(where: str, ends: Mapping[str, Sequence[Any]], states: Mapping[str, Tensor]) -> None:
    """Raise OtherBitsError unless both came to the same."""
    for hand, other in zip(ends["by hand"], ends["loopwright"], strict=True):
        if not (torch.equal(hand, other) if isinstance(hand, Tensor) else math.isclose(hand, other, rel_tol=1e-12)):
            raise OtherBitsError(f"{where}: other results than by hand")
    if not torch.equal(states["by hand"], states["loopwright"]):
        raise OtherBitsError(f"{where}: other bits than by hand in the random generator's state")


def report(case: Case, what: str, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What the measurements say, compared within a round."""
    pairs = list(zip(times["by hand"], times["loopwright"], strict=True))
    return {
        "case": case.name,
        "what": what,
        "passes": case.passes,
        "batches": case.batches,
        "by_hand_us_per_batch": asdict(Spread.of([1e6 * a for a, _ in pairs])),
        "ratio": asdict(Spread.of([b / a for a, b in pairs])),
        "added_us_per_batch": asdict(Spread.of([1e6 * (b - a) for a, b in pairs])),
    }


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    rows = [["case", "what", "passes", "batches of each", "by hand, us a batch", "ratio", "added, us a batch"]]
    for found in reports:
        hand, ratio, added = (Spread(**found[name]) for name in ("by_hand_us_per_batch", "ratio", "added_us_per_batch"))
        numbers = [str(found["passes"]), str(found["batches"] // found["passes"])]
        rows.append([found["case"], found["what"], *numbers, hand.text(1), ratio.text(2), added.text(1)])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="how often each case is timed (default: 100)")
    parser.add_argument("--quick", action="store_true", help="two rounds of one pass: they show results, not times")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    rounds, cases = (2, [case.shortened() for case in CASES]) if options.quick else (options.rounds, CASES)
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    torch.set_num_threads(1)
    freeze()
    try:
        reports = [report(case, what, measure(case, what, rounds)) for what in (EVALUATE, PREDICT) for case in cases]
    except OtherBitsError as error:
        sys.exit(str(error))
    facts = machine() | {"rounds": str(rounds)}
    put_out(options, {"machine": facts, "rounds": rounds, "cases": reports}, as_table(reports))


if __name__ == "__main__":
    main()
