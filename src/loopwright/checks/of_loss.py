"""The checks that judge the loss: finite, of the right shapes and inputs, and no larger than guessing."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F  # noqa: N812  # its name everywhere
from torch.nn.modules.loss import _Loss

from loopwright.checks.recorder import BINARY, BY_CLASS, ELEMENTWISE, LossCall
from loopwright.checks.sampling import is_shuffled
from loopwright.checks.seen import NOT_RUN, OFFSET, ROWS, ROWS_FOR_SPREAD, Seen, calls_of, rms, why_unseen
from loopwright.errors import ConfigError, ShapeMismatchError
from loopwright.mismatch.losses import for_one_class
from loopwright.mismatch.one_class import ONE_CLASS
from loopwright.preflight import Check
from loopwright.settings import sum_over_window

GUESSES, MARGIN = 2.0, 2.0  # a loss of classes is too high above 2 log(C) + 2; guessing gives log(C)
ERROR = 10.0  # of a first prediction, in units of what predicting zero is off by


def loss_is_finite(seen: Seen) -> Check:
    """Every loss is a finite number."""
    name, first = "loss is finite", seen.first
    if first is None or not first.losses:
        return Check(name, "not applicable", why_unseen(seen) or NOT_RUN)
    bad = next((n for n, loss in enumerate(first.losses) if not math.isfinite(loss)), None)
    if bad is None:
        return Check(name, "passed", "losses " + ", ".join(f"{loss:.4g}" for loss in first.losses[:5]))
    evidence = f"the loss of batch {bad + 1} is {first.losses[bad]}"
    given = [tensor for tensor in first.record.given if tensor.is_floating_point()]
    wrong = sum(int((~torch.isfinite(tensor)).sum()) for tensor in given)
    if wrong:
        count = sum(tensor.numel() for tensor in given)
        return Check(
            name, "failed", evidence, f"{wrong} of {count} input values are not finite", "clean or fill in the data"
        )
    cause = "values in the model or the loss overflow" if bad == 0 else "the steps before have made it so"
    fix = "look for log(0), a division by 0, or exp of large numbers" if bad == 0 else "a smaller learning rate"
    return Check(name, "failed", evidence, cause, fix)


def shapes(seen: Seen) -> Check:
    """No loss is computed of shapes that broadcast."""
    name, first = "shapes of prediction and target", seen.first
    if first is None:
        return Check(name, "not applicable", why_unseen(seen))
    if isinstance(first.error, ShapeMismatchError):
        return Check(name, "failed", first.error.what, first.error.why, first.error.fix)
    if first.record.broadcasts:
        return Check(
            name,
            "failed",
            first.record.broadcasts[0],
            "every prediction is compared with every target, so that the model learns their mean",
            "one shape for both: targets.unsqueeze(-1) or predictions.squeeze(-1)",
        )
    calls = [call for call in first.record.calls if call.name in ELEMENTWISE.values()]
    if calls:
        call = calls[0]
        return Check(
            name,
            "passed",
            f"{call.name} of a prediction {tuple(call.input.shape)} and a target of the same shape"
            if call.input.shape == call.target.shape
            else f"{call.name} of {tuple(call.input.shape)} and {tuple(call.target.shape)}",
        )
    return Check(name, "not applicable", why_unseen(seen) or "no loss that compares element by element was called")


def loss_input(seen: Seen) -> Check:
    """The loss function gets what it expects: logits, log-probabilities or probabilities."""
    name = "what the loss is given"
    error = None if seen.first is None else seen.first.error
    if isinstance(error, ConfigError) and error.what.startswith(ONE_CLASS):
        return Check(name, "failed", error.what, error.why, error.fix)
    calls = [c for c in calls_of(seen) if c.name in BY_CLASS.values() or c.name in BINARY.values()]
    if not calls:
        return Check(name, "not applicable", why_unseen(seen) or "no loss of classes was called")
    for call in calls:
        if (wrong := _wrong_input(call)) is not None:
            return Check(name, "failed", *wrong)
    expected = {"nll_loss": "log-probabilities", "binary_cross_entropy": "probabilities"}
    return Check(name, "passed", f"{calls[0].name} gets {expected.get(calls[0].name, 'logits')}")


def _wrong_input(call: LossCall) -> tuple[str, str, str] | None:
    """Evidence, cause and fix, where an input is certain to be of the wrong kind."""
    twice = {"cross_entropy": {"Softmax": "softmax"}, "binary_cross_entropy_with_logits": {"Sigmoid": "sigmoid"}}
    if (applied := twice.get(call.name, {}).get(call.made_by)) is not None:
        return (
            f"the input of {call.name} comes out of {applied}",
            f"{call.name} applies {applied} itself; applied twice, it flattens the gradients",
            f"take {applied} out of the model, and apply it to predictions where they are used",
        )
    if call.name == "nll_loss" and call.input.numel() and float(call.input.max()) > 1e-4:
        return (
            f"the input of nll_loss is as large as {float(call.input.max()):.4g}",
            "nll_loss expects log-probabilities, which are never above 0, and falls without end otherwise",
            "log_softmax(dim=1) at the end of the model, or cross_entropy in place of nll_loss",
        )
    if call.name == "cross_entropy" and call.input.shape[1 if call.input.ndim > 1 else 0] == 1:
        return (
            "cross_entropy is given one class",
            "with one logit its loss is always 0, and its gradient too",
            for_one_class(call.input, call.target) or "two logits, or binary_cross_entropy_with_logits",
        )
    return None


def reduction(seen: Seen) -> Check:
    """The loss is one number. Of a sum over a window is told what ``fit`` warns of, and trains."""
    name, loss, accumulate = "reduction of the loss", seen.subject.loss, seen.subject.accumulate
    kind, error = getattr(loss, "reduction", None), None if seen.first is None else seen.first.error
    if kind == "none" and isinstance(loss, _Loss) and isinstance(error, ConfigError):
        return Check(
            name,
            "failed",
            f"{type(loss).__name__} has reduction='none', and gives no single number",
            "it gives the loss of each element, and backward starts from one number",
            f'{type(loss).__name__}(reduction="mean")',
        )
    if kind not in ("mean", "sum"):
        return Check(name, "not applicable", "a step, or a function that does not tell, computes the loss")
    if kind == "mean":
        return Check(name, "passed", "it is a mean over the batch")
    if accumulate == 1:
        return Check(name, "passed", "it is a sum: train/loss, and the size of a step, grow with the batch's size")
    return Check(name, "passed", sum_over_window(loss, accumulate))


def loss_at_start(seen: Seen) -> Check:
    """The loss is not far above what a model that knows nothing would come to."""
    name, calls = "loss at the start", calls_of(seen, first_batch=True)
    kinds = {call.name for call in calls}
    if not kinds:
        why = why_unseen(seen) or "no loss function of torch's was called that says what to expect"
        return Check(name, "not applicable", why)
    if len(kinds) != 1:
        return Check(name, "not applicable", f"several losses are called: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind in BY_CLASS.values():
        return _classes_at_start(name, kind, calls)
    if kind in BINARY.values():
        return _binary_at_start(name, kind, calls)
    return _errors_at_start(name, seen)


def _binary_at_start(name: str, kind: str, calls: list[LossCall]) -> Check:
    logits = kind == "binary_cross_entropy_with_logits"
    function = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
    if any(c.input.shape != c.target.shape for c in calls):
        return Check(name, "not applicable", f"{kind} is given outputs and targets of unlike shapes")
    if not logits and not all(bool(((c.input >= 0) & (c.input <= 1)).all()) for c in calls):
        return Check(name, "not applicable", f"{kind} is given numbers that are no probabilities")
    values = [float(function(c.input.double(), c.target.double())) for c in calls]
    return _against_guessing(name, kind, sum(values) / len(values), 2)


def _classes_at_start(name: str, kind: str, calls: list[LossCall]) -> Check:
    values: list[float] = []
    for call in calls:
        function = F.nll_loss if kind == "nll_loss" else F.cross_entropy
        targets = call.target.double() if call.target.is_floating_point() else call.target
        values.append(float(function(call.input.double(), targets, ignore_index=call.ignore_index)))
    values = [value for value in values if math.isfinite(value)]
    classes = {call.input.shape[1 if call.input.ndim > 1 else 0] for call in calls}
    if not values or len(classes) != 1 or max(classes) < 2:
        return Check(name, "not applicable", "the losses do not agree on a number of classes, or are not finite")
    return _against_guessing(name, kind, sum(values) / len(values), classes.pop())


def _against_guessing(name: str, kind: str, value: float, classes: int) -> Check:
    guess = math.log(classes)
    evidence = f"{kind} is {value:.4g}; log({classes}) = {guess:.4g} is what guessing gives"
    if not math.isfinite(value):
        return Check(name, "not applicable", f"{kind} is {value}")
    if value <= GUESSES * guess + MARGIN:
        return Check(name, "passed", evidence)
    return Check(
        name,
        "failed",
        evidence,
        "the first outputs are large, so that the model is sure of what it does not know",
        "normalise the inputs, or begin with smaller weights in the last layer",
    )


def _errors_at_start(name: str, seen: Seen) -> Check:
    calls = [c for c in calls_of(seen, first_batch=True) if c.input.shape == c.target.shape]
    every = [c for c in calls_of(seen) if c.input.shape == c.target.shape and c.name in ELEMENTWISE.values()]
    if sum(call.target.numel() for call in calls) < ROWS:
        return Check(name, "not applicable", f"fewer than {ROWS} targets of the prediction's shape were seen")
    error = rms(torch.cat([(call.input.double() - call.target.double()).reshape(-1) for call in calls]))
    targets = torch.cat([call.target.double().reshape(-1) for call in every])
    size = rms(targets)
    if not math.isfinite(error) or not math.isfinite(size):
        return Check(name, "not applicable", "predictions or targets are not finite")
    evidence = f"predictions are off by {error:.4g} (root mean square); predicting 0 is off by {size:.4g}"
    if error > ERROR * size > 0:
        return Check(
            name,
            "failed",
            evidence,
            "the outputs are of another scale than the targets",
            "normalise inputs and targets, or begin with smaller weights in the last layer",
        )
    spread = float(targets.std(correction=0))
    if is_shuffled(seen.train_data) and len(targets) >= ROWS_FOR_SPREAD and error > OFFSET * spread > 0:
        return Check(
            name,
            "failed",
            f"{evidence}; predicting their mean of {float(targets.mean()):.4g} is off by {spread:.4g}",
            "the targets lie far from 0 compared to how they differ, and the first epochs go into one offset",
            "subtract the targets' mean, and divide by their standard deviation",
        )
    return Check(name, "passed", evidence)
