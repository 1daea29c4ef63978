"""Finds non-finite losses, gradient norms and parameters, and says where they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopwright.averages import Watch
from loopwright.errors import NonFiniteError
from loopwright.sizes import bad_weight
from loopwright.step import check_trainable

if TYPE_CHECKING:
    from loopwright.state import State

_SUMMED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_ROW = 128
LOSS, NORM = "the loss", "the norm of the gradients"

NonFinitePolicy: TypeAlias = Literal["raise", "skip", "ignore"]


class Guard:
    """Looks at losses and gradient norms under a policy.

    Args:
        policy: What to do about a non-finite value.
        eager: Whether each value is looked at as it comes. Otherwise they wait on the device until ``look``, which
            still finds the first.
    """

    def __init__(self, policy: NonFinitePolicy, *, eager: bool) -> None:
        self._policy = policy
        self._eager = eager
        self._losses, self._norms = Watch(), Watch()
        self._from = (0, 0, 0)
        self._accumulate = 1
        self._reads = 0
        self._weights = Weights()

    def begin(self, state: State[Any]) -> None:
        """From here on, values are counted: at an epoch's first batch, and after each look."""
        if self._eager:
            return
        self._losses, self._norms = Watch(), Watch()
        self._from = (state.progress.epoch, state.progress.batch, state.progress.step)
        self._accumulate = state.plan.accumulate
        self._reads = state.metrics.reads
        self._weights = Weights()

    def weight(self, state: State[Any], weight: float | Tensor) -> None:
        """Take in what a batch counts for, where that is on the device."""
        if isinstance(weight, Tensor):
            self._weights.add(state.progress.batch, weight)

    def loss(self, state: State[Any], loss: Tensor) -> tuple[float | Tensor, bool]:
        """The loss's value, still on the device unless it is read at every step, and whether it may be used.

        Raises:
            ConfigError: Backward cannot start from it.
            NonFiniteError: It is not finite, and the policy is ``"raise"``.
        """
        try:
            if not loss.requires_grad:
                raise TypeError
            if not self._eager:
                value = loss.detach().reshape(())
                if self._policy == "raise":
                    self._losses.add(value)
                return value, True
            number = loss.item()
            if math.isfinite(number):
                return number, True
        except (AttributeError, RuntimeError, TypeError):
            check_trainable(loss)  # asked only now: nothing to backward from, or no one real number
            raise
        if self._policy == "ignore":
            return number, True
        if self._policy == "raise":
            state.metrics.record("train/loss", number)
            progress = state.progress
            raise error_at(LOSS, number, progress.epoch, progress.batch, progress.step)
        return number, False

    def norm(self, state: State[Any], norm: Tensor) -> None:
        """Take in the norm of one step's gradients, where clipping has computed it.

        Raises:
            NonFiniteError: It is not finite, the policy is ``"raise"``, and values are read as they come.
        """
        if self._policy != "raise":
            return
        if not self._eager:
            self._norms.add(norm)
        elif not math.isfinite(number := norm.item()):
            progress, accumulate = state.progress, state.plan.accumulate
            first = progress.batch // accumulate * accumulate  # of the window
            raise error_at(NORM, number, progress.epoch, first, progress.step)

    def found(self, state: State[Any], what: str, value: float | Tensor | None) -> NonFiniteError:
        """The error for what is found at the present batch, or window, without raising it."""
        progress, accumulate = state.progress, state.plan.accumulate
        batch = progress.batch if what == LOSS else progress.batch // accumulate * accumulate
        return error_at(what, None if value is None else float(value), progress.epoch, batch, progress.step)

    def leave_out(self) -> None:
        """A batch or a window is not counted, so that those after it have to be counted anew."""
        self._reads = -1

    def look_if_read(self, state: State[Any]) -> None:
        """Look, if somebody has just waited for the device anyway."""
        if not self._eager and state.metrics.reads != self._reads:
            self.look(state)

    def look(self, state: State[Any]) -> None:
        """Look at what has waited on the device.

        Raises:
            NonFiniteError: One of the values is not finite; the error names the first.
            ConfigError: One of the weights is negative, or not finite.
        """
        if self._eager:
            return
        self._weights.check(f"epoch {state.progress.epoch + 1}, batch {{}}")
        epoch, batch, step = self._from
        window, within = divmod(batch, self._accumulate)  # the count may have begun in the middle of a window
        loss, norm = self._losses.first_bad(), self._norms.first_bad()
        if norm is not None and (loss is None or norm < (within + loss) // self._accumulate):
            first = (window + norm) * self._accumulate
            raise error_at(NORM, None, epoch, first, step + norm)
        if loss is not None:
            state.metrics.record("train/loss", math.nan)
            raise error_at(LOSS, None, epoch, batch + loss, step + (within + loss) // self._accumulate)
        self.begin(state)

    def parameters(self, model: nn.Module) -> None:
        """Look at every trainable parameter.

        Raises:
            NonFiniteError: One is not finite, and the policy is not ``"ignore"``.
        """
        if self._policy == "ignore":
            return
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if all_finite(trainable.values()):
            return
        bad = [name for name, p in trainable.items() if not all_finite([p])]
        error = NonFiniteError(
            f"{len(bad)} of {len(trainable)} trainable parameters hold NaN or infinite values: {', '.join(bad[:5])}"
            + (", ..." if len(bad) > 5 else ""),
            why="the gradients of an earlier step were not finite, or the learning rate is far too high",
            fix="a smaller learning rate, or clip_norm=1.0, which also checks the gradients of every step",
            found="parameters",
        )
        error.parameters = bad
        raise error


class Weights:
    """What batches count for, where that waits on a device to be looked at."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._newest: list[Tensor] = []
        self._rows: list[Tensor] = []  # a hundred to a row: a scalar of its own takes much memory there

    def add(self, number: int, weight: Tensor) -> None:
        """Take in the weight of the batch with this number, counted from 1."""
        self._numbers.append(number)
        self._newest.append(weight)
        if len(self._newest) >= _ROW:
            self._fold()

    def check(self, where: str) -> None:
        """Look at all of them, which waits for the device.

        Args:
            where: The words for a batch, with a place for its number.

        Raises:
            ConfigError: One is negative, or not finite; it names the first.
        """
        if not self._numbers:
            return
        if self._newest:
            self._fold()
        weights = torch.cat(self._rows)
        bad = (~(torch.isfinite(weights) & (weights >= 0))).nonzero()
        if len(bad):
            first = int(bad[0])
            raise bad_weight(float(weights[first]), " in " + where.format(self._numbers[first]))

    def _fold(self) -> None:
        self._rows.append(torch.stack([weight.float() for weight in self._newest]))
        self._newest = []


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element of every tensor is finite; waits for each device once, and again where one may not be."""
    there = (t for t in tensors if not is_lazy(t))  # one that was never given values has none
    dense = [t.detach().coalesce().values() if t.is_sparse else t for t in there]
    # A sum is not finite where one element is not. It may also be too large, which only looking at each can tell:
    # that takes thirty times as long on large tensors, for the tensors as large as these that it makes.
    summed = [t for t in dense if t.dtype in _SUMMED]
    others = [t for t in dense if t.dtype not in _SUMMED]
    return (_finite_sums(summed) or _each_finite(summed)) and _each_finite(others)


def _finite_sums(tensors: list[Tensor]) -> bool:
    sums = [t.sum() for t in tensors]
    device = next((t.device for t in sums if not t.is_cpu), None)
    if device is None:
        return all(math.isfinite(t.item()) for t in sums)
    return bool(torch.isfinite(torch.stack([t.to(device, torch.float32) for t in sums])).all())


def _each_finite(tensors: list[Tensor]) -> bool:
    flags = [torch.isfinite(t).all() for t in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def error_at(what: str, value: float | None, epoch: int, batch: int, step: int) -> NonFiniteError:
    """The error for a value found there, all counted from 0."""
    error = NonFiniteError(
        f"{what} is {'not finite' if value is None else value} in epoch {epoch + 1}, batch {batch + 1}, "
        f"at optimizer step {step + 1}",
        why="training on would turn the weights into NaN" if what == LOSS else "the step would ruin the weights",
        fix=f"a smaller learning rate{', clip_norm=1.0,' if what == LOSS else ''} or a look at that batch's data; "
        'on_nonfinite="skip" drops such batches',
        found="loss" if what == LOSS else "gradient",
    )
    error.epoch, error.batch, error.step = epoch + 1, batch + 1, step + 1
    return error
