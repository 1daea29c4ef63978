"""A tiny model, tiny data, and a trainer over them, each built anew and always the same."""

from __future__ import annotations

import functools
import itertools
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import loopwright
from loopwright import Callback, Result, State, Trainer
from loopwright.testing import HookRecorder

Samples = tuple[Tensor, Tensor]  # inputs (n, 3) and targets (n, 1)


def some_batches(count: int = 3, size: int = 2, *, seed: int = 0) -> list[Samples]:
    """Ready-made batches of one size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=generator), torch.randn(size, 1, generator=generator)) for _ in range(count)
    ]


class Spare(nn.Module):
    """It has a lazy part that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 1), nn.LazyLinear(4)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.used(inputs)
        return out


class Unsized:
    """Batches in their order, without a length."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def small_model() -> nn.Module:
    """Batch norm frozen in eval mode, dropout in training mode: modes that have to be put back one by one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
    model[1].eval()
    return model


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(parameters, lr=0.05)


def small_trainer(
    *callbacks: Callback[Any],
    model: nn.Module | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = sgd,
    **settings: Any,
) -> Trainer:
    """A trainer on the CPU with MSELoss, or with ``step=`` where the settings have it."""
    model = small_model() if model is None else model
    loss = None if "step" in settings else nn.MSELoss()
    return Trainer(model, optimizer(model.parameters()), loss, callbacks=callbacks, device="cpu", **settings)


def weights_of(trainer: Trainer) -> list[Tensor]:
    """Copies of the model's parameters and buffers."""
    return [value.detach().clone() for value in trainer.state.model.state_dict().values()]


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Copies of the gradients of all parameters, which must be there."""
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def all_equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two rows of tensors are the same, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def library_frames(error: BaseException) -> list[str]:
    """The library's functions in an error's traceback, outermost first."""
    folder = Path(loopwright.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if Path(frame.filename).is_relative_to(folder)]


def line(*, seed: int = 0) -> nn.Linear:
    """A linear model of 3 inputs and 1 output; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


def ragged(*sizes: int, seed: int = 1) -> list[Samples]:
    """A batch of inputs ``(n, 3)`` and targets ``(n, 1)`` for each size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, 3, generator=generator) for n in sizes]
    return [(x, x.sum(1, keepdim=True) + torch.randn(len(x), 1, generator=generator)) for x in inputs]


def line_trainer(model: nn.Module | None = None, *, lr: float = 0.1, **settings: Any) -> Trainer:
    """A trainer on the CPU of a line, or of ``model``, by plain SGD; with MSELoss, or what the settings have."""
    model = line() if model is None else model
    settings.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=lr))
    if "step" not in settings:
        settings.setdefault("loss", nn.MSELoss())
    return Trainer(model, device="cpu", **settings)


class At(Callback[Any]):
    """A callback made of functions: ``At(on_step_end=lambda state: ...)``."""

    def __init__(self, **hooks: Callable[..., object]) -> None:
        for name, function in hooks.items():
            assert hasattr(Callback, name), name
            setattr(self, name, function)


class StopsIn(HookRecorder):
    """Orders a stop at one call of one hook."""

    def __init__(self, hook: str, call: int = 1, reason: str = "enough") -> None:
        super().__init__()
        self.hook, self.call, self.reason = hook, call, reason

    def record(self, hook: str, state: State) -> None:
        super().record(hook, state)
        if hook == self.hook and self.hooks.count(hook) == self.call:
            state.stop(self.reason)


@dataclass
class Outcome:
    """All that a run has come to, for a comparison with another one."""

    weights: list[Tensor]
    result: Result
    generators: list[Tensor] = field(default_factory=lambda: [torch.get_rng_state()])


def assert_same_run(one: Outcome, other: Outcome) -> None:
    """The same weights, history and counters, and random generators at the same place, bit for bit."""
    assert all_equal(one.weights, other.weights)
    assert one.result.history == other.result.history
    assert one.result.progress == other.result.progress
    assert all_equal(one.generators, other.generators)


class PassError(Exception):
    """What goes wrong in a pass on purpose."""


def raising_after(batches: Iterable[Samples]) -> Iterator[Samples]:
    """These batches, and then an error in place of the next one."""
    yield from batches
    raise PassError


Step = TypeVar("Step", bound=Callable[..., Any])


def failing_the_second_time(step: Step) -> Step:
    """A step that can be made once: the second time, as in the search for what is not finite, it raises an OSError."""
    calls = itertools.count(1)

    @functools.wraps(step)
    def once(*args: Any) -> Any:
        if next(calls) == 2:
            raise OSError("only once")
        return step(*args)

    return cast("Step", once)


class RaisesSignal(HookRecorder):
    """Raises a signal in one call of a hook, whichever it is."""

    def __init__(self, number: signal.Signals, at: int) -> None:
        super().__init__()
        self.number, self.left = number, at

    def record(self, hook: str, state: State) -> None:
        super().record(hook, state)
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
