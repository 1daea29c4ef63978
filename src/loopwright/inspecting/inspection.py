"""What an inspection of the gradients has measured, and the record of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from loopwright.errors import CheckpointError
from loopwright.forms import Count, check_form

MISSING = -1.0  # in place of a norm: there was no gradient, or no update was made
_FIRST, _NEWEST, _MOST = 8, 24, 64  # inspections that are kept: the first, the newest, and in all


@dataclass(slots=True)  # not frozen, which would make each one cost three times as much
class Parameter:
    """What is known of a parameter beside its numbers.

    Attributes:
        name: Its name in the model.
        layer: The name of the layer that holds it.
        kind: The class of that layer.
        size: The number of its elements; a complex one counts for two.
        units: How many its layer puts out, where it is that layer's bias, or the weight of one without; else 0.
        matrix: Whether it has two dimensions or more.
        trainable: Whether it requires a gradient.
        group: Its parameter group in the optimizer, or -1.
        turn: When its layer was called first in the forward pass, counted from 0; -1 where it was not.
        fresh: Whether it belongs to a normalisation that is in eval mode with the statistics it was made with.
    """

    name: str
    layer: str
    kind: str
    size: int
    units: int
    matrix: bool
    trainable: bool
    group: int
    turn: int
    fresh: bool


@dataclass(slots=True)
class Inspection:
    """The numbers of one inspected step: for each parameter, by its place in the record.

    Attributes:
        step: The number of the optimizer step.
        grad: Norms of the gradients, ``MISSING`` where there is none.
        weight: Norms of the weights before the step.
        update: Norms of what the step changed, ``MISSING`` where it was not made.
        zeros: How many elements of the gradient are zero.
        bad: How many are NaN or infinite.
        dot: The product of the gradient with that of the step before, of a large one as its sample has it.
        now: The squared norm of the gradient, likewise.
        then: That of the one before; 0 where there is none to compare with.
        rates: The learning rate of each parameter group.
        saturated: For each watched activation, the share of outputs at its limits.
        clip_norm: The largest norm that was allowed, or None.
        total: The norm of all gradients that the optimizer holds.
        attempts: How many steps were tried; all but the last were skipped.
    """

    step: int
    grad: list[float]
    weight: list[float]
    update: list[float]
    zeros: list[float]
    bad: list[float]
    dot: list[float]
    now: list[float]
    then: list[float]
    rates: list[float] = field(default_factory=list)
    saturated: dict[str, float] = field(default_factory=dict)
    clip_norm: float | None = None
    total: float = 0.0
    attempts: int = 1


COLUMNS = ("grad", "weight", "update", "zeros", "bad", "dot", "now", "then")
_NUMBERS = attrgetter(*COLUMNS)  # these, and not dataclasses.asdict, since every fit ends by asking for the state
_FACTS = tuple(f.name for f in fields(Parameter))
_KNOWN = attrgetter(*_FACTS)


class _Parameter(TypedDict):
    name: str
    layer: str
    kind: str
    size: Count
    units: Count
    matrix: bool
    trainable: bool
    group: int
    turn: int
    fresh: bool


class _Rest(TypedDict):
    step: Count
    rates: list[float]
    saturated: dict[str, float]
    clip_norm: float | None
    total: float
    attempts: Count


class _Saved(TypedDict):
    parameters: list[_Parameter]
    numbers: Tensor  # (inspections, columns, parameters)
    rest: list[_Rest]
    quiet: dict[str, Tensor]
    count: Count


SavedRecord: TypeAlias = _Saved
"""The form of what ``Record.state_dict`` returns."""


class Record:
    """The inspections of a run, of which a bounded number is kept: the first, the newest, and a thinned middle.

    Attributes:
        parameters: What they are about. A parameter that comes later is appended.
        inspections: In the order of their steps.
        quiet: For the weights of some layers, for how many inspections in a row each unit's gradient was zero, and the
            longest such time that has ended.
        count: How many inspections there were in all.
    """

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.inspections: list[Inspection] = []
        self.quiet: dict[str, Tensor] = {}
        self.count: int = 0
        self._known: Sequence[Parameter] = ()  # the list whose places are the record's own

    def add(self, parameters: Sequence[Parameter], inspection: Inspection) -> None:
        """Take in one inspection of these parameters.

        Args:
            parameters: In the order of the inspection's numbers.
            inspection: Its numbers.
        """
        if parameters is not self._known:
            if not self.parameters or [p.name for p in parameters] == [p.name for p in self.parameters]:
                self._known, self.parameters = parameters, list(parameters)
            else:
                self.parameters, inspection = self._placed(parameters, inspection)
                self._known = ()
        if self.inspections and self.inspections[-1].step == inspection.step:  # that attempt was skipped
            attempts = self.inspections.pop().attempts + 1
            inspection = replace(inspection, attempts=attempts)
        else:
            self.count += 1
        self.inspections.append(inspection)
        if len(self.inspections) > _MOST:
            del self.inspections[_FIRST:-_NEWEST:2]

    def _placed(self, parameters: Sequence[Parameter], inspection: Inspection) -> tuple[list[Parameter], Inspection]:
        """Both with each parameter at its old place, and the new ones after those; all before gets room for them."""
        now = {p.name: p for p in parameters}
        merged = [now.get(p.name, p) for p in self.parameters]
        known = {p.name for p in merged}
        added = [p for p in parameters if p.name not in known]
        merged += added
        self.inspections = [_moved(one, list(range(len(known))) + [-1] * len(added)) for one in self.inspections]
        place = {p.name: i for i, p in enumerate(parameters)}
        return merged, _moved(inspection, [place.get(p.name, -1) for p in merged])

    def state_dict(self) -> SavedRecord:
        """All of it, as plain data and tensors."""
        rows = list(map(_NUMBERS, self.inspections))
        shape = len(rows), len(COLUMNS), len(self.parameters)
        return {
            "parameters": [dict(zip(_FACTS, _KNOWN(p), strict=True)) for p in self.parameters],  # type: ignore[misc]  # its very fields
            "numbers": torch.tensor(rows, dtype=torch.float64).reshape(shape),
            "rest": [
                {
                    "step": one.step,
                    "rates": list(one.rates),
                    "saturated": dict(one.saturated),
                    "clip_norm": one.clip_norm,
                    "total": one.total,
                    "attempts": one.attempts,
                }
                for one in self.inspections
            ],
            "quiet": dict(self.quiet),
            "count": self.count,
        }

    @classmethod
    def from_state_dict(cls, state: Any) -> Record:
        """The record that ``state_dict`` described.

        Raises:
            CheckpointError: It is something else.
        """
        check_form(state, _Saved)
        numbers, rest, parameters = state["numbers"], state["rest"], state["parameters"]
        if numbers.shape != (len(rest), len(COLUMNS), len(parameters)) or not numbers.is_floating_point():
            raise CheckpointError("the inspections in the checkpoint contradict themselves")
        record = cls()
        record.parameters = [Parameter(**p) for p in parameters]
        record.inspections = [
            Inspection(**dict(zip(COLUMNS, columns, strict=True)), **one)
            for columns, one in zip(numbers.tolist(), rest, strict=True)
        ]
        # Of version 0.1.0 there is one row alone, without the times that have ended.
        record.quiet = {name: quiet for name, quiet in state["quiet"].items() if quiet.ndim == 2 and len(quiet) == 2}
        record.count = state["count"]
        return record


def _moved(one: Inspection, places: list[int]) -> Inspection:
    """The inspection with its numbers taken from these places; -1 is for what it knows nothing of."""
    blank = {"grad": MISSING, "weight": MISSING, "update": MISSING}
    columns = {name: [getattr(one, name)[i] if i >= 0 else blank.get(name, 0.0) for i in places] for name in COLUMNS}
    return replace(one, **columns)  # type: ignore[arg-type]  # the columns are lists of floats


@dataclass(slots=True)
class LayerNumbers:
    """One layer in one inspection: its parameters taken together.

    Attributes:
        grad: Norm of the gradient, ``MISSING`` where no parameter has one.
        weight: Norm of the weights.
        update: Norm of what the step changed, ``MISSING`` where it was not made.
        zero: Share of zeros in the gradient.
        bad: Share of NaN and infinities in it.
        cosine: Between this gradient and that of the step before; NaN where there is none.
    """

    grad: float
    weight: float
    update: float
    zero: float
    bad: float
    cosine: float

    @property
    def ratio(self) -> float:
        """The update's norm over the weights'; NaN where there are none."""
        return self.update / self.weight if self.weight > 0 and self.update >= 0 else math.nan


def layer_numbers(one: Inspection, places: Sequence[int], sizes: Sequence[int]) -> LayerNumbers:
    """What the parameters at these places, of these sizes, come to together."""
    grad = weight = update = zeros = bad = dot = now = then = 0.0
    size, made = 0, False
    for i, numel in zip(places, sizes, strict=True):
        if (g := one.grad[i]) != MISSING:
            grad, size = grad + g * g, size + numel
            zeros, bad = zeros + one.zeros[i], bad + one.bad[i]
        if (w := one.weight[i]) != MISSING:
            weight += w * w
        if (u := one.update[i]) != MISSING:
            update, made = update + u * u, True
        if one.then[i]:
            dot, now, then = dot + one.dot[i], now + one.now[i], then + one.then[i]
    product = now * then
    cosine = dot / math.sqrt(product) if 0 < product < math.inf else math.nan
    return LayerNumbers(
        math.sqrt(grad) if size else MISSING,
        math.sqrt(weight),
        math.sqrt(update) if made else MISSING,
        zeros / size if size else 0.0,
        bad / size if size else 0.0,
        max(-1.0, min(1.0, cosine)) if cosine == cosine else math.nan,
    )


def layers_of(parameters: Sequence[Parameter]) -> Mapping[str, list[int]]:
    """The places of each layer's parameters, the layers in the order of the forward pass as far as it is known."""
    places: dict[str, list[int]] = {}
    for i, parameter in enumerate(parameters):
        places.setdefault(parameter.layer, []).append(i)
    turn, key = -1, {}
    for number, (layer, at) in enumerate(places.items()):
        own = parameters[at[0]].turn
        turn = own if own >= 0 else turn  # one that was never called stays beside the one registered before it
        key[layer] = (turn, number)
    return {layer: places[layer] for layer in sorted(places, key=key.__getitem__)}
