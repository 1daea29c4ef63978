"""The batches accumulated into one optimizer step, and what each counts for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.averages import Averages, weighted_mean

Values = Mapping[str, float | Tensor]


class Window:
    """The open window: its losses, its weights, and the arithmetic that makes its gradient a weighted mean.

    With weights w_i and losses l_i, the gradient wanted is that of sum(w_i * l_i) / sum(w_i), and the sum of the
    weights is known only at the end. So each backward runs on l_i / (k * w_1 / w_i), k the number of
    batches that the window will hold, and the end divides by sum(w_i) / (k * w_1). Where all weights
    are equal the first is l_i / k and the second is 1: the bits of ``(loss / k).backward()``.

    Args:
        size: The number of batches that the window will hold, k.
        begins: The batches of the epoch and the samples of the run that come before it.
    """

    __slots__ = ("_entries", "_even", "_first", "_total", "begins", "finite", "size")

    def __init__(self, size: int, begins: tuple[int, int] = (0, 0)) -> None:
        self.size: int = size
        self.begins: tuple[int, int] = begins
        self.finite: bool = True
        self._entries: list[tuple[Values, float | Tensor]] = []
        self._even = True  # whether all weights are one and the same number
        self._first: float | Tensor = 0.0
        self._total: float | Tensor = 0.0

    @property
    def full(self) -> bool:
        """Whether the window holds all that it was to hold."""
        return len(self._entries) >= self.size

    def add(self, values: Values, weight: float | Tensor) -> None:
        """Take in what one batch came to."""
        if self.size == 1:
            self._entries = [(values, weight)]
            return
        self._entries.append((values, weight))
        if isinstance(weight, Tensor):
            weight = _wide(weight)
            # A fill needs no transfer, and a transfer would wait for the device.
            first = self._first if isinstance(self._first, Tensor) else torch.full_like(weight, self._first)
            self._first = torch.where(first == 0, weight, first)
        else:
            self._first = self._first or weight
            self._even = self._even and 0 != weight == self._first
        self._total = self._total + weight

    def divisor(self, weight: float | Tensor, dtype: torch.dtype) -> float | Tensor:
        """What to divide the newest batch's loss by before its backward."""
        if isinstance(weight, Tensor):
            # In float64, and only then in the loss's own format: equal weights must give exactly k.
            wide = _wide(weight)
            divisor = torch.where(wide == self._first, float(self.size), self.size * self._first / wide)
            return torch.where(wide == 0, math.inf, divisor).to(dtype)
        if weight == self._first:
            return self.size  # which rounding might miss
        return self.size * self._first / weight if weight else math.inf

    @property
    def empty(self) -> bool:
        """Whether nothing in the window counts for anything, as far as that is known without a device."""
        return self.size > 1 and not isinstance(self._total, Tensor) and self._total == 0

    def correction(self) -> float | Tensor | None:
        """What to divide the gradients by before the optimizer's step; None for nothing."""
        if self.size == 1:
            return None
        expected = self.size * self._first
        if isinstance(expected, Tensor):
            return torch.where(expected == 0, torch.ones_like(expected), self._total / expected)
        if self._even:  # the sum of equal fractions may miss their product by a bit
            return None if self.full else len(self._entries) / self.size
        return None if self._total == expected else self._total / expected

    def state_dict(self) -> dict[str, Any]:
        """The window half full; its gradients are with the model."""
        return {
            "size": self.size,
            "begins": self.begins,
            "finite": self.finite,
            "entries": [(dict(values), weight) for values, weight in self._entries],
            "even": self._even,
            "first": self._first,
            "total": self._total,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Window:
        """The window that ``state_dict`` described."""
        window = cls(state["size"], state["begins"])
        window.finite, window._entries, window._even = state["finite"], list(state["entries"]), state["even"]
        window._first, window._total = state["first"], state["total"]
        return window

    def commit(self, averages: Averages) -> Values:
        """Add the window to the epoch's averages; the window's own means, not yet read from the device."""
        if len(self._entries) == 1:
            values, weight = self._entries[0]
            averages.add(values, weight)
            return values
        for values, weight in self._entries:
            averages.add(values, weight)
        rows: dict[str, list[tuple[float | Tensor, float | Tensor]]] = {}
        for values, weight in self._entries:
            for name, value in values.items():
                rows.setdefault(name, []).append((value, weight))
        return {name: weighted_mean(pairs) for name, pairs in rows.items()}


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
