"""The text of a training loop in plain PyTorch: ``Facts`` in, source code out.

Each function below writes one part of the loop, and is named for the part of ``trainer.py`` that does the same. A line
stands in the text only where its condition holds. What the text says is held to what the trainer does by
``tests/test_explain.py``, bit for bit.
"""

from __future__ import annotations

from loopwright.explaining.batch import (
    moved,
    train_batch,
    validated,
)
from loopwright.explaining.facts import NAN, Facts, Lines
from loopwright.explaining.lines import (
    call,
    device_type,
    function,
    hook,
    indented,
    note,
    quoted,
)
from loopwright.explaining.parts import (
    check_finite,
    check_weights,
    evaluate,
    flat,
    means,
    read,
    size_of,
    to_device,
)


def source(f: Facts) -> str:
    """The module's text, as ``ruff format`` leaves it."""
    parts = [_imports(f), _train(f)]
    if f.validation:
        parts.append(evaluate(f))
    if f.custom_step:
        parts.append(read(f))
    if f.measures:
        parts.append(means())
    if "size_of" in f.size:
        parts.append(size_of())
    if any("to_device(" in line for part in parts for line in part):
        parts.append(to_device())
    if f.nested_metrics and f.validation:
        parts.append(flat())
    if f.policy == "raise":
        parts.append(check_finite())
    if f.policy != "ignore":
        parts.append(check_weights(f))
    return "\n\n\n".join("\n".join(part) for part in parts) + "\n"


def _imports(f: Facts) -> Lines:
    lines = ['"""The loop of a loopwright Trainer in plain PyTorch: the same bits, by itself."""', ""]
    standard = []
    if f.deterministic and f.device.startswith("cuda"):
        standard.append("import os")
    if f.seed is not None:
        standard.append("import random")
    if f.with_sentinel:
        standard.append("from itertools import chain")
    if standard:
        lines += [*standard, ""]
    if f.seed is not None:
        lines.append("import numpy")
    return [*lines, "import torch"]


def _train(f: Facts) -> Lines:
    """``fit``: what holds for the whole run, and the epochs in it."""
    val = {"given": ["val_loader"], "maybe": ["val_loader=None"], None: []}[f.validation]
    arguments = ["model", "optimizer", function(f), "train_loader", *val, *_keywords(f)]
    body = ['"""Train the model in place; what is returned has a row of means for each epoch."""']
    if f.ended:
        body += note("A callback ended the fit, before its own target: the one here is where that was.", 1)
    body += _prepared(f) + _begin(f)
    if f.hooks:
        body += hook(f, "setup", 1) + hook(f, "on_fit_start", 1)
    if f.scaled:
        # What the scaler is for stands where it is used.
        body.append(f"scaler = torch.amp.GradScaler({device_type(f)})")
    body.append("history = []")
    if f.waits:
        body.append("fresh = None  # the newest value that the scheduler has not seen yet")
    if f.by_epochs:
        body += ["step = 0  # optimizer steps made", "for epoch in range(1, epochs + 1):"]
    else:
        body += ["epoch = step = 0", "while step < steps:", "    epoch += 1"]
    body += indented(_train_epoch(f))
    if f.policy != "ignore":
        body.append("check_weights(model)")
    body += hook(f, "on_fit_end", 1)
    if f.saves:
        body += note(f"{', '.join(f.saves)}: a last save, if anything has changed since", 1)
    if f.restored_epoch is not None:
        body += note(f"The fit went back to the weights of epoch {f.restored_epoch} here.", 1)
    elif f.restores:
        body += note(f"{f.restores}: the best weights are put back here", 1)
    body += hook(f, "on_exception", 1, ", where an error is on its way")
    body += hook(f, "teardown", 1, ", last and always, in reverse order")
    body.append("return history")
    return [*call("def train", arguments, ":"), *indented(body)]


def _keywords(f: Facts) -> Lines:
    """The arguments after the ``*``: what has to be given, then the trainer's settings as defaults."""
    found = ["scheduler"] if f.schedule else []
    found += ["metrics"] if f.metrics and f.validation else []
    if not f.fitted:
        found.append("epochs")
    found += [f"epochs={f.epochs}"] if f.fitted and f.epochs is not None else []
    found += [f"steps={f.steps}"] if f.steps is not None else []
    every = f.validate_steps or f.validate_epochs or 1
    found += [f"validate_every={every}"] if f.validate_steps or every > 1 else []
    found += [f"accumulate={f.accumulate}"] if f.windows else []
    if f.clip_norm is not None:
        finite = f.clip_norm < float("inf")
        found.append(f"clip_norm={f.clip_norm!r}" if finite else 'clip_norm=float("inf")')
    found += [f"monitor={quoted(f.monitor)}"] if f.monitor else []
    found += [f"seed={f.seed}"] if f.seed is not None else []
    found += [f"device={quoted(f.device)}"] if f.moves else []
    return ["*", *found] if found else []


def _prepared(f: Facts) -> Lines:
    """``_prepared``: devices, kernels, compilation."""
    lines: Lines = []
    if f.moves:
        lines.append("model.to(device)")
        lines += [f"{name}.to(device)" for name in f.modules if name != "metrics"]
    if f.moves and "metrics" in f.modules and f.validation:
        lines += [
            "for metric in metrics.values():",
            "    if isinstance(metric, torch.nn.Module):",
            "        metric.to(device)",
        ]
    if f.deterministic:
        lines.append("# Only deterministic kernels from here on, in the whole process.")
        if f.device.startswith("cuda"):
            lines.append('os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")')
        lines.append("torch.use_deterministic_algorithms(True)")
        if f.device.startswith("cuda"):
            lines.append("torch.backends.cudnn.deterministic = True")
            lines.append("torch.backends.cudnn.benchmark = False")
    if f.compile == "module":
        lines.append("model.compile()  # in place: parameters and their names stay what they are")
    elif f.compile == "wrapped":
        lines.append("compiled = torch.compile(model)  # it shares the model's parameters")
    return lines


def _begin(f: Facts) -> Lines:
    """``_begin``: seeds, modes, and whose gradients are whose."""
    lines: Lines = []
    if f.seed is not None:
        lines.append("# Everything that a model or a dataset may draw from.")
        lines += ["random.seed(seed)", "numpy.random.seed(seed)", "torch.manual_seed(seed)"]
    if not f.mixed_modes:
        lines.append("model.train()  # dropout is on, and batch norm uses the batch's statistics")
    if f.sorted_out or f.beside:
        lines += [
            'held = [p for group in optimizer.param_groups for p in group["params"]]',
            "held_ids = {id(p) for p in held}",
        ]
    if f.sorted_out:
        lines.append("parameters = [p for p in model.parameters() if id(p) in held_ids]")
    if f.sorted_out and f.foreign:
        lines.append("own_ids = {id(p) for p in model.parameters()}")
        lines.append("parameters += [p for p in held if id(p) not in own_ids]")
    if f.beside:
        lines.append("others = [p for p in model.parameters() if id(p) not in held_ids]")
    return lines


def _train_epoch(f: Facts) -> Lines:
    """``_train_epoch``: the batches of one epoch, and what comes at its end."""
    lines = hook(f, "on_epoch_start", 2)
    lines.append(
        "rows = []  # of each batch: what was measured, and its weight" if f.measures else "total, count = 0.0, 0"
    )
    if f.validate_steps:
        lines.append("scores = {}  # of this epoch's latest validation")
    if f.windows:
        lines.append("weights = []  # of the batches in the open window")
    if _endless(f) or _still(f):
        lines.append("before = step")
    batch = "batch" if f.custom_step else "inputs, targets"
    if f.with_sentinel:
        lines += note("The data has no length: that a window stays short shows when it is over, as None.", 2)
        lines.append("for batch in chain(train_loader, [None]):")
    elif f.numbered:
        each = batch if f.custom_step else f"({batch})"
        lines.append(f"for index, {each} in enumerate(train_loader):")
    else:
        lines.append(f"for {batch} in train_loader:")
    return lines + indented(train_batch(f)) + _end_epoch(f)


def _endless(f: Facts) -> bool:
    return not f.by_epochs and f.may_skip


def _still(f: Facts) -> bool:
    """Whether there may be an epoch without a step, after which the learning rate does not move."""
    return f.schedule == "epoch" and f.may_skip


def _end_epoch(f: Facts) -> Lines:
    """What follows an epoch's last batch: its means, its validation, its schedule, its row."""
    if f.measures:
        mean = '**means(rows, "train")'
        lines = [f'row = {{"epoch": epoch, "step": step, {mean}}}']
        if f.policy == "skip":
            lines.append(f'row.setdefault("train/loss", {NAN})  # all was skipped')
    else:
        mean = "total / count"
        lines = []
        if f.weightless or f.policy == "skip":
            lines, mean = [f"mean = total / count if count else {NAN}"], "mean"
        lines.append(f'row = {{"epoch": epoch, "step": step, "train/loss": {mean}}}')
    if f.validate_steps:
        lines.append("row |= scores")
    due: Lines = []
    if f.validate_epochs:
        due += _due_at_epoch(f, "row |= ")
    if f.schedule == "epoch":
        only = "if step != before:  # else every step of the epoch was skipped"
        due += [only, *indented(moved(f))] if _still(f) else moved(f)
    due += hook(f, "on_epoch_end", 2 + (f.steps is not None))
    if due and f.steps is not None and (f.ends_matter or f.hooks):
        lines.append("# Not where the last of the steps has left the epoch half way.")
        remarks = all(line.startswith("#") for line in due)
        lines += due if remarks else [f"if {_whole(f)}:", *indented(due)]
    else:
        lines += due
    lines.append("history.append(row)")
    if f.saves:
        lines += note(f"{', '.join(f.saves)}: a save, where an epoch is due", 2)
    if _endless(f):
        condition = "step == before and scaler.get_scale() < 1" if f.scaled else "step == before"
        lines.append(f"if {condition}:")
        lines.append('    raise FloatingPointError(f"every step of epoch {epoch} was skipped")')
    if f.by_epochs and f.steps is not None:
        lines += ["if step == steps:", "    break"]
    return lines


def _whole(f: Facts) -> str:
    """The condition under which an epoch's data was gone through before the steps were enough."""
    if f.with_sentinel:
        return "step < steps or batch is None"
    return "step < steps or index + 1 == len(train_loader)" if f.sized else "step < steps"


def _due_at_epoch(f: Facts, assign: str) -> Lines:
    """The validation at the end of an epoch."""
    lines = indented(validated(f, assign))
    conditions = ["val_loader is not None"] if f.validation == "maybe" else []
    if (f.validate_epochs or 1) > 1:
        conditions.append("epoch % validate_every == 0")
    if not conditions:
        return [line.removeprefix("    ") for line in lines]
    return [f"if {' and '.join(conditions)}:", *lines]
