"""What saved data has to look like before anybody takes it back, said in type hints and checked."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias, Union

from torch import Tensor
from typing_extensions import is_typeddict

from loopwright.errors import CheckpointError

Count: TypeAlias = Annotated[int, "a number of things"]  # from 0 to what a file can count


def check_form(value: Any, form: Any, path: str = "$") -> None:
    """Raise CheckpointError unless ``value`` is of the type ``form`` by exact type, all the way down.

    Args:
        value: Data as ``plain.decode`` returns it.
        form: A type hint made of plain types, tensors, ``Any``, unions and TypedDicts. An int passes for a float.
        path: What the value is called in the error.
    """
    # Whether it fits is told five times as fast as where it does not.
    if not _fitting(form)(value) and not _check(value, form, path):
        raise _wrong(value, form, path)


def _check(value: Any, form: Any, path: str) -> bool:
    """Whether the value itself is of that form; CheckpointError where something within it is not."""
    if form is Any:
        return True
    if form == Count:
        return type(value) is int and 0 <= value < 2**63
    if form is None or form is types.NoneType:
        return value is None
    if is_typeddict(form):
        hints = _hints(form)
        if type(value) is not dict or value.keys() != hints.keys():
            return False
        for key, hint in hints.items():
            check_form(value[key], hint, f"{path}.{key}")
        return True
    origin, parts = typing.get_origin(form), typing.get_args(form)
    if origin in (Union, types.UnionType):
        return _check_union(value, parts, path)
    if origin is list or (origin is tuple and parts[1:] == (...,)):
        return type(value) is origin and _check_items(value, [parts[0]] * len(value), path)
    if origin is tuple:
        return type(value) is tuple and len(value) == len(parts) and _check_items(value, parts, path)
    if origin is dict:
        if type(value) is not dict:
            return False
        for key, item in value.items():
            if not _check(key, parts[0], path):
                return False
            check_form(item, parts[1], f"{path}.{key}")
        return True
    if form is Tensor:
        return isinstance(value, Tensor)
    return type(value) is form or (form is float and type(value) is int)


@functools.cache
def _fitting(form: Any) -> Callable[[Any], bool]:
    """A function that says of a value what ``_check`` would, and nothing else."""
    if form is Any:
        return lambda value: True
    if form == Count:
        return lambda value: type(value) is int and 0 <= value < 2**63
    if form is None or form is types.NoneType:
        return lambda value: value is None
    if form is Tensor:
        return lambda value: isinstance(value, Tensor)
    if is_typeddict(form):
        fitting = {key: _fitting(hint) for key, hint in _hints(form).items()}
        return lambda value: (
            type(value) is dict
            and value.keys() == fitting.keys()
            and all(fits(value[key]) for key, fits in fitting.items())
        )
    origin, parts = typing.get_origin(form), typing.get_args(form)
    if origin in (Union, types.UnionType):
        any_of = tuple(_fitting(part) for part in parts)
        return lambda value: any(fits(value) for fits in any_of)
    if origin is list or (origin is tuple and parts[1:] == (...,)):
        item = _fitting(parts[0])
        return lambda value: type(value) is origin and all(map(item, value))
    if origin is tuple:
        each = tuple(_fitting(part) for part in parts)
        return lambda value: (
            type(value) is tuple
            and len(value) == len(each)
            and all(fits(item) for fits, item in zip(each, value, strict=True))
        )
    if origin is dict:
        key_fits, value_fits = _fitting(parts[0]), _fitting(parts[1])
        return lambda value: type(value) is dict and all(map(key_fits, value)) and all(map(value_fits, value.values()))
    if form is float:
        return lambda value: type(value) in (int, float)
    return lambda value: type(value) is form


@functools.cache
def _hints(form: Any) -> dict[str, Any]:
    return typing.get_type_hints(form, include_extras=True)


def _check_items(items: Any, forms: Any, path: str) -> bool:
    for number, (item, form) in enumerate(zip(items, forms, strict=True)):
        check_form(item, form, f"{path}[{number}]")
    return True


def _check_union(value: Any, parts: Any, path: str) -> bool:
    """Whether one part fits; where only one is of the value's kind, the error is about what is within it."""
    within: CheckpointError | None = None
    for part in parts:
        try:
            if _check(value, part, path):
                return True
        except CheckpointError as error:
            within = error
    if within is not None:
        raise within
    return False


def _wrong(value: Any, form: Any, path: str) -> CheckpointError:
    return CheckpointError(
        f"{path[:200]!r} in the checkpoint is not what a run saves there",
        why=f"it is {_described(value)}, and {getattr(form, '__name__', str(form))} is what belongs there",
    )


def _described(value: Any) -> str:
    if type(value) is dict:
        keys = ", ".join(repr(key)[:40] for key in list(value)[:8])
        return f"a dict with the keys {keys or '(none)'}"
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)[:60] if type(value) is not int or abs(value) < 2**64 else "a very large int"
    return f"a {type(value).__name__}"


def alike(own: Any, theirs: Any) -> bool:
    """Whether a value could stand where ``own`` does: of the same kind, as far as that can be told.

    Where there is None here, anything goes; numbers of every type, and tensors of one number, are one kind.
    """
    if own is None:
        return True
    if _is_number(own):
        return _is_number(theirs) or (type(own) is bool and theirs is None)
    if isinstance(own, Tensor):
        return isinstance(theirs, Tensor) and own.shape == theirs.shape
    if isinstance(own, Mapping):  # its keys may come and go: milestones, say
        return isinstance(theirs, Mapping) and all(alike(own[key], theirs[key]) for key in own.keys() & theirs.keys())
    if isinstance(own, (list, tuple)):
        return (
            isinstance(theirs, (list, tuple))
            and len(own) == len(theirs)
            and all(alike(a, b) for a, b in zip(own, theirs, strict=True))
        )
    return type(own) is type(theirs)


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int, float) or (isinstance(value, Tensor) and value.numel() == 1)
