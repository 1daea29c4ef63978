"""Document 003: the canonical step, watched: does it learn, converge, diverge; and is it deterministic.

The loop by hand, plain/fundamentals.py, goes on with nan where this one stops.

    $ python examples/fundamentals.py
    lr 0.02: loss 3.732 1.605 0.694 0.306 0.140 0.068 0.037 0.023 0.017 0.014 0.013 0.012 0.012 0.012
             stopped: train/loss did not improve in 3 evaluations; ...
    lr 2.0:  [non-finite] the loss is inf in epoch 4, batch 6, ...
    lr 1.0:  stopped: diverging: the loss rose from 25.25 to 470.9
    two runs give the same bits: True
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, NonFiniteError, Result, State, Trainer
from loopwright.callbacks import EarlyStopping


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randn(200, 3)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(200, 1)
    return DataLoader(TensorDataset(inputs, targets), batch_size=20, shuffle=True)


def train(lr: float, *callbacks: Callback, epochs: int = 20) -> tuple[nn.Linear, Result]:
    torch.manual_seed(0)
    loader, model = make_loader(), nn.Linear(3, 1)
    loss_fn = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trainer = Trainer(model, optimizer, loss_fn, callbacks=callbacks, device="cpu")
    return model, trainer.fit(loader, epochs=epochs)


class StopOnDivergence(Callback):
    """Stops the run when an epoch's loss is more than ten times the lowest so far."""

    def setup(self, state: State) -> None:
        self.lowest = float("inf")

    def on_epoch_end(self, state: State) -> None:
        loss = state.metrics["train/loss"]
        if loss > 10 * self.lowest:
            state.stop(f"diverging: the loss rose from {self.lowest:.4g} to {loss:.4g}")
        self.lowest = min(self.lowest, loss)


def learning() -> Result:
    """It learns, and stops when another epoch no longer helps."""
    _, result = train(0.02, EarlyStopping("train/loss", mode="min", patience=3, min_delta=0.001))
    print("lr 0.02: loss", " ".join(f"{row['train/loss']:.3f}" for row in result.history))
    print(f"         stopped: {result.stop_reason}")
    return result


def diverging() -> Result:
    """It diverges. Numbers too large for a float are an error by themselves; large ones are for a callback to judge."""
    try:
        train(2.0)
    except NonFiniteError as error:
        print(f"lr 2.0:  {error}")
    _, result = train(1.0, StopOnDivergence())  # without it: 20 epochs of finite losses, the last above 1e26
    print(f"lr 1.0:  stopped: {result.stop_reason}")
    return result


def deterministic() -> bool:
    """The same seed gives the same losses and the same weights, bit for bit."""
    (model, result), (again, result_again) = train(0.02), train(0.02)
    same = torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)
    return same and result.history == result_again.history


if __name__ == "__main__":
    learning()
    diverging()
    print(f"two runs give the same bits: {deterministic()}")
