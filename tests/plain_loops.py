"""Training loops as one writes them by hand in raw PyTorch: what the trainer has to equal, bit for bit.

Nothing of the library is imported here. The first three loops are the ones that tutorials teach; ``plain_loop``
has everything that a trainer can be asked for, and is itself compared with the first three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Batches = Iterable[Any]
Loss = Callable[[Any, Any], Tensor]


@dataclass
class Trace:
    """What a loop came to: its losses, batch by batch, and its means."""

    losses: list[Tensor] = field(default_factory=list)
    train_means: list[float] = field(default_factory=list)
    val_means: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0


def textbook_loop(model: nn.Module, optimizer: Optimizer, loss_fn: Loss, train: Batches, epochs: int) -> list[Tensor]:
    losses = []
    for _ in range(epochs):
        model.train()
        for inputs, targets in train:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            optimizer.step()
            losses.append(loss.detach())
    return losses


def textbook_clipping_loop(
    model: nn.Module, optimizer: Optimizer, loss_fn: Loss, train: Batches, epochs: int, max_norm: float
) -> list[Tensor]:
    losses = []
    for _ in range(epochs):
        model.train()
        for inputs, targets in train:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            losses.append(loss.detach())
    return losses


def textbook_accumulating_loop(
    model: nn.Module, optimizer: Optimizer, loss_fn: Loss, train: list[Any], epochs: int, accumulate: int
) -> list[Tensor]:
    """For batches of one size whose number is a multiple of ``accumulate``."""
    losses = []
    for _ in range(epochs):
        model.train()
        optimizer.zero_grad()
        for i, (inputs, targets) in enumerate(train):
            loss = loss_fn(model(inputs), targets)
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
    return losses


def plain_loop(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Loss,
    train: Batches,
    *,
    epochs: int,
    val: Batches | None = None,
    validate_steps: int | None = None,
    scheduler: LRScheduler | None = None,
    each: Literal["step", "epoch"] = "epoch",
    monitor: str = "val/loss",
    accumulate: int = 1,
    clip_norm: float | None = None,
    dtype: torch.dtype | None = None,
) -> Trace:
    """The loop with all that one adds to it over time.

    Args:
        model: The model.
        optimizer: Its optimizer.
        loss_fn: The mean loss over a batch.
        train: Batches of inputs and targets.
        epochs: How many.
        val: Batches to validate on: every ``validate_steps`` optimizer steps, or after each epoch.
        validate_steps: See ``val``.
        scheduler: Moves after each optimizer step, or at the end of each epoch after its validation.
        each: Says which.
        monitor: What a plateau scheduler follows at the end of an epoch, if it is new: train/loss or val/loss.
        accumulate: Batches to a step. A window's gradient is that of the mean over all its samples; the last
            window of an epoch may be short.
        clip_norm: The largest norm of the gradients.
        dtype: What autocast computes in; float16 scales the loss.
    """
    trace = Trace()
    scaler = torch.amp.GradScaler("cpu") if dtype is torch.float16 else None
    try:
        length = len(train)  # type: ignore[arg-type]  # where it has none, that is what we want to know
    except TypeError:
        length = None

    def validate(val: Batches) -> float:
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for inputs, targets in val:
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = loss_fn(model(inputs), targets)
                total += loss.item() * len(inputs)
                count += len(inputs)
        model.train()
        trace.val_means.append(total / count)
        return total / count

    def step(sizes: list[int], planned: int) -> bool:
        """Make the step of a window of these sizes; whether it was made, and not skipped."""
        if scaler is not None:
            scaler.unscale_(optimizer)
        share = sum(sizes) / (planned * sizes[0])
        if share != 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= share
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        lr = optimizer.param_groups[0]["lr"]
        if scaler is None:
            optimizer.step()
        else:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                trace.skipped += 1
                return False
        trace.steps += 1
        trace.lrs.append(lr)
        if scheduler is not None and each == "step":
            scheduler.step()
        return True

    for _ in range(epochs):
        model.train()
        total, count = 0.0, 0
        new: dict[str, float] = {}
        sizes: list[int] = []  # of the window's batches so far
        planned = accumulate
        for index, (inputs, targets) in enumerate(train):
            if not sizes:
                optimizer.zero_grad()
                planned = accumulate if length is None else min(accumulate, length - index)
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_fn(model(inputs), targets)
            sizes.append(len(inputs))
            part = loss / (planned * sizes[0] / sizes[-1])
            if scaler is None:
                part.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            else:
                scaler.scale(part).backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            trace.losses.append(loss.detach())
            total += loss.item() * len(inputs)
            count += len(inputs)
            if len(sizes) == planned:
                made = step(sizes, planned)
                sizes = []
                if made and val is not None and validate_steps and trace.steps % validate_steps == 0:
                    new["val/loss"] = validate(val)
        if sizes and step(sizes, planned) and val is not None and validate_steps and trace.steps % validate_steps == 0:
            new["val/loss"] = validate(val)
        new["train/loss"] = total / count
        trace.train_means.append(total / count)
        if val is not None and not validate_steps:
            new["val/loss"] = validate(val)
        if scheduler is not None and each == "epoch":
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif monitor in new:
                scheduler.step(new[monitor])
    return trace
