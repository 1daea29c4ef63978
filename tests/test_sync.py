"""The accelerator's cadence waits for no device between log points (P3), and nothing keeps a step's tensors (P6)."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
import torchmetrics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import At, Samples, line, line_trainer, ragged
from loopwright import Every, Output, Schedule, State, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping, LearningRateMonitor, Logger

# What makes the host wait for an accelerator: at the dispatcher, and where python goes past it on the CPU.
WAITING_OPERATIONS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
WAITING_METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__")
TRANSFERS = ("tensor", "as_tensor")  # from python's numbers: a copy to the device that the host waits for


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation there
    """Counts what would wait for an accelerator."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.counts: Counter[str] = Counter()
        for name in WAITING_METHODS:
            patch.setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))
        for name in TRANSFERS:
            patch.setattr(torch, name, self._counting(name, getattr(torch, name)))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING_OPERATIONS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    monkeypatch.setattr(Trainer, "_read_each_step", False)
    with monkeypatch.context() as patch, Waits(patch) as mode:
        yield mode


def seen(waits: Waits) -> int:
    return sum(waits.counts.values())


def test_the_counter_sees_every_way_of_waiting(waits: Waits) -> None:
    tensor = torch.ones(())
    ways: list[Callable[[], object]] = [
        lambda: tensor.item(),
        lambda: float(tensor),
        lambda: int(tensor),
        lambda: bool(tensor),
        lambda: tensor.tolist(),
        lambda: tensor.cpu(),
        lambda: tensor.numpy(),
        lambda: torch.equal(tensor, tensor),
        lambda: f"{tensor:.3f}",
        lambda: tensor.nonzero(),
        lambda: torch.tensor(1.0),
    ]
    for way in ways:
        before = seen(waits)
        way()
        assert seen(waits) > before, way


def tokens_step(model: nn.Module, batch: Samples) -> Output:
    loss = F.mse_loss(model(batch[0]), batch[1])
    weight = (batch[1] > -1).sum() + 1
    return Output(loss, weight=weight, metrics={"double": 2 * loss, "half": 0.5})


def classes(*sizes: int) -> list[Samples]:
    return [(inputs, (targets[:, 0] > 0).long()) for inputs, targets in ragged(*sizes)]


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "clipping": lambda: {"clip_norm": 1.0},
    "accumulating": lambda: {"accumulate": 2},
    "accumulating and clipping": lambda: {"accumulate": 3, "clip_norm": 1.0},
    "weights that are tensors": lambda: {"step": tokens_step},
    "weights that are tensors, accumulating": lambda: {"step": tokens_step, "accumulate": 2},
    "ignore index": lambda: {"model": nn.Linear(3, 4), "loss": nn.CrossEntropyLoss(), "data": classes},
    "ignore index, accumulating": lambda: {
        "model": nn.Linear(3, 4),
        "loss": nn.CrossEntropyLoss(),
        "data": classes,
        "accumulate": 2,
    },
    "ignoring": lambda: {"on_nonfinite": "ignore"},
    "bf16": lambda: {"precision": "bf16"},
    "callbacks": lambda: {
        "callbacks": [LearningRateMonitor(), EarlyStopping("val/loss", mode="min", restore_best=True)]
    },
    "metrics": lambda: {"metrics": {"mae": torchmetrics.MeanAbsoluteError()}},
    "seeded": lambda: {"seed": 3},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_within_an_epoch_nothing_waits_for_the_device(case: str, waits: Waits) -> None:
    made = SETTINGS[case]()
    data = made.pop("data", ragged)
    model = made.pop("model", None) or line()
    spans: list[tuple[str, int]] = []
    note: dict[str, Callable[..., object]] = {
        "on_batch_start": lambda state, batch: spans.append(("batches", seen(waits))),
        "on_batch_end": lambda state, output: spans.append(("batches", seen(waits))),
        "on_eval_start": lambda state: spans.append(("validation", seen(waits))),
        "on_eval_batch_end": lambda state, output: spans.append(("validation", seen(waits))),
    }
    callbacks = [*made.pop("callbacks", []), At(**note)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = Schedule(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), "step")
    trainer = line_trainer(model, optimizer=optimizer, schedule=schedule, callbacks=callbacks, **made)
    trainer.fit(data(4, 4, 2, 4, 4, 2), data(4, 3), epochs=2)
    for kind, batches in (("batches", 12), ("validation", 3)):
        counts = [count for name, count in spans if name == kind]
        assert len(counts) == 2 * batches
        for epoch in (counts[:batches], counts[batches:]):
            assert epoch[-1] == epoch[0], waits.counts
    assert seen(waits) > 0  # somebody did read, at the end of an epoch


def test_logging_waits_for_nothing(waits: Waits) -> None:
    logged: list[int] = []

    def log(state: State, output: Output) -> None:
        before = seen(waits)
        state.log("beside", output.predictions.mean())
        state.log("more", torch.ones(1, requires_grad=True))
        logged.append(seen(waits) - before)

    line_trainer(callbacks=[At(on_batch_end=log)]).fit(ragged(2, 2), epochs=1)
    assert logged == [0, 0]


class Remembers(Logger):
    def __init__(self, *, every: Every) -> None:
        super().__init__(every=every)
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))


def test_a_logger_waits_at_its_log_points_alone(waits: Waits) -> None:
    logger = Remembers(every=Every(steps=3))
    counts: list[int] = []
    at = At(on_batch_start=lambda state, batch: counts.append(seen(waits)))
    line_trainer(callbacks=[logger, at]).fit(ragged(2, 2, 2, 2, 2, 2, 2), epochs=1)
    moved = [index for index, (a, b) in enumerate(itertools.pairwise(counts), start=1) if a != b]
    assert moved == [3, 6]
    assert [step for step, _ in logger.rows] == [3, 6, 7]


def test_a_value_is_read_once_however_often_it_is_asked_for(waits: Waits) -> None:
    counts: list[int] = []

    def read(state: State, output: Output) -> None:
        before = seen(waits)
        assert state.metrics["train/loss"] == state.metrics["train/loss"] == dict(state.metrics)["train/loss"]
        counts.append(seen(waits) - before)

    line_trainer(callbacks=[At(on_batch_end=read)], on_nonfinite="ignore").fit(ragged(2), epochs=1)
    trainer = line_trainer(callbacks=[At(on_batch_end=read)], on_nonfinite="ignore")
    trainer.fit(ragged(2), epochs=1)
    assert counts[0] == counts[1] <= 2  # item(), and what it calls at the dispatcher


def test_the_rows_and_the_bits_are_those_of_reading_at_every_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    found = []
    for each_step in (True, False):
        monkeypatch.setattr(Trainer, "_read_each_step", each_step)
        path = tmp_path / f"{each_step}.csv"
        model = line()
        result = line_trainer(model, callbacks=[CSVLogger(path, every=Every(steps=2))], accumulate=2).fit(
            ragged(4, 1, 3, 3, 2), ragged(3, 4), epochs=3
        )
        found.append((model.weight, result.history, path.read_text()))
    (weight, history, text), (late_weight, late_history, late_text) = found
    assert torch.equal(weight, late_weight)
    assert len(history) == len(late_history)
    for row, late in zip(history, late_history, strict=True):
        assert row == pytest.approx(late, rel=1e-12)
    assert text.splitlines()[0] == late_text.splitlines()[0]
    assert len(text.splitlines()) == len(late_text.splitlines())


# P6: nothing keeps what a step made.


class Kept:
    """Weak references to what steps made; at the next step nothing of the ones before may be alive."""

    def __init__(self) -> None:
        self.references: list[tuple[str, weakref.ref[Tensor]]] = []

    def look(self) -> None:
        alive = [name for name, reference in self.references if reference() is not None]
        assert not alive, f"still alive: {alive}"

    def take(self, **tensors: Tensor) -> None:
        self.references += [(name, weakref.ref(tensor)) for name, tensor in tensors.items()]


class Deep(nn.Module):
    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.first, self.last, self.kept = nn.Linear(3, 8), nn.Linear(8, 1), kept

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        self.kept.take(hidden=hidden)  # the graph holds it
        out: Tensor = self.last(hidden)
        return out


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is dropped has to go at once, and not when a collector comes by."""
    gc.disable()
    yield
    gc.enable()


def _lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2)


MEMORY: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"accumulate": 2},
    "clipping": {"clip_norm": 1.0},
    "skip": {"on_nonfinite": "skip"},
    "fp16": {"precision": "fp16"},
    "metrics": {"metrics": {"mae": torchmetrics.MeanAbsoluteError()}},
}


def _nothing(state: State, output: Output) -> None: ...


@pytest.mark.parametrize("each_step", [True, False], ids=["read each step", "read at log points"])
@pytest.mark.parametrize("wanted", [True, False], ids=["a callback gets outputs", "no callback"])
@pytest.mark.parametrize("case", MEMORY)
@pytest.mark.usefixtures("no_collector")
def test_at_the_next_batch_nothing_of_the_last_one_is_alive(
    case: str, wanted: bool, each_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_read_each_step", each_step)
    kept = Kept()
    model = Deep(kept)

    def step(model: nn.Module, batch: Samples) -> Output:
        kept.look()
        predictions = model(batch[0])
        loss = F.mse_loss(predictions, batch[1])
        kept.take(predictions=predictions, loss=loss)
        return Output(loss, predictions=predictions, targets=batch[1], metrics={"double": 2 * loss})

    callbacks = [At(on_backward_end=_nothing, on_batch_end=_nothing, on_eval_batch_end=_nothing)] if wanted else []
    trainer = line_trainer(model, step=step, callbacks=callbacks, **MEMORY[case])
    trainer.fit(ragged(4, 4, 4), ragged(4, 4), epochs=2)
    trainer.evaluate(ragged(4, 4))
    kept.look()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("each_step", [True, False], ids=["read each step", "read at log points"])
def test_nor_with_an_optimizer_that_takes_a_closure(each_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_read_each_step", each_step)
    kept = Kept()
    model = Deep(kept)

    def step(model: nn.Module, batch: Samples) -> Output:
        predictions = model(batch[0])
        loss = F.mse_loss(predictions, batch[1])
        kept.take(predictions=predictions, loss=loss)
        return Output(loss, predictions=predictions, targets=batch[1])

    at = At(on_batch_start=lambda state, batch: kept.look())
    line_trainer(model, optimizer=_lbfgs(model), step=step, callbacks=[at]).fit(ragged(4, 4, 4), epochs=2)
    kept.look()


@pytest.mark.usefixtures("no_collector")
def test_a_step_that_enables_gradients_in_evaluation_leaves_no_graph_for_the_next_batch() -> None:
    kept = Kept()
    model = Deep(kept)
    enabled: Callable[[], AbstractContextManager[object]] = torch.enable_grad

    def step(model: nn.Module, batch: Samples) -> Output:
        kept.look()
        with enabled():
            predictions = model(batch[0])
            loss = F.mse_loss(predictions, batch[1])
        kept.take(predictions=predictions, loss=loss)
        return Output(loss, predictions=predictions)

    trainer = line_trainer(model, step=step)
    trainer.evaluate(ragged(4, 4, 4))
    trainer.predict(ragged(4, 4, 4))
    kept.look()


@pytest.mark.usefixtures("no_collector")
def test_a_skipped_batch_leaves_no_graph_either() -> None:
    kept = Kept()
    model = Deep(kept)

    def step(model: nn.Module, batch: Samples) -> Tensor:
        kept.look()
        loss: Tensor = model(batch[0]).mean() * float("nan")
        kept.take(loss=loss)
        return loss

    line_trainer(model, step=step, on_nonfinite="skip").fit(ragged(4, 4), epochs=1)
    kept.look()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_after_a_call_nothing_holds_a_batch(call: str) -> None:
    batches = ragged(4, 4)
    references = [weakref.ref(tensor) for batch in batches for tensor in batch]
    trainer = line_trainer()
    if call == "fit":
        trainer.fit(batches, epochs=1)
    elif call == "evaluate":
        trainer.evaluate(batches)
    else:
        trainer.predict(batches)
    del batches
    assert [reference() for reference in references] == [None] * 4
