"""What is told of an error that a rehearsed step, or a loader, has raised."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch

from loopwright.checks.rehearsal import Rehearsed
from loopwright.checks.seen import listed
from loopwright.errors import LoopwrightError
from loopwright.metric_calls import RAISED
from loopwright.mismatch import likely_cause, unlike_types
from loopwright.mismatch.layers import shape_of, short
from loopwright.nonfinite.census import tensors_in
from loopwright.preflight import Check


def failed_by(name: str, error: Exception, cause: str, fix: str) -> Check:
    """The row of an error; what an error of loopwright's own says of cause and fix stands before the words given."""
    if isinstance(error, LoopwrightError):
        cause, fix = error.why or cause, error.fix or fix
    return Check(name, "failed", in_words(error), cause, fix)


def failed_step(name: str, run: Rehearsed, batch: Any, cause: str, fix: str) -> Check:
    """The row of an error that a step on the batch has raised.

    Args:
        name: Of the check.
        run: What came of the step.
        batch: The batch that it was made on.
        cause: What is said where the error does not tell.
        fix: The same, of what to do.
    """
    assert run.error is not None
    if (found := likely_cause(run.error) or _unlike_types(run)) is not None:
        cause, fix = found
    elif said := [note for note in getattr(run.error, "__notes__", ()) if note.startswith(RAISED)]:
        cause = said[0]
    row = failed_by(name, run.error, cause, fix)
    tensors = [f"{path} {shape_of(t)} {short(t.dtype)}" for path, t in tensors_in(batch, "batch")]
    evidence = f"{row.evidence}; {listed(tensors)}" if tensors else row.evidence
    return Check(name, "failed", evidence, row.cause, row.fix)


def _unlike_types(run: Rehearsed) -> tuple[str, str] | None:
    """Cause and fix, where the last loss that was called has compared two types, and cannot go back from that."""
    assert run.error is not None
    return next((unlike_types(run.error, call.input, call.target) for call in run.record.calls[-1:]), None)


def in_words(error: BaseException) -> str:
    """An error's text, with the last line of the user's own code that led to it, where there is one."""
    if isinstance(error, LoopwrightError):
        words = " ".join(error.what.split())
    else:
        text = " ".join(str(error).split()) or "no message"
        words = f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
    paths = sysconfig.get_paths()
    installed = tuple(paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), *installed, "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries):
            return f"{words} ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: {frame.line})"
    return words
