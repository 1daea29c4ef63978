"""The tensors of a checkpoint, in safetensors' format: written piece by piece, and read once the header is sound."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from loopwright.checkpoint.files import Pieces, opened
from loopwright.errors import CheckpointError
from loopwright.forms import Count, check_form
from loopwright.plain import check_amount, from_json

_MAX_HEADER, _MAX_DIMENSIONS = 2**25, 64
# What safetensors calls them, from the last of a file to the first: so that each lies on a multiple of its size.
_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_ORDER = {dtype: -number for number, dtype in enumerate(_TYPES)}
_NOT_NUMPYS = {torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn}  # which cost a few calls more
_HEADER_WRITER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


class _Entry(TypedDict):
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


def tensor_pieces(tensors: Mapping[str, Tensor]) -> Pieces:
    """The bytes that ``safetensors.torch.save`` makes of the tensors: the header, and each tensor's own memory.

    The library would copy them all into one piece, and refuse those that share memory or do not lie in one piece.
    """
    entries, pieces, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        piece = _memory(tensor)
        begin, end = end, end + len(piece)
        if tensor.dim() > _MAX_DIMENSIONS:
            raise CheckpointError(
                f"{name[:80]!r} has more than {_MAX_DIMENSIONS} dimensions, and could not be read back"
            )
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        pieces.append(piece)
    if "__metadata__" in entries:
        raise CheckpointError("a tensor is named '__metadata__', which safetensors keeps for itself")
    header = _HEADER_WRITER.encode(entries).encode()
    header += b" " * (-len(header) % 8)
    check_amount(header)
    if len(header) > _MAX_HEADER:
        raise CheckpointError(f"the names of {len(entries)} tensors come to more than {_MAX_HEADER} bytes")
    return [len(header).to_bytes(8, "little") + header, *pieces]


def _memory(tensor: Tensor) -> memoryview:
    """The tensor's elements, little-endian: its own memory where it is such, else a copy."""
    if tensor.dtype in _NOT_NUMPYS or not tensor.is_contiguous():
        data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    else:
        data = tensor.numpy(force=True).reshape(-1).view("uint8")
    if sys.byteorder == "big":
        data = data.reshape(-1, tensor.itemsize)[:, ::-1].reshape(-1)
    return data.data


def read_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, its header checked before anything is allocated for them."""
    import safetensors.torch

    _check_header(data, path)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the library's own, and whatever torch says to shapes and types that cannot be
        raise CheckpointError(f"{path} is no sound safetensors file", why=ascii(str(error))[1:-1][:200]) from error


def check_length(path: Path, size: int) -> None:
    """Refuse a tensor file whose header does not account for its size, before the rest is read."""
    with opened(path, size, exactly=True) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} has a header that does not fit into it")
        header = _header_of(file.read(length), path)
    end = max((entry["data_offsets"][-1] for entry in header.values() if entry["data_offsets"]), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{path} is damaged", why="its header does not account for all of its bytes")


def _check_header(data: bytes, path: object) -> None:
    """Refuse a header that is too large, or one of those that the library lets by: a key twice, deep nesting."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise CheckpointError(f"{path} has a header that does not fit into it")
    _header_of(data[8 : 8 + length], path)


def _header_of(text: bytes, path: object) -> dict[str, Any]:
    try:
        header: dict[str, Any] = from_json(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged", why=f"its header is not one: {error.what}") from error
    check_form(header, dict[str, Any], str(path))
    check_form(header.pop("__metadata__", {}), dict[str, str], str(path))
    check_form(header, dict[str, _Entry], str(path))
    if any(len(entry["shape"]) > _MAX_DIMENSIONS for entry in header.values()):
        raise CheckpointError(f"{path} has a tensor of more than {_MAX_DIMENSIONS} dimensions")
    return header
