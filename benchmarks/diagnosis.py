"""What GradientInspector says about planted faults and healthy runs: the table of the docs, and their pictures.

The cases are those of tests/faults_corpus.py. The limits of the rules were fixed on one half of them with other seeds.

$ python benchmarks/diagnosis.py --markdown benchmarks/results/diagnosis.md --pictures docs/assets
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from measuring import Table, aligned, markdown

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from faults_corpus import FAULTS, HEALTHY, SEEDS, Case, Outcome, inspect, run

PICTURES = {  # one for each rule, and one of a healthy run
    "vanishing": "sigmoid MLP of 10 layers",
    "exploding": "ReLU MLP with a gain of 4",
    "dead": "MLP, a layer's biases at -20",
    "saturated": "tanh MLP with a gain of 30",
    "frozen": "a transformer's layers frozen, all in the optimizer",
    "no-gradient": "a detach between residual blocks",
    "not-in-optimizer": "CNN, a head replaced after the optimizer was made",
    "not-moving": "a schedule that has run out",
    "too-large": "SGD with a rate of 3",
    "too-small": "SGD with a rate of 2e-6",
    "spikes": "targets far out in one batch of 8",
    "clipped": "clip_norm of 0.001",
    "not-finite": "CNN, a square root at zero",
    "healthy": "transformer, normalised first",
}


def cases_table(outcomes: Sequence[Outcome]) -> Table:
    """A row a case: how often the fault was found, and named rightly."""
    rows = [["planted fault", "rule", "limits fixed on it", "found", "named"]]
    for case in FAULTS:
        own = [o for o in outcomes if o.case is case]
        found, named = sum(o.found for o in own), sum(o.named for o in own)
        fixed = "yes" if case.half == "fixed" else "no"
        rows.append([case.name, str(case.rule), fixed, f"{found} of {len(own)}", f"{named} of {len(own)}"])
    return rows


def healthy_table(outcomes: Sequence[Outcome]) -> Table:
    """A row a healthy run: how often something was found."""
    rows = [["healthy run", "limits fixed on it", "false alarms"]]
    for case in HEALTHY:
        own = [o for o in outcomes if o.case is case]
        fixed = "yes" if case.half == "fixed" else "no"
        rows.append([case.name, fixed, f"{sum(o.found for o in own)} of {len(own)}"])
    return rows


def summary(outcomes: Sequence[Outcome]) -> Table:
    """Both halves in figures."""
    rows = [["half", "planted faults", "found", "named rightly", "healthy runs", "false alarms"]]
    for half, name in (("shown", "the other half"), ("fixed", "the half that the limits were fixed on")):
        faults = [o for o in outcomes if o.case.half == half and o.case.rule]
        healthy = [o for o in outcomes if o.case.half == half and not o.case.rule]
        counts = len(faults), sum(o.found for o in faults), sum(o.named for o in faults), len(healthy)
        rows.append([name, *map(str, counts), str(sum(o.found for o in healthy))])
    return rows


def draw(folder: Path) -> None:
    """A picture for each rule."""
    by_name: dict[str, Case] = {case.name: case for case in (*FAULTS, *HEALTHY)}
    for name, case in PICTURES.items():
        _, inspector = run(by_name[case], SEEDS[0])
        path = folder / f"gradients-{name}.png"
        inspector.plot(path)
        with Image.open(path) as picture:  # a third of the bytes, and nobody sees it
            picture.convert("RGB").quantize(64).save(path, optimize=True)
        print(f"--- {name}\n{inspector.report()}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed each")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there, for a page")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw a picture for each rule there")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    logging.getLogger("loopwright").setLevel(logging.CRITICAL)  # what it would say is in the tables
    seeds = SEEDS[:1] if options.quick else SEEDS
    outcomes = [inspect(case, seed) for case in (*FAULTS, *HEALTHY) for seed in seeds]
    tables = [summary(outcomes), cases_table(outcomes), healthy_table(outcomes)]
    print(*map(aligned, tables), sep="\n\n")
    for o in outcomes:
        if not (o.named if o.case.rule else not o.found):
            print(f"\nmissed: {o.case.name}, seed {o.seed}\n{o.report}")
    if options.markdown is not None:
        options.markdown.write_text("\n\n".join(map(markdown, tables)) + "\n")
    if options.pictures is not None:
        draw(options.pictures)


if __name__ == "__main__":
    main()
