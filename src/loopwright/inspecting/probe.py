"""Measures gradients, weights and updates around one optimizer step: few kernels, and one transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loopwright.inspecting.activations import Activations
from loopwright.inspecting.inspection import COLUMNS, MISSING, Inspection, Parameter
from loopwright.inspecting.small import Small, small_of
from loopwright.weights import plain_module

if TYPE_CHECKING:
    from torch.optim import Optimizer

_SAMPLE = 4096  # elements of a gradient that are compared with those of the step before
_NARROW = (torch.float16, torch.bfloat16)
_UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # the first dimension of their weight is what they put out

_RECURRENT = ("RNN", "LSTM", "GRU")

_Tensors: TypeAlias = list[Tensor]


class Probe:
    """Looks at one model and its optimizer.

    Args:
        model: The model, or what compiling or distributing has made of it.
        optimizer: Its optimizer.
        turns: When each layer was called in the forward pass, as far as it is known.
        earlier: By parameter, samples of the negated gradients of the step before the one to be inspected.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, turns: dict[str, int], earlier: dict[str, Tensor] | None = None
    ) -> None:
        self._model, self._optimizer = plain_module(model), optimizer
        self.turns: dict[str, int] = turns
        self._earlier: dict[str, Tensor] = dict(earlier or {})
        self.activations: Activations = Activations(self._model)
        self._looks = 0  # while it is 0, what there is to be measured is not listed
        self.parameters: list[Parameter] = []
        self.tensors: _Tensors = []
        self._small: Small | None = None
        self._pending: list[tuple[str, int, Tensor]] = []  # column, place, one number on its device
        self._weights: _Tensors = []
        self._clipped = False

    def _look(self) -> None:
        """List what there is to be measured."""
        groups = {id(p): i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        modules = dict(self._model.named_modules()) if self._looks else self.activations.modules
        root = type(self._model).__name__
        while root in modules:
            root += "_"
        self.parameters, self.tensors = [], []
        seen: set[int] = set()
        # In the order of named_parameters(), which would walk through the modules once more.
        for layer, module in modules.items():
            for own, tensor in module._parameters.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if isinstance(tensor, nn.parameter.UninitializedParameter) or not tensor.numel():
                    continue
                # A unit that is off passes nothing to its bias; to its weights, its inputs may be what is zero.
                unit = isinstance(module, _UNITS) and own == ("weight" if module.bias is None else "bias")
                parameter = Parameter(
                    name=f"{layer}.{own}" if layer else own,
                    layer=layer or root,
                    kind=type(module).__name__,
                    size=tensor.numel() * (2 if tensor.is_complex() else 1),
                    units=len(tensor) if unit else 0,
                    matrix=tensor.ndim > 1,
                    trainable=tensor.requires_grad,
                    group=groups.get(id(tensor), -1),
                    turn=self.turns.get(layer, -1),
                    fresh=_untrained(module),
                )
                self.parameters.append(parameter)
                self.tensors.append(tensor)
        self._looks = self._looks or 1
        self._held, self._count = self._in_groups(), len(seen)
        self._needed = [p.trainable for p in self.parameters]
        self._steered = [i for i, p in enumerate(self.parameters) if p.group >= 0 and p.trainable]
        self._layers = [i for i, p in enumerate(self.parameters) if p.units]
        self._trained = [i for i, p in enumerate(self.parameters) if p.trainable]
        self._small = small_of([self.parameters[i] for i in self._trained], [self.tensors[i] for i in self._trained])

    def _has_changed(self) -> bool:
        """Whether something was added, frozen or thawed; of the model's own size every few times only."""
        self._looks += 1
        if self._in_groups() != self._held:
            return True
        if [tensor.requires_grad for tensor in self.tensors] != self._needed:
            return True
        return self._looks % 4 == 3 and sum(1 for _ in self._model.parameters()) != self._count

    def _in_groups(self) -> list[int]:
        """Which parameters the optimizer holds: as many others may have taken their place."""
        return [id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]]

    def remember(self) -> None:
        """Keep a sample of the present gradients, for the step after this one."""
        if not self._looks:
            self._look()
        self._earlier = {}
        if self._small is not None and self._small.remember():
            return
        found = [(p.name, _sample(t.grad)) for p, t in zip(self.parameters, self.tensors, strict=True) if _dense(t)]
        copies = torch._foreach_mul([s for _, s in found], 1.0) if found else ()
        self._earlier = dict(zip([name for name, _ in found], copies, strict=True))

    def earlier(self) -> dict[str, Tensor]:
        """What ``remember`` has kept, by parameter."""
        return dict(self._earlier) if self._small is None else self._earlier | self._small.earlier()

    def before(self, *, clipped: bool = False) -> None:
        """Measure the gradients, and keep the weights, before the optimizer's step.

        Args:
            clipped: Whether the gradients may be changed before the step: what is not finite has to be counted now.
        """
        if not self._looks or self.activations.has_turns or self._has_changed():
            self.turns |= self.activations.take_turns()
            kept = self.earlier()
            self._look()
            self._earlier = kept
        self._pending, self._clipped = [], clipped
        if self._small is not None and self._small.before(self._earlier):
            self._earlier = {}
            return
        with torch.no_grad():
            self._before()

    def _before(self) -> None:
        trained = self._trained
        at = [i for i in trained if self.tensors[i].grad is not None]
        gradients = [_values(self.tensors[i].grad) for i in at]
        weights = [_real(self.tensors[i].detach()) for i in trained]
        self._weights = list(torch._foreach_neg(weights)) if weights else []
        self._take("weight", trained, _norms(weights))
        self._take("grad", at, _norms(gradients))
        self._take("zeros", at, _counts(gradients))  # of the elements that are not zero, as yet
        if self._clipped:
            self._count_bad(at, gradients)
        self._compare(at)

    def _count_bad(self, at: Sequence[int], gradients: _Tensors) -> None:
        """Zero times a number is zero, or NaN, which is not."""
        self._take("bad", at, _norms(list(torch._foreach_mul(gradients, 0.0)) if gradients else [], 0))

    def _compare(self, at: list[int]) -> None:
        """Take this gradient's sample with that of the step before: their norms, and that of their difference."""
        both, samples, before = [], [], []
        for i in at:
            earlier = self._earlier.get(self.parameters[i].name)
            if earlier is not None and _dense(self.tensors[i]):
                sample = _sample(self.tensors[i].grad)
                if sample.shape == earlier.shape or sample.numel() == earlier.numel():
                    both.append(i)
                    samples.append(sample)
                    before.append(earlier.to(sample.device).reshape(sample.shape))
        self._earlier = {}
        if both:
            self._take("dot", both, _norms(list(torch._foreach_sub(samples, before))))
            self._take("now", both, _norms(samples))
            self._take("then", both, _norms(before))

    def _take(self, column: str, places: Sequence[int], numbers: _Tensors) -> None:
        self._pending += [(column, place, number) for place, number in zip(places, numbers, strict=True)]

    def after(self, step: int, clip_norm: float | None, *, made: bool = True) -> Inspection | None:
        """Measure what the optimizer's step has changed, and read everything.

        Args:
            step: The number of the step.
            clip_norm: The largest norm allowed, for the record.
            made: Whether the step was made at all.

        Returns:
            The inspection, or None where ``before`` has seen nothing.
        """
        if not (self._pending or (self._small is not None and self._small.pending)):
            return None
        shares = self.activations.take_shares()
        if shares:
            shares = [(name, share) for name, share in shares if not self._is_output(name)]
        found = None if self._small is None else self._small.after(made=made)
        if found is not None:
            table = found if len(self._trained) == len(self.parameters) else self._spread(found)
            read = [float(share) for _, share in shares]  # of the CPU
        else:
            with torch.no_grad():
                table, read = self._read_pending([share for _, share in shares], made=made)
        norms = table["grad"]
        return Inspection(
            step=step,
            **table,  # type: ignore[arg-type]  # eight lists of floats
            rates=[float(group.get("lr", 0.0)) for group in self._optimizer.param_groups],
            saturated=_means([(name, value) for (name, _), value in zip(shares, read, strict=True)]) if shares else {},
            clip_norm=clip_norm,
            total=math.sqrt(sum([norms[i] ** 2 for i in self._steered if norms[i] != MISSING])),
        )

    def _blank(self) -> dict[str, list[float]]:
        count = len(self.parameters)
        return {c: [MISSING if c in ("grad", "weight", "update") else 0.0] * count for c in COLUMNS}

    def _spread(self, found: dict[str, list[float]]) -> dict[str, list[float]]:
        """The numbers of the trainable parameters at their places."""
        table = self._blank()
        for column, values in found.items():
            for place, value in zip(self._trained, values, strict=True):
                table[column][place] = value
        return table

    def _read_pending(self, shares: _Tensors, *, made: bool) -> tuple[dict[str, list[float]], list[float]]:
        """What the kernels have come to, and the shares: all by one transfer."""
        pending, self._pending = self._pending, []
        negated, self._weights = self._weights, []
        if made:
            torch._foreach_add_(negated, [_real(self.tensors[i].detach()) for i in self._trained])
            pending += [("update", i, n) for i, n in zip(self._trained, _norms(negated), strict=True)]
        read = _read([number for _, _, number in pending] + shares)
        table = self._blank()
        for (column, place, _), value in zip(pending, read, strict=False):
            table[column][place] = value
        infinite = [i for i, g in enumerate(table["grad"]) if not math.isfinite(g)]
        if infinite and not self._clipped:
            self._count_bad(infinite, [_values(self.tensors[i].grad) for i in infinite])
            for _, place, number in self._pending:
                table["bad"][place] = number.item()
            self._pending = []
        grad, zeros, dot, now, then = (table[c] for c in ("grad", "zeros", "dot", "now", "then"))
        for i, parameter in enumerate(self.parameters):
            if grad[i] != MISSING:
                zeros[i] = parameter.size - zeros[i]
            if then[i]:
                now[i], then[i] = now[i] ** 2, then[i] ** 2
                dot[i] = (now[i] + then[i] - dot[i] ** 2) / 2  # |a - b|^2 = |a|^2 + |b|^2 - 2ab
        return table, read[len(pending) :]

    def _is_output(self, name: str) -> bool:
        """Whether no layer is called after this activation: the model's output may well be sure of itself."""
        turn = self.turns.get(name)
        return turn is not None and all(p.turn < turn for p in self.parameters if p.kind not in _RECURRENT)

    def silent(self, inspection: Inspection, quiet: dict[str, Tensor]) -> dict[str, Tensor]:
        """For how many inspections in a row each unit's gradient was zero, where that is so of half the layer.

        Args:
            inspection: The newest one, whose gradients are still there.
            quiet: What this returned for the one before.
        """
        found: dict[str, Tensor] = {}
        if not any(inspection.zeros):
            return found
        for i in self._layers:
            parameter, tensor = self.parameters[i], self.tensors[i]
            if inspection.zeros[i] >= 0.5 * parameter.size and _dense(tensor):
                silent = tensor.grad.reshape(parameter.units, -1).eq(0).all(1)  # type: ignore[union-attr]  # _dense has seen it
                before = quiet.get(parameter.name)
                if before is None or before.shape != silent.shape:
                    before = torch.zeros_like(silent, dtype=torch.int32)
                found[parameter.name] = torch.where(silent, before.to(silent.device) + 1, 0)
        return found

    def close(self) -> None:
        """Leave nothing at the model."""
        self.activations.close()
        self._pending, self._weights = [], []


def _untrained(module: nn.Module) -> bool:
    """Whether a normalisation normalises by running statistics that have never seen a batch."""
    if not isinstance(module, _NormBase) or module.training or not module.track_running_stats:
        return False
    seen = module.num_batches_tracked
    return seen is not None and int(seen) == 0


def _dense(tensor: Tensor) -> bool:
    return tensor.grad is not None and tensor.grad.layout is torch.strided


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _values(gradient: Tensor | None) -> Tensor:
    """The elements of a gradient: of a sparse one, those that it holds."""
    assert gradient is not None
    if gradient.layout is torch.strided:
        return _real(gradient)
    return _real(gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient.to_dense())


def _sample(gradient: Tensor | None) -> Tensor:
    """All of a small gradient, and evenly spaced elements of a large one."""
    assert gradient is not None
    gradient = _real(gradient)
    if gradient.numel() <= _SAMPLE:
        return gradient
    return gradient.reshape(-1)[:: -(-gradient.numel() // _SAMPLE)]


def _counts(tensors: _Tensors) -> _Tensors:
    """How many elements of each tensor are not zero, as a float."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return _norms(tensors, 0)  # in one call for all of them
    return [tensor.count_nonzero().float() for tensor in tensors]  # on the CPU in half the time


def _norms(tensors: _Tensors, order: float = 2.0) -> _Tensors:
    """The norm of each tensor, in float32 at least; order 0 counts what is not zero."""
    if not tensors:
        return []
    narrow = [i for i, t in enumerate(tensors) if t.dtype in _NARROW]
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


def _means(shares: list[tuple[str, float]]) -> dict[str, float]:
    """The mean share of each activation over its calls."""
    found: dict[str, list[float]] = {}
    for name, share in shares:
        found.setdefault(name, []).append(share)
    return {name: sum(values) / len(values) for name, values in found.items()}
