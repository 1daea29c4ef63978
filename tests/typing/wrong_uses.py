"""A user's project with mistakes: mypy reports each on its line, under the code named there, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from loopwright import Callback, Every, LossFn, Output, Schedule, State, Step, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping

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


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Pairs:
    def __iter__(self) -> Iterator[Pair]:
        yield torch.randn(8, 3), torch.randn(8, 1)


class Batches:
    def __iter__(self) -> Iterator[Batch]:
        yield {"x": torch.randn(8, 3), "y": torch.randn(8, 1)}


def step(model: Net, batch: Batch) -> Output:
    return Output(model(batch["x"]).sum())


def other_step(model: Other, batch: Batch) -> Output:
    return Output(model(batch["x"]).sum())


def step_without_batch(model: Net) -> Tensor:
    return model.linear.weight.sum()


def step_without_loss(model: Net, batch: Batch) -> None:
    model(batch["x"]).sum().backward()


net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
trainer = Trainer(net, optimizer, step=step)
of_pairs: Trainer[Net, Pair] = Trainer(net, optimizer, nn.MSELoss())
list_of_pairs = [(torch.randn(8, 3), torch.randn(8, 1))]

# Batches of another type than the step's.
trainer.fit(Pairs(), epochs=1)  # error: arg-type
trainer.fit(list_of_pairs, epochs=1)  # error: arg-type
trainer.fit([torch.randn(8, 3)], epochs=1)  # error: list-item
trainer.fit(Batches(), Pairs(), epochs=1)  # error: arg-type
trainer.fit(torch.utils.data.TensorDataset(torch.randn(8, 3)), epochs=1)  # error: arg-type
trainer.evaluate(Pairs())  # error: arg-type
of_pairs.fit(Batches(), epochs=1)  # error: arg-type

# Steps that do not fit the model, or return no loss.
Trainer(net, optimizer, step=other_step)  # error: arg-type
Trainer(net, optimizer, step=step_without_batch)  # error: arg-type
Trainer(net, optimizer, step=step_without_loss)  # error: arg-type
Trainer(net, optimizer, step=lambda model, batch: model.temperature)  # error: arg-type; return-value
Trainer(net, optimizer, step=lambda model, batch: model.forward("x").sum())  # error: arg-type
Trainer(net, optimizer, step=lambda model: model.temperature)  # error: arg-type; misc
named_step: Step[Net, Pair] = step  # error: assignment
of_other: Trainer[Other, Batch] = trainer  # error: assignment
loss: LossFn = len  # error: assignment
Output(1.0)  # error: arg-type
Output(torch.zeros(()), wieght=8)  # error: call-arg

# Misspelt, missing and misplaced arguments.
Trainer(net, optimizer, step=step, presicion="bf16")  # error: call-arg
Trainer(net, optimizer, nn.MSELoss(), step)  # error: call-arg
Trainer(net)  # error: call-arg
Trainer(net, net.parameters(), step=step)  # error: arg-type
trainer.fit(epochs=1)  # error: call-arg
trainer.fit(Batches(), epoch=1)  # error: call-arg
trainer.fit(Batches(), epochs=1, validate=10)  # error: arg-type
EarlyStopping("val/loss")  # error: call-arg
EarlyStopping("val/loss", "min")  # error: call-arg
CSVLogger("metrics.csv", every=10)  # error: arg-type
Every(step=10)  # error: call-arg
Every(10)  # error: call-arg
Schedule(StepLR(optimizer, 10))  # error: call-arg

# Words that are none of those there are.
Trainer(net, optimizer, step=step, precision="fp8")  # error: arg-type
Trainer(net, optimizer, step=step, on_nonfinite="warn")  # error: arg-type
EarlyStopping("val/loss", mode="minimum")  # error: arg-type
Schedule(StepLR(optimizer, 10), each="batch")  # error: arg-type
Schedule(ReduceLROnPlateau(optimizer), each="epoch", monitor=nn.MSELoss())  # error: arg-type

# What a run knows: the model is the user's own class, metrics are read and logged, values are numbers.
trainer.state.model.forward("x")  # error: arg-type
trainer.state.model.temperature.item()  # error: attr-defined
trainer.state.metrics["train/mine"] = 1.0  # error: index
trainer.state.metrics["train/loss"].item()  # error: attr-defined
trainer.state.log("train/mine", "high")  # error: arg-type
trainer.state.stop()  # error: call-arg
if trainer.state.stage == "validation":  # error: comparison-overlap
    pass
history = trainer.fit(Batches(), epochs=1).histroy  # error: attr-defined
trainer.predict(Batches(), forward=lambda model, batch: model.forward("x"))  # error: arg-type
state_of_other: State[Other] = trainer.state  # error: assignment


# Hooks that the loop would call with other arguments.
class TooMany(Callback):
    def on_epoch_end(self, state: State, output: Output) -> None: ...  # error: override


class TooFew(Callback):
    def on_batch_end(self, state: State) -> None: ...  # error: override


class OtherBatch(Callback[Batch]):
    def on_batch_start(self, state: State, batch: Pair) -> None: ...  # error: override


class NoState(Callback):
    def on_fit_end(self, state: Trainer) -> None: ...  # error: override


Trainer(net, optimizer, step=step, callbacks=[EarlyStopping])  # error: list-item
Trainer(net, optimizer, step=step, callbacks=EarlyStopping("val/loss", mode="min"))  # error: arg-type


# Metrics that are none.
class WithoutReset:
    def update(self, predictions: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> float:
        return 0.0


Trainer(net, optimizer, step=step, metrics={"mine": WithoutReset()})  # error: dict-item
Trainer(net, optimizer, step=step, metrics=[WithoutReset()])  # error: arg-type


class OtherModel(Callback[Batch, Net]):
    def on_epoch_end(self, state: State[Other]) -> None: ...  # error: override


class NoModel(Callback[Batch, int]): ...  # error: type-var
