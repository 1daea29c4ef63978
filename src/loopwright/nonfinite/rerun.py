"""Runs one batch's step again under observation, and leaves everything as it was."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopwright.mismatch.layers import shape_of
from loopwright.nonfinite.census import census, same, tensors_in
from loopwright.nonfinite.gradients import Backward, backward
from loopwright.nonfinite.watch import Event, Watch
from loopwright.randomness import RandomState
from loopwright.scopes import scope
from loopwright.step import Output, as_output
from loopwright.weights import plain_module


class Replay:
    """Knows where torch's random generators were as a batch's step began, as far as the step draws from them.

    A copy of a generator's state takes more than half a microsecond. So it is made for the first two batches of each
    epoch, and for the others only where these two differ: where something draws.

    Args:
        device: Of the model. Its generator is looked at, beside the CPU's.

    Attributes:
        due: Whether ``note`` is to be called as the next step begins.
        states: Those of the generators as the newest step began, or None where they were not kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.due: bool = False
        self.states: list[Tensor] | None = None
        self.generators: list[torch.Generator] = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index or 0])
        self._copies = [generator.get_state for generator in self.generators]
        self._seen = 0

    def begin(self, *, wanted: bool) -> None:
        """An epoch begins, or goes on."""
        self.due, self.states, self._seen = wanted, None, 0

    def note(self) -> None:
        """A batch's step begins."""
        before = self.states
        self.states = [copy() for copy in self._copies]
        if self._seen < 2:
            self._seen += 1
            if before is not None and all(map(torch.equal, before, self.states)):
                self.due, self.states = False, None  # nothing draws, so that the generators are where they were


@dataclass(frozen=True)
class Seen:
    """What running a batch again has shown.

    Attributes:
        output: What the step returned, detached.
        loss: Its loss.
        chain: From where it first was not finite to the loss, which itself may be the last; empty where all was finite.
        backward: What made the first gradient that is not finite of finite ones, if anything did.
        gradients: Whether the gradients were computed.
        bad_gradients: The parameters whose gradients are not finite.
        inexact: Why this may not be what happened the first time.
    """

    output: Output
    loss: float
    chain: tuple[Event, ...]
    backward: Backward | None
    gradients: bool
    bad_gradients: list[str]
    inexact: tuple[str, ...]


def run_again(
    step: Callable[[], Any],
    model: nn.Module,
    batch: Any,
    replay: Replay,
    others: Iterable[object] = (),
    *,
    with_backward: bool,
) -> Seen:
    """Run a step once more from where torch's random generators were, and watch every operation.

    Weights, buffers, gradients, generators, modes and the modules' own attributes are what they were when this
    returns or raises. What the step raises comes through.

    Args:
        step: Calls the step with its model and batch, under the run's precision.
        model: The model.
        batch: The batch, on its device.
        replay: Where the generators were.
        others: Further modules that the step may call, such as the loss.
        with_backward: Whether to compute gradients as well, where the loss is finite.
    """
    model = plain_module(model)
    named: dict[str, Tensor] = dict(tensors_in(batch, "batch"))
    named.update({f"parameter {name}": p for name, p in model.named_parameters(remove_duplicate=False)})
    named.update({f"buffer {name}": b for name, b in model.named_buffers(remove_duplicate=False)})
    modules = [*model.modules(), *(m for other in others if isinstance(other, nn.Module) for m in other.modules())]
    lost: list[str] = []
    with _untouched(modules, replay, lost) as moved, warnings.catch_warnings(), _eagerly():
        warnings.simplefilter("ignore")
        watch = Watch(model, named, modules)
        before, versions = moved(), [_version(tensor) for _, tensor in tensors_in(batch, "")]
        with watch.hooks(), watch:
            output = as_output(step())
        inexact = _inexact(model, before, moved(), replay)
        if versions != [_version(tensor) for _, tensor in tensors_in(batch, "")]:
            lost.append("the step writes to its batch, which is as the first run has left it")
        loss, made, bad = output.loss, None, list[str]()
        chain = () if census(loss) is None else watch.chain(loss)
        computed = with_backward and not chain and loss.requires_grad
        if computed:
            made, bad = backward(watch, loss, dict(model.named_parameters()))
        output, number = output.detached(), float(loss.detach())
    return Seen(output, number, chain, made, computed, bad, (*inexact, *lost))


def _version(tensor: Tensor) -> int:
    """How often it was written to."""
    return -1 if tensor.is_inference() else tensor._version


def _eagerly() -> contextlib.AbstractContextManager[object]:
    """What is compiled runs as it is written; without the compiler's import, which takes seconds, nothing is."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    eagerly: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eagerly


@scope
def _untouched(modules: Iterable[nn.Module], replay: Replay, lost: list[str]) -> Generator[Callable[[], _Moved]]:
    """Everything put back at the end; gives a look at what has moved. What cannot be put back is told in ``lost``."""
    modules = list({id(m): m for m in modules}.values())
    now = RandomState.capture()
    plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(held, dict(held)) for m in plain for held in (vars(m), m._buffers)]
    parameters = [p for m in modules for p in m.parameters(recurse=False) if not is_lazy(p)]
    buffers = {id(b): b for m in modules for b in m.buffers(recurse=False) if not is_lazy(b)}
    copies = [(t, t.detach().clone()) for t in (*parameters, *buffers.values())]
    gradients = [(p, p.grad) for p in parameters]
    enabled = torch.is_grad_enabled()
    try:
        for parameter in parameters:
            parameter.grad = None
        for module in plain:
            module._compiled_call_impl = None
        for generator, state in zip(replay.generators, replay.states or (), strict=False):
            generator.set_state(state)
        yield lambda: _Moved(RandomState.capture(), copies)
    finally:
        torch.set_grad_enabled(enabled)
        now.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for held, before in attributes:
            for name in held.keys() - before.keys():
                del held[name]
            held.update(before)
        for tensor, copy in copies:
            try:
                _put_back(tensor, copy)
            except RuntimeError as problem:  # the others are to be put back all the same
                lost.append(f"a tensor of shape {shape_of(copy)} could not be put back: {problem}")


def _put_back(tensor: Tensor, copy: Tensor) -> None:
    """A tensor's values are what they were. One that was not written to is left alone."""
    if same(tensor.detach(), copy):
        return
    target = tensor.data
    if copy.layout == torch.strided and not copy.is_nested and target.shape == copy.shape:
        for dimension, stride in enumerate(target.stride()):
            if stride == 0 and target.shape[dimension] > 1:  # expanded: one number stands for all, and takes one write
                target, copy = target.narrow(dimension, 0, 1), copy.narrow(dimension, 0, 1)
    target.copy_(copy)


@dataclass(frozen=True)
class _Moved:
    random: RandomState
    copies: list[tuple[Tensor, Tensor]]

    def changed(self) -> set[int]:
        return {id(tensor) for tensor, copy in self.copies if not same(tensor.detach(), copy)}


def _inexact(model: nn.Module, before: _Moved, after: _Moved, replay: Replay) -> tuple[str, ...]:
    """Why the second run may not be what the first was."""
    found = []
    a, b = before.random, after.random
    if a.python != b.python:
        found.append("the step draws from python's random, whose state was not kept")
    if any(not bool((x == y).all()) if hasattr(x, "all") else x != y for x, y in zip(a.numpy, b.numpy, strict=True)):
        found.append("the step draws from numpy.random, whose state was not kept")
    drawn = not torch.equal(a.torch_cpu, b.torch_cpu) or not all(map(torch.equal, a.torch_cuda, b.torch_cuda))
    if drawn and replay.states is None:
        found.append("the step draws from torch's generator, whose state was not kept for this batch")
    changed = after.changed()
    written = [
        name
        for module_name, module in model.named_modules()
        if not (module.training and isinstance(module, nn.modules.batchnorm._NormBase))  # written there, and not read
        for name, buffer in module.named_buffers(module_name, recurse=False)
        if id(buffer) in changed
    ]
    if written:
        found.append(f"the step writes to buffers, which are as the first run has left them: {', '.join(written[:3])}")
    if next(model.parameters()).device.type != "cpu":
        found.append("kernels of an accelerator may add in another order each time")
    return tuple(found)
