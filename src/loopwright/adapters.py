"""The states of torch's own objects: to plain data and back, looked at before they are taken back."""

from __future__ import annotations

import collections
import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from loopwright.errors import CheckpointError
from loopwright.forms import alike, check_form

State = dict[str, Any]


def plain_state(value: Any) -> Any:
    """A state of torch's own as plain data: dicts of other classes that are in there become dicts."""
    if isinstance(value, dict):
        return {key: plain_state(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_state(item) for item in value)
    return value


def _like(reference: Any, value: Any) -> Any:
    """The value with dicts of the class that ``reference`` has in their place: MultiStepLR holds a Counter."""
    if isinstance(reference, collections.Counter):
        return collections.Counter(value)
    if isinstance(value, dict) and isinstance(reference, dict):
        return {key: _like(reference.get(key), item) for key, item in value.items()}
    if isinstance(value, list) and isinstance(reference, list) and len(value) == len(reference):
        return [_like(a, b) for a, b in zip(reference, value, strict=True)]
    return value


# ---------------------------------------------------------------------------------------------------- schedules


def check_schedule(scheduler: LRScheduler, saved: Any) -> None:
    """Raise CheckpointError unless the state could be one of this scheduler."""
    if type(saved) is not dict:
        raise _other("schedule", f"its state is of type {type(saved).__name__}")
    own = scheduler.state_dict()
    for key, value in saved.items():
        if type(key) is not str or key == "optimizer" or (key not in own and _is_a_part(scheduler, key)):
            raise _other("schedule", f"{str(key)[:40]!r} in its state would take the place of something else")
        fits = key in own and alike(own[key], value) and (value is not None or own[key] is None)
        if _is_torchs(scheduler) and not fits:
            raise _other("schedule", f"{key[:40]!r} in its state does not fit a {type(scheduler).__name__}")
    if _is_torchs(scheduler) and (missing := own.keys() - saved.keys()):
        raise _other("schedule", f"{', '.join(sorted(missing))} is missing in its state")


def _is_a_part(scheduler: LRScheduler, key: str) -> bool:
    """Whether the class has a method, a property or the like of this name: more than a value to begin with."""
    found = inspect.getattr_static(type(scheduler), key, scheduler)
    return callable(found) or hasattr(found, "__get__") or (found is scheduler and hasattr(scheduler, key))


def load_schedule(scheduler: LRScheduler, saved: State) -> None:
    """Give a scheduler its state back."""
    scheduler.load_state_dict(_like(scheduler.state_dict(), saved))


def check_scaler(scaler: torch.amp.GradScaler, saved: Any) -> None:
    """Raise CheckpointError unless the state could be one of this gradient scaler."""
    own = scaler.state_dict()
    if (
        type(saved) is not dict
        or saved.keys() != own.keys()
        or not all(type(saved[key]) in (int, float) and math.isfinite(saved[key]) and saved[key] >= 0 for key in own)
    ):
        raise _other("gradient scaler", "its state is not one")


# --------------------------------------------------------------------------------------------------- optimizers


class _Optimizer(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


def check_optimizer(optimizer: Optimizer, saved: Any) -> None:
    """Raise CheckpointError unless the state could be one of this optimizer.

    Its parameter groups must have the sizes and the kinds of settings that these have. What an optimizer of torch's
    own keeps for each parameter must be what it would make for it afresh, in keys and shapes; that is found out
    on small copies of the parameters. Another optimizer's is its own affair.
    """
    if not _is_torchs(optimizer):
        return
    check_form(saved, _Optimizer, "$.optimizer")
    groups, own_groups = saved["param_groups"], optimizer.param_groups
    if [group.get("params") for group in groups] != _positions([len(group["params"]) for group in own_groups]):
        raise _other("optimizer", "its parameter groups have other sizes")
    parameters = [parameter for group in own_groups for parameter in group["params"]]
    if not saved["state"].keys() <= set(range(len(parameters))):
        raise _other("optimizer", f"it keeps something for a parameter that is not one of the {len(parameters)}")
    for own, theirs in zip(own_groups, groups, strict=True):
        # In this order: to find the class out takes an optimizer of each.
        if _known(own) != _known(theirs) and (found := _class_of(theirs)) not in (None, type(optimizer).__name__):
            raise CheckpointError(
                "the checkpoint is of another optimizer",
                why=f"its settings are those of {found}, and this one is {type(optimizer).__name__}",
                fix=f"{found}, or load_weights(path, model) and no resume, to begin a new run with the old weights",
            )
        if own.get(_DECOUPLED) != theirs.get(_DECOUPLED, own.get(_DECOUPLED)):
            raise CheckpointError(
                "the checkpoint is of another optimizer",
                why=f"its weight decay is {'' if theirs[_DECOUPLED] else 'not '}decoupled from the gradient, as "
                f"{'AdamW' if theirs[_DECOUPLED] else 'Adam'} has it, and here it is the other way",
                fix="the optimizer that the run was begun with",
            )
        for key in own.keys() & theirs.keys() - {"params"}:
            if not alike(own[key], theirs[key]):
                raise _other("optimizer", f"its setting {key} is of another kind")
        for key in own.keys() - theirs.keys():
            if type(own[key]) not in (bool, type(None)):  # such flags torch adds itself
                raise _other("optimizer", f"its setting {key} is missing")
    if isinstance(optimizer, LBFGS):
        _check_lbfgs(saved["state"], sum(parameter.numel() for parameter in parameters))
    else:
        number, samples = 0, dict[Any, State]()
        for own, theirs in zip(own_groups, groups, strict=True):
            for parameter in own["params"]:
                if kept := saved["state"].get(number):
                    of = id(own), _small(parameter), parameter.dtype
                    if of not in samples:
                        samples[of] = _sample(optimizer, own, theirs, parameter)
                    _check_kept(optimizer, samples[of], parameter, kept)
                number += 1


def load_optimizer(optimizer: Optimizer, saved: State) -> None:
    """Give an optimizer its state back, to the bit.

    torch casts what an optimizer keeps to the format of its parameter, but for ``step``, and takes a text for a list.
    Neither is done here to an optimizer that keeps to torch's way of loading.
    """
    optimizer.load_state_dict(saved)
    hooks = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict or any(getattr(optimizer, h) for h in hooks):
        return
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in saved["state"].get(number, {}).items():
            optimizer.state[parameter][key] = _as_saved(optimizer.state[parameter].get(key), value)


def _as_saved(loaded: Any, saved: Any) -> Any:
    """What was saved, where it was loaded to."""
    if isinstance(saved, Tensor):
        same = isinstance(loaded, Tensor) and loaded.dtype is saved.dtype
        return loaded if same else saved.to(getattr(loaded, "device", saved.device), copy=True)
    if isinstance(saved, dict):
        there = loaded if isinstance(loaded, dict) else {}
        return {key: _as_saved(there.get(key), value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        whole = isinstance(loaded, (list, tuple)) and len(loaded) == len(saved)
        return type(saved)([_as_saved(loaded[i] if whole else None, value) for i, value in enumerate(saved)])
    return saved


_DECOUPLED = "decoupled_weight_decay"  # all that tells AdamW's settings from Adam's
_OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def _known(group: Mapping[str, Any]) -> set[str]:
    """The names of a group's settings, without those that schedules add, and flags that come and go with versions."""
    return {key for key in group if key not in _OF_SCHEDULES | _FAST_PATHS | {"params", "maximize"}}


def _class_of(group: Mapping[str, Any]) -> str | None:
    """Which of torch's optimizers has settings of these names, where just one has."""
    found = []
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer:
            of_kind = kind([nn.Parameter(torch.zeros(1, 1))]).defaults  # type: ignore[call-arg]  # all have defaults
            same = _known(of_kind) == _known(group)
            if same and of_kind.get("decoupled_weight_decay") == group.get("decoupled_weight_decay"):
                found.append(name)
    return found[0] if len(found) == 1 else None


def settings_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """What the user has set of both, by names for a message, without what a schedule moves as the run goes on."""
    found: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        moved = {"params"} if scheduler is None else {"params", "lr"}
        moved |= {"momentum", "betas"} if "max_momentum" in group else set()
        of = f" of group {number}" if len(optimizer.param_groups) > 1 else ""
        found |= {f"{key}{of}": value for key, value in group.items() if key not in moved}
    if scheduler is not None:
        state = scheduler.state_dict()
        given = inspect.signature(type(scheduler)).parameters.keys() & state.keys() - {"optimizer", "last_epoch"}
        found |= {f"the schedule's {key}": state[key] for key in sorted(given)}
    plain = {name: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for name, v in found.items()}
    return {name: _plainly(value) for name, value in plain.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, collections.Counter))


def _plainly(value: Any) -> Any:
    if isinstance(value, collections.Counter):
        return sorted(value.elements())
    return list(value) if isinstance(value, tuple) else value


def _positions(sizes: list[int]) -> list[list[int]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _check_kept(optimizer: Optimizer, sample: State, parameter: Tensor, kept: State) -> None:
    name = type(optimizer).__name__
    for key, made in sample.items():
        if key not in kept:
            if isinstance(optimizer, SGD):
                continue  # which takes that for a momentum that has yet to begin
            raise _other("optimizer", f"what it keeps for a parameter lacks the {key} of {name}")
        value = kept[key]
        if isinstance(made, Tensor) and made.dim():
            fits = isinstance(value, Tensor) and value.layout is torch.strided
            fits = fits and value.is_complex() == made.is_complex()
            if fits and made.shape == _small(parameter):
                fits = value.shape == parameter.shape
            elif fits:
                fits = _small(value) == made.shape
        elif made is not None:
            fits = _finite_number(value) if key == "step" else isinstance(value, (int, float)) or _is_scalar(value)
        else:
            fits = value is None or isinstance(value, Tensor)
        if not fits:
            raise _other("optimizer", f"the {key} that it keeps for a parameter does not fit {name}")


_FAST_PATHS = {"foreach", "fused", "capturable", "differentiable"}
_SMALL = 3  # entries along each dimension of the copies that are stepped to see what an optimizer keeps


def _small(tensor: Tensor) -> torch.Size:
    return torch.Size([min(size, _SMALL) for size in tensor.shape])


def _sample(optimizer: Optimizer, own: State, theirs: State, parameter: Tensor) -> State:
    """What the optimizer would keep for a parameter like this one, with the settings of the checkpoint."""
    try:
        return _stepped(optimizer, own | theirs, parameter)
    except Exception as error:
        try:
            _stepped(optimizer, own, parameter)
        except Exception:  # this optimizer cannot be tried out like that, whatever the settings
            return {}
        raise _other("optimizer", f"{type(optimizer).__name__} fails with its settings: {error}"[:300]) from error


def _stepped(optimizer: Optimizer, group: State, parameter: Tensor) -> State:
    # An optimizer with nothing in it, and without the hooks that were put on the other.
    trial = object.__new__(type(optimizer))
    trial.__setstate__({"defaults": optimizer.defaults, "state": {}, "param_groups": []})
    copied = nn.Parameter(torch.zeros(_small(parameter), dtype=parameter.dtype))
    copied.grad = torch.zeros_like(copied)
    if isinstance(optimizer, torch.optim.SparseAdam):
        copied.grad = copied.grad.to_sparse()
    plain = dict.fromkeys(_FAST_PATHS & group.keys(), False)
    settings = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
    kept: collections.defaultdict[Tensor, State] = collections.defaultdict(dict)
    trial.state, trial.param_groups = kept, [settings | plain | {"params": [copied]}]
    trial.step()
    return kept[copied]


def _check_lbfgs(state: Mapping[int, State], size: int) -> None:
    for kept in state.values():
        begun = kept.get("n_iter", 0)
        needed = {"d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"} if begun else set()
        fits = type(begun) is int and needed <= kept.keys() and all(kept[key] is not None for key in needed)
        for key, value in kept.items():
            row = value if type(value) is list else [value]
            wide = key in ("d", "old_dirs", "old_stps", "prev_flat_grad")
            fits = fits and (type(value) is list) == (key in ("old_dirs", "old_stps", "ro", "al"))
            fits = fits and all(
                item is None or (isinstance(item, Tensor) and item.shape == (size,) if wide else _is_scalar(item))
                for item in row
            )
        if not fits:
            raise _other("optimizer", "what it keeps does not fit LBFGS")


def _is_scalar(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, Tensor) and value.numel() == 1)


def _finite_number(value: Any) -> bool:
    return _is_scalar(value) and math.isfinite(value) and value >= 0


def _is_torchs(instance: object) -> bool:
    return f"{type(instance).__module__}.".startswith("torch.optim.")


def _other(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint is of another {what}", why=why, fix=f"the {what} that it was saved from")
