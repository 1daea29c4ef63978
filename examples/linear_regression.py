"""Document 001: y = 3x + noise, and what forward, backward and update do in the first steps.

The loop by hand: plain/linear_regression.py; with the gradients by hand, too: plain/linear_regression_numpy.py.

    $ python examples/linear_regression.py
    step 1
      forward   y_pred = -0.0075 x + 0.5364, loss 9.5313
    ...
    loss after 100 epochs: 0.0334
    weight tensor([[2.9762]])
    bias tensor([0.0319])
"""

import torch
from torch import Tensor, nn, optim

from loopwright import Callback, Output, Result, State, Trainer

EPOCHS = 100


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 1, generator=generator)
    noise = torch.randn(100, 1, generator=generator)
    return x, 3 * x + 0.2 * noise


class ShowSteps(Callback):
    """Prints forward, backward and update of the first steps, for the weight of a ``Linear(1, 1)``."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_batch_start(self, state: State, batch: tuple[Tensor, Tensor]) -> None:
        weight, bias = state.model.parameters()
        self.weight, self.bias = weight.item(), bias.item()
        # The loop has not called zero_grad yet: the gradient of the step before is still there.
        self.left = None if weight.grad is None else weight.grad.item()

    def on_batch_end(self, state: State, output: Output) -> None:
        if state.progress.step > self.steps:
            return
        weight, _ = state.model.parameters()
        assert weight.grad is not None
        gradient, lr = weight.grad.item(), state.optimizer.param_groups[0]["lr"]
        print(f"step {state.progress.step}")
        print(f"  forward   y_pred = {self.weight:.4f} x + {self.bias:.4f}, loss {output.loss:.4f}")
        print(f"  backward  d loss / d weight = {gradient:.4f}")
        if self.left is not None:
            total = self.left + gradient
            print(f"            (without zero_grad {self.left:.4f} + {gradient:.4f} = {total:.4f})")
        print(f"  update    weight = {self.weight:.4f} - {lr} * {gradient:.4f} = {weight.item():.4f}")


def train(*callbacks: Callback) -> tuple[nn.Linear, Result]:
    torch.manual_seed(0)
    x, y = make_data()
    model = nn.Linear(1, 1)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, criterion, callbacks=callbacks, device="cpu")
    # A loader is any iterable of batches. Here it is a list that holds the only one, all of the data.
    return model, trainer.fit([(x, y)], epochs=EPOCHS)


if __name__ == "__main__":
    model, result = train(ShowSteps(3))
    print(f"loss after {EPOCHS} epochs: {result.history[-1]['train/loss']:.4f}")
    for name, param in model.named_parameters():
        print(name, param.data)
