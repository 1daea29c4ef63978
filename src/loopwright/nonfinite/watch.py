"""Watches torch's functions and modules, and follows what is not finite to where it was made."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import sys
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from loopwright.nonfinite.census import Census, census, span, tensors_in, unwrapped
from loopwright.nonfinite.reasons import CONSTANTS, UNSET, Facts
from loopwright.scopes import scope

UNKNOWN = "something that the step did not make with torch's functions"
BEFORE, AFTER = "a forward pre-hook", "a forward hook"
_TORCH, _OWN = Path(torch.__file__).parent, Path(__file__).parent.parent
_END = str(Path(__file__).parent / "rerun.py")  # the frame that runs the step; beyond it is what calls fit


@dataclass(frozen=True)
class Place:
    """Where an operation ran.

    Attributes:
        operation: Its name; empty for a module seen only from outside.
        module: The name of the innermost module; empty for the model itself, None outside of it.
        kind: The class of that module, where there is one.
        line: The line of the user's own code, such as ``net.py, line 12``, or None.
        hook: The kind of the module's hook that it ran in; empty where it ran in the module itself.
    """

    operation: str
    module: str | None
    kind: str
    line: str | None
    hook: str = ""


@dataclass(eq=False)
class Event:
    """An operation, or a module seen from outside, that gave something which is not finite.

    Attributes:
        order: Its number in the row of all operations.
        facts: The operation, and what went in.
        place: Where it ran.
        found: What is not finite in its output.
        parents: The events whose output went in.
        sources: What else went in that is not finite, by its name: a part of the batch, a parameter, a buffer, or a
            number written down, which has no census.
    """

    order: int
    facts: Facts
    place: Place
    found: Census
    parents: list[Event] = field(default_factory=list)
    sources: dict[str, Census | None] = field(default_factory=dict)


def is_constant(event: Event) -> bool:
    """Whether its infinities are what somebody wrote down."""
    return event.facts.operation in CONSTANTS and not event.found.nan


class Watch(TorchFunctionMode):
    """Sees every call of torch's functions, and every module, while it is entered.

    Args:
        model: The model.
        named: What is known by a name: parts of the batch, parameters, buffers.
        others: Further modules whose own hooks are to be told from what they do, such as the loss.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, Tensor], others: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._modules = list({id(m): m for m in (*model.modules(), *others)}.values())
        self._sources = {id(tensor): name for name, tensor in named.items()}
        # What is made of parameters and buffers alone: its rows are no samples.
        self._of_weights = {id(t): t for m in self._modules for t in (*m.parameters(), *m.buffers())}
        self._stack: list[nn.Module] = []
        self._since: list[int] = []  # the number when each of them was entered
        self._in_hook: list[str] = []  # the kind of its own hooks that each is in
        self._prehooked: set[int] = set()  # those with pre-hooks of their own
        self._hooked: set[int] = set()  # those with forward hooks of their own
        self._kept: list[Tensor] = []  # no number of theirs is given to another tensor while they live
        self._events: dict[int, Event] = {}
        self._storages: dict[int, Event] = {}
        self._places: list[tuple[int, int, Place]] = []  # by the numbers that autograd gives to what runs: from, up to
        self._spans: list[tuple[int, int, Place]] = []  # those of the modules; the inner ones come first
        self._left: list[tuple[int, Place]] = []  # the number when a module with backward hooks was left
        self._count = 0
        self._busy = False
        self._thread = threading.get_ident()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._busy or threading.get_ident() != self._thread:
            return func(*args, **(kwargs or {}))
        name = str(getattr(func, "__name__", func))
        inputs = [tensor for _, tensor in tensors_in((args, kwargs or {}), "")]
        written = inputs[0] if inputs and (name.endswith("_") or name == "__setitem__") else None  # in place
        was = None if written is None else self._span(written)
        first = _next_number()
        returned = func(*args, **(kwargs or {}))
        if (after := _next_number()) > first:
            self._places.append((first, after, self._place(name)))
        if name not in UNSET:
            if inputs and all(id(tensor) in self._of_weights for tensor in inputs):
                self._of_weights.update((id(made), made) for _, made in tensors_in(returned, ""))
            given = (*args, *(kwargs or {}).values())
            numbers = [x for x in given if isinstance(x, float) and not math.isfinite(x)]
            self._saw(name, inputs, written if name == "__setitem__" else returned, was, numbers)
        return returned

    def _span(self, tensor: Tensor) -> tuple[float, float] | None:
        self._busy = True
        try:
            with _past_transforms():
                return span(tensor)
        except RuntimeError:
            return None
        finally:
            self._busy = False

    @scope
    def hooks(self) -> Generator[None]:
        """The modules watched as well."""
        handles = [
            modules.register_module_forward_pre_hook(self._enters),
            modules.register_module_forward_hook(self._leaves, with_kwargs=True, always_call=True),
        ]
        # These run before a module's own hooks, and those after them: in between its own are at work.
        for module in self._modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if module._forward_pre_hooks:
                self._prehooked.add(id(module))
                handles.append(module.register_forward_pre_hook(self._begins))
            if module._forward_hooks:
                self._hooked.add(id(module))
                handles.append(module.register_forward_hook(self._is_left, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
                # torch's handle forgets this one, and torch.compile warns of global hooks from then on.
                getattr(modules, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)

    def _enters(self, module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._stack.append(module)
        self._since.append(_next_number())
        self._in_hook.append(BEFORE if id(module) in self._prehooked else "")
        if id(module) not in self._names:
            for name, parameter in module.named_parameters(recurse=False):
                what = f"parameter {name} of a {type(module).__name__} outside of the model"
                self._sources.setdefault(id(parameter), what)

    def _begins(self, module: nn.Module, inputs: Any) -> None:
        """A module's own pre-hooks are through."""
        if threading.get_ident() == self._thread and self._stack and self._stack[-1] is module:
            self._in_hook[-1] = ""

    def _leaves(self, module: nn.Module, inputs: Any, keywords: Any, returned: Any) -> None:
        """A module's forward is through; its own hooks may follow."""
        if threading.get_ident() == self._thread and module in self._stack:
            self._saw("", [tensor for _, tensor in tensors_in((inputs, keywords), "")], returned)
            if id(module) not in self._hooked:
                self._pop(module)
            elif self._stack[-1] is module:
                self._in_hook[-1] = AFTER

    def _is_left(self, module: nn.Module, inputs: Any, keywords: Any, returned: Any) -> None:
        """A module's own hooks are through as well."""
        if threading.get_ident() == self._thread and module in self._stack:
            self._saw("", [tensor for _, tensor in tensors_in((inputs, keywords), "")], returned)
            self._pop(module)

    def _pop(self, module: nn.Module) -> None:
        place, after = dataclasses.replace(self._place(""), line=None, hook=""), _next_number()
        left = None
        while left is not module:
            left, first = self._stack.pop(), self._since.pop()
            self._in_hook.pop()
        self._spans.append((first, after, place))
        if module._backward_hooks or module._backward_pre_hooks:
            self._left.append((after, place))  # torch runs a function of its own next, which holds them

    def _saw(
        self,
        name: str,
        inputs: list[Tensor],
        returned: Any,
        was: tuple[float, float] | None = None,
        numbers: Sequence[float] = (),
    ) -> None:
        self._busy = True
        try:
            with torch.no_grad(), _past_transforms():
                outputs = [tensor for _, tensor in tensors_in(returned, "")]
                self._count += 1
                for tensor in outputs:
                    found = census(tensor)
                    if found is not None and id(tensor) in self._of_weights:
                        found = dataclasses.replace(found, length=None)
                    if found is None:
                        mended, place = self._events.pop(id(tensor), None), _storage(tensor)
                        if mended is not None and self._storages.get(place) is mended:
                            del self._storages[place]
                    elif not name and id(tensor) not in self._events and (within := self._written(tensor, inputs)):
                        self._events[id(tensor)] = within
                        self._kept.append(tensor)
                    elif name or id(tensor) not in self._events:  # what a module gives is mostly known from within
                        event = self._event(name, inputs, found, tensor, was)
                        event.sources.update({f"the number {number}": None for number in numbers})
                        self._events[id(tensor)] = self._storages[_storage(tensor)] = event
                        self._kept.append(tensor)
        except RuntimeError:
            return  # a kind of tensor whose numbers cannot be read: what is made of it is seen after
        finally:
            self._busy = False

    def _written(self, tensor: Tensor, inputs: list[Tensor]) -> Event | None:
        """The operation that wrote to the memory of what a module gives, through a view of it."""
        place = _storage(tensor)
        if any(_storage(given) == place for given in inputs if id(given) in self._events):
            return None  # it came in as it is
        event = self._storages.get(place)
        return event if event is not None and event.facts.operation else None

    def _event(
        self, name: str, inputs: list[Tensor], found: Census, output: Tensor, was: tuple[float, float] | None
    ) -> Event:
        place = self._place(name)
        event = Event(self._count, Facts(name, bool(found.nan), found.dtype), place, found)
        spans = [] if was is None else [was]
        infinite = False
        for tensor in inputs:
            written = tensor is output  # what went in is there no longer
            before = self._events.get(id(tensor))
            bad = None if written else census(tensor)
            number = None if written else span(tensor)
            if number is not None:
                spans.append(number)
            if before is None and bad is None:
                continue
            infinite = infinite or (bad is not None and bool(bad.above or bad.below))
            source = self._sources.get(id(tensor))
            before = before or (None if source else self._storages.get(_storage(tensor)))
            if before is not None:
                event.parents.append(before)
            else:
                event.sources[source or UNKNOWN] = bad
        low, high = min((s[0] for s in spans), default=None), max((s[1] for s in spans), default=None)
        event.facts = dataclasses.replace(event.facts, low=low, high=high, infinite=infinite)
        return event

    def _place(self, name: str) -> Place:
        inner = next((n for n in reversed(range(len(self._stack))) if id(self._stack[n]) in self._names), None)
        if inner is not None:
            module = self._stack[inner]
            return Place(name, self._names[id(module)], type(module).__name__, _line(), self._in_hook[inner])
        if not self._stack:
            return Place(name, None, "", _line())
        return Place(name, None, type(self._stack[-1]).__name__, _line(), self._in_hook[-1])

    def chain(self, loss: Tensor) -> tuple[Event, ...]:
        """The events that lead to a loss, from the first on; those of one line of descent."""
        event = self._events.get(id(loss)) or self._storages.get(_storage(loss))
        if event is None:  # made past torch's functions: the newest that is known has to do
            event = max(self._events.values(), key=lambda e: e.order, default=None)
        chain: list[Event] = []
        while event is not None and event not in chain:
            chain.append(event)
            nan = bool(event.found.nan)
            event = min(event.parents, key=lambda e: (nan and not e.found.nan, e.order), default=None)
        return tuple(reversed(chain))

    def made(self, node: Any, operation: str) -> Place:
        """Where a node was made: by a call that was seen, or else somewhere within a module.

        Args:
            node: Of the graph.
            operation: What it is the backward of; empty for the function that holds a module's backward hooks.
        """
        number = node._sequence_nr()
        if not operation and (held := [place for after, place in self._left if after == number]):
            return held[-1]
        index = bisect.bisect_right(self._places, number, key=lambda row: row[1])
        if index < len(self._places) and self._places[index][0] <= number:
            return self._places[index][2]
        around = [(after - first, place) for first, after, place in self._spans if first <= number < after]
        place = min(around, key=lambda row: row[0], default=(0, Place("", None, "", None)))[1]
        return dataclasses.replace(place, operation=operation)


def _next_number() -> int:
    """The number that autograd will give to what runs next in this thread."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # torch's stub leaves it out
    return number


def _past_transforms() -> contextlib.AbstractContextManager[object]:
    """Within a transform of torch.func: what is computed here is not part of it, so that it has values."""
    if torch._C._functorch.maybe_current_level() is None:
        return contextlib.nullcontext()
    past: contextlib.AbstractContextManager[object] = torch._C._DisableFuncTorch()
    return past


def _storage(tensor: Tensor) -> int:
    tensor = unwrapped(tensor)
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _line() -> str | None:
    """The innermost line that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _END:
        path = Path(frame.f_code.co_filename)
        outside = not (path.is_relative_to(_TORCH) or path.is_relative_to(_OWN))
        if outside and not path.name.startswith("<frozen") and path.parent.name != "contextlib":
            return f"{path.name}, line {frame.f_lineno}"
        frame = frame.f_back
    return None
