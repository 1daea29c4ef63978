"""R13: what a loader raises names epoch, batch and, where they can be known, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from helpers import line_trainer, some_batches
from loopwright.data import Loader


class Broken(Dataset[tuple[Tensor, Tensor]]):
    """Twenty samples; remembers which ones it was asked for, and fails when ``fails`` of them have been given."""

    def __init__(self, fails: int) -> None:
        self.fails, self.asked = fails, list[int]()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        if len(self.asked) > self.fails:
            raise OSError("the disk is gone")
        return torch.full((3,), float(index)), torch.zeros(1)


class Backwards(Sampler[int]):
    """Nobody knows what it has in mind."""

    def __iter__(self) -> Iterator[int]:
        yield from range(19, -1, -1)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(7):
            yield torch.ones(3), torch.ones(1)
        raise OSError("the disk is gone")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


MAKERS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "in order": lambda data: DataLoader(data, 4),
    "shuffled": lambda data: DataLoader(data, 4, shuffle=True),
    "own generator": lambda data: DataLoader(data, 4, shuffle=True, generator=_generator()),
    "sampler's generator": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, generator=_generator())),
    "with replacement": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, replacement=True)),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler([1.0, 3.0] * 10, 20)),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False)),
    "loopwright's": lambda data: Loader(data, 4, seed=2),
}
KEEPING = MAKERS | {"torchdata's": lambda data: StatefulDataLoader(data, 4, shuffle=True, generator=_generator())}


def notes_of(error: BaseException) -> str:
    return "\n".join(error.__notes__)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fails", [0, 6, 31])
def test_the_note_names_epoch_batch_and_the_very_samples(name: str, fails: int) -> None:
    data = Broken(fails)
    trainer = line_trainer(seed=4)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trainer.fit(MAKERS[name](data), epochs=3)
    epoch, number = divmod(fails // 4, 5)
    assert f"epoch {epoch + 1}, batch {number + 1} of the training data; samples " in notes_of(caught.value)
    samples = [int(i) for i in notes_of(caught.value).split("samples ")[1].split("\n")[0].split(", ")]
    asked = data.asked[4 * (fails // 4) :]
    assert len(samples) == 4
    assert samples[: len(asked)] == asked, "up to the one that failed"


@pytest.mark.parametrize("name", KEEPING)
def test_naming_the_samples_draws_nothing(name: str) -> None:
    # The failing batch is asked for again by a second fit: the run goes on as if nothing had happened.
    torch.manual_seed(0)
    whole = line_trainer(seed=4)
    whole.fit(KEEPING[name](Broken(1000)), epochs=2)
    trainer, data = line_trainer(seed=4), Broken(10)
    loader = KEEPING[name](data)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(loader, epochs=2)
    data.fails = 1000
    trainer.fit(loader, epochs=2)
    for expected, found in zip(whole.state.model.parameters(), trainer.state.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_of_a_sampler_of_ones_own_no_samples_are_claimed() -> None:
    data = Broken(6)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(DataLoader(data, 4, sampler=Backwards()), epochs=1)
    assert "epoch 1, batch 2 of the training data" in notes_of(caught.value)
    assert "samples" not in notes_of(caught.value).replace("optimizer", "")


def test_batches_listed_by_hand_are_not_taken_for_the_order_of_the_dataset() -> None:
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(DataLoader(Broken(3), batch_sampler=[[5, 6], [1, 2], [3]]), epochs=1)
    assert "epoch 1, batch 2 of the training data; samples 1, 2" in notes_of(caught.value)


def test_of_a_batch_sampler_of_ones_own_no_samples_are_claimed() -> None:
    class Pairs(BatchSampler):
        """Batches in an order of its own."""

    data = Broken(3)
    pairs = Pairs(SequentialSampler(data), 2, drop_last=False)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(DataLoader(data, batch_sampler=pairs), epochs=1)
    assert "epoch 1, batch 2 of the training data" in notes_of(caught.value)
    assert "samples" not in notes_of(caught.value)


def test_a_stream_names_its_batch() -> None:
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(DataLoader(Stream(), 3), epochs=1)
    assert "epoch 1, batch 3 of the training data" in notes_of(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_without_batching_the_sample_is_named(workers: int) -> None:
    class Batches(Broken):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 3:
                raise OSError("the disk is gone")
            return torch.ones(2, 3), torch.ones(2, 1)

    data = DataLoader(Batches(0), batch_size=None, num_workers=workers)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(data, epochs=1)
    assert "epoch 1, batch 4 of the training data; samples 3" in notes_of(caught.value)


@pytest.mark.parametrize("shuffle", [False, True])
def test_validation_test_and_prediction_data_are_named_too(shuffle: bool) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Broken(6), 4, shuffle=shuffle)

    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(some_batches(2), loader(), epochs=1)
    assert "batch 2 of the validation data; samples " in notes_of(caught.value)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().evaluate(loader(), name="other")
    assert "batch 2 of the other data; samples " in notes_of(caught.value)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().predict(loader())
    assert "batch 2 of the data to predict" in notes_of(caught.value)
    assert ("samples 4, 5, 6, 7" in notes_of(caught.value)) is not shuffle


def test_many_samples_are_not_all_listed() -> None:
    class Wide(Broken):
        def __len__(self) -> int:
            return 100

    with pytest.raises(OSError, match="the disk is gone") as caught:
        line_trainer().fit(DataLoader(Wide(1), 100), epochs=1)
    assert "30, 31, ... (100 in all)" in notes_of(caught.value)
