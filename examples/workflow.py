"""Document 004: the workflow around the loop: a line, a split, a model of one's own, predictions, a picture.

The loop by hand: plain/workflow.py.

    $ python examples/workflow.py
    mean absolute error before: 0.4945, after: 0.0084
    weight 0.6990 of 0.7, bias 0.3093 of 0.3
    picture: runs/workflow.png
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from loopwright import Callback, Trainer

EPOCHS = 200
WEIGHT, BIAS = 0.7, 0.3


class LinearRegressionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 1))
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def make_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A straight line, split into its first 80 % for training and the rest for testing."""
    x = torch.arange(0, 1, 0.02).unsqueeze(dim=1)
    y = WEIGHT * x + BIAS
    split = int(0.8 * len(x))
    return (x[:split], y[:split]), (x[split:], y[split:])


def train(*callbacks: Callback) -> tuple[LinearRegressionModel, Tensor, Tensor]:
    """The trained model, and its predictions for the test data before and after."""
    torch.manual_seed(42)
    train_batch, test_batch = make_data()
    model = LinearRegressionModel()
    loss_fn = nn.L1Loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, loss_fn, callbacks=callbacks, device="cpu")
    (before,) = trainer.predict([test_batch])  # one output a batch
    trainer.fit([train_batch], epochs=EPOCHS)
    (after,) = trainer.predict([test_batch])
    return model, before, after


def plot(path: Path, before: Tensor, after: Tensor) -> None:
    (x_train, y_train), (x_test, y_test) = make_data()
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    ax = figure.subplots()
    ax.plot(x_train, y_train, "o", color="#2f6db3", markersize=5, label="training data")
    ax.plot(x_test, y_test, "o", color="#3f9b57", markersize=5, label="test data")
    ax.plot(x_test, before, "x", color="0.6", markersize=5, label="predictions before training")
    ax.plot(x_test, after, "x", color="#d9731a", markersize=6, markeredgewidth=1.8, label="predictions after")
    ax.set(xlabel="x", ylabel="y", title=f"y = {WEIGHT} x + {BIAS}, learned with L1 loss and SGD")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92")
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    model, before, after = train()
    _, (x_test, y_test) = make_data()
    print(f"mean absolute error before: {nn.L1Loss()(before, y_test):.4f}, after: {nn.L1Loss()(after, y_test):.4f}")
    print(f"weight {model.weight.item():.4f} of {WEIGHT}, bias {model.bias.item():.4f} of {BIAS}")
    plot(Path("runs/workflow.png"), before, after)
    print("picture: runs/workflow.png")
