"""What one inspection has taken from a step, and the numbers that it comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loopwright.inspecting.inspection import COLUMNS, MISSING, Inspection, Parameter
from loopwright.inspecting.listing import Listing
from loopwright.inspecting.small import Rows


class Taken:
    """One inspected step. Of a small model its numbers are worked out when somebody asks, and not within the step.

    Args:
        listing: What was measured.
        step: The number of the step.
        numbers: The columns, read from the device already, or the rows that they are to be worked out from.
        shares: For each call of a watched activation, the share of its outputs at their limits.
        rates: The learning rate of each parameter group.
        clip_norm: The largest norm allowed, for the record.
        made: Whether the step was made at all.
    """

    __slots__ = ("_listing", "_numbers", "_shares", "clip_norm", "made", "rates", "step")

    def __init__(
        self,
        listing: Listing,
        step: int,
        numbers: Mapping[str, list[float]] | Rows,
        shares: Sequence[tuple[str, float | Tensor]],
        rates: list[float],
        clip_norm: float | None,
        made: bool,
    ) -> None:
        self._listing, self._numbers, self._shares = listing, numbers, shares
        self.step: int = step
        self.rates: list[float] = rates
        self.clip_norm: float | None = clip_norm
        self.made: bool = made

    @property
    def parameters(self) -> list[Parameter]:
        """What was measured, in the order of the inspection's numbers."""
        return self._listing.parameters

    @property
    def keeps(self) -> bool:
        """Whether all that it is worked out from stays as it is, so that it can wait."""
        return isinstance(self._numbers, Rows)

    def inspection(self) -> Inspection:
        """What the step comes to."""
        table, listing = self._table(), self._listing
        norms = table["grad"]
        return Inspection(
            step=self.step,
            **table,  # type: ignore[arg-type]  # eight lists of floats
            rates=self.rates,
            saturated=_means([(name, float(s)) for name, s in self._shares if not listing.is_output(name)]),
            clip_norm=self.clip_norm,
            total=math.sqrt(sum([norms[i] ** 2 for i in listing.steered if norms[i] != MISSING])),
        )

    def _table(self) -> Mapping[str, list[float]]:
        if not isinstance(self._numbers, Rows):
            return self._numbers
        columns, listing = self._numbers.columns(), self._listing
        if not self.made:
            columns["update"] = [MISSING] * len(listing.trained)
        if len(listing.trained) == len(listing.parameters):
            return columns
        table = blank(len(listing.parameters))
        for column, values in columns.items():
            for place, value in zip(listing.trained, values, strict=True):
                table[column][place] = value
        return table

    def silent(self, inspection: Inspection, quiet: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The silences of the units of a layer, from the first time on at which half of it is silent.

        Args:
            inspection: What this one comes to.
            quiet: What this returned for the one before.

        Returns:
            For how many inspections in a row each unit's gradient was zero, and the longest such time that has ended.
        """
        found = dict(quiet)
        if not found and not any(inspection.zeros):
            return found
        for i in self._listing.units:
            parameter = self.parameters[i]
            before = quiet.get(parameter.name)
            if before is None and inspection.zeros[i] < 0.5 * parameter.size:
                continue
            if (gradient := self._gradient(i)) is None:
                continue
            silent = gradient.reshape(parameter.units, -1).eq(0).all(1)
            if before is None or before.shape != (2, *silent.shape):
                before = silent.new_zeros((2, *silent.shape), dtype=torch.int32)
            now, ended = before.to(silent.device)
            found[parameter.name] = torch.stack(
                [torch.where(silent, now + 1, 0), torch.where(silent, ended, torch.maximum(now, ended))]
            )
        return found

    def _gradient(self, place: int) -> Tensor | None:
        if isinstance(self._numbers, Rows):
            trained = self._listing.trained
            return self._numbers.gradient(trained.index(place)) if place in trained else None
        gradient = self._listing.tensors[place].grad
        return gradient if gradient is not None and gradient.layout is torch.strided else None


def blank(count: int) -> dict[str, list[float]]:
    """The columns before anything is known of so many parameters."""
    return {c: [MISSING if c in ("grad", "weight", "update") else 0.0] * count for c in COLUMNS}


def _means(shares: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The mean share of each activation over its calls."""
    found: dict[str, list[float]] = {}
    for name, share in shares:
        found.setdefault(name, []).append(share)
    return {name: sum(values) / len(values) for name, values in found.items()}
