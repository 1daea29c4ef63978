"""The state of a run, listed in one place."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

import torch
from torch import Tensor, nn

from loopwright.adapters import check_optimizer, check_scaler, check_schedule, load_schedule, plain_state
from loopwright.averages import Averages
from loopwright.batches import EpochData
from loopwright.callback import Callback
from loopwright.data import Loader
from loopwright.errors import CheckpointError, ConfigError
from loopwright.forms import Count, alike, check_form
from loopwright.history import History
from loopwright.monitor import Judged, Monitor
from loopwright.plain import decode, encode, fits_safetensors, to_json
from loopwright.randomness import RandomState, generators_of
from loopwright.schedule import Schedule
from loopwright.state import State, check_name
from loopwright.weights import plain_module
from loopwright.window import Window


class _Model(TypedDict):
    training: dict[str, bool]  # the flag of each module
    requires_grad: dict[str, bool]  # that of each parameter
    buffers: dict[str, Tensor]  # those that are not persistent
    extra: dict[str, Any]  # what is in its state_dict and is no tensor that safetensors could hold


class _Progress(TypedDict):
    epoch: Count
    batch: Count
    step: Count
    samples: Count
    skipped: Count


class _Metrics(TypedDict):
    values: dict[str, float]
    marks: dict[str, Count]
    mark: Count


class _Data(TypedDict):
    at_start: dict[str, Any] | None  # the random generators when the epoch began
    place: dict[str, Any] | None  # that of a loader which keeps it
    val_place: dict[str, Any] | None  # that of such a loader of validation data
    batches: Count | None  # the length of the training data


class _Averages(TypedDict):
    sums: dict[str, float | Tensor]
    weights: dict[str, float | Tensor]


class _Window(TypedDict):
    size: Count
    begins: tuple[Count, Count]
    finite: bool
    entries: list[tuple[dict[str, float | Tensor], float | Tensor]]
    even: bool
    first: float | Tensor
    total: float | Tensor


class _Stop(TypedDict):
    reason: str | None
    epochs: Count | None
    steps: Count | None


class _History(TypedDict):
    rows: list[dict[str, float]]
    mark: Count
    finished: Count


@runtime_checkable
class _HoldsWeights(Protocol):
    best_weights: dict[str, Any] | None  # which the model may be given at the end


class _Saved(TypedDict):
    """What a run's state is, beside the weights."""

    name: str
    model: _Model
    optimizer: dict[str, Any]
    beside: list[Tensor]  # parameters that the optimizer holds and the model does not
    schedule: dict[str, Any] | None
    scaler: dict[str, Any] | None
    progress: _Progress
    metrics: _Metrics
    random: dict[str, Any]
    data: _Data
    averages: _Averages
    window: _Window | None  # the open one
    gradients: list[Tensor | None] | None  # its, in the order of the parameters
    validation_due: bool
    epoch_over: bool
    ended: bool
    stop: _Stop
    plateau: Judged | None
    history: _History
    callbacks: dict[str, Any]


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
        self.history: History = History()
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
                "buffers": {name: buffer for name, buffer in model.named_buffers() if name not in own},
                "extra": {k: v for k, v in own.items() if not fits_safetensors(k, v)},
            },
            "optimizer": plain_state(optimizer.state_dict()),
            "beside": [parameter.detach() for parameter in _beside(self.state)],
            "schedule": None if self.schedule is None else plain_state(self.schedule.lr_scheduler.state_dict()),
            "scaler": None if self.scaler is None else plain_state(self.scaler.state_dict()),
            "progress": dict(vars(self.state.progress)),
            "metrics": self.state.metrics.state_dict(),
            "random": RandomState.capture(self.data.generators()).state_dict(),
            "data": self.data.state_dict(0 if self.epoch_over else self.state.progress.batch),
            "averages": self.averages.state_dict(),
            "window": None if self.window is None else self.window.state_dict(),
            "gradients": None if self.window is None else [p.grad for p in parameters_of(self.state)],
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
        _check_generators(saved, train)
        _check_place(saved["data"]["place"], train)
        _check_place(saved["data"]["val_place"], val)
        undo: list[Callable[[], object]] = []
        part = "the model"
        try:
            self._load_model(weights, saved["model"], undo)
            part = "the optimizer"
            optimizer = self.state.optimizer
            undo.append(_put_back(optimizer, optimizer.state_dict()))
            optimizer.load_state_dict(saved["optimizer"])
            for parameter, value in zip(_beside(self.state), saved["beside"], strict=True):
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
                    self._check_held(callback)
        except BaseException as error:
            for action in reversed(undo):
                try:
                    action()
                except Exception as another:  # the rest has to be put back all the same
                    error.add_note(f"putting it back to what it was has failed too: {another!r}")
            if isinstance(error, Exception):
                why = error.what if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{part} cannot take back what the checkpoint holds for it", why=why) from error
            raise
        self._load_rest(saved)

    def _check_held(self, callback: object) -> None:
        held = callback.best_weights if isinstance(callback, _HoldsWeights) else None
        own = self.state.model.state_dict()
        if held and {k: _facts(k, v) for k, v in held.items()} != {k: _facts(k, v) for k, v in own.items()}:
            raise CheckpointError("the best weights in it are of another model")

    def _load_model(self, weights: Mapping[str, Tensor], saved: _Model, undo: list[Callable[[], object]]) -> None:
        model = plain_module(self.state.model)
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
        model.load_state_dict({**weights, **saved["extra"]})
        for name, buffer in _beside_state(model).items():
            value = saved["buffers"].get(name)
            if value is not None and _facts(name, value) == _facts(name, buffer):  # else the model makes it anew
                undo.append(_copied_back(buffer))
                buffer.copy_(value)
        for name, training in saved["training"].items():
            modules[name].training = training
        for name, requires_grad in saved["requires_grad"].items():
            parameters[name].requires_grad_(requires_grad)

    def _load_rest(self, saved: _Saved) -> None:
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
        for parameter, gradient in zip(parameters_of(self.state), saved["gradients"] or (), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.validation_due, self.epoch_over = saved["validation_due"], saved["epoch_over"]
        self.ended = saved["ended"]
        if not self._larger_target(saved["stop"]):  # else the stop that was ordered was on the way to a nearer one
            self.state.stop_reason = saved["stop"]["reason"]
        if self.plateau is not None and saved["plateau"] is not None:
            self.plateau.load_state_dict(saved["plateau"])
        self.history.load_state_dict(saved["history"])

    def _larger_target(self, before: _Stop) -> bool:
        plan = self.state.plan
        targets = (plan.epochs, before["epochs"]), (plan.steps, before["steps"])
        return any(before is not None and (now is None or now > before) for now, before in targets)

    def _checked(self, weights: Mapping[str, Tensor], state: Any) -> _Saved:
        """The state, looked through: everything that the loop relies on later is as a run leaves it."""
        check_form(state, _Saved)
        saved = cast("_Saved", state)
        self._check_model(weights, saved["model"])
        for name, here in (("schedule", self.schedule), ("plateau", self.plateau)):
            if (here is None) != (state[name] is None):
                called = {"schedule": "schedule", "plateau": "monitored schedule"}[name]
                is_new = state[name] is None
                raise CheckpointError(
                    f"this trainer has a {called}, and the checkpoint has none: it is new"
                    if is_new
                    else f"the checkpoint has a {called}, and this trainer has none: it is gone",
                    why="a resume goes on with the run as it was, its learning rates included",
                    fix=f"{'no schedule=, as it' if is_new else 'the schedule= that it'} was saved with; or "
                    "load_weights(path, model) and no resume, to begin a new run with the old weights",
                )
        check_optimizer(self.state.optimizer, saved["optimizer"])
        if [_facts("", value) for value in saved["beside"]] != [_facts("", value) for value in _beside(self.state)]:
            raise CheckpointError("the optimizer holds other parameters beside the model's than the checkpoint does")
        if self.schedule is not None:
            check_schedule(self.schedule.lr_scheduler, saved["schedule"])
        if self.scaler is not None and saved["scaler"] is not None:
            check_scaler(self.scaler, saved["scaler"])
        _check_numbers(saved)
        self._check_gradients(saved)
        return saved

    def _check_model(self, weights: Mapping[str, Tensor], saved: _Model) -> None:
        model = plain_module(self.state.model)
        own = {name: _facts(name, value) for name, value in model.state_dict().items()}
        theirs = {name: _facts(name, value) for name, value in {**weights, **saved["extra"]}.items()}
        if own != theirs or weights.keys() & saved["extra"].keys():
            names = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            listed = ", ".join(
                f"{name[:80]} is {theirs.get(name, 'missing')} there and {own.get(name, 'missing')} here"
                for name in names[:3]
            )
            raise CheckpointError(
                "the checkpoint is of another model", why=listed, fix="the model that it was saved from"
            )
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        if saved["training"].keys() != modules.keys() or saved["requires_grad"].keys() != parameters.keys():
            raise CheckpointError("the checkpoint is of another model", why="its modules have other names")

    def _check_gradients(self, saved: _Saved) -> None:
        parameters, gradients = parameters_of(self.state), saved["gradients"]
        if (gradients is None) != (saved["window"] is None):
            raise CheckpointError("the checkpoint has gradients without a window, or a window without gradients")
        if gradients is not None and not (
            len(gradients) == len(parameters)
            and all(
                gradient is None or (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
                for parameter, gradient in zip(parameters, gradients, strict=True)
            )
        ):
            raise CheckpointError("the gradients in the checkpoint do not fit the model's parameters")


def _facts(name: str, value: object) -> str:
    if f".{name}".endswith("._extra_state"):
        return "the module's own affair"  # whose get_extra_state may return what it likes
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "no tensor"


def _check_numbers(saved: _Saved) -> None:
    """Names that are fit for a file, one number where one is due, and parts that agree with one another."""
    averages, window, metrics = saved["averages"], saved["window"], saved["metrics"]
    rows = saved["history"]["rows"]
    names = {*metrics["values"], *metrics["marks"], *(name for row in rows for name in row.keys() - {"epoch", "step"})}
    try:
        for name in names:
            check_name(name)
    except ConfigError as error:
        raise CheckpointError("a metric in the checkpoint has a name that none can have", why=error.what) from error
    entries = [] if window is None else window["entries"]
    values = [*averages["sums"].values(), *averages["weights"].values()]
    values += [value for entry, weight in entries for value in (*entry.values(), weight)]
    values += [] if window is None else [window["first"], window["total"]]
    if not (
        averages["sums"].keys() == averages["weights"].keys()
        and metrics["values"].keys() == metrics["marks"].keys()
        and all({"epoch", "step"} <= row.keys() for row in rows)
        and all(alike(0.0, value) for value in values)
        and (window is None or 0 < len(entries) <= window["size"])
        and (window is None or _before(window["begins"], saved["progress"]))
    ):
        raise CheckpointError("the sums, the metrics or the history in the checkpoint contradict themselves")


def _before(begins: tuple[int, int], progress: _Progress) -> bool:
    return begins[0] <= progress["batch"] and begins[1] <= progress["samples"]


def _check_place(place: dict[str, Any] | None, loader: object) -> None:
    """Raise CheckpointError where there is no such place in the library's own loader."""
    if isinstance(loader, Loader) and place is not None:
        loader.check_place(place)


def _check_generators(saved: _Saved, train: object) -> None:
    """Let the generators of the data try what is theirs, and have their own back."""
    own = generators_of(train)
    before = RandomState.capture(own)
    try:
        for state in (saved["random"], saved["data"]["at_start"]):
            if state is not None:
                RandomState.from_state_dict(state).restore(own)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the random generators refuse what the checkpoint holds for them", why=str(error)[:200]
        ) from error
    finally:
        before.restore(own)
    if saved["random"]["python"] is None or saved["random"]["numpy"] is None:
        raise CheckpointError("the checkpoint does not hold the state of every random generator")


def _put_back(owner: Any, state: Any) -> Callable[[], object]:
    return lambda: owner.load_state_dict(state)


def parameters_of(state: State[Any]) -> list[Tensor]:
    """The model's parameters, and what else the optimizer holds, each once."""
    in_optimizer = (p for group in state.optimizer.param_groups for p in group["params"])
    return list({id(p): p for p in (*state.model.parameters(), *in_optimizer)}.values())


def _beside_state(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the model's ``state_dict``."""
    persistent = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in persistent}


def _beside(state: State[Any]) -> list[Tensor]:
    """What the optimizer holds and the model does not, such as the parameters of a loss."""
    of_model = {id(parameter) for parameter in state.model.parameters()}
    in_optimizer = (p for group in state.optimizer.param_groups for p in group["params"])
    return list({id(p): p for p in in_optimizer if id(p) not in of_model}.values())


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
