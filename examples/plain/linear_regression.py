"""Document 001, the loop as it writes it. Beside it: sdiff plain/linear_regression.py linear_regression.py."""

import torch
from torch import Tensor, nn, optim

EPOCHS = 100


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 1, generator=generator)
    noise = torch.randn(100, 1, generator=generator)
    return x, 3 * x + 0.2 * noise


def train() -> tuple[nn.Linear, list[float]]:
    torch.manual_seed(0)
    x, y = make_data()
    model = nn.Linear(1, 1)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(EPOCHS):
        y_pred = model(x)
        loss = criterion(y_pred, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


if __name__ == "__main__":
    model, losses = train()
    print(f"loss after {EPOCHS} epochs: {losses[-1]:.4f}")
    for name, param in model.named_parameters():
        print(name, param.data)
