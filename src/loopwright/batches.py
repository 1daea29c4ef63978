"""The passes over the data: where each stands, how it goes on after a resume, and what is said where it fails."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TypeGuard, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from loopwright.data import Loader
from loopwright.errors import DataError, note
from loopwright.fetching import (
    STANDARD,
    can_skip,
    drawing,
    fetched,
    fetched_after,
    fetched_whole,
    made_again,
    rows_are_samples,
    samples_of,
    say_how,
    why_not_whole,
)
from loopwright.layout import Layout, layout_of
from loopwright.planning import length_of, read_once
from loopwright.randomness import RandomState, generators_of
from loopwright.unrecorded import batches_of

T = TypeVar("T")

_NONE: Any = object()
_SAMPLES_LISTED = 32
_SAY_EACH = 10.0  # seconds between two lines about a place that takes long to find

logger: logging.Logger = logging.getLogger("loopwright")


class EpochData:
    """One run's place in its training data: an epoch that was left can be gone on with, exactly.

    The sample order is the loader's own. To find it again, the random generators are put back to where they
    were when the epoch began, the loader is iterated anew, and the batches that are done are passed over;
    then the generators return to where they are now. A loader that keeps its own place, with ``state_dict``
    and ``load_state_dict``, is asked for it in place of all that.
    """

    def __init__(self) -> None:
        self._loader: object = None
        self._val: object = None
        self._at_start: RandomState | None = None
        self._epoch: int | None = None  # the number of the epoch that was begun last in this process
        self._places: dict[int, dict[str, Any]] = {}  # of a loader that keeps its own: by the batches given before
        self._elsewhere = False  # whether they were taken in another process, and the loader does not know of them yet
        self._begun = False  # whether a pass over the data has begun in this process
        self.asked: Callable[[], bool] = lambda: False  # whether a signal has asked for a stop
        self.layout: Layout | None = None  # of the first batch that there was
        self._val_place: dict[str, Any] | None = None  # of such a loader of validation data, after its last pass
        self._val_elsewhere = False  # whether it does not know of that yet
        self._workers_kept = False  # whether the epoch began with persistent workers of an earlier one

    def attend(self, loader: object, val: object) -> None:
        """Say which loaders they are, before their first batch: their generators belong to the run from here on."""
        self._loader, self._val = loader, None if val is loader else val
        self._begun = False
        if loader is not None:
            say_how("the training data", loader)
        if val is not None:
            say_how("the validation data", val)

    def batches(self, loader: Iterable[T], epoch: int, done: int) -> Iterator[T]:
        """The batches of epoch number ``epoch`` after the first ``done``. Nothing is fetched ahead."""
        return named(
            lambda: self._after(loader, epoch, done),
            lambda number: _where(f"epoch {epoch + 1}, batch {number + 1} of the training data", self._samples(number)),
            done,
            self._see if self.layout is None else None,
        )

    def samples(self, number: int) -> list[Any] | None:
        """The indices of the samples in the batch with this number that the present pass gave, where they are known.

        Nothing is drawn by that: every generator is what it was.
        """
        loader = self._loader
        if isinstance(loader, Loader):  # after the last batch of a pass it is at the next one
            indices = loader.indices(loader.epoch - (loader.state_dict()["batch"] == 0))
            return indices[number] if number < len(indices) else None
        return self._samples(number)

    def in_rows(self) -> bool:
        """Whether row n of a batch is known to be the nth of its ``samples``."""
        if isinstance(self._loader, Loader):
            return self._loader._collate is default_collate
        return rows_are_samples(self._loader)

    def again(self, number: int) -> Any:
        """That batch once more, where to fetch it asks nothing of the user's code; else None."""
        return made_again(self._loader, self.samples(number), number)

    def _see(self, batch: object) -> None:
        self.layout = layout_of(batch)

    def _samples(self, number: int) -> list[Any] | None:
        return _samples(self._loader, self._at_start, number)

    def _after(self, loader: Iterable[T], epoch: int, done: int) -> Iterator[T]:
        self._loader = loader
        elsewhere, self._elsewhere = self._elsewhere, False
        if done == 0 and epoch != self._epoch:  # else an error has broken it off before its first batch was done
            self._at_start = None
        self._epoch = epoch
        if isinstance(loader, Iterator) and (length_of(loader) is None or read_once(loader)):
            # A generator, an iterator over a DataLoader: in the process that left it, it is where it was left.
            return self._passed_over(loader, done) if elsewhere and done else loader
        self._begun = False
        found = self._found(loader, done, elsewhere)
        self._begun = True
        return found

    def _found(self, loader: Iterable[T], done: int, elsewhere: bool) -> Iterator[T]:
        if isinstance(loader, (list, tuple)):
            return self._pass(iter(loader), done)
        if keeps_place(loader):
            return self._from_place(loader, done, elsewhere)
        own = generators_of(loader)
        if done == 0 or self._at_start is None:
            if self._at_start is not None:
                self._at_start.restore(own)  # the same draws once more
            # Where whole batches are gathered and the sampler is torch's, no other generator is asked.
            whole = isinstance(loader, DataLoader) and why_not_whole(loader) is None
            self._at_start = RandomState.capture(own, torchs_only=whole and type(drawing(loader)) in STANDARD)
            self._workers_kept = getattr(loader, "_iterator", None) is not None
            if done:
                return self._passed_over(iter(loader), done)
            return fetched_whole(loader) if whole else batches_of(iter(loader))
        now = RandomState.capture(own)
        if isinstance(loader, DataLoader) and loader.persistent_workers and not self._workers_kept:
            loader._iterator = None  # new workers again: the loader draws their seed only when it starts them
        self._at_start.restore(own)
        try:
            if can_skip(loader):
                return fetched_after(loader, lambda indices: self._pass(indices, done))
            return self._passed_over(iter(loader), done)
        finally:
            now.restore(own)

    def _from_place(self, loader: _KeepsPlace, done: int, elsewhere: bool) -> Iterator[Any]:
        if done == 0 and not elsewhere:
            batches = iter(loader)
            self._places = {0: loader.state_dict()}
            return batches
        known = max((number for number in self._places if number <= done), default=None)
        if known is None:
            return self._passed_over(iter(loader), done) if done else iter(loader)
        _put_back(loader, self._places[known])
        batches = iter(loader) if known else _or_next_epoch(loader)
        return self._passed_over(batches, done - known) if done > known else batches

    def _passed_over(self, batches: Iterator[T], done: int) -> Iterator[T]:
        """The iterator after ``done`` batches, which are fetched and dropped, with a line that says so now and then."""
        logger.info("going through the %d batches of this epoch that are done, to find the place again", done)
        return _Onward(self._pass(batches, done))

    def _pass(self, batches: Iterator[T], done: int) -> Iterator[T]:
        """The iterator, after that many have been taken from it."""
        said = time.monotonic()
        for number in range(done):
            if self.asked():
                raise InterruptedError("a signal has asked for a stop")
            try:
                batch = next(batches, _NONE)
            except Exception as error:
                note(error, f"it was batch {number + 1} of the {done} that are done, and are gone through once more")
                raise
            if batch is _NONE:
                raise DataError(
                    f"the training data gave {number} batches, and {done} of this epoch are done already",
                    why="it is not the data that the run was left with",
                    fix="go on with the same data, or begin a new run",
                )
            if time.monotonic() >= said + _SAY_EACH:
                said = time.monotonic()
                logger.info("%d of the %d batches that are done have been gone through", number + 1, done)
        return batches

    def undo(self, done: int) -> None:
        """Have an epoch that was given up before its first batch begin again as for the first time."""
        if done == 0 and self._at_start is not None:
            self._at_start.restore(generators_of(self._loader))

    def leave(self, done: int) -> None:
        """Take down the place of a loader that keeps its own, after ``done`` batches of the epoch."""
        if keeps_place(self._loader) and self._begun and not self._elsewhere:
            start = self._places.get(0)
            self._places = {} if start is None else {0: start}
            self._places[done] = self._loader.state_dict()

    def begin_validation(self) -> dict[str, Any] | None:
        """The place of a validation loader that keeps its own, before a pass."""
        val = self._val
        if not keeps_place(val):
            return None
        if self._val_elsewhere and self._val_place is not None:
            _put_back(val, self._val_place)
        self._val_elsewhere = False
        return val.state_dict()

    def end_validation(self) -> None:
        """Take down that place after a pass."""
        if keeps_place(self._val):
            self._val_place = self._val.state_dict()

    def undo_validation(self, place: dict[str, Any] | None) -> None:
        """Have the pass made again from there as for the first time."""
        if keeps_place(self._val) and place is not None:
            if self._val_place is None:
                self._val.load_state_dict(place)  # with the draws of its first pass still to come
            else:
                _put_back(self._val, place)

    @staticmethod
    def inexact(loader: object) -> str | None:
        """Why a place in this loader's data cannot be found again exactly, or None where it can."""
        if keeps_place(loader) or isinstance(loader, (list, tuple)):
            return None
        if not isinstance(loader, DataLoader):
            return f"a {type(loader).__name__} may keep a state that nobody can ask it for"
        if loader.num_workers and loader.persistent_workers:
            return "persistent workers go on with an order and a randomness of their own"
        if isinstance(loader.dataset, IterableDataset) and not loader.num_workers:
            return f"a {type(loader.dataset).__name__} may draw at random between the draws of the training"
        sampler = drawing(loader)
        if type(sampler) not in STANDARD and not isinstance(loader.dataset, IterableDataset):
            return f"the sampler {type(sampler).__name__} may keep a state that nobody can ask it for"
        return None

    def generators(self) -> list[torch.Generator]:
        """The generators of the loaders in use, those of the training data first."""
        found = (*generators_of(self._loader), *generators_of(self._val))
        return list({id(generator): generator for generator in found}.values())

    def state_dict(self, done: int) -> dict[str, Any]:
        """What finds the place after ``done`` batches of the epoch again."""
        self.leave(done)
        at_start = None if self._at_start is None else self._at_start.state_dict()
        return {
            "at_start": at_start,
            "place": self._places.get(done),
            "val_place": self._val_place,
            "batches": length_of(self._loader),
        }

    def load_state_dict(self, state: Mapping[str, Any], done: int) -> None:
        """Take back what ``state_dict`` returned, in another process."""
        at_start = state["at_start"]
        self._at_start = None if at_start is None else RandomState.from_state_dict(at_start)
        self._places = {} if state["place"] is None else {done: state["place"]}
        self._val_place = state["val_place"]
        self._elsewhere = self._val_elsewhere = True
        self._epoch = None  # this process has begun none of its epochs


class Pass:
    """One pass over evaluation data, which can be made again as for the first time where it fails or is given up.

    Args:
        data: The batches.
        run: The run's place in its data, where this is its validation data.

    Attributes:
        start: The random generators as the pass begins.
    """

    def __init__(self, data: object, run: EpochData | None = None) -> None:
        self._own = generators_of(data)
        self.start: RandomState = RandomState.capture(self._own)
        self._run = run
        self._place = None if run is None else run.begin_validation()
        self._undone = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()
        elif self._run is not None and not self._undone:
            self._run.end_validation()

    def undo(self) -> None:
        """Put generators and loader back to where they were."""
        self._undone = True
        if self._run is not None:
            self._run.undo_validation(self._place)
        self.start.restore(self._own)


def named(
    make: Callable[[], Iterable[T]],
    where: Callable[[int], str],
    done: int = 0,
    see: Callable[[T], None] | None = None,
) -> Iterator[T]:
    """The batches; what is raised while one is fetched gets a note that says which.

    The note blames nobody: it may be the loader, or what finds a place in its data again.

    Args:
        make: Gives the batches.
        where: The note's words for the batch with this number, counted from 0.
        done: The number of the first one.
        see: Is shown the first one. What it raises is not of the fetching, and gets no note.
    """
    number, fetched_it = done, False
    try:
        for batch in make():
            if see is not None:
                fetched_it = True
                see(batch)
                see, fetched_it = None, False
            yield batch
            number += 1
    except Exception as error:
        if fetched_it:
            raise
        note(error, where(number))
        if isinstance(error, RuntimeError) and re.match(r"DataLoader (worker|timed out)", str(error)):
            note(
                error,
                "the worker may have been at a later batch; workers that are killed often lack memory or shared "
                "memory (/dev/shm); with num_workers=0 the data is made in this process, where its own error shows",
            )
        raise


def evaluated(data: Iterable[T], name: str, start: RandomState | None) -> Iterator[T]:
    """One pass over data that trains nothing, with ``named``'s notes.

    Args:
        data: The batches.
        name: What they are called in a note.
        start: The random generators as the pass begins, where they are known.
    """
    return named(
        lambda: fetched(data), lambda number: _where(f"batch {number + 1} of the {name}", _samples(data, start, number))
    )


def _samples(data: object, start: RandomState | None, number: int) -> list[Any] | None:
    if isinstance(data, Loader):
        return data.indices(data.epoch)[number] if number < len(data) else None
    return samples_of(data, start, number)


def _where(place: str, samples: list[Any] | None) -> str:
    if samples is None:
        return f"while fetching {place}"
    more = f", ... ({len(samples)} in all)" if len(samples) > _SAMPLES_LISTED else ""
    return f"while fetching {place}; samples {', '.join(map(str, samples[:_SAMPLES_LISTED]))}{more}"


class _KeepsPlace(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...
    def __iter__(self) -> Iterator[Any]: ...


def _put_back(loader: _KeepsPlace, place: dict[str, Any]) -> None:
    """Give a loader its place back; nothing is drawn by that."""
    own = generators_of(loader)
    now = RandomState.capture(own)
    loader.load_state_dict(place)
    loader.state_dict()  # some make their iterator here, and draw for it once more
    now.restore(own)


def keeps_place(loader: object) -> TypeGuard[_KeepsPlace]:
    """Whether a loader knows where it is, as torchdata's and loopwright's own do."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def _or_next_epoch(loader: Iterable[T]) -> Iterator[T]:
    """The rest of the epoch that a loader was left in, or, where nothing is left of it, the next one."""
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        yield from loader


class _Onward(Iterator[T]):
    """An iterator that goes on where it is, whatever asks it to iterate: some loaders are their own, and start anew."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches

    def __next__(self) -> T:
        return next(self._batches)
