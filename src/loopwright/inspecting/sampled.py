"""What of a gradient is compared with that of the step before: all of a small one, and a sample of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, islice
from math import gcd
from operator import mul

import torch
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16)
_SAMPLE = 4096  # elements; of a larger gradient about so many are compared
_TRIED = 64  # strides


def sample(gradient: Tensor) -> Tensor:
    """All elements of a small gradient, and evenly spaced ones of a large one; a sparse one whole, each row once."""
    gradient = gradient.detach()
    if gradient.layout is torch.sparse_coo:
        rows = gradient.coalesce()
        return rows.float() if rows.dtype in NARROW else rows  # on the CPU torch cannot subtract sparse float16
    gradient = real(gradient if gradient.layout is torch.strided else gradient.to_dense())
    return gradient if gradient.numel() <= _SAMPLE else gradient.reshape(-1)[:: _stride(gradient.shape)]


def copies(samples: Sequence[Tensor]) -> list[Tensor]:
    """Copies of samples, those of one format by few kernels."""
    dense = [one for one in samples if one.layout is torch.strided]
    copied = iter(torch._foreach_mul(dense, 1.0) if dense else ())
    return [next(copied) if one.layout is torch.strided else one.clone() for one in samples]


def fitting(earlier: Tensor, now: Tensor) -> Tensor | None:
    """An earlier sample where it can be compared with one of now, on its device and in its shape; else None."""
    if earlier.layout is torch.strided and now.layout is torch.strided and earlier.numel() == now.numel():
        return earlier.to(now.device).reshape(now.shape)
    same = (earlier.layout, earlier.shape, earlier.dtype) == (now.layout, now.shape, now.dtype)
    return earlier.to(now.device) if same else None


def differences(now: Sequence[Tensor], then: Sequence[Tensor]) -> list[Tensor]:
    """What has changed in each sample. A row that a sparse one does not hold is zero."""
    dense = [i for i, one in enumerate(now) if one.layout is torch.strided]
    changed = iter(torch._foreach_sub([now[i] for i in dense], [then[i] for i in dense]) if dense else ())
    pairs = zip(now, then, strict=True)
    return [next(changed) if a.layout is torch.strided else held((a - b).coalesce()) for a, b in pairs]


def held(one: Tensor) -> Tensor:
    """The elements of a sample: of a sparse one, those that it holds."""
    return one if one.layout is torch.strided else real(one.values())


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@cache
def _stride(shape: torch.Size) -> int:
    """How far apart the elements of a sample stand, so that it meets every row, column and channel alike.

    A stride that divides a row's length would see few columns, and one just beside a divisor would see columns that
    lie together. So it has no factor in common with the size, and goes evenly into the rows: in Euclid's algorithm with
    a row's length no quotient is large. The first one says only how many elements there are of a row, or rows to one.
    """
    size = shape.numel()
    most = -(-size // _SAMPLE)
    rows = [length for length in accumulate(reversed(shape), mul) if 1 < length < size]
    near = list(islice((s for s in range(most, 0, -1) if gcd(s, size) == 1), _TRIED))
    wide = [s for s in near if 2 * s > most] or near[:1]
    return min(wide, key=lambda s: max([_largest_quotient(s, length) for length in rows], default=0))


def _largest_quotient(one: int, other: int) -> int:
    """The largest quotient in Euclid's algorithm, but for the first."""
    large, small = max(one, other), min(one, other)
    large, small, largest = small, large % small, 0
    while small:
        largest = max(largest, large // small)
        large, small = small, large % small
    return largest
