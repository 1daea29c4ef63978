"""Gradients, cleared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

_TORCHS = Optimizer.zero_grad


def zero_grad_of(optimizer: Optimizer, beside: Sequence[Tensor]) -> Callable[[], None]:
    """What begins a window: ``optimizer.zero_grad()``, and the same for parameters that the optimizer does not hold.

    Where zero_grad is torch's own, its effect is had without its bookkeeping: a profiler's record is made there at
    every call, which costs ten times what the rest does.

    Args:
        optimizer: Its parameters may become more while the run goes on.
        beside: The other parameters.
    """
    if type(optimizer).zero_grad is not _TORCHS or "zero_grad" in vars(optimizer):

        def call() -> None:
            optimizer.zero_grad()
            for parameter in beside:
                parameter.grad = None

        return call

    def clear() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for parameter in beside:
            parameter.grad = None

    return clear
