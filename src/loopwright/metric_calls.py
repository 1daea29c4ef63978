"""The three methods of a metric, called so that what they raise says which metric it was; and what one computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loopwright.errors import ConfigError, note
from loopwright.metrics import check_name, scalar
from loopwright.mismatch.layers import shape_of, short
from loopwright.nonfinite.census import joined, tensors_in
from loopwright.step import Metric, Output, describe

RAISED = "raised by the metric "


def reset_metric(name: str, metric: Metric) -> None:
    """Have a metric forget all batches; what it raises gets a note that names it."""
    try:
        metric.reset()
    except Exception as error:
        note(error, _by(name, metric, "reset"))
        raise


def update_metric(name: str, metric: Metric, output: Output) -> None:
    """Give one batch's predictions and targets to a metric; what it raises gets a note that names it, and what it got.

    Raises:
        ConfigError: The step returned none, or the metric's own numbers are on another device.
    """
    if output.predictions is None or output.targets is None:
        missing = "predictions" if output.predictions is None else "targets"
        raise ConfigError(
            f"the metric {name!r} needs predictions and targets, and the step returned no {missing}",
            fix="return Output(loss, predictions=..., targets=...)",
        )
    try:
        metric.update(output.predictions, output.targets)
    except Exception as error:
        # torch's words, of which there are several
        if isinstance(error, RuntimeError) and re.search(r"\b(same|expected) device\b", str(error)):
            raise _on_another_device(name, error) from error
        given = f"{_given('predictions', output.predictions)}, {_given('targets', output.targets)}"
        note(error, f"{_by(name, metric, 'update')}, given {given}")
        raise


def compute_metric(name: str, metric: Metric) -> Any:
    """What a metric computes; what it raises gets a note that names it."""
    try:
        return metric.compute()
    except Exception as error:
        note(error, _by(name, metric, "compute"))
        raise


def _on_another_device(name: str, error: RuntimeError) -> ConfigError:
    return ConfigError(
        f"the metric {name!r} keeps its numbers on another device than the batches: {str(error).splitlines()[0]}",
        why="the trainer moves a metric that is an nn.Module, as those of torchmetrics are, and no other",
        fix="keep them as Python numbers, make the metric an nn.Module with buffers, or take the values over in "
        "update with .to(...)",
    )


def _by(name: str, metric: Metric, method: str) -> str:
    return f"{RAISED}{name!r} ({type(metric).__qualname__}) in {method}"


def _given(what: str, value: Any) -> str:
    """What a metric was given, in words: the shapes and types of the tensors in it, or what it is else."""
    try:
        tensors = [f"{path} {shape_of(tensor)} {short(tensor.dtype)}" for path, tensor in tensors_in(value, what)]
        return joined(tensors) if tensors else f"{what} {describe(value)}"
    except Exception:  # of a tensor without one shape, for example: the error at hand is what is to be seen
        return f"{what} an object of type {type(value).__name__}"


def together(scores: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Both together.

    Raises:
        ConfigError: They have a name in common.
    """
    for name in scores.keys() & more.keys():
        raise ConfigError(
            f"{name!r} is measured twice",
            why="the step returns a metric of this name, and metrics= has one as well",
            fix="another name for one of them",
        )
    return scores | more


def named_scores(name: str, computed: Any) -> dict[str, float]:
    """What a metric computed, as floats under names: one, or one for each key of a mapping.

    Raises:
        ConfigError: It is neither a number nor a mapping to numbers.
    """
    if isinstance(computed, Mapping):
        return {key: value for k, v in computed.items() for key, value in named_scores(f"{name}/{k}", v).items()}
    return {check_name(name): float(scalar(name, computed))}
