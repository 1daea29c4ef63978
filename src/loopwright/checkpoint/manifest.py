"""The manifest of a checkpoint: what is in the folder, and the hash of every byte of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopwright.checkpoint.files import Pieces, read_regular, sha256
from loopwright.checkpoint.format import FILES, FORMAT, MANIFEST, NAME, VERSION
from loopwright.errors import CheckpointError
from loopwright.plain import decode, from_json, to_json

_MAX_MANIFEST = 2**20  # bytes


def manifest_of(files: Mapping[str, Pieces], hashes: Mapping[str, str], facts: Any) -> bytes:
    """The manifest of these files; ``facts`` are encoded already."""
    entries = {name: {"size": sum(map(len, pieces)), "sha256": hashes[name]} for name, pieces in files.items()}
    head = to_json({"format": FORMAT, "version": VERSION, "facts": facts, "files": entries}) + b"\n"
    return head + sha256(head).encode() + b"\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself verified, with the folder holding exactly the files that it lists.

    Raises:
        CheckpointError: It is not so.
    """
    _check_names(folder)
    data = read_regular(folder / MANIFEST, _MAX_MANIFEST)
    head, newline, digest = data[:-1].rpartition(b"\n")
    if data[-1:] != b"\n" or digest != sha256(head + newline).encode():
        raise CheckpointError(f"{folder / MANIFEST} is damaged", why="its last line is not the hash of the others")
    manifest = from_json(head)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is no loopwright checkpoint")
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{folder} has version {ascii(version)[:20]} of the format",
            why=f"this loopwright reads version {VERSION}",
            fix="a newer loopwright",
        )
    facts, files = decode(manifest.get("facts"), {}), manifest.get("files")
    well_formed = isinstance(facts, dict) and isinstance(files, dict) and files.keys() == set(FILES)
    if files is None or not well_formed or not all(_is_entry(entry) for entry in files.values()):
        raise CheckpointError(f"{folder / MANIFEST} is not as a manifest is written")
    return {"facts": facts, "files": files}


def _check_names(folder: Path) -> None:
    """Raise CheckpointError unless this is a folder with the files of a checkpoint in it, and nothing else."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
        entries = set(os.listdir(folder)) if is_folder else set()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} cannot be read",
            why=str(error),
            fix="the path of a checkpoint, such as runs/line/step-000000120, as latest_checkpoint(folder) returns it",
        ) from error
    if not is_folder:
        raise CheckpointError(f"{folder} is no folder", fix="give a checkpoint's folder, such as step-000000120")
    if entries != {MANIFEST, *FILES}:
        if any(NAME.fullmatch(name) for name in entries):
            raise CheckpointError(
                f"{folder} is a folder of checkpoints, and not one of them",
                fix=f"the path of one, such as latest_checkpoint({str(folder)!r})",
            )
        if entries.isdisjoint({MANIFEST, *FILES}):
            raise CheckpointError(
                f"{folder} holds no checkpoints, and is none",
                why="it is empty" if not entries else "nothing in it is of one",
                fix="the folder that Checkpoint was given, or one of those in it, such as step-000000120",
            )
        wrong = map(ascii, sorted(entries ^ {MANIFEST, *FILES}))
        raise CheckpointError(
            f"{folder} does not hold the files of a checkpoint", why=f"missing or not its own: {', '.join(wrong)[:200]}"
        )


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and type(entry["size"]) is int
        and type(entry["sha256"]) is str
    )
