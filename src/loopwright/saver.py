"""Saving while the training goes on: the copy is made in the loop, hashing and writing in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopwright.checkpoint import best_checkpoint
from loopwright.checkpoint.files import sync_folder
from loopwright.checkpoint.folder import clear_leftovers, list_checkpoints, prune
from loopwright.checkpoint.lock import FolderLock
from loopwright.checkpoint.manifest import read_manifest
from loopwright.checkpoint.writing import Prepared, Snapshot, prepare, write_checkpoint
from loopwright.errors import SaveError, counted
from loopwright.paths import numbered

_SMALL = 2**17  # bytes of tensors: to copy and to hash them takes about a tenth of a millisecond

logger: logging.Logger = logging.getLogger("loopwright")


class Saver:
    """Writes checkpoints into one folder, one after the other, in a thread of its own.

    What is small is turned into the bytes of its files in the loop, for that is the copy, and takes no longer than to
    hand over Python's lock a few times; only system calls are left to the thread. Of what is large, the loop makes a
    copy, and the thread does the rest.

    Args:
        folder: Made where it is missing, and locked against other processes.
        keep: How many of the newest to keep.

    Raises:
        LockedError: Another process writes into the folder.
        SaveError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._keep = keep
        self.folder: Path = folder
        self._unsynced = _made(folder)
        self._lock = FolderLock(self.folder)
        self._thread: threading.Thread | None = None
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._pending = 0  # orders whose end has not been taken note of
        self._copies = Snapshot({}, {}, None, {})  # of the newest save, whose memory the next one takes over
        self.has_room: bool = False
        self._best: tuple[float, Path] | None = None
        self._strange: set[Path] = set()  # not removed, and said so
        self.place: tuple[object, ...] | None = None  # where the run was at its last save

    def begin(self, kept: Sequence[Path], monitor: str | None, mode: str | None) -> None:
        """Begin or go on: what the folder holds but these checkpoints is set aside, under a numbered name.

        Args:
            kept: The checkpoints of the run that goes on.
            monitor: The metric whose best is kept whatever its age.
            mode: Whether the best is that with the smallest score, ``"min"``, or the largest.
        """
        with SaveError.on(self.folder):
            clear_leftovers(self.folder)
            others = [path for path in list_checkpoints(self.folder) if path not in kept]
            if others:
                aside = numbered(self.folder / "previous")
                aside.mkdir()
                for path in others:
                    path.rename(aside / path.name)
                sync_folder(aside)
                sync_folder(self.folder)
                which = counted(len(others), "checkpoint that is", "checkpoints that are")
                logger.info("%s not of this run %s in %s now", which, "are" if others[1:] else "is", aside)
        if self._unsynced:
            self._order(self._sync_parents)
        self._best = None
        if mode is not None and (best := best_checkpoint(self.folder)) is not None:
            facts = read_manifest(best)["facts"]
            if (facts["monitor"], facts["mode"]) == (monitor, mode):
                self._best = (facts["score"], best)

    def make_room(self, weights: Mapping[str, Tensor], others: Callable[[], Mapping[str, Tensor]]) -> None:
        """Get the memory for copies of these in the background, unless they are small.

        What the system has yet to find and to clear takes longer than the copying, and the first save would wait.
        """
        self.has_room = True
        if _size(weights) > _SMALL:
            self._order(functools.partial(self._touch, weights, others()))

    def save(self, snapshot: Snapshot) -> None:
        """Save a snapshot in the background; its tensors are copied before this returns.

        It waits for the one before, so that a kill never costs more than the work since the save before the newest.

        Raises:
            SaveError: An earlier one has failed.
        """
        self.has_room = True
        what: Snapshot | Prepared
        small = _size(snapshot.weights) + _size(snapshot.tensors) <= _SMALL
        prepared = prepare(snapshot, whole=True) if small else None
        self.wait()  # a small one is made ready before
        if prepared is not None:
            what = prepared
        else:
            weights = _copied(snapshot.weights, self._copies.weights)
            tensors = _copied(snapshot.tensors, self._copies.tensors)
            what = self._copies = dataclasses.replace(snapshot, weights=weights, tensors=tensors)
        self._order(functools.partial(self._write, what, snapshot.facts))

    def _order(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            # A daemon, since an end that is itself cut short must not leave the process waiting for it.
            orders = self._orders, self._ended
            thread = threading.Thread(target=_obey, args=orders, name="loopwright-save", daemon=True)
            thread.start()
            self._thread = thread
        self._pending += 1
        self._orders.put(work)

    def check(self) -> None:
        """Raise the error of a save in the background, if there was one."""
        while self._pending and not self._ended.empty():  # at every step, and so with little ado
            self._take()

    def wait(self) -> None:
        """Return when the newest save is durable.

        Raises:
            SaveError: It has failed.
        """
        while self._pending:
            self._take()

    def _take(self) -> None:
        error = self._ended.get()
        self._pending -= 1
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish what is being written, and let go of the folder."""
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while not self._ended.empty():  # another error is on its way, so that nobody asked for these
            if (error := self._ended.get()) is not None:
                logger.error("%s", error)
        self._lock.release()

    def _sync_parents(self) -> None:
        with SaveError.on(self.folder):
            while self._unsynced:
                sync_folder(self._unsynced[0])
                del self._unsynced[0]

    def _touch(self, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        with contextlib.suppress(RuntimeError):  # of memory that is not there the save itself will tell
            self._copies = Snapshot({}, _zeros(weights), None, _zeros(tensors))

    def _write(self, what: Snapshot | Prepared, facts: Mapping[str, Any]) -> None:
        path = write_checkpoint(self.folder, what)
        logger.debug("saved %s", path)
        score, sign = facts["score"], -1.0 if facts["mode"] == "min" else 1.0
        if score is not None and (self._best is None or sign * score > sign * self._best[0]):
            self._best = (score, path)
        with SaveError.on(self.folder):
            strange = prune(self.folder, self._keep, None if self._best is None else self._best[1])
        for found in strange:
            if found not in self._strange:
                self._strange.add(found)
                logger.warning("%s is not removed: there is something in it that no checkpoint has", found)


def _obey(orders: queue.SimpleQueue[Callable[[], None] | None], ended: queue.SimpleQueue[BaseException | None]) -> None:
    """What the thread does: one order after the other, each with its end told."""
    while (order := orders.get()) is not None:
        try:
            order()
        except BaseException as error:  # whatever it is, the loop gets it at its next step
            ended.put(error)
        else:
            ended.put(None)
        del order  # and the copies that it holds


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _copied(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in the memory of the ones before where they fit."""
    copies = {}
    for name, tensor in tensors.items():
        copy = before.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = _empty(tensor)
        copies[name] = copy.copy_(tensor)
    return copies


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _empty(tensor).zero_() for name, tensor in tensors.items()}  # torch.zeros would not touch them


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _made(folder: Path) -> list[Path]:
    """Make the folder with its parents; those in which one was made, and which are not durable yet."""
    with SaveError.on(folder):
        missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
        there = (folder, *folder.parents)[len(missing)]
        if not there.is_dir():
            raise _no_folder(folder, there)
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
    return [path.parent for path in reversed(missing)]


def _no_folder(folder: Path, there: Path) -> SaveError:
    error = SaveError(
        f"{there} is a file, and checkpoints go into a folder" + ("" if there == folder else f", {folder}"),
        why="a file of that name is in the way of the folder",
        fix=f"Checkpoint({f'{folder}-checkpoints'!r}), or another name" if there == folder else "another path",
    )
    error.errno, error.strerror, error.filename = errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)
    return error
