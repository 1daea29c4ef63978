"""Writing a checkpoint: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loopwright.checkpoint.files import Pieces, sha256, sync_folder, write_files
from loopwright.checkpoint.folder import free_name, remove
from loopwright.checkpoint.format import MANIFEST, MODEL, STATE, STATE_TENSORS
from loopwright.checkpoint.manifest import manifest_of
from loopwright.checkpoint.tensors import tensor_pieces
from loopwright.errors import SaveError
from loopwright.plain import encode, to_json


@dataclass(frozen=True)
class Snapshot:
    """What is to be saved.

    Attributes:
        facts: Plain data that can be read without the rest; ``"step"`` names the folder.
        weights: The model's tensors, by the plain module's names.
        tree: Everything else, as ``plain.encode`` gives it.
        tensors: And its tensors.
    """

    facts: dict[str, Any]
    weights: dict[str, Tensor]
    tree: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """The files of a checkpoint, ready to be written.

    Attributes:
        step: Names the folder.
        files: The bytes of each. Where the manifest is not among them, the pieces are the tensors' own memory.
        facts: What the manifest is still to say, encoded.
    """

    step: int
    files: dict[str, Pieces]
    facts: Any


def prepare(snapshot: Snapshot, *, whole: bool = False) -> Prepared:
    """The bytes that a snapshot comes to.

    Args:
        snapshot: What is to be saved.
        whole: Whether to copy and hash them all at once, so that nothing is left to be done but the writing.
    """
    files: dict[str, Pieces] = {
        MODEL: tensor_pieces(snapshot.weights),
        STATE_TENSORS: tensor_pieces(snapshot.tensors),
        STATE: [to_json(snapshot.tree)],
    }
    facts = encode(snapshot.facts)[0]
    if whole:
        files = {name: [b"".join(pieces)] for name, pieces in files.items()}
        files[MANIFEST] = [manifest_of(files, {name: sha256(*pieces) for name, pieces in files.items()}, facts)]
    return Prepared(snapshot.facts["step"], files, facts)


def write_checkpoint(folder: Path, snapshot: Snapshot | Prepared) -> Path:
    """Write a checkpoint; when this returns, it is durable.

    Args:
        folder: Where checkpoints are; it exists.
        snapshot: What it is to hold.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: The system refused to write; older checkpoints are untouched.
    """
    prepared = prepare(snapshot) if isinstance(snapshot, Snapshot) else snapshot
    with SaveError.on(folder):
        target = free_name(folder, prepared.step)
        _write_folder(folder, target, prepared)
    return target


def _write_folder(folder: Path, target: Path, prepared: Prepared) -> None:
    writing = folder / f".writing-{target.name}"
    try:
        os.mkdir(writing)
    except FileExistsError:  # a save that failed could not be removed
        remove(writing)
        os.mkdir(writing)
    try:
        if MANIFEST in prepared.files:
            write_files(writing, prepared.files)
        else:
            hashes: dict[str, str] = {}
            hashing = threading.Thread(  # while the disk writes; it takes about as long
                target=lambda: hashes.update((name, sha256(*pieces)) for name, pieces in prepared.files.items()),
                name="loopwright-hash",
            )
            hashing.start()
            try:
                write_files(writing, prepared.files)
            finally:
                hashing.join()
            write_files(writing, {MANIFEST: [manifest_of(prepared.files, hashes, prepared.facts)]})
        sync_folder(writing)
        os.rename(writing, target)
    except OSError:
        with contextlib.suppress(OSError):  # the disk that refused to write may refuse this, too
            remove(writing)
        raise
    sync_folder(folder)
