"""Document 000, the loop as it writes it. Beside it: sdiff plain/synthetic_regression.py synthetic_regression.py."""

import torch
from torch import Tensor, nn, optim
from torch.nn import MSELoss
from torch.utils.data import DataLoader, TensorDataset

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
    )


def train() -> tuple[nn.Sequential, list[float]]:
    torch.manual_seed(0)
    dataloader, model = make_loader(), make_model()
    criterion = MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for epoch in range(EPOCHS):
        running_loss = 0.0
        for feature, target in dataloader:
            optimizer.zero_grad()
            pred = model(feature).squeeze()
            loss = criterion(pred, target)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            losses.append(loss.item())
        print(f"epoch {epoch + 1:2}: loss {running_loss / len(dataloader):.4f}")
    return model, losses


if __name__ == "__main__":
    train()
