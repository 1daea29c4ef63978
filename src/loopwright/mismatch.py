"""What torch's errors of dtypes, shapes and ranges most likely mean, read from the call that raised them.

Nothing here runs before there is an error. Nothing is taken from an error's wording but whether it speaks of types: the
arguments are looked up in the frames of the traceback, and what is said of them was seen there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.errors import LoopwrightError

Cause = tuple[str, str]
"""What was found, and what to do about it."""

# In the text of an error of torch's: it speaks of types.
OF_TYPES: re.Pattern[str] = re.compile(r"type|double|float|half|not implemented for", re.IGNORECASE)
CASTS: Mapping[torch.dtype, str] = {
    torch.float32: "float()",
    torch.float64: "double()",
    torch.float16: "half()",
    torch.bfloat16: "bfloat16()",
}
_LOOPS = ("loopwright.trainer", "loopwright.checks.rehearsal")  # whose frames hold the batch and the output
_OF_CLASSES = (torch.int64, torch.uint8)  # what a loss of classes takes for their numbers


def explain_in_note(error: BaseException) -> None:
    """Give an error of torch's a note with its likely cause and the cure, where one is certain."""
    if (found := likely_cause(error)) is not None:
        note = f"{found[0]}\n  fix: {found[1]}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def likely_cause(error: BaseException) -> Cause | None:
    """What the call that raised an error was given and could not take, and the cure; None where that is not certain."""
    if isinstance(error, LoopwrightError) or not isinstance(error, (RuntimeError, TypeError, ValueError, IndexError)):
        return None
    try:
        return next(filter(None, (_in_frame(frame, error) for frame in reversed(list(_frames(error))))), None)
    except Exception:  # of a tensor of the user's own kind, for example: the error at hand is what is to be seen
        return None


def _is_array(value: object) -> bool:
    return hasattr(value, "__array_interface__") and not isinstance(value, Tensor)


def short(dtype: torch.dtype) -> str:
    """A dtype without torch's name."""
    return str(dtype).removeprefix("torch.")


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _in_frame(frame: FrameType, error: BaseException) -> Cause | None:
    given, where, name = frame.f_locals, str(frame.f_globals.get("__name__")), frame.f_code.co_name
    if where == "torch.nn.functional" or where.startswith("torch.nn.modules."):
        for argument in ("input", "target"):
            if _is_array(given.get(argument)):
                owner = name if where == "torch.nn.functional" else type(given.get("self")).__name__
                what = f"{owner} was given an array of numpy's for its {argument}"
                return what, "tensors, as torch.from_numpy(array) makes them, in the dataset"
    if where == "torch.nn.functional" and name in _FUNCTIONS:
        one, other = (given.get(argument) for argument in _FUNCTIONS[name][1])
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return _FUNCTIONS[name][0](name, one, other, given)
    elif where.startswith("torch.nn.modules."):
        layer, value = given.get("self"), given.get("input")
        if isinstance(layer, nn.Module) and isinstance(value, Tensor):
            return _of_layer(layer, value, error)
    elif where in _LOOPS and OF_TYPES.search(str(error)) and _in_backward(error):
        return _of_output(given.get("output"))
    return None


def of_classes(name: str, input: Tensor, target: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """What a loss of classes cannot take of a target.

    Args:
        name: What to call the loss.
        input: The predictions, with a dimension of the classes: the second, or the only one.
        target: The numbers of the classes, without that dimension; or for ``cross_entropy`` their probabilities.
        given: Its other arguments, by their names.

    Returns:
        What was found and the cure, or None.
    """
    at = 1 if input.ndim > 1 else 0
    classes, rest = input.shape[at], input.shape[:at] + input.shape[at + 1 :]
    cast = "" if target.dtype in _OF_CLASSES else ".long()"
    what = f"{name} was given targets of {short(target.dtype)} and shape {tuple(target.shape)}"
    wanted = f"for predictions of shape {tuple(input.shape)} it takes the numbers of the classes, int64 of shape"
    if target.shape == rest:
        if cast and target.is_floating_point() and not _whole(target):
            return (
                f"{what}, and not all of them are whole; it takes the numbers of the classes, from 0 to {classes - 1}",
                "the numbers of the classes; or, if the targets are quantities, a loss for these such as nn.MSELoss()",
            )
        if cast:
            return f"{what}; {wanted} {tuple(rest)}", f"targets{cast}, in the dataset"
        counted = target[target != given.get("ignore_index")]
        more = "outputs at the end of the model"
        return _out_of_range(f"{name} was given targets", counted, classes, "classes", more)
    if target.shape == (*rest[:1], 1, *rest[1:]) and classes > 1 and input.ndim > 1:
        return f"{what}; {wanted} {tuple(rest)}", f"targets.squeeze(1){cast}, in the dataset"
    if target.shape == input.shape and not target.is_floating_point():
        whole = "targets.argmax(1), if they are one-hot"
        return (
            f"{what}; {wanted} {tuple(rest)}" + ", or probabilities of a floating type" * (name == "cross_entropy"),
            whole + ("; or targets.float()" if name == "cross_entropy" else ""),
        )
    if input.ndim > 2 and target.shape == input.shape[:-1]:
        return (
            f"{what}, and predictions of shape {tuple(input.shape)}; the classes are to be the second dimension",
            "predictions.movedim(-1, 1)",
        )
    return None


def _out_of_range(what: str, numbers: Tensor, count: int, of: str, more: str) -> Cause | None:
    """Of numbers that count classes or rows; of those on an accelerator, which its own error has stopped, nothing."""
    if numbers.device.type != "cpu" or not numbers.numel():
        return None
    low, high = int(numbers.min()), int(numbers.max())
    if low >= 0 and high < count:
        return None
    found = f"{what} from {low} to {high}, for {count} {of}: 0 to {count - 1}"
    if low == 1 and high == count:
        return found, "subtract 1 from each, to count from 0"
    if low < 0:
        left_out = "; ignore_index= of the loss is for one that stands for none" if of == "classes" else ""
        return found, f"numbers that count from 0{left_out}"
    return found, f"numbers that count from 0 without gaps, or {high + 1} {more}"


def _whole(values: Tensor) -> bool:
    """Whether all are whole numbers; taken for granted of those on an accelerator, which reading would wait for."""
    return values.device.type != "cpu" or bool((values == values.round()).all())


def _of_two(name: str, input: Tensor, target: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """What a binary loss cannot take of a target."""
    cast = ""
    if not target.is_floating_point() or (name == "binary_cross_entropy" and target.dtype != input.dtype):
        cast = f".{CASTS.get(input.dtype, 'float()')}"
    shape = {
        (*target.shape, 1): ".unsqueeze(-1)",
        tuple(target.shape): "",
        tuple(target.shape[:-1]) if target.ndim and target.shape[-1] == 1 else None: ".squeeze(-1)",
    }.get(tuple(input.shape))
    if shape is None or not (shape or cast):
        return None
    return (
        f"{name} was given targets of {short(target.dtype)} and shape {tuple(target.shape)}; for predictions of "
        f"{short(input.dtype)} and shape {tuple(input.shape)} it takes targets of that type and shape",
        f"targets{shape}{cast}, in the dataset",
    )


def _of_rows(name: str, input: Tensor, weight: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """What an embedding cannot look up."""
    if input.dtype not in (torch.int64, torch.int32):
        what = f"an embedding was given indices of {short(input.dtype)} and shape {tuple(input.shape)}"
        return f"{what}; indices are int64", "indices.long()"
    return _out_of_range("an embedding was given indices", input, weight.shape[0], "rows", "rows in it")


_FUNCTIONS: Mapping[str, tuple[Callable[[str, Tensor, Tensor, Mapping[str, Any]], Cause | None], tuple[str, str]]] = {
    "cross_entropy": (of_classes, ("input", "target")),
    "nll_loss": (of_classes, ("input", "target")),
    "binary_cross_entropy": (_of_two, ("input", "target")),
    "binary_cross_entropy_with_logits": (_of_two, ("input", "target")),
    "embedding": (_of_rows, ("input", "weight")),
}


def _of_layer(layer: nn.Module, value: Tensor, error: BaseException) -> Cause | None:
    """What a layer of torch's cannot take: another type than that of its weights, or too many or few features."""
    own = {p.dtype for p in layer.parameters(recurse=False) if p.is_floating_point()}
    if len(own) != 1:
        return None
    (dtype,) = own
    what = f"{layer} was given {short(value.dtype)} of shape {tuple(value.shape)}"
    if value.dtype != dtype and dtype in CASTS and OF_TYPES.search(str(error)):
        numpy = ", as numpy's arrays are unless told otherwise" if value.dtype == torch.float64 else ""
        if value.dtype in _types_of_inputs(error):
            return f"the inputs are {short(value.dtype)}{numpy}; the parameters are {short(dtype)}", (
                f"inputs.{CASTS[dtype]} in the dataset"
            )
        return f"{what}; its weights are {short(dtype)}", f".{CASTS[dtype]} on what it is given"
    if isinstance(layer, nn.Linear) and value.ndim and value.shape[-1] != layer.in_features:
        features = value.shape[-1]
        if value.ndim > 2 and math.prod(value.shape[1:]) == layer.in_features:
            return f"{what}, whose last dimension is to be {layer.in_features}", "nn.Flatten() before it"
        cure = f"nn.Linear({features}, {layer.out_features}), or what it is given with {layer.in_features} features"
        return f"{what}, whose last dimension is to be {layer.in_features}", cure
    return None


def _types_of_inputs(error: BaseException) -> set[torch.dtype]:
    """The types of what came with the batch for the model: of a batch that is no pair, the floating ones."""
    for frame in _frames(error):
        if frame.f_globals.get("__name__") in _LOOPS and "batch" in frame.f_locals:
            batch = frame.f_locals["batch"]
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            tensors = tensors_in(batch[0] if pair else batch)
            return {t.dtype for t in tensors if pair or t.is_floating_point()}
    return set()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dicts of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _in_backward(error: BaseException) -> bool:
    return any(frame.f_code.co_name == "_engine_run_backward" for frame in _frames(error))


def _of_output(output: Any) -> Cause | None:
    """What some losses, such as huber_loss, cannot go back from."""
    one, other = getattr(output, "predictions", None), getattr(output, "targets", None)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.dtype not in CASTS:
        return None
    if one.shape != other.shape or one.dtype == other.dtype:
        return None
    found = f"the predictions are {short(one.dtype)} and the targets {short(other.dtype)}"
    return f"{found}; the loss takes no two types", f"targets.{CASTS[one.dtype]}, in the dataset"
