"""Measures gradients, weights and updates around one optimizer step: few kernels, and one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loopwright.activations import Activations
from loopwright.inspection import COLUMNS, MISSING, Inspection, Parameter
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
        self.turns = turns
        self.earlier: dict[str, Tensor] = earlier or {}
        self.activations = Activations(self._model)
        self._signature = (-1, -1, -1)
        self._pending: list[tuple[int, int, Tensor]] = []  # column, place, one number on its device
        self._weights: _Tensors = []
        self._at: list[int] = []
        self._look()

    def _look(self) -> None:
        """List what there is to be measured."""
        groups = {id(p): i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        modules = dict(self._model.named_modules())
        root = type(self._model).__name__
        names = dict.fromkeys(modules)
        while root in names:
            root += "_"
        self.parameters: list[Parameter] = []
        self.tensors: _Tensors = []
        for name, tensor in self._model.named_parameters():
            if isinstance(tensor, nn.parameter.UninitializedParameter) or not tensor.numel():
                continue
            layer, _, own = name.rpartition(".")
            module = modules[layer]
            unit = own == "weight" and isinstance(module, _UNITS) and tensor.ndim > 1
            parameter = Parameter(
                name=name,
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
        self._signature = self._counts()

    def _counts(self) -> tuple[int, int, int]:
        """What differs once something was added, frozen or thawed."""
        held = sum(len(group["params"]) for group in self._optimizer.param_groups)
        count = trainable = 0
        for p in self._model.parameters():
            count, trainable = count + 1, trainable + p.requires_grad
        return held, count, trainable

    @torch.no_grad()
    def remember(self) -> None:
        """Keep a sample of the present gradients, for the step after this one."""
        found = [(p.name, _sample(t.grad)) for p, t in zip(self.parameters, self.tensors, strict=True) if _dense(t)]
        self.earlier = dict(
            zip([name for name, _ in found], torch._foreach_neg([s for _, s in found]) if found else (), strict=True)
        )

    @torch.no_grad()
    def before(self) -> None:
        """Measure the gradients, and keep the weights, before the optimizer's step."""
        if self._counts() != self._signature or self.activations.has_turns:
            self.turns |= self.activations.take_turns()
            self._look()
        self._pending = []
        trained = [i for i, t in enumerate(self.tensors) if t.requires_grad]
        at = [i for i in trained if self.tensors[i].grad is not None]
        gradients = [_values(self.tensors[i].grad) for i in at]
        weights = [_real(self.tensors[i].detach()) for i in trained]
        self._at, self._weights = trained, list(torch._foreach_neg(weights)) if weights else []
        self._take(1, trained, _norms(weights))
        norms = _norms(gradients)
        self._take(0, at, norms)
        self._take(3, at, _norms(gradients, 0))  # of the elements that are not zero, as yet
        # Zero times a number is zero, or NaN, and NaN counts as not zero.
        self._take(4, at, _norms(list(torch._foreach_mul(gradients, 0.0)) if gradients else [], 0))
        self._compare(at)

    def _compare(self, at: list[int]) -> None:
        """Take this gradient's sample with that of the step before: their norms, and that of their difference."""
        both, samples, before = [], [], []
        for i in at:
            earlier = self.earlier.get(self.parameters[i].name)
            if earlier is not None and _dense(self.tensors[i]):
                sample = _sample(self.tensors[i].grad)
                if sample.shape == earlier.shape:
                    both.append(i)
                    samples.append(sample)
                    before.append(earlier.to(sample.device))
        self.earlier = {}
        if both:
            self._take(5, both, _norms(list(torch._foreach_add(samples, before))))
            self._take(6, both, _norms(samples))
            self._take(7, both, _norms(before))

    def _take(self, column: int, places: Sequence[int], numbers: _Tensors) -> None:
        self._pending += [(column, place, number) for place, number in zip(places, numbers, strict=True)]

    @torch.no_grad()
    def after(self, step: int, clip_norm: float | None, *, made: bool = True) -> Inspection | None:
        """Measure what the optimizer's step has changed, and read everything.

        Args:
            step: The number of the step.
            clip_norm: The largest norm allowed, for the record.
            made: Whether the step was made at all.

        Returns:
            The inspection, or None where ``before`` has seen nothing.
        """
        pending, self._pending = self._pending, []
        negated, self._weights = self._weights, []
        if not pending:
            return None
        if made:
            torch._foreach_add_(negated, [_real(self.tensors[i].detach()) for i in self._at])
            pending += [(2, i, number) for i, number in zip(self._at, _norms(negated), strict=True)]
        shares = [(name, share) for name, share in self.activations.take_shares() if not self._is_output(name)]
        read = _read([number for _, _, number in pending] + [share for _, share in shares])
        table = [[MISSING] * len(self.parameters) if c < 3 else [0.0] * len(self.parameters) for c in range(8)]
        for (column, place, _), value in zip(pending, read, strict=False):
            table[column][place] = value
        self._finish(table)
        groups = self._optimizer.param_groups
        held = [g * g for g, p in zip(table[0], self.parameters, strict=True) if p.group >= 0 and g != MISSING]
        return Inspection(
            step=step,
            **dict(zip(COLUMNS, table, strict=True)),  # type: ignore[arg-type]  # eight lists of floats
            rates=[float(group.get("lr", 0.0)) for group in groups],
            saturated=_means([(name, value) for (name, _), value in zip(shares, read[len(pending) :], strict=True)]),
            clip_norm=clip_norm,
            total=sum(held) ** 0.5,
        )

    def _is_output(self, name: str) -> bool:
        """Whether no layer is called after this activation: the model's output may well be sure of itself."""
        turn = self.turns.get(name)
        return turn is not None and all(p.turn < turn for p in self.parameters if p.kind not in _RECURRENT)

    def _finish(self, table: list[list[float]]) -> None:
        """From what the kernels give to what the columns say."""
        grad, _, _, zeros, _, dot, now, then = table
        for i, parameter in enumerate(self.parameters):
            if grad[i] != MISSING:
                zeros[i] = parameter.size - zeros[i]
            if then[i]:
                now[i], then[i] = now[i] ** 2, then[i] ** 2
                dot[i] = (now[i] + then[i] - dot[i] ** 2) / 2  # |a - b|^2 = |a|^2 + |b|^2 - 2ab

    @torch.no_grad()
    def silent(self, inspection: Inspection, quiet: dict[str, Tensor]) -> dict[str, Tensor]:
        """For how many inspections in a row each unit's gradient was zero, where that is so of half the layer.

        Args:
            inspection: The newest one, whose gradients are still there.
            quiet: What this returned for the one before.
        """
        found = {}
        for i, parameter in enumerate(self.parameters):
            tensor = self.tensors[i]
            if parameter.units and _dense(tensor) and inspection.zeros[i] >= 0.5 * parameter.size:
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
