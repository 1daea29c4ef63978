"""What the checks judge by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loopwright.checks.recorder import LossCall
from loopwright.checks.rehearsal import Rehearsed, Subject
from loopwright.checks.sampling import Sample

NOT_RUN = "no training step was made"
UNFINISHED = "the step did not come to its end"
ROWS = 8  # fewer samples say nothing of means and spreads
ROWS_FOR_SPREAD = 32
OFFSET = 10.0  # of a mean, in standard deviations


@dataclass
class Seen:
    """All that the checks judge by."""

    subject: Subject
    train_data: object
    val_data: object
    sample: Sample
    val_sample: Sample | None
    first: Rehearsed | None = None
    second: Rehearsed | None = None
    redrawn: Rehearsed | None = None  # with other random numbers, where parameters were not reached
    probed: Rehearsed | None = None  # on random inputs, where they were still not reached
    validated: Rehearsed | None = None
    why_no_copy: str = ""


def calls_of(seen: Seen, *, first_batch: bool = False) -> list[LossCall]:
    """The losses called on the training batches, or, as the weights are still the first ones, on the first alone."""
    if seen.first is None:
        return []
    calls = seen.first.record.calls
    return calls[: seen.first.calls_of_first] if first_batch else calls


def why_unseen(seen: Seen) -> str:
    """Why what a step would have shown may not have been seen; empty where all steps came to their end."""
    if seen.first is None:
        return NOT_RUN
    return UNFINISHED if seen.first.error is not None else ""


def plain_name(name: str) -> str:
    """A parameter's name without the prefix of a compiled model."""
    return name.removeprefix("_orig_mod.")


def rms(values: Tensor) -> float:
    """The root mean square."""
    return float(values.square().mean().sqrt())


def counted(number: int, what: str) -> str:
    """``"1 batch"``, ``"3 batches"``."""
    plural = {"batch": "batches"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
