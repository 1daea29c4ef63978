"""Steps that train nothing: on copies of a model and its optimizer, with everything put back after."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from loopwright.checks.held import OptimizerAsFound, held_by, is_generator, state_of
from loopwright.checks.recorder import Record, Recorder, fingerprint
from loopwright.checks.sampling import copied_batch
from loopwright.checks.surroundings import SurroundingsAsFound
from loopwright.checks.tensors import TensorAsFound, of_one_piece
from loopwright.device import map_tensors, mover, place
from loopwright.metric_calls import reset_metric, update_metric
from loopwright.modes import evaluating
from loopwright.precision import Precision, autocast, grad_scaler, unscale
from loopwright.randomness import RandomState
from loopwright.settings import modules_of
from loopwright.step import LossFn, Metric, Output, as_output, check_trainable, supervised_step

AnyStep = Callable[[Any, Any], Output | Tensor]


@dataclass(frozen=True)
class Subject:
    """What is rehearsed: the parts of a trainer that make its step."""

    model: nn.Module
    optimizer: Optimizer
    loss: LossFn | None
    step: AnyStep
    metrics: Mapping[str, Metric]
    device: torch.device
    precision: Precision
    clip_norm: float | None
    takes_closure: bool
    accumulate: int = 1

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that a step may change."""
        return modules_of(self.model, self.loss, self.step)


@dataclass
class Rehearsed:
    """What came of a number of steps.

    Attributes:
        record: What was seen inside them.
        losses: The value of each batch's loss.
        predictions: Those of each step that returned any, as a tensor.
        reached: The names of the parameters that got a gradient.
        reached_each: The same, of each backward pass by itself.
        doubled: Whether the step had called backward itself, and all gradients came out as the sum of both.
        orphans: Whether each parameter that only the optimizer holds got a gradient.
        nonzero: Whether any gradient was other than zero.
        moved: Whether a step has changed a weight.
        calls_of_first: How many losses were called before the first gradients were there.
        steps: How many batches came to their end.
        error: What the step raised.
    """

    record: Record = field(default_factory=Record)
    losses: list[float] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    reached_each: list[frozenset[str]] = field(default_factory=list)
    doubled: bool = False
    orphans: list[bool] = field(default_factory=list)
    nonzero: bool = False
    moved: bool = False
    calls_of_first: int = 0
    steps: int = 0
    error: Exception | None = None


def duplicate(subject: Subject) -> Subject:
    """A copy of all that a step may change.

    Raises:
        Exception: A part of it cannot be copied; whatever that part raises.
    """
    known: dict[int, Any] = {}
    model = copy.deepcopy(_uncompiled(subject.model), known)
    known[id(subject.model)] = model
    loss = copy.deepcopy(subject.loss, known)
    step = supervised_step(loss) if loss is not None else copy.deepcopy(subject.step, known)
    optimizer = _copied_optimizer(subject.optimizer, known)
    if _held(model, optimizer) != _held(_uncompiled(subject.model), subject.optimizer):
        raise TypeError("a copy of the optimizer does not hold the parameters of a copy of the model")
    return _with(subject, model, optimizer, loss, step)


def _held(model: nn.Module, optimizer: Optimizer) -> list[bool]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [id(p) in held for p in model.parameters()]


def _with(subject: Subject, model: nn.Module, optimizer: Optimizer, loss: LossFn | None, step: AnyStep) -> Subject:
    place(model, optimizer, (loss,), subject.device)
    if not model.training:
        model.train()  # as fit does
    return Subject(
        model,
        optimizer,
        loss,
        step,
        subject.metrics,
        subject.device,
        subject.precision,
        subject.clip_norm,
        subject.takes_closure,
        subject.accumulate,
    )


def in_place(subject: Subject) -> Subject:
    """The original, in training mode, for want of a copy. ``AsFound`` puts it back."""
    return _with(subject, _uncompiled(subject.model), subject.optimizer, subject.loss, subject.step)


def _uncompiled(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def _copied_optimizer(optimizer: Optimizer, known: dict[int, Any]) -> Optimizer:
    """With attributes of its own, which its ``__getstate__`` leaves out, and without what others have hung on it."""
    twin: Optimizer = object.__new__(type(optimizer))
    known[id(optimizer)] = twin
    for name, value in vars(optimizer).items():
        if name in ("step", "zero_grad"):
            continue  # a scheduler's wrapper around it, which steps the original
        hooks = name.startswith("_optimizer_") and name.endswith("_hooks")
        vars(twin)[name] = OrderedDict() if hooks else copy.deepcopy(value, known)
    return twin


class AsFound:
    """Puts back on leaving what a step may have changed: weights, buffers, gradients, attributes, modes, generators.

    So it is with the trainer's parts, with the modules, optimizers and generators that the step refers to (see
    ``held_by``), and for a step that is given a copy and holds the original. Its variables, lists and plain tensors are
    put back at the end, and not between the passes: a step that depends on them is not the same twice, and is to be
    seen so. What is not undone: what an attribute's own list or dict has taken in, lazy parameters that got their
    shapes, and whatever else a step changes outside: attributes of other objects, files.
    """

    def __init__(self, subject: Subject, own: Iterable[torch.Generator]) -> None:
        held = held_by((subject.step, subject.loss))
        roots = [*subject.modules, *(value for value in held if isinstance(value, nn.Module))]
        self._modules = list({id(m): m for root in roots for m in root.modules()}.values())
        optimizers = [v for v in held if isinstance(v, Optimizer) and v is not subject.optimizer]
        self._optimizers = [OptimizerAsFound(optimizer) for optimizer in optimizers]
        in_groups = [p for group in subject.optimizer.param_groups for p in group["params"]]
        in_groups += [tensor for optimizer in self._optimizers for tensor in optimizer.tensors]
        owned = [t for m in self._modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        tensors = {id(t): t for t in (*owned, *in_groups) if not is_lazy(t)}.values()
        others = [*held, *(value for module in self._modules for value in vars(module).values())]
        self._own = [*own, *(value for value in others if isinstance(value, torch.Generator))]
        self.random: RandomState = RandomState.capture(self._own)
        self._restored = [state_of(v) for v in others if is_generator(v) and not isinstance(v, torch.Generator)]
        self._tensors = [TensorAsFound(of_one_piece(tensor)) for tensor in tensors]
        self._gradients = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
        self._attributes = [_attributes(module) for module in self._modules]
        self._surroundings = SurroundingsAsFound((subject.step, subject.loss))

    def rewind(self) -> None:
        """Put all back for the next pass, which begins without gradients as the first did."""
        self._restore()
        for tensor, _ in self._gradients:
            tensor.grad = None

    def __enter__(self) -> AsFound:
        for tensor, _ in self._gradients:
            tensor.grad = None
        return self

    def __exit__(self, *error: object) -> None:
        self._surroundings.restore()
        self._restore()
        for tensor, gradient in self._gradients:
            tensor.grad = gradient

    def _restore(self) -> None:
        for module, (outer, inner) in zip(self._modules, self._attributes, strict=True):
            vars(module).clear()
            vars(module).update(outer)
            for name, items in inner.items():
                outer[name].clear()
                outer[name].update(items)
        for optimizer in self._optimizers:
            optimizer.restore()
        for tensor in self._tensors:
            tensor.restore()
        self.random.restore(self._own)
        for restore in self._restored:
            restore()


def _attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    tables = {name: vars(module).get(name) for name in ("_parameters", "_buffers", "_modules")}
    inner = {name: dict(table) for name, table in tables.items() if isinstance(table, dict)}
    return dict(vars(module)), inner


def train(subject: Subject, batches: Iterable[Any], names: Mapping[int, str], *, update: bool = True) -> Rehearsed:
    """A step on each of the batches; what they came to, up to an error of the step's.

    Args:
        subject: The parts; its weights change.
        batches: The batches, each used once.
        names: The names of modules and parameters, by their ids.
        update: Whether the optimizer makes its step.
    """
    found, root = Rehearsed(), {id(subject.model)}
    scaler = grad_scaler(subject.precision, subject.device)
    move, context = mover(subject.device), autocast(subject.precision, subject.device) or contextlib.nullcontext()
    with torch.enable_grad():
        for batch in batches:
            batch = move(copied_batch(batch))
            recorder = Recorder(found.record, names, root, batch)

            def evaluate(batch: Any = batch, recorder: Recorder = recorder) -> Tensor:
                for parameter in _parameters(subject):
                    parameter.grad = None
                with recorder, context:
                    output = as_output(subject.step(subject.model, batch))
                    check_trainable(output.loss)
                loss = output.loss if scaler is None else scaler.scale(output.loss)
                recorder.mark("the loss", output.loss)
                own = _gradients(subject)
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
                found.doubled = found.doubled or _doubled(own, subject, 1.0 if scaler is None else scaler.get_scale())
                _take_down(found, subject, names, recorder, output)
                if scaler is not None and update:
                    unscale(scaler, subject.optimizer)
                if subject.clip_norm is not None and update:
                    nn.utils.clip_grad_norm_(list(_parameters(subject)), subject.clip_norm)
                return output.loss.detach()

            try:
                _one_step(subject, evaluate, scaler, found, names, recorder, update=update)
            except Exception as error:
                found.error = error
                break
            found.steps += 1
    for parameter in _parameters(subject):
        parameter.grad = None
    return found


def _one_step(
    subject: Subject,
    evaluate: Callable[[], Tensor],
    scaler: torch.amp.GradScaler | None,
    found: Rehearsed,
    names: Mapping[int, str],
    recorder: Recorder,
    *,
    update: bool,
) -> None:
    before = fingerprint(_parameters(subject))
    if subject.takes_closure and update:
        subject.optimizer.step(evaluate)  # type: ignore[arg-type]  # typed as float, but LBFGS calls float() on it itself
    else:
        evaluate()
        if scaler is not None and update:
            scaler.step(subject.optimizer)
            scaler.update()
        elif update:
            subject.optimizer.step()
    found.moved = found.moved or fingerprint(_parameters(subject)) != before
    for parameter in _parameters(subject):
        recorder.mark(f"the new value of {names.get(id(parameter), 'a parameter of the optimizer')}", parameter)


def _take_down(
    found: Rehearsed, subject: Subject, names: Mapping[int, str], recorder: Recorder, output: Output
) -> None:
    """What a backward pass has left."""
    if not found.losses:
        found.calls_of_first = len(found.record.calls)
    found.losses.append(output.loss.item())
    if isinstance(output.predictions, Tensor):
        found.predictions.append(output.predictions.detach())
    of_model = {id(p) for p in subject.model.parameters()}
    gradients: list[Tensor] = []
    reached: set[str] = set()
    for parameter in _parameters(subject):
        gradient = parameter.grad
        if gradient is not None:
            gradients.append(gradient.coalesce().values() if gradient.is_sparse else gradient)
            recorder.mark(f"the gradient of {names.get(id(parameter), 'a parameter of the optimizer')}", gradient)
            reached |= {names[id(parameter)]} if id(parameter) in names else set()
    found.reached |= reached
    found.reached_each.append(frozenset(reached))
    outside = [p for p in _parameters(subject) if id(p) not in of_model]
    seen = found.orphans or [False] * len(outside)
    found.orphans = [was or p.grad is not None for was, p in zip(seen, outside, strict=True)]
    found.nonzero = found.nonzero or any(bool((gradient != 0).any()) for gradient in gradients)


def _gradients(subject: Subject) -> dict[int, Tensor]:
    """Copies of the gradients that there are, by the ids of their parameters."""
    return {id(p): p.grad.to_dense().clone() for p in _parameters(subject) if p.grad is not None}


def _doubled(own: Mapping[int, Tensor], subject: Subject, scale: float) -> bool:
    """Whether there were gradients before a backward, and to each it has added the same again, times the scale."""
    now = _gradients(subject)
    return (
        now.keys() == own.keys()
        and any(bool((gradient != 0).any()) for gradient in own.values())
        and all(torch.allclose(now[key], gradient * (1 + scale), rtol=1e-3) for key, gradient in own.items())
    )


def _parameters(subject: Subject) -> Iterator[Tensor]:
    """The model's and the optimizer's, each once."""
    held = [p for group in subject.optimizer.param_groups for p in group["params"]]
    yield from {id(p): p for p in (*subject.model.parameters(), *held)}.values()


def evaluate(subject: Subject, batch: Any, names: Mapping[int, str]) -> Rehearsed:
    """The step on one batch as a validation makes it; the metrics take in what it returns, in copies."""
    found = Rehearsed()
    batch = mover(subject.device)(copied_batch(batch))
    context = autocast(subject.precision, subject.device) or contextlib.nullcontext()
    with evaluating(subject.model):
        try:
            with Recorder(found.record, names, {id(subject.model)}, batch), context:
                output = as_output(subject.step(subject.model, batch))
            found.losses.append(output.loss.item())
            for name, metric in subject.metrics.items():
                if (twin := _copied_metric(metric, subject.device)) is not None:
                    reset_metric(name, twin)
                    update_metric(name, twin, map_tensors(Tensor.detach, output))
        except Exception as error:
            found.error = error
    return found


def _copied_metric(metric: Metric, device: torch.device) -> Metric | None:
    try:
        twin = copy.deepcopy(metric)
    except Exception:  # whatever its parts raise; one that cannot be copied is left alone
        return None
    return twin.to(device) if isinstance(twin, nn.Module) else twin


def names_of(*models: nn.Module) -> dict[int, str]:
    """The names of the modules and parameters of several models, by their ids."""
    found: dict[int, str] = {}
    for model in models:
        for name, module in _uncompiled(model).named_modules():
            found.setdefault(id(module), name)
        for name, parameter in _uncompiled(model).named_parameters():
            found.setdefault(id(parameter), name)
    return found
