"""Document 002: SimpleModel with Adam, the mean loss of every epoch, and an evaluation on unseen data.

The loop by hand: plain/training_loop.py. It prints the first of the two means; the second one falls in every epoch.

    $ python examples/training_loop.py
    Epoch [1/10], Loss over batches: 1.3411, over samples: 1.2318
    Epoch [2/10], Loss over batches: 1.0912, over samples: 1.2168
    ...
    Epoch [10/10], Loss over batches: 1.3161, over samples: 1.1271
    Test loss: 1.1650
"""

import torch
import torch.nn as nn
import torch.optim as optim
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Output, Result, State, Trainer


class SimpleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(x)
        return outputs


class PrintMeans(Callback):
    """Prints an epoch's mean loss as the document computes it, and as the trainer does.

    100 samples in batches of 32 make three batches of 32 and a last one of 4. The document divides the sum of the
    batch losses by 4, so that each of the last four samples counts eight times as much as any other. The trainer
    weights every batch by its size: the mean over the samples, whatever the batch size.
    """

    def on_epoch_start(self, state: State) -> None:
        self.losses: list[float] = []

    def on_batch_end(self, state: State, output: Output) -> None:
        self.losses.append(output.loss.item())

    def on_epoch_end(self, state: State) -> None:
        over_batches = sum(self.losses) / len(self.losses)
        over_samples = state.metrics["train/loss"]
        state.log("train/loss_over_batches", over_batches)
        epoch, epochs = state.progress.epoch, state.plan.epochs
        print(f"Epoch [{epoch}/{epochs}], Loss over batches: {over_batches:.4f}, over samples: {over_samples:.4f}")


def train(*callbacks: Callback) -> tuple[Trainer[SimpleModel], Result]:
    torch.manual_seed(0)
    inputs = torch.randn(100, 10)
    targets = torch.randn(100, 1)
    dataset = TensorDataset(inputs, targets)
    dataloader = DataLoader(dataset, batch_size=32, shuffle=True)

    model = SimpleModel()
    criterion = nn.MSELoss()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    trainer = Trainer(model, optimizer, criterion, callbacks=[PrintMeans(), *callbacks], device="cpu")
    return trainer, trainer.fit(dataloader, epochs=10)


def evaluate(trainer: Trainer[SimpleModel]) -> tuple[Tensor, float]:
    test_inputs = torch.randn(50, 10)
    test_targets = torch.randn(50, 1)
    # No model.eval() and no torch.no_grad() here: both calls set them, and put every flag back.
    outputs = torch.cat(trainer.predict([test_inputs]))
    scores = trainer.evaluate([(test_inputs, test_targets)])
    return outputs, scores["test/loss"]


if __name__ == "__main__":
    trainer, result = train()
    outputs, test_loss = evaluate(trainer)
    print(f"Test loss: {test_loss:.4f}")
