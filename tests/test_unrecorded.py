"""Gradients are cleared and steps made without a profiler's record, but by the optimizer's own calls where it shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset, IterableDataset

from helpers import At, some_batches
from loopwright import Callback, Schedule, State, Trainer
from loopwright.fetching import fetched
from loopwright.unrecorded import batches_of, step_of, zero_grad_of


class Records:
    """Counts the records made for a profiler, under their names."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        made = self.names

        class Counting(torch.autograd.profiler.record_function):
            def __enter__(self) -> Any:
                made.append(self.name)
                return super().__enter__()  # type: ignore[no-untyped-call]  # torch has no annotation there

        patch.setattr(torch.autograd.profiler, "record_function", Counting)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    return Records(monkeypatch)


def line(make: Callable[..., Optimizer] = SGD) -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, make(model.parameters(), lr=0.05)


def fit(model: nn.Module, optimizer: Optimizer, *callbacks: Callback[Any], **settings: Any) -> None:
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, device="cpu", **settings)
    trainer.fit(some_batches(4), epochs=1)


@pytest.mark.parametrize("make", [SGD, Adam])
def test_a_fit_makes_no_record_for_a_profiler_that_is_not_there(
    make: Callable[..., Optimizer], records: Records
) -> None:
    model, optimizer = line(make)
    optimizer.step()
    assert records.names == [f"Optimizer.step#{make.__name__}.step"]  # the counter sees what is made by hand
    records.names.clear()
    fit(model, optimizer)
    assert records.names == []


def test_a_running_profiler_sees_every_step() -> None:
    model, optimizer = line()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        fit(model, optimizer)
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["Optimizer.step#SGD.step"] == 4


def test_hooks_that_come_and_go_in_mid_run_are_called() -> None:
    model, optimizer = line()
    called: list[str] = []

    def own(kind: str) -> Callable[..., None]:
        return lambda *args: called.append(kind)

    registered: list[Any] = []
    ways = [
        lambda: optimizer.register_step_pre_hook(own("pre")),
        lambda: optimizer.register_step_post_hook(own("post")),
        lambda: register_optimizer_step_pre_hook(own("global pre")),
        lambda: register_optimizer_step_post_hook(own("global post")),
    ]

    class Registers(Callback[Any]):
        """One kind of hook for each step."""

        def on_batch_start(self, state: Any, batch: Any) -> None:
            while registered:
                registered.pop().remove()
            registered.append(ways[state.progress.step]())

    fit(model, optimizer, Registers())
    registered.pop().remove()
    assert called == ["pre", "post", "global pre", "global post"]


class Counted(SGD):
    """A step and a zero_grad of one's own."""

    calls: list[str]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.calls = []

    def step(self, closure: Any = None) -> Any:
        self.calls.append("step")
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls.append("zero_grad")
        super().zero_grad(set_to_none)


def test_methods_that_a_class_overrides_are_called() -> None:
    model, _ = line()
    optimizer = Counted(model.parameters(), lr=0.05)
    fit(model, optimizer)
    assert optimizer.calls == ["zero_grad", "step"] * 4


def test_a_step_that_an_instance_is_given_in_mid_run_is_called() -> None:
    model, optimizer = line()
    called: list[int] = []

    def patch(state: State[Any], batch: object) -> None:
        if state.progress.step != 2:
            return
        plain = optimizer.step

        def step(*args: Any) -> Any:
            called.append(1)
            return plain(*args)

        optimizer.step = step  # type: ignore[assignment]  # as schedulers do it

    fit(model, optimizer, At(on_batch_start=patch))
    assert len(called) == 2


def test_a_scheduler_does_not_warn_that_the_optimizer_made_no_step() -> None:
    model, optimizer = line()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fit(model, optimizer, schedule=Schedule(scheduler, each="step"))  # warnings are errors here
    assert scheduler.get_last_lr() == [0.05 * 0.5**4]


@pytest.fixture
def another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose wrapper of ``step`` does something that is not known here."""
    monkeypatch.setattr("loopwright.unrecorded._KNOWN_NAMES", {"record_function"})


def test_what_is_not_known_around_a_step_is_called(another_torch: None, records: Records) -> None:
    model, optimizer = line()
    fit(model, optimizer)
    assert records.names == ["Optimizer.step#SGD.step"] * 4


def test_the_bits_are_those_of_the_recorded_calls() -> None:
    ends = []
    for shortened in (False, True):
        model, optimizer = line(Adam)
        zero_grad = zero_grad_of(optimizer, []) if shortened else optimizer.zero_grad
        step = step_of(optimizer) if shortened else optimizer.step
        for inputs, targets in some_batches(5):
            zero_grad()
            torch.autograd.backward(nn.functional.mse_loss(model(inputs), targets))
            step()
        ends.append([*model.parameters(), *(value for entry in optimizer.state.values() for value in entry.values())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("fitted", [False, True], ids=["new", "fitted before"])
def test_a_copy_of_a_trainer_steps_its_own_optimizer(fitted: bool) -> None:
    model, optimizer = line()
    trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu")
    if fitted:
        trainer.fit(some_batches(4), epochs=1)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    twin = copy.deepcopy(trainer)
    twin.fit(some_batches(4), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, twin.state.model.parameters(), strict=True))


def test_methods_that_are_put_in_place_of_torchs_in_mid_run_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = line()
    called: list[str] = []
    plain = {"step": SGD.step, "zero_grad": SGD.zero_grad}

    def put(state: State[Any], batch: object) -> None:
        for name, method in plain.items() if state.progress.step == 2 else ():

            def other(self: Any, *args: Any, name: str = name, method: Any = method) -> Any:
                called.append(name)
                return method(self, *args)

            monkeypatch.setattr(SGD, name, other)

    fit(model, optimizer, At(on_batch_start=put))
    assert called == ["zero_grad", "step"] * 2


class Rows(Dataset[Any]):
    """A dataset of one's own, of which each sample is fetched alone and draws."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return torch.rand(3) + number, torch.rand(1)


class Stream(IterableDataset[Any]):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        return ((torch.rand(3), torch.rand(1)) for _ in range(6))


def shuffled() -> DataLoader[Any]:
    return DataLoader(Rows(), batch_size=3, shuffle=True)


def over(data: Iterable[Any]) -> Trainer[nn.Linear, Any]:
    model, optimizer = line()
    trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu")
    trainer.fit(data, data, epochs=2)
    trainer.predict(data, forward=lambda model, batch: model(batch[0]))
    return trainer


def test_batches_of_a_dataset_of_ones_own_are_fetched_without_a_record(records: Records) -> None:
    next(iter(shuffled()))
    assert len(records.names) == 1  # the counter sees what is made by hand
    records.names.clear()
    over(shuffled())
    assert records.names == []
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        over(shuffled())
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"] == 5 * (4 + 1)  # and each pass's end


def test_the_batches_are_those_of_the_recorded_calls_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for known in (True, False):
        monkeypatch.setattr("loopwright.unrecorded._NEXT_IS_KNOWN", known)
        torch.manual_seed(1)
        trainer = over(shuffled())
        found.append([*trainer.state.model.parameters(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_iterator_counts_its_batches_whether_or_not_a_profiler_runs() -> None:
    iterator: Any = iter(shuffled())
    batches = batches_of(iterator)
    assert batches is not iterator
    next(batches)
    with profile(activities=[ProfilerActivity.CPU]):
        next(batches)
    assert iterator._num_yielded == 2
    assert len(list(batches)) == 2


def test_a_stream_that_is_longer_than_it_says_is_still_warned_of() -> None:
    iterator = iter(DataLoader(Stream(), batch_size=1))
    assert batches_of(iterator) is iterator
    loader = DataLoader(Stream(), batch_size=1)
    assert len(loader) == 4
    with pytest.warns(UserWarning, match="6 samples|5 samples"):
        list(fetched(loader))
