"""Real data: a network with early stopping beside ridge regression, on scikit-learn's bundled diabetes data.

Ten measurements of 442 patients; the target is a score, from 25 to 346, of how the disease went on in a year.

$ python examples/real_data.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Result, Trainer
from loopwright.callbacks import EarlyStopping


class Score:
    """A score of scikit-learn's as a metric: it wants all targets and all predictions of a pass at once."""

    def __init__(self, function, scale: float = 1.0) -> None:
        self.function, self.scale = function, scale
        self.reset()

    def reset(self) -> None:
        self.targets: list[Tensor] = []
        self.predictions: list[Tensor] = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.targets.append(targets)
        self.predictions.append(predictions)

    def compute(self) -> float:
        return self.scale * self.function(torch.cat(self.targets), torch.cat(self.predictions))


def make_data(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset, float]:
    """60 % to train, 20 % to validate, 20 % held out, standardised by the first; and the target's spread."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    train, val, test = np.split(np.random.default_rng(seed).permutation(len(y)), [265, 353])
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    spread = y[train].std()
    y = (y[:, None] - y[train].mean()) / spread
    inputs, targets = torch.tensor(x).float(), torch.tensor(y).float()
    parts = [TensorDataset(inputs[part], targets[part]) for part in (train, val, test)]
    return *parts, spread


def make_model() -> nn.Sequential:
    hidden = (nn.Linear(10, 64), nn.SiLU(), nn.Dropout(0.4), nn.Linear(64, 64), nn.SiLU(), nn.Dropout(0.4))
    return nn.Sequential(*hidden, nn.Linear(64, 1))


def compare(seed: int = 0):
    torch.manual_seed(seed)
    train, val, test, spread = make_data(seed)
    metrics = {"mae": Score(mean_absolute_error, spread), "r2": Score(r2_score)}
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=1.0)
    stop = EarlyStopping("val/loss", mode="min", patience=20, restore_best=True)
    trainer = Trainer(model, optimizer, nn.MSELoss(), metrics=metrics, callbacks=[stop], device="cpu")
    result = trainer.fit(DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=88), epochs=300)
    s = trainer.evaluate(DataLoader(test, batch_size=89))
    fit = [torch.cat(t) for t in zip(train.tensors, val.tensors)]
    p = torch.tensor(RidgeCV(np.logspace(-2, 4, 25)).fit(fit[0].numpy(), fit[1].numpy()[:, 0]).predict(test.tensors[0].numpy()))[:, None]
    rows=[]
    for m in metrics.values():
        m.reset(); m.update(p, test.tensors[1]); rows.append(m.compute())
    return rows+[s["test/mae"], s["test/r2"], len(result.history), result.restored_epoch]

if __name__ == "__main__":
    for c in range(3): print(compare(c))
    R=np.array([compare(i) for i in range(1, 31)])
    print(R.mean(0), (R[:,2]<R[:,0]).sum(), (R[:,3]>R[:,1]).sum(), R.std(0))
