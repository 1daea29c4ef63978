"""Document 001's manual version: the gradients worked out by hand, the weights updated by hand, in NumPy.

$ python examples/plain/linear_regression_numpy.py
loss after 100 epochs: 0.0421
weight 3.0187
bias 0.0079
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EPOCHS = 100


class Step(NamedTuple):
    """One step: the loss before the update, and the parameters after it."""

    loss: np.float32
    weight: np.float32
    bias: np.float32


def make_data() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(0)
    x = random.standard_normal((100, 1), dtype=np.float32)
    noise = random.standard_normal((100, 1), dtype=np.float32)
    return x, 3 * x + np.float32(0.2) * noise


def train(x: NDArray[np.float32], y: NDArray[np.float32], weight: float, bias: float) -> list[Step]:
    """All the steps from these first parameters, in float32 as torch computes them."""
    learning_rate = np.float32(0.1)
    w, b = np.float32(weight), np.float32(bias)
    steps = []
    for _ in range(EPOCHS):
        y_pred = x * w + b
        error = y_pred - y
        loss = np.mean(error**2)
        # loss = mean((x w + b - y)^2), so by the chain rule d loss/d y_pred = 2 error / n, and from there:
        gradient_w = np.mean(2 * error * x)  # y_pred changes by x with w
        gradient_b = np.mean(2 * error)  # and by 1 with b
        w = w - learning_rate * gradient_w
        b = b - learning_rate * gradient_b
        steps.append(Step(loss, w, b))
    return steps


if __name__ == "__main__":
    last = train(*make_data(), weight=0.0, bias=0.0)[-1]
    print(f"loss after {EPOCHS} epochs: {last.loss:.4f}")
    print(f"weight {last.weight:.4f}")
    print(f"bias {last.bias:.4f}")
