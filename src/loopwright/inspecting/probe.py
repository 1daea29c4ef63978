"""Measures gradients, weights and updates around one optimizer step: few kernels, and one transfer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from loopwright.inspecting.activations import Activations
from loopwright.inspecting.inspection import MISSING, Parameter
from loopwright.inspecting.listing import Listing
from loopwright.inspecting.sampled import NARROW, copies, differences, fitting, held, real, sample
from loopwright.inspecting.small import Rows
from loopwright.inspecting.taken import Taken, blank
from loopwright.weights import plain_module

if TYPE_CHECKING:
    from torch.optim import Optimizer

_Tensors: TypeAlias = list[Tensor]


class Probe:
    """Looks at one model and its optimizer.

    Args:
        model: The model, or what compiling or distributing has made of it.
        optimizer: Its optimizer.
        turns: When each layer was called in the forward pass, as far as it is known.
        earlier: By parameter, samples of the gradients of the step before the one to be inspected.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, turns: dict[str, int], earlier: dict[str, Tensor] | None = None
    ) -> None:
        self._model, self._optimizer = plain_module(model), optimizer
        self.turns: dict[str, int] = turns
        self._earlier: dict[str, Tensor] = dict(earlier or {})
        self.activations: Activations = Activations(self._model)
        self._listing: Listing | None = None
        self.pending: bool = False  # whether before has measured something that after has not taken
        self._pending: list[tuple[str, int, Tensor]] = []  # column, place, one number on its device
        self._weights: _Tensors = []
        self._scales: dict[int, float] = {}  # by place: how many elements each one of a sample stands for
        self._clipped = False

    def _list(self) -> Listing:
        """List what there is to be measured."""
        modules = self.activations.modules if self._listing is None else dict(self._model.named_modules())
        self._listing = Listing(type(self._model).__name__, modules, self._optimizer, self.turns)
        return self._listing

    def remember(self) -> None:
        """Keep a sample of the present gradients, for the step after this one."""
        listing = self._listing or self._list()
        self._earlier = {}
        if listing.small is not None and listing.small.remember():
            return
        pairs = zip(listing.parameters, listing.tensors, strict=True)
        found = {p.name: sample(t.grad) for p, t in pairs if t.grad is not None}
        self._earlier = dict(zip(found, copies(list(found.values())), strict=True))

    def forget(self) -> None:
        """Let go of what ``remember`` has kept."""
        self._earlier = {}
        if self._listing is not None and self._listing.small is not None:
            self._listing.small.forget()

    def earlier(self) -> dict[str, Tensor]:
        """What ``remember`` has kept, by parameter."""
        small = None if self._listing is None else self._listing.small
        return dict(self._earlier) if small is None else self._earlier | small.earlier()

    def before(self, *, clipped: bool = False) -> None:
        """Measure the gradients, and keep the weights, before the optimizer's step.

        Args:
            clipped: Whether the gradients may be changed before the step: what is not finite has to be counted now.
        """
        listing = self._listing
        same = listing is None or listing.holds_for(self._optimizer)
        if listing is None or not same or self.activations.has_turns:
            # What was kept may be of tensors that are there no more, but where only the order of the layers is new.
            self._earlier = self.earlier() if same else {}
            self.turns |= self.activations.take_turns()
            listing = self._list()
        self._pending, self._clipped = [], clipped
        if listing.small is not None and listing.small.before(self._earlier):
            self._earlier = {}
            self.pending = True
            return
        with torch.no_grad():
            self._before(listing)
        self.pending = bool(self._pending)

    def _before(self, listing: Listing) -> None:
        trained, tensors = listing.trained, listing.tensors
        at = [i for i in trained if tensors[i].grad is not None]
        gradients = [_values(tensors[i].grad) for i in at]
        weights = [real(tensors[i].detach()) for i in trained]
        self._weights = list(torch._foreach_neg(weights)) if weights else []
        self._take("weight", trained, _norms(weights))
        self._take("grad", at, _norms(gradients))
        self._take("zeros", at, _counts(gradients))  # of the elements that are not zero, as yet
        if self._clipped:
            self._count_bad(at, gradients)
        self._compare(listing, at)

    def _count_bad(self, at: Sequence[int], gradients: _Tensors) -> None:
        """Zero times a number is zero, or NaN, which is not."""
        self._take("bad", at, _norms(list(torch._foreach_mul(gradients, 0.0)) if gradients else [], 0))

    def _compare(self, listing: Listing, at: list[int]) -> None:
        """Take this gradient's sample with that of the step before: their norms, and that of their difference."""
        now, then, scales = [], [], {}
        for i in at:
            earlier, gradient = self._earlier.get(listing.parameters[i].name), listing.tensors[i].grad
            if earlier is None or gradient is None:
                continue
            own = sample(gradient)
            if (before := fitting(earlier, own)) is not None:
                now.append(own)
                then.append(before)
                scales[i] = 1.0 if own.layout is not torch.strided else listing.parameters[i].size / own.numel()
        self._earlier, self._scales = {}, scales
        self._take("dot", list(scales), _norms(differences(now, then)))
        self._take("now", list(scales), _norms([held(one) for one in now]))
        self._take("then", list(scales), _norms([held(one) for one in then]))

    def _take(self, column: str, places: Sequence[int], numbers: _Tensors) -> None:
        self._pending += [(column, place, number) for place, number in zip(places, numbers, strict=True)]

    def after(self, step: int, clip_norm: float | None, *, made: bool = True) -> Taken | None:
        """Take what the optimizer's step has changed.

        Args:
            step: The number of the step.
            clip_norm: The largest norm allowed, for the record.
            made: Whether the step was made at all.

        Returns:
            What the inspection has taken, or None where ``before`` has seen nothing, or something else.
        """
        listing = self._listing
        if listing is None or not self.pending:
            return None
        self.pending = False
        if not listing.has_its_forms():  # somebody has put others in their place within the step
            self._pending, self._weights = [], []
            if listing.small is not None:
                listing.small.drop()
            return None
        taken = self.activations.take_shares()
        shares: Sequence[tuple[str, float | Tensor]] = taken
        numbers: Rows | dict[str, list[float]]
        if listing.small is not None and not self._pending:
            numbers = listing.small.after()
        else:
            with torch.no_grad():
                numbers, read = self._read_pending(listing, [share for _, share in taken], made=made)
            shares = [(name, share) for (name, _), share in zip(taken, read, strict=True)]
        rates = [float(group.get("lr", 0.0)) for group in self._optimizer.param_groups]
        return Taken(listing, step, numbers, shares, rates, clip_norm, made)

    def _read_pending(
        self, listing: Listing, shares: _Tensors, *, made: bool
    ) -> tuple[dict[str, list[float]], list[float]]:
        """What the kernels have come to, and the shares: all by one transfer."""
        pending, self._pending = self._pending, []
        negated, self._weights = self._weights, []
        if made:
            torch._foreach_add_(negated, [real(listing.tensors[i].detach()) for i in listing.trained])
            pending += [("update", i, n) for i, n in zip(listing.trained, _norms(negated), strict=True)]
        read = _read([number for _, _, number in pending] + shares)
        table = blank(len(listing.parameters))
        for (column, place, _), value in zip(pending, read, strict=False):
            table[column][place] = value
        infinite = [i for i, g in enumerate(table["grad"]) if not math.isfinite(g)]
        if infinite and not self._clipped:
            self._count_bad(infinite, [_values(listing.tensors[i].grad) for i in infinite])
            for _, place, number in self._pending:
                table["bad"][place] = number.item()
            self._pending = []
        grad, zeros, dot, now, then = (table[c] for c in ("grad", "zeros", "dot", "now", "then"))
        for i, parameter in enumerate(listing.parameters):
            if grad[i] != MISSING:
                zeros[i] = parameter.size - zeros[i]
            if then[i]:
                scale = self._scales[i]  # so that a large parameter weighs in its layer what all of it would
                now[i], then[i] = scale * now[i] ** 2, scale * then[i] ** 2
                dot[i] = (now[i] + then[i] - scale * dot[i] ** 2) / 2  # |a - b|^2 = |a|^2 + |b|^2 - 2ab
        return table, read[len(pending) :]

    def measured(self) -> Iterable[tuple[Parameter, Tensor]]:
        """The parameters that are measured, with what is known of them."""
        return () if self._listing is None else zip(self._listing.parameters, self._listing.tensors, strict=True)

    def close(self) -> None:
        """Leave nothing at the model."""
        self.activations.close()
        self.pending, self._pending, self._weights = False, [], []


def _values(gradient: Tensor | None) -> Tensor:
    """The elements of a gradient: of a sparse one, those that it holds."""
    assert gradient is not None
    if gradient.layout is torch.strided:
        return real(gradient)
    return real(gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient.to_dense())


def _counts(tensors: _Tensors) -> _Tensors:
    """How many elements of each tensor are not zero, as a float."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return _norms(tensors, 0)  # in one call for all of them
    return [tensor.count_nonzero().float() for tensor in tensors]  # on the CPU in half the time


def _norms(tensors: _Tensors, order: float = 2.0) -> _Tensors:
    """The norm of each tensor, in float32 at least; order 0 counts what is not zero."""
    if not tensors:
        return []
    narrow = [i for i, t in enumerate(tensors) if t.dtype in NARROW]
    if not narrow:
        return list(torch._foreach_norm(tensors, order))
    wide = dict(zip(narrow, torch._foreach_norm([tensors[i] for i in narrow], order, dtype=torch.float32), strict=True))
    others = [i for i in range(len(tensors)) if i not in wide]
    wide |= dict(zip(others, _norms([tensors[i] for i in others], order), strict=True))
    return [wide[i] for i in range(len(tensors))]


def _read(numbers: _Tensors) -> list[float]:
    """All of them as floats, by one transfer from each device."""
    devices = {number.device for number in numbers}
    if len(devices) > 1:
        first = numbers[0].device
        numbers = [number.to(first) for number in numbers]
    if len({number.dtype for number in numbers}) > 1:
        numbers = [number.float() for number in numbers]
    read: list[float] = torch.stack(numbers).tolist()
    return read
