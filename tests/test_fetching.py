"""P2, C20: whole batches are the very batches of the loader, with its very draws; whatever is unusual is left to it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from helpers import line_trainer, some_batches
from loopwright.fetching import fetched, why_not_whole

Loader = DataLoader[Any]


def data(n: int = 23) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(
        torch.randn(n, 3, 2, generator=generator),
        torch.arange(n),
        torch.rand(n, generator=generator) < 0.5,
        torch.randn(n, 1, generator=generator, dtype=torch.float64),
        torch.randn(n, generator=generator, dtype=torch.complex64),
    )


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Lazy(Sampler[int]):
    """Draws from every global generator, index by index; some indices are negative."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(19):
            yield int(torch.randint(23, ())) - random.randrange(2) * 23 + 0 * int(np.random.randint(3))


class Eager(Sampler[int]):
    """Draws as soon as it is asked to iterate."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(23)[:17].tolist())

    def __len__(self) -> int:
        return 17


class Uneven(Sampler[list[int]]):
    """Batches of sizes drawn at random, drawn as soon as it is asked to iterate."""

    def __iter__(self) -> Iterator[list[int]]:
        sizes = torch.randint(1, 6, (5,)).tolist()
        return iter([torch.randint(23, (size,)).tolist() for size in sizes])


def kinds(batch_size: int, *, drop_last: bool) -> dict[str, Callable[[], Loader]]:
    how: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last}

    def nested() -> Subset[Any]:
        return Subset(Subset(data(), [5, 3, 8, 8, 0, -1, 21, 2, 4, 6, 7]), range(1, 10, 2))

    def batched(sampler: Sampler[int]) -> BatchSampler:
        return BatchSampler(sampler, batch_size, drop_last=drop_last)

    return {
        "in order": lambda: DataLoader(data(), **how),
        "shuffled": lambda: DataLoader(data(), shuffle=True, **how),
        "shuffled, generator": lambda: DataLoader(data(), shuffle=True, generator=generator(), **how),
        "sampler's generator": lambda: DataLoader(data(), sampler=RandomSampler(data(), generator=generator()), **how),
        "both": lambda: DataLoader(
            data(), sampler=RandomSampler(data(), generator=generator()), generator=generator(6), **how
        ),
        "replacement": lambda: DataLoader(data(), sampler=RandomSampler(data(), replacement=True), **how),
        "replacement, generator": lambda: DataLoader(
            data(), sampler=RandomSampler(data(), replacement=True, num_samples=70, generator=generator()), **how
        ),
        "more than there are": lambda: DataLoader(
            data(), sampler=RandomSampler(data(), num_samples=55, generator=generator()), **how
        ),
        "fewer than there are": lambda: DataLoader(data(), sampler=RandomSampler(data(), num_samples=9), **how),
        "of a part": lambda: DataLoader(data(), sampler=RandomSampler(range(11), generator=generator()), **how),
        "weighted": lambda: DataLoader(data(), sampler=WeightedRandomSampler([1.0, 2.0] * 10, 31), **how),
        "subset sampler": lambda: DataLoader(data(), sampler=SubsetRandomSampler(range(3, 20)), **how),
        "lazy": lambda: DataLoader(data(), sampler=Lazy(), **how),
        "eager": lambda: DataLoader(data(), sampler=Eager(), **how),
        "batch sampler": lambda: DataLoader(
            data(), batch_sampler=batched(RandomSampler(data(), generator=generator()))
        ),
        "batches in order": lambda: DataLoader(data(), batch_sampler=batched(SequentialSampler(range(7)))),
        "uneven": lambda: DataLoader(data(), batch_sampler=Uneven()),
        "listed": lambda: DataLoader(data(), batch_sampler=[[3, 4], [0], [], [22, -23, 1]]),
        "a list for a sampler": lambda: DataLoader(data(), sampler=[4, 2, 2, 9], **how),
        "a subset": lambda: DataLoader(Subset(data(), torch.randperm(23)[:14].tolist()), shuffle=True, **how),
        "a subset by a tensor": lambda: DataLoader(Subset(data(), torch.arange(2, 16)), shuffle=True, **how),  # type: ignore[arg-type]  # torch takes it
        "nested subsets": lambda: DataLoader(nested(), shuffle=True, **how),
        "a split": lambda: DataLoader(random_split(data(), [15, 8])[0], shuffle=True, **how),
        "one tensor": lambda: DataLoader(TensorDataset(torch.randn(9, 2)), shuffle=True, **how),
        "no sample": lambda: DataLoader(data(0), **how),
    }


NAMES = list(kinds(4, drop_last=False))


def generators(loader: Loader) -> list[Any]:
    inner = getattr(loader.batch_sampler, "sampler", None)
    own = [getattr(owner, "generator", None) for owner in (loader, loader.sampler, inner)]
    return [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # type: ignore[index]  # the legacy form
        *(g.get_state().numpy().tobytes() for g in own if g is not None),
    ]


def passes(make: Callable[[], Loader], iterate: Callable[[Loader], Iterator[Any]]) -> list[Any]:
    """Everything about three passes over a loader, one of them broken off: batches, and the generators at each."""
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    loader, found = make(), list[Any]()
    for stop in (None, 2, None):
        batches = iterate(loader)
        found.append(generators(loader))
        try:
            for number, batch in enumerate(batches):
                found.append((type(batch), [(x.tolist(), x.dtype, x.stride(), x.is_contiguous()) for x in batch]))
                found.append(generators(loader))
                if number == stop:
                    break
        except (RuntimeError, IndexError) as error:
            found.append(type(error))
        found.append(generators(loader))
    return found


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 23])
@pytest.mark.parametrize("name", NAMES)
def test_batches_and_draws_are_those_of_the_loader(name: str, batch_size: int, drop_last: bool) -> None:
    make = kinds(batch_size, drop_last=drop_last)[name]
    assert why_not_whole(make()) is None
    assert passes(make, fetched) == passes(make, iter)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 12), batch_size=st.integers(1, 6), drop_last=st.booleans(), seed=st.none() | st.integers(0, 9))
def test_sizes_that_do_not_divide_make_no_difference(
    n: int, batch_size: int, drop_last: bool, seed: int | None
) -> None:
    def make() -> Loader:
        own = None if seed is None else generator(seed)
        if n == 0:  # torch refuses to shuffle nothing
            return DataLoader(data(0), batch_size, drop_last=drop_last)
        return DataLoader(data(n), batch_size, shuffle=True, drop_last=drop_last, generator=own)

    assert passes(make, fetched) == passes(make, iter)


def test_a_batch_may_be_changed_without_changing_the_data() -> None:
    for shuffle in (False, True):
        dataset = data()
        before = [tensor.clone() for tensor in dataset.tensors]
        for batch in fetched(DataLoader(dataset, 4, shuffle=shuffle)):
            for tensor in batch:
                tensor.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, dataset.tensors, strict=True))


def test_an_index_beyond_the_data_is_an_error_as_it_is_in_the_loader() -> None:
    for iterate in (iter, fetched):
        with pytest.raises(IndexError):
            list(iterate(DataLoader(data(5), 2, sampler=[0, 1, 7])))
        with pytest.raises(IndexError):
            list(iterate(DataLoader(data(5), 2, sampler=SequentialSampler(range(8)))))


class OwnLoader(DataLoader[Any]):
    """A loader that might do anything."""


class OwnDataset(TensorDataset):
    """So might a dataset."""

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple(2 * tensor[index] for tensor in self.tensors)


class OwnSubset(Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        return self.dataset[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class OwnTensor(Tensor):
    """And a tensor."""


def _with_own_items() -> TensorDataset:
    found = data()
    found.__getitems__ = lambda indices: [found[0]] * len(indices)  # type: ignore[attr-defined]  # what a loader asks for
    return found


def _floats() -> Tensor:
    return torch.randn(9, 4)


UNUSUAL: dict[str, Callable[[], Any]] = {
    "a list": lambda: some_batches(3),
    "a loader of one's own": lambda: OwnLoader(data(), 4),
    "a collate_fn": lambda: DataLoader(data(), 4, collate_fn=lambda samples: default_collate(samples)),
    "no batching": lambda: DataLoader(data(), batch_size=None),
    "a dataset of one's own": lambda: DataLoader(OwnDataset(torch.ones(4)), 2),
    "a subset of one's own": lambda: DataLoader(OwnSubset(data(), [1, 2]), 2),
    "a subset of a list": lambda: DataLoader(Subset([1.0, 2.0, 3.0], [0, 2]), 2),  # type: ignore[arg-type]  # torch takes it
    "items of one's own": lambda: DataLoader(_with_own_items(), 4),
    "a subset of such": lambda: DataLoader(Subset(_with_own_items(), [3, 4]), 4),
    "a concatenation": lambda: DataLoader(ConcatDataset([data(), data()]), 4),
    "a stack": lambda: DataLoader(StackDataset(torch.ones(4), torch.ones(4)), 2),  # type: ignore[arg-type]  # torch takes it
    "a parameter": lambda: DataLoader(TensorDataset(nn.Parameter(_floats())), 2),
    "a gradient": lambda: DataLoader(TensorDataset(_floats().requires_grad_()), 2),
    "a tensor of one's own": lambda: DataLoader(TensorDataset(_floats().as_subclass(OwnTensor)), 2),
    "a transposed tensor": lambda: DataLoader(TensorDataset(_floats().t()), 2),
    "channels last": lambda: DataLoader(
        TensorDataset(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)), 2
    ),
    "a conjugate": lambda: DataLoader(TensorDataset(torch.randn(4, dtype=torch.complex64).conj()), 2),
    "workers": lambda: DataLoader(data(), 4, num_workers=1),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_the_loader_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = UNUSUAL[name]()
    why = why_not_whole(made)
    assert why is not None
    monkeypatch.setattr("loopwright.fetching._made", None)
    torch.manual_seed(0)
    found = list(fetched(made))
    torch.manual_seed(0)
    assert str(found) == str(list(made))


def test_pinned_memory_without_an_accelerator_is_left_to_the_loader_which_warns_of_it() -> None:
    if not torch.cuda.is_available():
        assert why_not_whole(DataLoader(data(), 4, pin_memory=True)) is not None


def test_the_trainer_asks_the_dataset_for_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    inputs, targets = torch.randn(10, 3), torch.randn(10, 1)
    loader = DataLoader(TensorDataset(inputs, targets), 4, shuffle=True)
    trainer = line_trainer()
    trainer.fit(loader, loader, epochs=2)
    trainer.evaluate(loader)
    assert sum(map(len, trainer.predict(loader))) == 10


@pytest.mark.parametrize("whole", [True, False])
def test_one_debug_line_says_which_way_was_taken_and_why(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    dataset = TensorDataset(torch.randn(10, 3), torch.randn(10, 1))
    loader = (
        DataLoader(dataset, 4) if whole else DataLoader(dataset, 4, collate_fn=lambda items: default_collate(items))
    )
    with caplog.at_level(logging.DEBUG, logger="loopwright"):
        line_trainer().fit(loader, epochs=3)
    lines = [record.message for record in caplog.records if record.message.startswith("the training data:")]
    expected = (
        "whole batches are gathered" if whole else "the loader's own batches, since it has a collate_fn of its own"
    )
    assert lines == [f"the training data: {expected}"]
