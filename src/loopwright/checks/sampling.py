"""A few batches of some data, taken so that the data does not notice, and what its loader tells without fetching."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from loopwright.batches import keeps_place
from loopwright.data import Loader
from loopwright.device import map_tensors
from loopwright.fetching import fetched
from loopwright.sizes import batch_size
from loopwright.step import describe

_CONTAINERS = (list, tuple, dict, set, collections.deque, collections.OrderedDict)
_LOOKED_INTO = 64  # a longer list is one of samples, and not of datasets
_STORES = {"builtins", "functools", "numpy", "pandas", "polars", "pyarrow", "datasets", "h5py", "scipy"}  # of samples


class _CannotLookError(Exception):
    """Data that would be used up, or changed, by looking at it."""


@dataclass(frozen=True)
class Sample:
    """The first batches that some data would give, or why there are none.

    Attributes:
        batches: The batches; whoever uses one takes a ``copied_batch``.
        why_none: Why the data was not asked for any.
        error: What the data raised in place of a batch.
    """

    batches: tuple[Any, ...] = ()
    why_none: str = ""
    error: Exception | None = None


def sample_of(data: Iterable[Any], count: int) -> Sample:
    """The first ``count`` batches of the data, of which every state and generator stays as it is.

    The batches come from a copy of the loader and of whatever keeps a place or draws at random in it; samples, and
    workers' way to fetch them, are shared. torch's, numpy's and python's global generators are the caller's to put
    back. An iterator, and a loader with ``state_dict`` of another kind than loopwright's, are not asked.
    """
    try:
        if keeps_place(data) and not isinstance(data, Loader):
            raise _CannotLookError(f"a {type(data).__name__} keeps a state of its own, which looking would move on")
        twin = _twin(data, {})
    except _CannotLookError as error:
        return Sample(why_none=str(error))
    try:
        batches = tuple(islice(fetched(twin), count))
    except Exception as error:
        return Sample(error=error)
    return Sample(batches)


def copied_batch(batch: Any) -> Any:
    """The batch with every tensor of its own, so that a step may change it in place."""
    return map_tensors(torch.clone, batch)


def _twin(value: Any, known: dict[int, Any]) -> Any:
    """A copy of what keeps a place or a randomness; samples, tensors and models are shared."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Generator):
        twin: Any = value.clone_state()
    elif isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random"):
        twin = copy.deepcopy(value)
    elif isinstance(value, Iterator):
        raise _CannotLookError(f"an iterator ({type(value).__name__}) can be read only once")
    elif type(value) in _CONTAINERS:
        twin = _container(value, known)
    elif _has_state(value):
        try:
            twin = copy.copy(value)
        except Exception as error:
            raise _CannotLookError(f"a {type(value).__name__} cannot be copied: {error}") from error
        known[id(value)] = twin
        for name, attribute in vars(value).items():
            vars(twin)[name] = None if _is_running(value, name) else _twin(attribute, known)
    else:
        return value
    known[id(value)] = twin
    return twin


def _container(value: Any, known: dict[int, Any]) -> Any:
    if type(value) is tuple:
        return tuple(_twin(item, known) for item in value) if len(value) <= _LOOKED_INTO else value
    twin = copy.copy(value)
    if len(value) <= _LOOKED_INTO and not isinstance(value, set):
        places: Iterable[Any] = value.keys() if isinstance(value, dict) else range(len(value))
        for place in places:
            twin[place] = _twin(value[place], known)
    return twin


def _has_state(value: Any) -> bool:
    if isinstance(value, (type, Tensor, nn.Module)) or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, (Dataset, Sampler, DataLoader)):
        return True
    kind = type(value)  # a loader or a transform of one's own; not a function, which has a __dict__ as well
    named = kind.__module__.partition(".")[0]
    return named not in _STORES and (hasattr(kind, "__iter__") or "__call__" in vars(kind))


def _is_running(owner: Any, name: str) -> bool:
    return isinstance(owner, DataLoader) and name == "_iterator"  # persistent workers


def sizes_of(data: object) -> set[int] | None:
    """The sizes that the data's batches have, known without fetching one, or None."""
    if isinstance(data, Loader):
        return _cut(len(data.dataset), data.batch_size, data.drop_last)
    if isinstance(data, (list, tuple)):
        found = {batch_size(batch) for batch in data}
        return None if None in found else {size for size in found if size is not None}
    sampler = getattr(data, "batch_sampler", None)
    if (
        not isinstance(data, DataLoader)
        or type(sampler) is not BatchSampler
        or isinstance(data.dataset, IterableDataset)
    ):
        return None
    try:
        samples = len(sampler.sampler)  # type: ignore[arg-type]  # asking is the test
    except (TypeError, NotImplementedError):
        return None
    return _cut(samples, sampler.batch_size, sampler.drop_last)


def _cut(samples: int, size: int, drop_last: bool) -> set[int]:
    full, rest = divmod(samples, size)
    return ({size} if full else set()) | ({rest} if rest and not drop_last else set())


def is_shuffled(data: object) -> bool:
    """Whether the first batches are known to be drawn from all of the data."""
    if isinstance(data, Loader):
        return data.shuffle
    return isinstance(data, DataLoader) and type(data.sampler) in (RandomSampler, SubsetRandomSampler)


def all_tensors(data: object) -> tuple[Tensor, ...] | None:
    """The tensors that a loader in the plain order, or shuffled, gives whole; None where that is not certain."""
    dataset = getattr(data, "dataset", None)
    whole = isinstance(data, Loader) or (
        isinstance(data, DataLoader) and type(data.sampler) in (RandomSampler, SequentialSampler)
    )
    return dataset.tensors if whole and type(dataset) is TensorDataset else None


def in_order(data: object) -> bool:
    """Whether the loader gives the samples in the dataset's own order."""
    if isinstance(data, Loader):
        return not data.shuffle
    return isinstance(data, DataLoader) and type(data.sampler) is SequentialSampler


def shared_samples(one: object, other: object) -> tuple[int | None, str]:
    """How many samples two loaders are certain to have in common, and in what words; None where it cannot be known."""
    if one is other:
        return 1, "training and validation data are one and the same object"
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        same = len({id(batch) for batch in one} & {id(batch) for batch in other})
        return same, f"{same} batches are in both lists" if same else "no batch is in both lists"
    rows, others = _rows(one), _rows(other)
    if rows is None or others is None:
        return None, "which samples the loaders give cannot be told from outside"
    if rows[0] is others[0]:
        same = len(rows[1] & others[1])
        return same, f"{same} of {len(rows[1] | others[1])} samples of one dataset are in both"
    first, second = (getattr(dataset, "tensors", (None,))[0] for dataset in (rows[0], others[0]))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None, "they are two datasets, and what they read cannot be told from outside"
    same = len(_addresses(first, rows[1]) & _addresses(second, others[1]))
    if not same:
        return 0, "no sample lies in the same place in memory; copies are not looked for"
    return same, f"{same} samples lie in the same place in memory"


def _rows(data: object) -> tuple[object, set[int]] | None:
    """The dataset at the bottom, and the indices of its samples that the loader can give."""
    if isinstance(data, Loader):
        dataset: Any = data.dataset
        indices: set[int] = set(range(len(dataset)))
    elif isinstance(data, DataLoader) and type(data.batch_sampler) is BatchSampler:
        dataset, sampler = data.dataset, data.sampler
        if type(sampler) is SubsetRandomSampler:
            indices = {int(index) for index in sampler.indices}
        elif type(sampler) in (RandomSampler, SequentialSampler):
            indices = set(range(len(dataset)))
        else:
            return None
    else:
        return None
    while type(dataset) is Subset:
        indices = {int(dataset.indices[index]) for index in indices}
        dataset = dataset.dataset
    return dataset, indices


def _addresses(tensor: Tensor, rows: set[int]) -> set[int]:
    if not tensor.ndim or not tensor.numel() or tensor.layout != torch.strided or tensor.stride(0) == 0:
        return set()
    start, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    return {start + step * row for row in rows}


def structure(value: Any, path: str = "batch") -> dict[str, str]:
    """What is where in a batch: the types of tensors and the number of their dimensions, not their sizes."""
    if isinstance(value, Tensor):
        return {path: f"{value.ndim} dimensions of {str(value.dtype).removeprefix('torch.')}"}
    if isinstance(value, dict):
        return {key: kind for name, item in value.items() for key, kind in structure(item, f"{path}[{name!r}]").items()}
    if type(value) in (list, tuple):
        items = enumerate(value)
        return {key: kind for number, item in items for key, kind in structure(item, f"{path}[{number}]").items()}
    return {path: describe(value)}
