"""Checkpoints on the disk: written whole or not at all, read only where every byte is what was written.

A checkpoint is a folder, ``step-000000120`` for step 120 and ``step-000000120-2`` for a second one at that step::

    model.safetensors   the weights, under the plain module's own names
    state.safetensors   every other tensor: the optimizer's, the random generators', the callbacks'
    state.json          everything else, as plain data
    manifest.json       the format's version, size and SHA-256 of each file; its last line hashes all before it

It appears by a rename, after everything in it is on the disk.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from loopwright.errors import CheckpointError, LockedError, SaveError, advise
from loopwright.forms import Count, check_form
from loopwright.plain import MAX_JSON_BYTES, check_amount, decode, encode, from_json, to_json
from loopwright.weights import plain_module

FORMAT, VERSION = "loopwright checkpoint", 1
MODEL, STATE_TENSORS, STATE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FILES = (MODEL, STATE_TENSORS, STATE)
PathLike: TypeAlias = str | os.PathLike[str]

_NAME = re.compile(r"step-([0-9]{9}|[1-9][0-9]{9,17})(?:-([2-9]|[1-9][0-9]{1,8}))?")
_LEFTOVER = re.compile(rf"\.(?:writing|deleting)-{_NAME.pattern}")
_LARGE = 2**26  # bytes that are not read before the header has accounted for them
_AT_ONCE = 2**27  # bytes to write in one system call
_MAX_MANIFEST, _MAX_HEADER, _MAX_DIMENSIONS = 2**20, 2**25, 64
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
Pieces: TypeAlias = Sequence[bytes | memoryview]

logger: logging.Logger = logging.getLogger("loopwright")


class _Entry(TypedDict):
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


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


# ---------------------------------------------------------------------------------------------------- writing


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
        MODEL: _tensor_pieces(snapshot.weights),
        STATE_TENSORS: _tensor_pieces(snapshot.tensors),
        STATE: [to_json(snapshot.tree)],
    }
    facts = encode(snapshot.facts)[0]
    if whole:
        files = {name: [b"".join(pieces)] for name, pieces in files.items()}
        files[MANIFEST] = [_manifest(files, {name: _sha256(*pieces) for name, pieces in files.items()}, facts)]
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
        target = _free_name(folder, prepared.step)
        _write_folder(folder, target, prepared)
    return target


def _write_folder(folder: Path, target: Path, prepared: Prepared) -> None:
    writing = folder / f".writing-{target.name}"
    try:
        os.mkdir(writing)
    except FileExistsError:  # a save that failed could not be removed
        _remove(writing)
        os.mkdir(writing)
    try:
        if MANIFEST in prepared.files:
            _write_files(writing, prepared.files)
        else:
            hashes: dict[str, str] = {}
            hashing = threading.Thread(  # while the disk writes; it takes about as long
                target=lambda: hashes.update((name, _sha256(*pieces)) for name, pieces in prepared.files.items()),
                name="loopwright-hash",
            )
            hashing.start()
            try:
                _write_files(writing, prepared.files)
            finally:
                hashing.join()
            _write_files(writing, {MANIFEST: [_manifest(prepared.files, hashes, prepared.facts)]})
        sync_folder(writing)
        os.rename(writing, target)
    except OSError:
        with contextlib.suppress(OSError):  # the disk that refused to write may refuse this, too
            _remove(writing)
        raise
    sync_folder(folder)


def _manifest(files: Mapping[str, Pieces], hashes: Mapping[str, str], facts: Any) -> bytes:
    entries = {name: {"size": sum(map(len, pieces)), "sha256": hashes[name]} for name, pieces in files.items()}
    head = to_json({"format": FORMAT, "version": VERSION, "facts": facts, "files": entries}) + b"\n"
    return head + _sha256(head).encode() + b"\n"


def _write_files(folder: Path, files: Mapping[str, Pieces]) -> None:
    """Write all of the files, and only then wait for the disk: it takes them in one go."""
    # With as little as can be between two system calls: at each the loop may have to wait for Python's lock.
    parts = [(folder / name, pieces if len(pieces) == 1 else _gathered(pieces)) for name, pieces in files.items()]
    descriptors: list[int] = []
    try:
        for path, views in parts:
            descriptors.append(descriptor := os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            for view in views:
                written = os.write(descriptor, view if len(view) <= _AT_ONCE else memoryview(view)[:_AT_ONCE])
                while written < len(view):
                    written += os.write(descriptor, memoryview(view)[written : written + _AT_ONCE])
            _begin_to_sync(descriptor)
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _begin_to_sync(descriptor: int) -> None:
    """Have the disk begin with a file, so that the wait for several is not the sum of them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _gathered(pieces: Pieces) -> Iterator[memoryview]:
    """The same bytes with small pieces put together: a thousand biases are not a thousand system calls."""
    small = bytearray()
    for piece in pieces:
        if small and len(small) + len(piece) > 2**20:
            yield memoryview(small)
            small = bytearray()
        if len(piece) > 2**20:
            yield memoryview(piece)
        else:
            small += piece
    if small:
        yield memoryview(small)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tensor_pieces(tensors: Mapping[str, Tensor]) -> Pieces:
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


def _sha256(*pieces: bytes | memoryview) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def _free_name(folder: Path, step: int) -> Path:
    name = base = f"step-{step:09d}"
    number = 2
    while os.path.lexists(path := folder / name):
        name, number = f"{base}-{number}", number + 1
    return path


# ---------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: PathLike) -> Contents:
    """Read a checkpoint, every byte of it verified before it is used.

    Args:
        path: The checkpoint's folder.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, of a newer format, or holds what none is written with.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if (size := manifest["files"][STATE]["size"]) > MAX_JSON_BYTES:
        raise CheckpointError(f"{folder / STATE} has {size} bytes, with which none is written")
    for name in (MODEL, STATE_TENSORS):
        if (size := manifest["files"][name]["size"]) > _LARGE:
            _check_length(folder / name, size)
    data = {name: _read_file(folder / name, manifest["files"][name]) for name in FILES}
    weights, tensors = _read_tensors(data[MODEL], folder / MODEL), _read_tensors(data[STATE_TENSORS], folder)
    state = decode(from_json(data[STATE]), tensors)
    return Contents(manifest["facts"], weights, state)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself verified, with the folder holding exactly the files that it lists.

    Raises:
        CheckpointError: It is not so.
    """
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
        if any(_NAME.fullmatch(name) for name in entries):
            raise CheckpointError(
                f"{folder} is a folder of checkpoints, and not one of them",
                fix=f'resume="auto", or the path of one: latest_checkpoint({str(folder)!r})',
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
    data = _read_regular(folder / MANIFEST, _MAX_MANIFEST)
    head, newline, digest = data[:-1].rpartition(b"\n")
    if data[-1:] != b"\n" or digest != _sha256(head + newline).encode():
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


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and type(entry["size"]) is int
        and type(entry["sha256"]) is str
    )


def _read_file(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = _read_regular(path, entry["size"], exactly=True)
    if _sha256(data) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged", why="its bytes are not those that were written: SHA-256 differs")
    return data


def _read_regular(path: Path, size: int, *, exactly: bool = False) -> bytes:
    """The bytes of a plain file of at most, or exactly, ``size``: never of a link, a pipe or a device."""
    try:
        with _opened(path, size, exactly=exactly) as file:
            return file.read(size + 1)
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory", why=f"it has up to {size} bytes") from error


@contextlib.contextmanager
def _opened(path: Path, size: int, *, exactly: bool) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no plain file")
            if status.st_size > size or (exactly and status.st_size != size):
                raise CheckpointError(
                    f"{path} is damaged",
                    why=f"it has {status.st_size} bytes, {'' if exactly else 'at most '}{size} expected",
                )
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def _check_length(path: Path, size: int) -> None:
    """Refuse a tensor file whose header does not account for its size, before the rest is read."""
    with _opened(path, size, exactly=True) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} has a header that does not fit into it")
        header = _header_of(file.read(length), path)
    end = max((entry["data_offsets"][-1] for entry in header.values() if entry["data_offsets"]), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{path} is damaged", why="its header does not account for all of its bytes")


def _read_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, its header checked before anything is allocated for them."""
    import safetensors.torch

    _check_header(data, path)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the library's own, and whatever torch says to shapes and types that cannot be
        raise CheckpointError(f"{path} is no sound safetensors file", why=ascii(str(error))[1:-1][:200]) from error


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


# --------------------------------------------------------------------------------------------------- the folder


def list_checkpoints(folder: PathLike) -> list[Path]:
    """The checkpoints in a folder by name alone, oldest first: nothing in them has been verified."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            match = _NAME.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found.append((int(match[1]), int(match[2] or 1), Path(folder) / entry.name))
    return [path for _, _, path in sorted(found)]


def latest_checkpoint(folder: PathLike) -> Path | None:
    """The newest checkpoint in a folder that is whole, or None. Damaged ones are passed over with a warning.

    Args:
        folder: The folder that ``Checkpoint`` was given.

    Returns:
        The path of the checkpoint's own folder, every byte of it verified.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[Checkpoint("runs/line")])
        >>> result = trainer.fit(train_loader, epochs=1)
        >>> latest_checkpoint("runs/line").name
        'step-000000004'
        >>> latest_checkpoint("runs/none") is None
        True
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
        else:
            return path
    return None


def best_checkpoint(folder: PathLike) -> Path | None:
    """The checkpoint with the best monitored score in a folder, or None where none has one.

    Where the metric that ``Checkpoint`` monitors has changed on the way, it is the best by the newest one.

    Args:
        folder: The folder that ``Checkpoint(folder, monitor=..., mode=...)`` was given.

    Returns:
        The path of the checkpoint's own folder, its manifest verified; among equal scores, the oldest.

    Examples:
        >>> saving = Checkpoint("runs/line", monitor="train/loss", mode="min")
        >>> result = Trainer(model, optimizer, loss, callbacks=[saving]).fit(train_loader, epochs=1)
        >>> best_checkpoint("runs/line").name
        'step-000000004'
        >>> best_checkpoint("runs/none") is None
        True
    """
    best: tuple[float, Path] | None = None
    judged: tuple[object, object] | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            facts = read_manifest(path)["facts"]
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
            continue
        score, sign = facts.get("score"), {"min": -1.0, "max": 1.0}.get(str(facts.get("mode")))
        if not (isinstance(score, float) and math.isfinite(score) and sign):
            continue
        judged = judged or (facts.get("monitor"), facts.get("mode"))
        same = judged == (facts.get("monitor"), facts.get("mode"))
        if same and (best is None or sign * score >= best[0]):
            best = (sign * score, path)
    return None if best is None else best[1]


def load_weights(path: PathLike, model: nn.Module, *, strict: bool = True) -> None:
    """Load the weights of a checkpoint into a model, verified.

    Args:
        path: The checkpoint's folder.
        model: A module of the same architecture.
        strict: Whether the names have to be the same; otherwise those that both have are loaded.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit the model, which is left as it was.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[Checkpoint("runs/line")])
        >>> result = trainer.fit(train_loader, epochs=1)
        >>> load_weights(latest_checkpoint("runs/line"), model)
    """
    if path is None:
        raise CheckpointError(
            "there is no checkpoint to load from: the path is None",
            why="latest_checkpoint and best_checkpoint return that where a folder holds none",
            fix="look at what they return before",
        )
    folder = Path(path)
    model = plain_module(model)
    try:
        weights: dict[str, Any] = dict(
            _read_tensors(_read_file(folder / MODEL, read_manifest(folder)["files"][MODEL]), folder / MODEL)
        )
        lacks = model.state_dict().keys() - weights.keys()  # what safetensors cannot hold is with the rest of the state
        state = read_checkpoint(folder).state if lacks else None
    except CheckpointError as error:
        advise(error, "another checkpoint: latest_checkpoint(folder) gives the newest that is whole")
        raise
    if lacks:
        extra = state.get("model", {}).get("extra") if isinstance(state, dict) else None
        weights |= extra if isinstance(extra, dict) else {}
    before = {
        name: value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }
    try:
        model.load_state_dict(weights, strict=strict)
    except Exception as error:  # torch's, about names and shapes, or what a module of the user's own raises
        model.load_state_dict(before)  # torch has loaded what did fit
        raise CheckpointError(
            f"the weights in {folder} do not fit this {type(model).__name__}", why=str(error)
        ) from error


def prune(folder: Path, keep: int, best: Path | None) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints and the best.

    Returns:
        Those that were left alone, because there is something in them that no checkpoint has.
    """
    strange = []
    for path in list_checkpoints(folder)[:-keep]:
        if path == best:
            continue
        if not set(os.listdir(path)) <= {MANIFEST, *FILES}:
            strange.append(path)
            continue
        doomed = folder / f".deleting-{path.name}"
        try:
            os.rename(path, doomed)  # gone at once: a half-deleted one is never taken for a checkpoint
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _remove(doomed)  # one that could not be removed to its end
            os.rename(path, doomed)
        _remove(doomed)
    return strange


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted. The folder's lock is held."""
    for entry in list(os.scandir(folder)):
        if _LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _remove(Path(entry.path))


def _remove(folder: Path) -> None:
    """Remove a folder of a checkpoint's files; nothing else that is in it, and nothing behind a link."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for name in {MANIFEST, *FILES} & set(os.listdir(descriptor)):
            os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(folder)


# ------------------------------------------------------------------------------------------------------ the lock


class FolderLock:
    """The right to write into a checkpoint folder: one process at a time, gone with the process.

    A forked child, such as a loader's worker, closes its copy at once, so that it cannot outlive the owner's.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        with SaveError.on(folder):
            self._descriptor: int | None = os.open(
                folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
            )
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise SaveError.of(error, folder) from error
            raise LockedError(
                f"{folder} is in use by another run",
                why="two runs that save into one folder would take each other's checkpoints for their own",
                fix="another folder, or wait until that run has ended",
            ) from None
        _held.add(self)

    def release(self) -> None:
        """Let go of the folder."""
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: set[FolderLock] = set()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):  # where processes can fork at all
    os.register_at_fork(after_in_child=_release_in_child)
