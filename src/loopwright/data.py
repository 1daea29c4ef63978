"""What the loop asks of the data: that it can be iterated over, its length, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from loopwright.errors import ConfigError, DataError
from loopwright.randomness import RandomState, generators_of
from loopwright.schedule import Every, check_count
from loopwright.state import Plan
from loopwright.step import describe

T = TypeVar("T")


def check_loader(name: str, data: object) -> None:
    """Raise ConfigError unless ``data`` is something whose items are batches."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ConfigError(
            f"{name} is a dataset, {type(data).__name__}, and not a loader",
            why="its items are single samples, not batches",
            fix=f"DataLoader({name}, batch_size=32{', shuffle=True' if name == 'train' else ''})",
        )
    if isinstance(data, (Tensor, str, bytes, Mapping, type)) or not (
        hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise ConfigError(
            f"{name} is {describe(data)}",
            why="it must be a loader: an iterable of batches",
            fix=f"epochs={data}, if that is how long to train"
            if isinstance(data, int) and name != "data"
            else "DataLoader(TensorDataset(inputs, targets), batch_size=32), or a list of batches",
        )


def length_of(data: object) -> int | None:
    """The number of batches in one pass, or None where the data does not tell."""
    try:
        return len(data)  # type: ignore[arg-type]  # asking is the test
    except (TypeError, NotImplementedError):
        return None


def no_batches(name: str, data: object) -> DataError:
    """The error for data that gave no batch, with what explains it."""
    if isinstance(data, Iterator):
        return DataError(
            f"{name} gave no batch",
            why=f"it is an iterator ({type(data).__name__}), which can be read once, and has been read to its end",
            fix="pass a list, a DataLoader, or an object whose __iter__ starts anew",
        )
    dataset = getattr(data, "dataset", None)
    sampler = getattr(data, "batch_sampler", None)  # given by hand, it alone knows
    owner = data if getattr(data, "batch_size", None) is not None or sampler is None else sampler
    batch_size, drop_last = getattr(owner, "batch_size", None), getattr(owner, "drop_last", None)
    facts = {"dataset size": length_of(dataset), "batch size": batch_size, "drop_last": drop_last}
    listed = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    too_few = bool(drop_last) and bool(length_of(dataset))
    return DataError(
        f"{name} gave no batch" + (f": {listed}" if listed else f": it is {describe(data)}"),
        why="drop_last=True drops a batch that is not full, and there is no full one" if too_few else "it is empty",
        fix="a smaller batch_size, or drop_last=False" if too_few else "check the dataset and how it is filtered",
    )


def plan_fit(
    train: object, val: object, epochs: int | None, steps: int | None, validate: Every, *, accumulate: int
) -> Plan:
    """The plan of a fit, from its arguments.

    Raises:
        ConfigError: There is no target, or the data is no loader.
        DataError: The data is empty, and says so.
    """
    for name, target in (("epochs", epochs), ("steps", steps)):
        if target is not None:
            check_count(name, target)
    if not isinstance(validate, Every):
        raise ConfigError(
            f"validate is {validate!r}",
            why="whether it counts steps or epochs has to be said",
            fix="validate=Every(steps=100), or Every(epochs=1)",
        )
    check_loader("train", train)
    if val is not None:
        check_loader("val", val)
    if epochs is None and steps is None:
        raise ConfigError(
            "fit has no target",
            why="nothing says how long to train",
            fix="fit(train, epochs=10), or steps=1000",
        )
    if length_of(train) == 0:
        raise no_batches("the training data", train)
    if val is None:
        return Plan(epochs, steps, length_of(train), accumulate=accumulate)
    if length_of(val) == 0:
        raise no_batches("the validation data", val)
    return Plan(epochs, steps, length_of(train), length_of(val), validate, accumulate)


class EpochData:
    """One run's place in its training data: an epoch that was left can be gone on with, exactly.

    The sample order is the loader's own. To find it again, the random generators are put back to where they
    were when the epoch began, the loader is iterated anew, and the batches that are done are passed over;
    then the generators return to where they are now.
    """

    def __init__(self) -> None:
        self._at_start: RandomState | None = None
        self._workers_kept = False  # whether the epoch began with persistent workers of an earlier one

    def batches(self, loader: Iterable[T], done: int) -> Iterator[T]:
        """The epoch's batches from number ``done`` on. Nothing is fetched ahead."""
        if isinstance(loader, Iterator) and length_of(loader) is None:
            return loader  # a generator and its like: it is where it was left
        own = generators_of(loader)
        if done == 0 or self._at_start is None:
            self._at_start = RandomState.capture(own)
            self._workers_kept = getattr(loader, "_iterator", None) is not None
            return iter(loader)
        now = RandomState.capture(own)
        if isinstance(loader, DataLoader) and loader.persistent_workers and not self._workers_kept:
            loader._iterator = None  # new workers again: the loader draws their seed only when it starts them
        self._at_start.restore(own)
        try:
            batches = _Onward(iter(loader))
            for _ in islice(batches, done):
                continue
        finally:
            now.restore(own)
        return batches


class _Onward(Iterator[T]):
    """An iterator that goes on where it is, whatever asks it to iterate: some loaders are their own, and start anew."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches

    def __next__(self) -> T:
        return next(self._batches)
