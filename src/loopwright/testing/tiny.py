"""A tiny model, tiny data, a fit of two steps, and a recorder of hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callback import HOOKS, Callback
from loopwright.result import Result
from loopwright.state import Progress, State
from loopwright.trainer import Trainer


def tiny_model() -> nn.Module:
    """A model with a bit of everything that has a mode: 3 inputs, batch norm, dropout, 1 output; always the same.

    Returns:
        The model, newly made, on the CPU and in training mode.

    Examples:
        >>> tiny_model()(torch.ones(2, 3)).shape
        torch.Size([2, 1])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 1))


def tiny_data(samples: int = 8, batch_size: int = 4, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """A loader over ``samples`` pairs of inputs ``(3,)`` and targets ``(1,)``; always the same data.

    Args:
        samples: How many pairs.
        batch_size: How many of them are in a batch.
        shuffle: Draw a new order for each pass, from torch's generator.

    Returns:
        A loader whose batches are ``(inputs, targets)``.

    Examples:
        >>> [len(targets) for inputs, targets in tiny_data(samples=10)]
        [4, 4, 2]
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 3, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch_size, shuffle=shuffle)


def tiny_state() -> State:
    """A state as callbacks get it, for calling a hook by hand: a tiny model, SGD, on the CPU, nothing trained yet.

    Returns:
        The state, newly made.

    Examples:
        >>> state = tiny_state()
        >>> LearningRateMonitor().on_step_end(state)
        >>> state.metrics["lr"]
        0.1
    """
    model = tiny_model()
    return State(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.device("cpu"))


def tiny_trainer(callbacks: Iterable[Callback[Any]], **settings: Any) -> Trainer:
    """A trainer of a tiny model, with a seed, on the CPU."""
    model = tiny_model()
    settings = {"device": "cpu", "seed": 0, **settings}
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss(), callbacks=callbacks, **settings)


def two_step_fit(*callbacks: Callback[Any], epochs: int = 1, **settings: Any) -> tuple[Trainer, Result]:
    """A real fit: two optimizer steps an epoch, a validation after each epoch, on the CPU.

    Args:
        callbacks: The callbacks of the trainer.
        epochs: How many epochs.
        settings: Further arguments of ``Trainer``.

    Returns:
        The trainer and the result of its fit.

    Examples:
        >>> recorder = HookRecorder()
        >>> trainer, result = two_step_fit(recorder)
        >>> result.progress.step
        2
        >>> recorder.hooks[:4]
        ['setup', 'on_fit_start', 'on_epoch_start', 'on_batch_start']
    """
    trainer = tiny_trainer(callbacks, **settings)
    return trainer, trainer.fit(tiny_data(shuffle=True), tiny_data(), epochs=epochs)


@dataclass(frozen=True)
class Call:
    """One call of a hook: its name, and the stage and progress it saw.

    Attributes:
        hook: The hook's name.
        stage: ``state.stage`` at the call.
        progress: A copy of ``state.progress`` at the call.

    Examples:
        >>> recorder = HookRecorder()
        >>> trainer, result = two_step_fit(recorder)
        >>> [call.progress.step for call in recorder.calls if call.hook == "on_step_end"]
        [1, 2]
    """

    hook: str
    stage: str
    progress: Progress


class HookRecorder(Callback[Any]):
    """Writes down every hook that fires.

    Attributes:
        calls: What fired, in order.

    Examples:
        >>> recorder = HookRecorder()
        >>> trainer, result = two_step_fit(recorder)
        >>> recorder.hooks.count("on_step_end")
        2
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @property
    def hooks(self) -> list[str]:
        """The names alone."""
        return [call.hook for call in self.calls]

    def record(self, hook: str, state: State) -> None:
        """Take down one call. Override it to look at more of the state.

        Args:
            hook: The hook's name.
            state: What the run knows at the call.
        """
        self.calls.append(Call(hook, state.stage, dataclasses.replace(state.progress)))


def _recording(hook: str) -> Callable[..., None]:
    def record(self: HookRecorder, state: State, *_: object) -> None:
        self.record(hook, state)

    return record


for _hook in HOOKS:
    setattr(HookRecorder, _hook, _recording(_hook))
