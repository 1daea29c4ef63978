"""What there is to be measured of a model: its parameters, where they belong, and who holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, methodcaller

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from loopwright.inspecting.inspection import Parameter
from loopwright.inspecting.small import Small, small_of

# Without a function of Python's own in between: what is called once in fifty steps is in no cache.
_FORM, _TRAINABLE = attrgetter("shape", "dtype", "device"), attrgetter("requires_grad")
_PARAMETERS, _MODULES, _VALUES = attrgetter("_parameters"), attrgetter("_modules"), methodcaller("values")

_UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # the first dimension of their weight is what they put out
_RECURRENT = ("RNN", "LSTM", "GRU")
_HOLDERS = (nn.ParameterList, nn.ParameterDict)  # which compute nothing: each matrix in them is a layer of its own


class Listing:
    """The parameters of a model as they are now, in the order of ``named_parameters()``.

    Args:
        root: What to call the layer that is the model itself.
        modules: The model's modules, by name.
        optimizer: Its optimizer.
        turns: When each layer was called in the forward pass, as far as it is known.

    Attributes:
        parameters: What is known of each.
        tensors: They themselves.
        trained: The places of those that require a gradient.
        steered: The places of those that the optimizer holds, too.
        units: The places of those of which each row, or element, belongs to one unit of a layer.
        small: The way to measure those that are trained where the model is small, or None.
    """

    def __init__(
        self, root: str, modules: Mapping[str, nn.Module], optimizer: Optimizer, turns: Mapping[str, int]
    ) -> None:
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        while root in modules:
            root += "_"
        self.parameters: list[Parameter] = []
        self.tensors: list[Tensor] = []
        seen: set[int] = set()
        # In the order of named_parameters(), which would walk through the modules once more.
        for name, module in modules.items():
            holder = isinstance(module, _HOLDERS)
            for own, tensor in module._parameters.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if is_lazy(tensor) or not tensor.numel():
                    continue
                # A unit that is off passes nothing to its bias; to its weights, its inputs may be what is zero.
                unit = isinstance(module, _UNITS) and own == ("weight" if module.bias is None else "bias")
                full = f"{name}.{own}" if name else own
                parameter = Parameter(
                    name=full,
                    layer=full if holder and sum([n > 1 for n in tensor.shape]) > 1 else name or root,
                    kind=type(module).__name__,
                    size=tensor.numel() * (2 if tensor.is_complex() else 1),
                    units=len(tensor) if unit else 0,
                    matrix=tensor.ndim > 1,
                    trainable=tensor.requires_grad,
                    group=groups.get(id(tensor), -1),
                    turn=turns.get(name, -1),
                    fresh=_untrained(module),
                )
                self.parameters.append(parameter)
                self.tensors.append(tensor)
        self._turns = turns
        self._modules = list(modules.values())
        self._parts = list(_parts(self._modules))  # kept, or others might come to their places in memory
        self._there, self._held = list(map(id, self._parts)), _held(optimizer)
        self._trainable = [p.trainable for p in self.parameters]
        self._forms = list(map(_FORM, self.tensors))
        self.steered: list[int] = [i for i, p in enumerate(self.parameters) if p.group >= 0 and p.trainable]
        self.units: list[int] = [i for i, p in enumerate(self.parameters) if p.units]
        self.trained: list[int] = [i for i, p in enumerate(self.parameters) if p.trainable]
        self.small: Small | None = small_of(
            [self.parameters[i] for i in self.trained], [self.tensors[i] for i in self.trained]
        )

    def holds_for(self, optimizer: Optimizer) -> bool:
        """Whether the model and the optimizer hold what they held, and none of it was frozen, thawed or reshaped."""
        # By identity: as many others may have taken their place.
        if list(map(id, _parts(self._modules))) != self._there or _held(optimizer) != self._held:
            return False
        return self.has_its_forms() and list(map(_TRAINABLE, self.tensors)) == self._trainable

    def has_its_forms(self) -> bool:
        """Whether each tensor has the shape and format that it had, and is where it was."""
        return list(map(_FORM, self.tensors)) == self._forms

    def is_output(self, name: str) -> bool:
        """Whether no layer is called after this activation: the model's output may well be sure of itself."""
        turn = self._turns.get(name)
        return turn is not None and all(p.turn < turn for p in self.parameters if p.kind not in _RECURRENT)


def _parts(modules: list[nn.Module]) -> Iterable[object]:
    """What each of them holds: its own parameters, and the modules right below it."""
    return chain.from_iterable(map(_VALUES, chain(map(_PARAMETERS, modules), map(_MODULES, modules))))


def _held(optimizer: Optimizer) -> list[int]:
    held: list[int] = []
    for group in optimizer.param_groups:
        held += map(id, group["params"])
    return held


def _untrained(module: nn.Module) -> bool:
    """Whether a normalisation normalises by running statistics that have never seen a batch."""
    if not isinstance(module, _NormBase) or module.training or not module.track_running_stats:
        return False
    seen = module.num_batches_tracked
    return seen is not None and int(seen) == 0
