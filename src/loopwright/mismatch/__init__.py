"""What torch's errors of dtypes, shapes and ranges most likely mean, read from the call that raised them.

Nothing here runs before there is an error, but for ``one_class``, about which torch raises none. Nothing is taken from
an error's wording but whether it speaks of types: the arguments are looked up in the frames of the traceback, and what
is said of them was seen there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn

from loopwright.errors import LoopwrightError, note
from loopwright.mismatch.layers import CASTS, Cause, Given, of_arguments, of_layer, of_other_kind, short
from loopwright.mismatch.losses import FUNCTIONS, of_function
from loopwright.nonfinite.census import each_tensor, tensors_in

# In the text of an error of torch's: it speaks of types.
OF_TYPES: re.Pattern[str] = re.compile(r"type|double|float|half|not implemented for", re.IGNORECASE)
_KINDS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
_NOTHING = object()
_LOOPS = ("loopwright.trainer", "loopwright.checks.rehearsal")  # whose frames hold the batch and the output


def explain_in_note(error: BaseException) -> None:
    """Give an error of torch's a note with its likely cause and the cure, where one is certain."""
    if (found := likely_cause(error)) is not None:
        words = f"{found[0]}\n  fix: {found[1]}"
        if words not in getattr(error, "__notes__", ()):
            note(error, words)


def likely_cause(error: BaseException) -> Cause | None:
    """What the call that raised an error was given and could not take, and the cure; None where that is not certain."""
    if isinstance(error, LoopwrightError) or not isinstance(error, _KINDS):
        return None
    try:
        found = next(filter(None, (_in_frame(frame, error) for frame in reversed(list(_frames(error))))), None)
        return found or (of_arguments(_step_of(error)) if OF_TYPES.search(str(error)) else None)
    except Exception:  # of a tensor of the user's own kind, for example: the error at hand is what is to be seen
        return None


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _in_frame(frame: FrameType, error: BaseException) -> Cause | None:
    given, where, name = frame.f_locals, str(frame.f_globals.get("__name__")), frame.f_code.co_name
    if where == "torch.nn.functional" and name in FUNCTIONS:
        return of_function(name, given)
    if where.startswith("torch.nn.modules."):
        layer, value = given.get("self"), given.get("input", given.get("query", _NOTHING))
        if isinstance(layer, nn.Module) and isinstance(value, Tensor):
            return of_layer(layer, value, _step_of(error), of_types=OF_TYPES.search(str(error)) is not None)
        if isinstance(layer, nn.Module) and value is not _NOTHING and name == "forward":
            return of_other_kind(layer, value)
    if where in _LOOPS:
        output = given.get("output")
        return unlike_types(error, getattr(output, "predictions", None), getattr(output, "targets", None))
    return None


def _step_of(error: BaseException) -> Given:
    """What the frames hold of the step: the batch, and what the model was called with."""
    model, batch, precision, arguments = None, None, "fp32", None
    for frame in _frames(error):
        local = frame.f_locals
        if frame.f_globals.get("__name__") in _LOOPS and "batch" in local:
            owner = local.get("subject", local.get("self"))
            model = getattr(getattr(owner, "state", owner), "model", None)
            precision = getattr(getattr(owner, "_settings", owner), "precision", precision)
            batch = local["batch"]
        elif frame.f_code.co_name == "_call_impl" and arguments is None and local.get("self") is model is not None:
            arguments = local.get("args"), local.get("kwargs")
    return Given(
        model if isinstance(model, nn.Module) else None,
        list(each_tensor(arguments)),
        list(tensors_in(batch, "batch")),
        precision,
    )


def unlike_types(error: BaseException, predictions: Any, targets: Any) -> Cause | None:
    """What some losses, such as huber_loss, cannot go back from.

    Args:
        error: What was raised.
        predictions: What the loss was given, if that is known.
        targets: The same.
    """
    in_backward = any(frame.f_code.co_name == "_engine_run_backward" for frame in _frames(error))
    if not in_backward or not OF_TYPES.search(str(error)):
        return None
    if not isinstance(predictions, Tensor) or not isinstance(targets, Tensor) or predictions.dtype not in CASTS:
        return None
    if predictions.shape != targets.shape or predictions.dtype == targets.dtype:
        return None
    found = f"the predictions are {short(predictions.dtype)} and the targets {short(targets.dtype)}"
    return f"{found}; the loss takes no two types", f"targets.{CASTS[predictions.dtype]}, in the dataset"
