"""Ways in which a model is for a while: evaluating, compiled."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import nn

from loopwright.scopes import scope


@scope
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; afterwards every submodule's flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():  # not inference_mode: a step may enable gradients, and keep its tensors
            yield
    finally:
        model.train(flags[0][1])  # a model may do more here than set flags
        for module, training in flags:
            if module.training is not training:  # to set an attribute of a module takes longer than to look
                module.training = training


def takes_wrapper(model: nn.Module) -> bool:
    """Whether compiling in place would compile nothing.

    torch's compiler passes over frames of torch's own, such as nn.Sequential's; what is around them is compiled.
    """
    return type(model).compile is nn.Module.compile and type(model).forward.__module__.startswith("torch.")


@scope
def compiled(model: nn.Module) -> Generator[None]:
    """The model compiled in place: its class, its parameters and their names stay what they are."""
    if model._compiled_call_impl is not None:  # the user has compiled it, and it stays so
        yield
        return
    if takes_wrapper(model):

        def call(*args: Any, **kwargs: Any) -> Any:
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no annotation there

        model._compiled_call_impl = torch.compile(call)
    else:
        model.compile()
    try:
        yield
    finally:
        model._compiled_call_impl = None  # torch has no public way back
