"""The checks of a preflight: what was seen in a few rehearsed steps, judged."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from loopwright.checks.failure import in_words
from loopwright.checks.of_data import batch_norm, inputs, labels, separate_data, shuffled_classes, validation_runs
from loopwright.checks.of_loss import loss_at_start, loss_input, loss_is_finite, reduction, shapes
from loopwright.checks.of_training import (
    deterministic_steps,
    optimizer_holds,
    outputs_differ,
    parameters_reached,
    reached_alike,
    step_runs,
)
from loopwright.checks.probing import probe
from loopwright.checks.rehearsal import AsFound, Subject, duplicate, evaluate, in_place, names_of, train
from loopwright.checks.sampling import sample_of
from loopwright.checks.seen import Seen
from loopwright.planning import check_loader
from loopwright.preflight import Check, Preflight
from loopwright.randomness import deterministic_kernels, generators_of
from loopwright.schedule import check_count

CHECKS: dict[str, Callable[[Seen], Check]] = {
    "a training step runs": step_runs,
    "loss is finite": loss_is_finite,
    "shapes of prediction and target": shapes,
    "what the loss is given": loss_input,
    "reduction of the loss": reduction,
    "labels and indices": labels,
    "loss at the start": loss_at_start,
    "parameters get a gradient": parameters_reached,
    "parameters in the optimizer": optimizer_holds,
    "batch norm and batch sizes": batch_norm,
    "inputs are normalised": inputs,
    "outputs depend on the inputs": outputs_differ,
    "two runs give the same bits": deterministic_steps,
    "a validation step runs": validation_runs,
    "training and validation apart": separate_data,
    "order of the classes": shuffled_classes,
}


def preflight(
    subject: Subject, train_data: Iterable[Any], val_data: Iterable[Any] | None, *, steps: int, deterministic: bool
) -> Preflight:
    """Rehearse a few steps, put everything back, and judge what was seen."""
    check_loader("train", train_data)
    if val_data is not None:
        check_loader("val", val_data)
    check_count("steps", steps)
    own = {id(g): g for data in (train_data, val_data) for g in generators_of(data)}
    kernels = deterministic_kernels() if deterministic else contextlib.nullcontext()
    with kernels, AsFound(subject, own.values()) as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fit will give them, in their place
        sample = sample_of(train_data, steps)
        val_sample = None if val_data is None else sample_of(val_data, 1)
        seen = Seen(subject, train_data, val_data, sample, val_sample)
        _rehearse(seen, found)
    return Preflight(tuple(_judged(name, check, seen) for name, check in CHECKS.items()))


def _judged(name: str, check: Callable[[Seen], Check], seen: Seen) -> Check:
    """What a check says; an error of its own says nothing of the training, and stands in its row."""
    try:
        return check(seen)
    except Exception as error:
        return Check(name, "not applicable", f"the check itself ended with {in_words(error)}")


def _rehearse(seen: Seen, found: AsFound) -> None:
    subject, batches = seen.subject, seen.sample.batches
    val_batch = seen.val_sample.batches[:1] if seen.val_sample is not None else ()
    twin = _copy(seen)
    if val_batch:
        found.rewind()
        parts = twin or in_place(subject)
        seen.validated = evaluate(parts, val_batch[0], names_of(parts.model, subject.model))
        twin = _copy(seen) if twin is not None else None  # the evaluation may have changed its buffers
    if not batches:
        return
    found.rewind()
    if twin is None:
        parts = in_place(subject)
        seen.first = train(parts, batches, names_of(parts.model), update=False)
        if seen.first.error is None and reached_alike(seen):
            seen.redrawn = train(parts, batches, names_of(parts.model), update=False)
            if reached_alike(seen):
                seen.probed = probe(parts, batches, names_of(parts.model))
        return
    seen.first = train(twin, batches, names_of(twin.model, subject.model))
    if seen.first.error is not None:
        return
    del twin  # before there is another
    if (again := _copy(seen)) is not None:
        found.rewind()
        seen.second = train(again, batches, names_of(again.model, subject.model))
    del again
    if reached_alike(seen) and (other := _copy(seen)) is not None:  # the generators have moved on
        seen.redrawn = train(other, batches, names_of(other.model, subject.model))
        if reached_alike(seen):
            seen.probed = probe(other, batches, names_of(other.model, subject.model))


def _copy(seen: Seen) -> Subject | None:
    try:
        return duplicate(seen.subject)
    except Exception as error:  # whatever a part of the model raises: then there is none
        seen.why_no_copy = f"model, optimizer and loss cannot be copied: {in_words(error)}"
        return None
