"""Plain data and tensors to and from what a checkpoint's files hold: JSON, and named tensors.

What can be saved is told by exact type: None, bool, int, float, str, list, tuple, dict with keys of these, and tensors.
Nothing is ever built by name, and nothing is called: reading makes only these types.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.errors import CheckpointError

MAX_DEPTH = 64
MAX_JSON_BYTES = 64 * 2**20

# A container or a value that JSON has no form for is an object with one key, and the key begins with "$".
_TUPLE, _DICT, _FLOAT, _TENSOR, _COMPLEX, _SPARSE = "$tuple", "$dict", "$float", "$tensor", "$complex", "$sparse"
_KEYS = (bool, int, float, str)


def encode(value: Any, path: str = "$") -> tuple[Any, dict[str, Tensor]]:
    """The value as a tree for JSON, and the tensors that stand in it, on the CPU, named by their path.

    Args:
        value: Plain data by exact type, and tensors of any layout and device.
        path: What the value is called in errors and in the tensors' names.

    Raises:
        CheckpointError: Something in it is neither, naming its path and type.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(value, path, tensors, 0), tensors


def _encode(value: Any, path: str, tensors: dict[str, Tensor], depth: int) -> Any:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise _refused(path, value, f"it is nested more than {MAX_DEPTH} deep, or contains itself")
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if abs(value) < 2**4096 else _refuse(path, value, "it has more than 4096 bits")
    if kind is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if kind is list or kind is tuple:
        items = [_encode(item, f"{path}[{i}]", tensors, depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {_TUPLE: items}
    if kind is dict:
        for key in value:
            if key is not None and type(key) not in _KEYS:
                raise _refused(f"{path}.{key}", key, "a key must be a str, an int, a float, a bool or None")
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{path}.{key}", tensors, depth + 1) for key, item in value.items()}
        return {
            _DICT: [
                [_encode(key, path, tensors, depth + 1), _encode(item, f"{path}.{key}", tensors, depth + 1)]
                for key, item in value.items()
            ]
        }
    return _refuse(path, value, "")


def _encode_tensor(value: Tensor, path: str, tensors: dict[str, Tensor]) -> Any:
    value = value.detach()
    if value.is_quantized or value.device.type == "meta":
        raise _refused(path, value, "it is quantized" if value.is_quantized else "it holds no data: its device is meta")
    if value.layout is torch.sparse_coo:
        parts = (value._indices(), value._values())  # as they are: coalescing would change what a resume finds
        names = [
            _encode_tensor(part, f"{path}.{n}", tensors) for n, part in zip(("indices", "values"), parts, strict=True)
        ]
        return {_SPARSE: [*names, list(value.shape), value.is_coalesced()]}
    if value.layout is not torch.strided:
        raise _refused(path, value, f"its layout is {value.layout}")
    if value.is_complex():
        return {_COMPLEX: _encode_tensor(torch.view_as_real(value.resolve_conj()), path, tensors)}
    name = path.removeprefix("$.")
    while name in tensors:
        name += "'"  # keys 1 and "1" of one dict share a path
    tensors[name] = value.resolve_neg()
    return {_TENSOR: name}


def decode(tree: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """The value that ``encode`` was given.

    Raises:
        CheckpointError: The tree holds what ``encode`` never writes.
    """
    if depth > 2 * MAX_DEPTH:
        raise CheckpointError(f"the data is nested more than {MAX_DEPTH} deep")
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, list):
        return [decode(item, tensors, depth + 1) for item in tree]
    tag = next((key for key in tree if key.startswith("$")), None)
    if tag is None:
        return {key: decode(item, tensors, depth + 1) for key, item in tree.items()}
    if len(tree) == 1:
        content = tree[tag]
        if tag == _FLOAT and content in ("nan", "inf", "-inf"):
            return float(content)
        if tag == _TUPLE and isinstance(content, list):
            return tuple(decode(item, tensors, depth + 1) for item in content)
        if tag == _TENSOR and isinstance(content, str) and content in tensors:
            return tensors[content]
        if tag == _DICT and isinstance(content, list):
            return _decode_dict(content, tensors, depth)
        if tag == _COMPLEX and isinstance(content, dict):
            return torch.view_as_complex(_part(content, tensors, depth).contiguous())
        if tag == _SPARSE and isinstance(content, list) and len(content) == 4:
            return _decode_sparse(content, tensors, depth)
    raise CheckpointError(f"the data holds {str(tree)[:80]!r}, which no checkpoint is written with")


def _decode_dict(pairs: list[Any], tensors: Mapping[str, Tensor], depth: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise CheckpointError("a dict in the data is not made of pairs")
        key = decode(pair[0], tensors, depth + 1)
        if key is not None and type(key) not in _KEYS:
            raise CheckpointError(f"a dict in the data has a key of type {type(key).__name__}")
        found[key] = decode(pair[1], tensors, depth + 1)
    if len(found) != len(pairs):
        raise CheckpointError("a dict in the data has one key twice")
    return found


def _part(tree: Any, tensors: Mapping[str, Tensor], depth: int) -> Tensor:
    part = decode(tree, tensors, depth + 1)
    if not isinstance(part, Tensor):
        raise CheckpointError("a part of a tensor in the data is no tensor")
    return part


def _decode_sparse(content: list[Any], tensors: Mapping[str, Tensor], depth: int) -> Tensor:
    indices, values = _part(content[0], tensors, depth), _part(content[1], tensors, depth)
    shape, coalesced = content[2], content[3]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise CheckpointError(f"a sparse tensor in the data has the shape {str(shape)[:80]}")
    try:  # with its invariants checked: an index outside the shape would reach outside memory later
        return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True, is_coalesced=coalesced is True)
    except RuntimeError as error:
        raise CheckpointError(
            "a sparse tensor in the data contradicts itself", why=str(error).splitlines()[0]
        ) from error


def to_json(tree: Any) -> bytes:
    """The tree as JSON: the same bytes for the same tree."""
    return json.dumps(tree, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def from_json(data: bytes) -> Any:
    """The tree that ``to_json`` was given, in bounded memory and without recursion that data decides on.

    Raises:
        CheckpointError: It is not such JSON: too large, too deep, a key twice, a number out of range.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"the JSON is {len(data)} bytes, and {MAX_JSON_BYTES} is the most that is read")
    _check_depth(data)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_pairs,
            parse_float=_float,
            parse_int=_int,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("the JSON cannot be read", why=str(error)) from error


def _check_depth(data: bytes) -> None:
    """Refuse deep nesting before a recursive parser meets it. Brackets within strings count as none."""
    depth = 0
    for index, part in enumerate(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')):
        if index % 2 == 0:
            for byte in part.translate(None, delete=_NO_BRACKETS):
                depth += 1 if byte in b"[{" else -1
                if depth > 4 * MAX_DEPTH:
                    raise CheckpointError("the JSON is nested too deep")


_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError("an object in the JSON has one key twice")
    return found


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise CheckpointError(f"the JSON holds the number {text[:40]}")
    return number


def _int(text: str) -> int:
    if len(text) > 1300:
        raise CheckpointError(f"the JSON holds a whole number of {len(text)} digits")
    return int(text)


def _constant(text: str) -> float:
    raise CheckpointError(f"the JSON holds {text}")


def _refuse(path: str, value: object, reason: str) -> Any:
    raise _refused(path, value, reason)


def _refused(path: str, value: object, reason: str) -> CheckpointError:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return CheckpointError(
        f"{path}: {name} is not plain data" if not reason else f"{path}: {name} cannot be saved",
        why=reason or "a checkpoint holds exactly None, bool, int, float, str, list, tuple, dict and tensors",
        fix="turn it into these in state_dict, and back in load_state_dict",
    )
