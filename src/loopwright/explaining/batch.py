"""The text of one batch of the plain loop: up to its gradients, and the optimizer's step."""

from __future__ import annotations

from loopwright.explaining.facts import Facts, Lines
from loopwright.explaining.lines import (
    autocast,
    call,
    checked,
    counted,
    function,
    hook,
    indented,
    model,
    note,
    parameters,
    quoted,
    to_device_lines,
    weighed,
)


def validated(f: Facts, assign: str) -> Lines:
    """A validation; ``assign`` is what is done with its scores."""
    arguments = ["model" if f.compile != "wrapped" else "compiled", function(f), "val_loader"]
    arguments += ["metrics"] if f.metrics else []
    arguments += ["device"] if f.moves else []
    lines = [f"{assign}evaluate({', '.join(arguments)})"]
    if f.waits:
        lines.append(f"fresh = {assign.partition(' ')[0]}[monitor]")
    return lines


def moved(f: Facts) -> Lines:
    """``_move_schedule``: the learning rate's move."""
    if f.monitor is None:
        return ["scheduler.step()"]
    if f.schedule == "epoch" and not f.waits:
        if f.monitor.startswith("val/") and f.validate_epochs != 1:
            return ["if monitor in row:  # it moves only on a fresh value", "    scheduler.step(row[monitor])"]
        return ["scheduler.step(row[monitor])"]
    if f.waits:
        return ["if fresh is not None:", "    scheduler.step(fresh)", "    fresh = None"]
    name = quoted(f.monitor.removeprefix("train/"))
    if not f.listed:
        return [f"scheduler.step(values[{name}])" if f.measures else "scheduler.step(loss.item())"]
    value = f"v[{name}]" if f.measures else "v"
    return [
        "counted = sum(w for _, w in window)",
        f"mean = sum({value} * w for v, w in window if w) / counted",
        "scheduler.step(mean)",
    ]


def train_batch(f: Facts) -> Lines:
    """``_train_batch``: the canonical step, with what is due around it."""
    lines = ["stepped = False"] if f.flagged else []
    if f.closure:
        lines += _by_closure(f)
    elif f.with_sentinel:
        unpacked = [] if f.custom_step else ["inputs, targets = batch"]
        lines += ["if batch is not None:", *indented(unpacked + _forward_backward(f, 4))]
        held = "any(weights)" if f.weightless else "weights"
        lines.append(f"if len(weights) == accumulate or (batch is None and {held}):")
        lines += indented(_window_end(f, 4))
    elif f.windows:
        lines += _forward_backward(f, 3)
        lines += ["if len(weights) == size:", *indented(_window_end(f, 4))]
    else:
        lines += _forward_backward(f, 3)
        lines += _optimizer_step(f, 3)
        lines += [] if f.policy == "skip" else counted(f)
    remark = ", unless the data is over" if f.with_sentinel else ""
    lines += hook(f, "on_batch_end", 3, remark)
    if f.validate_steps:
        made = "stepped and " if f.flagged else ""
        lines += [f"if {made}step % validate_every == 0:", *indented(validated(f, "scores = "))]
    if f.saves:
        lines += note(f"{', '.join(f.saves)}: a save, where a step is due", 3)
    if f.hooks:
        lines += note("A stop that a callback has ordered takes effect here, after a step.", 3)
    if f.steps is not None:
        lines += ["if step == steps:", "    break"]
    return lines


def _forward_backward(f: Facts, level: int) -> Lines:
    """A batch up to its gradients."""
    lines = to_device_lines(f) + hook(f, "on_batch_start", level)
    lines += _zeroed(f)
    lines += _forward(f)
    lines += weighed(f)
    if f.windows:
        lines.append("weights.append(weight)")
        lines += ["first = first or weight", "window_weight += weight"] if f.weightless else []
        lines += [f"window.append(({'values' if f.measures else 'loss.item()'}, weight))"] if f.listed else []
        lines += [] if f.policy == "skip" else counted(f)
    backward = _backward(f, level + 1 if f.windows and f.weightless else level)
    if f.windows and f.weightless:
        one = "" if f.with_sentinel else " or size == 1"
        lines += [f"if weight{one}:  # else nothing in the batch counts"]
        return [*lines, *indented(backward)]
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
    return ["if not weights:", *indented(lines)]


def _forward(f: Facts) -> Lines:
    """The step: from a batch to a loss."""
    if f.custom_step:
        lines = [f"output = step_fn({model(f)}, batch)"]
    else:
        lines = [f"loss = loss_fn({model(f)}(inputs), targets)"]
    return autocast(f, lines)


def _backward(f: Facts, level: int) -> Lines:
    """The loss looked at, and its gradients."""
    lines = checked(f)
    if f.policy == "skip":
        good = ["finite = bool(torch.isfinite(loss))", "if finite:"]
        if f.windows:
            good = ["if not torch.isfinite(loss):", "    finite = False", "else:"]
        return [*good, *indented(_gradients(f, level + 1))]
    return lines + _gradients(f, level)


def _gradients(f: Facts, level: int) -> Lines:
    loss, lines = "loss", Lines()
    if f.windows:
        lines += note(
            "Each mean gets its share of the window's. The first weight stands for those to come.",
            level,
        )
        if f.weightless:
            if f.custom_step:  # weights that are no whole numbers may miss the size by a bit
                lines.append("divisor = size if weight == first else size * first / weight")
            else:
                lines.append("divisor = size * first / weight if weight else size")
            loss = "(loss / divisor)"
        else:
            loss = "(loss / (size * weights[0] / weight))"
    if f.scaled:
        inner = loss.removeprefix("(").removesuffix(")") if f.windows else loss
        lines += note("Small gradients would vanish in float16: the loss is scaled.", level)
        return [*lines, f"scaler.scale({inner}).backward()", *hook(f, "on_backward_end", level)]
    remark = "" if f.windows else "  # fills in .grad, and changes no weight"
    return [*lines, f"{loss}.backward(){remark}", *hook(f, "on_backward_end", level)]


def _window_end(f: Facts, level: int) -> Lines:
    """The step of a window that is full, or over."""
    step = _optimizer_step(f, level)
    if f.weightless and not f.with_sentinel:
        step = _optimizer_step(f, level + 1)
        step = ["if any(weights) or size == 1:  # else there is nothing to step on", *indented(step)]
        if f.policy == "skip":  # which has to look at the weights in any case
            step = _optimizer_step(f, level)
    elif f.weightless and f.policy != "skip":
        step = ["if any(weights):  # else there is nothing to step on", *indented(_optimizer_step(f, level + 1))]
    return [*step, "weights = []"]


def _optimizer_step(f: Facts, level: int) -> Lines:
    """``_optimizer_step``: gradients averaged and clipped, and the optimizer's step."""
    if f.policy == "skip":
        condition = "finite"
        if f.windows and f.weightless:
            condition += " and any(weights)" if f.with_sentinel else " and (any(weights) or size == 1)"
        lines = [f"if {condition}:", *indented(_averaged_and_clipped(f, level + 1))]
        if f.scaled:
            lines += indented(_scaled_step(f, level + 1))
            # A step that only the scale was too large for is dropped as well.
            return [*lines, "    else:", "        check_weights(model)", *_or_check()]
        lines += indented(
            [
                f"grads = [p.grad for p in {parameters(f)} if p.grad is not None]",
                *(["grads = [g.coalesce().values() if g.is_sparse else g for g in grads]"] if f.sparse else []),
                "finite = all(grad.isfinite().all() for grad in grads)",
            ]
        )
        if not (f.windows and f.weightless):
            return [*lines, "if finite:", *indented(["optimizer.step()", *_stepped(f, level + 1)]), *_or_check()]
        lines += ["    if finite:", *indented(indented(["optimizer.step()", *_stepped(f, level + 2)]))]
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
    lines += hook(f, "on_before_step", level)
    if f.clip_norm is not None:
        lines += _clipped(f, level)
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
        f"    for p in {parameters(f)}:",
        "        if p.grad is not None:",
        "            p.grad /= share",
    ]


def _clipped(f: Facts, level: int) -> Lines:
    # Under fp16 an infinite norm is the scaler's to handle.
    if f.policy != "raise" or f.scaled:
        return [f"torch.nn.utils.clip_grad_norm_({parameters(f)}, clip_norm)"]
    return [
        f"grads = [p.grad for p in {parameters(f)} if p.grad is not None]",
        "norm = torch.nn.utils.get_total_norm(grads)",
        *checked(f, "norm", "the gradients' norm"),
        *call("torch.nn.utils.clip_grads_with_norm_", [parameters(f), "clip_norm", "norm"], "", level),
    ]


def _scaled_step(f: Facts, level: int) -> Lines:
    lines = [
        "scale = scaler.get_scale()",
        "scaler.step(optimizer)  # not where a gradient has become infinite",
        "scaler.update()",
        "stepped = scaler.get_scale() >= scale",
        "if stepped:",
        *indented(_stepped(f, level + 1)),
    ]
    if f.policy == "raise":
        lines.append("elif scaler.get_scale() < 2**-16:  # no scale would do")
        lines.append('    raise FloatingPointError(f"bad gradients at step {step + 1}")')
    return lines


def _stepped(f: Facts, level: int) -> Lines:
    """``_stepped``: after a step that was made."""
    lines = ["step += 1"]
    if f.flagged and not f.scaled:
        lines.append("stepped = True")
    if f.policy == "skip" and f.windows:
        lines += ["rows += window"] if f.measures else ["for value, weight in window:", *indented(counted(f, "value"))]
    elif f.policy == "skip":
        lines += counted(f)
    lines += hook(f, "on_step_end", level)
    if f.schedule == "step":
        lines += moved(f)
    return lines


def _by_closure(f: Facts) -> Lines:
    """A batch whose loss the optimizer evaluates itself, several times."""
    lines = to_device_lines(f) + hook(f, "on_batch_start", 3)
    if f.beside:
        lines += ["for p in others:", "    p.grad = None  # the optimizer does not know of these"]
    inner = ["optimizer.zero_grad()", *_forward(f), *weighed(f), *checked(f), "loss.backward()"]
    inner += hook(f, "on_backward_end", 4)
    inner += hook(f, "on_before_step", 4, ", in the first evaluation")
    if f.clip_norm is not None:
        inner += _clipped(f, 4)
    kept = "(values, weight)" if f.measures else f"(loss.item(), {f.weight})"
    inner += [f"evaluations.append({kept})", "return loss.detach()"]
    lines += ["evaluations = []", "", "def closure():", *indented(inner), ""]
    lines += ["optimizer.step(closure)  # it evaluates the loss several times"]
    if f.measures:
        counted = ["values, weight = evaluations[0]", "rows.append((values, weight))"]
    else:
        value, weight = "value, weight = evaluations[0]", "weight"
        counted = [value, f"total += value * {weight}", f"count += {weight}"]
        if f.weightless:
            counted = [value, "if weight:", *indented(counted[1:])]
    lines += counted
    stepped = _stepped(f, 3)
    if f.schedule == "step" and f.monitor and not f.monitor.startswith("val/") and not f.measures:
        stepped = [line.replace("loss.item()", "value") for line in stepped]
    return lines + stepped
