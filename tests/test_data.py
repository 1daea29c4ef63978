"""What a loader may be (C17), and that the loader decides (C20)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from helpers import At, Samples, Unsized, all_equal, line_trainer, ragged, weights_of
from loopwright import ConfigError, DataError, Every, Output, Trainer
from loopwright.callbacks import Checkpoint
from small_problems import RARER, generator_of, make_loader

# C17: loaders without batches, without a length, or to be read once.


class Stream(IterableDataset[Samples]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Samples]:
        for inputs, targets in ragged(*[1] * self.samples):
            yield inputs[0], targets[0]


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.samples


def dataset(n: int) -> TensorDataset:
    return TensorDataset(torch.randn(n, 3), torch.randn(n, 1))


def test_a_loader_that_drops_its_only_batch_is_an_error_that_says_why() -> None:
    fetched: list[int] = []
    trainer = line_trainer(callbacks=[At(setup=lambda state: fetched.append(1))])
    with pytest.raises(DataError) as caught:
        trainer.fit(DataLoader(dataset(5), batch_size=8, drop_last=True), epochs=1)
    assert "dataset size 5" in caught.value.what
    assert "batch size 8" in caught.value.what
    assert "drop_last True" in caught.value.what
    assert "drop_last=False" in caught.value.fix
    assert not fetched  # it was found before anything began


def test_an_empty_dataset_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match=r"training data gave no batch: dataset size 0, batch size 4, drop_last False"):
        line_trainer().fit(DataLoader(dataset(0), batch_size=4), epochs=1)


@pytest.mark.parametrize(
    "empty",
    [[], (), Unsized([]), DataLoader(Stream(0), batch_size=2), DataLoader(Stream(3), batch_size=4, drop_last=True)],
    ids=["list", "tuple", "without length", "stream", "stream that drops its last"],
)
def test_empty_data_is_an_error_in_fit_as_training_and_as_validation_and_in_evaluate(empty: Any) -> None:
    with pytest.raises(DataError, match="training data gave no batch"):
        line_trainer().fit(empty, epochs=1)
    with pytest.raises(DataError, match="validation data gave no batch"):
        line_trainer().fit(ragged(2), empty, epochs=1)
    with pytest.raises(DataError, match="test data gave no batch"):
        line_trainer().evaluate(empty)


def test_a_stream_that_drops_its_only_batch_says_so() -> None:
    with pytest.raises(DataError, match="drop_last True"):
        line_trainer().fit(DataLoader(Stream(3), batch_size=4, drop_last=True), epochs=1)


ONCE: dict[str, Callable[[list[Samples]], Any]] = {
    "an iterator over a list": iter,
    "filter": lambda batches: filter(None, batches),
    "zip": lambda batches: zip(*zip(*batches, strict=True), strict=True),
    "map": lambda batches: map(tuple, batches),
    "an iterator over a DataLoader": lambda batches: iter(DataLoader(batches, batch_size=None)),  # type: ignore[arg-type]  # a list is a dataset, too
}


def once(kind: str, batches: int = 2) -> Any:
    """Batches of two samples, which can be read once."""
    return ONCE[kind](ragged(*[2] * batches))


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_read_once_is_refused_before_the_first_step_where_epochs_need_it_again(kind: str) -> None:
    trainer = line_trainer()
    with pytest.raises(DataError, match="can be read once, and is needed 2 times"):
        trainer.fit(once(kind), epochs=2)
    with pytest.raises(DataError, match="the validation data can be read once, and is needed 3 times"):
        trainer.fit(ragged(2, 2), once(kind), epochs=3)
    with pytest.raises(DataError, match="is needed 2 times"):
        trainer.fit(ragged(2, 2), once(kind), steps=5, validate=Every(steps=2))
    with pytest.raises(DataError, match="is needed 2 times"):
        trainer.fit(ragged(2, 2), once(kind), steps=4)
    assert trainer.state.progress.batch == trainer.state.progress.epoch == 0


@given(
    target=st.fixed_dictionaries({}, optional={"epochs": st.integers(1, 3), "steps": st.integers(1, 7)}).filter(bool),
    validate=st.builds(Every, steps=st.integers(1, 7)) | st.builds(Every, epochs=st.integers(1, 3)),
    kind=st.sampled_from(list(ONCE)),
    begun=st.integers(0, 4),
    accumulate=st.integers(1, 2),
)
@settings(deadline=None, max_examples=150)
def test_what_is_refused_cannot_be_run_to_its_end_and_the_way_to_do_it_on_purpose_can(
    target: dict[str, int], validate: Every, kind: str, begun: int, accumulate: int
) -> None:
    """A like iterator of an unknown class is not refused, and shows what would become of it."""

    def trainer_under_way() -> Trainer:
        trainer = line_trainer(accumulate=accumulate)
        if begun:
            trainer.fit(ragged(2, 2, 2), steps=begun)
        return trainer

    def needs_again(train: Any, val: Any, **asked: Any) -> bool:
        try:
            trainer_under_way().fit(train, val, **asked)
        except DataError as error:
            return error.what.endswith("gave no batch")
        return False

    def own(batches: Any) -> ReadsOnce:  # the same, which nobody can know
        return ReadsOnce(list(batches))

    asked: dict[str, Any] = {**target, "validate": validate}
    for given_once in ("train", "val"):
        again, trainer = ragged(2, 2, 2), trainer_under_way()
        data = (once(kind, 3), again) if given_once == "train" else (again, once(kind, 3))
        try:
            trainer.fit(*data, **asked)
        except DataError as error:
            if not error.what.endswith("times"):
                continue
            assert trainer.state.progress == trainer_under_way().state.progress
            assert needs_again(*((own(again), again) if given_once == "train" else (again, own(again))), **asked)
            name, cadence, number = re.findall(r"(epochs|validate)=(?:Every\((\w+)=)?(\d+)", error.fix)[-1]
            instead = {"epochs": int(number)} if name == "epochs" else {name: Every(**{cadence: int(number)})}
            data = (once(kind, 3), again) if given_once == "train" else (again, once(kind, 3))
            trainer.fit(*data, **{**asked, **instead})


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_read_once_is_taken_where_once_is_enough(kind: str, tmp_path: Path) -> None:
    trainer = line_trainer(callbacks=[Checkpoint(tmp_path)])
    trainer.fit(once(kind), once(kind), epochs=1)
    trainer.fit(once(kind), once(kind), epochs=2)
    trainer.fit(once(kind), epochs=9, steps=6)
    trainer.fit(ragged(2, 2), once(kind), epochs=5, validate=Every(epochs=4))
    assert trainer.state.progress.step == 10
    again = line_trainer(callbacks=[Checkpoint(tmp_path)])
    assert again.fit(once(kind), epochs=6, resume="auto").progress.step == 12
    with pytest.raises(DataError, match="is needed 3 times"):
        line_trainer(callbacks=[Checkpoint(tmp_path)]).fit(once(kind), epochs=9, resume="auto")


@pytest.mark.parametrize(
    "endless", [lambda batches: itertools.cycle(batches), lambda batches: itertools.repeat(batches[0])]
)
def test_what_python_repeats_without_end_is_taken_for_any_target(endless: Callable[[Any], Any]) -> None:
    stop = At(on_step_end=lambda state: state.stop("enough") if state.progress.step == 5 else None)
    assert line_trainer(callbacks=[stop]).fit(endless(ragged(2, 2)), epochs=3).progress.step == 5


class ReadsOnce(Iterator[Samples]):
    """An iterator of one's own, of which nobody can know whether it begins anew."""

    def __init__(self, batches: list[Samples]) -> None:
        self.batches = batches

    def __next__(self) -> Samples:
        if not self.batches:
            raise StopIteration
        return self.batches.pop(0)


@pytest.mark.parametrize("kind", ONCE)
def test_an_iterator_goes_on_in_the_next_fit_where_it_was_left(kind: str) -> None:
    data, trainer, plain = once(kind, 4), line_trainer(), line_trainer()
    for steps in (1, 3):
        trainer.fit(data, steps=steps)
        plain.fit(ragged(2, 2, 2, 2), steps=steps)
    assert trainer.state.progress.batch == 3
    assert all_equal(weights_of(trainer), weights_of(plain))


def test_an_iterator_that_was_read_to_its_end_is_an_error_in_the_second_epoch() -> None:
    trainer = line_trainer()
    with pytest.raises(DataError, match="can be read once"):
        trainer.fit(ReadsOnce(ragged(2, 2)), epochs=2)
    assert trainer.state.progress.epoch == 1
    assert trainer.state.progress.step == 2


def test_a_generator_is_enough_for_one_epoch() -> None:
    result = line_trainer().fit((batch for batch in ragged(2, 2, 1)), epochs=1)
    assert result.progress.step == 3
    assert result.progress.samples == 5


def test_validation_data_to_be_read_once_is_an_error_at_the_second_validation() -> None:
    trainer = line_trainer()
    with pytest.raises(DataError, match="validation data gave no batch") as caught:
        trainer.fit(ragged(2), ReadsOnce(ragged(2)), epochs=2)
    assert "can be read once" in caught.value.why
    assert trainer.state.progress.step == 2


@pytest.mark.parametrize("stream", [Stream(7), SizedStream(7)], ids=["without length", "with a length"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_iterable_dataset_trains_with_and_without_a_length(stream: Stream, accumulate: int) -> None:
    trainer = line_trainer(accumulate=accumulate)
    result = trainer.fit(DataLoader(stream, batch_size=2), DataLoader(stream, batch_size=2), epochs=2)
    assert result.progress.step == 2 * (4 // accumulate)
    assert result.progress.samples == 14
    assert trainer.state.plan.batches == (4 if isinstance(stream, SizedStream) else None)


def test_data_without_end_trains_for_a_number_of_steps() -> None:
    class Forever:
        def __iter__(self) -> Iterator[Samples]:
            while True:
                yield from ragged(2, 2)

    result = line_trainer().fit(Forever(), epochs=5, steps=7)
    assert result.stop_reason == "steps"
    assert result.progress.step == 7
    assert len(result.history) == 1


class Short:
    """Says that it holds more than it gives."""

    def __init__(self, says: int, batches: list[Samples]) -> None:
        self.says, self.batches = says, batches

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[Samples]:
        yield from self.batches


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("says", [1, 3, 9])
def test_a_length_that_is_wrong_loses_no_batch(says: int, accumulate: int, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    trainer = line_trainer(callbacks=[At(on_batch_end=lambda state, output: seen.append(1))], accumulate=accumulate)
    result = trainer.fit(Short(says, ragged(2, 2, 2, 2)), epochs=2)
    assert len(seen) == 8
    assert result.progress.samples == 16
    assert result.progress.epoch == 2
    warned = [record for record in caplog.records if "length of 9" in record.getMessage()]
    assert len(warned) == (says == 9)


# C20: the loader decides.


class Counted:
    """Batches, and what is asked of them."""

    def __init__(self, batches: list[Samples], log: list[str]) -> None:
        self.batches, self.log = batches, log

    def __iter__(self) -> Iterator[Samples]:
        self.log.append("iter")
        for index, batch in enumerate(self.batches):
            self.log.append(f"fetch {index}")
            yield batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loader_is_iterated_once_an_epoch_and_nothing_is_fetched_ahead(accumulate: int) -> None:
    log: list[str] = []
    at = At(
        on_epoch_start=lambda state: log.append("epoch"),
        on_batch_start=lambda state, batch: log.append(f"start {state.progress.batch}"),
        on_batch_end=lambda state, output: log.append(f"end {state.progress.batch - 1}"),
    )
    line_trainer(callbacks=[at], accumulate=accumulate).fit(Counted(ragged(2, 2, 2), log), epochs=2)
    epoch = [f"{what} {index}" for index in range(3) for what in ("fetch", "start", "end")]
    assert log == ["epoch", "iter", *epoch] * 2


def test_a_target_in_steps_fetches_no_further_batch() -> None:
    log: list[str] = []
    line_trainer().fit(Counted(ragged(2, 2, 2), log), steps=2)
    assert log == ["iter", "fetch 0", "fetch 1"]


def test_of_an_iterator_only_what_is_trained_on_is_taken() -> None:
    batches = ragged(2, 2, 2)
    data = iter(batches)
    trainer = line_trainer()
    trainer.fit(data, steps=1)
    assert next(data) is batches[1]
    trainer.fit(data, steps=2)
    assert next(data, None) is None


def test_evaluate_and_predict_iterate_once_and_in_order() -> None:
    log: list[str] = []
    trainer = line_trainer()
    trainer.evaluate(Counted(ragged(2, 2), log))
    trainer.predict(Counted(ragged(2, 2), log))
    assert log == ["iter", "fetch 0", "fetch 1"] * 2


KINDS = [
    "shuffled",
    "own generator",
    "weighted sampler",
    "augmented",
    "iterable dataset",
    "without length",
    *(kind for kind in RARER if "worker" not in kind),
]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_random_generators_are_those_of_the_plain_loop(kind: str) -> None:
    def run(train: Callable[[Any, Any, Callable[[Any], None], Callable[[], None]], None]) -> list[Any]:
        torch.manual_seed(5)
        data = torch.randn(14, 3), torch.randn(14, 1)
        loader, val = make_loader(kind, data), make_loader("shuffled", data)
        own = generator_of(loader)
        found: list[Any] = []

        def take(batch: Any) -> None:
            found.append(batch)

        def end_epoch() -> None:
            found.append(torch.get_rng_state())
            if own is not None:
                found.append(own.get_state())

        torch.manual_seed(6)
        train(loader, val, take, end_epoch)
        found.append(torch.rand(2))
        return found

    def plainly(loader: Any, val: Any, take: Callable[[Any], None], end_epoch: Callable[[], None]) -> None:
        for _ in range(3):
            for batch in loader:
                take(batch)
            for _batch in val:
                pass
            end_epoch()

    def with_trainer(loader: Any, val: Any, take: Callable[[Any], None], end_epoch: Callable[[], None]) -> None:
        at = At(on_batch_start=lambda state, batch: take(batch), on_epoch_end=lambda state: end_epoch())

        def step(model: nn.Module, batch: Any) -> Output:
            return Output(model(batch[0]).square().mean(), weight=1)

        line_trainer(step=step, callbacks=[at]).fit(loader, val, epochs=3)

    expected, found = run(plainly), run(with_trainer)
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        if isinstance(plain, Tensor):
            assert torch.equal(ours, plain)
        else:
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_loader_keeps_its_sampler_and_its_settings() -> None:
    loader = make_loader("weighted sampler", (torch.randn(9, 3), torch.randn(9, 1)))
    before = dict(vars(loader))
    trainer = line_trainer()
    trainer.fit(loader, loader, epochs=2)
    trainer.evaluate(loader)
    after = dict(vars(loader))
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


class Squares(Dataset[Samples]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Samples:
        raise AssertionError("a single sample was asked for")


NO_LOADERS: dict[str, Any] = {
    "dataset": dataset(4),
    "dataset of a class of its own": Squares(),
    "tensor": torch.zeros(4, 3),
    "dict": {"x": torch.zeros(4, 3)},
    "string": "train.csv",
    "bytes": b"train",
    "number": 3,
    "None": None,
    "class": list,
    "function": ragged,
}


@pytest.mark.parametrize("kind", NO_LOADERS)
def test_what_is_no_loader_is_refused_by_name_before_anything_begins(kind: str) -> None:
    data = NO_LOADERS[kind]
    begun: list[str] = []
    trainer = line_trainer(callbacks=[At(setup=lambda state: begun.append("setup"))])
    calls: list[tuple[str, Callable[[], object]]] = [
        ("train", lambda: trainer.fit(data, epochs=1)),
        ("data", lambda: trainer.evaluate(data)),
        ("data", lambda: trainer.predict(data)),
    ]
    if data is not None:
        calls.append(("val", lambda: trainer.fit(ragged(2), data, epochs=1)))
    for name, call in calls:
        with pytest.raises(ConfigError, match=rf"^\[config\] {name} is ") as caught:
            call()
        meant_epochs = kind == "number" and name != "data"
        fixes = {"class": "list(...), an instance", "function": "ragged(), if that makes"}
        fix = "epochs=3" if meant_epochs else fixes.get(kind, "DataLoader(")
        assert fix in caught.value.fix
    assert not begun


def test_an_error_of_the_loader_reaches_the_caller_as_it_is() -> None:
    class Breaks:
        def __iter__(self) -> Iterator[Samples]:
            yield from ragged(2)
            raise StopIteration("not the end of the data")  # python makes it a RuntimeError

    trainer = line_trainer()
    with pytest.raises(RuntimeError, match="StopIteration"):
        trainer.fit(Breaks(), epochs=1)
    assert trainer.state.progress.step == 1


def test_a_stop_iteration_of_a_step_does_not_end_the_epoch_in_silence() -> None:
    def step(model: nn.Module, batch: Samples) -> Tensor:
        raise StopIteration

    with pytest.raises(StopIteration):
        line_trainer(step=step).fit(ragged(2, 2), epochs=1)
