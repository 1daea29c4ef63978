"""What ``python -m loopwright doctor`` looks at: the installation and the machine, to be pasted into an issue."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

import loopwright
from loopwright import Callback, Every, State, Trainer

REQUIRED: Mapping[str, str] = {  # as in pyproject.toml: a package, and the oldest version that will do
    "torch": "2.10",
    "tqdm": "4.66",
    "tensorboard": "2.16",
    "safetensors": "0.4.5",
    "typing-extensions": "4.12",
}
EXTRAS: Mapping[str, Mapping[str, str]] = {  # those that are for users
    "plot": {"matplotlib": "3.8"},
    "metrics": {"torchmetrics": "1.4"},
    "examples": {"matplotlib": "3.8", "numpy": "1.26", "scikit-learn": "1.4"},
}
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")

_MIB = 2**20
_SHARED = Path("/dev/shm")  # through which a loader's workers hand over their batches
_FEW_STEPS = 20  # made before the clock starts: the first ones load kernels


class Extra(TypedDict):
    """An extra: the packages it brings, their versions or None, and what installs it if something is missing."""

    packages: dict[str, str | None]
    install: str | None


class Folder(TypedDict):
    """A folder that runs write to."""

    path: str
    writable: bool
    free_mib: int | None


class Fit(TypedDict):
    """The short fit: where it ran, and how fast."""

    device: str
    steps: int
    seconds: float
    steps_per_second: float
    loss: list[float]


class Report(TypedDict):
    """All that was found; ``problems`` is empty where all is well, and ``notes`` is what may matter."""

    versions: dict[str, str | None]
    devices: dict[str, str]
    extras: dict[str, Extra]
    folders: dict[str, Folder]
    shared_memory_mib: int | None
    threads: dict[str, int | str]
    fit: Fit | None
    problems: list[str]
    notes: list[str]


def examine(seconds: float = 2.0) -> Report:
    """Look at everything, and fit a small model for some seconds.

    Args:
        seconds: How long the fit lasts.
    """
    problems: list[str] = []
    notes: list[str] = []
    report: Report = {
        "versions": _versions(problems),
        "devices": _devices(problems),
        "extras": _extras(),
        "folders": {
            "working": _folder(os.getcwd, "the working folder", problems),
            "temporary": _folder(tempfile.gettempdir, "the folder for temporary files", problems),
        },
        "shared_memory_mib": _shared_memory(notes),
        "threads": _threads(),
        "fit": _fit(seconds, problems),
        "problems": problems,
        "notes": notes,
    }
    return report


def as_text(report: Report) -> str:
    """The report in words, a line each."""
    shared, fit = report["shared_memory_mib"], report["fit"]
    lines = [f"{name}: {version or 'missing'}" for name, version in report["versions"].items()]
    lines += [f"device {name}: {words}" for name, words in report["devices"].items()]
    for name, extra in report["extras"].items():
        found = ", ".join(f"{package} {version or 'missing'}" for package, version in extra["packages"].items())
        lines.append(f"extra {name}: {found}" + (f"; {extra['install']}" if extra["install"] else ""))
    for name, folder in report["folders"].items():
        free = "" if folder["free_mib"] is None else f", {folder['free_mib']:,} MiB free"
        lines.append(f"{name} folder: {folder['path']}, {'writable' if folder['writable'] else 'not writable'}{free}")
    lines.append("shared memory: " + ("not known here" if shared is None else f"{shared:,} MiB"))
    lines.append("threads: " + ", ".join(f"{name} {value}" for name, value in report["threads"].items()))
    if fit is not None:
        first, last = fit["loss"]
        lines.append(
            f"fit on {fit['device']}: {fit['steps_per_second']:,.0f} steps per second over {fit['seconds']:.1f} s, "
            f"the loss from {first:.4f} to {last:.4f}"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]] or ["all is well"]
    return "\n".join(lines)


def _versions(problems: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "loopwright": loopwright.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for package, oldest in REQUIRED.items():
        found[package] = version = _version(package)
        install = f'pip install "{package}>={oldest}"'
        if version is None:
            problems.append(f"{package} is not installed, and loopwright requires it: {install}")
        elif _numbers(version) < _numbers(oldest):
            problems.append(f"{package} {version} is older than loopwright requires: {install}")
    found["torch"] = str(torch.__version__)  # what its build is for is not always in the metadata
    if sys.version_info < (3, 11):  # noqa: UP036  # where pip was told to ignore requires-python
        problems.append("loopwright requires Python 3.11 or newer")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The version's leading numbers, such as (2, 13, 0) of ``2.13.0+cu130``, to compare by."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _extras() -> dict[str, Extra]:
    extras: dict[str, Extra] = {}
    for name, packages in EXTRAS.items():
        found = {package: _version(package) for package in packages}
        whole = all(
            version is not None and _numbers(version) >= _numbers(packages[package])
            for package, version in found.items()
        )
        install = None if whole else f'pip install "loopwright[{name}]"'
        extras[name] = {"packages": found, "install": install}
    return extras


def _devices(problems: list[str]) -> dict[str, str]:
    found = {"cpu": platform.processor() or platform.machine()}
    if torch.version.cuda is not None or torch.version.hip is not None:
        found["cuda"] = f"none (torch is built for {'CUDA' if torch.version.cuda else 'ROCm'}"
        found["cuda"] += f" {torch.version.cuda or torch.version.hip})"
    if torch.cuda.is_available():
        del found["cuda"]
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = f"{about.total_memory // _MIB:,} MiB, compute capability {about.major}.{about.minor}"
            found[f"cuda:{index}"] = f"{about.name}, {memory}, {torch.version.cuda or torch.version.hip}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple's GPU"
    for name, words in found.items():
        if words.startswith("none"):
            continue
        try:
            usable = float(torch.ones(4, device=name).sum()) == 4.0
        except RuntimeError as error:
            problems.append(f"device {name} cannot be used: {_private(str(error)).splitlines()[0]}")
        else:
            if not usable:
                problems.append(f"device {name} computes wrongly")
    return found


def _folder(find: Callable[[], str], name: str, problems: list[str]) -> Folder:
    path = "none"
    try:
        path = find()
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"loopwright")
        return {"path": _private(path), "writable": True, "free_mib": shutil.disk_usage(path).free // _MIB}
    except OSError as error:  # from find as well: a working folder may be gone
        problems.append(f"{name} ({_private(path)}) cannot be written to: {error.strerror or error}")
        return {"path": _private(path), "writable": False, "free_mib": None}


def _shared_memory(notes: list[str]) -> int | None:
    try:
        size = shutil.disk_usage(_SHARED).total // _MIB
    except OSError:
        return None  # not every system has it there
    if size <= 64:  # what a container gets that is not told otherwise
        notes.append(
            f"shared memory is {size} MiB: the workers of a DataLoader hand their batches over in it, and are killed "
            "where it is full; docker run --shm-size=1g, or num_workers=0"
        )
    return size


def _threads() -> dict[str, int | str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, int | str] = {
        "processors": usable,
        "torch": torch.get_num_threads(),
        "between operations": torch.get_num_interop_threads(),
    }
    return found | {name: os.environ[name] for name in SETTINGS if name in os.environ}


class _Clock(Callback):
    """Stops a fit when its time is over, and keeps the steps that it made since the first few."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = self._begun = time.perf_counter()
        self.steps = 0
        self.elapsed = 0.0

    def on_step_end(self, state: State) -> None:
        now, step = time.perf_counter(), state.progress.step
        if step <= _FEW_STEPS:
            self._begun = now
        else:
            self.steps, self.elapsed = step - _FEW_STEPS, now - self._begun
        if step > _FEW_STEPS and now - self._started >= self._seconds:
            state.stop("time is over")


def _fit(seconds: float, problems: list[str]) -> Fit | None:
    """Fit a network of a few thousand parameters; None where that fails, and the problem says why."""
    clock = _Clock(seconds)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
            batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(100, 32, 32)]
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=1e-3), nn.MSELoss(), callbacks=[clock], on_nonfinite="raise"
        )
        before = trainer.evaluate(batches[:10], name="before")["before/loss"]
        trainer.fit(batches, epochs=1_000_000, validate=Every(epochs=1))
        after = trainer.evaluate(batches[:10], name="after")["after/loss"]
    except Exception as error:
        problems.append(f"a small fit failed with {type(error).__name__}: {_private(str(error))}")
        return None
    if not after < before:
        problems.append(f"a small fit did not learn: the loss went from {before:.4f} to {after:.4f}")
    return {
        "device": str(trainer.state.device),
        "steps": clock.steps,
        "seconds": clock.elapsed,
        "steps_per_second": clock.steps / clock.elapsed,
        "loss": [before, after],
    }


def _private(text: str) -> str:
    """The text without the path of the home folder, which holds a name."""
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?=/|$|[\s'\":,])", "~", text) if len(home) > 1 else text
