"""What a run knows: the trainer writes it, callbacks read it."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from loopwright.errors import ConfigError, UnknownMetricError, nearest

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from loopwright.schedule import Every

Stage = Literal["train", "val", "test", "predict"]
Model_co = TypeVar("Model_co", bound=nn.Module, default=nn.Module, covariant=True)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: Epochs finished.
        batch: Batches of the present epoch that have been trained on; 0 in ``on_epoch_end``.
        step: Optimizer steps made.
        samples: Samples seen in all.
        skipped: Optimizer steps skipped, by fp16 scaling or by ``on_nonfinite="skip"``.

    Examples:
        >>> Trainer(model, optimizer, loss).fit(train_loader, epochs=2).progress
        Progress(epoch=2, batch=0, step=8, samples=40, skipped=0)
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    skipped: int = 0

    @property
    def epoch_number(self) -> int:
        """The number, from 1, of the epoch that the newest batch belongs to: what records carry."""
        return self.epoch + 1 if self.batch else self.epoch

    @property
    def fresh(self) -> bool:
        """Whether the run has yet to train on its first batch."""
        return self.samples == self.batch == self.epoch == 0


@dataclass(frozen=True)
class Plan:
    """What the present call asked for: the settings of one fit, fixed while it runs.

    Attributes:
        epochs: The absolute target in epochs, or None.
        steps: The absolute target in optimizer steps, or None.
        batches: Batches in one epoch, or None where the loader has no length.
        val_batches: Batches in one validation pass, or None where there is none or it has no length.
        validate: When a validation is due, or None where no validation data was given.
        accumulate: Batches to one optimizer step.
        clip_norm: The largest norm that the gradients of one step may have, or None.
        measures: The names of what ``metrics=`` measures in an evaluation.
    """

    epochs: int | None = None
    steps: int | None = None
    batches: int | None = None
    val_batches: int | None = None
    validate: Every | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    measures: tuple[str, ...] = ()

    def reached(self, progress: Progress) -> str | None:
        """Which target the run has reached, ``"epochs"`` or ``"steps"``, or None."""
        if self.epochs is not None and progress.epoch >= self.epochs:
            return "epochs"
        return "steps" if self.steps is not None and progress.step >= self.steps else None

    def end(self, progress: Progress) -> tuple[float, float]:
        """The epoch and the step with which the fit ends if nothing stops it; infinite where that is not known."""
        steps = math.inf if self.steps is None else self.steps - progress.step
        epochs = math.inf if self.epochs is None else self.epochs - progress.epoch
        if self.batches is not None:
            each = math.ceil(self.batches / self.accumulate)
            made = each if progress.batch >= self.batches else progress.batch // self.accumulate
            steps = min(steps, epochs * each - made)
            epochs = epochs if steps == math.inf else min(epochs, (made + steps) // each)
        return progress.epoch + epochs, progress.step + steps


_NOTHING: Mapping[str, float | Tensor] = {}
_MOST_PUT_OFF = 1000  # so that what waits takes no more memory in a long run
TURNS = threading.RLock()  # held by whoever works out what was put off: another thread may read what one is training


class Metrics(Mapping[str, float]):
    """The newest value of every name that was logged, as floats.

    A value may still be on the accelerator, or not be worked out yet: reading it here is what waits. Any thread may.
    """

    __slots__ = ("_held", "_later", "_mark", "_marks", "_prefix", "_values", "reads", "validated")

    def __init__(self) -> None:
        self._values: dict[str, float | Tensor] = {}
        self._marks: dict[str, int] = {}
        self._mark = 0
        self._prefix, self._held = "", _NOTHING  # a step's values, as they came: most are replaced before anyone asks
        self._later: list[Callable[[], None]] = []  # what is put off until somebody asks, in its order
        self.reads: int = 0  # how often a value was fetched from a tensor
        self.validated: bool = False  # whether the present call has validation data, which a missing name may await

    def hold(self, prefix: str, values: Mapping[str, float | Tensor]) -> None:
        """Store the newest values of several names under one prefix."""
        with TURNS:
            if len(self._held) > 1 and self._held.keys() != values.keys():
                self._let_go()
            self._prefix, self._held = prefix, values

    def record(self, name: str, value: float | Tensor) -> None:
        """Store the newest value of a name that is known to be good. Callbacks call ``State.log``."""
        with TURNS:
            if self._held:
                self._let_go()
            if self._later:
                self._put_off(partial(self._store, {name: value}))
            else:
                self._mark = self._marks[name] = self._mark + 1
                self._values[name] = value

    def record_later(self, work_out: Callable[[], Mapping[str, float]]) -> None:
        """Store the newest values of names that are known to be good, which are worked out when somebody reads."""
        with TURNS:
            if self._held:
                self._let_go()
            self._put_off(lambda: self._store(work_out()))  # never copied: see __getstate__

    def afterwards(self, act: Callable[[], None]) -> None:
        """Do something that reads what was logged so far, and nothing newer: at once, unless some of it is put off."""
        with TURNS:
            if not self._later:
                act()
                return
            if self._held:
                self._let_go()
            self._put_off(act)

    def _put_off(self, act: Callable[[], None]) -> None:
        self._later.append(act)
        if len(self._later) >= _MOST_PUT_OFF:
            self.catch_up()

    def _store(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            self._mark = self._marks[name] = self._mark + 1
            self._values[name] = value

    def _let_go(self) -> None:
        """Store a step's values under their names, or put that off as well where something before them is."""
        held, self._held = self._held, _NOTHING
        for name, value in held.items():
            self.record(f"{self._prefix}/{name}", value)

    def catch_up(self) -> None:
        """Do all that was put off, in its order."""
        with TURNS:
            if self._held:
                self._let_go()
            later, self._later = self._later, []
            done = 0
            try:
                for act in later:
                    act()
                    done += 1
            except BaseException as error:
                # What comes after it is not lost; nor is it, where somebody has broken it off.
                self._later = later[done + isinstance(error, Exception) :] + self._later
                raise

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """What is copied or pickled: nothing is put off there, as it would be done by, and to, what was copied."""
        self.catch_up()
        return None, {name: getattr(self, name) for name in self.__slots__}

    @property
    def mark(self) -> int:
        """Grows with every value logged: "fresh" is whatever has a later mark."""
        if self._held or self._later:
            self.catch_up()
        return self._mark

    def __getitem__(self, name: str) -> float:
        if self._held or self._later:
            self.catch_up()
        try:
            value = self._values[name]
        except KeyError:
            raise unknown_metric(name, self._values, *self._awaited(name)) from None
        if isinstance(value, Tensor):
            self.reads += 1
            value = self._values[name] = float(value.item())
        return value

    def _awaited(self, name: str) -> tuple[str, str]:
        """Why a name of the validation is not there yet, and where to read it; or how to log any other."""
        own = of_stage(name)
        if not self.validated or own is None or own[0] != "val" or any(k.startswith("val/") for k in self._values):
            return "", f"log it with state.log({name!r}, value) before it is read"
        return (
            "it is the validation that logs such a name, and there has been none yet; ",
            f"read 'val/{own[1]}' in on_eval_end, or in on_epoch_end after a validation",
        )

    def __contains__(self, name: object) -> bool:
        if self._held or self._later:
            self.catch_up()
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        if self._held or self._later:
            self.catch_up()
        return iter(list(self._values))  # a copy, as another thread may be training

    def __len__(self) -> int:
        if self._held or self._later:
            self.catch_up()
        return len(self._values)

    def __repr__(self) -> str:
        return f"Metrics({dict(self)!r})"

    def mark_of(self, name: str) -> int:
        """The mark at which the run last logged ``name``: 0 if it never did, -1 if a test pass has done so since."""
        if self._held or self._later:
            self.catch_up()
        return self._marks.get(name, 0)

    def since(self, mark: int) -> dict[str, float]:
        """The values logged after ``mark``, in the order in which their names first appeared."""
        if self._held or self._later:
            self.catch_up()
        return {name: self[name] for name, marked in list(self._marks.items()) if marked > mark}

    def marks(self) -> dict[str, int]:
        """The mark of every name, as it is now."""
        if self._held or self._later:
            self.catch_up()
        return dict(self._marks)

    def settle(self, before: Mapping[str, int]) -> None:
        """Keep what a test pass has logged since these marks, but let nothing take it for a value of the run's."""
        if self._held or self._later:
            self.catch_up()
        for name, mark in self._marks.items():
            if mark != before.get(name, 0):
                self._marks[name] = -1 if before.get(name, 0) else 0

    def state_dict(self) -> dict[str, Any]:
        """The values, read, and when each was logged."""
        return {"mark": self.mark, "values": {name: self[name] for name in self._values}, "marks": dict(self._marks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._values, self._marks, self._mark = dict(state["values"]), dict(state["marks"]), state["mark"]
        self._held, self._later = _NOTHING, []


def unknown_metric(name: str, known: Mapping[str, object], why: str = "", fix: str = "") -> UnknownMetricError:
    """The error for a metric that does not exist, naming those that do and the nearest."""
    listed = ", ".join(sorted(known)) or "none yet"
    return UnknownMetricError(
        f"there is no metric {name!r}",
        why=f"{why}the names logged so far are: {listed}",
        fix=_likeliest(name, known) or fix,
    )


_STAGED = re.compile(r"(train|val|test)[/_](.+)")


def of_stage(name: object) -> tuple[str, str] | None:
    """The stage and the rest of a name such as ``val/loss``, or ``val_loss`` as others write it; else None."""
    found = _STAGED.fullmatch(name) if isinstance(name, str) else None
    return None if found is None else (found[1], found[2])


def _likeliest(name: str, known: Mapping[str, object]) -> str:
    """The nearest of the known names; a name of one stage is not taken for one of another."""
    own = of_stage(name)
    if own is None:
        return nearest(name, known)
    alike = {other[1]: key for key in known if (other := of_stage(key)) is not None and other[0] == own[0]}
    return nearest(own[1], alike, called=alike)


_NAME = re.compile(r"[^\W_][^\\]*")


def check_name(name: object) -> str:
    """Return ``name`` if it is fit to be a metric's: a column, a tag and a path below the run's folder.

    Raises:
        ConfigError: It is not a string, is empty or over 200 characters, does not begin with a letter
            or digit, ends in a space, holds what cannot be printed, backslashes or a ``..`` part, or is
            one of the two columns that every record has, ``epoch`` and ``step``.
    """
    if (
        isinstance(name, str)
        and len(name) <= 200
        and name.isprintable()
        and _NAME.fullmatch(name)
        and name == name.strip()
        and not {"", ".", ".."} & set(name.split("/"))
        and name not in ("epoch", "step")
    ):
        return name
    raise ConfigError(
        f"{name!r} cannot be the name of a metric",
        why="a name is a column, a tag and a path below the run's folder: 1 to 200 printable characters "
        "that begin with a letter or digit, no backslash, no '..' part, and not 'epoch' or 'step'",
        fix="for example 'train/accuracy'",
    )


def of_one_layer(name: str) -> bool:
    """Whether a metric is about a single layer, one of so many that bars and learning curves leave them out."""
    return name.count("/") > 1 and name.startswith(("grad/", "update/", "weight/"))


class State(Generic[Model_co]):
    """What a run knows. The trainer writes it, callbacks read it.

    Attributes:
        model: The module in training, exactly the one given to the trainer.
        optimizer: Its optimizer.
        device: Where the model is and the batches are moved to.
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        progress: Epochs, batches, steps and samples so far.
        plan: What the present call asked for: its targets and lengths.
        metrics: The newest value of every name logged; reading one is what waits for the device.
        stop_reason: Why a callback has ordered a stop, or None.

    Examples:
        >>> class StopWhenGood(Callback):
        ...     def on_epoch_end(self, state: State) -> None:
        ...         if state.metrics["train/loss"] < 100.0:
        ...             state.stop("good enough")
        >>> Trainer(model, optimizer, loss, callbacks=[StopWhenGood()]).fit(train_loader, epochs=9).stop_reason
        'good enough'
    """

    # A misspelt attribute, or one of another library's such as should_stop, is an error and not ignored.
    __slots__ = ("device", "metrics", "model", "optimizer", "plan", "progress", "stage", "stop_reason")

    if not TYPE_CHECKING:  # a checker that saw it would let any name be written to

        def __setattr__(self, name: str, value: object) -> None:
            if name in _NEVER_REPLACED and hasattr(self, name):
                raise ConfigError(
                    f"state.{name} cannot be replaced",
                    why="the loop and other callbacks hold what is there, and would go on with that",
                    fix="change it in place, or make a new Trainer"
                    if name in ("model", "optimizer")
                    else "read it only",
                )
            if name == "stop_reason" and value is not None:
                _check_reason(value)
            object.__setattr__(self, name, value)

    def __init__(self, model: Model_co, optimizer: Optimizer, device: torch.device) -> None:
        self.model: Model_co = model
        self.optimizer: Optimizer = optimizer
        self.device: torch.device = device
        self.stage: Stage = "train"
        self.progress: Progress = Progress()
        self.plan: Plan = Plan()
        self.metrics: Metrics = Metrics()
        self.stop_reason: str | None = None

    def log(self, name: str, value: float | Tensor) -> None:
        """Give every logger and monitor a value under ``name``. A tensor is not waited for.

        Args:
            name: For example ``"train/accuracy"``; it becomes the column and the tag.
            value: A number, or a tensor of one element, which is copied.

        Raises:
            ConfigError: The name is not fit for a file, or the value is not one real number.
        """
        if name not in self.metrics:
            check_name(name)
        self.metrics.record(name, scalar(name, value))

    def stop(self, reason: str) -> None:
        """Order the run to end after the current optimizer step. The first reason given stands.

        Args:
            reason: In your own words; ``fit`` returns it as ``result.stop_reason``.

        Raises:
            ConfigError: The reason is not a string, or is empty.
        """
        _check_reason(reason)
        self.stop_reason = self.stop_reason or reason


_NEVER_REPLACED = {"model", "optimizer", "device"}


def _check_reason(reason: object) -> None:
    if not isinstance(reason, str) or not reason:
        raise ConfigError(
            f"the reason to stop is {reason!r}, and must be words", fix='state.stop("loss is low enough")'
        )


def written_to(progress: Progress, counted: int) -> ConfigError:
    """The error for a count of epochs that was changed by somebody else than the loop; it is put right."""
    written, progress.epoch = progress.epoch, counted
    return ConfigError(
        f"state.progress.epoch was set to {written!r}, where the loop has counted {counted}",
        why="the loop counts; targets, records and checkpoints rely on it",
        fix="state.stop(reason) ends a run",
    )


def scalar(name: str, value: object) -> float | Tensor:
    """The value as a float, or as a detached copy of a tensor of one element; no device is waited for.

    Raises:
        ConfigError: It is not one real number.
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.detach().reshape(()).clone()
        raise ConfigError(
            f"the value of {name!r} is a {value.dtype} tensor of shape {tuple(value.shape)}",
            why="a metric is one real number",
            fix="log its mean(), or one name for each element",
        )
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError  # float would take its word for it
        return float(value)  # type: ignore[arg-type]  # whatever converts is a number: numpy's scalars do
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"the value of {name!r} is {value!r}",
            why="a metric is one real number",
            fix="log a float or a tensor",
        ) from None
