"""What hooks are called elsewhere, and how their names are misspelt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loopwright.errors import nearest

# Ours, and what Lightning, Keras, transformers, skorch and TNT call the same moment, or the one that comes closest.
# docs/coming-from.md shows a part of it.
_ELSEWHERE = {
    "setup": "on_init_end",
    "on_fit_start": "on_train_start on_train_begin",
    "on_epoch_start": "on_epoch_begin on_train_epoch_start on_train_epoch_begin",
    "on_batch_start": (
        "on_batch_begin on_train_batch_start on_train_batch_begin on_step_begin on_step_start on_train_step_start "
        "on_before_zero_grad"
    ),
    "on_backward_end": "on_after_backward on_grad_computed",
    "on_before_step": "on_before_optimizer_step on_pre_optimizer_step",
    "on_step_end": "on_optimizer_step on_after_optimizer_step",
    "on_batch_end": "on_train_batch_end on_train_step_end on_substep_end",
    "on_eval_start": (
        "on_eval_begin on_validation_start on_validation_begin on_validation_epoch_start on_val_start on_val_begin "
        "on_val_epoch_start on_test_start on_test_begin on_test_epoch_start on_eval_epoch_start"
    ),
    "on_eval_batch_end": (
        "on_validation_batch_end on_val_batch_end on_test_batch_end on_eval_step_end on_prediction_step "
        # Before a batch of an evaluation nothing is called.
        "on_validation_batch_start on_val_batch_start on_test_batch_start on_test_batch_begin on_eval_step_start "
        "on_eval_batch_start on_eval_batch_begin"
    ),
    "on_eval_end": (
        "on_validation_end on_validation_epoch_end on_val_end on_val_epoch_end on_test_end on_test_epoch_end "
        "on_eval_epoch_end on_evaluate"
    ),
    "on_epoch_end": "on_train_epoch_end",
    "on_fit_end": "on_train_end",
    "state_dict": "on_save_checkpoint",
    "load_state_dict": "on_load_checkpoint",
}
ELSEWHERE: Mapping[str, str] = {name: ours for ours, names in _ELSEWHERE.items() for name in names.split()}


def suggestion(name: str, hooks: Iterable[str]) -> str:
    """What was probably meant by a name that is no hook, as a sentence; empty where nothing comes near."""
    if name in ELSEWHERE:
        return f"did you mean {ELSEWHERE[name]!r}?"
    if name.startswith("on_predict"):
        return "predict calls no hook"
    # Other libraries say begin, and an end would be nearer in letters.
    return nearest(name.replace("_begin", "_start"), hooks)


def respelt(name: str, hooks: Iterable[str]) -> str | None:
    """The hook that a name becomes without its underscores and capitals, such as ``setUp`` and ``onEpochEnd``.

    None of a hook itself, and of what is a name of the user's own for all that is known: ``_setup`` is a usual one.
    """
    if name in hooks or name.startswith("_"):
        return None
    return {_bare(hook): hook for hook in hooks}.get(_bare(name))


def _bare(name: str) -> str:
    return name.replace("_", "").lower()
