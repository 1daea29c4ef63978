"""The command line: ``python -m loopwright``.

Exit codes: 0, all is well; 1, what was asked about is not in order; 2, the command was not understood; 130, it was
interrupted (Ctrl-C); 143, it was terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor

from loopwright.checkpoint import MANIFEST, MODEL, Contents, list_checkpoints, read_checkpoint
from loopwright.doctor import as_text, examine
from loopwright.errors import CheckpointError, LoopwrightError, advise
from loopwright.explain_command import MisnamedError, check_writable, find_trainer, write
from loopwright.plain import encode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m loopwright", description="Tools around loopwright.")
    commands = parser.add_subparsers(title="commands", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, extras, folders and a short fit, to be pasted into an issue",
        description="Shows what a report of a bug needs: versions, devices, extras, folders, threads, and the rate of "
        "a fit of two seconds. Exit codes: 0, all is well; 1, something is wrong; 2, wrong usage.",
    )
    doctor.add_argument("--json", action="store_true", help="as one JSON object")
    doctor.set_defaults(run=_doctor)
    inspect = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, every byte verified, nothing of it run",
        description="Shows what is in a checkpoint, or in each checkpoint of a folder. Every byte is verified, and "
        "nothing of it is run. Exit codes: 0, all of them are whole; 1, one is not, or there is none; 2, wrong usage.",
    )
    inspect.add_argument("path", type=Path, help="a checkpoint's folder, or the folder that holds checkpoints")
    inspect.add_argument("--json", action="store_true", help="as JSON, one object for each checkpoint")
    inspect.set_defaults(run=_inspect)
    explain = commands.add_parser(
        "explain",
        help="the plain PyTorch loop that a Trainer is, as source text",
        description="Writes the plain PyTorch loop that a Trainer is. The module is imported, and so run. Exit codes: "
        "0, it is written; 1, the module or the function raised an error, or the file is not to be overwritten; "
        "2, wrong usage: what was named is not there, or is no Trainer.",
    )
    explain.add_argument("object", metavar="MODULE:OBJECT", help="a Trainer, or a function that returns one")
    explain.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it to a file and not to the screen")
    explain.add_argument("--callbacks", action="store_true", help="also show where the callbacks' hooks run")
    explain.set_defaults(run=_explain)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def _doctor(options: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report) if options.json else "\n".join(map(_safe, as_text(report).split("\n"))))
    return 1 if report["problems"] else 0


def _inspect(options: argparse.Namespace) -> int:
    code = 0
    for path in _named(options.path):
        try:
            found = _summary(path, read_checkpoint(path))
        except CheckpointError as error:
            code = 1
            advise(error, "an older checkpoint of the run, or a copy of this one from a backup")
            if options.json:
                print(json.dumps({"path": str(path), "whole": False, "error": str(error)}))
            else:
                print(_lines(error), file=sys.stderr)
            continue
        print(json.dumps(found | {"facts": encode(found["facts"])[0]}) if options.json else _as_text(found))
    return code


def _explain(options: argparse.Namespace) -> int:
    try:
        if options.output is not None:
            check_writable(options.output)  # before the module runs, which may take its time
        text = find_trainer(options.object).explain(callbacks=options.callbacks)
        if options.output is None:
            print(text, end="")
        else:
            write(options.output, text)
            print(f"{_safe(options.output)}: the loop of {_safe(options.object)}", file=sys.stderr)
    except MisnamedError as error:
        print(_lines(error), file=sys.stderr)
        return 2
    except LoopwrightError as error:
        print(_lines(error), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{_safe(error.filename)}: {_safe(error.strerror)}", file=sys.stderr)
        return 1
    return 0


def _lines(error: Exception) -> str:
    return "\n".join(map(_safe, str(error).split("\n")))


def _named(path: Path) -> list[Path]:
    """The checkpoints meant: the one at ``path``, or those in that folder."""
    if os.path.lexists(path / MANIFEST):
        return [path]
    try:
        return list_checkpoints(path) or [path]
    except OSError:  # reading it as a checkpoint will say what is wrong
        return [path]


def _summary(path: Path, contents: Contents) -> dict[str, Any]:
    state = contents.state if isinstance(contents.state, dict) else {}
    tensors = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in sorted(contents.weights.items())
    }
    callbacks = state.get("callbacks")
    return {
        "path": str(path),
        "whole": True,
        "facts": contents.facts,
        "parameters": sum(tensor.numel() for tensor in contents.weights.values()),
        "weights": tensors,
        "callbacks": sorted(map(str, callbacks)) if isinstance(callbacks, dict) else [],
        "state tensors": _count(state),
    }


def _count(value: object) -> int:
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, (list, tuple)) else 0


def _as_text(found: dict[str, Any]) -> str:
    lines = [f"{_safe(found['path'])}: whole"]
    lines += [f"  {_safe(name)}: {_safe(value)}" for name, value in found["facts"].items() if value is not None]
    lines.append(f"  callbacks: {_safe(', '.join(found['callbacks']) or 'none')}")
    lines.append(f"  tensors beside the weights: {found['state tensors']}")
    lines.append(f"  {MODEL}: {found['parameters']:,} numbers, tensors: {len(found['weights'])}")
    for name, tensor in found["weights"].items():
        lines.append(f"    {_safe(name)}  {tensor['dtype']}  {tuple(tensor['shape'])}")
    return "\n".join(lines)


def _safe(text: object) -> str:
    """The text without what a terminal would obey: names in a checkpoint are anybody's."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _from_a_shell() -> int:
    """Run the command of this process, and let a signal end it with the code that a shell would give."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(_from_a_shell())
