"""The state of a run, listed in one place."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.averages import Averages
from loopwright.batches import EpochData
from loopwright.callback import Callback
from loopwright.errors import CheckpointError
from loopwright.history import History
from loopwright.monitor import Monitor
from loopwright.randomness import RandomState
from loopwright.schedule import Schedule
from loopwright.state import Progress, State
from loopwright.window import Window


class Run:
    """Everything that one batch of a run leaves to the next: what the loop remembers, and what a checkpoint holds.

    Args:
        state: What callbacks see of it.
        callbacks: Whose states are part of it.
        schedule: The learning-rate schedule, if there is one.
        scaler: The gradient scaler, under fp16.
        eager: Whether values are read as they come.
    """

    def __init__(
        self,
        state: State[Any],
        callbacks: Sequence[Callback[Any]],
        schedule: Schedule | None,
        scaler: torch.amp.GradScaler | None,
        *,
        eager: bool,
    ) -> None:
        self.state: State[Any] = state
        self.callbacks: dict[str, Callback[Any]] = _keyed(callbacks)
        self.schedule: Schedule | None = schedule
        self.scaler: torch.amp.GradScaler | None = scaler
        self.data: EpochData = EpochData()
        self.averages: Averages = Averages(eager=eager)  # over the present epoch
        self.window: Window | None = None  # while it is open
        self.validation_due: bool = False  # at the present step
        self.epoch_over: bool = False  # its data has been gone through, and its end is still to come
        self.plateau: Monitor | None = Monitor(schedule.monitor, "min") if schedule and schedule.monitor else None
        self.history: History = History()

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors under the plain module's own names: copies, on the CPU."""
        tensors = {k: v for k, v in plain_module(self.state.model).state_dict().items() if isinstance(v, Tensor)}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, as plain data and tensors."""
        model, optimizer = plain_module(self.state.model), self.state.optimizer
        callbacks = {key: callback.state_dict() for key, callback in self.callbacks.items()}
        return {
            "model": {
                "training": {name: module.training for name, module in model.named_modules()},
                "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
                "extra": {k: v for k, v in model.state_dict().items() if not isinstance(v, Tensor)},
            },
            "optimizer": _plain(optimizer.state_dict()),
            "schedule": None if self.schedule is None else _plain(self.schedule.lr_scheduler.state_dict()),
            "scaler": None if self.scaler is None else _plain(self.scaler.state_dict()),
            "progress": dataclasses.asdict(self.state.progress),
            "metrics": self.state.metrics.state_dict(),
            "random": RandomState.capture(self.data.generators()).state_dict(),
            "data": self.data.state_dict(),
            "averages": self.averages.state_dict(),
            "window": None if self.window is None else self.window.state_dict(),
            "gradients": None if self.window is None else [p.grad for p in parameters_of(self.state)],
            "validation_due": self.validation_due,
            "epoch_over": self.epoch_over,
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
            "history": self.history.state_dict(),
            "callbacks": callbacks,
        }

    def load_state_dict(self, weights: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        """Take back what ``weights`` and ``state_dict`` returned, but for the random generators: those come last.

        Raises:
            CheckpointError: It is of another model, optimizer, schedule or list of callbacks; nothing is changed then.
        """
        model, optimizer = plain_module(self.state.model), self.state.optimizer
        self._check_fits(weights, saved)
        model.load_state_dict({**weights, **saved["model"]["extra"]})
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for name, training in saved["model"]["training"].items():
            modules[name].training = training
        for name, requires_grad in saved["model"]["requires_grad"].items():
            parameters[name].requires_grad_(requires_grad)
        optimizer.load_state_dict(saved["optimizer"])
        if self.schedule is not None:
            scheduler = self.schedule.lr_scheduler
            scheduler.load_state_dict(_like(scheduler.state_dict(), saved["schedule"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        for name, value in dataclasses.asdict(Progress(**saved["progress"])).items():
            setattr(self.state.progress, name, value)  # the object stays: others hold it
        self.state.metrics.load_state_dict(saved["metrics"])
        self.data.load_state_dict(saved["data"])
        self.averages.load_state_dict(saved["averages"])
        self.window = None if saved["window"] is None else Window.from_state_dict(saved["window"])
        for parameter, gradient in zip(parameters_of(self.state), saved["gradients"] or (), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.validation_due, self.epoch_over = saved["validation_due"], saved["epoch_over"]
        if self.plateau is not None:
            self.plateau.load_state_dict(saved["plateau"])
        self.history.load_state_dict(saved["history"])
        for key, callback in self.callbacks.items():
            if key in saved["callbacks"]:
                callback.load_state_dict(saved["callbacks"][key])

    def _check_fits(self, weights: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
        own = {name: tuple(value.shape) for name, value in self.weights().items()}
        theirs = {name: tuple(value.shape) for name, value in weights.items()}
        if own != theirs:
            names = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            listed = ", ".join(f"{name} is {theirs.get(name)} there and {own.get(name)} here" for name in names[:3])
            raise CheckpointError(
                "the checkpoint is of another model", why=listed, fix="the model that it was saved from"
            )
        groups = [len(group["params"]) for group in self.state.optimizer.param_groups]
        if [len(group["params"]) for group in saved["optimizer"]["param_groups"]] != groups:
            raise CheckpointError("the checkpoint is of another optimizer", why="its parameter groups have other sizes")
        for name, here in (("schedule", self.schedule), ("scaler", self.scaler)):
            if (here is None) != (saved[name] is None):
                where = "the checkpoint" if here is None else "this trainer"
                raise CheckpointError(f"only {where} has a {'schedule' if name == 'schedule' else 'gradient scaler'}")


def parameters_of(state: State[Any]) -> list[Tensor]:
    """The model's parameters, and what else the optimizer holds, each once."""
    in_optimizer = (p for group in state.optimizer.param_groups for p in group["params"])
    return list({id(p): p for p in (*state.model.parameters(), *in_optimizer)}.values())


def plain_module(model: nn.Module) -> nn.Module:
    """The module that compiling or distributing has wrapped, whose names a checkpoint has."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile's
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _keyed(callbacks: Sequence[Callback[Any]]) -> dict[str, Callback[Any]]:
    """Each callback under a name of its own: its class, and a number where there are several of it."""
    keyed: dict[str, Callback[Any]] = {}
    for callback in callbacks:
        base = key = type(callback).__qualname__
        number = 2
        while key in keyed:
            key, number = f"{base}-{number}", number + 1
        keyed[key] = callback
    return keyed


def _plain(value: Any) -> Any:
    """A state of torch's own as plain data: the dicts of other classes that are in there as dicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _like(reference: Any, value: Any) -> Any:
    """The value with dicts of the class that ``reference`` has in their place: MultiStepLR holds a Counter."""
    if isinstance(reference, collections.Counter):
        return collections.Counter(value)
    if isinstance(value, dict) and isinstance(reference, dict):
        return {key: _like(reference.get(key), item) for key, item in value.items()}
    if isinstance(value, list) and isinstance(reference, list) and len(value) == len(reference):
        return [_like(a, b) for a, b in zip(reference, value, strict=True)]
    return value
