"""Which device a run is on, and how batches get there."""

from __future__ import annotations

import copy
import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright.errors import ConfigError, nearest

_TYPES = re.compile(r"Expected one of (.+) device type at start of device string")  # torch's words
# What people call them. ROCm's are called cuda too.
_OTHERS = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "apple": "mps", "metal": "mps", "tpu": "xla"}
_BEST = 'device="auto" takes the best of "cuda", "mps" and "cpu" that there is'


def resolve_device(device: torch.device | str) -> torch.device:
    """The device meant: ``"auto"`` is the CUDA device, else Apple's, else the CPU.

    Raises:
        ConfigError: There is no such device, or this machine does not have it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise ConfigError(
                f"device={device!r} cannot be trained on",
                why="its tensors have shapes, and no values",
                fix=_BEST,
            )
        # An index makes "cuda" comparable with the device of a tensor, which always has one.
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        if isinstance(device, str) and (known := _TYPES.search(str(error))) is not None:
            raise _no_such_device(device, known[1].split(", ")) from error
        raise _not_there(device, str(error).splitlines()[0]) from error
    return found


def _not_there(device: object, said: str) -> ConfigError:
    called, why, meant = device.strip() if isinstance(device, str) else device, said, ""
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        why = "it must be the name of a device, or a torch.device"
    elif isinstance(called, str) and called.isdecimal():
        why, meant = "it names no kind of device", f"did you mean 'cuda:{called}'? "
    elif isinstance(called, str) and called != device:
        why, meant = "there is a blank in it", f"did you mean {called!r}? "
    elif "'aten::" in said:  # torch has a name for it, and nothing behind it
        why, meant = "this torch is built without it", "did you mean 'cuda'? " * (called == "hip")
    return ConfigError(
        f"device={device!r} is not available here",
        why=textwrap.shorten(why, 160, placeholder=" ..."),
        fix=meant + _BEST,
    )


def _no_such_device(device: str, known: list[str]) -> ConfigError:
    called = device.partition(":")[0].rstrip("0123456789").lower()
    close = nearest(_OTHERS.get(called, called), known)
    return ConfigError(
        f"device={device!r} is not available here",
        why="no device of torch's is called so",
        fix=f"{close} " * bool(close) + _BEST,
    )


def place(model: nn.Module, optimizer: Optimizer, others: Iterable[object], device: torch.device) -> None:
    """Bring a model, its optimizer's state, and whatever modules there are among ``others`` to a device.

    Raises:
        ConfigError: One of them is on the meta device, and holds nothing.
    """
    if any(tensor.device != device for tensor in _tensors(model)):
        _bring(model, device)
        if optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())  # casts its tensors to the parameters' device
    for other in others:
        if isinstance(other, nn.Module):
            _bring(other, device)


def _bring(module: nn.Module, device: torch.device) -> None:
    try:
        module.to(device)
    except NotImplementedError:
        check_values(module, device)
        raise


def check_values(module: nn.Module, device: torch.device) -> None:
    """Raise ConfigError where something of a module that is to be brought to a device is on the meta device."""
    named = [*module.named_parameters(), *module.named_buffers()]
    if names := [name for name, tensor in named if tensor.is_meta]:
        raise ConfigError(
            f"{', '.join(names[:3])}{' and others' * bool(names[3:])} of {type(module).__name__} "
            f"{'are' if names[1:] else 'is'} on the meta device",
            why="there they have shapes, and no values",
            fix=f'model.to_empty(device="{device.type}"), then give every parameter and buffer its values, by '
            "reset_parameters or load_state_dict, and only then make the optimizer",
        )


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """What ``model.to`` moves. Parameters() and buffers() give the same, and take three times as long to name it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None:
                    yield tensor


def move(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``; the very same object where nothing has to move.

    Args:
        batch: A tensor, anything with ``.to``, or dicts, lists, tuples, named tuples, dataclasses and
            other mappings of these, nested at will. It is not mutated; its types and its other fields
            are kept.
        device: Where to.
    """
    if isinstance(batch, Tensor):
        if batch.device == device:
            return batch
        # Asynchronous from pinned memory; on the way to the CPU it would be read before it arrives.
        return batch.to(device, non_blocking=device.type != "cpu")
    if type(batch) in (tuple, list) and all(isinstance(item, Tensor) and item.device == device for item in batch):
        return batch  # the common case, without the walk
    return map_leaves(lambda leaf: move(leaf, device), batch, device)


def mover(device: torch.device) -> Callable[[Any], Any]:
    """``move`` to that device, quick where a batch on the CPU is to stay there."""
    if device.type != "cpu":
        return lambda batch: move(batch, device)

    def to_cpu(batch: Any) -> Any:
        if type(batch) is list or type(batch) is tuple:
            for item in batch:
                if not isinstance(item, Tensor) or not item.is_cpu:
                    break
            else:
                return batch
        return move(batch, device)

    return to_cpu


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with ``function`` applied to every tensor in it, its structure and types kept."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    return map_leaves(lambda leaf: map_tensors(function, leaf), value)


def map_leaves(function: Callable[[Any], Any], value: Any, device: torch.device | None = None) -> Any:
    """The container with ``function`` applied to its items; the same object where none has changed.

    With a device, whatever has a ``to`` of its own is copied and asked to move itself: the ``to`` of some batch
    classes changes the object in place, and that of a few returns nothing.
    """
    if type(value) is tuple or type(value) is list:
        items = [function(item) for item in value]
        return value if _same(items, value) else type(value)(items)
    if value is None or isinstance(value, (str, bytes, int, float, type)):
        return value
    if device is not None and callable(getattr(value, "to", None)):
        twin = _unshared(value)
        moved = twin.to(device)
        return twin if moved is None else moved
    if isinstance(value, Mapping):
        changed = {key: function(item) for key, item in value.items()}
        return value if _same(changed.values(), value.values()) else _mapping_like(function, value, changed)
    if isinstance(value, (tuple, list)):
        items = [function(item) for item in value]
        if _same(items, value):
            return value
        if isinstance(value, list):
            twin = copy.copy(value)
            twin[:] = items
            return twin
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if dataclasses.is_dataclass(value):
        return _object_like(function, value, [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)])
    return value


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _mapping_like(function: Callable[[Any], Any], value: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return changed
    if isinstance(value, MutableMapping):
        twin = _unshared(value)  # keeps what the class adds: an order, a default factory
        for key, item in changed.items():  # not by update, which some classes refuse
            twin[key] = item
        return twin
    try:
        return type(value)(changed)  # type: ignore[call-arg]  # read-only mappings are built from a dict by habit
    except TypeError:
        twin = _object_like(function, value, [])
        return changed if twin is value else twin


def _object_like(function: Callable[[Any], Any], value: Any, fields: list[str]) -> Any:
    """The object with ``function`` applied to these fields and whatever else it keeps, such as a cached property."""
    names = [*fields, *(name for name in getattr(value, "__dict__", ()) if name not in fields)]
    old = [getattr(value, name) for name in names]
    new = [function(item) for item in old]
    if _same(new, old):
        return value
    twin = copy.copy(value)
    for name, item in zip(names, new, strict=True):
        object.__setattr__(twin, name, item)  # past frozen, and without running __post_init__ again
    return twin


def _unshared(value: Any) -> Any:
    """A copy that shares with the original what it holds, but no dict or list that holds it, however deep."""
    twin = copy.copy(value)
    # A class with a __copy__ of its own knows what may be shared.
    attributes = {} if hasattr(type(value), "__copy__") else getattr(twin, "__dict__", {})
    for place in (twin, attributes):
        items = place.items() if isinstance(place, dict) else enumerate(place) if isinstance(place, list) else ()
        for key, item in list(items):
            if isinstance(item, (dict, list)):
                place[key] = _unshared(item)
    return twin
