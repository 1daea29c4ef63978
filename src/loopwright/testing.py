"""What helps to test a callback: the very tools that loopwright's own tests use.

``two_step_fit`` runs the real loop on a tiny model, ``tiny_state`` is for calling one hook by hand, ``HookRecorder``
writes down which hooks fired, and ``check_callback`` puts any callback through the contract that all keep.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright.callback import HOOKS, Callback
from loopwright.result import Result
from loopwright.state import Progress, State
from loopwright.trainer import Trainer

__all__ = ["Call", "HookRecorder", "check_callback", "tiny_data", "tiny_model", "tiny_state", "two_step_fit"]


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
    model = tiny_model()
    settings = {"device": "cpu", "seed": 0, **settings}
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss(), callbacks=callbacks, **settings
    )
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


class _Probe(HookRecorder):
    """Takes down what a callback has to leave alone: weights, gradients, modes and random generators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, bytes]] = []

    def record(self, hook: str, state: State) -> None:
        super().record(hook, state)
        parameters = list(state.model.parameters())
        self.seen.append(
            {
                "weights": pickle.dumps([value.numpy().tobytes() for value in state.model.state_dict().values()]),
                "gradients": pickle.dumps([None if p.grad is None else p.grad.numpy().tobytes() for p in parameters]),
                "modes": bytes(module.training for module in state.model.modules()),
                "gradient mode": bytes([torch.is_grad_enabled()]),
                "torch's random state": torch.get_rng_state().numpy().tobytes(),
                "python's random state": pickle.dumps(random.getstate()),
                "numpy's random state": pickle.dumps(np.random.get_state()),
            }
        )


class _Failure(Callback[Any]):
    """Raises in the middle of a fit."""

    def on_step_end(self, state: State) -> None:
        raise _Planted


class _Planted(Exception):  # noqa: N818  # it is no error of anybody's
    pass


def check_callback(make: Callable[[], Callback[Any]]) -> None:
    """Put a callback through the contract that every callback keeps.

    It leaves weights, gradients, modes and random generators alone; its state is plain data and tensors, and a new
    instance takes it over; it goes on in a second fit; an error of somebody else's comes through it unchanged; it can
    be pickled before and after; it leaves no thread behind.

    Args:
        make: Makes a new instance at each call.

    Raises:
        AssertionError: It breaks the contract; the message says where.

    Examples:
        >>> check_callback(HookRecorder)
    """
    threads = set(threading.enumerate())
    _check_leaves_alone(make)
    _check_state(make)
    _check_goes_on(make)
    _check_error_passes(make)
    _check_pickles(make)
    trainer, _ = two_step_fit(make(), epochs=1)
    trainer.evaluate(tiny_data())
    left = set(threading.enumerate()) - threads
    assert not left, f"it leaves threads running: {sorted(thread.name for thread in left)}"


def _check_leaves_alone(make: Callable[[], Callback[Any]]) -> None:
    alone, beside = _Probe(), _Probe()
    two_step_fit(alone, epochs=2)
    two_step_fit(make(), beside, epochs=2)
    # One that stops the run ends it earlier; up to there nothing may differ.
    for index, (before, after) in enumerate(zip(alone.seen, beside.seen, strict=False)):
        if alone.hooks[index] != beside.hooks[index]:
            assert beside.hooks[index] in ("on_fit_end", "teardown"), f"hook {index} is {beside.hooks[index]}"
            return
        restored = {"weights"} if beside.hooks[index] == "teardown" else set()  # by the loop, on restore_best=True
        changed = [what for what in before.keys() - restored if before[what] != after[what]]
        assert not changed, f"by {beside.hooks[index]} (call {index + 1}) it has changed: {', '.join(sorted(changed))}"


def _check_state(make: Callable[[], Callback[Any]]) -> None:
    trained = make()
    two_step_fit(trained)
    saved = trained.state_dict()
    _check_plain(saved, "state_dict()")
    other = make()
    other.load_state_dict(saved)
    _check_equal(saved, other.state_dict(), "state_dict()")


def _check_goes_on(make: Callable[[], Callback[Any]]) -> None:
    callback = make()
    trainer, first = two_step_fit(callback)
    second = trainer.fit(tiny_data(shuffle=True), tiny_data(), epochs=2)
    assert second.history[: len(first.history)] == first.history, "a second fit has changed the history of the first"


def _check_error_passes(make: Callable[[], Callback[Any]]) -> None:
    for first in (True, False):
        callback = make()
        caught: BaseException | None = None
        try:
            two_step_fit(*((callback, _Failure()) if first else (_Failure(), callback)))
        except BaseException as error:
            caught = error
        assert isinstance(caught, _Planted), f"the caller of fit got {caught!r} in place of another callback's error"
        blamed = [note for note in caught.__notes__ if type(callback).__qualname__ in note]
        assert not blamed, f"it failed as well: {blamed}"
        two_step_fit(callback)


def _check_pickles(make: Callable[[], Callback[Any]]) -> None:
    callback = make()
    try:
        pickle.dumps(callback)
    except Exception as error:
        raise AssertionError("it cannot be pickled; its class has to stand at the top of a module") from error
    two_step_fit(callback)
    _check_equal(callback.state_dict(), pickle.loads(pickle.dumps(callback)).state_dict(), "state_dict() of a copy")


def _check_plain(value: Any, path: str) -> None:
    """Fail unless ``value`` is what a checkpoint holds: plain data by exact type, and tensors."""
    if isinstance(value, Tensor) or value is None or type(value) in (bool, int, float, str):
        return
    if type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{path}[{index}]")
    elif type(value) is dict:
        for key, item in value.items():
            assert type(key) in (str, int), f"{path} has a key {key!r}: a key is a str or an int"
            _check_plain(item, f"{path}[{key!r}]")
    else:
        raise AssertionError(f"{path} is {value!r}: {type(value).__name__} is neither plain data nor a tensor")


def _check_equal(one: Any, other: Any, path: str) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), f"{path} is no longer a tensor"
        assert torch.equal(one, other), f"{path} has changed"
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), f"{path} has other keys"
        for key in one:
            _check_equal(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), f"{path} has another length"
        for index, pair in enumerate(zip(one, other, strict=True)):
            _check_equal(*pair, f"{path}[{index}]")
    else:
        both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
        assert both_nan or one == other, f"{path} was {one!r} and is {other!r}"
