"""Document 002, the loop as it writes it. Beside it: sdiff plain/training_loop.py training_loop.py."""

import torch
import torch.nn as nn
import torch.optim as optim
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class SimpleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(x)
        return outputs


def train() -> tuple[SimpleModel, list[float]]:
    torch.manual_seed(0)
    inputs = torch.randn(100, 10)
    targets = torch.randn(100, 1)
    dataset = TensorDataset(inputs, targets)
    dataloader = DataLoader(dataset, batch_size=32, shuffle=True)

    model = SimpleModel()
    criterion = nn.MSELoss()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    num_epochs = 10

    losses = []
    for epoch in range(num_epochs):
        model.train()
        running_loss = 0.0
        for inputs_batch, targets_batch in dataloader:
            optimizer.zero_grad()
            outputs = model(inputs_batch)
            loss = criterion(outputs, targets_batch)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            losses.append(loss.item())
        print(f"Epoch [{epoch + 1}/{num_epochs}], Loss: {running_loss / len(dataloader)}")
    return model, losses


def evaluate(model: SimpleModel) -> tuple[Tensor, float]:
    test_inputs = torch.randn(50, 10)
    test_targets = torch.randn(50, 1)
    criterion = nn.MSELoss()
    model.eval()
    with torch.no_grad():
        outputs = model(test_inputs)
        loss = criterion(outputs, test_targets)
    return outputs, loss.item()


if __name__ == "__main__":
    model, losses = train()
    outputs, test_loss = evaluate(model)
    print(f"Test loss: {test_loss}")
