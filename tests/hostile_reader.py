"""Reads checkpoints that were made to do harm, in a process of its own where everything it does is written down.

``python hostile_reader.py make FOLDER`` saves a good one below ``FOLDER``; with ``read`` for ``make``, every checkpoint
that ``FOLDER/corpus.json`` lists is read in every way that the library has, and what came of it is printed as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopwright import (
    Callback,
    CheckpointError,
    Every,
    Schedule,
    Trainer,
    best_checkpoint,
    latest_checkpoint,
    load_weights,
)
from loopwright.__main__ import main
from loopwright.callbacks import Checkpoint, CSVLogger, EarlyStopping, TensorBoardLogger
from loopwright.checkpoint.reading import read_checkpoint
from loopwright.data import Loader

# What reading a checkpoint has no business with. Opening a file is looked at by itself.
FORBIDDEN = (
    "import", "exec", "compile", "marshal.", "pickle.", "code.", "ctypes.", "cpython.run_",
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "os.kill", "pty.",
    "subprocess.", "socket.", "ssl.", "urllib.", "http.", "smtplib.", "ftplib.", "webbrowser.",
    "os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.putenv", "os.remove", "os.rename", "os.rmdir",
    "os.setxattr", "os.symlink", "os.truncate", "os.unsetenv", "os.utime", "shutil.", "sqlite3.", "tempfile.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SAMPLES = [(torch.tensor([float(i), 1.0 - i, i % 3]), torch.tensor([float(i % 2)])) for i in range(12)]


class Counting(Callback[Any]):
    """A user's callback, which trusts what it gets back."""

    def __init__(self) -> None:
        self.seen = 0
        self.names: list[str] = []

    def on_batch_end(self, state: Any, output: Any) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "names": self.names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"] + 0
        self.names = [name.upper() for name in state["names"]]


def make_trainer(folder: Path, *others: Callback[Any], saving: bool = True) -> Trainer:
    """A trainer with a part of every kind that keeps a state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    callbacks: list[Callback[Any]] = [
        CSVLogger(folder / "metrics.csv"),
        TensorBoardLogger(folder / "events"),
        EarlyStopping("val/loss", mode="min", patience=50, restore_best=True),
        Counting(),
        *others,
    ]
    if saving:
        callbacks.append(Checkpoint(folder / "checkpoints", every=Every(steps=1), keep=50))
    return Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        accumulate=2,
        schedule=Schedule(torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3]), each="step"),
        callbacks=callbacks,
        device="cpu",
    )


class Leave(Callback[Any]):
    """Asks the run to end, as a cluster does, while a window is open."""

    def on_batch_end(self, state: Any, output: Any) -> None:
        if state.progress.epoch == 1 and state.progress.batch == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def make_checkpoint(folder: Path) -> None:
    """Save a run in the middle of everything."""
    with contextlib.suppress(SystemExit):
        fit(make_trainer(folder, Leave()))


def fit(trainer: Trainer, *, resume: str | None = None) -> None:
    """Train for two epochs."""
    trainer.fit(Loader(SAMPLES, batch_size=3, seed=1), [(torch.ones(2, 3), torch.ones(2, 1))], epochs=2, resume=resume)


def fingerprint(trainer: Trainer) -> str:
    """Everything that a refused checkpoint must not have changed."""
    run = trainer._run
    state = {**run.state_dict(), "weights": run.weights(), "stop": trainer.state.stop_reason}
    del state["data"], state["random"]["own"]  # they are of the loader, which is another at each call
    return hashlib.sha256(repr(_hashed(state)).encode()).hexdigest()


def _hashed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: _hashed(item) for key, item in value.items()}
    return [_hashed(item) for item in value] if isinstance(value, (list, tuple)) else value


class Audit:
    """Writes down what is forbidden while it is on."""

    def __init__(self, allowed: Path) -> None:
        self.on = False
        self.events: list[str] = []
        self._allowed = str(allowed)
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITING)
            if writes and not str(path).startswith(self._allowed):
                self.events.append(f"open {path!r} {mode!r} {flags!r}")
        elif event.startswith(FORBIDDEN):
            self.events.append(f"{event} {args!r}"[:200])

    def during(self, action: Callable[[], object]) -> dict[str, Any]:
        """What came of it: the kind of error, what it said, seconds of the processor, and forbidden events."""
        self.events = []
        kind, said = "", ""
        began = time.process_time()
        self.on = True
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
                result = action()
            said = f"{result!r} {stderr.getvalue()}"
        except CheckpointError as error:
            kind, said = "CheckpointError", str(error)
        except Exception as error:  # whatever else it is, the test is to see it
            kind, said = type(error).__name__, str(error)
        finally:
            self.on = False
        return {
            "kind": kind,
            "said": said[:500],
            "seconds": time.process_time() - began,
            "events": self.events,
        }


def read_corpus(folder: Path) -> dict[str, Any]:
    """What came of every checkpoint in the corpus, by its name."""
    corpus = json.loads((folder / "corpus.json").read_text())
    audit = Audit(folder / "run")
    trainer, model = make_trainer(folder / "run", saving=False), make_trainer(folder / "run").state.model
    good = Path(corpus["good"])
    for path in (good, good.parent / "step-000000099"):  # a first time for all that is imported when first needed
        for action in actions(path, trainer, model).values():
            audit.during(action)
    trainer = make_trainer(folder / "run", saving=False)
    before = fingerprint(trainer)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, resource.RLIM_INFINITY))
    found: dict[str, Any] = {}
    for name, text in corpus["cases"].items():
        path = Path(text)
        found[name] = {how: audit.during(action) for how, action in actions(path, trainer, model).items()}
        found[name]["unchanged"] = fingerprint(trainer) == before
        if not found[name]["unchanged"]:
            trainer = make_trainer(folder / "run", saving=False)
            before = fingerprint(trainer)
        tracemalloc.start()
        audit.during(lambda path=path: read_checkpoint(path))  # type: ignore[misc]  # called at once
        found[name]["memory"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


def actions(path: Path, trainer: Trainer, model: nn.Module) -> dict[str, Callable[[], object]]:
    """Every way to read a checkpoint."""
    return {
        "read": lambda: read_checkpoint(path) and None,
        "load_weights": lambda: load_weights(path, model),
        "latest": lambda: latest_checkpoint(path.parent),
        "best": lambda: best_checkpoint(path.parent),
        "inspect": lambda: main(["inspect", str(path)]),
        "inspect --json": lambda: main(["inspect", "--json", str(path)]),
        "fit": lambda: fit(trainer, resume=str(path)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "make":
        make_checkpoint(Path(sys.argv[2]))
    else:
        json.dump(read_corpus(Path(sys.argv[2])), sys.stdout)
