"""Whether a fit's memory is flat: live tensors, live graphs and the process's own memory over 10,000 steps.

The network of document 000 is trained by hand, by the trainer alone ("bare"), and with every callback of the library,
each in a process of its own. As the model is called, every so many steps, this counts what is alive by then: Python's
tensor objects, the autograd graphs of steps, Python's memory blocks, and the pages that the process holds. Nothing is
collected before it counts, so that a cycle of references would show. Live tensors and graphs have to stay as many as
they are, and the process's memory is not to grow faster than that of the loop by hand.

A second table says how many tensors and graphs are alive at most at each hook, beside the same places by hand.

$ python benchmarks/memory.py --json memory.json --markdown memory.md
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Every, Trainer
from loopwright.callbacks import (
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    LearningRateMonitor,
    ProgressBar,
    TensorBoardLogger,
)
from measuring import Table, add_outputs, freeze, machine, plain_axes, put_out
from overhead import Terminal, small_network

WAYS = ("by hand", "bare", "every callback")
ALLOWED_KB = 0.1  # a step, beyond that by hand: about a history's rows; a tensor kept from each step is more


class Token:
    """Lives as long as the graph that it is tied to."""


class Mark(torch.autograd.Function):
    """Changes nothing, and ties a token to the graph."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Watched(nn.Module):
    """The network of document 000; it calls ``look`` each time before it computes anything."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.network = small_network()
        self.look = look
        self.graphs: weakref.WeakSet[Token] = weakref.WeakSet()

    def forward(self, inputs: Tensor) -> Tensor:
        self.look()
        outputs: Tensor = self.network(inputs)
        if not torch.is_grad_enabled():
            return outputs
        token = Token()
        self.graphs.add(token)
        marked: Tensor = Mark.apply(outputs, token)  # type: ignore[no-untyped-call]
        return marked


def live_tensors() -> int:
    """How many tensor objects there are, but for those that ``freeze`` has taken aside."""
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def resident_kb() -> float:
    """What the process holds of the machine's memory; where the system does not say, the most that it has held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


class Problem:
    """What is trained, and who counts."""

    def __init__(self, look: Callable[[], None], batches: int) -> None:
        torch.manual_seed(0)
        self.model = Watched(look)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loss = nn.MSELoss()
        dataset = TensorDataset(torch.randn(10 * batches, 10), torch.randn(10 * batches, 1))
        self.data = DataLoader(dataset, batch_size=10, shuffle=True)

    def by_hand(self, epochs: int, at: Callable[[str], None] = lambda _: None) -> None:
        model, optimizer, criterion = self.model, self.optimizer, self.loss
        for _ in range(epochs):
            running_loss = 0.0
            at("on_epoch_start")
            for inputs, targets in self.data:
                at("on_batch_start")
                optimizer.zero_grad()
                outputs = model(inputs)
                loss = criterion(outputs, targets)
                loss.backward()
                at("on_backward_end")
                at("on_before_step")
                optimizer.step()
                at("on_step_end")
                running_loss += loss.item()
                at("on_batch_end")
            at("on_epoch_end")


def every_callback(folder: Path, screen: Terminal) -> list[Callback[Any]]:
    return [
        ProgressBar(file=screen),
        CSVLogger(folder / "metrics.csv"),
        TensorBoardLogger(folder / "tensorboard"),
        LearningRateMonitor(),
        EarlyStopping("train/loss", mode="min", patience=1_000_000),
        Checkpoint(folder / "checkpoints", every=Every(epochs=10), keep=1),
    ]


def over_steps(way: str, steps: int, folder: Path, screen: Terminal) -> list[dict[str, float]]:
    """What is alive, at twenty times of a training."""
    samples: list[dict[str, float]] = []
    calls = 0

    def look() -> None:
        nonlocal calls
        calls += 1
        if calls % (steps // 20) == 0:
            found = {"graphs": len(problem.model.graphs), "tensors": live_tensors(), "blocks": sys.getallocatedblocks()}
            samples.append({"step": calls, **found, "resident_kb": resident_kb()})

    problem = Problem(look, batches=steps // 100)
    if way == "by hand":
        problem.by_hand(epochs=100)
    else:
        callbacks = every_callback(folder, screen) if way == "every callback" else []
        trainer = Trainer(problem.model, problem.optimizer, problem.loss, callbacks=callbacks, device="cpu")
        trainer.fit(problem.data, epochs=100)
    return samples


CALLED = "(the model is called)"


def at_hooks(way: str) -> dict[str, tuple[int, int]]:
    """At most how many tensors and graphs are alive at each hook, over two epochs with validation after each."""
    peaks: dict[str, tuple[int, int]] = {}

    def at(place: str) -> None:
        tensors, graphs = peaks.get(place, (0, 0))
        peaks[place] = max(tensors, live_tensors()), max(graphs, len(problem.model.graphs))

    def called() -> None:
        if problem.model.training:
            at(CALLED)

    problem = Problem(called, batches=20)
    if way == "by hand":
        problem.by_hand(2, at)
        return peaks
    hooks = [name for name in vars(Callback) if name.startswith("on_") and name != "on_exception"]
    methods = {hook: lambda self, state, *output, hook=hook: at(hook) for hook in hooks}
    everywhere = type("Everywhere", (Callback,), methods)()
    trainer = Trainer(problem.model, problem.optimizer, problem.loss, callbacks=[everywhere], device="cpu")
    trainer.fit(problem.data, problem.data, epochs=2)
    return {place: peaks[place] for place in [*hooks[:3], CALLED, *hooks[3:]]}


def serve(way: str, steps: int) -> None:
    """Train in this process, and print what was found."""
    torch.set_num_threads(1)
    os.environ.update(TERM="xterm", TQDM_DISABLE="0")  # the bar is drawn, wherever this runs
    with tempfile.TemporaryDirectory() as folder, Terminal() as screen:
        over_steps(way, 100, Path(folder) / "before", screen)  # imports what is imported late
        freeze()
        samples = over_steps(way, steps, Path(folder) / "run", screen)
        hooks = at_hooks(way) if way != "every callback" else {}
    print(json.dumps({"samples": samples, "hooks": hooks}))


def measure(way: str, steps: int) -> dict[str, Any]:
    """What ``serve`` finds in a process of its own."""
    command = [sys.executable, __file__, "--steps", str(steps), "--serve", way]
    run = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def slope(samples: Sequence[Mapping[str, float]], name: str) -> float:
    """By how much something grows in a step, by least squares over the second half: things get warm in the first."""
    half = samples[len(samples) // 2 :]
    steps, values = [each["step"] for each in half], [each[name] for each in half]
    mean, level = sum(steps) / len(half), sum(values) / len(half)
    covariance = sum((x - mean) * (y - level) for x, y in zip(steps, values, strict=True))
    return covariance / sum((x - mean) ** 2 for x in steps)


def report(way: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found in one way; memory that is kept for good is more in the second half than ever in the first."""
    samples = found["samples"]
    first, second = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    return {
        "way": way,
        "steps": samples[-1]["step"],
        **{
            name: {
                "first_half": [min(each[name] for each in first), max(each[name] for each in first)],
                "second_half": [min(each[name] for each in second), max(each[name] for each in second)],
            }
            for name in ("tensors", "graphs")
        },
        "resident_kb": [samples[0]["resident_kb"], samples[-1]["resident_kb"]],
        "resident_kb_per_step": slope(samples, "resident_kb"),
        "blocks_per_step": slope(samples, "blocks"),
        "samples": samples,
        "hooks": found["hooks"],
    }


def growing(reports: Sequence[Mapping[str, Any]], *, judge_process: bool) -> list[str]:
    """In words, what is not flat."""
    found = []
    by_hand = reports[0]
    for each in reports:
        for name in ("tensors", "graphs"):
            (_, most), (least, _) = each[name]["first_half"], each[name]["second_half"]
            if least > most:
                found.append(f"{each['way']}: the number of live {name} grows, from at most {most} to {least} and more")
        beyond = each["resident_kb_per_step"] - by_hand["resident_kb_per_step"]
        if judge_process and beyond > ALLOWED_KB:
            found.append(f"{each['way']}: the process grows by {1000 * beyond:.0f} kB in 1,000 steps more than by hand")
    return found


def as_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """What is alive over the steps, as rows of cells."""
    rows = [["way", "live tensors", "live graphs", "process, MB", "kB in 1,000 steps", "blocks in 1,000 steps"]]
    for each in reports:
        alive = [
            f"{spread(each[name]['first_half'])}, then {spread(each[name]['second_half'])}"
            for name in ("tensors", "graphs")
        ]
        first, last = each["resident_kb"]
        grows = [f"{1000 * each['resident_kb_per_step']:+.1f}", f"{1000 * each['blocks_per_step']:+.1f}"]
        rows.append([each["way"], *alive, f"{first / 1024:.1f} to {last / 1024:.1f}", *grows])
    return rows


def spread(ends: Sequence[int]) -> str:
    least, most = ends
    return str(least) if least == most else f"{least} to {most}"


def hooks_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """The peaks at the hooks, as rows of cells; a loop by hand has no place for some of them."""
    by_hand, bare = (next(each["hooks"] for each in reports if each["way"] == way) for way in WAYS[:2])
    rows = [["at most alive at", "tensors", "by hand", "graphs", "by hand"]]
    for hook, (tensors, graphs) in bare.items():
        hand_tensors, hand_graphs = by_hand.get(hook, ("", ""))
        rows.append([hook, str(tensors), str(hand_tensors), str(graphs), str(hand_graphs)])
    return rows


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What the process holds, and the live tensors, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.1), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for each, color in zip(reports, ("0.45", "#2f6db3", "#c8692b"), strict=True):
        samples = each["samples"]
        steps = [sample["step"] for sample in samples]
        grown = [(sample["resident_kb"] - samples[0]["resident_kb"]) / 1024 for sample in samples]
        left.plot(steps, grown, "o-", color=color, markersize=3, linewidth=1.6, label=each["way"])
        right.plot(steps, [sample["tensors"] for sample in samples], "o-", color=color, markersize=3, linewidth=1.6)
    left.set_title("the process, MB more than at first", fontsize=11)
    right.set_title("live tensors", fontsize=11)
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("step")
        plain_axes(ax)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="a multiple of 100 (default: 10,000)")
    parser.add_argument("--quick", action="store_true", help="400 steps: too few to judge the process by")
    add_outputs(parser, plot=True)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    steps = 400 if options.quick else options.steps
    if steps < 100 or steps % 100:
        parser.error("--steps must be a multiple of 100")
    if options.serve is not None:
        serve(options.serve, steps)
        return

    reports = [report(way, measure(way, steps)) for way in WAYS]
    facts, tables = machine() | {"steps": str(steps)}, (as_table(reports), hooks_table(reports))
    grows = growing(reports, judge_process=steps >= 5_000)
    put_out(options, {"machine": facts, "ways": reports, "grows": grows}, *tables, draw=partial(draw, reports))
    if grows:
        sys.exit("\n".join(grows))


if __name__ == "__main__":
    main()
