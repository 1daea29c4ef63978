"""Handwritten digits of scikit-learn, a small convolutional network, and metrics of torchmetrics."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from loopwright import Result, Trainer
from loopwright.callbacks import EarlyStopping


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(epochs: int = 8) -> tuple[Result, dict[str, float]]:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0 to 1
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val, test = random_split(data, [0.7, 0.15, 0.15])

    model = network()
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        nn.CrossEntropyLoss(),
        metrics={"accuracy": MulticlassAccuracy(10, average="micro"), "f1": MulticlassF1Score(10)},
        callbacks=[EarlyStopping("val/accuracy", mode="max", patience=3, restore_best=True)],
        device="cpu",
    )
    result = trainer.fit(DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256), epochs=epochs)
    return result, trainer.evaluate(DataLoader(test, batch_size=256))


if __name__ == "__main__":
    result, scores = train()
    print(f"epochs: {result.progress.epoch}")
    print(f"right on the test data: {scores['test/accuracy']:.0%}, F1 above 0.95: {scores['test/f1'] > 0.95}")
