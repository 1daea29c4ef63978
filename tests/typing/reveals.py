"""A user's project in which mypy is asked what it knows: the user's own model and batch come through everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import reveal_type

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Output, State, Step, Trainer
from loopwright.callbacks import ProgressBar

Batch = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.temperature = 1.0


class Loader:
    def __iter__(self) -> Iterator[Batch]:
        yield {"x": torch.randn(8, 3)}


def my_step(model: Net, batch: Batch) -> Output:
    return Output(model.linear(batch["x"]).sum())


def loss_step(model: Net, batch: Batch) -> Tensor:
    return my_step(model, batch).loss


named_step: Step[Net, Batch] = my_step
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

# With a step, both are the step's.
trainer = Trainer(net, optimizer, step=my_step)
reveal_type(trainer)  # reveals: Trainer[Net, dict[str, Tensor]]
reveal_type(Trainer(net, optimizer, step=loss_step))  # reveals: Trainer[Net, dict[str, Tensor]]
reveal_type(Trainer(net, optimizer, step=named_step))  # reveals: Trainer[Net, dict[str, Tensor]]
reveal_type(trainer.state)  # reveals: State[Net]
reveal_type(trainer.state.model)  # reveals: Net
reveal_type(trainer.state.model.temperature)  # reveals: float
reveal_type(trainer.state.metrics["val/loss"])  # reveals: float

# With a loss or a lambda, the model is the argument's, and the batch is Any.
reveal_type(Trainer(net, optimizer, nn.MSELoss()))  # reveals: Trainer[Net, Any]
reveal_type(Trainer(net, optimizer, step=lambda model, batch: model.linear(batch).sum()))  # reveals: Trainer[Net, Any]
Trainer(net, optimizer, step=lambda model, batch: reveal_type(model).linear(batch))  # reveals: Net
Trainer(net, optimizer, step=lambda model, batch: model.linear(reveal_type(batch)))  # reveals: Any

# Unless it is named: then a lambda gets it too.
named: Trainer[Net, Batch]
named = Trainer(net, optimizer, step=lambda model, batch: reveal_type(batch)["x"])  # reveals: dict[str, Tensor]


# The type parameters have defaults: a bare name is a general one.
def bare(trainer: Trainer, state: State, step: Step) -> None:
    reveal_type(trainer)  # reveals: Trainer[Module, Any]
    reveal_type(state)  # reveals: State[Module]
    reveal_type(step)  # reveals: def (Module, Any) -> Output | Tensor


# What comes back.
reveal_type(trainer.fit(Loader(), epochs=1).history)  # reveals: list[dict[str, float]]
reveal_type(trainer.evaluate(Loader()))  # reveals: dict[str, float]
reveal_type(trainer.predict(Loader()))  # reveals: list[Any]
trainer.predict(Loader(), forward=lambda model, batch: reveal_type(model).linear(batch))  # reveals: Net

# Why a wrong batch is not seen behind torch's own loader: it does not say what it yields.
reveal_type(next(iter(DataLoader(TensorDataset(torch.randn(8, 3))))))  # reveals: Any


class Watch(Callback[Batch]):
    def on_batch_start(self, state: State, batch: Batch) -> None:
        reveal_type(state)  # reveals: State[Module]
        reveal_type(super().on_batch_start)  # reveals: def (state: State[Any], batch: dict[str, Tensor])


class WatchNet(Callback[Batch, Net]):
    def on_batch_start(self, state: State[Net], batch: Batch) -> None:
        reveal_type(state.model.temperature)  # reveals: float
        reveal_type(super().on_batch_start)  # reveals: def (state: State[Net], batch: dict[str, Tensor])


# Callbacks take nothing from what is known of the trainer.
reveal_type(Trainer(net, optimizer, step=my_step, callbacks=[WatchNet()]))  # reveals: Trainer[Net, dict[str, Tensor]]
bar = ProgressBar()
reveal_type(Trainer(net, optimizer, step=my_step, callbacks=[bar]))  # reveals: Trainer[Net, dict[str, Tensor]]
