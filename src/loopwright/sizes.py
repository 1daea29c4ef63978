"""How many samples a batch holds, and what it counts for in means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from loopwright.errors import ConfigError, DataError
from loopwright.step import Output, describe


def batch_size(batch: Any) -> int | None:
    """The number of samples that a batch holds: the first dimension that all of its tensors share.

    None where its tensors do not agree or where it has none; ``sizes`` then says what there is.
    """
    found = set(sizes(batch).values())
    return found.pop() if len(found) == 1 else None


def sizes(batch: Any) -> dict[str, int]:
    """Where in the batch each candidate for its size stands, such as ``{"batch['x']": 32}``."""
    found = dict(_sizes(batch, "batch"))
    if not found and isinstance(batch, (list, tuple)) and all(isinstance(x, (str, bytes)) for x in batch):
        return {"batch": len(batch)}
    return found


def _sizes(value: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield path, value.size(0)  # its length; a nested tensor may have none, but always has a number of parts
    elif isinstance(value, PackedSequence):
        yield path, int(value.batch_sizes[0])  # how many sequences reach the first time step; always on the CPU
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _sizes(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=True):
            yield from _sizes(item, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _sizes(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _sizes(getattr(value, f.name, None), f"{path}.{f.name}")


def unknown_size(batch: Any) -> DataError:
    """The error for a batch whose size is not clear, naming the candidates."""
    found = sizes(batch)
    candidates = ", ".join(f"{path} has {n}" for path, n in found.items()) or "it holds no tensor"
    return DataError(
        f"the size of a batch is not clear: {candidates}",
        why="means over an epoch are weighted by it",
        fix="return Output(loss, weight=...) from step=, with the number of samples or tokens",
    )


def weigh(output: Output, batch: Any, *, read: bool) -> tuple[float | Tensor, int]:
    """What a batch counts for in means, and how many samples it holds.

    Args:
        output: What the step returned for it.
        batch: The batch.
        read: Whether a weight that is a tensor may be waited for.

    Raises:
        DataError: The step gave no weight, and the batch's size is not clear.
        ConfigError: The weight is not a number of at least 0.
    """
    weight = output.weight
    if weight is None and (type(batch) is list or type(batch) is tuple) and len(batch) == 2:
        a, b = batch  # the common case, without a call
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and b.ndim and a.size(0) == (size := b.size(0)):
            return size, size
    samples = batch_size(batch)
    if weight is None:
        if samples is None:
            raise unknown_size(batch)
        return samples, samples
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise bad_weight(weight)
        if not read and samples is not None:
            return weight.detach().reshape(()), samples
        weight = weight.item()
    if not isinstance(weight, (int, float)) and isinstance(weight, Real):
        weight = float(weight)  # numpy's numbers
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise bad_weight(weight)
    return weight, int(weight) if samples is None else samples


def bad_weight(weight: object, where: str = "") -> ConfigError:
    """The error for a weight that cannot be one; ``where`` is the batch, in words."""
    return ConfigError(
        f"the weight of a batch is {describe(weight) if isinstance(weight, Tensor) else repr(weight)}{where}",
        why="it is how much the batch counts in means: one number of at least 0",
        fix="the number of samples, or of valid tokens",
    )
