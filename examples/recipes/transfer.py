"""Transfer: what a network learned about the digits 0 to 4 stays frozen, and a new head learns 5 to 9 on top of it."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from loopwright import Trainer


def loader(low: int, part: slice) -> DataLoader[tuple[Tensor, ...]]:
    """Images of the five digits from ``low`` on, in batches."""
    digits = load_digits()
    wanted = (digits.target >= low) & (digits.target < low + 5)
    images = torch.tensor(digits.images[wanted][part] / 16, dtype=torch.float32).unsqueeze(1)
    return DataLoader(TensorDataset(images, torch.tensor(digits.target[wanted][part] - low)), 32, shuffle=True)


def fit(model: nn.Module, low: int, examples: int, epochs: int) -> float:
    """Train what is not frozen; the share of the held-out digits that it then tells right."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accuracy = MulticlassAccuracy(5, average="micro")
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": accuracy}, device="cpu")
    trainer.fit(loader(low, slice(examples)), epochs=epochs)
    return trainer.evaluate(loader(low, slice(500, None)))["test/accuracy"]


def backbone() -> nn.Sequential:
    """Eight by eight pixels to 128 numbers, with batch norm."""
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten())


def transfer() -> tuple[nn.Sequential, nn.Sequential, float]:
    torch.manual_seed(0)
    frozen = backbone()
    fit(nn.Sequential(frozen, nn.Linear(128, 5)), low=0, examples=500, epochs=8)

    frozen.requires_grad_(False)
    model = nn.Sequential(frozen, nn.Linear(128, 5)).train()
    frozen.eval()  # batch norm keeps its means: the trainer leaves every flag of a model in training mode as it is
    return frozen, model, fit(model, low=5, examples=30, epochs=60)


if __name__ == "__main__":
    frozen, model, right = transfer()
    trained, all_of_them = (sum(p.numel() for p in part.parameters()) for part in (model[1], model))
    print(f"trained on 30 digits: {trained} of {all_of_them} numbers; right on held-out ones: {right:.0%}")
    print(f"batches that batch norm has seen: {frozen[1].num_batches_tracked}, all of them of the first training")
