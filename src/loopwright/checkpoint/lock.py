"""The lock of a folder of checkpoints: one process writes into it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from loopwright.errors import LockedError, SaveError


class FolderLock:
    """The right to write into a checkpoint folder: one process at a time, gone with the process.

    A forked child, such as a loader's worker, closes its copy at once, so that it cannot outlive the owner's.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        with SaveError.on(folder):
            self._descriptor: int | None = os.open(
                folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
            )
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise SaveError.of(error, folder) from error
            raise LockedError(
                f"{folder} is in use by another run",
                why="two runs that save into one folder would take each other's checkpoints for their own",
                fix="another folder, or wait until that run has ended",
            ) from None
        _held.add(self)

    def release(self) -> None:
        """Let go of the folder."""
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: set[FolderLock] = set()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):  # where processes can fork at all
    os.register_at_fork(after_in_child=_release_in_child)
