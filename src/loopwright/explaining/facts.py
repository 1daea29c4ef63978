"""All that the text of the plain loop depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loopwright.guard import NonFinitePolicy
from loopwright.layout import Layout
from loopwright.precision import Precision

WIDTH = 88  # the line length of an unconfigured ruff, and of black
NAN = 'float("nan")'

Lines = list[str]


@dataclass(frozen=True)
class Facts:
    """All that the text depends on.

    Attributes:
        custom_step: ``step=`` was given, and not ``loss=``.
        measures: The step may return metrics beside the loss.
        ignores: The loss leaves out targets of its ``ignore_index``.
        layout: How a batch is laid out; None where that is not known.
        sized: The training data has a length.
        epochs: The target in epochs; None for none.
        steps: The target in optimizer steps; None for none.
        fitted: Whether these are those of a fit; else ``epochs`` is left to the caller.
        ended: A callback ended it, before a target of its own.
        restored_epoch: The epoch whose weights it put back at its end, if it did.
        validation: ``"given"``: there is validation data; ``"maybe"``: it is up to the caller.
        validate_steps: Validate every so many optimizer steps.
        validate_epochs: Validate every so many epochs.
        metrics: There are metrics over a validation.
        nested_metrics: One of them computes several values.
        schedule: When the scheduler moves.
        monitor: The metric that it follows.
        accumulate: Batches to an optimizer step.
        clip_norm: The largest norm of the gradients.
        precision: The number format.
        device: Where the model is.
        moves: Whether model and batches have to be brought there.
        modules: What else has to be brought there: ``loss_fn``, ``metrics``.
        policy: What happens to a value that is not finite.
        seed: What the run begins with.
        deterministic: Whether only deterministic kernels may be used.
        compile: ``"module"``: in place; ``"wrapped"``: through a wrapper, which torch's own classes need.
        mixed_modes: Some module of the model in training mode is in eval mode.
        beside: The model has trainable parameters that the optimizer does not hold.
        foreign: The optimizer holds parameters that the model does not have.
        sparse: Gradients may be sparse.
        lazy: Some parameter has not got its shape yet, as that of a lazy module that nobody calls.
        closure: The optimizer evaluates the loss itself.
        hooks: Hooks to the names of the callbacks that override them; empty where they are not to be shown.
        saves: The callbacks at whose word the loop saves.
        restores: The callback whose best weights the loop puts back.
    """

    custom_step: bool = False
    measures: bool = False
    ignores: bool = False
    layout: Layout | None = None
    sized: bool = True
    epochs: int | None = None
    steps: int | None = None
    fitted: bool = True
    ended: bool = False
    restored_epoch: int | None = None
    validation: Literal["given", "maybe"] | None = None
    validate_steps: int | None = None
    validate_epochs: int | None = None
    metrics: bool = False
    nested_metrics: bool = False
    schedule: Literal["step", "epoch"] | None = None
    monitor: str | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Precision = "fp32"
    device: str = "cpu"
    moves: bool = False
    modules: tuple[str, ...] = ()
    policy: NonFinitePolicy = "raise"
    seed: int | None = None
    deterministic: bool = False
    compile: Literal["module", "wrapped"] | None = None
    mixed_modes: bool = False
    beside: bool = False
    foreign: bool = False
    sparse: bool = False
    lazy: bool = False
    closure: bool = False
    hooks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    saves: Sequence[str] = ()
    restores: str | None = None

    @property
    def by_epochs(self) -> bool:
        """Whether epochs are counted up to a target."""
        return self.epochs is not None or not self.fitted

    @property
    def windows(self) -> bool:
        """Whether several batches make a step."""
        return self.accumulate > 1

    @property
    def weightless(self) -> bool:
        """Whether a batch may count for nothing."""
        return self.custom_step or self.ignores

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled."""
        return self.precision == "fp16"

    @property
    def may_skip(self) -> bool:
        """Whether a window may end without a step."""
        return self.scaled or self.policy == "skip" or (self.windows and self.weightless)

    @property
    def listed(self) -> bool:
        """Whether the losses of a window are kept until its step: for a mean over it, or since they may be dropped."""
        follows = self.schedule == "step" and self.monitor is not None and not self.monitor.startswith("val/")
        return self.windows and (self.policy == "skip" or follows)

    @property
    def with_sentinel(self) -> bool:
        """Whether a last short window shows only when the data is over."""
        return self.windows and not self.sized

    @property
    def numbered(self) -> bool:
        """Whether the batches of an epoch are counted."""
        return self.sized and (self.windows or (self.steps is not None and self.ends_matter))

    @property
    def ends_matter(self) -> bool:
        """Whether anything is done at the end of whole epochs only."""
        return self.schedule == "epoch" or self.validate_epochs is not None

    @property
    def waits(self) -> bool:
        """Whether a score may wait for the scheduler's next move: it moves elsewhere, or not after a skipped epoch."""
        if self.schedule is None or self.monitor is None or not self.monitor.startswith("val/"):
            return False
        return self.schedule == "step" or (self.may_skip and (self.validate_epochs or 1) > 1)

    @property
    def flagged(self) -> bool:
        """Whether it has to be remembered that a batch made a step."""
        return self.validate_steps is not None and (self.windows or self.may_skip)

    @property
    def sorted_out(self) -> bool:
        """Whether the optimizer's parameters have to be told from the model's."""
        used = self.clip_norm is not None or self.windows or (self.policy == "skip" and not self.scaled)
        return used and (self.beside or self.foreign)

    @property
    def weight(self) -> str:
        """The expression for what a batch counts for."""
        if self.windows or self.weightless or self.custom_step:
            return "weight"
        return self.size

    @property
    def size(self) -> str:
        """The expression for a batch's size."""
        layout = self.layout
        if self.custom_step:
            return (layout and layout.size) or "size_of(batch)"
        return (layout and layout.pair_size) or "size_of([inputs, targets])"
