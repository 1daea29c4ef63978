"""Saves that die or are refused at a chosen system call or byte, in a process of their own."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken_runs import Case, build, fit, left_behind
from loopwright import Every
from loopwright.errors import SaveError

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")
CASE = Case(samples=12, batch_size=3, save=Every(steps=2), epochs=2, keep=1, log=Every(epochs=1))


class Injection:
    """Comes before every call of the functions in CALLS that changes something below a folder."""

    def __init__(self, folder: Path, action: Callable[[int, str], None]) -> None:
        self.folder, self.action = str(folder), action
        self.count = 0
        self.real = {name: getattr(os, name) for name in CALLS}
        self._paths: dict[int, str] = {}
        for name in CALLS:
            setattr(os, name, self._before(name))

    def _before(self, name: str) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **named: Any) -> Any:
            path = self._paths.get(target, "") if isinstance(target, int) else os.fspath(target)
            beside = named.get("dir_fd", named.get("src_dir_fd"))
            path = path if beside is None else os.path.join(self._paths.get(beside, ""), path)
            changes = name != "open" or bool(arguments[0] & (os.O_WRONLY | os.O_RDWR))
            if str(path).startswith(self.folder) and changes and not str(path).endswith(".lock"):
                self.count += 1
                self.action(self.count, name)
            found = self.real[name](target, *arguments, **named)
            if name == "open":
                self._paths[found] = str(path)
            return found

        return call

    def undo(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)


def dies(folder: str, at: int) -> None:
    """The run, whose process is gone before the system call number ``at`` of its saves."""
    place = Path(folder)

    def die(count: int, name: str) -> None:
        if count == at:
            os._exit(9)

    Injection(place / "checkpoints", die)
    _run(place)


def dies_in_the_byte(folder: str, file: str, number: int, byte: int) -> None:
    """The run, whose process the system kills when ``file`` of its save ``number`` grows beyond ``byte`` bytes."""
    place = Path(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    real, seen = os.open, 0

    def open_limited(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        nonlocal seen
        if isinstance(path, Path) and path.name == file and flags & os.O_WRONLY:
            seen += 1
            if seen == number:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (byte, resource.RLIM_INFINITY))
        return real(path, flags, *arguments, **named)

    os.open = open_limited
    _run(place)


def refused(folder: str, number: int, at: int, call: str) -> None:
    """The run, in which the system refuses the call number ``at`` of its saves; the outcome is in ``refused.json``."""
    place = Path(folder)
    steps_at: list[int] = []
    trainer = build(CASE, place)

    def refuse(count: int, name: str) -> None:
        if count == at:
            steps_at.append(trainer.state.progress.step)
            raise OSError(number, os.strerror(number), str(place))

    injection = Injection(place / "checkpoints", refuse)
    found: dict[str, Any] = {"raised": False}
    try:
        fit(trainer, CASE)
    except SaveError as error:
        found = {
            "raised": True,
            "errno": error.errno,
            "filename": error.filename,
            "steps late": trainer.state.progress.step - steps_at[0],
        }
    injection.undo()
    (place / "refused.json").write_text(json.dumps(found))


def limited(folder: str, byte: int) -> None:
    """The run with no file allowed beyond ``byte`` bytes: what a full disk is like, by the system itself."""
    place = Path(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = build(CASE, place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte, before[1]))
    found: dict[str, Any] = {"raised": False}
    try:
        fit(trainer, CASE)
    except SaveError as error:
        found = {"raised": True, "errno": error.errno, "filename": error.filename}
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (place / "refused.json").write_text(json.dumps(found))


def whole(folder: str) -> None:
    """The run, or what is left of it, undisturbed; what it leaves goes into ``result.json``."""
    _run(Path(folder))


def counted(folder: str) -> None:
    """The run, undisturbed; ``calls.json`` then holds the names of the system calls of its saves, in order."""
    place = Path(folder)
    names: list[str] = []
    injection = Injection(place / "checkpoints", lambda count, name: names.append(name))
    _run(place)
    injection.undo()
    (place / "calls.json").write_text(json.dumps(names))


def _run(place: Path) -> None:
    logging.basicConfig(level=logging.INFO)
    trainer = build(CASE, place)
    result = fit(trainer, CASE)
    found = {name: value.hex() for name, value in left_behind(trainer, result, place).items()}
    (place / "result.json").write_text(json.dumps(found))


ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS)
