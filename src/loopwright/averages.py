"""Weighted means, summed where the values are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FOLD = 128  # values kept on the device before they are summed there: memory stays flat, and few kernels run


class Averages:
    """Weighted means of several names over an epoch, a window or an evaluation pass.

    Args:
        eager: Whether values are read as they come, as is free on a CPU. Otherwise they stay on the device, are
            summed there in float64 (float32 where the device has none), and ``means`` waits for them once.
    """

    def __init__(self, *, eager: bool) -> None:
        self._eager = eager
        self._sums: dict[str, float | Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}
        self._rows: list[tuple[Mapping[str, float | Tensor], float | Tensor]] = []  # not yet in the sums

    def add(self, values: Mapping[str, float | Tensor], weight: float | Tensor) -> None:
        """Take in the values of one batch. A batch of weight 0 counts for nothing, even if its loss is NaN."""
        if self._eager:
            sums, weights, number = self._sums, self._weights, float(weight)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + (float(value) * number if number else 0.0)
                weights[name] = weights.get(name, 0.0) + number
            return
        self._rows.append((values, weight))
        if len(self._rows) >= _FOLD:
            self._fold()

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        self._fold()
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._sums, self._weights, self._rows = dict(state["sums"]), dict(state["weights"]), []

    def means(self) -> dict[str, float]:
        """The mean of every name, as floats; NaN where all weights were 0."""
        self._fold()
        if self._eager:
            return {name: _ratio(float(total), float(self._weights[name])) for name, total in self._sums.items()}
        # One transfer for all of them.
        numbers = [x for name in self._sums for x in (self._sums[name], self._weights[name])]
        tensors = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in numbers]
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        read = torch.stack([t.to(device, _wide(device)) for t in tensors]).tolist() if tensors else []
        return {name: _ratio(read[2 * i], read[2 * i + 1]) for i, name in enumerate(self._sums)}

    def _fold(self) -> None:
        rows, self._rows = self._rows, []
        pending: dict[str, list[tuple[float | Tensor, float | Tensor]]] = {}
        for values, weight in rows:
            for name, value in values.items():
                pending.setdefault(name, []).append((value, weight))
        for name, pairs in pending.items():
            self._fold_on_device(name, pairs)

    def _fold_on_device(self, name: str, pending: list[tuple[float | Tensor, float | Tensor]]) -> None:
        device = next((x.device for pair in pending for x in pair if isinstance(x, Tensor)), torch.device("cpu"))
        wide = _wide(device)
        values = torch.stack([_on(value, device) for value, _ in pending]).to(wide)
        first = pending[0][1]
        if not isinstance(first, Tensor) and first and all(weight is first or weight == first for _, weight in pending):
            total = values.sum() * first
            weights: float | Tensor = float(first) * len(pending)
        else:
            spread = torch.stack([_on(weight, device) for _, weight in pending]).to(wide)
            total = torch.where(spread == 0, torch.zeros_like(values), values * spread).sum()
            weights = spread.sum()
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._weights[name] = self._weights.get(name, 0.0) + weights


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


def weighted_mean(pairs: Sequence[tuple[float | Tensor, float | Tensor]]) -> float | Tensor:
    """The weighted mean of values and weights: a float where all are, else a tensor that nobody waited for."""
    device = next((x.device for pair in pairs for x in pair if isinstance(x, Tensor)), None)
    if device is None:
        total = sum(float(weight) for _, weight in pairs)
        return sum(value * weight for value, weight in pairs if weight) / total if total else float("nan")
    values, weights = (torch.stack([_on(pair[i], device) for pair in pairs]).to(_wide(device)) for i in (0, 1))
    return torch.where(weights == 0, torch.zeros_like(values), values * weights).sum() / weights.sum()


class Watch:
    """Finds the first non-finite of a row of scalars on a device, without waiting for the device."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._folded = 0
        self._first: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Take in the next scalar."""
        self._pending.append(value)
        if len(self._pending) >= _FOLD:
            self._fold()

    def first_bad(self) -> int | None:
        """Which of the scalars, counted from 0, was the first non-finite one; waits for the device."""
        if self._pending:
            self._fold()
        first = -1 if self._first is None else int(self._first)
        return None if first < 0 or first >= self._folded else first

    def _fold(self) -> None:
        finite = torch.isfinite(torch.stack(self._pending))
        index = torch.arange(self._folded, self._folded + len(self._pending), device=finite.device)
        self._folded += len(self._pending)
        self._pending = []
        none = torch.full_like(index, torch.iinfo(index.dtype).max)
        first = torch.where(finite, none, index).min()
        self._first = first if self._first is None else torch.minimum(self._first, first)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _on(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, _wide(device))
    return torch.full((), value, dtype=_wide(device), device=device)  # a fill needs no transfer
