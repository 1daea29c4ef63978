"""The folder of a run's checkpoints: their names, which are kept, and what a killed process left in it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from loopwright.checkpoint.format import FILES, MANIFEST, NAME
from loopwright.paths import PathLike, located

_LEFTOVER = re.compile(rf"\.(?:writing|deleting)-{NAME.pattern}")


def list_checkpoints(folder: PathLike) -> list[Path]:
    """The checkpoints in a folder by name alone, oldest first: nothing in them has been verified."""
    found, folder = [], located(folder)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            match = NAME.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found.append((int(match[1]), int(match[2] or 1), folder / entry.name))
    return [path for _, _, path in sorted(found)]


def linked_checkpoints(folder: PathLike) -> list[Path]:
    """What has a checkpoint's name in a folder and is a link, through which none is read."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(Path(e.path) for e in os.scandir(located(folder)) if NAME.fullmatch(e.name) and e.is_symlink())
    return []


def free_name(folder: Path, step: int) -> Path:
    """Where the next checkpoint of a step is to be."""
    name = base = f"step-{step:09d}"
    number = 2
    while os.path.lexists(path := folder / name):
        name, number = f"{base}-{number}", number + 1
    return path


def prune(folder: Path, keep: int, best: Path | None) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints and the best.

    Returns:
        Those that were left alone, because there is something in them that no checkpoint has.
    """
    strange = []
    for path in list_checkpoints(folder)[:-keep]:
        if path == best:
            continue
        if not set(os.listdir(path)) <= {MANIFEST, *FILES}:
            strange.append(path)
            continue
        doomed = folder / f".deleting-{path.name}"
        try:
            os.rename(path, doomed)  # gone at once: a half-deleted one is never taken for a checkpoint
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            remove(doomed)  # one that could not be removed to its end
            os.rename(path, doomed)
        remove(doomed)
    return strange


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted. The folder's lock is held."""
    for entry in list(os.scandir(folder)):
        if _LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            remove(Path(entry.path))


def remove(folder: Path) -> None:
    """Remove a folder of a checkpoint's files; nothing else that is in it, and nothing behind a link."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for name in {MANIFEST, *FILES} & set(os.listdir(descriptor)):
            os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(folder)
