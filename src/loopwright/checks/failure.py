"""What is told of an error that a rehearsed step, or a loader, has raised."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopwright.checks.rehearsal import Rehearsed
from loopwright.checks.seen import listed
from loopwright.errors import LoopwrightError
from loopwright.mismatch import CASTS, OF_TYPES, likely_cause, short
from loopwright.nonfinite.census import tensors_in
from loopwright.preflight import Check


def failed_by(name: str, error: Exception, cause: str, fix: str) -> Check:
    """The row of an error; what an error of loopwright's own says of cause and fix stands before the words given."""
    if isinstance(error, LoopwrightError):
        cause, fix = error.why or cause, error.fix or fix
    return Check(name, "failed", in_words(error), cause, fix)


def failed_step(name: str, run: Rehearsed, batch: Any, model: nn.Module, cause: str, fix: str) -> Check:
    """The row of an error that a step on the batch has raised.

    Args:
        name: Of the check.
        run: What came of the step.
        batch: The batch that it was made on.
        model: Whose parameters it used.
        cause: What is said where the error does not tell.
        fix: The same, of what to do.
    """
    assert run.error is not None
    if (found := likely_cause(run.error) or _mixed_types(run, model)) is not None:
        cause, fix = found
    row = failed_by(name, run.error, cause, fix)
    tensors = [f"{path} {tuple(t.shape)} {short(t.dtype)}" for path, t in tensors_in(batch, "batch")]
    evidence = f"{row.evidence}; {listed(tensors)}" if tensors else row.evidence
    return Check(name, "failed", evidence, row.cause, row.fix)


def _mixed_types(run: Rehearsed, model: nn.Module) -> tuple[str, str] | None:
    """Cause and fix, where torch speaks of types and the inputs or the targets have another than the parameters."""
    if isinstance(run.error, LoopwrightError) or not OF_TYPES.search(str(run.error)):
        return None
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(types) != 1:
        return None
    (own,) = types
    calls = run.record.calls[-1:]
    for what, tensors in (("inputs", run.record.given), ("targets", [call.target for call in calls])):
        others = {t.dtype for t in tensors if t.is_floating_point()} - {own}
        if others and own in CASTS:
            numpy = ", as numpy's arrays are unless told otherwise" if others == {torch.float64} else ""
            kinds = listed(sorted(map(short, others)))
            return f"the {what} are {kinds}{numpy}; the parameters are {short(own)}", (
                f"{what}.{CASTS[own]} in the dataset"
            )
    return None


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
