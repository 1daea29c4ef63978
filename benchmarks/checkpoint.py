"""What a checkpoint costs: for how long the loop is blocked, and how long it takes until it is durable.

A model is trained with a ``Checkpoint`` in the list, which saves its weights and the optimizer's momentum. It is
compared with ``torch.save`` of the same state, with and without fsync, a raw write with fsync of as many bytes, and
the SHA-256 of as many bytes. All take turns, in an order that is reversed every round, on one disk and in one process.
Every checkpoint is read back: it has to hold the weights and the momentum, bit for bit.

$ python benchmarks/checkpoint.py --folder . --json checkpoint.json --markdown checkpoint.md
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn, optim

from loopwright import Callback, Every, State, Trainer
from loopwright.callbacks import Checkpoint
from loopwright.checkpoint.reading import read_checkpoint
from measuring import Spread, Table, add_outputs, disk, freeze, machine, put_out, seconds

BLOCKED, DURABLE = "the loop is blocked", "until it is durable"
FIRST, LATER = "first save", "later save"
TORCH, TORCH_SYNC = "torch.save", "torch.save + fsync"
RAW, HASH = "raw write + fsync", "SHA-256"


@dataclass(frozen=True)
class Case:
    """A network of equal layers, and so a size."""

    name: str
    layers: int
    width: int


CASES = (Case("100 MB", layers=3, width=2048), Case("1 GB", layers=30, width=2048))


class OtherStateError(Exception):
    """The checkpoint does not hold what the model and the optimizer do, so that its time says nothing."""


class Problem:
    """A model whose weights and momentum are to be saved, and the same number of bytes in one piece."""

    def __init__(self, case: Case) -> None:
        self.model = nn.Sequential(*(nn.Linear(case.width, case.width) for _ in range(case.layers)))
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.batch = (torch.randn(2, case.width), torch.randn(2, case.width))
        nn.functional.mse_loss(self.model(self.batch[0]), self.batch[1]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()  # from here on there is momentum
        tensors = self.tensors()
        self.bytes = torch.cat([tensor.flatten() for tensor in tensors]).numpy().data.cast("B")

    def state(self) -> dict[str, Any]:
        """What ``torch.save`` is given."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[Tensor]:
        """The weights, and then the momentum, in the order of the weights."""
        weights = [parameter.detach() for parameter in self.model.parameters()]
        return weights + [state["momentum_buffer"] for state in self.optimizer.state.values()]


def torch_save(problem: Problem, path: Path, *, sync: bool) -> None:
    torch.save(problem.state(), path)
    if sync:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # of the file, whoever has written it
        os.close(descriptor)


def raw_write(problem: Problem, path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    rest = problem.bytes
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(problem: Problem, path: Path) -> None:
    hashlib.sha256(problem.bytes).digest()


Rival = Callable[[Problem, Path], None]
RIVALS: dict[str, Rival] = {
    TORCH: partial(torch_save, sync=False),
    TORCH_SYNC: partial(torch_save, sync=True),
    RAW: raw_write,
    HASH: sha256,
}


@dataclass(frozen=True)
class Taken:
    """What one way took once: seconds, and the bytes of memory that it needed meanwhile, where Linux tells them."""

    seconds: float
    memory: float


def prepare(size: int) -> None:
    """Make all ways find the same memory, of which they may need twice as much as there is to save.

    What others have freed goes back to the system, so that it is new memory for everybody. On a virtual machine the
    system itself may have to fetch it from the host, which whoever comes first would pay for.
    """
    gc.collect()
    torch.empty(2 * size, dtype=torch.uint8).zero_()
    with contextlib.suppress(AttributeError):  # it is glibc's
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """The most memory that the process has at once, from when this was made, beyond what it had then."""

    def __init__(self, before: int | None = None) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = _status("VmRSS") if before is None else before

    def peak(self) -> float:
        return float(_status("VmHWM") - self.before)


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Saves(Callback[Any], logging.Handler):
    """Notes when the loop comes to a save, and when the save has become durable.

    The last hook before a save is the batch's end; when a checkpoint is durable, the library's log says so.
    """

    trainer: Trainer[Any]

    def __init__(self, size: int) -> None:
        logging.Handler.__init__(self, logging.DEBUG)
        self._size = size
        self.durable = threading.Event()
        self.begun_at = self.durable_at = 0.0
        self._before: int | None = None  # what the first batch found: memory that is kept counts for every save

    def on_batch_end(self, state: State[Any], output: object) -> None:
        prepare(self._size)
        self.durable.clear()
        self.memory = Memory(self._before)
        self._before = self.memory.before
        self.begun_at = perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("saved"):
            self.durable_at = perf_counter()
            self.durable.set()

    def took(self) -> dict[str, Taken]:
        """What the save took from which the loop has just come back."""
        blocked = perf_counter() - self.begun_at
        if not self.durable.wait(timeout=600):
            raise TimeoutError("nothing was saved")
        memory = self.memory.peak()
        for saver in self.trainer._saving._savers:
            saver.wait()  # it removes the checkpoint before
        return {BLOCKED: Taken(blocked, memory), DURABLE: Taken(self.durable_at - self.begun_at, memory)}


@contextlib.contextmanager
def listening(handler: logging.Handler) -> Iterator[None]:
    """Let the handler hear all that the library's log says."""
    logger = logging.getLogger("loopwright")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Turns:
    """The training data, whose batches are where one way after the other takes its turn."""

    def __init__(self, problem: Problem, saves: Saves, folder: Path, order: Sequence[str]) -> None:
        self._problem, self._saves, self._folder, self._order = problem, saves, folder, order
        self.taken: dict[str, Taken] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for way in (FIRST, *self._order):
            os.sync()  # nobody waits for what others have written
            if way in RIVALS:
                self.taken[way] = self._rival(RIVALS[way])
            else:
                yield self._problem.batch
                yield self._problem.batch  # every second step is saved
                self.taken |= {f"{way}: {what}": taken for what, taken in self._saves.took().items()}
                check(self._problem, self._folder / "checkpoints")

    def _rival(self, rival: Rival) -> Taken:
        prepare(len(self._problem.bytes))
        path, memory = self._folder / "rival", Memory()
        taken = seconds(partial(rival, self._problem, path))
        path.unlink(missing_ok=True)
        return Taken(taken, memory.peak())


def check(problem: Problem, folder: Path) -> None:
    """Raise OtherStateError unless the newest checkpoint holds the problem's weights and momentum."""
    (newest,) = folder.glob("step-*")
    contents = read_checkpoint(newest)
    saved = [contents.weights[name] for name, _ in problem.model.named_parameters()]
    saved += [state["momentum_buffer"] for state in contents.state["optimizer"]["state"].values()]
    tensors = problem.tensors()
    if len(saved) != len(tensors) or not all(map(torch.equal, saved, tensors)):
        raise OtherStateError(f"{newest} does not hold the weights and the momentum")


def measure(case: Case, rounds: int, folder: Path) -> dict[str, Any]:
    """What each way took, round by round.

    Args:
        case: What to save.
        rounds: How often to save it in each way.
        folder: On the disk that is measured.

    Raises:
        OtherStateError: A checkpoint did not hold the state.
    """
    problem = Problem(case)
    found: list[dict[str, Taken]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            ways = [LATER, *RIVALS]
            saves = Saves(len(problem.bytes))
            turns = Turns(problem, saves, Path(place), ways if number % 2 else ways[::-1])
            checkpoint = Checkpoint(Path(place, "checkpoints"), every=Every(steps=2), keep=1)
            trainer = Trainer(
                problem.model, problem.optimizer, nn.MSELoss(), callbacks=[checkpoint, saves], device="cpu"
            )
            saves.trainer = trainer
            with listening(saves):
                trainer.fit(turns, epochs=1)
            found.append(turns.taken)
    return report(case, len(problem.bytes), found)


def report(case: Case, size: int, found: Sequence[Mapping[str, Taken]]) -> dict[str, Any]:
    """What the measurements say: each way compared with others of the same round."""
    ways = {}
    for way in [f"{save}: {what}" for save in (FIRST, LATER) for what in (BLOCKED, DURABLE)] + list(RIVALS):
        ways[way] = {
            "seconds": asdict(Spread.of([taken[way].seconds for taken in found])),
            "mb_per_s": asdict(Spread.of([size / 1e6 / taken[way].seconds for taken in found])),
            "of_torch_save": asdict(Spread.of([taken[way].seconds / taken[TORCH].seconds for taken in found])),
            "of_raw_write_and_hash": asdict(
                Spread.of([taken[way].seconds / (taken[RAW].seconds + taken[HASH].seconds) for taken in found])
            ),
            "memory_mb": asdict(Spread.of([taken[way].memory / 1e6 for taken in found])),
        }
    return {"case": case.name, "bytes": size, "ways": ways}


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells."""
    rows = [["state", "what", "seconds", "MB/s", "of torch.save", "of raw write + fsync + SHA-256", "memory, MB"]]
    for found in reports:
        for way, figures in found["ways"].items():
            shown = {name: Spread(**figures[name]) for name in figures}
            rows.append(
                [
                    found["case"],
                    way,
                    shown["seconds"].text(3),
                    f"{shown['mb_per_s'].median:.0f}",
                    shown["of_torch_save"].text(2),
                    shown["of_raw_write_and_hash"].text(2),
                    f"{shown['memory_mb'].median:.0f}",
                ]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how often each size is saved in each way (default: 10)")
    parser.add_argument("--quick", action="store_true", help="two rounds of 100 kB: they show that it works, not times")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: the current one)")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    rounds, cases = (2, (Case("100 kB", layers=3, width=64),)) if options.quick else (options.rounds, CASES)
    if rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    torch.set_num_threads(1)
    freeze()
    try:
        reports = [measure(case, rounds, options.folder) for case in cases]
    except OtherStateError as error:
        sys.exit(str(error))

    facts, table = machine() | {"disk": disk(options.folder), "rounds": str(rounds)}, as_table(reports)
    facts["processor"] = facts["processor"].removesuffix(", of which one is used")  # hashing and writing use others
    put_out(options, {"machine": facts, "rounds": rounds, "cases": reports}, table)


if __name__ == "__main__":
    main()
