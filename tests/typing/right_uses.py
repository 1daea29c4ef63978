"""A user's project in which everything is right: mypy --strict has nothing to say about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError

from loopwright import Callback, Every, LossFn, Metric, Output, Progress, Result, Schedule, State, Step, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping, LearningRateMonitor, ProgressBar, TensorBoardLogger

Batch = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.linear(x) / self.temperature
        return scaled


class Loader:
    """A loader of one's own, whose batches have a type."""

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(4):
            yield {"x": torch.randn(8, 3), "y": torch.randn(8, 1)}


net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
pairs = DataLoader(TensorDataset(torch.randn(32, 3), torch.randn(32, 1)), batch_size=8)

# A loss: functions and modules alike.


def mean_absolute(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions - targets).abs().mean()


loss: LossFn = mean_absolute
with_loss = Trainer(net, optimizer, nn.MSELoss())
with_function = Trainer(net, optimizer, loss)
of_pairs: Trainer[Net, Pair] = Trainer(net, optimizer, nn.MSELoss())
of_pairs.fit([(torch.randn(8, 3), torch.randn(8, 1))], epochs=1)

# A step: a typed function, one that returns just the loss, a lambda.


def typed_step(model: Net, batch: Batch) -> Output:
    predictions = model(batch["x"])
    return Output(
        mse_loss(predictions, batch["y"]),
        weight=len(predictions),
        predictions=predictions,
        targets=batch["y"],
        metrics={"temperature": model.temperature},
    )


def loss_step(model: Net, batch: Batch) -> Tensor:
    return mse_loss(model(batch["x"]), batch["y"])


def general_step(model: nn.Module, batch: Any) -> Tensor:
    predictions: Tensor = model(batch["x"])
    return predictions.square().mean()


step: Step[Net, Batch] = typed_step
with_step = Trainer(net, optimizer, step=step)
with_loss_step = Trainer(net, optimizer, step=loss_step)
with_general_step = Trainer(net, optimizer, step=general_step)
with_lambda = Trainer(net, optimizer, step=lambda model, batch: model(batch["x"]).square().mean())
with_typed_lambda: Trainer[Net, Batch] = Trainer(
    net, optimizer, step=lambda model, batch: mse_loss(model(batch["x"]), batch["y"])
)

# Batches of any type of one's own.


@dataclass(frozen=True)
class Sentence:
    words: Tensor
    length: int


class Point(NamedTuple):
    x: Tensor
    y: Tensor


def sentence_step(model: Net, batch: Sentence) -> Output:
    return Output(model(batch.words[: batch.length]).sum(), weight=batch.length)


def point_step(model: Net, batch: Point) -> Tensor:
    return mse_loss(model(batch.x), batch.y)


def sentences() -> Iterator[Sentence]:
    yield Sentence(torch.randn(5, 3), length=5)


Trainer(net, optimizer, step=sentence_step).fit(sentences(), steps=1)
Trainer(net, optimizer, step=point_step).fit([Point(torch.randn(8, 3), torch.randn(8, 1))], epochs=1)

# Data: lists, loaders of one's own, torch's DataLoader.

result: Result = with_step.fit(Loader(), Loader(), epochs=3, steps=100, validate=Every(steps=10))
with_step.fit([{"x": torch.randn(8, 3), "y": torch.randn(8, 1)}], epochs=1)
with_loss.fit(pairs, pairs, epochs=1)
scores: dict[str, float] = with_step.evaluate(Loader(), name="holdout")
outputs: list[Tensor] = with_step.predict(Loader(), forward=lambda model, batch: model(batch["x"]))
together: Tensor = torch.cat(with_loss.predict(pairs))

# torch's DataLoader does not say what its batches are, so a wrong one is not seen there: Step[Net, Batch], but pairs.
with_step.fit(pairs, epochs=1)

# What a run knows, and what it came to.


def show(state: State) -> str:
    return f"{type(state.model).__name__} on {state.device}, {state.stage}: {state.metrics['val/loss']:.3f}"


def cool(state: State[Net]) -> None:
    state.model.temperature *= 0.9


show(with_step.state)
cool(with_step.state)
progress: Progress = result.progress
rows: list[float] = [row["train/loss"] for row in result.history]
counters: list[int] = [progress.epoch, progress.batch, progress.step, progress.samples, progress.skipped]
last_epoch: int = progress.epoch if result.restored_epoch is None else result.restored_epoch
reason: str = result.stop_reason

# Callbacks, with the type of the batch and without.


class KeepLoss(Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_epoch_end(self, state: State) -> None:
        self.losses[state.progress.epoch] = state.metrics["train/loss"]


class CountWords(Callback[Batch]):
    words = 0

    def on_batch_start(self, state: State, batch: Batch) -> None:
        self.words += batch["x"].shape[0]

    def on_batch_end(self, state: State, output: Output) -> None:
        state.log("train/words", self.words)
        state.log("train/loss_now", output.loss)
        if self.words > 1000:
            state.stop("enough words")

    def state_dict(self) -> dict[str, Any]:
        return {"words": self.words}


class Cool(Callback[Batch, Net]):
    """With the model's own class, too."""

    def on_batch_start(self, state: State[Net], batch: Batch) -> None:
        state.model.temperature += batch["x"].shape[0]

    def on_epoch_end(self, state: State[Net]) -> None:
        cool(state)


class CoolAnyBatch(Callback[Any, Net]):
    def on_epoch_end(self, state: State[Net]) -> None:
        cool(state)


class Nothing(Cool):
    """A narrower callback may be written for any model again."""

    def on_epoch_end(self, state: State) -> None: ...


first_in_a_variable = [CountWords(), ProgressBar()]
Trainer(net, optimizer, step=typed_step, callbacks=first_in_a_variable)
of_some_kinds = [KeepLoss(), CoolAnyBatch(), EarlyStopping("val/loss", mode="min")]
Trainer(net, optimizer, step=typed_step, callbacks=of_some_kinds)
Trainer(net, optimizer, nn.MSELoss(), callbacks=of_some_kinds).fit(pairs, epochs=1)
declared: list[Callback] = [KeepLoss(), CountWords(), ProgressBar()]
Trainer(net, optimizer, step=typed_step, callbacks=declared)
Trainer(net, optimizer, nn.MSELoss(), callbacks=declared).fit([(torch.randn(8, 3), torch.randn(8, 1))], epochs=1)
Trainer(net, optimizer, step=typed_step, callbacks=(Cool(), CoolAnyBatch(), Nothing()))
Trainer(net, optimizer, step=general_step, callbacks=[Cool(), KeepLoss()])

# Metrics: torchmetrics, and anything with update, compute and reset.


class LargestError:
    def __init__(self) -> None:
        self.value = 0.0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.value = max(self.value, float((predictions - targets).abs().max()))

    def compute(self) -> float:
        return self.value

    def reset(self) -> None:
        self.value = 0.0


largest: Metric = LargestError()

# Everything at once.

everything = Trainer(
    net,
    optimizer,
    step=typed_step,
    schedule=Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 10), each="epoch"),
    metrics={"mae": MeanAbsoluteError(), "largest": largest},
    callbacks=[
        KeepLoss(),
        CountWords(),
        ProgressBar(),
        CSVLogger("metrics.csv", every=Every(steps=10)),
        TensorBoardLogger("board"),
        LearningRateMonitor(),
        EarlyStopping("val/loss", mode="min", patience=5, min_delta=0.01, restore_best=True),
    ],
    device=torch.device("cpu"),
    precision="bf16",
    accumulate=4,
    clip_norm=1.0,
    compile=False,
    seed=0,
    deterministic=True,
    on_nonfinite="skip",
)
