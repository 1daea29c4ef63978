"""What a step holds besides its arguments: modules, optimizers and generators that it may change."""

from __future__ import annotations

import collections
import copy
import functools
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright.nonfinite.census import each_tensor

_OTHERS = {"torch", "numpy", "loopwright"}  # whose functions hold nothing of a step's
_LOOKED_INTO = 64  # a longer list is one of samples


def held_by(roots: Iterable[object]) -> list[Any]:
    """The modules, optimizers and generators that functions and objects refer to, each once.

    Looked at are a function's closure, defaults and the globals that it names, those of functions found there, the
    function and arguments of a ``functools.partial``, the attributes of what a method is bound to or of an object that
    is called, and short lists, tuples, sets and dicts. Attributes of other objects are not: neither ``config.teacher``
    nor ``library.teacher`` is found.
    """
    return [value for value in walk(roots) if _is_held(value)]


def _is_held(value: object) -> bool:
    return isinstance(value, (nn.Module, Optimizer)) or is_generator(value)


def walk(roots: Iterable[object]) -> list[Any]:
    """All that is looked at, each once."""
    looked_at: dict[int, Any] = {}  # held, so that no id is used again
    waiting = [part for root in roots for part in (root, *_of_owner(root))]
    first = {id(part) for part in waiting}
    while waiting:
        value = waiting.pop()
        if id(value) in looked_at:
            continue
        looked_at[id(value)] = value
        followed = not isinstance(value, types.FunctionType) or id(value) in first or is_users(value)
        if not _is_held(value) and followed:
            waiting += _parts(value)
    return list(looked_at.values())


def _of_owner(root: object) -> list[object]:
    """The attributes of a step that is an object, or a method of one, and the table of them."""
    while isinstance(root, functools.partial):
        root = root.func
    owner = getattr(root, "__self__", root)
    if isinstance(owner, (types.FunctionType, types.ModuleType, type, nn.Module)):
        return []
    attributes = getattr(owner, "__dict__", {})
    return [attributes, *attributes.values(), vars(type(owner)).get("__call__")]


def is_users(function: types.FunctionType) -> bool:
    """Whether a function is of somebody's own, and may hold what is a step's."""
    return (function.__module__ or "").partition(".")[0] not in _OTHERS


def is_generator(value: object) -> bool:
    """Whether random numbers are drawn from it: torch's, python's or numpy's."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    if not type(value).__module__.startswith("numpy"):
        return False
    import numpy as np

    return isinstance(value, (np.random.Generator, np.random.RandomState, np.random.BitGenerator))


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                continue  # not assigned yet
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from (value.__globals__[name] for name in names_in(value.__code__) if name in value.__globals__)
        yield getattr(value, "__wrapped__", None)
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)) and len(value) <= _LOOKED_INTO:
        yield from value
    elif isinstance(value, dict) and len(value) <= _LOOKED_INTO:
        yield from value.values()


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names of globals, among others, in a function and in those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def state_of(generator: Any) -> Callable[[], object]:
    """What puts a generator of python's or numpy's back to where it is now."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if hasattr(generator, "get_state"):  # numpy's older kind
        return functools.partial(generator.set_state, generator.get_state())
    bits = getattr(generator, "bit_generator", generator)
    return functools.partial(setattr, bits, "state", copy.deepcopy(bits.state))


class OptimizerAsFound:
    """Puts an optimizer's groups and states back; the tensors in ``tensors`` are the caller's to put back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [{name: _own(value) for name, value in group.items()} for group in optimizer.param_groups]
        self._state = {key: _own(state) for key, state in optimizer.state.items()}
        self.tensors: list[Tensor] = [p for group in self._groups for p in group["params"]]
        for part in (*self._groups, *self._state.values()):
            self.tensors += each_tensor(part)

    def restore(self) -> None:
        """Put back what was found."""
        optimizer = self._optimizer
        del optimizer.param_groups[len(self._groups) :]
        for group, before in zip(optimizer.param_groups, self._groups, strict=True):
            group.clear()
            group.update(_own(before))
        optimizer.state.clear()
        optimizer.state.update({key: _own(state) for key, state in self._state.items()})


def _own(value: Any) -> Any:
    """The same tensors, in lists and dicts that nobody else changes."""
    if isinstance(value, Mapping):
        return {name: _own(item) for name, item in value.items()}
    return [_own(item) for item in value] if isinstance(value, list) else value
