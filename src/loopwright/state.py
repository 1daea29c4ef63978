"""What a run knows: the trainer writes it, callbacks read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from loopwright.errors import ConfigError
from loopwright.metrics import Metrics, check_name, scalar

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
    """What the present call asked for: the settings of one fit.

    They are fixed while it runs, but for ``batches``, which the loader is asked for anew in each epoch.

    Attributes:
        epochs: The absolute target in epochs, or None.
        steps: The absolute target in optimizer steps, or None.
        batches: Batches in the present epoch, or None where the loader has no length.
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
