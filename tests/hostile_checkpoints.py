"""Checkpoints made to do harm, each from a good one. ``CASES`` says how, by kind and name."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

MODEL, TENSORS, STATE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FILES = (MODEL, TENSORS, STATE)
Harm: TypeAlias = Callable[[Path], None]

CASES: dict[str, dict[str, Harm]] = {}


def case(kind: str, name: str) -> Callable[[Harm], Harm]:
    """Put a function that damages the checkpoint in a folder into the corpus."""

    def put(harm: Harm) -> Harm:
        add(kind, name, harm)
        return harm

    return put


def add(kind: str, name: str, harm: Harm) -> None:
    cases = CASES.setdefault(kind, {})
    assert name not in cases, (kind, name)
    cases[name] = harm


# ------------------------------------------------------------------------------- building with hashes that are right


def sealed(head: bytes) -> bytes:
    """A manifest's bytes with the last line that they call for."""
    return head + hashlib.sha256(head).hexdigest().encode() + b"\n"


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Write the manifest anew: with the sizes and hashes of the files as they are now, and with a change."""
    head = json.loads((folder / MANIFEST).read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[0])
    head["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in FILES
        if (data := (folder / name).read_bytes()) is not None
    }
    change(head)
    (folder / MANIFEST).write_bytes(sealed(json.dumps(head).encode() + b"\n"))


def with_file(name: str, data: bytes | Callable[[], bytes]) -> Harm:
    """Another content of one file, with hashes that are right. What is large is made when it is needed."""

    def harm(folder: Path) -> None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())
        seal(folder)

    return harm


def with_text(name: str, change: Callable[[bytes], bytes]) -> Harm:
    """A changed content of one file, with hashes that are right."""

    def harm(folder: Path) -> None:
        data = change((folder / name).read_bytes())
        assert data != (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        seal(folder)

    return harm


def with_manifest(change: Callable[[dict[str, Any]], object]) -> Harm:
    """A changed manifest, with the hash that it calls for."""
    return lambda folder: seal(folder, change)


def with_head(head: bytes) -> Harm:
    """Another manifest altogether, with the hash that it calls for."""

    def harm(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(sealed(head + b"\n"))

    return harm


def with_state(change: Callable[[Any], object]) -> Harm:
    """A changed state, with hashes that are right."""

    def harm(folder: Path) -> None:
        before = (folder / STATE).read_bytes()
        state = json.loads(before)
        change(state)
        (folder / STATE).write_text(json.dumps(state))
        assert (folder / STATE).read_bytes() != before
        seal(folder)

    return harm


def put(path: str, value: Any) -> Harm:
    """A state with something else at a path such as ``progress/step``; a number counts in a list."""

    def change(state: Any) -> None:
        *way, last = [int(part) if part.lstrip("-").isdigit() else part for part in path.split("/")]
        for part in way:
            state = state[part]
        state[last] = value

    return with_state(change)


def drop(path: str) -> Harm:
    """A state without something."""

    def change(state: Any) -> None:
        *way, last = path.split("/")
        for part in way:
            state = state[int(part) if part.isdigit() else part]
        del state[last]

    return with_state(change)


def tensors_file(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header and any length before it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ------------------------------------------------------------------------------------------------------ the corpus

KIND = "header length"
HEADERS: dict[str, bytes | Callable[[], bytes]] = {
    "an empty file": b"",
    "seven bytes": b"\x02" + bytes(6),
    "eight bytes of zero": bytes(8),
    "a header of no bytes": tensors_file(b""),
    "one byte": tensors_file(b"{"),
    "one more than there is": tensors_file({}, length=3),
    "all 64 bits": tensors_file({}, length=2**64 - 1),
    "the sign bit": tensors_file({}, length=2**63),
    "overflowing with the eight": tensors_file({}, length=2**64 - 8),
    "a hundred million": tensors_file({}, length=100_000_000),
    "the file's own": tensors_file({}, b"", length=10),
    "into the body": tensors_file({"a": entry()}, bytes(8), length=len(json.dumps({"a": entry()})) + 8),
    "one less": tensors_file({"a": entry()}, bytes(8), length=len(json.dumps({"a": entry()})) - 1),
    "32 MiB of spaces and no JSON": lambda: tensors_file(b" " * 2**25),
    "33 MiB": lambda: tensors_file(b'{"__metadata__":{"a":"' + b"x" * (33 * 2**20) + b'"}}'),
    "bytes that are no text": tensors_file(b"\xff\xfe\xfd"),
}
for label, data in HEADERS.items():
    add(KIND, label, with_file(TENSORS if len(label) % 2 else MODEL, data))

KIND = "offsets, shapes and types"
for label, header in {
    "beyond the file": {"a": entry(offsets=(0, 80), shape=(20,))},
    "reversed": {"a": entry(offsets=(8, 0))},
    "negative": {"a": entry(offsets=(-8, 0))},
    "overlapping": {"a": entry(), "b": entry()},
    "with a gap": {"a": entry(offsets=(4, 8), shape=(1,))},
    "not to the end": {"a": entry(offsets=(0, 4), shape=(1,))},
    "three of them": {"a": entry(offsets=(0, 4, 8))},
    "one of them": {"a": entry(offsets=(0,))},
    "as text": {"a": entry(offsets=("0", "8"))},
    "as fractions": {"a": entry(offsets=(0.0, 8.0))},
    "huge": {"a": entry(offsets=(2**64, 2**64 + 8))},
    "the last before 64 bits": {"a": entry(offsets=(2**64 - 9, 2**64 - 1))},
    "missing": {"a": {"dtype": "F32", "shape": [2]}},
    "a shape that is too large": {"a": entry(shape=(3,))},
    "a shape that is too small": {"a": entry(shape=(1,))},
    "a shape that overflows": {"a": entry(shape=(2**33, 2**33))},
    "a shape that overflows to fit": {"a": entry(shape=(2**63, 4))},
    "a negative shape": {"a": entry(shape=(-2,))},
    "two negative sizes": {"a": entry(shape=(-1, -2))},
    "a fractional shape": {"a": entry(shape=(2.0,))},
    "a shape that is a number": {"a": entry(shape=2)},
    "a thousand dimensions": {"a": entry(shape=(1,) * 1000 + (2,))},
    "the type F128": {"a": entry("F128")},
    "the type OBJECT": {"a": entry("OBJECT")},
    "the type f32": {"a": entry("f32")},
    "a type that is a number": {"a": entry(32)},
    "a type that is nothing": {"a": entry(None)},
    "the type builtins.eval": {"a": entry("builtins.eval")},
    "an entry that is a list": {"a": ["F32", [2], [0, 8]]},
    "metadata that is a list": {"__metadata__": [], "a": entry()},
    "a list in the place of all": [entry()],
}.items():
    add(KIND, label, with_file(MODEL if len(label) % 2 else TENSORS, tensors_file(header, bytes(8))))

KIND = "depth"


def repeated(before: bytes, depth: int, after: bytes) -> Callable[[], bytes]:
    return lambda: before * depth + b"1" + after * depth


for depth in (300, 100_000, 8_000_000):
    add(KIND, f"{depth} lists in the state", with_file(STATE, repeated(b"[", depth, b"]")))
    add(KIND, f"{depth} objects in the state", with_file(STATE, repeated(b'{"a":', depth // 2, b"}")))
add(KIND, "a million lists that never end", with_file(STATE, b"[" * 1_000_000))
add(KIND, "a thousand lists behind an escaped quote", with_file(STATE, b'["\\"",' + b"[" * 1000 + b"]" * 1001))
add(KIND, "a thousand lists behind two backslashes", with_file(STATE, b'["\\\\",' + b"[" * 1000 + b"]" * 1001))
add(KIND, "tuples", with_file(STATE, b'{"$tuple":[' * 200 + b"]}" * 200))
add(KIND, "dicts", with_file(STATE, b'{"$dict":[[1,' * 80 + b"1" + b"]]}" * 80))
add(KIND, "complex numbers", with_file(STATE, b'{"$complex":' * 200 + b"1" + b"}" * 200))
add(KIND, "lists in the manifest", with_head(b"[" * 100_000 + b"]" * 100_000))
add(KIND, "lists in the manifest's facts", with_manifest(lambda head: head.update(facts=_nested(200))))
add(KIND, "lists in a header", with_file(MODEL, tensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")))
add(KIND, "objects in the metadata", with_file(MODEL, tensors_file(b'{"__metadata__":' * 900 + b"{}" + b"}" * 900)))


def _nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


KIND = "keys twice"
TWICE = b'{"format":"loopwright checkpoint","version":1,"facts":{},"files":{}}'
add(KIND, "in the state", with_text(STATE, lambda data: b'{"model":1,' + data[1:]))
add(KIND, "in the state, escaped", with_text(STATE, lambda data: b'{"\\u006dodel":1,' + data[1:]))
add(KIND, "deep in the state", with_text(STATE, lambda data: data.replace(b'"step":', b'"step":0,"step":', 1)))
add(KIND, "in the manifest", with_head(TWICE[:-1] + b',"version":1}'))
add(KIND, "the manifest's format", with_head(b'{"format":"another",' + TWICE[1:]))
add(KIND, "the manifest's files", with_head(TWICE[:-1] + b',"files":{}}'))
add(KIND, "the manifest's facts", with_head(TWICE.replace(b'"facts":{}', b'"facts":{"a":1,"a":2}')))
add(
    KIND,
    "in a header",
    with_file(MODEL, tensors_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8))),
)
add(
    KIND,
    "in a header's entry",
    with_file(MODEL, tensors_file(b'{"a":{"dtype":"F64","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))),
)
add(KIND, "in a header's metadata", with_file(MODEL, tensors_file(b'{"__metadata__":{"a":"1","a":"2"}}')))
add(KIND, "the metadata", with_file(TENSORS, tensors_file(b'{"__metadata__":{},"__metadata__":{}}')))
add(KIND, "a tagged dict's", with_file(STATE, b'{"$dict":[[1,2],[1,3]]}'))
add(KIND, "a tagged dict's 1 and 1.0", with_file(STATE, b'{"$dict":[[1,2],[1.0,3]]}'))
add(KIND, "a tagged dict's 1 and true", with_file(STATE, b'{"$dict":[[1,2],[true,3]]}'))

KIND = "numbers"
for label, text in {
    "1e999": b"1e999",
    "-1e999": b"-1e999",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "2000 digits": b"1" * 2000,
    "ten million digits": b"1" * 10_000_000,
    "-2000 digits": b"-" + b"9" * 2000,
    "two points": b"1.2.3",
    "hexadecimal": b"0x10",
    "a leading zero": b"01",
    "no digit": b"-",
    "a plus": b"+1",
    "1e999 behind a million zeros": b"1" + b"0" * 1_000_000 + b"e999",
    "the tag of a float with 1e999": b'{"$float":"1e999"}',
    "the tag of a float with a number": b'{"$float":1}',
    "the tag of a float with words": b'{"$float":"__import__(\'os\')"}',
    "a key that is a list": b'{"$dict":[[[1],2]]}',
    "a key that is a tuple": b'{"$dict":[[{"$tuple":[1]},2]]}',
}.items():
    add(KIND, label, with_file(STATE, b'{"a":' + text + b"}"))


def with_size(size: Any) -> Harm:
    return with_manifest(lambda head: head["files"][MODEL].update(size=size))


def with_version(version: Any) -> Harm:
    return with_manifest(lambda head: head.update(version=version))


for size in (-1, 2**70, True, 1.0, "12", 10**15, None):
    add(KIND, f"a size of {size!r}", with_size(size))
for version in (2, True, 1.0, -1, 10**1000, "1", [1], None):
    add(KIND, f"the version {str(version)[:20]!r}, {type(version).__name__}", with_version(version))

KIND = "values by the million"
add(KIND, "lists", with_file(STATE, lambda: b"[" + b"[]," * 10_000_000 + b"1]"))
add(KIND, "objects", with_file(STATE, lambda: b"[" + b"{}," * 10_000_000 + b"1]"))
add(KIND, "numbers", with_file(STATE, lambda: b"[" + b"1," * 15_000_000 + b"1]"))
add(KIND, "strings", with_file(STATE, lambda: b"[" + b'"",' * 10_000_000 + b"1]"))
add(KIND, "keys", with_file(STATE, lambda: b"{" + b",".join(b'"%x":1' % i for i in range(2_000_000)) + b"}"))
add(KIND, "quotes", with_file(STATE, lambda: b'"' * 32_000_000))
add(KIND, "backslashes", with_file(STATE, lambda: b'"' + b"\\" * 32_000_001 + b'"'))
add(KIND, "bytes", with_file(STATE, lambda: b'"' + b"a" * 40_000_000 + b'"'))
add(
    KIND,
    "tensors",
    with_file(
        MODEL,
        lambda: tensors_file(
            b"{" + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(400_000)) + b"}"
        ),
    ),
)
add(KIND, "commas in a header", with_file(TENSORS, lambda: tensors_file(b"[" + b"0," * 10_000_000 + b"0]")))
add(KIND, "brackets in the manifest", with_head(b"[" + b"[]," * 300_000 + b"1]"))
add(KIND, "bytes in the manifest", with_head(TWICE[:-1] + b',"a":"' + b"a" * 2_000_000 + b'"}'))


KIND = "links and pipes"


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def in_place_of(name: str, make: Callable[[Path], object]) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"{folder.name}.{name}")
        make(folder / name)

    return harm


for target in (MANIFEST, *FILES):
    add(
        KIND,
        f"{target} is a link to what it was",
        in_place_of(target, lambda path: path.symlink_to(path.parent.parent / f"{path.parent.name}.{path.name}")),
    )
    add(KIND, f"{target} is a pipe", in_place_of(target, os.mkfifo))
for target, to in (
    (MODEL, "/dev/zero"),
    (STATE, "/etc/passwd"),
    (MANIFEST, "/dev/stdin"),
    (TENSORS, TENSORS),
    (MANIFEST, "nowhere"),
):
    add(KIND, f"{target} is a link to {to}", in_place_of(target, link_to(to)))
add(KIND, "the model is a folder", in_place_of(MODEL, Path.mkdir))


@case(KIND, "the model is a socket")
def _socket(folder: Path) -> None:
    (folder / MODEL).unlink()
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(folder):
        made.bind(MODEL)


@case(KIND, "the folder is a link")
def _linked(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


@case(KIND, "the folder is a link to itself")
def _loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


@case(KIND, "the folder is a pipe")
def _pipe(folder: Path) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


@case(KIND, "the folder is a file")
def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"{}")


KIND = "names"


def with_file_named(name: str, *, others: bool) -> Harm:
    """A manifest that lists a file of another name, in the place of one or beside the others."""

    def rename(head: dict[str, Any]) -> None:
        head["files"][name] = head["files"][STATE]
        if not others:
            del head["files"][STATE]

    return with_manifest(rename)


def with_name(name: str, put_in: Callable[[Any, str], object]) -> Harm:
    return with_state(lambda state: put_in(state, name))


def _column(state: Any, name: str) -> None:
    state["callbacks"]["CSVLogger"]["names"].append(name)


def _tag(state: Any, name: str) -> None:
    state["callbacks"]["TensorBoardLogger"]["values"][name] = 1.0


def _in_history(state: Any, name: str) -> None:
    state["history"]["rows"][0][name] = 1.0


def _logged(state: Any, name: str) -> None:
    state["metrics"]["values"][name] = 1.0
    state["metrics"]["marks"][name] = 1


OUTSIDE = ("../model.safetensors", "/etc/passwd", "..", ".", "", "model.safetensors/", "./state.json", "a\x00b")
for name in (*OUTSIDE, "state.json\n", "~/.ssh/id_rsa", "C:\\state.json", "MANIFEST.JSON"):
    add(KIND, f"one more in the manifest: {name!r}", with_file_named(name, others=True))
for name in ("../state.json", "/dev/zero"):
    add(KIND, f"another in the manifest: {name!r}", with_file_named(name, others=False))
for name in ("../../metrics", "/etc/passwd", "=cmd()", "a/../../b", "a\nb", "\x1b[31m", "", "epoch\x00", "a" * 500):
    for what, put_in in {
        "metric": _logged,
        "metric in the history": _in_history,
        "column": _column,
        "tag": _tag,
    }.items():
        add(KIND, f"of a {what}: {name[:20]!r}", with_name(name, put_in))

KIND = "missing and extra files"
SCRIPT = "import os; os.system('touch /tmp/owned')"


def without(name: str, *, listed: bool) -> Harm:
    def harm(folder: Path) -> None:
        seal(folder, lambda head: None if listed else head["files"].pop(name, None))
        (folder / name).unlink()

    return harm


def renamed(name: str, other: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).rename(folder / other)

    return harm


def with_more(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).write_text(SCRIPT)

    return harm


def behind(name: str) -> Harm:
    """One more byte at the end of a file."""

    def harm(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b" ")

    return harm


for name in (MANIFEST, *FILES):
    add(KIND, f"{name} is missing", without(name, listed=True))
    add(KIND, f"{name} is missing there and in the manifest", without(name, listed=False))
    add(KIND, f"{name} in capitals", renamed(name, name.upper()))
for name in (
    "__init__.py",
    "conftest.py",
    "sitecustomize.py",
    "torch.py",
    "data.pkl",
    "model.pt",
    "._state.json",
    ".metadata",
    "model.safetensors.index.json",
    "state.json~",
    "\x1b]0;title\x07",
    "\udcff",
    "a" * 255,
):
    add(KIND, f"one more: {name[:20]!r}", with_more(name))
add(KIND, "a folder", lambda folder: (folder / "__pycache__").mkdir())


@case(KIND, "a checkpoint")
def _nested_checkpoint(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    (folder.parent / "copy").rename(folder / "step-000000001")


@case(KIND, "no file")
def _no_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


add(KIND, "no folder", shutil.rmtree)

KIND = "hashes"


def with_bytes(change: Callable[[bytes], bytes]) -> Harm:
    """A manifest of other bytes, whatever its hash then is."""

    def harm(folder: Path) -> None:
        data = change((folder / MANIFEST).read_bytes())
        assert data != (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).write_bytes(data)

    return harm


def with_digest(change: Callable[[str], object]) -> Harm:
    def put_in(head: dict[str, Any]) -> None:
        head["files"][STATE]["sha256"] = change(head["files"][STATE]["sha256"])

    return with_manifest(put_in)


for label, change in {
    "the manifest's is missing": lambda data: data.split(b"\n")[0] + b"\n",
    "the manifest's is of something else": lambda data: data[:-2] + (b"0" if data[-2:-1] != b"0" else b"1") + b"\n",
    "the manifest's is in capitals": lambda data: data[:-65] + data[-65:].upper(),
    "a byte behind the manifest's": lambda data: data + b" ",
    "a line behind the manifest's": lambda data: data + b"\n",
    "no end to the manifest's line": lambda data: data[:-1],
    "an empty manifest": lambda data: b"",
    "a manifest of one line break": lambda data: b"\n",
    "a manifest of its hash alone": lambda data: sealed(b""),
    "a manifest that is no JSON": lambda data: sealed(b"import os\n"),
    "a manifest of null": lambda data: sealed(b"null\n"),
    "a manifest of a list": lambda data: sealed(b"[]\n"),
    "a manifest of an empty object": lambda data: sealed(b"{}\n"),
}.items():
    add(KIND, label, with_bytes(change))
add(KIND, "a file's is in capitals", with_digest(str.upper))
add(KIND, "a file's is cut off", with_digest(lambda text: text[:-1]))
add(KIND, "a file's is empty", with_digest(lambda text: ""))
add(KIND, "a file's is a number", with_digest(len))
add(KIND, "a file's is null", with_digest(lambda text: None))
add(KIND, "a file's has a name", with_digest(lambda text: f"sha1:{text}"))
add(KIND, "a file's is in a list", with_digest(lambda text: [text]))


@case(KIND, "two files changed places")
def _swapped(folder: Path) -> None:
    (folder / MODEL).rename(folder.parent / "model")
    (folder / TENSORS).rename(folder / MODEL)
    (folder.parent / "model").rename(folder / TENSORS)


add(KIND, "more is said of a file", with_manifest(lambda head: head["files"][STATE].update(url="http://localhost/")))
for name in FILES:
    add(KIND, f"a byte behind {name}", behind(name))

KIND = "what looks like code"


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/owned",)


def _saved() -> bytes:
    """What torch.save writes, pickle and all."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file)
    return file.getvalue()


for name in FILES:
    add(KIND, f"{name} is a pickle", with_file(name, pickle.dumps(Bomb(), protocol=2)))
    add(KIND, f"{name} is torch's", with_file(name, _saved()))
add(KIND, "the manifest is a pickle", with_head(pickle.dumps(Bomb(), protocol=2)))
for label, value in {
    "a target": {"_target_": "os.system", "command": "touch /tmp/owned"},
    "a tag for a type": {"$type": "os.system"},
    "a tag for an object": {"$object": ["os.system", ["touch /tmp/owned"]]},
    "a tag for a call": {"$call": "os.system"},
    "a tag for an import": {"$import": "os"},
    "a tensor with a module's name": {"$tensor": "os.system"},
    "a tensor from a file": {"$tensor": "/etc/passwd"},
    "a type of bits": {"$bits": ["__import__", {"$tensor": "optimizer.state.0.step"}]},
    "a type of bits that is a method": {"$bits": ["load", {"$tensor": "optimizer.state.0.step"}]},
    "two tags": {"$tuple": [], "$dict": []},
    "a tag and a key": {"$tuple": [], "a": 1},
    "py/object": {"py/object": "os.system", "py/reduce": [{"py/function": "os.system"}]},
    "dunders": {"__class__": "os._wrap_close", "__init__": {"__globals__": "system"}, "__reduce__": ["os.system"]},
    "yaml": "!!python/object/apply:os.system ['touch /tmp/owned']",
    "a template": "{{ ''.__class__.__mro__[1].__subclasses__() }} ${jndi:ldap://localhost/a} {0.__class__}",
}.items():
    add(KIND, f"{label}, in the progress", put("progress/step", value))
    add(KIND, f"{label}, in a callback", put("callbacks/EarlyStopping/waited", value))
for label, (path, value) in {
    "a method of the schedule": ("schedule/step", "os.system"),
    "a private method of the schedule": ("schedule/get_lr", None),
    "the schedule's optimizer": ("schedule/optimizer", {}),
    "the schedule's class": ("schedule/__class__", "os"),
    "a setting of the optimizer": ("optimizer/param_groups/0/lr", "os.system"),
    "a callback's key": ("callbacks/EarlyStopping/load_state_dict", "os.system"),
}.items():
    add(KIND, label, put(path, value))

KIND = "complex and sparse"
for label, value in {
    "complex of a scalar": {"$complex": {"$tensor": "optimizer.state.0.step"}},
    "complex of three": {"$complex": {"$tensor": "optimizer.state.0.exp_avg"}},
    "complex of nothing": {"$complex": {"$float": "nan"}},
    "sparse of nothing": {"$sparse": []},
    "sparse with a negative shape": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 2 + [[-1], True]},
    "sparse with a huge shape": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 2 + [[2**62, 2**62], False]},
    "sparse with a shape of text": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 2 + ["ab", False]},
    "sparse with indices that are fractions": {
        "$sparse": [{"$tensor": "optimizer.state.0.exp_avg"}] * 2 + [[4, 3], False]
    },
    "sparse with values of its indices": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 2 + [[9, 9], True]},
    "compressed of nothing": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 3 + [[4, 4], "sparse_csr"]},
    "compressed in an unknown way": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 3 + [[4, 4], "load"]},
    "compressed in a way that is a list": {"$sparse": [{"$tensor": "random.torch_cpu"}] * 3 + [[4, 4], ["a"]]},
    "sparse with no dimensions": {"$sparse": [{"$tensor": "optimizer.state.0.step"}] * 2 + [[], False]},
}.items():
    add(KIND, label, put("callbacks/Counting/names", value))

KIND = "nonsense for the run"
OTHERS: tuple[Any, ...] = (None, True, -1, 1.5, "1", [], {}, {"$tuple": []}, {"$float": "nan"}, 2**70)


def _fields() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Fields of a state, and what none of them can be."""
    for name in ("epoch", "batch", "step", "samples", "skipped"):
        yield f"progress/{name}", OTHERS
    yield "progress", (*OTHERS, {"epoch": 1})
    yield "model", OTHERS
    yield "model/training", (*OTHERS, {"": True}, {"0": 1})
    yield "model/requires_grad", (*OTHERS, {"0.weight": True}, {"0.weight": "yes"})
    yield (
        "model/extra",
        (*OTHERS[:6], {"surplus": 1}, {"0.weight": 1}, {"0.weight": {"$tensor": "optimizer.state.0.exp_avg"}}),
    )
    yield "optimizer", OTHERS
    yield "optimizer/param_groups", (*OTHERS, [{}], [{"params": [0]}], [{"params": "01234567"}])
    yield "optimizer/param_groups/0/params", (*OTHERS, [0, 1, 2, 3, 4, 4], [5, 4, 3, 2, 1, 0], [0, 1, 2], ["0"] * 6)
    for name in ("lr", "betas", "eps", "weight_decay"):
        yield f"optimizer/param_groups/0/{name}", (None, "1", [], {}, [0.9, 0.99, 0.999])
    yield "optimizer/param_groups/0/amsgrad", ("yes", [], {})
    yield (
        "optimizer/state",
        (*OTHERS[:6], {"a": 1}, {"$dict": [[0, 1]]}, {"$dict": [[99, {}]]}, {"$dict": [[0, {"step": 1}]]}),
    )
    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        way = f"optimizer/state/$dict/0/1/{name}"
        yield (
            way,
            (
                None,
                "1",
                [],
                {},
                {"$float": "nan"},
                {"$tensor": "random.torch_cpu"},
                {"$tensor": "optimizer.state.2.exp_avg"},
            ),
        )
    yield "schedule", (*OTHERS[:6], {"last_epoch": 1})
    for name in ("last_epoch", "gamma", "_step_count"):
        yield f"schedule/{name}", (None, "1", [], {})
    for name in ("base_lrs", "_last_lr"):
        yield f"schedule/{name}", (None, 1, "1", [], {}, ["1"], [None], [0.1, 0.1])
    yield "schedule/milestones", (None, 1, "1", [])
    yield "scaler", ({}, {"scale": 1.0}, 1)
    yield "plateau", ({}, {"best": 1.0, "judged": 1}, 1)
    yield "metrics", OTHERS
    for name in ("values", "marks", "mark"):
        yield f"metrics/{name}", (None, True, "1", [], {"a/b": 1, "c/d": "x"}, {"a/b": 1})
    yield "random", OTHERS
    yield (
        "random/python",
        (
            *OTHERS,
            {"$tuple": [3, {"$tuple": [1, 2]}, None]},
            {"$tuple": [2, {"$tuple": [0] * 625}, None]},
            {"$tuple": [3, {"$tuple": [0] * 624 + [9999]}, None]},
            {"$tuple": [3, {"$tuple": [-1] * 625}, None]},
        ),
    )
    for position in (-1, 625, 10**6, 2**40):
        yield "random/numpy", ({"$tuple": ["MT19937", [1] * 624, position, 0, 0.0]},)
    yield (
        "random/numpy",
        (
            *OTHERS,
            {"$tuple": ["PCG64", [1] * 624, 1, 0, 0.0]},
            {"$tuple": ["MT19937", [1] * 5, 1, 0, 0.0]},
            {"$tuple": ["MT19937", [2**40] * 624, 1, 0, 0.0]},
            {"$tuple": ["MT19937", [-1] * 624, 1, 0, 0.0]},
        ),
    )
    yield "random/torch_cpu", (*OTHERS, {"$tensor": "optimizer.state.0.step"}, {"$tensor": "optimizer.state.0.exp_avg"})
    yield "random/torch_cuda", (None, True, 1, "1", {}, [1])
    yield "random/own", (None, True, 1, "1", {}, [1])
    yield "data", OTHERS
    yield "data/at_start", (*OTHERS[1:6], {}, {"python": 1})
    yield (
        "data/place",
        (
            *OTHERS[1:6],
            {},
            {"epoch": 1},
            {"epoch": "1", "batch": 1},
            {"epoch": 1, "batch": 99},
            {"epoch": -1, "batch": 1},
        ),
    )
    yield "averages", OTHERS
    yield (
        "averages/sums",
        (*OTHERS[:6], {"loss": "1"}, {"other": 1.0}, {"loss": {"$tensor": "optimizer.state.0.exp_avg"}}),
    )
    yield "window", (*OTHERS[1:6], {}, {"size": 1})
    yield "window/size", (None, 0, -1, "1", 1.5, [])
    yield "window/entries", (None, 1, "1", [], [1], [{"$tuple": [1, 2]}], [{"$tuple": [{"loss": "1"}, 1.0]}])
    yield "window/total", (None, "1", [], {"$tensor": "optimizer.state.0.exp_avg"})
    yield "gradients", (None, True, 1, "1", [], [None], [{"$tensor": "random.torch_cpu"}] * 6, [1] * 6)
    for name in ("validation_due", "epoch_over", "ended"):
        yield name, (None, 1, "true", [], {})
    yield "history", OTHERS
    yield "history/rows", (None, 1, "1", {}, [1], [{}], [{"epoch": 1}], [{"epoch": "1", "step": 1}], [[]])
    yield (
        "callbacks",
        (*OTHERS[:6], {"EarlyStopping": 1}, {"EarlyStopping": {}}, {"Counting": {}}, {"Counting": {"seen": "1"}}),
    )
    yield "callbacks/EarlyStopping/monitor", (*OTHERS, {"best": "1", "judged": 1}, {"best": 1.0})
    yield "callbacks/EarlyStopping/waited", OTHERS
    yield "callbacks/EarlyStopping/best_epoch", OTHERS[1:]
    yield (
        "callbacks/EarlyStopping/best_weights",
        (True, 1, "1", [], {"a": 1}, {"0.weight": {"$tensor": "optimizer.state.0.exp_avg"}}),
    )
    yield "callbacks/CSVLogger/rows", OTHERS
    yield "callbacks/CSVLogger/names", (*OTHERS[:5], {}, [1], ["a", None])
    yield "callbacks/CSVLogger/values", (*OTHERS[:6], {"a": "=1"}, {"a": None})
    yield "callbacks/CSVLogger/written", OTHERS
    yield "callbacks/TensorBoardLogger/step", OTHERS
    yield "callbacks/TensorBoardLogger/shown", (*OTHERS[:5], {}, [1])
    yield "callbacks/Counting/names", (None, 1, [1], 1.5)
    yield "callbacks/Counting/seen", (None, "1", [])


for path, others in _fields():
    for value in others:
        label = f"{path} is {json.dumps(value)[:60]}"
        if label not in CASES.get(KIND, {}):
            add(KIND, label, put(path, value))
for path in (
    "model",
    "optimizer",
    "schedule",
    "progress",
    "random",
    "data",
    "window",
    "gradients",
    "history",
    "callbacks",
    "progress/step",
    "model/training",
    "optimizer/param_groups",
    "optimizer/param_groups/0/lr",
    "random/numpy",
    "schedule/last_epoch",
    "callbacks/EarlyStopping/waited",
    "window/entries",
    "metrics/mark",
):
    add(KIND, f"{path} is missing", drop(path))
add(KIND, "something more", put("surplus", 1))
add(KIND, "the whole state is null", with_file(STATE, b"null"))
add(KIND, "the whole state is a list", with_file(STATE, b"[]"))
add(KIND, "the whole state is empty", with_file(STATE, b"{}"))


def _weights(tensors: dict[str, torch.Tensor]) -> Harm:
    import safetensors.torch

    def harm(folder: Path) -> None:
        own = safetensors.torch.load((folder / MODEL).read_bytes())
        for name, tensor in tensors.items():
            if tensor.numel():
                own[name] = tensor
            else:
                del own[name]
        (folder / MODEL).write_bytes(safetensors.torch.save(own))
        seal(folder)

    return harm


for label, tensors in {
    "weights of another shape": {"0.weight": torch.zeros(4, 4)},
    "weights of another type": {"0.weight": torch.zeros(4, 3, dtype=torch.float64)},
    "weights of whole numbers": {"0.weight": torch.zeros(4, 3, dtype=torch.int32)},
    "weights of another name": {"../0.weight": torch.zeros(4, 3)},
    "weights missing": {"0.weight": torch.empty(0)},
    "one weight in the place of twelve": {"0.weight": torch.zeros(())},
    "twelve in a row": {"0.weight": torch.zeros(12)},
}.items():
    add(KIND, label, _weights(tensors))


def build(good: Path, folder: Path, kind: str, name: str) -> Path:
    """Make one of the corpus below a folder; its path."""
    number = sum(1 for _ in folder.iterdir()) if folder.exists() else 0
    path = folder / f"{number:04}" / "step-000000003"
    path.parent.mkdir(parents=True)
    shutil.copytree(good, path)
    CASES[kind][name](path)
    return path
