"""What torch's optimizers and data loaders do, without the profiler's record that they make of each call.

The record is made whether or not a profiler runs, and on a small model takes longer than the work itself. It is left
out only where it is all that is left out: where the method is torch's own, no hook is registered and no profiler runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torchs
from torch.utils.data import _DatasetKind
from torch.utils.data.dataloader import _BaseDataLoaderIter, _SingleProcessDataLoaderIter

_ZERO_GRAD = Optimizer.zero_grad
_RECORDED = Optimizer.profile_hook_step(lambda _: None).__code__
# All that the code around an optimizer's step has to do with. Were there more in another torch, we would not know what.
_KNOWN_NAMES = {
    *("cast", "Optimizer", "__class__", "__name__", "torch", "autograd", "profiler", "record_function", "chain"),
    *("values", "isinstance", "tuple", "len", "RuntimeError", "_optimizer_step_code"),
    *("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"),
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
}


def zero_grad_of(optimizer: Optimizer, beside: Sequence[Tensor]) -> Callable[[], None]:
    """What begins a window: ``optimizer.zero_grad()``, and the same for parameters that the optimizer does not hold.

    Args:
        optimizer: Its parameters may become more while the run goes on.
        beside: The other parameters.
    """
    own = vars(optimizer)

    def clear() -> None:
        if "zero_grad" in own or type(optimizer).zero_grad is not _ZERO_GRAD:
            optimizer.zero_grad()
        else:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        for parameter in beside:
            parameter.grad = None

    return clear


def step_of(optimizer: Optimizer) -> Callable[[], object]:
    """What makes a step: ``optimizer.step()``.

    Hooks, profilers and a ``step`` of the optimizer's own, such as a learning-rate scheduler puts there, may come and
    go while the run goes on.
    """
    recorded = type(optimizer).step
    plain: Callable[[Optimizer], object] | None = getattr(recorded, "__wrapped__", None)
    own = vars(optimizer)
    known = getattr(recorded, "__code__", None) is _RECORDED and set(_RECORDED.co_names) <= _KNOWN_NAMES
    if plain is None or not known or "_optimizer_step_pre_hooks" not in own:
        return lambda: optimizer.step()

    def step() -> None:
        if (
            "step" in own
            or type(optimizer).step is not recorded
            or own["_optimizer_step_pre_hooks"]
            or own["_optimizer_step_post_hooks"]
            or torchs._global_optimizer_pre_hooks
            or torchs._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ):
            optimizer.step()
        else:
            plain(optimizer)

    return step


_NEXT = _BaseDataLoaderIter.__next__
# What the next batch has to do with, beside the warning about an IterableDataset that is longer than its length.
_KNOWN_OF_NEXT = {
    *("torch", "autograd", "profiler", "record_function", "_profile_name", "_sampler_iter", "_reset", "_next_data"),
    *("_num_yielded", "_dataset_kind", "_DatasetKind", "Iterable", "_IterableDataset_len_called", "_dataset"),
    *("_num_workers", "warnings", "warn"),
}
_NEXT_IS_KNOWN = set(_NEXT.__code__.co_names) <= _KNOWN_OF_NEXT


def batches_of(iterator: Iterator[Any]) -> Iterator[Any]:
    """The batches of an iterator, which may be a ``DataLoader``'s own: sample by sample, in this process.

    Args:
        iterator: What ``iter(loader)`` gave.
    """
    if (
        isinstance(iterator, _SingleProcessDataLoaderIter)
        and type(iterator).__next__ is _NEXT
        and _NEXT_IS_KNOWN
        and iterator._dataset_kind == _DatasetKind.Map
    ):
        return _unrecorded(iterator)
    return iterator


def _unrecorded(iterator: Any) -> Iterator[Any]:
    fetch = iterator._next_data
    while True:  # as a for loop over the iterator would, which ends at a StopIteration of the dataset's as well
        try:
            if torch._C._autograd._profiler_enabled():
                batch = next(iterator)
            else:
                batch = fetch()
                iterator._num_yielded += 1
        except StopIteration:
            return
        yield batch
