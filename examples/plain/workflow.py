"""Document 004, its loop in plain PyTorch. Beside it: sdiff plain/workflow.py workflow.py."""

import torch
from torch import Tensor, nn

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


def predict(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        outputs: Tensor = model(x)
    return outputs


def train() -> tuple[LinearRegressionModel, list[float], Tensor, Tensor]:
    torch.manual_seed(42)
    (x_train, y_train), (x_test, _) = make_data()
    model = LinearRegressionModel()
    loss_fn = nn.L1Loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = predict(model, x_test)
    losses = []
    for _ in range(EPOCHS):
        model.train()
        y_pred = model(x_train)
        loss = loss_fn(y_pred, y_train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses, before, predict(model, x_test)


if __name__ == "__main__":
    model, losses, before, after = train()
    _, (x_test, y_test) = make_data()
    print(f"mean absolute error before: {nn.L1Loss()(before, y_test):.4f}, after: {nn.L1Loss()(after, y_test):.4f}")
    print(f"weight {model.weight.item():.4f} of {WEIGHT}, bias {model.bias.item():.4f} of {BIAS}")
