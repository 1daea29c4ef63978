"""In which number format the step computes."""

from __future__ import annotations

import contextlib
from typing import Literal, TypeAlias

import torch

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
