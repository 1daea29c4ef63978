"""Follows gradients that are not finite to where they were made."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from loopwright.nonfinite.census import Census, census
from loopwright.nonfinite.watch import Place, Watch

Maker: TypeAlias = Literal["operation", "own", "module's hook", "tensor's hook", "parameter's hook", "sum"]

_FORMS = frozenset(["t", "transpose", "permute", "view", "unsafeview", "expand", "unsqueeze", "squeeze", "tocopy"])
_NUMBERED = re.compile(r"Backward\d+$")


@dataclass(frozen=True)
class Backward:
    """What made the first gradient that is not finite of finite ones.

    Attributes:
        maker: ``"operation"``: the derivative of one of torch's; ``"own"``: the backward of somebody's own
            ``autograd.Function``; a hook, of a module, of a tensor that an operation gave, or of a parameter; or
            ``"sum"``: several that are finite, whose sum is not.
        place: Where that operation ran; that of the module with the hook.
        found: What is not finite in it.
        parameter: The name of the parameter, where it is that one's gradient.
    """

    maker: Maker
    place: Place
    found: Census
    parameter: str = ""


@dataclass
class _Pass:
    """What is noted while a backward pass runs."""

    first: tuple[Any, Maker, Census] | None = None
    sent: dict[Any, int] = field(default_factory=dict)  # how many gradients each node was sent
    bad: set[Any] = field(default_factory=set)  # the nodes that were sent one which is not finite

    def look(self, node: Any, inward: Sequence[Tensor | None], outward: Sequence[Tensor | None]) -> None:
        if self.first is not None:
            return
        gone = None
        for (following, _), gradient in zip(node.next_functions, inward, strict=False):
            if following is None or gradient is None:
                continue
            self.sent[following] = self.sent.get(following, 0) + 1
            if (found := census(gradient)) is not None:
                self.bad.add(following)
                if _is_weights(following):
                    found = dataclasses.replace(found, length=None)  # its rows are no samples
                gone = gone if gone is not None and gone.length is not None else found
        came = next((found for g in outward if g is not None and (found := census(g)) is not None), None)
        if came is not None and node not in self.bad:  # it was finite when it was sent here
            self.first = (node, "sum" if self.sent.get(node, 0) > 1 else "tensor's hook", came)
        elif came is None and gone is not None:
            self.first = (node, _maker(node), gone)


def backward(watch: Watch, loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> tuple[Backward | None, list[str]]:
    """What made the first gradient that is not finite, and the parameters whose gradients then are not.

    Args:
        watch: Which has seen the forward pass.
        loss: Where backward starts from.
        parameters: Those of the model, by their names.
    """
    nodes, seen = _nodes(loss), _Pass()
    variables = {node: node.variable for node in nodes if getattr(node, "variable", None) is not None}
    handles = [node.register_hook(_hook_of(seen, node)) for node in nodes if node not in variables]
    leaves = list(variables.values())
    try:
        gradients = _gradients(loss, leaves, again=any(isinstance(node, BackwardCFunction) for node in nodes))
    finally:
        for handle in handles:
            handle.remove()
    found = {id(t): c for t, g in zip(leaves, gradients, strict=True) if g is not None and (c := census(g)) is not None}
    names = [name for name, parameter in parameters.items() if id(parameter) in found]
    if seen.first is not None:
        node, maker, what = seen.first
        return Backward(maker, _place(watch, node, maker), what), names
    nowhere = Place("", None, "", None)
    for node, variable in variables.items():
        name = next((n for n in names if parameters[n] is variable), None)
        if name is not None and node not in seen.bad:
            maker = "sum" if seen.sent.get(node, 0) > 1 and not variable._backward_hooks else "parameter's hook"
            return Backward(maker, nowhere, found[id(variable)], name), names
    return None, names


def operation_of(node: Any) -> str:
    """What a node of the graph is the backward of."""
    name = node.name().rpartition("::")[2]
    plain = name.removesuffix("Backward")  # of somebody's own class; torch's have a number at the end
    return str(plain if plain != name else _NUMBERED.sub("", name).lower())


def _hook_of(seen: _Pass, node: Any) -> Any:
    return lambda inward, outward: seen.look(node, inward, outward)


def _is_weights(node: Any) -> bool:
    """Whether it is a leaf, or a leaf in another form or format, as a transposed weight is."""
    while getattr(node, "variable", None) is None:
        following = [n for n, _ in node.next_functions if n is not None]
        if len(following) != 1 or operation_of(node) not in _FORMS:
            return False
        (node,) = following
    return True


def _maker(node: Any) -> Maker:
    if not isinstance(node, BackwardCFunction):
        return "operation"
    own: type = type(node)._forward_cls  # type: ignore[attr-defined]  # torch sets it on the class that it makes
    if own.__name__ == "BackwardHookFunction":
        return "module's hook"
    return "operation" if own.__module__.partition(".")[0] == "torch" else "own"


def _place(watch: Watch, node: Any, maker: Maker) -> Place:
    """Where a node was made; for somebody's own function, with the line of its backward."""
    if maker == "module's hook":
        return dataclasses.replace(watch.made(node, ""), line=None)
    place = watch.made(node, operation_of(node))
    if maker != "own":
        return place
    code = inspect.unwrap(type(node)._forward_cls.backward).__code__
    return dataclasses.replace(place, line=f"{Path(code.co_filename).name}, line {code.co_firstlineno}")


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
