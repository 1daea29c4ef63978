"""What a loss, or an embedding, cannot take: targets of another format, shape or range, or what is no tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.mismatch.layers import CASTS, Cause, kind_of, short

_OF_CLASSES = (torch.int64, torch.uint8)  # what a loss of classes takes for their numbers


def of_function(name: str, given: Mapping[str, Any]) -> Cause | None:
    """What a function of torch's, of those in ``FUNCTIONS``, cannot take of its arguments.

    Args:
        name: The function's.
        given: Its arguments by their names, and its other variables.
    """
    look, names = FUNCTIONS[name]
    one, other = (given.get(argument) for argument in names)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return look(name, one, other, given)
    if "target" not in names:
        return None
    if not isinstance(one, Tensor):
        found, cure = kind_of(one, "the model")
        return f"{name} was given {found} for predictions; it takes a tensor", cure
    found, cure = kind_of(other)
    cure = cure if hasattr(other, "__array_interface__") else "a tensor of them, in the dataset"
    return f"{name} was given {found} for targets; it takes a tensor", cure


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
    if classes == 1 and (cast or target.shape != rest) and (cure := for_one_class(input, target)) is not None:
        return f"{what}, for predictions of shape {tuple(input.shape)}, which are of one class", cure
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
        wrong = _out_of_range(f"{name} was given targets", counted, classes, "classes", more)
        return wrong or _of_class_weights(name, input, given)
    if target.shape == (*rest[:1], 1, *rest[1:]) and input.ndim > 1:
        return f"{what}; {wanted} {tuple(rest)}", f"targets.squeeze(1){cast}, in the dataset"
    if target.shape == input.shape and (not target.is_floating_point() or name == "nll_loss"):
        whole = "targets.argmax(1), if they are one-hot"
        return (
            f"{what}; {wanted} {tuple(rest)}" + ", or probabilities of a floating type" * (name == "cross_entropy"),
            whole + ("; or targets.float()" if name == "cross_entropy" else ""),
        )
    if target.ndim == 2 == input.ndim and len(target) == len(input) and 1 < target.shape[1] != classes:
        if not _one_hot(target):
            return None
        return (
            f"{what}, one-hot for {target.shape[1]} classes, and predictions of shape {tuple(input.shape)}",
            f"{target.shape[1]} outputs at the end of the model, and targets.argmax(1)",
        )
    if input.ndim > 2 and target.shape == input.shape[:-1]:
        return (
            f"{what}, and predictions of shape {tuple(input.shape)}; the classes are to be the second dimension",
            "predictions.movedim(-1, 1)",
        )
    return None


def for_one_class(input: Tensor, target: Tensor) -> str | None:
    """What to do where a loss of classes is given predictions of a single class, by what the targets look like.

    Args:
        input: The predictions: the dimension of the classes is the second, or the only one, and 1.
        target: Their targets.

    Returns:
        The cure, or None where the targets are of another shape than such predictions have.
    """
    at = 1 if input.ndim > 1 else 0
    rest = input.shape[:at] + input.shape[at + 1 :]
    column = input.ndim > 1 and target.shape == input.shape
    if not column and target.shape != rest:
        if input.ndim == 2 == target.ndim and len(target) == len(input) and target.shape[1] > 1 and _one_hot(target):
            return f"{target.shape[1]} outputs at the end of the model, and targets.argmax(1)"
        return None
    as_they_are = "" if column else f".unsqueeze({at})"
    as_numbers = as_they_are + ("" if target.is_floating_point() else ".float()")
    two = "nn.BCEWithLogitsLoss() as the loss" + (f" and targets{as_numbers}" if as_numbers else "")
    if target.is_floating_point() and not _whole(target):
        low, high = _ends(target)
        if low >= 0 and high <= 1:
            return f"{two}, if a target is how probable one class of two is"
        return f"a loss for quantities such as nn.MSELoss(){_and_targets(as_they_are)}, if that is what the targets are"
    as_classes = ".squeeze(1)" * column + ("" if target.dtype in _OF_CLASSES else ".long()")
    outputs = f"as many outputs at the end of the model as there are classes{_and_targets(as_classes)}"
    if target.device.type == "cpu" and target.numel() and not {*_ends(target)} <= {0, 1}:
        return outputs
    return f"{outputs}; or, for two classes by one output, {two}"


def _and_targets(change: str) -> str:
    return f", and targets{change}" if change else ""


def _ends(values: Tensor) -> tuple[float, float]:
    """The least and the largest; of what is on an accelerator, or of nothing, those of probabilities."""
    if values.device.type != "cpu" or not values.numel():
        return 0, 1
    return values.min().item(), values.max().item()


def _of_class_weights(name: str, input: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """Weights of the classes in another format than the predictions."""
    weight = given.get("weight")
    if not isinstance(weight, Tensor) or weight.dtype == input.dtype or input.dtype not in CASTS:
        return None
    found = f"{name} was given weights of the classes of {short(weight.dtype)}, for predictions of {short(input.dtype)}"
    return found, f"weight=weights.{CASTS[input.dtype]}"


def _out_of_range(what: str, numbers: Tensor, count: int, of: str, more: str) -> Cause | None:
    """Of numbers that count classes or rows; of those on an accelerator, which its own error has stopped, nothing."""
    if numbers.device.type != "cpu" or not numbers.numel():
        return None
    low, high = int(numbers.min()), int(numbers.max())
    if low >= 0 and high < count:
        return None
    found = f"{what} from {low} to {high}, for {count} {of}: 0 to {count - 1}"
    if count == 1 and of == "classes":
        found = f"{what} from {low} to {high}, for predictions of one class, which is 0"
        if (low, high) in ((0, 1), (1, 1)):
            return found, f"2 {more}; or nn.BCEWithLogitsLoss() as the loss, and targets of the predictions' shape"
    if low == 1 and high == count:
        return found, f"subtract 1 from each, if they count from 1; or, if they count from 0, {high + 1} {more}"
    if low < 0:
        left_out = "; ignore_index= of the loss is for one that stands for none" if of == "classes" else ""
        return found, f"numbers that count from 0{left_out}"
    return found, f"numbers that count from 0 without gaps, or {high + 1} {more}"


def _one_hot(values: Tensor) -> bool:
    """Whether each row has a single 1, and else 0; not looked at on an accelerator, which reading would wait for."""
    return values.device.type == "cpu" and bool(((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all())


def _whole(values: Tensor) -> bool:
    """Whether all are whole numbers; taken for granted of those on an accelerator, which reading would wait for."""
    return values.device.type != "cpu" or bool((values == values.round()).all())


def of_two(name: str, input: Tensor, target: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """What a binary loss cannot take of a target.

    Args:
        name: What to call the loss.
        input: The predictions.
        target: Their targets, 0 or 1 or between.
        given: Its other arguments.

    Returns:
        What was found and the cure, or None.
    """
    cast = ""
    if not target.is_floating_point() or (name == "binary_cross_entropy" and target.dtype != input.dtype):
        cast = f".{CASTS.get(input.dtype, 'float()')}"
    shape = {
        (*target.shape, 1): ".unsqueeze(-1)",
        tuple(target.shape): "",
        tuple(target.shape[:-1]) if target.ndim and target.shape[-1] == 1 else None: ".squeeze(-1)",
    }.get(tuple(input.shape))
    if shape is None or not (shape or cast):
        return _of_probabilities(name, input, target) or _of_two_classes(name, input, target)
    return (
        f"{name} was given targets of {short(target.dtype)} and shape {tuple(target.shape)}; for predictions of "
        f"{short(input.dtype)} and shape {tuple(input.shape)} it takes targets of that type and shape",
        f"targets{shape}{cast}, in the dataset",
    )


def _of_probabilities(name: str, input: Tensor, target: Tensor) -> Cause | None:
    """What is not between 0 and 1; of what is on an accelerator, nothing."""
    if name != "binary_cross_entropy" or input.shape != target.shape or input.device.type != "cpu" or not input.numel():
        return None
    for what, values in (("predictions", input), ("targets", target)):
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > 1:
            found = f"{name} was given {what} from {low:g} to {high:g}; it takes probabilities, from 0 to 1"
            logits = "nn.BCEWithLogitsLoss() in place of nn.BCELoss(), or nn.Sigmoid() at the end of the model"
            return found, logits if what == "predictions" else "targets from 0 to 1"
    return None


def _of_two_classes(name: str, input: Tensor, target: Tensor) -> Cause | None:
    """The numbers of classes, where each of several outputs is to have a target of its own."""
    if input.ndim < 2 or target.shape != input.shape[:-1] or not _whole(target):
        return None
    classes = input.shape[-1]
    return (
        f"{name} was given targets of shape {tuple(target.shape)}; for predictions of shape {tuple(input.shape)} it "
        "takes targets of that shape",
        f"nn.CrossEntropyLoss() in place of it, if a target is the number of one of {classes} classes; or one output "
        "at the end of the model, if it is 0 or 1",
    )


def _of_rows(name: str, input: Tensor, weight: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """What an embedding cannot look up."""
    if input.dtype not in (torch.int64, torch.int32):
        shape = f" and shape {tuple(input.shape)}" * (name == "embedding")  # a bag's may have been changed by now
        what = f"an embedding was given indices of {short(input.dtype)}{shape}"
        if input.is_floating_point() and not _whole(input):
            return f"{what}, and not all of them are whole; indices are int64", "nn.Linear in its place, for quantities"
        return f"{what}; indices are int64", "indices.long()"
    return _out_of_range("an embedding was given indices", input, weight.shape[0], "rows", "rows in it")


def _of_numbers(name: str, input: Tensor, target: Tensor, given: Mapping[str, Any]) -> Cause | None:
    """Targets of a shape that cannot be compared with that of the predictions."""
    pairs = zip(reversed(input.shape), reversed(target.shape), strict=False)
    if all(one == other or 1 in (one, other) for one, other in pairs):
        return None
    found = (
        f"{name} was given predictions of shape {tuple(input.shape)} and targets of shape {tuple(target.shape)}; it "
        "takes one shape for both"
    )
    if target.shape != input.shape[:-1]:
        return found, "an output of the model for each target"
    if _whole(target):
        return found, (
            "one output at the end of the model for each target; or nn.CrossEntropyLoss() as the loss, if a target is "
            f"the number of one of {input.shape[-1]} classes"
        )
    return found, "one output at the end of the model for each target"


FUNCTIONS: Mapping[str, tuple[Callable[[str, Tensor, Tensor, Mapping[str, Any]], Cause | None], tuple[str, str]]] = {
    "cross_entropy": (of_classes, ("input", "target")),
    "nll_loss": (of_classes, ("input", "target")),
    "binary_cross_entropy": (of_two, ("input", "target")),
    "binary_cross_entropy_with_logits": (of_two, ("input", "target")),
    "mse_loss": (_of_numbers, ("input", "target")),
    "l1_loss": (_of_numbers, ("input", "target")),
    "smooth_l1_loss": (_of_numbers, ("input", "target")),
    "huber_loss": (_of_numbers, ("input", "target")),
    "embedding": (_of_rows, ("input", "weight")),
    "embedding_bag": (_of_rows, ("input", "weight")),
}
"""What is looked at: what judges it, and the names of the two arguments that it is given."""
