"""When things happen: how often, and when the learning rate moves."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from loopwright.arguments import NamedArguments
from loopwright.errors import ConfigError, nearest

if TYPE_CHECKING:
    from loopwright.state import Progress


def check_count(name: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        fix = f"for example {name}=1"
        if isinstance(value, float) and 1 <= value < math.inf:
            fix = f"{name}={math.floor(value)}" + (", without the point" if value.is_integer() else "")
        elif isinstance(value, str) and value.isdecimal() and int(value) >= 1:
            fix = f"{name}={int(value)}, without the quotes"
        raise ConfigError(f"{name} is {value!r}", why="it must be a whole number of at least 1", fix=fix)


def check_every(name: str, value: object, examples: str) -> None:
    """Raise ConfigError, with these examples as its fix, unless ``value`` is a cadence."""
    if not isinstance(value, Every):
        raise ConfigError(f"{name} is {value!r}", why="whether it counts steps or epochs has to be said", fix=examples)


@dataclass(frozen=True, kw_only=True)
class Every(NamedArguments):
    """A cadence: every ``steps`` optimizer steps, or every ``epochs`` epochs.

    Steps are counted over the whole run, so with 24 batches an epoch ``Every(steps=100)`` comes
    due at steps 100, 200, ... and not four batches into every fifth epoch.

    Args:
        steps: The number of optimizer steps between two occasions.
        epochs: The number of epochs between two occasions.

    Raises:
        ConfigError: Unless exactly one of the two is given, as a whole number of at least 1.

    Examples:
        >>> Every(steps=100)
        Every(steps=100, epochs=None)
    """

    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"Every(steps={self.steps!r}, epochs={self.epochs!r}) is not one cadence",
                why="exactly one of steps and epochs says how often",
                fix="Every(steps=100) or Every(epochs=1)",
            )
        if self.epochs is None:
            check_count("steps", self.steps)
        else:
            check_count("epochs", self.epochs)

    def __str__(self) -> str:
        return f"Every(epochs={self.epochs})" if self.steps is None else f"Every(steps={self.steps})"

    def due_at_step(self, progress: Progress) -> bool:
        """Whether the optimizer step that was just made is one of this cadence's.

        Args:
            progress: How far the run is, that step counted.

        Returns:
            True where it is due; False for a cadence of epochs.
        """
        return self.steps is not None and progress.step % self.steps == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether the end of epoch number ``epoch``, counted from 1, is one of this cadence's.

        Args:
            epoch: The epoch's number, counted from 1.

        Returns:
            True where it is due; False for a cadence of steps.
        """
        return self.epochs is not None and epoch % self.epochs == 0


@dataclass(frozen=True)
class Schedule(NamedArguments):
    """A learning-rate scheduler together with the moment at which it moves.

    Args:
        lr_scheduler: Any scheduler of ``torch.optim.lr_scheduler``, built on the trainer's optimizer.
        each: ``"step"`` moves it after every optimizer step, ``"epoch"`` after every epoch's
            validation. Nothing is guessed: OneCycleLR is made for steps, StepLR usually for epochs.
        monitor: The metric that a ``ReduceLROnPlateau`` follows, for example ``"val/loss"``. It moves
            only when that metric has a fresh value.

    Raises:
        ConfigError: ``each`` is neither, a plateau scheduler has no ``monitor``, or another one has.

    Examples:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = Schedule(torch.optim.lr_scheduler.StepLR(optimizer, step_size=30), each="epoch")
    """

    lr_scheduler: LRScheduler
    each: Literal["step", "epoch"]
    monitor: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lr_scheduler, type) or not callable(getattr(self.lr_scheduler, "step", None)):
            raise ConfigError(
                f"lr_scheduler is {self.lr_scheduler!r}, and not a scheduler",
                why="the loop calls its step()",
                fix="pass a scheduler of torch.optim.lr_scheduler, built on the trainer's optimizer",
            )
        if self.each not in ("step", "epoch"):
            raise ConfigError(
                f"each is {self.each!r}, and must be 'step' or 'epoch'",
                why="a scheduler that moves at the wrong cadence trains with the wrong learning rate",
                fix=_cadence(self.each, f"Schedule({type(self.lr_scheduler).__name__}(...), each="),
            )
        name = type(self.lr_scheduler).__name__
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            if self.monitor is None:
                raise ConfigError(
                    f"{name} has no metric to follow",
                    why="its step() takes the value of one",
                    fix=f'Schedule({name}(...), each="{self.each}", monitor="val/loss")',
                )
        elif self.monitor is not None and "epoch" in inspect.signature(self.lr_scheduler.step).parameters:
            raise ConfigError(
                f"{name} was given monitor={self.monitor!r}, but its step() takes no metric",
                why="only schedulers such as ReduceLROnPlateau follow a metric",
                fix="leave monitor out",
            )


_MEANT = {"epoch": "epoch", "step": "step", "batch": "step", "iter": "step"}  # what others call the two


def _cadence(given: object, before: str) -> str:
    """Which of the two words was meant, where that can be told: the other one would be the wrong cadence."""
    called = str(given).lower()
    meant = {ours for word, ours in _MEANT.items() if word in called}
    if len(meant) == 1:
        return f'{before}"{meant.pop()}")'
    close = nearest(called, ("step", "epoch")) if not meant else ""  # else it has both words in it
    return close or f'{before}"step") or {before}"epoch")'
