"""What a step refers to and may change beside modules, optimizers and generators: tensors, lists, variables."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from loopwright.checks.held import is_users, names_in, walk
from loopwright.checks.tensors import TensorAsFound, of_one_piece

_ITEMS = 100_000  # in a list that is copied; of a tensor, elements are:
_COPIED = 2**24
_NOTHING = object()


class SurroundingsAsFound:
    """Puts back what else a step refers to and may change, where ``held_by`` looks: its surroundings.

    These are plain tensors of up to 16 million elements with their gradients, and arrays of numpy's; lists, dicts, sets
    and deques, with the items that were in them; the variables of enclosing functions that it assigns to; and the
    globals that it does. What hangs on other objects is not put back.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        looked_at = walk(roots)
        tensors = [v for v in looked_at if isinstance(v, Tensor) and not is_lazy(v) and not v.is_meta]
        tensors = [tensor for tensor in tensors if tensor.numel() <= _COPIED]
        self._gradients = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
        tensors += [gradient for _, gradient in self._gradients if gradient is not None]  # backward adds to them
        self._tensors = [TensorAsFound(of_one_piece(t)) for t in {id(tensor): tensor for tensor in tensors}.values()]
        self._arrays = [(v, v.copy()) for v in looked_at if _is_array(v) and v.size <= _COPIED]
        self._containers = [
            (value, copy.copy(value))
            for value in looked_at
            if type(value) in (list, dict, set, collections.deque) and len(value) <= _ITEMS
        ]
        functions = [v for v in looked_at if isinstance(v, types.FunctionType) and is_users(v)]
        self._cells = [(cell, _content(cell)) for function in functions for cell in function.__closure__ or ()]
        self._globals = [
            (function.__globals__, name, function.__globals__[name])
            for function in functions
            for name in names_in(function.__code__)
            if name in function.__globals__
        ]

    def restore(self) -> None:
        """Put back what was found. What is as it was is not written to."""
        for variables, name, value in self._globals:
            if variables.get(name, _NOTHING) is not value:
                variables[name] = value
        for cell, value in self._cells:
            if _content(cell) is not value and value is not _NOTHING:
                cell.cell_contents = value
        for container, before in self._containers:
            _refill(container, before)
        for array, elements in self._arrays:
            if array.shape != elements.shape:
                array.resize(elements.shape, refcheck=False)  # of which the table here is one
            if array.tobytes() != elements.tobytes():
                array[...] = elements
        for tensor in self._tensors:
            tensor.restore()
        for leaf, gradient in self._gradients:
            if leaf.is_leaf and leaf.grad is not gradient:
                leaf.grad = gradient


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and not value.dtype.hasobject


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _NOTHING  # not assigned yet


def _refill(container: Any, before: Any) -> None:
    """The very items that were in it, in their order."""
    if isinstance(container, dict):
        if [*map(id, container), *map(id, container.values())] != [*map(id, before), *map(id, before.values())]:
            container.clear()
            container.update(before)
    elif [*map(id, container)] != [*map(id, before)]:
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)
