"""What an import costs on top of ``import torch``: of loopwright, and of the other trainers that are installed.

Every figure is from a fresh process, in which torch has been imported before the clock starts. The trainers take turns,
in an order that is reversed every round, and a first round, which brings the files into memory, does not count. Time by
the clock is what a user waits; the processor's time is less at the mercy of whatever else the machine does.

A second table has the modules that ``import loopwright`` loads, each with its own time, without what it imports itself.

$ python benchmarks/imports.py --json imports.json --markdown imports.md
$ python benchmarks/imports.py --python /tmp/peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Spread, Table, add_outputs, put_out

LOOPWRIGHT = "import loopwright"
STATEMENTS = {
    LOOPWRIGHT: "loopwright",
    "from loopwright.callbacks import Checkpoint, ProgressBar, TensorBoardLogger": "loopwright",
    "from accelerate import Accelerator": "accelerate",
    "from ignite.engine import create_supervised_trainer": "ignite",
    "from skorch import NeuralNet": "skorch",
    "import keras": "keras",
    "import lightning": "lightning",
    "from transformers import Trainer, TrainingArguments": "transformers",
}
"""What is typed, and the package that has to be there for it."""

FRESH = """
import json, sys
from time import perf_counter, process_time
times = [perf_counter()]
import torch
before = set(sys.modules)
times += perf_counter(), process_time()
{statement}
times += perf_counter(), process_time()
print(json.dumps([times, [name for name in sys.modules if name not in before]]))
"""


def fresh(python: str, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own, where no file of this folder is in the way of another module."""
    environment = os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, "-P", *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def installed(python: str) -> set[str]:
    """Those of the packages that this interpreter can import."""
    names = sorted(set(STATEMENTS.values()))
    code = f"from importlib.util import find_spec; print(*(name for name in {names} if find_spec(name)))"
    return set(fresh(python, code).stdout.split())


def its_machine(python: str) -> dict[str, str]:
    """What ``machine`` says there, where the versions may be other ones."""
    folder = str(Path(__file__).resolve().parent)
    code = f"import json, sys; sys.path.append({folder!r}); import measuring; print(json.dumps(measuring.machine()))"
    facts: dict[str, str] = json.loads(fresh(python, code).stdout)
    return facts


def measure(python: str, statements: Sequence[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What the processes said, round by round."""
    found: dict[str, list[dict[str, Any]]] = {statement: [] for statement in statements}
    for number in range(rounds + 1):
        for statement in statements if number % 2 else reversed(statements):
            *_, said = fresh(python, FRESH.format(statement=statement)).stdout.splitlines()
            (start, torch_there, used, there, used_then), loaded = json.loads(said)
            took = {"torch": torch_there - start, "clock": there - torch_there, "processor": used_then - used}
            if number:
                found[statement].append({**took, "loaded": loaded})
    return found


def own_times(python: str, loaded: Sequence[str], rounds: int) -> dict[str, float]:
    """The milliseconds that each module takes itself, medians, the slowest first."""
    taken: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(rounds):
        # A line has the form "import time: self [us] | cumulative | imported package".
        for line in fresh(python, f"import torch; {LOOPWRIGHT}", "-X", "importtime").stderr.splitlines():
            own, _, rest = line.removeprefix("import time:").partition("|")
            if (name := rest.rpartition("|")[2].strip()) in taken:
                taken[name].append(float(own) / 1e3)
    times = {name: median(values) for name, values in taken.items() if values}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def report(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What the measurements say, the fastest import first."""
    reports = [
        {
            "statement": statement,
            "clock_ms": asdict(Spread.of([1e3 * each["clock"] for each in rounds])),
            "processor_ms": asdict(Spread.of([1e3 * each["processor"] for each in rounds])),
            "torch_ms": asdict(Spread.of([1e3 * each["torch"] for each in rounds])),
            "modules": len(rounds[-1]["loaded"]),
        }
        for statement, rounds in found.items()
    ]
    return sorted(reports, key=lambda each: each["clock_ms"]["median"])


def as_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    rows = [["after import torch", "by the clock, ms", "of the processor, ms", "modules"]]
    for each in reports:
        clock, processor = Spread(**each["clock_ms"]).text(0), Spread(**each["processor_ms"]).text(0)
        rows.append([each["statement"], clock, processor, str(each["modules"])])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter (default: this)")
    parser.add_argument("--rounds", type=int, default=10, help="processes for each figure (default: 10)")
    parser.add_argument("--quick", action="store_true", help="two rounds, which show the modules and not the times")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else options.rounds
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    there = installed(options.python)
    if "loopwright" not in there:
        sys.exit(f"loopwright is not installed for {options.python}")
    missing = sorted(set(STATEMENTS.values()) - there)
    found = measure(options.python, [each for each, name in STATEMENTS.items() if name in there], rounds)
    reports = report(found)
    own = own_times(options.python, found[LOOPWRIGHT][-1]["loaded"], min(rounds, 10))

    facts = its_machine(options.python) | {"rounds": str(rounds), "not installed": ", ".join(missing) or "none"}
    torch_alone = Spread.of([1e3 * each["torch"] for rounds_of_it in found.values() for each in rounds_of_it])
    facts["import torch itself"] = f"{torch_alone.text(0)} ms"
    tables = as_table(reports), [[f"loaded by {LOOPWRIGHT}", "itself, ms"]] + [[a, f"{b:.1f}"] for a, b in own.items()]
    figures = {"machine": facts, "rounds": rounds, "not_installed": missing, "imports": reports, "loaded_ms": own}
    put_out(options, figures, *tables)


if __name__ == "__main__":
    main()
