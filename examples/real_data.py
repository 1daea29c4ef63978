"""Real data: a small network with early stopping beside ridge regression, on scikit-learn's bundled diabetes data.

Ten measurements of 442 patients; the target, from 25 to 346, says how far the disease went on within a year. One seed
is one split: over the seeds 1 to 30 the means are 45.0 against 45.4 and 0.465 against 0.457, the network's R2 the
higher in 21.

    $ python examples/real_data.py
    89 patients held out     MAE      R2
    ridge regression        45.8   0.345
    network                 44.3   0.378
    stopped after epoch 44, back to epoch 24: runs/real_data.png
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Result, Trainer
from loopwright.callbacks import EarlyStopping, ProgressBar


class Score:
    """Makes a function of scikit-learn's a metric: it takes all targets and predictions of a pass at once."""

    def __init__(self, function: Callable[[Tensor, Tensor], float], unit: float = 1.0) -> None:
        self.function, self.unit = function, unit

    def reset(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.batches.append((targets, predictions))

    def compute(self) -> float:
        targets, predictions = zip(*self.batches, strict=True)
        return self.unit * self.function(torch.cat(targets), torch.cat(predictions))


def make_data(seed: int) -> tuple[list[TensorDataset], float]:
    """60 % to train, 20 % to validate, 20 % held out, standardised by the first; and the target's spread."""
    columns = np.column_stack(load_diabetes(return_X_y=True, scaled=False))
    parts = np.split(np.random.default_rng(seed).permutation(len(columns)), [265, 353])
    mean, spread = columns[parts[0]].mean(axis=0), columns[parts[0]].std(axis=0)
    scaled = torch.tensor((columns - mean) / spread).float()
    return [TensorDataset(scaled[part, :10], scaled[part, 10:]) for part in parts], float(spread[10])


def compare(seed: int, *callbacks: Callback) -> tuple[dict[str, tuple[float, float]], Result]:
    """MAE and R2 of both on the held-out part, and how the network's training went."""
    (train, val, test), spread = make_data(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Dropout(0.4), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=1.0)
    metrics = {"mae": Score(mean_absolute_error, unit=spread), "r2": Score(r2_score)}
    watch = [EarlyStopping("val/loss", mode="min", patience=20, restore_best=True), *callbacks]
    trainer = Trainer(model, optimizer, nn.MSELoss(), metrics=metrics, callbacks=watch, device="cpu")
    result = trainer.fit(DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=88), epochs=300)
    network = trainer.evaluate(DataLoader(test, batch_size=89))

    # Ridge regression needs no validation part, so it learns from that one as well.
    x, y = (torch.cat(both) for both in zip(train.tensors, val.tensors, strict=True))
    x_test, y_test = test.tensors
    ridge = RidgeCV(np.logspace(-2, 4, 25)).fit(x, y).predict(x_test).reshape(-1, 1)
    by_ridge = spread * float(mean_absolute_error(y_test, ridge)), float(r2_score(y_test, ridge))
    return {"ridge regression": by_ridge, "network": (network["test/mae"], network["test/r2"])}, result


if __name__ == "__main__":
    rows, result = compare(0, ProgressBar())
    print(f"{'89 patients held out':<22}{'MAE':>6}{'R2':>8}")
    for name, (mae, r2) in rows.items():
        print(f"{name:<22}{mae:>6.1f}{r2:>8.3f}")
    result.plot("runs/real_data.png")
    print(f"stopped after epoch {result.progress.epoch}, back to epoch {result.restored_epoch}: runs/real_data.png")
