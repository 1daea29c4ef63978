"""An exponential moving average of the weights, for validation and test. The training is the same without it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from loopwright import Callback, State, Trainer


class WeightAverage(Callback):
    def __init__(self, model: nn.Module, decay: float = 0.95) -> None:
        self._model, self._swapped = model, False
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch has no annotation there

    def on_fit_start(self, state: State) -> None:
        self.average.module.to(state.device)  # and not its counter, which is read at every step
        if state.progress.fresh:
            self.average.n_averaged.zero_()  # the first step begins it

    def on_step_end(self, state: State) -> None:
        self.average.update_parameters(self._model)

    def on_eval_start(self, state: State) -> None:
        self._swap(bool(self.average.n_averaged))  # there is none before the first step

    def on_eval_end(self, state: State) -> None:
        self._swap(False)

    def teardown(self, state: State) -> None:
        self._swap(False)  # an error has ended the pass

    def state_dict(self) -> dict[str, Any]:
        self._swap(False)  # a signal has ended the pass, and what is saved are the weights of the training
        return {"average": dict(self.average.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.load_state_dict(state["average"])

    @torch.no_grad()
    def _swap(self, swapped: bool) -> None:
        if swapped != self._swapped:
            for own, averaged in zip(self._model.parameters(), self.average.module.parameters(), strict=True):
                held = own.clone()
                own.copy_(averaged)
                averaged.copy_(held)
            self._swapped = swapped


if __name__ == "__main__":
    torch.manual_seed(0)
    data = [(x, x.sum(1, keepdim=True) + torch.randn(4, 1)) for x in torch.randn(64, 4, 8)]
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[WeightAverage(model)], device="cpu")
    result = trainer.fit(data[:32], data[32:], epochs=5)
    last = Trainer(model, optimizer, nn.MSELoss(), device="cpu").evaluate(data[32:])["test/loss"]
    print(f"the average is better than the last weights: {result.history[-1]['val/loss'] < last}")
