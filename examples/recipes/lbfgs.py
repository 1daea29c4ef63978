"""LBFGS on the whole data at once: an optimizer that evaluates the loss several times a step, through a closure."""

import torch
from torch import nn

from loopwright import Callback, Output, State, Trainer


class CountEvaluations(Callback):
    def __init__(self) -> None:
        self.evaluations = 0

    def on_backward_end(self, state: State, output: Output) -> None:
        self.evaluations += 1


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> tuple[float, int]:
    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    counting = CountEvaluations()
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[counting], device="cpu")
    trainer.fit([(x, torch.sin(x))], steps=steps)
    return trainer.evaluate([(x, torch.sin(x))])["test/loss"], counting.evaluations


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


if __name__ == "__main__":
    model = network()
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    loss, evaluations = train(lbfgs, model, steps=20)
    model = network()
    other, _ = train(torch.optim.SGD(model.parameters(), lr=0.1), model, steps=evaluations)
    print(f"LBFGS, 20 steps: below 0.0001: {loss < 1e-4}; SGD, for as many evaluations: {other < 1e-4}")
    print(f"evaluations a step: about {round(evaluations / 20, -1):.0f}")
