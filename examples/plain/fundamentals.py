"""Document 003, its canonical step in a loop. Beside it: sdiff plain/fundamentals.py fundamentals.py."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randn(200, 3)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(200, 1)
    return DataLoader(TensorDataset(inputs, targets), batch_size=20, shuffle=True)


def train(lr: float, epochs: int = 20) -> tuple[nn.Linear, list[float]]:
    torch.manual_seed(0)
    loader, model = make_loader(), nn.Linear(3, 1)
    loss_fn = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            predictions = model(inputs)
            loss = loss_fn(predictions, targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    _, losses = train(lr=0.02)
    print(f"lr 0.02: loss {losses[0]:.4f} in the first batch, {losses[-1]:.4f} in the last")
    _, losses = train(lr=2.0)
    print(f"lr 2.0: loss {losses[0]:.4f} in the first batch, {losses[-1]:.4f} in the last")  # and nobody was told
