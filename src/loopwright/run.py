"""The state of a run, listed in one place."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loopwright.adapters import load_optimizer, load_schedule, plain_state
from loopwright.averages import Averages
from loopwright.batches import EpochData
from loopwright.callback import Callback
from loopwright.errors import CheckpointError, note
from loopwright.history import History
from loopwright.monitor import Monitor
from loopwright.plain import decode, encode, fits_safetensors, to_json
from loopwright.randomness import RandomState
from loopwright.run_state import Saved, check_data, check_held, checked, outline
from loopwright.schedule import Schedule
from loopwright.state import State
from loopwright.weights import buffers_beside, parameters_beside, parameters_of, plain_module
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
        self.name: str = uuid.uuid4().hex  # a resume takes it over: of which run a checkpoint is
        self.state: State[Any] = state
        self.callbacks: dict[str, Callback[Any]] = _keyed(callbacks)
        self.schedule: Schedule | None = schedule
        self.scaler: torch.amp.GradScaler | None = scaler
        self.data: EpochData = EpochData()
        self.averages: Averages = Averages(eager=eager)  # over the present epoch
        self.window: Window | None = None  # while it is open
        self.validation_due: bool = False  # at the present step
        self.epoch_over: bool = False  # its data has been gone through, and its end is still to come
        self.ended: bool = False  # a fit has ended well, and nothing has been trained since
        monitor = None if schedule is None else schedule.monitor
        self.plateau: Monitor | None = None if monitor is None else Monitor(monitor, "min")
        self.history: History = History(state.metrics)
        self.regained: list[tuple[Callback[Any], Any]] = []  # what callbacks were given back for this fit

    @property
    def unfinished(self) -> bool:
        """Whether something is due whatever the targets are: a window's rest, a validation, an epoch's end."""
        return self.window is not None or self.validation_due or self.epoch_over

    def weights(self) -> dict[str, Tensor]:
        """The model's own tensors, under the plain module's names."""
        state = plain_module(self.state.model).state_dict()
        return {name: value.detach() for name, value in state.items() if fits_safetensors(name, value)}

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, as plain data and tensors."""
        model, optimizer = plain_module(self.state.model), self.state.optimizer
        own = model.state_dict()
        callbacks = {key: callback.state_dict() for key, callback in self.callbacks.items()}
        return {
            "name": self.name,
            "model": {
                "training": {name: module.training for name, module in model.named_modules()},
                "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
                "buffers": buffers_beside(model, own),
                "extra": {k: v for k, v in own.items() if not fits_safetensors(k, v)},
            },
            "optimizer": plain_state(optimizer.state_dict()),
            "beside": [parameter.detach() for parameter in parameters_beside(self.state.model, optimizer)],
            "schedule": None if self.schedule is None else plain_state(self.schedule.lr_scheduler.state_dict()),
            "scaler": None if self.scaler is None else plain_state(self.scaler.state_dict()),
            "progress": dict(vars(self.state.progress)),
            "metrics": self.state.metrics.state_dict(),
            "random": RandomState.capture(self.data.generators()).state_dict(),
            "data": self.data.state_dict(0 if self.epoch_over else self.state.progress.batch),
            "averages": self.averages.state_dict(),
            "window": None if self.window is None else self.window.state_dict(),
            "gradients": None if self.window is None else [p.grad for p in parameters_of(self.state.model, optimizer)],
            "validation_due": self.validation_due,
            "epoch_over": self.epoch_over,
            "ended": self.ended,
            "stop": {
                "reason": self.state.stop_reason,
                "epochs": self.state.plan.epochs,
                "steps": self.state.plan.steps,
            },
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
            "history": self.history.state_dict(),
            "callbacks": callbacks,
        }

    def rehearse(self) -> None:
        """Save and look through what was saved, without a file.

        Raises:
            CheckpointError: Something cannot be saved, or could not be taken back; it is named.
        """
        tree, tensors = encode(self.state_dict())
        to_json(tree)
        self._checked(self.weights(), decode(tree, tensors))

    def _checked(self, weights: Mapping[str, Tensor], saved: Any) -> Saved:
        return checked(weights, saved, self.state, self.schedule, self.plateau, self.scaler)

    def load_state_dict(
        self, weights: Mapping[str, Tensor], state: Any, train: object = None, val: object = None
    ) -> None:
        """Take back what ``weights`` and ``state_dict`` returned, but for the random generators: those come last.

        Args:
            weights: The model's tensors.
            state: All else.
            train: The data that the run is to go on with.
            val: Its validation data.

        Raises:
            CheckpointError: It is of another model, optimizer, schedule or list of callbacks, or of no run at all;
                nothing is changed then.
        """
        saved = self._checked(weights, state)
        self.regained = []
        check_data(saved, train, val)
        undo: list[Callable[[], object]] = []
        part = "the model"
        try:
            self._load_model(weights, saved, undo)
            part = "the optimizer"
            optimizer = self.state.optimizer
            undo.append(partial(load_optimizer, optimizer, optimizer.state_dict()))
            load_optimizer(optimizer, saved["optimizer"])
            for parameter, value in zip(parameters_beside(self.state.model, optimizer), saved["beside"], strict=True):
                undo.append(_copied_back(parameter))
                parameter.data.copy_(value)
            part = "the schedule"
            if self.schedule is not None and saved["schedule"] is not None:
                scheduler = self.schedule.lr_scheduler
                undo.append(_put_back(scheduler, copy.deepcopy(scheduler.state_dict())))
                load_schedule(scheduler, saved["schedule"])
            part = "the gradient scaler"
            if self.scaler is not None and saved["scaler"] is not None:
                undo.append(_put_back(self.scaler, self.scaler.state_dict()))
                self.scaler.load_state_dict(saved["scaler"])
            for key, callback in self.callbacks.items():
                if key in saved["callbacks"]:
                    part = f"the callback {key}"
                    undo.append(_put_back(callback, copy.deepcopy(callback.state_dict())))
                    callback.load_state_dict(saved["callbacks"][key])
                    self.regained.append((callback, saved["callbacks"][key]))
                    check_held(self.state.model, callback)
        except BaseException as error:
            _undone(undo, error)
            if isinstance(error, Exception):
                why = error.what if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{part} cannot take back what the checkpoint holds for it", why=why) from error
            raise
        self._load_rest(saved)

    def _load_model(self, weights: Mapping[str, Tensor], saved: Saved, undo: list[Callable[[], object]]) -> None:
        model, theirs = plain_module(self.state.model), saved["model"]
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        before = copy.deepcopy({k: v for k, v in model.state_dict().items() if not isinstance(v, Tensor)})
        before |= {k: v.to("cpu", copy=True) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        flags = [(modules[name], module.training) for name, module in modules.items()]
        needed = [(parameter, parameter.requires_grad) for parameter in parameters.values()]

        def put_back() -> None:
            model.load_state_dict(before)
            for module, training in flags:
                module.training = training
            for parameter, requires_grad in needed:
                parameter.requires_grad_(requires_grad)

        undo.append(put_back)
        model.load_state_dict({**weights, **theirs["extra"]})
        for name, buffer in buffers_beside(model, model.state_dict()).items():
            value = theirs["buffers"].get(name)
            if value is not None and outline(name, value) == outline(name, buffer):  # else the model makes it anew
                undo.append(_copied_back(buffer))
                buffer.copy_(value)
        for name, training in theirs["training"].items():
            modules[name].training = training
        for name, requires_grad in theirs["requires_grad"].items():
            parameters[name].requires_grad_(requires_grad)

    def _load_rest(self, saved: Saved) -> None:
        """What is the loop's own; it has been checked, and nothing in here fails."""
        self.name = saved["name"]
        for name, value in saved["progress"].items():
            setattr(self.state.progress, name, value)  # the object stays: others hold it
        if self.state.progress.step:
            # Steps were made, though not in this process. Schedulers look for this mark, and would warn wrongly.
            self.state.optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's own, set by schedulers
        self.state.metrics.load_state_dict(saved["metrics"])
        # Once an epoch's data is over, the place is that of the next one's beginning.
        self.data.load_state_dict(saved["data"], 0 if saved["epoch_over"] else saved["progress"]["batch"])
        self.averages.load_state_dict(saved["averages"])
        self.window = None if saved["window"] is None else Window.from_state_dict(saved["window"])
        if self.window is not None and self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=self.state.device))  # it begins with the first loss it is given
        parameters = parameters_of(self.state.model, self.state.optimizer)
        for parameter, gradient in zip(parameters, saved["gradients"] or (), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.validation_due, self.epoch_over = saved["validation_due"], saved["epoch_over"]
        self.ended = saved["ended"]
        if not self._larger_target(saved):  # else the stop that was ordered was on the way to a nearer one
            self.state.stop_reason = saved["stop"]["reason"]
        if self.plateau is not None and saved["plateau"] is not None:
            self.plateau.load_state_dict(saved["plateau"])
        self.history.load_state_dict(saved["history"])

    def _larger_target(self, saved: Saved) -> bool:
        plan, before = self.state.plan, saved["stop"]
        targets = (plan.epochs, before["epochs"]), (plan.steps, before["steps"])
        return any(before is not None and (now is None or now > before) for now, before in targets)


def _undone(undo: Sequence[Callable[[], object]], error: BaseException) -> None:
    for action in reversed(undo):
        try:
            action()
        except Exception as another:  # the rest has to be put back all the same
            note(error, f"putting it back to what it was has failed too: {another!r}")


def _put_back(owner: Any, state: Any) -> Callable[[], object]:
    return lambda: owner.load_state_dict(state)


def _copied_back(parameter: Tensor) -> Callable[[], object]:
    before = parameter.detach().to("cpu", copy=True)
    return lambda: parameter.data.copy_(before)


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
