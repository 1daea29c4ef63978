"""A second validation set, under a name of its own: a callback has a second trainer evaluate it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Result, State, Trainer
from loopwright.callbacks import EarlyStopping


class AlsoEvaluate(Callback):
    """Evaluates ``data`` at the end of each epoch, and logs what comes of it as ``<name>/loss`` and so on."""

    def __init__(self, judge: Trainer[Any, Any], data: Iterable[Any], name: str) -> None:
        self._judge, self._data, self._name = judge, data, name

    def on_epoch_end(self, state: State) -> None:
        for name, value in self._judge.evaluate(self._data, name=self._name).items():
            state.log(name, value)


def loader(noise: float, size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(size, 3)
    data = TensorDataset(x, x.sum(1, keepdim=True) + noise * torch.randn(size, 1))
    # A generator of its own, for a loader draws a number at each pass, and the training goes on from what it left.
    return DataLoader(data, batch_size=16, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


def train(epochs: int = 5) -> Result:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, train, clean, noisy = nn.MSELoss(), loader(0.1, 64, shuffle=True), loader(0.1, 40), loader(1.0, 40)
    also = AlsoEvaluate(Trainer(model, optimizer, loss, device="cpu"), noisy, name="noisy")
    stopping = EarlyStopping("noisy/loss", mode="min", patience=5)  # after it in the list
    trainer = Trainer(model, optimizer, loss, callbacks=[also, stopping], device="cpu")
    return trainer.fit(train, clean, epochs=epochs)


if __name__ == "__main__":
    row = train().history[-1]
    print(list(row))
    print(f"the noisy data has the larger loss: {row['noisy/loss'] > row['val/loss']}")
