"""Counts what is not finite in tensors, wherever in a value they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_ROWS = 1000  # listed at the most


@dataclass(frozen=True)
class Census:
    """What is not finite in one tensor.

    Attributes:
        elements: How many elements it has.
        nan: How many of them are NaN.
        above: How many are positive infinity.
        below: How many are negative infinity.
        length: Its first dimension, or None where it has none.
        rows: The places along it that hold such an element; the first thousand of them.
        dtype: Its number format.
    """

    elements: int
    nan: int
    above: int
    below: int
    length: int | None
    rows: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        kinds = {"NaN": self.nan, "inf": self.above, "-inf": self.below}
        if self.elements == 1:
            return next(kind for kind, count in kinds.items() if count)
        return joined([f"{count} {kind}" for kind, count in kinds.items() if count]) + f" in {self.elements} elements"


def census(tensor: Tensor) -> Census | None:
    """The count, or None where every element is finite or the format has nothing else."""
    plain = _plain(tensor)
    if plain is None or bool(torch.isfinite(plain).all()):
        return None
    bad = ~torch.isfinite(plain)
    nan = torch.isnan(plain)
    infinite = bad & ~nan
    below = infinite & (plain.real < 0 if plain.is_complex() else plain < 0)
    counts = [int(found.sum()) for found in (nan, infinite, below)]
    length, rows = _rows_of(tensor, bad)
    return Census(plain.numel(), counts[0], counts[1] - counts[2], counts[2], length, rows, tensor.dtype)


def _rows_of(tensor: Tensor, bad: Tensor) -> tuple[int | None, tuple[int, ...]]:
    """The first dimension, where there is one, and the places along it that hold one of the ``bad`` elements."""
    if tensor.is_nested:
        sizes = [part.numel() for part in tensor.detach().unbind()]
        rows = [row for row, part in enumerate(torch.split(bad, sizes)) if bool(part.any())]
        return len(sizes), tuple(rows[:_ROWS])
    if not bad.ndim or tensor.is_sparse or not _first_is_first(tensor):
        return None, ()
    return len(bad), tuple(bad.reshape(len(bad), -1).any(1).nonzero()[:_ROWS, 0].tolist())


def span(tensor: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest of the finite elements, or None where there is none or no order."""
    plain = _plain(tensor)
    if plain is None or plain.is_complex():
        return None
    finite = plain[torch.isfinite(plain)]
    return (float(finite.min()), float(finite.max())) if finite.numel() else None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, NaN for NaN."""
    if one.is_nested and other.is_nested:
        parts, others = one.unbind(), other.unbind()
        return len(parts) == len(others) and all(map(same, parts, others))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.layout != torch.strided:
        return bool(torch.equal(one.to_dense(), other.to_dense()))
    return bool(((one == other) | ((one != one) & (other != other))).all())


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value, and where in it, such as ``batch['x']``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=True):
            yield from tensors_in(item, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name, None), f"{path}.{f.name}")
    elif callable(getattr(value, "to", None)) and not isinstance(value, (nn.Module, type)):  # a batch class
        for name, item in getattr(value, "__dict__", {}).items():
            yield from tensors_in(item, f"{path}.{name}")


def each_tensor(value: Any) -> Iterator[Tensor]:
    """The tensors of ``tensors_in``, without where they are."""
    return (tensor for _, tensor in tensors_in(value, ""))


def joined(words: list[str], limit: int = 5) -> str:
    """Words in a row, the last after an ``and``; no more than ``limit`` of them."""
    if len(words) > limit:
        return ", ".join(words[:limit]) + f", ... ({len(words)} in all)"
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor within those that transforms of torch.func wrap around it; for vmap, with all that it stands for."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _first_is_first(tensor: Tensor) -> bool:
    """Whether the first dimension is that of the batch; of a wrapped tensor, whether vmap has put it there."""
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(tensor):
        return True
    inner = functorch.get_unwrapped(tensor)
    return functorch.is_batchedtensor(tensor) and functorch.maybe_get_bdim(tensor) == 0 and inner is unwrapped(inner)


def _plain(tensor: Tensor) -> Tensor | None:
    """The elements as a tensor that can be counted, or None where they cannot be infinite."""
    tensor = unwrapped(tensor)
    if (
        is_lazy(tensor)
        or not (tensor.is_floating_point() or tensor.is_complex())
        or tensor.is_quantized
        or tensor.is_meta
    ):
        return None
    found = tensor.detach()
    if found.is_sparse:
        found = found.coalesce().values()
    elif found.is_nested:  # of whose values() a view may hold but some
        nothing = torch.empty(0, dtype=found.dtype, device=found.device)
        found = torch.cat([nothing, *(part.reshape(-1) for part in found.unbind())])
    elif found.layout != torch.strided:
        found = found.values()
    return found.float() if found.dtype.itemsize == 1 else found  # torch counts nothing in eight bits
