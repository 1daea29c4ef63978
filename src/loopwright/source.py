"""The text of a training loop in plain PyTorch: ``Facts`` in, source code out.

Each function below writes one part of the loop, and is named for the part of ``trainer.py`` that does the same. A line
stands in the text only where its condition holds. What the text says is held to what the trainer does by
``tests/test_explain.py``, bit for bit.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loopwright.guard import NonFinitePolicy
from loopwright.layout import Layout
from loopwright.precision import Precision

WIDTH = 88  # the line length of an unconfigured ruff, and of black
NAN = 'float("nan")'

Lines = list[str]


@dataclass(frozen=True)
class Facts:
    """All that the text depends on.

    Attributes:
        custom_step: ``step=`` was given, and not ``loss=``.
        measures: The step may return metrics beside the loss.
        ignores: The loss leaves out targets of its ``ignore_index``.
        layout: How a batch is laid out; None where that is not known.
        sized: The training data has a length.
        epochs: The target in epochs; None for none.
        steps: The target in optimizer steps; None for none.
        fitted: Whether these are those of a fit; else ``epochs`` is left to the caller.
        validation: ``"given"``: there is validation data; ``"maybe"``: it is up to the caller.
        validate_steps: Validate every so many optimizer steps.
        validate_epochs: Validate every so many epochs.
        metrics: There are metrics over a validation.
        nested_metrics: One of them computes several values.
        schedule: When the scheduler moves.
        monitor: The metric that it follows.
        accumulate: Batches to an optimizer step.
        clip_norm: The largest norm of the gradients.
        precision: The number format.
        device: Where the model is.
        moves: Whether model and batches have to be brought there.
        modules: What else has to be brought there: ``loss_fn``, ``metrics``.
        policy: What happens to a value that is not finite.
        seed: What the run begins with.
        deterministic: Whether only deterministic kernels may be used.
        compile: ``"module"``: in place; ``"wrapped"``: through a wrapper, which torch's own classes need.
        mixed_modes: Some module of the model in training mode is in eval mode.
        beside: The model has trainable parameters that the optimizer does not hold.
        foreign: The optimizer holds parameters that the model does not have.
        sparse: Gradients may be sparse.
        closure: The optimizer evaluates the loss itself.
        hooks: Hooks to the names of the callbacks that override them; empty where they are not to be shown.
        saves: The callbacks at whose word the loop saves.
        restores: The callback whose best weights the loop puts back.
    """

    custom_step: bool = False
    measures: bool = False
    ignores: bool = False
    layout: Layout | None = None
    sized: bool = True
    epochs: int | None = None
    steps: int | None = None
    fitted: bool = True
    validation: Literal["given", "maybe"] | None = None
    validate_steps: int | None = None
    validate_epochs: int | None = None
    metrics: bool = False
    nested_metrics: bool = False
    schedule: Literal["step", "epoch"] | None = None
    monitor: str | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Precision = "fp32"
    device: str = "cpu"
    moves: bool = False
    modules: tuple[str, ...] = ()
    policy: NonFinitePolicy = "raise"
    seed: int | None = None
    deterministic: bool = False
    compile: Literal["module", "wrapped"] | None = None
    mixed_modes: bool = False
    beside: bool = False
    foreign: bool = False
    sparse: bool = False
    closure: bool = False
    hooks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    saves: Sequence[str] = ()
    restores: str | None = None

    @property
    def by_epochs(self) -> bool:
        """Whether epochs are counted up to a target."""
        return self.epochs is not None or not self.fitted

    @property
    def windows(self) -> bool:
        """Whether several batches make a step."""
        return self.accumulate > 1

    @property
    def weightless(self) -> bool:
        """Whether a batch may count for nothing."""
        return self.custom_step or self.ignores

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled."""
        return self.precision == "fp16"

    @property
    def may_skip(self) -> bool:
        """Whether a window may end without a step."""
        return self.scaled or self.policy == "skip" or (self.windows and self.weightless)

    @property
    def listed(self) -> bool:
        """Whether the losses of a window are kept until its step: for a mean over it, or since they may be dropped."""
        follows = self.schedule == "step" and self.monitor is not None and not self.monitor.startswith("val/")
        return self.windows and (self.policy == "skip" or follows)

    @property
    def with_sentinel(self) -> bool:
        """Whether a last short window shows only when the data is over."""
        return self.windows and not self.sized

    @property
    def numbered(self) -> bool:
        """Whether the batches of an epoch are counted."""
        return self.sized and (self.windows or (self.steps is not None and self.ends_matter))

    @property
    def ends_matter(self) -> bool:
        """Whether anything is done at the end of whole epochs only."""
        return self.schedule == "epoch" or self.validate_epochs is not None

    @property
    def flagged(self) -> bool:
        """Whether it has to be remembered that a batch made a step."""
        return self.validate_steps is not None and (self.windows or self.may_skip)

    @property
    def sorted_out(self) -> bool:
        """Whether the optimizer's parameters have to be told from the model's."""
        used = self.clip_norm is not None or self.windows or (self.policy == "skip" and not self.scaled)
        return used and (self.beside or self.foreign)

    @property
    def weight(self) -> str:
        """The expression for what a batch counts for."""
        if self.windows or self.weightless or self.custom_step:
            return "weight"
        return self.size

    @property
    def size(self) -> str:
        """The expression for a batch's size."""
        layout = self.layout
        if self.custom_step:
            return (layout and layout.size) or "size_of(batch)"
        return (layout and layout.pair_size) or "size_of([inputs, targets])"


def source(f: Facts) -> str:
    """The module's text, as ``ruff format`` leaves it."""
    parts = [_imports(f), _train(f)]
    if f.validation:
        parts.append(_evaluate(f))
    if f.custom_step:
        parts.append(_read(f))
    if f.measures:
        parts.append(_means())
    if "size_of" in f.size:
        parts.append(_size_of())
    if any("to_device(" in line for part in parts for line in part):
        parts.append(_to_device())
    if f.nested_metrics and f.validation:
        parts.append(_flat())
    if f.policy == "raise":
        parts.append(_check_finite())
    if f.policy != "ignore":
        parts.append(_check_weights())
    return "\n\n\n".join("\n".join(part) for part in parts) + "\n"


def _in(lines: Lines) -> Lines:
    """The lines, one level further in."""
    return [line and f"    {line}" for line in lines]


def _note(text: str, level: int) -> Lines:
    """A comment, broken into lines that fit at that level."""
    return textwrap.wrap(text, WIDTH - 4 * level, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _hook(f: Facts, hook: str, level: int, remark: str = "") -> Lines:
    """A comment that says which callbacks' hook runs here."""
    names = f.hooks.get(hook)
    return _note(f"{hook}{remark}: {', '.join(names)}", level) if names else []


def _call(head: str, arguments: Sequence[str], tail: str) -> Lines:
    """A call or a definition, broken as ruff breaks it."""
    if len(line := f"{head}({', '.join(arguments)}){tail}") <= WIDTH:
        return [line]
    if len(line := f"    {', '.join(arguments)}") <= WIDTH:
        return [f"{head}(", line, f"){tail}"]
    return [f"{head}(", *(f"    {argument}," for argument in arguments), f"){tail}"]


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


def _function(f: Facts) -> str:
    return "step_fn" if f.custom_step else "loss_fn"


def _train(f: Facts) -> Lines:
    """``fit``: what holds for the whole run, and the epochs in it."""
    val = {"given": ["val_loader"], "maybe": ["val_loader=None"], None: []}[f.validation]
    arguments = ["model", "optimizer", _function(f), "train_loader", *val, *_keywords(f)]
    body = ['"""Train the model in place; what is returned has a row of means for each epoch."""']
    body += _prepared(f) + _begin(f)
    if f.hooks:
        body += _hook(f, "setup", 1) + _hook(f, "on_fit_start", 1)
    if f.scaled:
        # What the scaler is for stands where it is used.
        body.append(f"scaler = torch.amp.GradScaler({_device_type(f)})")
    body.append("history = []")
    if f.schedule == "step" and (f.monitor or "").startswith("val/"):
        body.append("fresh = None  # the newest value that the scheduler has not seen yet")
    if f.by_epochs:
        body += ["step = 0  # optimizer steps made", "for epoch in range(1, epochs + 1):"]
    else:
        body += ["epoch = step = 0", "while step < steps:", "    epoch += 1"]
    body += _in(_train_epoch(f))
    if f.policy != "ignore":
        body.append("check_weights(model)")
    body += _hook(f, "on_fit_end", 1)
    if f.saves:
        body += _note(f"{', '.join(f.saves)}: a last save, if anything has changed since", 1)
    if f.restores:
        body += _note(f"{f.restores}: the best weights are put back here", 1)
    body += _hook(f, "on_exception", 1, ", where an error is on its way")
    body += _hook(f, "teardown", 1, ", last and always, in reverse order")
    body.append("return history")
    return [*_call("def train", arguments, ":"), *_in(body)]


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
    found += [f"monitor={_quoted(f.monitor)}"] if f.monitor else []
    found += [f"seed={f.seed}"] if f.seed is not None else []
    found += [f"device={_quoted(f.device)}"] if f.moves else []
    return ["*", *found] if found else []


def _quoted(text: str) -> str:
    """The text as a literal, quoted as ruff does."""
    single = repr(text)
    return single if '"' in text or "\\" in single else f'"{text}"'


def _device_type(f: Facts) -> str:
    return "torch.device(device).type" if f.moves else _quoted(f.device.partition(":")[0])


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


def _parameters(f: Facts) -> str:
    return "parameters" if f.sorted_out else "model.parameters()"


def _train_epoch(f: Facts) -> Lines:
    """``_train_epoch``: the batches of one epoch, and what comes at its end."""
    lines = _hook(f, "on_epoch_start", 2)
    lines.append(
        "rows = []  # of each batch: what was measured, and its weight" if f.measures else "total, count = 0.0, 0"
    )
    if f.validate_steps:
        lines.append("scores = {}  # of this epoch's latest validation")
    if f.windows:
        lines.append("weights = []  # of the batches in the open window")
    if _endless(f):
        lines.append("before = step")
    batch = "batch" if f.custom_step else "inputs, targets"
    if f.with_sentinel:
        lines += _note("The data has no length: that a window stays short shows when it is over, as None.", 2)
        lines.append("for batch in chain(train_loader, [None]):")
    elif f.numbered:
        each = batch if f.custom_step else f"({batch})"
        lines.append(f"for index, {each} in enumerate(train_loader):")
    else:
        lines.append(f"for {batch} in train_loader:")
    return lines + _in(_train_batch(f)) + _end_epoch(f)


def _endless(f: Facts) -> bool:
    return not f.by_epochs and f.may_skip


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
        due += _moved(f)
    due += _hook(f, "on_epoch_end", 2 + (f.steps is not None))
    if due and f.steps is not None and (f.ends_matter or f.hooks):
        lines.append("# Not where the last of the steps has left the epoch half way.")
        remarks = all(line.startswith("#") for line in due)
        lines += due if remarks else [f"if {_whole(f)}:", *_in(due)]
    else:
        lines += due
    lines.append("history.append(row)")
    if f.saves:
        lines += _note(f"{', '.join(f.saves)}: a save, where an epoch is due", 2)
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
    lines = _in(_validated(f, assign))
    conditions = ["val_loader is not None"] if f.validation == "maybe" else []
    if (f.validate_epochs or 1) > 1:
        conditions.append("epoch % validate_every == 0")
    if not conditions:
        return [line.removeprefix("    ") for line in lines]
    return [f"if {' and '.join(conditions)}:", *lines]


def _validated(f: Facts, assign: str) -> Lines:
    arguments = ["model" if f.compile != "wrapped" else "compiled", _function(f), "val_loader"]
    arguments += ["metrics"] if f.metrics else []
    arguments += ["device"] if f.moves else []
    lines = [f"{assign}evaluate({', '.join(arguments)})"]
    if f.schedule == "step" and (f.monitor or "").startswith("val/"):
        lines.append(f"fresh = {assign.partition(' ')[0]}[monitor]")
    return lines


def _moved(f: Facts) -> Lines:
    """``_move_schedule``: the learning rate's move."""
    if f.monitor is None:
        return ["scheduler.step()"]
    if f.schedule == "epoch":
        if f.monitor.startswith("val/") and f.validate_epochs != 1:
            return ["if monitor in row:  # it moves only on a fresh value", "    scheduler.step(row[monitor])"]
        return ["scheduler.step(row[monitor])"]
    if f.monitor.startswith("val/"):
        return ["if fresh is not None:", "    scheduler.step(fresh)", "    fresh = None"]
    name = _quoted(f.monitor.removeprefix("train/"))
    if not f.listed:
        return [f"scheduler.step(values[{name}])" if f.measures else "scheduler.step(loss.item())"]
    value = f"v[{name}]" if f.measures else "v"
    return [
        "counted = sum(w for _, w in window)",
        f"mean = sum({value} * w for v, w in window if w) / counted",
        "scheduler.step(mean)",
    ]


def _train_batch(f: Facts) -> Lines:
    """``_train_batch``: the canonical step, with what is due around it."""
    lines = ["stepped = False"] if f.flagged else []
    if f.closure:
        lines += _by_closure(f)
    elif f.with_sentinel:
        unpacked = [] if f.custom_step else ["inputs, targets = batch"]
        lines += ["if batch is not None:", *_in(unpacked + _forward_backward(f, 4))]
        held = "any(weights)" if f.weightless else "weights"
        lines.append(f"if len(weights) == accumulate or (batch is None and {held}):")
        lines += _in(_window_end(f, 4))
    elif f.windows:
        lines += _forward_backward(f, 3)
        lines += ["if len(weights) == size:", *_in(_window_end(f, 4))]
    else:
        lines += _forward_backward(f, 3)
        lines += _optimizer_step(f, 3)
        lines += [] if f.policy == "skip" else _counted(f)
    remark = ", unless the data is over" if f.with_sentinel else ""
    lines += _hook(f, "on_batch_end", 3, remark)
    if f.validate_steps:
        made = "stepped and " if f.flagged else ""
        lines += [f"if {made}step % validate_every == 0:", *_in(_validated(f, "scores = "))]
    if f.saves:
        lines += _note(f"{', '.join(f.saves)}: a save, where a step is due", 3)
    if f.hooks:
        lines += _note("A stop that a callback has ordered takes effect here, after a step.", 3)
    if f.steps is not None:
        lines += ["if step == steps:", "    break"]
    return lines


def _forward_backward(f: Facts, level: int) -> Lines:
    """A batch up to its gradients."""
    lines = _to_device_lines(f) + _hook(f, "on_batch_start", level)
    lines += _zeroed(f)
    lines += _forward(f)
    lines += _weighed(f)
    if f.windows:
        lines.append("weights.append(weight)")
        lines += [f"window.append(({'values' if f.measures else 'loss.item()'}, weight))"] if f.listed else []
        lines += [] if f.policy == "skip" else _counted(f)
    backward = _backward(f, level + 1 if f.windows and f.weightless else level)
    if f.windows and f.weightless:
        one = "" if f.with_sentinel else " or size == 1"
        lines += [f"if weight{one}:  # else nothing in the batch counts"]
        return [*lines, *_in(backward)]
    return lines + backward


def _zeroed(f: Facts) -> Lines:
    """What begins a window."""
    lines = ["optimizer.zero_grad()  # else gradients would add up over batches"]
    if f.beside:
        lines += ["for p in others:", "    p.grad = None  # the optimizer does not know of these"]
    if not f.windows:
        return lines
    lines[0] = "optimizer.zero_grad()  # gradients accumulate from here on"
    if f.with_sentinel:
        lines.append("size = accumulate  # the epoch may end before that")
    else:
        lines += ["# An epoch's last window may be short.", "size = min(accumulate, len(train_loader) - index)"]
    if f.weightless:
        lines.append("first = window_weight = 0")
    if f.policy == "skip":
        lines.append("finite = True")
    if f.listed:
        lines.append("window = []  # what was measured, and what it counts for")
    return ["if not weights:", *_in(lines)]


def _model(f: Facts) -> str:
    return "compiled" if f.compile == "wrapped" else "model"


def _forward(f: Facts) -> Lines:
    """The step: from a batch to a loss."""
    if f.custom_step:
        lines = [f"output = step_fn({_model(f)}, batch)"]
    else:
        lines = [f"loss = loss_fn({_model(f)}(inputs), targets)"]
    return _autocast(f, lines)


def _autocast(f: Facts, lines: Lines) -> Lines:
    if f.precision == "fp32":
        return lines
    dtype = "bfloat16" if f.precision == "bf16" else "float16"
    return [f"with torch.autocast({_device_type(f)}, dtype=torch.{dtype}):", *_in(lines)]


def _weighed(f: Facts) -> Lines:
    """What a batch counts for."""
    if f.custom_step:
        return [f"loss, {'values, ' if f.measures else ''}weight = read(output, batch)"]
    if f.ignores:
        return ["weight = (targets != loss_fn.ignore_index).sum().item()"]
    return [f"weight = {f.size}"] if f.windows else []


def _counted(f: Facts, loss: str = "loss.item()") -> Lines:
    """A batch's part in the epoch's means."""
    if f.measures:
        return ["rows.append((values, weight))"]
    added = [f"total += {loss} * {f.weight}", f"count += {f.weight}"]
    return ["if weight:", *_in(added)] if f.weightless else added


def _backward(f: Facts, level: int) -> Lines:
    """The loss looked at, and its gradients."""
    lines = _checked(f)
    if f.policy == "skip":
        good = ["finite = bool(torch.isfinite(loss))", "if finite:"]
        if f.windows:
            good = ["if not torch.isfinite(loss):", "    finite = False", "else:"]
        return [*good, *_in(_gradients(f, level + 1))]
    return lines + _gradients(f, level)


def _gradients(f: Facts, level: int) -> Lines:
    loss, lines = "loss", Lines()
    if f.windows:
        lines += _note(
            "Each mean gets its share of the window's. The first weight stands for those to come.",
            level,
        )
        if f.weightless:
            lines += ["first = first or weight", "window_weight += weight"]
            if f.custom_step:  # weights that are no whole numbers may miss the size by a bit
                lines.append("divisor = size if weight == first else size * first / weight")
            else:
                lines.append("divisor = size * first / weight if weight else size")
            loss = "(loss / divisor)"
        else:
            loss = "(loss / (size * weights[0] / weight))"
    if f.scaled:
        inner = loss.removeprefix("(").removesuffix(")") if f.windows else loss
        lines += _note("Small gradients would vanish in float16: the loss is scaled.", level)
        return [*lines, f"scaler.scale({inner}).backward()", *_hook(f, "on_backward_end", level)]
    remark = "" if f.windows else "  # fills in .grad, and changes no weight"
    return [*lines, f"{loss}.backward(){remark}", *_hook(f, "on_backward_end", level)]


def _checked(f: Facts, value: str = "loss", words: str = "the loss") -> Lines:
    """An error where a value is not finite."""
    return [f'check_finite("{words}", {value}, step + 1)'] if f.policy == "raise" else []


def _window_end(f: Facts, level: int) -> Lines:
    """The step of a window that is full, or over."""
    step = _optimizer_step(f, level)
    if f.weightless and not f.with_sentinel:
        step = _optimizer_step(f, level + 1)
        step = ["if any(weights) or size == 1:  # else there is nothing to step on", *_in(step)]
        if f.policy == "skip":  # which has to look at the weights in any case
            step = _optimizer_step(f, level)
    elif f.weightless and f.policy != "skip":
        step = ["if any(weights):  # else there is nothing to step on", *_in(_optimizer_step(f, level + 1))]
    return [*step, "weights = []"]


def _optimizer_step(f: Facts, level: int) -> Lines:
    """``_optimizer_step``: gradients averaged and clipped, and the optimizer's step."""
    if f.policy == "skip":
        condition = "finite"
        if f.windows and f.weightless:
            condition += " and any(weights)" if f.with_sentinel else " and (any(weights) or size == 1)"
        lines = [f"if {condition}:", *_in(_averaged_and_clipped(f, level + 1))]
        if f.scaled:
            lines += _in(_scaled_step(f, level + 1))
            # A step that only the scale was too large for is dropped as well.
            return [*lines, "    if not stepped:", "        check_weights(model)", *_or_check()]
        lines += _in(
            [
                f"grads = [p.grad for p in {_parameters(f)} if p.grad is not None]",
                *(["grads = [g.coalesce().values() if g.is_sparse else g for g in grads]"] if f.sparse else []),
                "finite = all(grad.isfinite().all() for grad in grads)",
            ]
        )
        if not (f.windows and f.weightless):
            return [*lines, "if finite:", *_in(["optimizer.step()", *_stepped(f, level + 1)]), *_or_check()]
        lines += ["    if finite:", *_in(_in(["optimizer.step()", *_stepped(f, level + 2)]))]
        return [*lines, "if not finite:", "    check_weights(model)"]
    lines = _averaged_and_clipped(f, level)
    if f.scaled:
        return lines + _scaled_step(f, level)
    return [
        *lines,
        "optimizer.step()" + ("" if f.windows else "  # the only line that changes the weights"),
        *_stepped(f, level),
    ]


def _or_check() -> Lines:
    return ["else:  # with ruined weights every later step would be skipped too", "    check_weights(model)"]


def _averaged_and_clipped(f: Facts, level: int) -> Lines:
    lines: Lines = []
    if f.scaled and (f.windows or f.clip_norm is not None):
        lines.append("scaler.unscale_(optimizer)")
    if f.windows:
        lines += _averaged(f, level)
    lines += _hook(f, "on_before_step", level)
    if f.clip_norm is not None:
        lines += _clipped(f)
    return lines


def _averaged(f: Facts, level: int) -> Lines:
    """The correction by what the window has really come to."""
    if f.custom_step:
        # An even window's share is counted in batches: sums of equal fractions may miss their product by a bit.
        lines = [
            "share = len(weights) / size",
            "if any(weight != first for weight in weights):",
            "    share = window_weight / (size * first)",
        ]
    elif f.ignores:
        zero = "" if f.with_sentinel else " if first else 1"
        lines = [f"share = window_weight / (size * first){zero}"]
    else:
        lines = ["share = sum(weights) / (size * weights[0])"]
    return [
        *lines,
        "if share != 1:  # what was expected of the window was not what came",
        f"    for p in {_parameters(f)}:",
        "        if p.grad is not None:",
        "            p.grad /= share",
    ]


def _clipped(f: Facts) -> Lines:
    call = f"torch.nn.utils.clip_grad_norm_({_parameters(f)}, clip_norm)"
    # Under fp16 an infinite norm is the scaler's to handle.
    if f.policy != "raise" or f.scaled:
        return [call]
    return [f"norm = {call}", *_checked(f, "norm", "the gradients' norm")]


def _scaled_step(f: Facts, level: int) -> Lines:
    return [
        "scale = scaler.get_scale()",
        "scaler.step(optimizer)  # not where a gradient has become infinite",
        "scaler.update()",
        "stepped = scaler.get_scale() >= scale",
        "if stepped:",
        *_in(_stepped(f, level + 1)),
    ]


def _stepped(f: Facts, level: int) -> Lines:
    """``_stepped``: after a step that was made."""
    lines = ["step += 1"]
    if f.flagged and not f.scaled:
        lines.append("stepped = True")
    if f.policy == "skip" and f.windows:
        lines += ["rows += window"] if f.measures else ["for value, weight in window:", *_in(_counted(f, "value"))]
    elif f.policy == "skip":
        lines += _counted(f)
    lines += _hook(f, "on_step_end", level)
    if f.schedule == "step":
        lines += _moved(f)
    return lines


def _by_closure(f: Facts) -> Lines:
    """A batch whose loss the optimizer evaluates itself, several times."""
    lines = _to_device_lines(f) + _hook(f, "on_batch_start", 3)
    if f.beside:
        lines += ["for p in others:", "    p.grad = None  # the optimizer does not know of these"]
    inner = ["optimizer.zero_grad()", *_forward(f), *_weighed(f), *_checked(f), "loss.backward()"]
    inner += _hook(f, "on_backward_end", 4)
    inner += _hook(f, "on_before_step", 4, ", in the first evaluation")
    if f.clip_norm is not None:
        inner += _clipped(f)
    kept = "(values, weight)" if f.measures else f"(loss.item(), {f.weight})"
    inner += [f"evaluations.append({kept})", "return loss.detach()"]
    lines += ["evaluations = []", "", "def closure():", *_in(inner), ""]
    lines += ["optimizer.step(closure)  # it evaluates the loss several times"]
    if f.measures:
        counted = ["values, weight = evaluations[0]", "rows.append((values, weight))"]
    else:
        value, weight = "value, weight = evaluations[0]", "weight"
        counted = [value, f"total += value * {weight}", f"count += {weight}"]
        if f.weightless:
            counted = [value, "if weight:", *_in(counted[1:])]
    lines += counted
    stepped = _stepped(f, 3)
    if f.schedule == "step" and f.monitor and not f.monitor.startswith("val/") and not f.measures:
        stepped = [line.replace("loss.item()", "value") for line in stepped]
    return lines + stepped


def _to_device_lines(f: Facts) -> Lines:
    """``move``: a batch brought to the device, in as few words as its layout allows."""
    if not f.moves:
        return []
    layout = f.layout
    if f.custom_step:
        return _moved_to_device("batch", layout.kind if layout else "other")
    inputs, targets = (layout.inputs, layout.targets) if layout else ("other", "other")
    return _moved_to_device("inputs", inputs) + _moved_to_device("targets", targets)


def _moved_to_device(name: str, kind: str) -> Lines:
    if kind == "tensor":
        return [f"{name} = {name}.to(device)"]
    if kind == "sequence":
        return [f"{name} = [item.to(device) for item in {name}]"]
    if kind == "mapping":
        return [f"{name} = {{key: item.to(device) for key, item in {name}.items()}}"]
    return [f"{name} = to_device({name}, device)"]


def _evaluate(f: Facts) -> Lines:
    """``_evaluate``: one pass over the validation data."""
    arguments = ["model", _function(f), "loader", *(["metrics"] if f.metrics else []), *(["device"] if f.moves else [])]
    body = ['"""The means over a loader, in eval mode and without gradients."""']
    if f.mixed_modes:
        body.append("modes = [(module, module.training) for module in model.modules()]")
    body.append("model.eval()  # dropout is off, and batch norm uses its running statistics")
    body.append("rows = []" if f.measures else "total, count = 0.0, 0")
    if f.metrics:
        body += ["for metric in metrics.values():", "    metric.reset()"]
    body += ["with torch.no_grad():  # nothing is recorded for a backward pass"]
    body += _in(_evaluate_batches(f))
    if f.measures:
        body.append('scores = means(rows, "val")')
    else:
        mean = f"total / count if count else {NAN}" if f.weightless else "total / count"
        body.append(f'scores = {{"val/loss": {mean}}}')
    if f.metrics:
        body.append("for name, metric in metrics.items():")
        flat, single = (
            'scores |= flat(f"val/{name}", metric.compute())',
            'scores[f"val/{name}"] = float(metric.compute())',
        )
        body.append(f"    {flat if f.nested_metrics else single}")
    body += _hook(f, "on_eval_end", 1)
    if f.mixed_modes:
        body += ["model.train()", "for module, training in modes:  # what was frozen in eval mode stays so"]
        body.append("    module.training = training")
    else:
        body.append("model.train()")
    return [*_call("def evaluate", arguments, ":"), *_in([*body, "return scores"])]


def _evaluate_batches(f: Facts) -> Lines:
    lines = _hook(f, "on_eval_start", 2)
    lines.append("for batch in loader:" if f.custom_step else "for inputs, targets in loader:")
    inner = _to_device_lines(f)
    if f.custom_step:
        inner += _autocast(f, ["output = step_fn(model, batch)"])
    elif f.metrics:
        inner += _autocast(f, ["predictions = model(inputs)", "loss = loss_fn(predictions, targets)"])
    else:
        inner += _autocast(f, ["loss = loss_fn(model(inputs), targets)"])
    inner += _weighed(f) if f.weight != "weight" or f.weightless else [f"weight = {f.size}"]
    inner += _counted(f)
    if f.metrics:
        update = "output.predictions, output.targets" if f.custom_step else "predictions, targets"
        inner += ["for metric in metrics.values():", f"    metric.update({update})"]
    inner += _hook(f, "on_eval_batch_end", 3)
    return lines + _in(inner)


def _read(f: Facts) -> Lines:
    """``as_output`` and ``weigh``: what a step's return value says."""
    lines = [
        "def read(output, batch):",
        f'    """A step\'s loss, {"what it measured, " if f.measures else ""}and what its batch counts for."""',
        '    loss = getattr(output, "loss", output)  # a step may return the bare loss',
    ]
    if f.measures:
        lines += [
            '    values = {"loss": loss.item()}',
            '    for name, value in getattr(output, "metrics", {}).items():',
            "        values[name] = float(value)",
        ]
    lines += [
        '    weight = getattr(output, "weight", None)',
        "    if weight is None:",
        f"        weight = {f.size}",
    ]
    return [*lines, f"    return loss, {'values, ' if f.measures else ''}float(weight)"]


def _means() -> Lines:
    """``Averages``."""
    return textwrap.dedent('''\
        def means(rows, prefix):
            """The mean of every value, each batch counting by its weight."""
            sums, weights = {}, {}
            for values, weight in rows:
                for name, value in values.items():
                    value = value * weight if weight else 0.0
                    sums[name] = sums.get(name, 0.0) + value
                    weights[name] = weights.get(name, 0.0) + weight
            found = {}
            for name, weight in weights.items():
                found[f"{prefix}/{name}"] = sums[name] / weight if weight else float("nan")
            return found''').split("\n")


def _size_of() -> Lines:
    """``batch_size``."""
    return textwrap.dedent('''\
        def size_of(batch):
            """The number of samples in a batch: the length of the first tensor in it."""
            if isinstance(batch, torch.Tensor):
                return len(batch) if batch.ndim else 0
            if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
                return int(batch.batch_sizes[0])
            if isinstance(batch, dict):
                batch = batch.values()
            elif not isinstance(batch, (list, tuple)):
                batch = vars(batch).values() if hasattr(batch, "__dict__") else ()
            return next(filter(None, map(size_of, batch)), 0)''').split("\n")


def _to_device() -> Lines:
    """``move``."""
    return textwrap.dedent('''\
        def to_device(batch, device):
            """The batch with every tensor in it on the device."""
            if hasattr(batch, "to"):
                return batch.to(device)
            if isinstance(batch, dict):
                return {key: to_device(item, device) for key, item in batch.items()}
            if isinstance(batch, tuple) and hasattr(batch, "_fields"):
                return type(batch)(*(to_device(item, device) for item in batch))
            if isinstance(batch, (list, tuple)):
                return type(batch)(to_device(item, device) for item in batch)
            if hasattr(batch, "__dict__") and not isinstance(batch, type):
                moved = object.__new__(type(batch))
                for name, item in vars(batch).items():
                    object.__setattr__(moved, name, to_device(item, device))
                return moved
            return batch''').split("\n")


def _flat() -> Lines:
    """``named_scores``."""
    return textwrap.dedent('''\
        def flat(name, computed):
            """What a metric computed: one number, or one for each of its names."""
            if not hasattr(computed, "items"):
                return {name: float(computed)}
            found = {}
            for key, value in computed.items():
                found |= flat(f"{name}/{key}", value)
            return found''').split("\n")


def _check_finite() -> Lines:
    """``Guard.loss`` and ``Guard.norm``."""
    return textwrap.dedent('''\
        def check_finite(name, value, step):
            """Raise an error where a value is NaN or infinite: the weights are still sound."""
            if not torch.isfinite(value):
                raise FloatingPointError(f"{name} is {value.item()} at step {step}")''').split("\n")


def _check_weights() -> Lines:
    """``Guard.parameters``."""
    return textwrap.dedent('''\
        def check_weights(model):
            """Raise an error where a weight has become NaN or infinite."""
            for name, p in model.named_parameters():
                if p.requires_grad and not p.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite any more")''').split("\n")
