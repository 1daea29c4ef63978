"""Passes over random inputs: what they reach, others than the data may reach."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.checks.rehearsal import Rehearsed, Subject, train
from loopwright.device import map_tensors


def probe(subject: Subject, batches: Iterable[Any], names: Mapping[int, str]) -> Rehearsed:
    """The forward and backward passes on batches of the same shapes with random contents, for what they reach.

    Numbers are drawn at three sizes, up to a thousand; integers between the smallest and the largest in their tensor.

    Args:
        subject: The parts; no step is made.
        batches: The batches.
        names: As for ``train``.
    """
    found = Rehearsed()
    for size in (1.0, 30.0, 1000.0):
        drawn = [map_tensors(functools.partial(_drawn, size=size), batch) for batch in batches]
        found.reached_each += train(subject, drawn, names, update=False).reached_each
    return found


def _drawn(tensor: Tensor, size: float) -> Tensor:
    if tensor.layout != torch.strided or tensor.dtype == torch.bool or not tensor.numel() or tensor.is_quantized:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.randn_like(tensor) * size if tensor.dtype.itemsize > 1 else tensor
    return torch.randint_like(tensor, int(tensor.min()), int(tensor.max()) + 1)
