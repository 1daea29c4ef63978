"""``Trainer.explain``: from a trainer's settings, and its latest fit, to the facts that the plain loop depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from loopwright.callback import HOOKS, Callback, comes_last
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.early_stopping import restoring
from loopwright.explaining.facts import Facts
from loopwright.explaining.source import source
from loopwright.layout import PAIRS, Layout
from loopwright.modes import takes_wrapper
from loopwright.settings import Settings
from loopwright.state import Plan, State
from loopwright.step import LossFn


def explain(
    state: State[Any],
    settings: Settings,
    *,
    loss: LossFn | None,
    closure: bool,
    plan: Plan | None,
    layout: Layout | None,
    restored_epoch: int | None,
    callbacks: Mapping[str, Callback[Any]] | None,
) -> str:
    """The source text of the plain PyTorch loop.

    Args:
        state: Model, optimizer, device, and the names that were logged.
        settings: How it is trained.
        loss: The loss function; None where there is a step.
        closure: Whether the optimizer's step takes a closure.
        plan: That of the latest fit; None before any.
        layout: How that one's first batch was laid out.
        restored_epoch: The epoch whose weights that one put back at its end, if it did.
        callbacks: Those whose hooks are to be shown, by their names; None for none.
    """
    return source(
        Facts(
            custom_step=loss is None,
            **_of_data(state, settings, loss, plan, layout),
            **_of_plan(state, settings, plan),
            restored_epoch=restored_epoch,
            **_of_model(state, settings, loss),
            closure=closure,
            accumulate=settings.accumulate,
            clip_norm=settings.clip_norm,
            precision=settings.precision,
            policy=settings.on_nonfinite,
            seed=settings.seed,
            deterministic=settings.deterministic,
            **_of_callbacks(callbacks),
        )
    )


def _of_data(
    state: State[Any], settings: Settings, loss: LossFn | None, plan: Plan | None, layout: Layout | None
) -> dict[str, Any]:
    """What the data and the step are like: as the latest fit has shown, or as the documentation has it."""
    if layout is None and loss is not None:
        layout = PAIRS
    by_metrics = {f"val/{name}" for name in settings.metrics}
    names = [name for name in state.metrics if name.startswith(("train/", "val/"))]
    measured = [
        n for n in names if not n.endswith("/loss") and not any(f"{n}/".startswith(f"{m}/") for m in by_metrics)
    ]
    classes = layout is not None and layout.targets == "tensor" and not layout.floating_targets
    return {
        "layout": layout,
        "measures": loss is None and (plan is None or bool(measured) or not names),
        "ignores": loss is not None and classes and getattr(loss, "ignore_index", None) is not None,
        "sized": plan is None or plan.batches is not None,
        "metrics": bool(settings.metrics),
        "nested_metrics": any(
            isinstance(metric, nn.ModuleDict) or any(f"/{name}/" in logged for logged in state.metrics)
            for name, metric in settings.metrics.items()
        ),
    }


def _of_plan(state: State[Any], settings: Settings, plan: Plan | None) -> dict[str, Any]:
    """Targets, validation and schedule. Where a callback has ended the fit, the target is where it did."""
    schedule = settings.schedule
    monitor = None if schedule is None else schedule.monitor
    found: dict[str, Any] = {"schedule": None if schedule is None else schedule.each, "monitor": monitor}
    if plan is None:
        needed = monitor is not None and monitor.startswith("val/")
        return found | {"fitted": False, "validation": "given" if needed else "maybe", "validate_epochs": 1}
    progress, ended = state.progress, state.stop_reason is not None
    if ended:
        whole = progress.batch == 0
        plan = replace(plan, epochs=progress.epoch if whole else None, steps=None if whole else progress.step)
    found |= {"epochs": plan.epochs, "steps": plan.steps, "ended": ended}
    if plan.validate is None:
        return found
    return found | {
        "validation": "given",
        "validate_steps": plan.validate.steps,
        "validate_epochs": plan.validate.epochs,
    }


def _of_model(state: State[Any], settings: Settings, loss: LossFn | None) -> dict[str, Any]:
    """Device, modes, compilation, and which parameters are whose."""
    model, device = state.model, state.device
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    away = any(tensor.device != device for tensor in (*model.parameters(), *model.buffers()))
    compiles = settings.compile and model._compiled_call_impl is None
    modules = ["loss_fn"] if isinstance(loss, nn.Module) else []
    modules += ["metrics"] if any(isinstance(metric, nn.Module) for metric in settings.metrics.values()) else []
    return {
        "device": str(device),
        "moves": device.type != "cpu" or away,
        "modules": tuple(modules),
        "compile": None if not compiles else "wrapped" if takes_wrapper(model) else "module",
        "mixed_modes": model.training and not all(module.training for module in model.modules()),
        "beside": any(p.requires_grad and id(p) not in held for p in model.parameters()),
        "foreign": not held <= own,
        "lazy": any(is_lazy(p) for p in model.parameters()),
        "sparse": any(getattr(module, "sparse", False) is True for module in model.modules()),
    }


def _of_callbacks(callbacks: Mapping[str, Callback[Any]] | None) -> dict[str, Any]:
    """Which callbacks override which hooks, and what the loop does at their word."""
    if callbacks is None:
        return {}
    stopper = restoring(tuple(callbacks.values()))
    hooks = {hook: _callers(callbacks, hook) for hook in HOOKS}
    return {
        "hooks": {hook: names for hook, names in hooks.items() if names},
        "saves": [name for name, callback in callbacks.items() if isinstance(callback, Checkpoint)],
        "restores": next((name for name, callback in callbacks.items() if callback is stopper), None),
    }


def _callers(callbacks: Mapping[str, Callback[Any]], hook: str) -> list[str]:
    """The names of those that override the hook, in the order in which they are called."""
    overriding = [name for name, callback in callbacks.items() if _overrides(callback, hook)]
    return sorted(overriding, key=lambda name: comes_last(callbacks[name], hook))


def _overrides(callback: Callback[Any], hook: str) -> bool:
    method = getattr(callback, hook)
    return getattr(method, "__func__", method) is not getattr(Callback, hook)
