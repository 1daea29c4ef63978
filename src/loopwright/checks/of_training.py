"""The checks that judge the step: it runs, reaches every parameter, uses its input, and repeats."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loopwright.callback import TWICE, WHY_TWICE
from loopwright.checks.failure import failed_by, failed_step
from loopwright.checks.rehearsal import Rehearsed
from loopwright.checks.seen import Seen, counted, listed, plain_name, why_unseen
from loopwright.preflight import Check
from loopwright.settings import modules_of


def step_runs(seen: Seen) -> Check:
    """Forward, loss and backward on each batch."""
    name, sample, first = "a training step runs", seen.sample, seen.first
    if sample.error is not None:
        return failed_by(name, sample.error, "the loader raised it", "mend the dataset or its loader")
    if sample.why_none:
        return Check(name, "not applicable", sample.why_none)
    if first is None:
        return Check(name, "failed", "the training data gave no batch", fix="check the dataset and how it is filtered")
    if first.error is not None and TWICE in str(first.error):
        fix = "leave backward out of the step, and return the loss; detach() what is kept from one batch to the next"
        return failed_by(name, first.error, WHY_TWICE, fix)
    if first.error is not None:
        return failed_step(name, first, sample.batches[first.steps], "", "mend it; fit would end with the same error")
    return Check(name, "passed", f"{counted(len(sample.batches), 'batch')}: forward, loss and backward")


def parameters_reached(seen: Seen) -> Check:
    """Every trainable parameter gets a gradient, and one is other than zero."""
    name, first = "parameters get a gradient", seen.first
    if first is None or first.error is not None:
        return Check(name, "not applicable", why_unseen(seen))
    trainable, missing = _trainable(seen), _missing(seen)
    batches = counted(len(first.losses), "batch")
    if missing and _reached_vary(seen):
        what = f"{len(missing)} of {len(trainable)} got none in {batches}: {listed(missing)}"
        why = "which ones get a gradient differs from batch to batch, or with the random numbers"
        if seen.probed is not None:
            why = "with other inputs others get one"
        return Check(name, "not applicable", f"{what}; but {why}, so that others may reach them")
    if missing:
        return Check(
            name,
            "failed",
            f"{len(missing)} of {len(trainable)} got none in {batches}: {listed(missing)}",
            "the loss does not depend on them: a layer that forward does not call, or a detach() on the way",
            "call the layer in forward, or requires_grad_(False) where it is to stay as it is",
        )
    if first.doubled:
        return Check(
            name,
            "failed",
            f"there were gradients when the step returned, and backward added the same again, in {batches}",
            "the step calls backward, and so does the trainer: gradients and updates are twice as large",
            "leave backward out of the step, and return the loss",
        )
    if not first.nonzero:
        return Check(
            name,
            "failed",
            f"every gradient is exactly 0 in {batches}",
            "the loss does not change with any weight: outputs cut off by a last ReLU or a clamp, or a loss of 0",
            "look at the end of the model and at the loss",
        )
    return Check(name, "passed", f"all {len(trainable)} in {batches}")


def _trainable(seen: Seen) -> list[str]:
    return [plain_name(n) for n, p in seen.subject.model.named_parameters() if p.requires_grad]


def _missing(seen: Seen) -> list[str]:
    reached = set() if seen.first is None else seen.first.reached
    return [parameter for parameter in _trainable(seen) if parameter not in reached]


def reached_alike(seen: Seen) -> bool:
    """Whether some parameters were never reached, the same ones in all backward passes."""
    return bool(_missing(seen)) and not _reached_vary(seen)


def _reached_vary(seen: Seen) -> bool:
    """Whether backward passes have reached different parameters, as where experts are chosen or layers dropped."""
    runs = [run for run in (seen.first, seen.second, seen.redrawn, seen.probed) if run is not None]
    return len({reached for run in runs for reached in run.reached_each}) > 1


def optimizer_holds(seen: Seen) -> Check:
    """The optimizer holds every trainable parameter, each once, and no others without use."""
    name, model, optimizer = "parameters in the optimizer", seen.subject.model, seen.subject.optimizer
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids, kind = {id(p) for p in held}, type(optimizer).__name__
    missing = [plain_name(n) for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if missing:
        return Check(
            name,
            "failed",
            f"{kind} does not hold {len(missing)} that are trainable: {listed(missing)}",
            "no step will change them: the optimizer was made before them, or of another part of the model",
            f"make the optimizer when the model is complete, {kind}(model.parameters(), ...); "
            "or requires_grad_(False) where they are to stay as they are",
        )
    of_model = {id(p) for p in model.parameters()}
    losses = modules_of(seen.subject.loss)  # what belongs to a step may be trained by the step itself
    others = [(m, n, p) for m in losses for n, p in m.named_parameters() if id(p) not in of_model | ids]
    if unheld := [f"{n} of {type(m).__name__}" for m, n, p in others if p.requires_grad]:
        return Check(
            name,
            "failed",
            f"{kind} does not hold {len(unheld)} that are trainable: {listed(unheld)}",
            "no step will change them: they are the loss's, and not the model's",
            f"{kind}([*model.parameters(), *loss.parameters()], ...); or "
            "requires_grad_(False) where they are to stay as they are",
        )
    if len(ids) < len(held):
        return Check(
            name,
            "failed",
            f"{len(held) - len(ids)} are in {kind} twice",
            "each step changes them twice",
            "name each parameter once",
        )
    known = {id(p) for module in (model, *seen.subject.modules) for p in module.parameters()}
    outside = sum(id(p) not in known for p in held)
    if outside and seen.first is not None and seen.first.error is None and not all(seen.first.orphans):
        return Check(
            name,
            "failed",
            f"{kind} holds {seen.first.orphans.count(False)} that are not the model's and got no gradient",
            "they are left over from a layer that was replaced, or from another model",
            f"make the optimizer when the model is complete, {kind}(model.parameters(), ...)",
        )
    trainable = sum(p.requires_grad for p in model.parameters())
    return Check(name, "passed", f"all {trainable} trainable parameters, each once")


def outputs_differ(seen: Seen) -> Check:
    """Unlike samples get unlike predictions."""
    name, first = "outputs depend on the inputs", seen.first
    if first is None or first.error is not None or seen.second is None:
        return Check(name, "not applicable", why_unseen(seen) or "no optimizer step was made")
    predictions = [c.input for c in first.record.calls] or first.predictions
    predictions = [p for p in predictions if p.ndim and p.size(0) > 1]
    given = _given_with_each(first.record.given, {p.size(0) for p in predictions})
    if not predictions or not any(_rows_differ(tensor) for tensor in given):
        return Check(name, "not applicable", "no predictions for samples that differ were seen")
    if len(first.losses) < 2 or not first.moved:
        return Check(name, "not applicable", "the weights did not move, and may be all 0 at the start")
    if any(_rows_differ(tensor) for tensor in predictions):
        return Check(name, "passed", "predictions differ between samples")
    return Check(
        name,
        "failed",
        f"in {counted(len(first.losses), 'batch')} all samples got the same prediction, before a step and after",
        "forward does not use its input, or nothing of it gets through: dead units, a saturated activation",
        "look at how the output comes from the input",
    )


def _given_with_each(given: Iterable[Tensor], predicted: set[int]) -> list[Tensor]:
    """What the model was given of several samples: floating tensors, and whole numbers with a row to a prediction.

    Others of whole numbers may be positions or edges. A model of sequences may predict for each place in one.
    """
    rows = [tensor for tensor in given if tensor.ndim and tensor.size(0) > 1]
    return [t for t in rows if t.is_floating_point() or t.size(0) in predicted or t.numel() in predicted]


def _rows_differ(tensor: Tensor) -> bool:
    if tensor.is_nested:
        first, *others = (torch.unique(part) for part in tensor.unbind())  # that one is longer says nothing
        return not all(torch.equal(first, other) for other in others)
    return bool((tensor != tensor[:1]).any())


def deterministic_steps(seen: Seen) -> Check:
    """Two rehearsals from the same state come to the same bits."""
    name, first, second = "two runs give the same bits", seen.first, seen.second
    if seen.why_no_copy:
        return Check(name, "not applicable", seen.why_no_copy)
    if first is None or second is None:
        return Check(name, "not applicable", why_unseen(seen))
    steps = counted(len(first.losses), "step")
    if first.record.marks == second.record.marks:
        return Check(name, "passed", f"{steps}, {len(first.record.marks)} values compared: outputs, gradients, weights")
    step, what = _first_difference(first, second)
    return Check(
        name,
        "failed",
        f"step {step}: {what} differs first",
        "it draws from a generator of its own, keeps a state outside of the model, or runs on a kernel without a fixed "
        "order",
        "draw from torch's generator, keep states in buffers; for kernels Trainer(deterministic=True)",
    )


def _first_difference(first: Rehearsed, second: Rehearsed) -> tuple[int, str]:
    """The number of the step, and what in it."""
    step, left, right = 1, first.record.marks, second.record.marks
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return step, one[0] if one[0] == other[0] else f"{one[0]}, where the other run has {other[0]},"
        after = left[number + 1][0] if number + 1 < len(left) else ""
        step += one[0].startswith("the new value") and not after.startswith("the new value")
    return step, "the number of values"
