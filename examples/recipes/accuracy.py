"""The accuracy of a classifier: of the validation, by a metric beside ``loss=``, and of the training too, by a step."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Output, Trainer


class Accuracy:
    def reset(self) -> None:
        self.right = self.seen = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.right += int((logits.argmax(1) == labels).sum())
        self.seen += len(labels)

    def compute(self) -> float:
        return self.right / self.seen


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Output:
    inputs, labels = batch
    logits = model(inputs)
    right = (logits.argmax(1) == labels).float().mean()
    return Output(nn.functional.cross_entropy(logits, labels), metrics={"accuracy": right})


def train(*, by_step: bool) -> dict[str, float]:
    """The last row of a history; both ways train the same."""
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    data = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
    train, val = torch.utils.data.random_split(data, [150, 50])
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    if by_step:
        trainer = Trainer(model, optimizer, step=classify, device="cpu")
    else:
        measured = {"accuracy": Accuracy()}
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=measured, device="cpu")
    return trainer.fit(DataLoader(train, 20, shuffle=True), DataLoader(val, 20), epochs=20).history[-1]


if __name__ == "__main__":
    by_metric, by_step = train(by_step=False), train(by_step=True)
    print(list(by_metric))
    print(list(by_step))
    print(f"the same of the validation: {abs(by_metric['val/accuracy'] - by_step['val/accuracy']) < 1e-6}")
