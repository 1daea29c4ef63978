"""The same measurements for a small model, where what they cost is the number of different calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import methodcaller
from typing import TypeAlias

import torch
from torch import Tensor

from loopwright.inspecting.inspection import Parameter

_SMALL = 2**14  # elements in all
_SMALL_TABLE = 2**20  # elements times tensors: of ones and zeros that say which element belongs to which
_COUNTED = 2**8  # elements that are computed with in python, which is quicker than calls that torch has not made lately

_flatten: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors  # in one call
_PLACE = methodcaller("data_ptr")
_Columns: TypeAlias = dict[str, list[float]]


class Small:
    """All trainable parameters as one vector.

    Within the step it only copies. With the gradient, that of the step before, the weights and their change as the
    rows of a matrix, all products of two rows are one multiplication, and their sums over each parameter another, by
    ones and zeros. Of a tiny model the rows are lists of floats: one operation of torch that was not called lately
    takes longer.

    Args:
        parameters: What is known of them.
        tensors: They themselves, of one format and on one device.
    """

    def __init__(self, parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> None:
        self._names = [p.name for p in parameters]
        sizes = [p.size for p in parameters]
        self._tensors = list(tensors)
        ends = list(accumulate(sizes))
        self._bounds = list(zip([0, *ends], ends, strict=False))
        self._belongs: Tensor | None = None
        if ends[-1] > _COUNTED:
            each = torch.eye(len(tensors), dtype=tensors[0].dtype)
            self._belongs = each.repeat_interleave(torch.tensor(sizes), 0)
        self._weights: list[Tensor] = []
        self._places: list[int] = []
        self._shapes = [tensor.shape for tensor in tensors]
        self._held: Tensor | None = None  # the gradients of a step that the next one's are compared with
        self._earlier: Tensor | None = None  # those that go with what before has taken
        self._before: Tensor | None = None

    def remember(self) -> bool:
        """Keep a copy of the present gradients; False where there is none."""
        # A copy, since clipping, the optimizer and whoever clears gradients may write to them.
        gradients = self._gradients()
        if gradients is None or [g.shape for g in gradients] != self._shapes:  # the weights have another one since
            self._held = None
            return False
        self._held = _copied(gradients)
        return True

    def forget(self) -> None:
        """Let go of what ``remember`` has kept."""
        self._held = None

    def earlier(self) -> dict[str, Tensor]:
        """Copies of the gradients that are kept."""
        if self._held is None:
            return {}
        parts = zip(self._names, self._shapes, self._bounds, strict=True)
        return {name: self._held[start:end].reshape(shape).clone() for name, shape, (start, end) in parts}

    def _gradients(self) -> list[Tensor] | None:
        found = []
        for tensor in self._tensors:
            gradient = tensor.grad
            if gradient is None or gradient.layout is not torch.strided:
                return None
            found.append(gradient)
        return found

    def _current(self) -> list[Tensor]:
        """The weights without their history: made once, and again where somebody has put other data in their place."""
        places = list(map(_PLACE, self._tensors))
        if places != self._places:
            self._places, self._weights = places, [tensor.detach() for tensor in self._tensors]
        return self._weights

    def before(self, earlier: Mapping[str, Tensor]) -> bool:
        """Take the gradients, those of the step before, and the weights; False where this way is not open.

        Args:
            earlier: The gradients of the step before that a resume has brought.
        """
        gradients, held = self._gradients(), self._held
        if gradients is None:
            self._held = None
            return False
        if held is None and earlier.keys() == set(self._names):
            brought = [earlier[name].to(g) for name, g in zip(self._names, gradients, strict=True)]
            if all(a.shape == b.shape and a.layout is b.layout for a, b in zip(gradients, brought, strict=True)):
                held = _copied(brought)
        self._earlier, self._held = held, None
        self._before = _flatten([*gradients, *self._current()])
        return True

    def after(self) -> Rows:
        """All that ``before`` has taken, and the weights as they are now."""
        assert self._before is not None
        values = _flatten([self._before, *self._current()])
        if values.requires_grad:  # of a backward with create_graph=True
            values = values.detach()
        earlier = self._earlier
        self.drop()
        return Rows(values, earlier, self._bounds, self._belongs)

    def drop(self) -> None:
        """Let go of what ``before`` has taken."""
        self._before = self._earlier = None


class Rows:
    """Gradients, weights and weights after the step, and gradients of the step before, taken but not yet looked at.

    Args:
        values: The first three, one after the other.
        earlier: The gradients of the step before, or None.
        bounds: Where each parameter begins and ends in each of the four.
        belongs: For each parameter, ones at the elements that are its own; None where they are few.
    """

    def __init__(
        self,
        values: Tensor,
        earlier: Tensor | None,
        bounds: Sequence[tuple[int, int]],
        belongs: Tensor | None,
    ) -> None:
        self._values, self._earlier, self._bounds, self._belongs = values, earlier, bounds, belongs

    def gradient(self, number: int) -> Tensor:
        """The gradient of one of the parameters, as a vector."""
        start, end = self._bounds[number]
        return self._values[start:end]

    def columns(self) -> _Columns:
        """The columns of an inspection."""
        size = self._bounds[-1][1]
        earlier = self._values[:size] if self._earlier is None else self._earlier
        columns = (
            self._by_floats(self._values.tolist(), earlier.tolist(), size)
            if self._belongs is None
            else self._by_products(self._values.view(3, -1), earlier, self._belongs)
        )
        if self._earlier is None:
            columns["dot"] = columns["now"] = columns["then"] = [0.0] * len(self._bounds)
        return columns

    def _by_floats(self, values: list[float], before: list[float], size: int) -> _Columns:
        hypot, dist = math.hypot, math.dist
        grad, weight, update, zeros, dot, now, then = [], [], [], [], [], [], []
        for start, end in self._bounds:
            g, h = values[start:end], before[start:end]
            w, v = values[size + start : size + end], values[2 * size + start : 2 * size + end]
            norm, earlier, between = hypot(*g), hypot(*h), dist(g, h)
            grad.append(norm)
            weight.append(hypot(*w))
            update.append(dist(v, w))
            zeros.append(float(g.count(0.0)))
            now.append(norm := norm * norm)
            then.append(earlier := earlier * earlier)
            dot.append((norm + earlier - between * between) / 2)  # |a - b|^2 = |a|^2 + |b|^2 - 2ab
        bad = [0.0] * len(zeros)
        if not math.isfinite(sum(grad)):
            bad = [float(sum(not math.isfinite(x) for x in values[start:end])) for start, end in self._bounds]
        return {
            "grad": grad,
            "weight": weight,
            "update": update,
            "zeros": zeros,
            "bad": bad,
            "dot": dot,
            "now": now,
            "then": then,
        }

    def _by_products(self, values: Tensor, earlier: Tensor, belongs: Tensor) -> _Columns:
        rows = torch.stack([values[0], earlier, values[1], values[2] - values[1]])  # the last is the change
        sums: list[list[float]] = (rows.unsqueeze(1) * rows).view(16, -1).mm(belongs).tolist()
        grad, dot, then, weight, update = sums[0], sums[1], sums[5], sums[10], sums[15]
        bad = [0.0] * len(grad)
        if not math.isfinite(sum(grad) + sum(then) + sum(weight) + sum(update)):
            # One product with NaN is NaN in every sum: each parameter for itself, and in a wider format.
            own = torch.split(rows.double(), [end - start for start, end in self._bounds], 1)
            grad, then, weight, update = ([float(r[k].square().sum()) for r in own] for k in range(4))
            dot = [float(r[0].dot(r[1])) for r in own]
            bad = [float((~r[0].isfinite()).sum()) for r in own]
        return {
            "grad": list(map(math.sqrt, grad)),
            "weight": list(map(math.sqrt, weight)),
            "update": list(map(math.sqrt, update)),
            "zeros": (rows[0] == 0).to(rows.dtype).unsqueeze(0).mm(belongs)[0].tolist(),
            "bad": bad,
            "dot": dot,
            "now": grad,
            "then": then,
        }


def _copied(tensors: list[Tensor]) -> Tensor:
    """All of them as one vector, without their history."""
    vector = _flatten(tensors).detach()
    return vector if tensors[1:] else vector.clone()  # of a single one it would be a view


def small_of(parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> Small | None:
    """The small way, where the model is small and all of one format on one device."""
    size = sum(p.size for p in parameters)
    if not tensors or size > _SMALL or size * len(tensors) > _SMALL_TABLE:
        return None
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64) or any(t.dtype is not dtype or not t.is_cpu for t in tensors):
        return None
    return Small(parameters, tensors)
