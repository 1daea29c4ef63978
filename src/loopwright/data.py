"""A loader whose order and randomness are pure functions of seed, epoch and batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypedDict, cast

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from typing_extensions import TypeVar

from loopwright.arguments import NamedArguments
from loopwright.errors import CheckpointError, ConfigError
from loopwright.forms import Count, check_form
from loopwright.randomness import RandomState
from loopwright.schedule import check_count

__all__ = ["Loader"]

Sample_co = TypeVar("Sample_co", default=Any, covariant=True)
Batch_co = TypeVar("Batch_co", default=Any, covariant=True)


class MapDataset(Protocol[Sample_co]):
    """A dataset with a length, whose samples are fetched by their index."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: int, /) -> Sample_co:
        """The sample at ``index``."""
        ...


class _Place(TypedDict):
    epoch: Count
    batch: Count


class Loader(NamedArguments, Generic[Batch_co]):
    """Batches of a dataset, in an order and with a randomness that depend on seed, epoch and batch alone.

    So a run that resumes in mid-epoch finds its place without fetching what came before, and the number of workers may
    change in between. Each epoch is shuffled anew. While a batch is fetched, python's, numpy's and torch's global
    generators are seeded for that very batch, so that random augmentation repeats exactly too; afterwards those
    of the process are what they were.

    Args:
        dataset: Anything with a length, and samples by index.
        batch_size: Samples to a batch.
        shuffle: Whether the order is a new permutation at each epoch, or the dataset's own.
        drop_last: Whether a last batch that is not full is left out.
        seed: What order and randomness are drawn from, from 0 to 2**63 - 1.
        workers: Processes that fetch ahead; with 0 the batches are fetched where they are asked for.
        collate: What makes a batch of a list of samples.
        pin_memory: Whether batches are put into pinned memory, for a faster way to the GPU.

    Raises:
        ConfigError: An argument is not of these.

    Examples:
        >>> loader = Loader([1.0, 2.0, 3.0], batch_size=2, seed=1)
        >>> len(loader)
        2
    """

    def __init__(
        self,
        dataset: MapDataset[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        workers: int = 0,
        collate: Callable[[list[Any]], Batch_co] = default_collate,
        pin_memory: bool = False,
    ) -> None:
        check_count("batch_size", batch_size)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"the dataset is of type {type(dataset).__name__}, without a length or without samples by index",
                why="the place of every sample has to be known without reading the ones before it",
                fix="torch's DataLoader, for datasets that can only be iterated over",
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed!r}, and must be a whole number from 0 to 2**63 - 1")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ConfigError(f"workers is {workers!r}, and must be a whole number of at least 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.workers = workers
        self.pin_memory = pin_memory
        self._collate = collate
        self._epoch, self._batch = 1, 0  # of the next batch
        self._resumed = False

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch_co]:
        """The batches of the next epoch, or, right after ``load_state_dict``, the rest of the one that it names.

        That rest is empty where the place was taken down after an epoch's last batch, but before its end was seen.
        """
        if self._batch and not self._resumed:  # the last pass was broken off
            self._epoch, self._batch = self._epoch + 1, 0
        self._resumed = False
        epoch, start = self._epoch, self._batch
        fetch = _Fetch(self.dataset, self._collate, self.seed, epoch)
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", fetch),
            batch_size=None,
            sampler=list(enumerate(self.indices(epoch)))[start:],
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its base seed is used for nothing, and must not be drawn from the run's
        )
        return self._counted(loader)

    def _counted(self, batches: Iterable[Batch_co]) -> Iterator[Batch_co]:
        for batch in batches:
            self._batch += 1
            yield batch
        self._epoch, self._batch = self._epoch + 1, 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, counted from 1."""
        return self._epoch

    def indices(self, epoch: int) -> list[list[int]]:
        """The indices of the samples in each batch of an epoch.

        Args:
            epoch: Its number, counted from 1.

        Returns:
            A list of indices for each batch.
        """
        count = len(self.dataset)
        order: Sequence[int] = range(count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
            order = torch.randperm(count, generator=generator).tolist()
        return [list(order[i : i + self.batch_size]) for i in range(0, count, self.batch_size)][: len(self)]

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is: its epoch, counted from 1, and the batches of that epoch that come before it.

        Returns:
            The two numbers, under ``"epoch"`` and ``"batch"``.
        """
        return {"epoch": self._epoch, "batch": self._batch}

    def check_place(self, state: Any) -> None:
        """See whether ``state`` is a place in this loader's data.

        Args:
            state: What ``state_dict`` returned, of this loader or another.

        Raises:
            CheckpointError: It is not.
        """
        check_form(state, _Place, "$.data.place")
        if state["batch"] > len(self):
            raise CheckpointError(f"the checkpoint was saved after batch {state['batch']}, and there are {len(self)}")

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there: the next iteration gives the rest of that epoch.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            CheckpointError: There is no such place.
        """
        self.check_place(state)
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._resumed = True  # also where nothing is left of the epoch: then there is an iteration without a batch


class _Fetch:
    """Fetches one batch, with the generators seeded for it, wherever it runs."""

    def __init__(self, dataset: MapDataset[Any], collate: Callable[[list[Any]], Any], seed: int, epoch: int) -> None:
        self._dataset, self._collate, self._seed, self._epoch = dataset, collate, seed, epoch

    def __getitem__(self, place: tuple[int, list[int]]) -> Any:
        import numpy as np

        batch, indices = place
        before = RandomState.capture()
        seed = _mixed(self._seed, self._epoch, batch)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # the CPU's alone: data is not made on a GPU
        try:
            return self._collate([self._dataset[index] for index in indices])
        finally:
            before.restore()


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, unlike for any two that differ, as SplitMix64 mixes them."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & 2**64 - 1
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 2**64 - 1
        mixed ^= mixed >> 31
    return mixed >> 1
