"""The system calls of a checkpoint: its files are written and synced together, and read only where they are plain."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from loopwright.errors import CheckpointError

Pieces: TypeAlias = Sequence[bytes | memoryview]

_AT_ONCE = 2**27  # bytes to write in one system call


def write_files(folder: Path, files: Mapping[str, Pieces]) -> None:
    """Write all of the files, and only then wait for the disk: it takes them in one go."""
    # With as little as can be between two system calls: at each the loop may have to wait for Python's lock.
    parts = [(folder / name, pieces if len(pieces) == 1 else _gathered(pieces)) for name, pieces in files.items()]
    descriptors: list[int] = []
    try:
        for path, views in parts:
            descriptors.append(descriptor := os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            for view in views:
                written = os.write(descriptor, view if len(view) <= _AT_ONCE else memoryview(view)[:_AT_ONCE])
                while written < len(view):
                    written += os.write(descriptor, memoryview(view)[written : written + _AT_ONCE])
            _begin_to_sync(descriptor)
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _begin_to_sync(descriptor: int) -> None:
    """Have the disk begin with a file, so that the wait for several is not the sum of them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _gathered(pieces: Pieces) -> Iterator[memoryview]:
    """The same bytes with small pieces put together: a thousand biases are not a thousand system calls."""
    small = bytearray()
    for piece in pieces:
        if small and len(small) + len(piece) > 2**20:
            yield memoryview(small)
            small = bytearray()
        if len(piece) > 2**20:
            yield memoryview(piece)
        else:
            small += piece
    if small:
        yield memoryview(small)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(*pieces: bytes | memoryview) -> str:
    """The hash of all of them in a row, in hexadecimal digits."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def read_regular(path: Path, size: int, *, exactly: bool = False) -> bytes:
    """The bytes of a plain file of at most, or exactly, ``size``: never of a link, a pipe or a device."""
    try:
        with opened(path, size, exactly=exactly) as file:
            return file.read(size + 1)
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory", why=f"it has up to {size} bytes") from error


@contextlib.contextmanager
def opened(path: Path, size: int, *, exactly: bool) -> Iterator[BinaryIO]:
    """A plain file of at most, or exactly, ``size`` bytes, open for reading; CheckpointError if it is not one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no plain file")
            if status.st_size > size or (exactly and status.st_size != size):
                raise CheckpointError(
                    f"{path} is damaged",
                    why=f"it has {status.st_size} bytes, {'' if exactly else 'at most '}{size} expected",
                )
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", why=error.strerror or str(error)) from error
