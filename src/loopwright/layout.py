"""How a batch is laid out, in words of python: what ``explain`` has to know of the data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from loopwright.sizes import sizes

Kind = Literal["tensor", "sequence", "mapping", "other"]

_LONGEST = 40  # characters of an expression that still reads well in a line of the loop
_PLAIN_KEY = re.compile(r"\['([\w ./-]*)'\]")  # as repr shows it


@dataclass(frozen=True)
class Layout:
    """What was seen of a run's first batch. Nothing of the batch itself is kept.

    Attributes:
        size: An expression of ``batch`` that gives its size, such as ``len(batch["x"])``; None where none is simple.
        kind: A tensor, a flat list or tuple of tensors, a flat dict of tensors, or something else.
        pair_size: The same as ``size``, of ``inputs`` and ``targets``.
        inputs: The kind of the first of a pair.
        targets: The kind of the second.
        floating_targets: Whether the targets are a floating tensor, and no indices of classes.
    """

    size: str | None
    kind: Kind
    pair_size: str | None = None
    inputs: Kind = "other"
    targets: Kind = "other"
    floating_targets: bool = False


# What ``loss=`` asks for; what is assumed before there was any data.
PAIRS: Layout = Layout("len(batch[0])", "sequence", "len(targets)", "tensor", "tensor")


def layout_of(batch: Any) -> Layout:
    """What is to be known of a batch."""
    paths = list(sizes(batch))
    whole = Layout(_shortest(batch, paths, {}), _kind_of(batch))
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        return whole
    inputs, targets = batch
    roots = getattr(batch, "_fields", None)
    names = {f".{roots[0]}": "inputs", f".{roots[1]}": "targets"} if roots else {"[0]": "inputs", "[1]": "targets"}
    return dataclasses.replace(
        whole,
        pair_size=_shortest(batch, paths, names),
        inputs=_kind_of(inputs),
        targets=_kind_of(targets),
        floating_targets=isinstance(targets, Tensor) and targets.is_floating_point(),
    )


def _kind_of(value: Any) -> Kind:
    if isinstance(value, Tensor):
        return "tensor"
    if type(value) in (list, tuple) and all(isinstance(item, Tensor) for item in value):
        return "sequence"
    if type(value) is dict and all(isinstance(item, Tensor) for item in value.values()):
        return "mapping"
    return "other"


def _shortest(batch: Any, paths: list[str], names: Mapping[str, str]) -> str | None:
    """The shortest of these paths as an expression of its length, in terms of ``batch`` or of a pair's ``names``."""
    found = []
    for path in paths:
        expression = path
        for place, name in names.items():
            if path.startswith(f"batch{place}"):
                expression = name + path.removeprefix(f"batch{place}")
        if names and expression.startswith("batch"):
            continue
        expression = _PLAIN_KEY.sub(r'["\1"]', expression)
        # What is packed, or nested and strided, has no length of its own; a key of another kind has no plain form.
        if "'" in expression or len(expression) > _LONGEST or _holds_no_length(batch):
            continue
        found.append(expression)
    best = min(found, key=_rank, default=None)
    return None if best is None else f"len({best})"


def _rank(expression: str) -> tuple[int, bool]:
    """Short ones first; of inputs and targets the targets, which are seldom anything but a tensor."""
    of_targets = expression.startswith("targets")
    return len(expression) - of_targets, not of_targets


def _holds_no_length(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_nested and value.layout == torch.strided
    if isinstance(value, PackedSequence):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_no_length, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_no_length, value))
