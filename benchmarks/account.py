"""What each line of the trainer's step costs, beside the lines of the same loop by hand.

The functions of the trainer that run at every step are found by watching some steps, so this goes on to hold when they
are written otherwise. A copy of each reads a clock before every statement; what the reading takes is measured and taken
off. A line is charged for what it calls, unless that has lines of its own in the table, and a function's last line for
the way back. In the same way it is seen which lines call the model, the loss, backward and the optimizer, and what
these take by hand, line by line too, is set against them: what remains is what the trainer adds.

With --callgrind the instructions of a step are counted as well, which valgrind has to be there for.

$ python benchmarks/account.py --json account.json --markdown account.md
$ python benchmarks/account.py --deep --callgrind
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn, optim

import loopwright
from loopwright import Trainer
from measuring import Spread, Table, add_outputs, freeze, machine, put_out
from overhead import Case, bare, measure, ready_made, small_network
from overhead import by_hand as plain

PACKAGE = str(Path(loopwright.__file__).parent)
STEPS = 100
FORWARD, LOSS, BACKWARD, STEP, ITEM = "model", "loss", "backward", "optimizer.step", "item"


def by_hand(model: nn.Module, optimizer: optim.Optimizer, criterion: nn.Module, data: Iterable[Any]) -> float:
    running_loss = 0.0
    for inputs, targets in data:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return running_loss


@dataclass(frozen=True)
class Line:
    """A line of a function that is watched."""

    function: str
    number: int
    text: str


class Clock:
    """Notes which line is reached, and when."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.reached: list[int] = []
        self.times: list[int] = []
        self._keys: dict[Line, int] = {}

    def key(self, line: Line) -> int:
        """The number that the line goes by."""
        if line not in self._keys:
            self._keys[line] = len(self.lines)
            self.lines.append(line)
        return self._keys[line]

    def names(self) -> dict[str, Any]:
        """What a copy calls before each statement: nothing but C."""
        return {"__reached__": self.reached.append, "__times__": self.times.append, "__now__": perf_counter_ns}

    def clear(self) -> None:
        self.reached.clear()
        self.times.clear()

    def cost(self) -> float:
        """The nanoseconds from one reading to the next, with nothing between."""
        body = "\n    ".join(["__reached__(0); __times__(__now__())"] * 200)
        found: dict[str, Any] = self.names()
        exec(f"def readings():\n    {body}", found)
        gaps = []
        for _ in range(50):
            self.clear()
            found["readings"]()
            gaps.append(median(b - a for a, b in zip(self.times, self.times[1:], strict=False)))
        self.clear()
        return median(gaps)

    def taken(self, cost: float) -> tuple[Counter[int], Counter[int]]:
        """The nanoseconds of each line since the last clearing, and how often it was reached."""
        took: Counter[int] = Counter()
        for key, start, end in zip(self.reached, self.times, self.times[1:], strict=False):
            took[key] += end - start - cost  # type: ignore[assignment]  # a float
        return took, Counter(self.reached[:-1])


class Instrument(ast.NodeTransformer):
    """Puts a reading of the clock before each statement, and where a loop goes back to its head."""

    def __init__(self, function: str, source: Sequence[str], clock: Clock) -> None:
        self._function, self._source, self._clock = function, source, clock
        self._loops: list[ast.stmt] = []

    def reading(self, statement: ast.stmt) -> list[ast.stmt]:
        text = self._source[statement.lineno - 1].strip()
        key = self._clock.key(Line(self._function, statement.lineno, text))
        made = ast.parse(f"__reached__({key})\n__times__(__now__())").body
        return [ast.copy_location(ast.fix_missing_locations(each), statement) for each in made]

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        for index, statement in enumerate(statements):
            is_docstring = index == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if isinstance(statement, ast.Continue):
                done += self.reading(self._loops[-1])
            elif not is_docstring and not isinstance(statement, (ast.Global, ast.Nonlocal)):
                done += self.reading(statement)
            done.append(self.visit(statement))
        return done

    def generic_visit(self, node: ast.AST) -> ast.AST:
        loop = node if isinstance(node, (ast.For, ast.While)) else None
        if loop is not None:
            self._loops.append(loop)
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                made = self.block(value)
                setattr(node, name, made + self.reading(loop) if loop is not None and name == "body" else made)
            elif isinstance(value, list):
                for each in value:
                    if isinstance(each, (ast.ExceptHandler, ast.match_case)):
                        self.visit(each)
        if loop is not None:
            self._loops.pop()
        return node


def copied(function: FunctionType, clock: Clock) -> Any:
    """The function once more, with the clock in it."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    source = [""] * (first - 1) + lines
    (definition,) = tree.body
    made = Instrument(function.__qualname__, source, clock).visit(definition)
    module = ast.fix_missing_locations(ast.Module([made], []))
    function.__globals__.update(clock.names())
    names: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, names)
    return names[function.__name__]


def owner_of(code: CodeType) -> tuple[Any, str, FunctionType] | None:
    """The class or module that has the function, its name there and the function, if it can be put in place there."""
    module = next((each for each in _modules() if getattr(each, "__file__", None) == code.co_filename), None)
    path = code.co_qualname.partition(".<locals>")[0].split(".")
    owner: Any = module
    for name in path[:-1]:
        owner = getattr(owner, name, None)
    function = vars(owner).get(path[-1]) if owner is not None else None
    if not isinstance(function, FunctionType) or function.__code__.co_freevars or hasattr(function, "__wrapped__"):
        return None
    return owner, path[-1], function


def _modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "loopwright"]


@contextlib.contextmanager
def in_place(owned: Iterable[tuple[Any, str, FunctionType]], clock: Clock) -> Iterator[None]:
    """The copies in the place of the functions, wherever these have been imported to."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, function in owned:
            copy = copied(function, clock)
            for place in {id(each): each for each in (owner, *_modules())}.values():
                for known, value in list(vars(place).items()):
                    if value is function:
                        undo.append((place, known, function))
                        setattr(place, known, copy)
            assert undo, name
        yield
    finally:
        for place, known, function in undo:
            setattr(place, known, function)


class Training:
    """The network of document 000 on a list of batches, for whoever trains it an epoch at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        made = ready_made(small_network, STEPS, (10, 10), clocked=False)
        self.model, self.optimizer, self.loss, self.data = made.model, made.optimizer, made.loss, made.data

    def trainer(self) -> Callable[[], object]:
        trainer = Trainer(self.model, self.optimizer, self.loss, device="cpu")
        return lambda: trainer.fit(self.data, epochs=trainer.state.progress.epoch + 1)


def functions_of_a_step(*, deep: bool) -> list[tuple[Any, str, FunctionType]]:
    """Those of the package that are called at every step: the trainer's own, or all with ``deep``."""
    counts: Counter[CodeType] = Counter()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counts[frame.f_code] += 1

    epoch = Training().trainer()
    _watched(watch, epoch)
    often = {code for code, count in counts.items() if count >= STEPS}
    often |= {code for code in counts if code.co_qualname == f"{Trainer.__name__}._train_epoch"}  # the loop itself
    where = inspect.getsourcefile(Trainer)
    owned = [owner_of(code) for code in often if deep or code.co_filename == where]
    return list({each[2]: each for each in owned if each is not None}.values())


def _watched(watch: Callable[[FrameType, str, Any], None], run: Callable[[], object]) -> None:
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)


def torchs_work(training: Training, clock: Clock, epoch: Callable[[], object]) -> dict[str, int]:
    """Which line calls the model, the loss, backward, the optimizer's step and item: the last line reached before."""
    found: dict[str, int] = {}
    optimizers = str(Path(optim.__file__).parent)

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        kind = None
        if event == "c_call":
            kind = ITEM if getattr(argument, "__name__", "") == "item" else None
        elif event == "call":
            code, own = frame.f_code, frame.f_locals.get("self")
            if code is Tensor.backward.__code__:
                kind = BACKWARD
            elif own is training.model or own is training.loss:
                kind = FORWARD if own is training.model else LOSS
            elif code.co_filename.startswith(optimizers) and "zero_grad" not in code.co_name:
                kind = STEP
        if kind is not None and clock.reached:
            found.setdefault(kind, clock.reached[-1])

    clock.clear()
    _watched(watch, epoch)
    return found


class Charged:
    """The microseconds of the lines of one loop, epoch by epoch."""

    def __init__(self, training: Training, clock: Clock, epoch: Callable[[], object]) -> None:
        self._clock, self._epoch = clock, epoch
        self._cost = clock.cost()
        epoch()
        self.work = torchs_work(training, clock, epoch)
        self._each: dict[int, list[float]] = {}
        self._often: set[int] = set()

    def add(self) -> None:
        """One epoch more."""
        self._clock.clear()
        self._epoch()
        took, counts = self._clock.taken(self._cost)
        for key, nanoseconds in took.items():
            self._each.setdefault(key, []).append(nanoseconds / 1e3 / STEPS)
        self._often |= {key for key, count in counts.items() if count >= STEPS // 2}

    def us(self) -> dict[int, float]:
        """Of each line that runs at most steps, a step's share: the median over the epochs."""
        return {key: median(values) for key, values in self._each.items() if key in self._often}


def account(rounds: int, *, deep: bool) -> dict[str, Any]:
    """The lines of both loops, with their microseconds; they take turns, an epoch each."""
    hand_clock, hand = Clock(), Training()
    assert isinstance(by_hand, FunctionType)
    loop = copied(by_hand, hand_clock)
    run = partial(loop, hand.model, hand.optimizer, hand.loss, hand.data)
    clock, training = Clock(), Training()
    with in_place(functions_of_a_step(deep=deep), clock):
        charged = Charged(hand, hand_clock, run), Charged(training, clock, training.trainer())
        for number in range(rounds):
            for each in charged if number % 2 else reversed(charged):
                each.add()
    (hand_took, hand_work), (took, work) = ((each.us(), each.work) for each in charged)

    by_kind = {kind: hand_took[key] for kind, key in hand_work.items()}
    lines = []
    for key, microseconds in sorted(took.items(), key=lambda item: -item[1]):
        kinds = [kind for kind, where in work.items() if where == key and kind in by_kind]
        torchs = sum(by_kind[kind] for kind in kinds)
        lines.append({**asdict(clock.lines[key]), "us": microseconds, "torchs": kinds, "by_hand_us": torchs})
    done = {hand_work[kind] for kind, where in work.items() if kind in hand_work and where in took}
    alone = [{**asdict(hand_clock.lines[key]), "us": taken} for key, taken in hand_took.items() if key not in done]
    return {"lines": lines, "by_hand_alone": alone, "us": sum(took.values()), "by_hand_us": sum(hand_took.values())}


def added_without_a_clock(rounds: int) -> dict[str, float]:
    """What a step takes more in the trainer than by hand, with no clock between the lines."""
    problem = partial(ready_made, small_network, STEPS, (10, 10), clocked=True)
    case = Case("ready-made batches", problem, epochs=3, steps=3 * STEPS)
    times = measure(case, {"by hand": plain, "bare": bare}, max(rounds, 2))
    added = [1e6 * (b - a) for a, b in zip(times["by hand"], times["bare"], strict=True)]
    return asdict(Spread.of(added))


SETUP = """
import sys
sys.path[:0] = {path!r}
import torch
import account
torch.set_num_threads(1)
training = account.Training()
epoch = {epoch}
epoch()
epoch()
"""
EPOCHS = {
    "by hand": "lambda: account.by_hand(training.model, training.optimizer, training.loss, training.data)",
    "loopwright": "training.trainer()",
}


def instructions() -> dict[str, float]:
    """The instructions of a step, by callgrind: an epoch's, shared out among its steps."""
    from torch.utils.benchmark import Timer

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it runs "python"
    path = [str(Path(__file__).resolve().parent), str(Path(PACKAGE).parent)]
    found = {}
    for way, epoch in EPOCHS.items():
        timer = Timer("epoch()", setup=SETUP.format(path=path, epoch=epoch))
        counted = timer.collect_callgrind(number=1, repeats=None, collect_baseline=False, retain_out_file=False)
        found[way] = counted.counts() / STEPS
    return found


def as_table(found: Mapping[str, Any]) -> Table:
    """The lines, the most expensive addition first, and their sum."""
    rows = [["function", "line", "us a step", "of it torch, as by hand", "added, us"]]
    for each in sorted(found["lines"], key=lambda line: line["by_hand_us"] - line["us"]):
        torchs = f"{each['by_hand_us']:.2f} ({', '.join(each['torchs'])})" if each["torchs"] else ""
        cells = [each["function"], code(each["text"]), f"{each['us']:.2f}", torchs]
        rows.append([*cells, f"{each['us'] - each['by_hand_us']:+.2f}"])
    rows += [
        ["by hand only", code(each["text"]), "", f"{each['us']:.2f}", f"{-each['us']:+.2f}"]
        for each in found["by_hand_alone"]
    ]
    total = [f"{found['us']:.2f}", f"{found['by_hand_us']:.2f}", f"{found['us'] - found['by_hand_us']:+.2f}"]
    return [*rows, ["together", "", *total]]


def code(text: str) -> str:
    """A line for a cell: short, and without what would end it."""
    text = text.partition("  #")[0].replace("|", "\\|")
    return f"`{text if len(text) <= 70 else text[:67] + '...'}`"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help=f"epochs of {STEPS} steps (default: 50)")
    parser.add_argument("--quick", action="store_true", help="two rounds: they show the lines, not the times")
    parser.add_argument(
        "--deep", action="store_true", help="lines of all the package's functions, not the trainer's alone"
    )
    parser.add_argument("--callgrind", action="store_true", help="count instructions too; takes minutes, and valgrind")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else options.rounds
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.callgrind and shutil.which("valgrind") is None:
        parser.error("--callgrind needs valgrind, which is not installed")

    torch.set_num_threads(1)
    freeze()
    added = added_without_a_clock(rounds)
    found = account(rounds, deep=options.deep)
    facts = machine() | {"rounds": str(rounds), "added to a step, by a clock outside": f"{Spread(**added).text(1)} us"}
    if options.callgrind:
        found["instructions"] = instructions()
        facts |= {f"instructions of a step, {way}": f"{count:,.0f}" for way, count in found["instructions"].items()}
    put_out(options, {"machine": facts, "rounds": rounds, "added_us": added, **found}, as_table(found))


if __name__ == "__main__":
    main()
