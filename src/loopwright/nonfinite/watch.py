"""Watches torch's functions and modules, and follows what is not finite to where it was made."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from loopwright.nonfinite.census import Census, census, span, tensors_in
from loopwright.nonfinite.reasons import CONSTANTS, UNSET, Facts

UNKNOWN = "something that was there before the step"
_NUMBERED = re.compile(r"Backward\d+$")
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
    """

    operation: str
    module: str | None
    kind: str
    line: str | None


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
    """Sees every call of torch's functions, and every module, while it is entered."""

    def __init__(self, model: nn.Module, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._sources = {id(tensor): name for name, tensor in named.items()}
        self._stack: list[nn.Module] = []
        self._since: list[int] = []  # the number when each of them was entered
        self._kept: list[Tensor] = []  # no number of theirs is given to another tensor while they live
        self._events: dict[int, Event] = {}
        self._storages: dict[int, Event] = {}
        self._places: list[tuple[int, int, Place]] = []  # by the numbers that autograd gives to what runs: from, up to
        self._spans: list[tuple[int, int, Place]] = []  # those of the modules; the inner ones come first
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
            numbers = [x for x in args if isinstance(x, float) and not math.isfinite(x)]
            self._saw(name, inputs, written if name == "__setitem__" else returned, was, numbers)
        return returned

    def _span(self, tensor: Tensor) -> tuple[float, float] | None:
        self._busy = True
        try:
            return span(tensor)
        except RuntimeError:
            return None
        finally:
            self._busy = False

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """The modules watched as well."""
        handles = [
            modules.register_module_forward_pre_hook(self._enters),
            modules.register_module_forward_hook(self._leaves, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
                # torch's handle forgets this one, and torch.compile warns of global hooks from then on.
                getattr(modules, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)

    def _enters(self, module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == self._thread:
            self._stack.append(module)
            self._since.append(_next_number())

    def _leaves(self, module: nn.Module, inputs: Any, keywords: Any, returned: Any) -> None:
        if threading.get_ident() == self._thread and module in self._stack:
            self._saw("", [tensor for _, tensor in tensors_in((inputs, keywords), "")], returned)
            place, after = dataclasses.replace(self._place(""), line=None), _next_number()
            left = None
            while left is not module:
                left, first = self._stack.pop(), self._since.pop()
            self._spans.append((first, after, place))

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
            with torch.no_grad():
                outputs = [tensor for _, tensor in tensors_in(returned, "")]
                self._count += 1
                for tensor in outputs:
                    found = census(tensor)
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
            return  # there are no numbers to be read within torch.func's transforms: what they give is seen after
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
        inner = next((m for m in reversed(self._stack) if id(m) in self._names), None)
        outer = self._stack[-1] if self._stack else None
        if inner is not None:
            return Place(name, self._names[id(inner)], type(inner).__name__, _line())
        return Place(name, None, "" if outer is None else type(outer).__name__, _line())

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

    def backward(self, loss: Tensor, parameters: dict[str, nn.Parameter]) -> tuple[Place | None, tuple[str, ...]]:
        """The first operation whose backward goes wrong, and the parameters whose gradients then do."""
        first: list[Any] = []
        nodes, handles = _nodes(loss), []

        def hook_of(node: Any) -> Callable[[Any, Any], None]:
            def look(inward: Any, outward: Any) -> None:
                if not first and _any_bad(inward) and not _any_bad(outward):
                    first.append(node)

            return look

        leaves: list[Tensor] = []
        for node in nodes:
            if (variable := getattr(node, "variable", None)) is not None:
                leaves.append(variable)
            else:
                handles.append(node.register_hook(hook_of(node)))
        try:
            gradients = _gradients(loss, leaves, again=any(isinstance(node, BackwardCFunction) for node in nodes))
        finally:
            for handle in handles:
                handle.remove()
        found = {id(t) for t, g in zip(leaves, gradients, strict=True) if g is not None and census(g) is not None}
        names = tuple(name for name, parameter in parameters.items() if id(parameter) in found)
        return (self._made(first[0]) if first else None), names

    def _made(self, node: Any) -> Place:
        """Where a node was made: by a call that was seen, or else somewhere within a module."""
        number = node._sequence_nr()
        index = bisect.bisect_right(self._places, number, key=lambda row: row[1])
        if index < len(self._places) and self._places[index][0] <= number:
            return self._places[index][2]
        around = [(after - first, place) for first, after, place in self._spans if first <= number < after]
        place = min(around, key=lambda row: row[0], default=(0, Place("", None, "", None)))[1]
        name = node.name().rpartition("::")[2]
        plain = name.removesuffix("Backward")  # of somebody's own class; torch's have a number at the end
        return dataclasses.replace(place, operation=plain if plain != name else _NUMBERED.sub("", name).lower())


def _next_number() -> int:
    """The number that autograd will give to what runs next in this thread."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # torch's stub leaves it out
    return number


def _gradients(loss: Tensor, leaves: Sequence[Tensor], *, again: bool) -> Sequence[Tensor | None]:
    """Those of the leaves, whose own stay as they are.

    Args:
        loss: Where backward starts from.
        leaves: The leaves.
        again: Whether a backward that fails is tried in another way, as a function of somebody's own may ask for:
            checkpointing does, with use_reentrant=True, since it calls backward itself.
    """
    try:
        return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=again)
    except RuntimeError:
        if not again:
            raise
    kept = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient


def _nodes(loss: Tensor) -> list[Any]:
    found: dict[Any, None] = {}
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = None
            left += [following for following, _ in node.next_functions]
    return list(found)


def _any_bad(tensors: Iterable[Tensor | None]) -> bool:
    return any(census(tensor) is not None for tensor in tensors if tensor is not None)


def _storage(tensor: Tensor) -> int:
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
