"""The state that a run saves: its form, and whether it fits the run that is to take it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict, cast, runtime_checkable

import torch
from torch import Tensor, nn

from loopwright.adapters import check_optimizer, check_scaler, check_schedule
from loopwright.data import Loader
from loopwright.errors import CheckpointError, ConfigError
from loopwright.forms import Count, alike, check_form
from loopwright.metrics import check_name
from loopwright.monitor import Judged, Monitor
from loopwright.randomness import RandomState, generators_of
from loopwright.schedule import Schedule
from loopwright.state import State
from loopwright.weights import parameters_beside, parameters_of, plain_module


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


Saved: TypeAlias = _Saved  # the name of the form itself is in messages


def checked(
    weights: Mapping[str, Tensor],
    saved: Any,
    state: State[Any],
    schedule: Schedule | None,
    plateau: Monitor | None,
    scaler: torch.amp.GradScaler | None,
) -> Saved:
    """What was saved, looked through: everything that the loop relies on later is as a run leaves it.

    Args:
        weights: The model's tensors that were saved.
        saved: All else that was.
        state: That of the run which is to take it back, and so are the others.
        schedule: Its learning-rate schedule.
        plateau: What such a schedule judges by.
        scaler: Its gradient scaler.

    Raises:
        CheckpointError: It is not of such a run.
    """
    check_form(saved, Saved)
    found = cast("Saved", saved)
    _check_model(state.model, weights, found)
    _check_schedules(schedule, plateau, found)
    check_optimizer(state.optimizer, found["optimizer"])
    beside = parameters_beside(state.model, state.optimizer)
    if [outline("", value) for value in found["beside"]] != [outline("", value) for value in beside]:
        raise CheckpointError("the optimizer holds other parameters beside the model's than the checkpoint does")
    if schedule is not None:
        check_schedule(schedule.lr_scheduler, found["schedule"])
    if found["scaler"] is not None:  # one that this run has no use for must be one as well
        check_scaler(scaler or torch.amp.GradScaler("cpu"), found["scaler"])
    _check_numbers(found)
    _check_gradients(parameters_of(state.model, state.optimizer), found)
    return found


def _check_schedules(schedule: Schedule | None, plateau: Monitor | None, saved: Saved) -> None:
    pairs = ("schedule", schedule, saved["schedule"]), ("monitored schedule", plateau, saved["plateau"])
    for called, here, there in pairs:
        if (here is None) != (there is None):
            is_new = there is None
            raise CheckpointError(
                f"this trainer has a {called}, and the checkpoint has none: it is new"
                if is_new
                else f"the checkpoint has a {called}, and this trainer has none: it is gone",
                why="a resume goes on with the run as it was, its learning rates included",
                fix=f"{'no schedule=, as it' if is_new else 'the schedule= that it'} was saved with; or "
                "load_weights(path, model) and no resume, to begin a new run with the old weights",
            )


def _check_model(model: nn.Module, weights: Mapping[str, Tensor], saved: Saved) -> None:
    model, extra = plain_module(model), saved["model"]["extra"]
    own = {name: outline(name, value) for name, value in model.state_dict().items()}
    theirs = {name: outline(name, value) for name, value in {**weights, **extra}.items()}
    if own != theirs or weights.keys() & extra.keys():
        names = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        listed = ", ".join(
            f"{name[:80]} is {theirs.get(name, 'missing')} there and {own.get(name, 'missing')} here"
            for name in names[:3]
        )
        raise CheckpointError("the checkpoint is of another model", why=listed, fix="the model that it was saved from")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    flags = saved["model"]
    if flags["training"].keys() != modules.keys() or flags["requires_grad"].keys() != parameters.keys():
        raise CheckpointError("the checkpoint is of another model", why="its modules have other names")


def _check_gradients(parameters: Sequence[Tensor], saved: Saved) -> None:
    gradients = saved["gradients"]
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


def _check_numbers(saved: Saved) -> None:
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


def check_data(saved: Saved, train: object, val: object) -> None:
    """Raise CheckpointError where the data cannot go on from what was saved: its random generators, its places."""
    _check_generators(saved, train)
    for place, loader in ((saved["data"]["place"], train), (saved["data"]["val_place"], val)):
        if isinstance(loader, Loader) and place is not None:  # the library's own
            loader.check_place(place)


def _check_generators(saved: Saved, train: object) -> None:
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


@runtime_checkable
class _HoldsWeights(Protocol):
    best_weights: dict[str, Any] | None  # which the model may be given at the end


def check_held(model: nn.Module, callback: object) -> None:
    """Raise CheckpointError where a callback has got back the best weights of another model."""
    held = callback.best_weights if isinstance(callback, _HoldsWeights) else None
    own = model.state_dict()
    if held and {k: outline(k, v) for k, v in held.items()} != {k: outline(k, v) for k, v in own.items()}:
        raise CheckpointError("the best weights in it are of another model")


def outline(name: str, value: object) -> str:
    """What two entries of a model's state have in common where one can take the other's place."""
    if f".{name}".endswith("._extra_state"):
        return "the module's own affair"  # whose get_extra_state may return what it likes
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "no tensor"
