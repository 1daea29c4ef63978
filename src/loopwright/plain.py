"""Plain data and tensors to and from what a checkpoint's files hold: JSON, and named tensors.

What can be saved is told by exact type: None, bool, int, float, str, list, tuple, dict with keys of these, and tensors.
Nothing is ever built by name, and nothing is called: reading makes only these types.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.errors import CheckpointError

MAX_DEPTH = 64
MAX_JSON_BYTES = 32 * 2**20
MAX_VALUES = 2**20  # in one JSON text: reading takes some hundred bytes of memory for each

# A container or a value that JSON has no form for is an object with one key, and the key begins with "$".
_TUPLE, _DICT, _FLOAT, _TENSOR, _COMPLEX, _SPARSE = "$tuple", "$dict", "$float", "$tensor", "$complex", "$sparse"
_BITS = "$bits"
_KEYS = (bool, int, float, str)
_LARGEST = 2**63  # beyond it a whole number's digits are counted

# What every version of safetensors holds as it is.
_HELD = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
}  # fmt: skip
# What is held as its bytes.
_AS_BITS: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16")
    if hasattr(torch, name)
}
_COMPRESSED = {name: getattr(torch, name) for name in ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")}
_TENSORS = (Tensor, nn.Parameter)
_NAME_OF = {dtype: name for name, dtype in _AS_BITS.items()}


def fits_safetensors(name: str, value: object) -> bool:
    """Whether safetensors holds this value as it is, under this name."""
    return (
        isinstance(value, Tensor)
        and type(value) in _TENSORS
        and value.dtype in _HELD
        and value.layout is torch.strided
        and not value.is_nested
        and value.device.type != "meta"
        and name != "__metadata__"
        and _is_text(name)
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


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
    if kind is dict or kind is list:
        return _encode_items(value, path, tensors, depth)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if _is_text(value) else _refuse(path, value, "it has half of a surrogate pair in it")
    if kind is int:
        return value if value.bit_length() <= 4096 else _refuse(path, value, "it has more than 4096 bits")
    if kind is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if kind in _TENSORS:
        return _encode_tensor(value, path, tensors)
    if kind is tuple:
        return {_TUPLE: _encode_items(list(value), path, tensors, depth)}
    return _refuse(path, value, "")


def _encode_items(value: Any, path: str, tensors: dict[str, Tensor], depth: int) -> Any:
    """The items of a dict or a list: thousands of them, where a history is long."""
    named = type(value) is dict
    if named and not all(type(key) is str and key.isascii() and key[:1] != "$" for key in value):
        return _encode_odd_keys(value, path, tensors, depth)
    for item in value.values() if named else value:
        kind = type(item)
        if not (
            (kind is float and item - item == 0.0)  # finite
            or (kind is int and -_LARGEST < item < _LARGEST)
            or item is None
            or kind is bool
            or (kind is str and item.isascii())
        ):
            break
    else:
        if depth < MAX_DEPTH:
            return value.copy()  # there is nothing in it that is not as it will be
    if named:
        return {key: _encode(item, f"{path}.{key}", tensors, depth + 1) for key, item in value.items()}
    return [_encode(item, f"{path}[{i}]", tensors, depth + 1) for i, item in enumerate(value)]


def _encode_odd_keys(value: dict[Any, Any], path: str, tensors: dict[str, Tensor], depth: int) -> Any:
    """A dict with keys that are no text, or not certain to be, or that begin as ours do."""
    for key in value:
        if key is not None and type(key) not in _KEYS:
            raise _refused(f"{path}.{key}", key, "a key must be a str, an int, a float, a bool or None")
        if type(key) is str and not _is_text(key):
            raise _refused(path, key, "it is a key with half of a surrogate pair in it")
    pairs = [
        (_encode(key, path, tensors, depth + 1), _encode(item, f"{path}.{key}", tensors, depth + 1))
        for key, item in value.items()
    ]
    if all(type(key) is str and not key.startswith("$") for key in value):
        return dict(pairs)
    return {_DICT: [[key, item] for key, item in pairs]}


def _encode_tensor(value: Tensor, path: str, tensors: dict[str, Tensor]) -> Any:
    value = value.detach()
    if value.device.type == "meta":
        raise _refused(path, value, "it holds no data: its device is meta")
    if value.is_quantized or value.is_nested:
        raise _refused(path, value, "it is quantized" if value.is_quantized else "it is nested")
    if value.layout is torch.sparse_coo:
        parts = (value._indices(), value._values())  # as they are: coalescing would change what a resume finds
        names = [
            _encode_tensor(part, f"{path}.{n}", tensors) for n, part in zip(("indices", "values"), parts, strict=True)
        ]
        return {_SPARSE: [*names, list(value.shape), value.is_coalesced()]}
    if value.layout is not torch.strided:
        if (layout := str(value.layout).removeprefix("torch.")) not in _COMPRESSED:
            raise _refused(path, value, f"its layout is {value.layout}")
        by_row = layout in ("sparse_csr", "sparse_bsr")
        outer, inner = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
        made = [_encode_tensor(getattr(value, part)(), f"{path}.{part}", tensors) for part in (outer, inner, "values")]
        return {_SPARSE: [*made, list(value.shape), layout]}
    if value.is_complex():
        return {_COMPLEX: _encode_tensor(torch.view_as_real(value.resolve_conj()), path, tensors)}
    if value.dtype in _NAME_OF:
        bits = value.contiguous().view(torch.uint8 if value.itemsize == 1 else torch.int16)
        return {_BITS: [_NAME_OF[value.dtype], _encode_tensor(bits, path, tensors)]}
    if value.dtype not in _HELD:
        raise _refused(path, value, f"its type is {value.dtype}")
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
    if depth > MAX_DEPTH + 4:  # a sparse tensor of complex numbers is made of others
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
            return _decode_complex(_part(content, tensors, depth))
        if tag == _BITS and isinstance(content, list) and len(content) == 2:
            return _decode_bits(content[0], _part(content[1], tensors, depth))
        if tag == _SPARSE and isinstance(content, list) and len(content) in (4, 5):
            return _decode_sparse(content, tensors, depth)
    raise CheckpointError(f"the data holds {_shortly(tree)}, which no checkpoint is written with")


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


def _decode_complex(part: Tensor) -> Tensor:
    if part.dtype not in (torch.float16, torch.float32, torch.float64) or part.shape[-1:] != (2,):
        raise CheckpointError(f"a complex tensor in the data is made of a {tuple(part.shape)} {part.dtype} one")
    return torch.view_as_complex(part.contiguous())


def _decode_bits(name: Any, part: Tensor) -> Tensor:
    dtype = _AS_BITS.get(name) if isinstance(name, str) else None
    if dtype is None or part.dtype is not (torch.uint8 if dtype.itemsize == 1 else torch.int16):
        raise CheckpointError(f"a tensor in the data is of type {_shortly(name)}, made of {part.dtype}")
    return part.view(dtype)


def _shortly(value: Any) -> str:
    """The start of a value that anybody may have written, in printable letters."""
    return ascii(reprlib.repr(value))[1:-1][:100]


def _decode_sparse(content: list[Any], tensors: Mapping[str, Tensor], depth: int) -> Tensor:
    *trees, shape, kind = content
    parts = [_part(tree, tensors, depth) for tree in trees]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise CheckpointError(f"a sparse tensor in the data has the shape {_shortly(shape)}")
    try:  # with its invariants checked: an index outside the shape would reach outside memory later
        if len(parts) == 2:
            indices, values = parts
            return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True, is_coalesced=kind is True)
        outer, inner, values = parts
        return torch.sparse_compressed_tensor(
            outer, inner, values, shape, layout=_COMPRESSED[kind], check_invariants=True
        )
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(
            "a sparse tensor in the data contradicts itself", why=str(error).splitlines()[0]
        ) from error


def to_json(tree: Any) -> bytes:
    """The tree as JSON: the same bytes for the same tree.

    Raises:
        CheckpointError: It is more than ``from_json`` reads.
    """
    data = _WRITER.encode(tree).encode()
    check_amount(data)  # it is not too deep, for encode is not
    return data


def check_amount(data: bytes) -> None:
    """Raise CheckpointError where JSON of our own is more than ``from_json`` reads."""
    if len(data) > MAX_VALUES:  # less cannot hold too many
        _check_size(data)


_WRITER = json.JSONEncoder(ensure_ascii=True, check_circular=False, allow_nan=False, separators=(",", ":"))


def from_json(data: bytes) -> Any:
    """The tree that ``to_json`` was given, in bounded memory and without recursion that data decides on.

    Raises:
        CheckpointError: It is not such JSON: too large, too deep, a key twice, a number out of range.
    """
    _check_size(data)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_pairs,
            parse_float=_float,
            parse_int=_int,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the JSON cannot be read", why=ascii(str(error))[1:-1][:200]) from error


def _check_size(data: bytes) -> None:
    """Refuse what is too large, or nested too deep, before a recursive parser meets it. Strings are passed over."""
    if len(data) > MAX_JSON_BYTES:
        raise _too_much(f"{len(data)} bytes, and {MAX_JSON_BYTES} is the most that is read")
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * MAX_VALUES:
        raise _too_much(f"more than {MAX_VALUES} strings")
    bare = _STRING.sub(b"", unescaped)
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > MAX_VALUES:
        raise _too_much(f"more than {MAX_VALUES} values")
    depth = 0
    for byte in bare.translate(None, delete=_NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > 4 * MAX_DEPTH:
            raise CheckpointError("the JSON is nested too deep")


def _too_much(amount: str) -> CheckpointError:
    return CheckpointError(
        f"the plain data of a checkpoint comes to {amount}",
        why="plain data is for settings and counts, and reading it must not exhaust the memory",
        fix="keep long rows of numbers in tensors",
    )


_STRING = re.compile(rb'"[^"]*"')
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
