"""What a fit is asked for: its data, looked at before the first pass, and its targets, as a plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, GeneratorType

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from loopwright.errors import ConfigError, DataError
from loopwright.schedule import Every, check_count, check_every
from loopwright.state import Plan, Progress
from loopwright.step import describe

_ENDLESS = (itertools.cycle, itertools.count, itertools.repeat)


def check_loader(name: str, data: object) -> None:
    """Raise ConfigError unless ``data`` is something whose items are batches."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ConfigError(
            f"{name} is a dataset, {type(data).__name__}, and not a loader",
            why="its items are single samples, not batches",
            fix=f"DataLoader({name}, batch_size=32{', shuffle=True' if name == 'train' else ''})",
        )
    shape = getattr(data, "shape", None)
    if hasattr(data, "__array_interface__") and isinstance(shape, tuple):  # numpy's
        raise ConfigError(
            f"{name} is an array of shape {shape}",
            why="it must be a loader: an iterable of batches, and they hold tensors",
            fix="DataLoader(TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets)), batch_size=32)",
        )
    if isinstance(data, (Tensor, str, bytes, Mapping, type)) or not (
        hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise ConfigError(
            f"{name} is {describe(data)}",
            why="it must be a loader: an iterable of batches",
            fix=f"epochs={data}, if that is how long to train"
            if isinstance(data, int) and name != "data"
            else f"{data.__name__}(...), an instance of it"
            if isinstance(data, type)
            else f"{data.__name__}(), if that makes a DataLoader or a list; else an object whose __iter__ calls it"
            if isinstance(data, FunctionType) and data.__name__ != "<lambda>"
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
            why=f"it is an iterator ({type(data).__name__}), which can be read once, and is at its end",
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
        fix=("a smaller batch_size, or drop_last=False" if too_few else "check the dataset and how it is filtered")
        + ("; fit(train, ...) trains without a validation" if name == "the validation data" else ""),
    )


def plan_fit(
    train: object,
    val: object,
    epochs: int | None,
    steps: int | None,
    validate: Every,
    *,
    accumulate: int,
    clip_norm: float | None = None,
    preflight: bool = False,
    progress: Progress | None = None,
    measures: Iterable[str] = (),
    skips: bool = False,
) -> Plan:
    """The plan of a fit, from its arguments, and from how far the run has come, where that is known before it begins.

    Raises:
        ConfigError: There is no target, or the data is no loader.
        DataError: The data is empty, and says so, or can be read once and is needed again.
    """
    if not isinstance(preflight, bool):
        raise ConfigError(
            f"preflight is {preflight!r}", why="it must be True or False", fix="preflight=True, to look before training"
        )
    for name, target in (("epochs", epochs), ("steps", steps)):
        if target is not None:
            check_count(name, target)
    check_every("validate", validate, "validate=Every(steps=100), or Every(epochs=1)")
    check_loader("train", train)
    if val is not None:
        check_loader("val", val)
    if epochs is None and steps is None:
        raise ConfigError(
            "fit has no target",
            why="nothing says how long to train",
            fix="fit(train, epochs=10), or steps=1000",
        )
    batches, val_batches = length_of(train), None if val is None else length_of(val)
    if batches == 0:
        raise no_batches("the training data", train)
    if val_batches == 0:
        raise no_batches("the validation data", val)
    cadence = None if val is None else validate
    plan = Plan(epochs, steps, batches, val_batches, cadence, accumulate, clip_norm, tuple(measures))
    if progress is not None and (isinstance(train, Iterator) or isinstance(val, Iterator)):
        check_passes(plan, progress, train, val, skips=skips)
    return plan


def unused_cadence(validate: Every) -> str:
    """The warning of a cadence of validations that was asked for, and that there is no data for.

    It is no error: a script whose validation data can be left out is to run without it too. What follows a value of
    the validation is refused by whoever follows it.
    """
    return (
        f"validate={validate} has no effect: fit was given no validation data, so that nothing is validated; "
        "give it, as trainer.fit(train, val, ...), or leave validate out"
    )


def read_once(data: object) -> bool:
    """Whether data is certain to be at its end after one pass: an iterator of Python's own, or of a DataLoader's.

    An iterator of a class of the user's may begin anew, and a generator runs code of the user's, which may never end.
    """
    if isinstance(data, GeneratorType):
        return False
    pythons = type(data).__module__ in ("builtins", "itertools") and not isinstance(data, _ENDLESS)
    return isinstance(data, Iterator) and (pythons or isinstance(data, _BaseDataLoaderIter))


def check_passes(plan: Plan, progress: Progress, train: object, val: object, *, skips: bool) -> None:
    """Raise DataError where data that can be read once is certain to be needed again by the plan.

    What the plan itself brings to its end is never refused: one epoch, steps that one pass may hold, one validation. A
    callback might stop a longer run within the first pass; all the same it is refused, for nearly always the second
    epoch is meant, and would fail at the cost of the first. Whoever means the one pass asks for one: the message says
    how, and a callback stops that as well.

    Args:
        plan: What fit is asked for.
        progress: How far the run has come.
        train: The training data.
        val: The validation data.
        skips: Whether the run may skip optimizer steps, which then do not count.
    """
    if read_once(train) and (needed := _passes(plan, progress)) > 1:
        raise _needed_again("training", train, needed, f"epochs={progress.epoch + 1}, for this one pass alone")
    if read_once(val) and (needed := _validations(plan, progress, skips=skips)) > 1:
        epoch, step = plan.end(progress)
        last = Every(epochs=int(epoch)) if progress.epoch < epoch < math.inf else Every(steps=int(step))
        raise _needed_again("validation", val, needed, f"validate={last}, for one validation at the end")


def _needed_again(name: str, data: object, needed: int, once: str) -> DataError:
    return DataError(
        f"the {name} data can be read once, and is needed {needed} times",
        why=f"it is an iterator ({type(data).__name__}), and at its end after one pass",
        fix=f"pass a list, a DataLoader, or an object whose __iter__ starts anew; or {once}",
    )


def _passes(plan: Plan, progress: Progress) -> int:
    """How many passes over the training data there will be at least, unless a callback stops the run."""
    if plan.batches is not None:  # the first pass may hold as many, in the midst of an epoch too
        return math.ceil((plan.end(progress)[1] - progress.step) / math.ceil(plan.batches / plan.accumulate))
    return 1 if plan.epochs is None or plan.steps is not None else plan.epochs - progress.epoch


def _validations(plan: Plan, progress: Progress, *, skips: bool) -> int:
    """How many validations there will be at least, unless a callback stops the run."""
    every = plan.validate
    if every is None or (plan.batches is None and plan.epochs is not None and plan.steps is not None):
        return 0  # of the latter, nobody can tell which target is reached first
    epoch, step = plan.end(progress)
    done, last, each = progress.epoch, epoch, every.epochs
    if every.steps is not None:
        if skips and plan.epochs is not None:
            return 0  # the epochs may hold fewer steps than they have batches for
        done, last, each = progress.step, step, every.steps
    assert each is not None  # a cadence has one of the two
    return int(last // each) - done // each if last < math.inf else 0
