"""The settings of a trainer, checked once and then frozen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from loopwright.arguments import check_takes
from loopwright.callback import Callback
from loopwright.errors import ConfigError, nearest
from loopwright.guard import NonFinitePolicy
from loopwright.logger import check_apart
from loopwright.metrics import check_name
from loopwright.nonfinite.census import joined
from loopwright.precision import Precision, half_weights
from loopwright.schedule import Schedule, check_count
from loopwright.step import LossFn, Metric, describe


@dataclass(frozen=True)
class Settings:
    """How a trainer trains: what ``Trainer`` takes beyond model, data and device."""

    schedule: Schedule | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    callbacks: tuple[Callback[Any], ...] = ()
    precision: Precision = "fp32"
    accumulate: int = 1
    clip_norm: float | None = None
    compile: bool = False
    seed: int | None = None
    deterministic: bool = False
    on_nonfinite: NonFinitePolicy = "raise"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_choice("on_nonfinite", self.on_nonfinite, get_args(NonFinitePolicy))
        check_count("accumulate", self.accumulate)
        clip, seed = self.clip_norm, self.seed
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0):
            raise ConfigError(
                f"clip_norm is {clip!r}",
                why="it is the largest norm that the gradients may have, and must be a number above 0",
                fix="clip_norm=1.0, or clip_norm=None for no clipping",
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
            raise ConfigError(
                f"seed is {seed!r}",
                why="it must be a whole number from 0 to 2**32 - 1, for numpy takes no other",
                fix="for example seed=0, or seed=None to seed nothing",
            )
        for name in ("compile", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}", why="it must be True or False", fix=f"{name}=True"
                )
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise ConfigError(
                f"schedule is {describe(self.schedule)}",
                why="whether it moves at every step or every epoch has to be said",
                fix='schedule=Schedule(lr_scheduler, each="step") or each="epoch"',
            )

    def check_schedule(self, optimizer: Optimizer) -> None:
        """Raise ConfigError where the scheduler moves the learning rates of another optimizer."""
        schedule = self.schedule
        if schedule is not None and getattr(schedule.lr_scheduler, "optimizer", optimizer) is not optimizer:
            raise ConfigError(
                "the schedule's lr_scheduler was built on another optimizer",
                why="it would move learning rates that nothing uses",
                fix=f"{type(schedule.lr_scheduler).__name__}(optimizer, ...), with the optimizer that the trainer gets",
            )

    def check_closure(self, optimizer: Optimizer) -> None:
        """Raise ConfigError where an optimizer that needs a closure meets a setting that excludes one."""
        clashes = {
            "accumulate": self.accumulate > 1,
            "precision='fp16'": self.precision == "fp16",
            "on_nonfinite='skip'": self.on_nonfinite == "skip",
        }
        for setting, clash in clashes.items():
            if clash:
                raise ConfigError(
                    f"{setting} does not go with {type(optimizer).__name__}",
                    why="its step evaluates the loss several times through a closure, so that a window of batches, "
                    "a scaled loss or a skipped step has no meaning there",
                    fix="leave that setting at its default, or choose an optimizer without a closure",
                )

    def check_sparse(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Raise ConfigError where gradients are to be clipped that torch has no norm of."""
        if self.clip_norm is None:
            return
        sparse = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse}
        sparse &= {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if names := [name for name, p in model.named_parameters() if id(p) in sparse]:
            raise sparse_clipping(names)

    def check_half(self, optimizer: Optimizer) -> None:
        """Raise ConfigError where every trained weight is float16, and a scaler is to unscale their gradients."""
        if self.precision == "fp16":
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            if trained and all(parameter.dtype is torch.float16 for parameter in trained):
                raise half_weights()

    def doubts(self, model: nn.Module, optimizer: Optimizer, loss: object) -> list[str]:
        """What can be meant, and seldom is, in words for a warning.

        Args:
            model: What is trained.
            optimizer: What trains it.
            loss: The loss function, where the step is made of one.
        """
        found, name = [], type(optimizer).__name__
        if self.accumulate > 1 and getattr(loss, "reduction", None) == "sum":
            found.append(sum_over_window(loss, self.accumulate))
        if self.clip_norm is not None and isinstance(optimizer, LBFGS):
            found.append(
                f"clip_norm={self.clip_norm:g} with {name}: it takes the clipped gradients for those of the loss, and "
                "what it concludes from them about the loss's shape is wrong; its own bounds are lr and "
                "line_search_fn='strong_wolfe'"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        known = {id(p) for p in model.parameters()} | held
        for owner in modules_of(loss):  # what belongs to a step may be trained by the step itself
            missing = [n for n, p in owner.named_parameters() if p.requires_grad and id(p) not in known]
            if missing:
                found.append(
                    f"{name} does not hold {', '.join(missing[:5])} of {type(owner).__name__}, and does not change "
                    f"{'them' if missing[1:] else 'it'}: {name}([*model.parameters(), *loss.parameters()], ...) would"
                )
        return found


def sparse_clipping(names: list[str]) -> ConfigError:
    """The error for gradients that are to be clipped, and are sparse: those of the parameters of these names."""
    return ConfigError(
        f"clip_norm does not go with sparse gradients, as {joined(names)} {'have' if names[1:] else 'has'} them",
        why="torch does not compute their norm",
        fix="sparse=False in the embedding, or leave clip_norm out",
    )


def sum_over_window(loss: object, accumulate: int) -> str:
    """What becomes of a loss that is a sum where several batches make a step, in words."""
    return (
        f"{type(loss).__name__} has reduction='sum', and accumulate is {accumulate}: the gradient of a window is the "
        "weighted mean of its batches' gradients, as for losses that are means, and not their sum; with "
        "reduction='mean' it is that of one large batch"
    )


def modules_of(*parts: object) -> list[nn.Module]:
    """Those of the parts that are modules, or methods of one, each once."""
    owners = [owner for part in parts for owner in (part, getattr(part, "__self__", None))]
    return list({id(owner): owner for owner in owners if isinstance(owner, nn.Module)}.values())


_MEANT = {
    **dict.fromkeys(("16", "16-mixed", "16-true", "float16", "half", "torch.float16", "mixed_float16"), "fp16"),
    **dict.fromkeys(("bf16-mixed", "bf16-true", "bfloat16", "torch.bfloat16", "mixed_bfloat16"), "bf16"),
    **dict.fromkeys(("32", "32-true", "float32", "float", "torch.float32", "no"), "fp32"),
}  # what other libraries, and torch, call them


def check_precision(value: object) -> None:
    """Raise ConfigError unless it is a precision of ours."""
    choices = get_args(Precision)
    if value in choices:
        return
    called = str(value).lower()
    close = nearest(called, choices) if not re.search(r"8|64|double", called) else ""
    raise ConfigError(
        f"precision is {value!r}",
        why=f"it must be one of {', '.join(map(repr, choices))}",
        fix=f"precision={_MEANT[called]!r}"
        if called in _MEANT
        else close
        or "'bf16' and 'fp16' run the step under autocast; 'fp32' leaves model and data in the formats that they have",
    )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(
            f"{name} is {value!r}",
            why=f"it must be one of {', '.join(map(repr, choices))}",
            fix=nearest(str(value), choices) or f"for example {name}={choices[0]!r}",
        )


def check_metrics(metrics: object) -> dict[str, Metric]:
    """The metrics as a dict of their own, each an instance under a name that it can be logged by.

    Raises:
        ConfigError: They are something else.
    """
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"metrics is {describe(metrics)}",
            why="each metric needs a name to be logged by",
            fix=f"metrics={{{_named(metrics)}}}; a collection goes under a name of its own too",
        )
    for name, metric in metrics.items():
        check_name(name)
        if name == "loss":
            raise ConfigError(
                "a metric is named 'loss'", why="that is the loss's own name", fix="another one, such as 'mae'"
            )
        stage, _, rest = name.partition("/")
        if stage in ("train", "val", "test") and rest:
            raise ConfigError(
                f"a metric is named {name!r}",
                why=f"the prefix is added: {rest!r} is logged as 'val/{rest}' in validation, and as 'test/{rest}' in "
                "evaluate",
                fix=f"metrics={{{rest!r}: ...}}",
            )
        if isinstance(metric, type):
            raise ConfigError(
                f"the metric {name!r} is the class {metric.__name__}, and not an instance of it",
                why="a metric is an object, which keeps what it has seen",
                fix=f"metrics={{{name!r}: {metric.__name__}()}}",
            )
        missing = [method for method in _METHODS if not callable(getattr(metric, method, None))]
        if missing:
            raise ConfigError(
                f"the metric {name!r} is {describe(metric)}, which has no {', no '.join(missing)}",
                why="a metric is an object with reset(), update(predictions, targets) and compute()",
                fix=f"metrics={{{name!r}: ...}} with an instance of a class that has these three",
            )
    _check_once(metrics)
    return dict(metrics)


_METHODS = ("reset", "update", "compute")


def _check_once(metrics: Mapping[str, Metric]) -> None:
    """Raise ConfigError where one metric would be updated under two names: of itself, a collection, a sum."""
    taken: dict[int, str] = {}
    for name, metric in metrics.items():
        parts = list(metric.modules()) if isinstance(metric, nn.Module) else [metric]
        for part in parts:
            if (other := taken.get(id(part))) is not None:
                raise ConfigError(
                    f"the metrics {other!r} and {name!r} are one {type(part).__name__}"
                    if part is metric is metrics[other]
                    else f"the metrics {other!r} and {name!r} share one {type(part).__name__}",
                    why="it would be updated twice with each batch, and count it twice",
                    fix="an instance of its own for each name",
                )
        taken |= {id(part): name for part in parts if all(hasattr(part, method) for method in _METHODS)}


def _named(metrics: object) -> str:
    """How to write the item of the dict for what was given without a name."""
    first = next(iter(metrics), None) if isinstance(metrics, (list, tuple)) else metrics
    called = first.__name__ if isinstance(first, type) else type(first).__name__
    if not all(hasattr(first, method) for method in _METHODS):
        return "'accuracy': Accuracy()"
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", called).lower()
    return f"{name!r}: {called}()"


def check_callbacks(callbacks: object) -> tuple[Callback[Any], ...]:
    """The callbacks as a tuple, each an instance of Callback and each there once, no two loggers at one place.

    Raises:
        ConfigError: They are something else.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        name = (callbacks if isinstance(callbacks, type) else type(callbacks)).__name__
        raise ConfigError(
            f"callbacks is {describe(callbacks)}",
            why="it must be a list: their hooks are called in its order",
            fix="leave it out, or callbacks=[]" if callbacks is None else f"callbacks=[{name}(...)]",
        )
    found = tuple(callbacks)
    for callback in found:
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise ConfigError(
                f"{callback.__name__} is a class, not an instance",
                why="its hooks are called on an object, which keeps what it takes note of",
                fix=f"callbacks=[{callback.__name__}(...)]",
            )
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"{describe(callback) if isinstance(callback, (list, tuple)) else repr(callback)} is not a callback",
                why="the loop calls the hooks that loopwright.Callback declares",
                fix="leave None out of the list of callbacks"
                if callback is None
                else "one flat list, as in callbacks=[*some, *others]"
                if isinstance(callback, (list, tuple))
                else "subclass loopwright.Callback, and give an instance of it",
            )
    if len({id(callback) for callback in found}) < len(found):
        raise ConfigError(
            "one callback is in the list twice",
            why="every hook of it would be called twice",
            fix="name it once",
        )
    check_apart(found)
    return found


def check_model(model: object, optimizer: object) -> None:
    """Raise ConfigError unless these are a module and an optimizer that holds parameters of it."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ConfigError(
            f"the model is the class {model.__name__}",
            why="a class has no parameters to train",
            fix=f"{model.__name__}(...), an instance of it",
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is {describe(model)}",
            why="a trainer trains an nn.Module",
            fix="Trainer(model, optimizer, loss)",
        )
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        raise ConfigError(
            f"the optimizer is the class {optimizer.__name__}",
            why="it does not know yet which parameters are its own",
            fix=f"{optimizer.__name__}(model.parameters(), lr=...), an instance of it",
        )
    several = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
    if isinstance(several, (list, tuple)) and several and all(isinstance(one, Optimizer) for one in several):
        kind = type(several[0]).__name__
        raise ConfigError(
            f"the optimizer is {describe(optimizer)}",
            why="a run has one optimizer; several in one run are not supported",
            fix=f"Trainer(model, optimizer, ...), the {kind} itself"
            if len(several) == 1
            else f"one {kind} with a parameter group for each part, {kind}([{{'params': ..., 'lr': ...}}, ...]); for "
            "updates in turn, as of a GAN, a loop by hand",
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"the optimizer is {describe(optimizer)}",
            why="a trainer needs one of torch.optim's kind",
            fix="for example torch.optim.SGD(model.parameters(), lr=0.01)",
        )
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr", 0.0)
        if not math.isfinite(rate):
            raise ConfigError(
                f"the learning rate of parameter group {index} is {float(rate)}",
                why="the first step would turn every weight into NaN",
                fix=f"{type(optimizer).__name__}(model.parameters(), lr=0.01)",
            )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"the optimizer holds no parameter of this {type(model).__name__}",
            why="it would train something else, and the model would stay as it is",
            fix=f"{type(optimizer).__name__}(model.parameters(), ...) with the very model that the trainer gets",
        )


def check_step(loss: LossFn | None, step: Callable[..., object] | None) -> None:
    """Raise ConfigError unless exactly one of the two is given, and can be called."""
    if (loss is None) == (step is None):
        raise ConfigError(
            "neither loss nor step is given" if loss is None else "both loss and step are given",
            why="exactly one of them says how a batch becomes a loss",
            fix="loss=nn.MSELoss() for batches of (inputs, targets), or step=my_step for everything else",
        )
    for name, value in (("loss", loss), ("step", step)):
        if isinstance(value, type):
            raise ConfigError(
                f"{name} is the class {value.__name__}",
                why="calling a class makes an object, and no loss",
                fix=f"{name}={value.__name__}(), an instance",
            )
        if value is not None and not callable(value):
            raise ConfigError(
                f"{name} is {describe(value)}",
                why="it must be a function, or an object that can be called like one",
                fix="loss=nn.MSELoss(), or step=my_step",
            )
    if step is not None:
        check_takes("step", step, "model", "batch")
    elif loss is not None:
        check_takes("loss", loss, "predictions", "targets")
