"""When ``compile=True`` pays: what compiling takes, what a step takes before and after, and where the two meet.

Each model is trained on ready-made batches of one shape, plainly and compiled, in one process that starts with an empty
cache of the compiler's ("cold"), and then again in one that finds what the first has left in it ("warm"). What
compiling takes is the time of the first step beyond a later one; the imports that the compiler makes are in it. The
break-even is the number of steps after which the compiled training has caught up. A validation makes a graph of its
own, and its first batch pays for it. Compiled code may round otherwise, so the weights are compared, and not the bits.

$ python benchmarks/compiling.py --json compiling.json --markdown compiling.md --plot compiling.png
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn, optim

from loopwright import Trainer
from measuring import Spread, Table, add_outputs, freeze, machine, plain_axes, put_out
from overhead import Clocked, larger_network, small_network

COLD, WARM = "cold", "warm"
BLUE, ORANGE = "#2f6db3", "#c8692b"


def blocks(number: int, width: int) -> nn.Sequential:
    """Layers with much to do for each element between the products."""
    made = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()) for _ in range(number)]
    return nn.Sequential(*made, nn.Linear(width, 1))


@dataclass(frozen=True)
class Case:
    """A model, the shape of its batches, and how many steps are timed."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, int]
    steps: int


CASES = (
    Case("document 000's network, batch 10", small_network, (10, 10), 1_000),
    Case("layers 64-256-256-1, batch 256", larger_network, (256, 64), 300),
    Case("8 blocks of 64, batch 32", partial(blocks, 8, 64), (32, 64), 500),
    Case("4 blocks of 512, batch 256", partial(blocks, 4, 512), (256, 512), 60),
)


def fitted(case: Case, *, compiled: bool) -> tuple[nn.Module, Clocked, Clocked]:
    """A fit of one epoch with a validation: the model, and the data with its times."""
    torch.manual_seed(0)
    model = case.model()
    rows, _ = case.shape
    batches = [(torch.randn(case.shape), torch.randn(rows, 1)) for _ in range(5)]
    train, val = Clocked(batches * (case.steps // 5)), Clocked(batches)
    optimizer = optim.SGD(model.parameters(), lr=0.001)
    Trainer(model, optimizer, nn.MSELoss(), device="cpu", compile=compiled).fit(train, val, epochs=1)
    return model, train, val


def first_and_later(data: Clocked) -> tuple[float, float]:
    """The seconds of the first step, and of one when all is warm."""
    gaps = [b - a for a, b in zip(data.asked, data.asked[1:], strict=False)]
    return gaps[0], median(gaps[len(gaps) // 2 :])


def serve(case: Case, *, quick: bool) -> None:
    """Train plainly and compiled in this process, and print what was found."""
    torch.set_num_threads(1)
    freeze()
    if quick:  # the graphs alone, and no machine code
        torch.compile = functools.partial(torch.compile, backend="eager")
    fitted(case, compiled=False)  # everything gets warm
    plain, data, plain_val = fitted(case, compiled=False)
    _, eager = first_and_later(data)
    _, eager_val = first_and_later(plain_val)
    model, data, val = fitted(case, compiled=True)
    first, later = first_and_later(data)
    first_val, later_val = first_and_later(val)
    from torch._dynamo.utils import counters  # torch counts its graphs there, and nowhere public

    found = {
        "compile_s": first - later,
        "compile_val_s": first_val - later_val,
        "eager_us": 1e6 * eager,
        "compiled_us": 1e6 * later,
        "eager_val_us": 1e6 * eager_val,
        "compiled_val_us": 1e6 * later_val,
        "graphs": counters["stats"]["unique_graphs"],
        "deviation": deviation(plain, model),
    }
    print(json.dumps(found))


def deviation(plain: nn.Module, compiled: nn.Module) -> float:
    """How far apart the weights are, as a share of their size."""
    one, other = (torch.cat([weight.detach().flatten() for weight in each.parameters()]) for each in (plain, compiled))
    difference: Tensor = (one - other).norm() / one.norm()
    return difference.item()


def measure(case: Case, rounds: int, *, quick: bool) -> dict[str, list[dict[str, float]]]:
    """What the processes said; each round begins with an empty cache."""
    command = [sys.executable, __file__, "--serve", case.name, *(["--quick"] if quick else [])]
    found: dict[str, list[dict[str, float]]] = {COLD: [], WARM: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            own = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
            for said in found.values():
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | own)
                said.append(json.loads(run.stdout.splitlines()[-1]))
    return found


def break_even(compile_s: float, eager_us: float, compiled_us: float) -> float:
    """After how many steps the compiled training has caught up; infinite where it never does."""
    return math.inf if compiled_us >= eager_us else 1e6 * compile_s / (eager_us - compiled_us)


def report(case: Case, found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """What the measurements say."""
    both = [*found[COLD], *found[WARM]]
    steps = {name: Spread.of([each[name] for each in both]) for name in ("eager_us", "compiled_us")}
    compiling = {state: Spread.of([each["compile_s"] for each in found[state]]) for state in (COLD, WARM)}
    ends = {
        state: break_even(taken.median, steps["eager_us"].median, steps["compiled_us"].median)
        for state, taken in compiling.items()
    }
    return {
        "case": case.name,
        "parameters": sum(weight.numel() for weight in case.model().parameters()),
        "graphs": [int(min(each["graphs"] for each in both)), int(max(each["graphs"] for each in both))],
        "compile_s": {state: asdict(taken) for state, taken in compiling.items()},
        "compile_val_s": {
            state: asdict(Spread.of([each["compile_val_s"] for each in found[state]])) for state in (COLD, WARM)
        },
        **{name: asdict(taken) for name, taken in steps.items()},
        "break_even_steps": {state: end if math.isfinite(end) else None for state, end in ends.items()},
        "largest_deviation": max(each["deviation"] for each in both),
    }


def as_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells: a row for each state of the cache."""
    heading = "model|parameters|cache|compiling, s|and for validation, s|plain, us a step|compiled, us a step"
    rows = [[*heading.split("|"), "pays after, steps", "graphs", "weights"]]
    for found in reports:
        for state in (COLD, WARM):
            end = found["break_even_steps"][state]
            rows.append(
                [
                    found["case"],
                    f"{found['parameters']:,}",
                    state,
                    Spread(**found["compile_s"][state]).text(1),
                    Spread(**found["compile_val_s"][state]).text(1),
                    Spread(**found["eager_us"]).text(0),
                    Spread(**found["compiled_us"]).text(0),
                    "never" if end is None else f"{end:,.0f}",
                    " to ".join(str(number) for number in sorted(set(found["graphs"]))),
                    f"within {found['largest_deviation']:.0e}" if found["largest_deviation"] else "equal",
                ]
            )
    return rows


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a model: the time of a training over its steps, plain and compiled."""
    from matplotlib.figure import Figure

    rows = (len(reports) + 1) // 2
    figure = Figure(figsize=(8.4, 0.5 + 2.7 * rows), dpi=150, layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for ax, found in zip(axes, reports, strict=False):
        eager, compiled = found["eager_us"]["median"] / 1e6, found["compiled_us"]["median"] / 1e6
        cold, warm = (found["compile_s"][state]["median"] for state in (COLD, WARM))
        end = found["break_even_steps"][COLD]
        steps = 1.6 * (end if end is not None else cold / eager)
        ax.plot([0, steps], [0, steps * eager], color="0.45", linewidth=1.6, label="plain")
        for begin, style, name in ((cold, "-", "compiled"), (warm, "--", "compiled, from the cache")):
            ax.plot([0, steps], [begin, begin + steps * compiled], style, color=BLUE, linewidth=1.6, label=name)
        if end is not None:
            ax.plot(end, end * eager, "o", color=ORANGE, markersize=5)
        ax.set_xlim(0, steps)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.xaxis.set_major_locator(_few_ticks())
        ax.set_title(found["case"], fontsize=10)
        plain_axes(ax)
    for ax in axes[len(reports) :]:
        ax.remove()
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("seconds", fontsize=9)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each model is compiled (default: 3)")
    parser.add_argument("--quick", action="store_true", help="two rounds of one model's graphs, without machine code")
    add_outputs(parser, plot=True)
    parser.add_argument("--serve", choices=[case.name for case in CASES], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve is not None:
        serve(next(case for case in CASES if case.name == options.serve), quick=options.quick)
        return
    rounds, cases = (2, CASES[:1]) if options.quick else (options.rounds, CASES)
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")
    try:
        reports = [report(case, measure(case, rounds, quick=options.quick)) for case in cases]
    except subprocess.CalledProcessError as error:
        sys.exit(f"the process that compiles ended with the exit status {error.returncode}; is there a C++ compiler?")
    facts = machine() | {"rounds": str(rounds)}
    found = {"machine": facts, "rounds": rounds, "cases": reports}
    put_out(options, found, as_table(reports), draw=partial(draw, reports))


if __name__ == "__main__":
    main()
