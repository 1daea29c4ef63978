"""Document 000: a small network on synthetic data, in mini-batches. The loop by hand: plain/synthetic_regression.py.

$ python examples/synthetic_regression.py
epoch  1: loss 10.4515
epoch  2: loss 9.5686
...
epoch 20: loss 0.0088
"""

import torch
from torch import Tensor, nn, optim
from torch.nn import MSELoss
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Result, State, Trainer

EPOCHS = 20


def generate_synthetic_regression_data(samples: int, features: int) -> tuple[Tensor, Tensor]:
    """A linear target with noise, in doubles; the labels are of shape (samples,)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    weights = torch.randn(features, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    return inputs, inputs @ weights + 0.1 * noise


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    features, labels = generate_synthetic_regression_data(100, 10)
    dataset = TensorDataset(features.float(), labels.float())
    return DataLoader(dataset, batch_size=10, shuffle=True)


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(10, 5),
        nn.Linear(5, 3),
        nn.Linear(3, 1),
        # The document squeezes the prediction in its loop. Left as they are, predictions of shape (10, 1) against
        # labels of shape (10,) would be broadcast to 100 differences; the trainer refuses them. Here the model says
        # what it predicts: one number a sample. Unlike squeeze(), this keeps a batch of a single sample a batch.
        nn.Flatten(start_dim=0),
    )


class PrintLoss(Callback):
    def on_epoch_end(self, state: State) -> None:
        print(f"epoch {state.progress.epoch:2}: loss {state.metrics['train/loss']:.4f}")


def train(*callbacks: Callback) -> tuple[nn.Sequential, Result]:
    torch.manual_seed(0)
    dataloader, model = make_loader(), make_model()
    criterion = MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    # The loop is gone: zero_grad, forward, loss, backward and step happen in fit, in this order.
    trainer = Trainer(model, optimizer, criterion, callbacks=[PrintLoss(), *callbacks], device="cpu")
    return model, trainer.fit(dataloader, epochs=EPOCHS)


if __name__ == "__main__":
    train()
