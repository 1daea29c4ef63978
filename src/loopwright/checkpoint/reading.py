"""Reading a checkpoint: only where every byte is what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loopwright.checkpoint.files import read_regular, sha256
from loopwright.checkpoint.format import FILES, MODEL, STATE, STATE_TENSORS
from loopwright.checkpoint.manifest import read_manifest
from loopwright.checkpoint.tensors import check_length, read_tensors
from loopwright.errors import CheckpointError
from loopwright.paths import PathLike, located
from loopwright.plain import MAX_JSON_BYTES, decode, from_json

_LARGE = 2**26  # bytes that are not read before the header has accounted for them


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        facts: What the manifest says beside the files: step, epoch, the monitored score.
        weights: The model's tensors, by the plain module's names, on the CPU.
        state: Everything else.
    """

    facts: dict[str, Any]
    weights: dict[str, Tensor]
    state: Any


def read_checkpoint(path: PathLike) -> Contents:
    """Read a checkpoint, every byte of it verified before it is used.

    Args:
        path: The checkpoint's folder.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, of a newer format, or holds what none is written with.
    """
    folder = located(path)
    manifest = read_manifest(folder)
    if (size := manifest["files"][STATE]["size"]) > MAX_JSON_BYTES:
        raise CheckpointError(f"{folder / STATE} has {size} bytes, with which none is written")
    for name in (MODEL, STATE_TENSORS):
        if (size := manifest["files"][name]["size"]) > _LARGE:
            check_length(folder / name, size)
    data = {name: _read_file(folder / name, manifest["files"][name]) for name in FILES}
    weights, tensors = read_tensors(data[MODEL], folder / MODEL), read_tensors(data[STATE_TENSORS], folder)
    state = decode(from_json(data[STATE]), tensors)
    return Contents(manifest["facts"], weights, state)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint alone: of its other files, only that they are there is verified.

    Raises:
        CheckpointError: As of ``read_checkpoint``.
    """
    manifest = read_manifest(folder)
    return read_tensors(_read_file(folder / MODEL, manifest["files"][MODEL]), folder / MODEL)


def _read_file(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = read_regular(path, entry["size"], exactly=True)
    if sha256(data) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged", why="its bytes are not those that were written: SHA-256 differs")
    return data
