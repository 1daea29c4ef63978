"""Watches the forward pass of one step: saturated activations, and the order in which layers are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

LIMIT = 0.975  # |tanh| above this has less than 5 % of its steepest slope; for a sigmoid s it is |2s - 1|


class Activations:
    """Watches the modules of a model whose outputs have limits, while somebody wants it.

    These are ``nn.Tanh``, ``nn.Sigmoid`` and the recurrent layers, whose states are made by both.

    Args:
        model: The model.

    Attributes:
        modules: The model's, by name, as they were when this was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[RemovableHandle] = []  # of hooks that are on the model
        self._shares: list[tuple[str, Tensor]] = []
        self._turns: dict[str, int] = {}
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._bounded = [(n, m) for n, m in self.modules.items() if isinstance(m, (nn.Tanh, nn.Sigmoid, nn.RNNBase))]

    @property
    def wanted(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._bounded)

    @property
    def has_turns(self) -> bool:
        """Whether calls were noted that nobody has taken."""
        return bool(self._turns)

    def watch(self, *, turns: bool) -> None:
        """Begin, unless it has begun: hooks on the modules, until ``close``.

        Args:
            turns: Whether to note the order in which layers are called, too.
        """
        if self.handles or not (turns or self._bounded) or _compiled(self.modules):
            return
        self._shares = []
        bounded = dict(self._bounded)
        for name, module in self._bounded:
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hook
                continue
            self.handles.append(module.register_forward_hook(self._measure(name)))
        if turns:
            for name, each in self.modules.items():
                scripted = isinstance(each, torch.jit.ScriptModule)
                if not scripted and (name in bounded or any(p is not None for p in each._parameters.values())):
                    self.handles.append(each.register_forward_pre_hook(self._note(name)))

    def _measure(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            tensor = tensor.data if isinstance(tensor, PackedSequence) else tensor
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                with torch.no_grad():
                    centred = tensor.detach() * 2 - 1 if isinstance(module, nn.Sigmoid) else tensor.detach()
                    self._shares.append((name, (centred.abs() > LIMIT).float().mean()))

        return hook

    def _note(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._turns.setdefault(name, len(self._turns))

        return hook

    def take_shares(self) -> list[tuple[str, Tensor]]:
        """What share of each watched output was at its limits, call by call, not yet read."""
        shares, self._shares = self._shares, []
        return shares

    def take_turns(self) -> dict[str, int]:
        """When each module was called first."""
        turns, self._turns = self._turns, {}
        return turns

    def close(self) -> None:
        """Take every hook off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _compiled(modules: Mapping[str, nn.Module]) -> bool:
    """Whether hooks would be compiled in, or be the reason to compile anew."""
    return any(module._compiled_call_impl is not None for module in modules.values())
