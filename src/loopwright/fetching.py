"""The batches of a plain ``DataLoader``, made as it makes them, but by the whole batch where that is the same."""

from __future__ import annotations

import functools
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from loopwright.randomness import RandomState, generators_of
from loopwright.unrecorded import batches_of

T = TypeVar("T")
Skip = Callable[[Iterator[Any]], Iterator[Any]]

FIXED = (SequentialSampler, list, tuple, range)  # the same order each time
STANDARD = (*FIXED, RandomSampler, WeightedRandomSampler, SubsetRandomSampler)  # without a hidden state

_SPLIT = 256  # batches whose indices are cut apart in one go: one by one takes longer, all together more memory

logger: logging.Logger = logging.getLogger("loopwright")


def fetched(data: Iterable[T]) -> Iterator[T]:
    """What ``iter(data)`` gives, and draws: over a plain ``DataLoader`` of tensors, whole batches are gathered at once.

    A ``DataLoader`` fetches sample by sample and stacks them; taking the rows of a batch out of the whole tensor gives
    the same bits in a fraction of the time. The order comes from the loader's own sampler, so nothing else changes:
    neither what is drawn from which generator, nor when.
    """
    return fetched_whole(data) if why_not_whole(data) is None else batches_of(iter(data))


def fetched_whole(loader: Any) -> Iterator[Any]:
    """The same for a loader of which ``why_not_whole`` has nothing to say."""
    return _made(loader, whole=True)


def fetched_after(loader: Any, skip: Skip) -> Iterator[Any]:
    """The batches of a loader that ``can_skip``, of whose batches ``skip`` passes over the first, in indices only."""
    return _made(loader, skip, whole=why_not_whole(loader) is None)


def say_how(name: str, data: object) -> None:
    """One line for those who want to know: which way the batches are fetched, and why."""
    if isinstance(data, DataLoader) and logger.isEnabledFor(logging.DEBUG):
        why = why_not_whole(data)
        logger.debug(
            "%s: %s", name, "whole batches are gathered" if why is None else f"the loader's own batches, {why}"
        )


def why_not_whole(data: object) -> str | None:
    """Why whole batches cannot be gathered, or None where they can."""
    if type(data) is not DataLoader:
        return f"since it is a {type(data).__name__}, and no plain DataLoader"
    if data.num_workers:
        return "since workers fetch them"
    if data.collate_fn is not default_collate:
        return "since it has a collate_fn of its own"
    if data.batch_sampler is None:
        return "since it makes no batches of samples"
    dataset = data.dataset
    while type(dataset) is Subset and "__getitems__" not in vars(dataset):
        if _as_rows(dataset).dtype != torch.int64:
            return "since a Subset's indices are not all whole numbers"
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or "__getitems__" in vars(dataset):
        return f"since its dataset is a {type(dataset).__name__}, and no plain TensorDataset or Subset of one"
    plain = bool(dataset.tensors)
    for tensor in dataset.tensors:
        plain = plain and _is_plain(tensor, dataset.tensors[0].device)
    if not plain:
        return "since its tensors are not all plain ones: contiguous, on one device, without gradient"
    if data.pin_memory and not torch.cuda.is_available():
        return "since it has something to say about pinned memory"
    return None


def _as_rows(subset: Subset[Any]) -> Tensor:
    """The indices of a subset, those that count from the end made to count from the start."""
    indices = torch.as_tensor(subset.indices)
    return torch.where(indices < 0, indices + len(subset.dataset), indices)  # type: ignore[arg-type]  # it has a length


def _is_plain(tensor: Tensor, device: torch.device) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.device == device
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def can_skip(loader: object) -> bool:
    """Whether a place can be found without fetching what comes before: in a plain DataLoader without workers."""
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and loader.batch_sampler is not None
        and not loader.pin_memory
        and not isinstance(loader.dataset, IterableDataset)
    )


def _made(loader: Any, skip: Skip = iter, *, whole: bool) -> Iterator[Any]:
    """The loader's batches, without its iterator; that one's draws are made here and now, as by ``iter(loader)``."""
    sampler = loader.batch_sampler
    indices: Iterator[Any] = _in_tensors(sampler) if whole and _is_one_draw(sampler) else iter(sampler)
    _draw_base_seed(loader)
    indices = skip(indices)
    return _gathered(loader, indices) if whole else _collated(loader, indices)


def _is_one_draw(sampler: Any) -> bool:
    """Whether a batch sampler's indices are all known with the first of them: a permutation, or the plain order."""
    if type(sampler) is not BatchSampler:
        return False
    inner = sampler.sampler
    if type(inner) is RandomSampler:
        return not inner.replacement and inner.num_samples == len(inner.data_source)
    return type(inner) is SequentialSampler


def _in_tensors(batched: Any) -> Iterator[Tensor]:
    """What such a batch sampler gives, each batch as a tensor."""
    size: int = batched.batch_size
    order, draw_once_more = _order_of(batched.sampler)
    cut: Any = order.split  # typed as Any, since torch has no annotation there
    parts = (order,) if len(order) <= size * _SPLIT else cut(size * _SPLIT)
    rest: tuple[Tensor, ...] = ()
    for part in parts:
        batches = part.split(size) if len(part) else ()
        if part is parts[-1] and len(order) % size:
            batches, rest = batches[:-1], batches[-1:]
        yield from batches
    draw_once_more()  # as a sampler does where it is asked for more than it has, and that is now
    if not batched.drop_last:
        yield from rest


def _order_of(sampler: Any) -> tuple[Tensor, Callable[[], object]]:
    """All indices of such a sampler, with its draws, and what it draws where it is asked on."""
    length = len(sampler)
    if type(sampler) is SequentialSampler:
        return torch.arange(length), lambda: None
    if _draws_as_known():
        return _permutation(length, sampler.generator)
    drawn = iter(sampler)
    indices = array("q", islice(drawn, length))
    order = torch.frombuffer(indices, dtype=torch.int64) if indices else torch.empty(0, dtype=torch.int64)
    return order, lambda: next(drawn, None)


def _permutation(length: int, own: torch.Generator | None) -> tuple[Tensor, Callable[[], object]]:
    """What a ``RandomSampler`` draws from its own generator, or from one for this pass that the global one seeds."""
    if own is None:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        return torch.randperm(length, generator=generator), lambda: None
    return torch.randperm(length, generator=own), lambda: torch.randperm(length, generator=own)


@functools.cache
def _draws_as_known() -> bool:
    """Whether this torch's ``RandomSampler`` draws as ``_permutation`` does, in which no index becomes a Python int."""
    ends = []
    with torch.random.fork_rng(devices=[]):
        for seeded in (torch.default_generator, torch.Generator()):
            own = None if seeded is torch.default_generator else seeded
            seeded.manual_seed(2**33 + 1)
            order, draw_once_more = _permutation(11, own)
            draw_once_more()
            ends.append((order.tolist(), seeded.get_state().tolist()))
            seeded.manual_seed(2**33 + 1)
            ends.append((list(RandomSampler(range(11), generator=own)), seeded.get_state().tolist()))
    return ends[0] == ends[1] and ends[2] == ends[3]


def _gathered(loader: Any, batches: Iterator[Any]) -> Iterator[list[Tensor]]:
    dataset, subsets = loader.dataset, []
    while type(dataset) is Subset:
        subsets.append(_as_rows(dataset))
        dataset = dataset.dataset
    length, device = len(loader.dataset), dataset.tensors[0].device
    take = [tensor.index_select for tensor in dataset.tensors]
    for indices in batches:
        if type(indices) is Tensor:
            rows = indices
        elif indices and all(type(index) is int and 0 <= index < length for index in indices):
            rows = torch.tensor(indices, dtype=torch.int64)
        else:  # whatever a sampler of one's own means by it
            yield next(_collated(loader, iter([indices])))
            continue
        for subset in subsets:
            rows = subset.index_select(0, rows)
        if device.type != "cpu":
            rows = rows.to(device)
        batch = [select(0, rows) for select in take]
        yield [tensor.pin_memory() for tensor in batch] if loader.pin_memory else batch


def _collated(loader: Any, batches: Iterator[list[Any]]) -> Iterator[Any]:
    dataset = loader.dataset
    fetch = getattr(dataset, "__getitems__", None)
    for indices in batches:
        yield loader.collate_fn(fetch(indices) if fetch else [dataset[index] for index in indices])


def _draw_base_seed(loader: Any) -> None:
    """What a DataLoader's iterator draws as it is made."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def samples_of(loader: object, start: RandomState | None, number: int) -> list[Any] | None:
    """The indices of the samples in a DataLoader's batch, drawn once more, or None where they cannot be known.

    Args:
        loader: The loader.
        start: The random generators as its pass began. They are what they were when this returns.
        number: The batch's, counted from 0.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    sampler = drawing(loader)
    if type(sampler) not in STANDARD or (start is None and type(sampler) not in FIXED):
        return None
    own = generators_of(loader)
    now = RandomState.capture(own)
    try:
        if start is not None:
            start.restore(own)
        indices = iter(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
        _draw_base_seed(loader)
        for found in islice(indices, number, None):
            return list(found) if isinstance(found, list) else [found]
    finally:
        now.restore(own)
    return None


def made_again(loader: object, samples: list[Any] | None, number: int) -> Any:
    """A batch fetched once more, where that asks nothing of the user's code and draws nothing; else None.

    Args:
        loader: The loader.
        samples: The indices of its samples.
        number: The batch's, counted from 0.
    """
    if type(loader) in (list, tuple):
        return loader[number] if number < len(loader) else None  # type: ignore[index, arg-type]  # it is one of these
    if samples is None or why_not_whole(loader) is not None:
        return None
    return next(_gathered(loader, iter([samples])), None)


def rows_are_samples(loader: object) -> bool:
    """Whether row n of a batch is known to be its nth sample, since none but torch's code puts the samples in a row.

    A ``collate_fn`` may sort them, as packed sequences used to need, or drop some; a dataset's ``__getitems__`` may
    give them in the order of a file or a table.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    if loader.batch_sampler is None or loader.collate_fn is not default_collate:
        return False
    dataset: Any = loader.dataset
    while type(dataset) is Subset and "__getitems__" not in vars(dataset):
        dataset = dataset.dataset
    return not hasattr(dataset, "__getitems__")


def drawing(loader: Any) -> Any:
    """What draws a loader's indices: its sampler, that of a plain batch sampler, or a batch sampler of another kind."""
    batched = loader.batch_sampler
    if batched is None:
        return loader.sampler
    return batched.sampler if type(batched) is BatchSampler else batched
