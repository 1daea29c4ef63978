"""Where a user's files are: paths as they are given, and names that are not taken."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TypeAlias

from loopwright.errors import ConfigError

PathLike: TypeAlias = str | os.PathLike[str]


def located(path: PathLike) -> Path:
    """The path that is meant, a leading ``~`` being somebody's home as in a shell, and no folder of that name."""
    return Path(os.path.expanduser(path))


def path_of(name: str, path: object, example: str) -> Path:
    """The path that an argument means.

    Args:
        name: What the argument is called.
        path: What was given for it.
        example: What to give.

    Raises:
        ConfigError: It cannot be written to by its name.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(where := os.fspath(path), str) or not where:
        raise ConfigError(f"{name} is {path!r}", why="it must be a path, as text or a pathlib.Path", fix=example)
    return located(where)


def file_in_the_way(path: Path) -> Path | None:
    """The file that stands where the path, or a folder above it, has to be a folder; None where there is none."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)


def file_behind(path: Path) -> Path | None:
    """The file that a path leads to through links; None where it leads through entries of the system's own.

    Those, such as ``/dev/stdout``, stand for a stream. Where it goes to a file, that is not ours to replace.
    """
    for _ in range(40):  # links in a row, as many as Linux follows
        place = Path(os.path.realpath(path.parent), path.name)
        if place.is_relative_to("/proc") or (place.is_relative_to("/dev") and not place.is_relative_to("/dev/shm")):
            return None
        if not place.is_symlink():
            return place
        path = place.parent / os.readlink(place)
    return path


def numbered(path: Path) -> Path:
    """The first of ``name-1.suffix``, ``name-2.suffix``, ... that is not taken: where a file is set aside to."""
    candidates = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
