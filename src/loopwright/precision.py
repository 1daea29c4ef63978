"""In which number format the step computes."""

from __future__ import annotations

import contextlib
from typing import Literal, TypeAlias

import torch
from torch.optim import Optimizer

from loopwright.errors import ConfigError

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object] | None:
    """A context, to be entered anew at every step, in which torch computes in ``precision``; None for ``"fp32"``."""
    if precision == "fp32":
        return None
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """The scaler that keeps fp16 gradients from vanishing, or None for the other precisions."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Divide the gradients by the scale.

    Raises:
        ConfigError: Some of them are float16.
    """
    try:
        scaler.unscale_(optimizer)
    except ValueError as error:
        if "FP16 gradients" in str(error):  # torch's words
            raise half_weights() from error
        raise


def half_weights() -> ConfigError:
    """The error for weights that are float16 themselves under fp16."""
    return ConfigError(
        "precision='fp16' does not go with trained weights that are float16 themselves",
        why="their gradients are float16 as well, and lose in it what the scaled loss was to save; torch does not "
        "unscale them",
        fix="leave out model.half(), or take it back with model.float(): precision='fp16' computes in float16, and "
        "leaves the weights in float32",
    )
