"""A model's weights: which there are, copies of them, and whether a model still holds those."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def snapshot(model: nn.Module) -> dict[str, Any]:
    """A copy of the model's ``state_dict`` that later training does not change, on the same devices."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def copied(value: Any) -> Any:
    """A copy of plain data and tensors that nobody else holds; what is neither is taken as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([copied(item) for item in value])
    return value


def holds(model: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Whether every tensor of the model equals that of ``weights``, bit for bit."""
    own = model.state_dict()
    return own.keys() == weights.keys() and all(
        torch.equal(value, own[name]) for name, value in weights.items() if isinstance(value, Tensor)
    )


def plain_module(model: nn.Module) -> nn.Module:
    """The module that compiling or distributing has wrapped, whose names a checkpoint has."""
    while True:
        inner: object = model._modules.get("_orig_mod")  # torch.compile's
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def parameters_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The model's parameters, and what else the optimizer holds, each once."""
    in_optimizer = (p for group in optimizer.param_groups for p in group["params"])
    return list({id(p): p for p in (*model.parameters(), *in_optimizer)}.values())


def parameters_beside(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """What the optimizer holds and the model does not, such as the parameters of a loss."""
    of_model = {id(parameter) for parameter in model.parameters()}
    return [p for p in parameters_of(model, optimizer) if id(p) not in of_model]


def buffers_beside(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's buffers that are not in ``state``, its ``state_dict``."""
    return {name: buffer for name, buffer in model.named_buffers() if name not in state}
