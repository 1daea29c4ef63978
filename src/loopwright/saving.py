"""Saving and resuming, as the loop does it for the Checkpoints in its list."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from loopwright.adapters import plain_state, settings_of
from loopwright.batches import EpochData
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.checkpoint import latest_checkpoint
from loopwright.checkpoint.folder import linked_checkpoints, list_checkpoints
from loopwright.checkpoint.manifest import read_manifest
from loopwright.checkpoint.reading import Contents, read_checkpoint
from loopwright.checkpoint.writing import Snapshot
from loopwright.errors import CheckpointError, ConfigError, advise
from loopwright.guard import Guard
from loopwright.paths import located
from loopwright.plain import encode
from loopwright.planning import length_of
from loopwright.randomness import RandomState
from loopwright.run import Run
from loopwright.saver import Saver
from loopwright.signals import Signals

T = TypeVar("T")

_BEST = re.compile(r"(?<![a-z])best(?![a-z])", re.IGNORECASE)  # the word alone
_MOST_LOOKED_INTO = 100  # entries of a folder that is none of checkpoints, for the advice

logger: logging.Logger = logging.getLogger("loopwright")


class Saving:
    """One fit's checkpoints: their folders, locked; what is due to be saved; and the signals that ask for it.

    Args:
        run: What is saved.
        checkpoints: Where and when.
        guard: Looks at the parameters before each save.
        checked: Whether it does: what is saved unchecked is never the best.

    Attributes:
        active: Whether there is anywhere to save to.
        obeyed: Whether a signal has ended the fit between two batches.
        signals: Those that ask for a stop. Without a checkpoint to save into, Ctrl-C still ends a run between two
            batches, so that the next fit can go on from there.
    """

    def __init__(self, run: Run, checkpoints: Sequence[Checkpoint], guard: Guard, *, checked: bool) -> None:
        self._run, self._checkpoints, self._guard, self._checked = run, checkpoints, guard, checked
        self._savers: list[Saver] = []
        self.signals: Signals = Signals(saves=bool(checkpoints))
        self.obeyed: bool = False
        self._at_work = False  # while a fit runs
        self._workers = False  # whether its loaders have any, which get a signal to the process group too
        self._cut = False  # whether a signal has kept the loader from going on
        self._by_steps = any(checkpoint.every.steps is not None for checkpoint in checkpoints)
        self._has_room = False  # all of the savers have it
        self.active: bool = bool(checkpoints)  # whether there is anywhere to save to

    def check(self, resume: object) -> None:
        """Raise ConfigError unless ``resume`` says where to go on from."""
        if resume is not None and (not isinstance(resume, (str, os.PathLike)) or not os.fspath(resume)):
            raise ConfigError(
                f"resume is {resume!r}",
                why="it says which checkpoint to go on from",
                fix='resume="auto", or resume= the path of one checkpoint',
            )
        folders = [os.path.realpath(checkpoint.folder) for checkpoint in self._checkpoints]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ConfigError(
                    f"two Checkpoints in the list save into {folder}",
                    why="each would take the other's checkpoints for its own",
                    fix="a folder for each",
                )
        if resume == "auto" and len(self._checkpoints) != 1:
            raise ConfigError(
                f'resume="auto" with {len(self._checkpoints)} Checkpoints in the list',
                why="it takes the newest checkpoint from the folder of the only one",
                fix='callbacks=[Checkpoint("runs/line/checkpoints")], or resume= the path of one checkpoint',
            )

    def goes_on(self, resume: str | os.PathLike[str] | None) -> bool:
        """Whether a fit with this ``resume``, in a process that has not trained, goes on from a checkpoint."""
        return resume is not None and (resume != "auto" or bool(list_checkpoints(self._checkpoints[0].folder)))

    def __enter__(self) -> Self:
        try:
            for checkpoint in self._checkpoints:
                self._savers.append(Saver(checkpoint.folder, checkpoint.keep))  # one by one: each holds a lock
            self.signals.__enter__()
            self._run.data.asked = lambda: self.asked
            self._at_work = True
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.signals.__exit__(kind, error, trace)
        self._at_work = False
        self._close()
        self._run.data.attend(None, None)  # nothing holds the data after the call
        self._run.data.asked = lambda: False
        if self.signals.asked is None:
            return
        self.signals.said()
        if error is None:  # after the last batch, so that all is saved already
            self._leave()

    def _close(self) -> None:
        for saver in self._savers:
            saver.close()
        self._savers.clear()

    def begin(self, resume: str | os.PathLike[str] | None, train: object, val: object) -> bool:
        """Begin a fresh run, go on with the one in this process, or restore one from its checkpoint.

        Returns:
            Whether one was restored.

        Raises:
            CheckpointError: There are checkpoints and none can be used, or the one named cannot.
        """
        fresh = self._run.state.progress.fresh
        path: Path | None = None
        refused: dict[Path, str] = {}
        if resume == "auto":
            if fresh:
                path, contents, refused = _newest(self._checkpoints[0].folder)
        elif resume is not None:
            path = located(resume).absolute()
            contents = _named(resume, path)
            path = self._listed(path)
        self._run.data.attend(train, val)
        self._workers = bool(getattr(train, "num_workers", 0) or getattr(val, "num_workers", 0))
        if path is not None:
            self._restore(path, contents, refused, train, val)
        for checkpoint, saver in zip(self._checkpoints, self._savers, strict=True):
            found = list_checkpoints(checkpoint.folder)
            if fresh and path is None:
                kept = []  # a fresh run: whatever is there is another's
            elif path in found:
                kept = [other for other in found[: found.index(path) + 1] if self._is_of_this_run(other)]
            else:
                kept = [other for other in found if self._is_of_this_run(other)]
            saver.begin(kept, checkpoint.monitor, checkpoint.mode)
        return path is not None

    def _is_of_this_run(self, path: Path) -> bool:
        """Whether the run that goes on from here has saved it before; later ones are of a way not taken."""
        try:
            facts = read_manifest(path)["facts"]
        except CheckpointError:
            return False
        step = facts.get("step")
        return facts.get("run") == self._run.name and type(step) is int and step <= self._run.state.progress.step

    def _listed(self, path: Path) -> Path:
        """The path as it is listed in a folder of ours, whatever links and detours it was given by."""
        listed = (own for checkpoint in self._checkpoints for own in list_checkpoints(checkpoint.folder))
        return next((own for own in listed if own.samefile(path)), path)

    def _restore(self, path: Path, contents: Contents, refused: Mapping[Path, str], train: object, val: object) -> None:
        run = self._run
        scheduler = None if run.schedule is None else run.schedule.lr_scheduler
        given = settings_of(run.state.optimizer, scheduler)
        run.load_state_dict(contents.weights, contents.state, train, val)
        RandomState.from_state_dict(contents.state["random"]).restore(run.data.generators())
        for checkpoint, saver in zip(self._checkpoints, self._savers, strict=True):
            if path in list_checkpoints(checkpoint.folder):
                saver.place = self._place()
        there, here = contents.state["callbacks"].keys(), run.callbacks.keys()
        progress = run.state.progress
        sentences = [
            f"resumed from {path}: epoch {progress.epoch + 1} after {progress.batch} batches, step {progress.step}",
            "restored are the model, the optimizer, "
            + ("the schedule, " if run.schedule is not None else "")
            + "the random generators, the place in the data, the metrics and the history, and the callbacks "
            + (", ".join(sorted(there & here)) or "(none)"),
        ]
        if here - there:
            sentences.append(f"not in the checkpoint, and so as new: {_shown(', '.join(sorted(here - there)))}")
        if there - here:
            gone = _shown(", ".join(sorted(there - here)))
            sentences.append(f"in the checkpoint, but not in the list of callbacks: {gone}")
        taken = settings_of(run.state.optimizer, scheduler)
        if changed := [name for name in given if name in taken and not _equal(given[name], taken[name])]:
            named = [f"{name} {_shown(taken[name])} (given: {_shown(given[name])})" for name in changed[:8]]
            sentences.append(
                f"settings that are the checkpoint's, and not those given: {', '.join(named)}"
                + (", ..." if changed[8:] else "")
            )
        for name, loader in (("", train), ("in the validation data, ", val)):
            if loader is not None and (why := EpochData.inexact(loader)):
                sentences.append(f"perhaps not exact: {name}{why}")
        if (run.scaler is None) != (contents.state["scaler"] is None):
            sentences.append(
                "the precision is another: the gradient scaler is " + ("gone" if run.scaler is None else "new")
            )
        before, length = contents.state["data"]["batches"], length_of(train)
        if before != length:
            sentences.append(f"not exact: the training data had {_batches(before)}, and now has {_batches(length)}")
        cuda = len(contents.state["random"]["torch_cuda"])
        if cuda > (devices := torch.cuda.device_count()):
            sentences.append(f"not exact: it was saved with {cuda} CUDA devices, and here there are {devices}")
        if refused:
            sentences.append("refused were " + ", ".join(f"{other.name} ({why})" for other, why in refused.items()))
        if (saved_by := contents.facts.get("torch")) != torch.__version__:
            sentences.append(
                f"it was saved with torch {_shown(saved_by)}, and this is {torch.__version__}: bits may differ"
            )
        logger.info("%s", "; ".join(sentences))

    def rehearse(self) -> None:
        """Find before the first step what could not be saved after it.

        Raises:
            CheckpointError: Something cannot, naming its path.
        """
        if self._savers:
            self._run.rehearse()

    def at_step(self) -> None:
        """Obey, if there is something to, and save where this optimizer step is due."""
        if self.signals.asked is not None:
            self.obey()
        for saver in self._savers:
            saver.check()
        if self._has_room and not self._by_steps:
            return
        for checkpoint, saver in zip(self._checkpoints, self._savers, strict=True):
            if checkpoint.every.due_at_step(self._run.state.progress):
                self._save(checkpoint, saver)
            elif not saver.has_room:  # the first step is made, so that the optimizer has its state by now
                saver.make_room(self._run.weights(), self._optimizer_tensors)
        self._has_room = True

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return encode({"optimizer": plain_state(self._run.state.optimizer.state_dict())})[1]

    def at_epoch(self) -> None:
        """Save where this epoch is due."""
        for checkpoint, saver in zip(self._checkpoints, self._savers, strict=True):
            if checkpoint.every.due_at_epoch(self._run.state.progress.epoch):
                self._save(checkpoint, saver)

    def at_end(self) -> None:
        """Save what has changed since the last time; return when all of it is durable."""
        for checkpoint, saver in zip(self._checkpoints, self._savers, strict=True):
            if saver.place != self._place():
                self._save(checkpoint, saver)
            saver.wait()

    def settle(self) -> None:
        """Return when no save is on its way any more; as another error is, a failed one goes into the log."""
        for saver in self._savers:
            try:
                saver.wait()
            except CheckpointError as error:
                logger.error("%s", error)

    @property
    def asked(self) -> bool:
        """Whether a signal has asked for the run to save itself and end."""
        return self.signals.asked is not None

    def until_asked(self, batches: Iterable[T]) -> Iterable[T]:
        """The batches; their loader's failure is their end where a signal has asked for a stop.

        A signal to the whole process group reaches the loader's workers, too, and they do not survive it. Nor does a
        pass over batches that are done go on to its end.
        """
        watched = self._savers or self._workers or self._run.state.progress.batch
        return self._until_asked(batches) if self._at_work and watched else batches

    def _until_asked(self, batches: Iterable[T]) -> Iterator[T]:
        watched = False
        try:
            for batch in batches:
                if not watched:
                    self.signals.watch_workers()
                    watched = True
                yield batch
        except Exception:
            if not self.signals.soon():
                raise
            self._cut = True

    def heed_cut(self) -> None:
        """Obey, if the batches have ended because of a signal and not because there are no more."""
        if self._cut:
            self._run.data.undo(self._run.state.progress.batch)
            self.obey()

    def heed(self) -> None:
        """Obey, if there is something to."""
        if self.asked:
            self.obey()

    def obey(self) -> NoReturn:
        """Save, and end as the signal has asked."""
        self.obeyed = True
        self._guard.look(self._run.state)
        self.at_end()
        self._leave()

    def _leave(self) -> NoReturn:
        self.signals.said()
        if not self._checkpoints:
            progress = self._run.state.progress
            logger.info(
                "interrupted in epoch %d after %d batches, step %d; fit, called again, goes on from there",
                progress.epoch + 1,
                progress.batch,
                progress.step,
            )
            raise self.signals.ending or KeyboardInterrupt
        saved = [path for checkpoint in self._checkpoints if (path := latest_checkpoint(checkpoint.folder)) is not None]
        logger.warning(
            '%s: the run is saved in %s; the same call with resume="auto", or that path, goes on from there',
            "SIGTERM" if self.signals.asked is signal.SIGTERM else "interrupted",
            " and ".join(map(str, saved)),
        )
        if self.signals.ending is not None:
            raise self.signals.ending
        if self.signals.asked is signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _save(self, checkpoint: Checkpoint, saver: Saver) -> None:
        run, progress = self._run, self._run.state.progress
        self._guard.look(run.state)
        self._guard.parameters(run.state.model)
        tree, tensors = encode(run.state_dict())
        facts: dict[str, Any] = {
            "run": run.name,
            "step": progress.step,
            "epoch": progress.epoch,
            "batch": progress.batch,
            "samples": progress.samples,
            "monitor": checkpoint.monitor,
            "mode": checkpoint.mode,
            "score": checkpoint.score(progress.step) if self._checked else None,
            "checked": self._checked,
            "torch": str(torch.__version__),
        }
        saver.save(Snapshot(facts, run.weights(), tree, tensors))
        saver.place = self._place()

    def _place(self) -> tuple[object, ...]:
        progress = self._run.state.progress
        return progress.epoch, progress.batch, progress.step, progress.skipped, self._run.epoch_over


def _shown(text: object) -> str:
    """Text out of a checkpoint, fit for a log."""
    return "".join(char if char.isprintable() else "?" for char in str(text)[:200])


def _equal(one: object, other: object) -> bool:
    return one == other or (one != one and other != other)  # NaN


def _batches(length: int | None) -> str:
    return "no length" if length is None else f"{length} batches"


def _named(resume: str | os.PathLike[str], path: Path) -> Contents:
    """What the checkpoint holds that somebody has asked for by its path: that one, or an error."""
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        if _holds_checkpoints(path):
            advise(error, f'resume="auto", or resume=latest_checkpoint({str(path)!r})', instead=True)
        elif within := _folders_within(path):
            advise(error, f"resume=latest_checkpoint({str(within[0])!r}), the newest in there", instead=True)
        elif path.is_dir():
            which = f"python -m loopwright inspect {path.parent} says which are whole"
            advise(error, f'{which}; resume="auto" takes the newest of them')
        elif _BEST.search(path.name) and not os.path.lexists(path):
            advise(error, "resume=best_checkpoint(folder), the path of the best one", instead=True)
        elif not os.path.lexists(path) and not os.path.dirname(resume):
            advise(error, 'did you mean resume="auto"? else the path of one checkpoint', instead=True)
        raise


def _holds_checkpoints(folder: Path) -> bool:
    try:
        return bool(list_checkpoints(folder))
    except OSError:  # no folder, a link to itself: what is wrong with it has been said
        return False


def _folders_within(path: Path) -> list[Path]:
    """The folders of checkpoints in one that is none itself, as where a run's folder is given."""
    try:
        inside = list(islice(path.iterdir(), _MOST_LOOKED_INTO))
    except OSError:  # as above
        return []
    return sorted(filter(_holds_checkpoints, inside))


def _newest(folder: Path) -> tuple[Path | None, Contents, dict[Path, str]]:
    """The newest checkpoint that is whole, what it holds, and the newer ones that were refused, with the reasons."""
    refused = {path: f"{path} is a link, and none is read through one" for path in linked_checkpoints(folder)}
    for words in refused.values():
        logger.warning("checkpoint refused: %s", words)
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_checkpoint(path), refused
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
            refused[path] = error.what
    if refused:
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints in {folder} can be used",
            why="; ".join(refused.values())[:500],
            fix="restore one from a backup, or start afresh with resume=None, which sets them aside; "
            "what a link leads to can be moved back, or given by its own path as resume=",
        )
    return None, Contents({}, {}, {}), refused
