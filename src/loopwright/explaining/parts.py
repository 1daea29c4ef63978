"""The functions that the plain loop's text calls: its validation, and small helpers."""

from __future__ import annotations

import textwrap

from loopwright.explaining.facts import NAN, Facts, Lines
from loopwright.explaining.lines import (
    autocast,
    call,
    counted,
    function,
    hook,
    indented,
    to_device_lines,
    weighed,
)


def evaluate(f: Facts) -> Lines:
    """``_evaluate``: one pass over the validation data."""
    arguments = ["model", function(f), "loader", *(["metrics"] if f.metrics else []), *(["device"] if f.moves else [])]
    body = ['"""The means over a loader, in eval mode and without gradients."""']
    if f.mixed_modes:
        body.append("modes = [(module, module.training) for module in model.modules()]")
    body.append("model.eval()  # dropout is off, and batch norm uses its running statistics")
    body.append("rows = []" if f.measures else "total, count = 0.0, 0")
    if f.metrics:
        body += ["for metric in metrics.values():", "    metric.reset()"]
    body += ["with torch.no_grad():  # nothing is recorded for a backward pass"]
    body += indented(_evaluate_batches(f))
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
    body += hook(f, "on_eval_end", 1)
    if f.mixed_modes:
        body += ["model.train()", "for module, training in modes:  # what was frozen in eval mode stays so"]
        body.append("    module.training = training")
    else:
        body.append("model.train()")
    return [*call("def evaluate", arguments, ":"), *indented([*body, "return scores"])]


def _evaluate_batches(f: Facts) -> Lines:
    lines = hook(f, "on_eval_start", 2)
    lines.append("for batch in loader:" if f.custom_step else "for inputs, targets in loader:")
    inner = to_device_lines(f)
    if f.custom_step:
        inner += autocast(f, ["output = step_fn(model, batch)"])
    elif f.metrics:
        inner += autocast(f, ["predictions = model(inputs)", "loss = loss_fn(predictions, targets)"])
    else:
        inner += autocast(f, ["loss = loss_fn(model(inputs), targets)"])
    inner += weighed(f) if f.weight != "weight" or f.weightless else [f"weight = {f.size}"]
    inner += counted(f)
    if f.metrics:
        update = "output.predictions, output.targets" if f.custom_step else "predictions, targets"
        inner += ["for metric in metrics.values():", f"    metric.update({update})"]
    inner += hook(f, "on_eval_batch_end", 3)
    return lines + indented(inner)


def read(f: Facts) -> Lines:
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
            '        values[name] = float(value.item() if hasattr(value, "item") else value)',
        ]
    lines += [
        '    weight = getattr(output, "weight", None)',
        "    if weight is None:",
        f"        weight = {f.size}",
    ]
    return [*lines, f"    return loss, {'values, ' if f.measures else ''}float(weight)"]


def means() -> Lines:
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


def size_of() -> Lines:
    """``batch_size``."""
    return textwrap.dedent('''\
        def size_of(batch):
            """The number of samples in a batch: the length of the first tensor in it."""
            if isinstance(batch, torch.Tensor):
                return batch.size(0) if batch.ndim else 0
            if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
                return int(batch.batch_sizes[0])
            if isinstance(batch, dict):
                batch = batch.values()
            elif not isinstance(batch, (list, tuple)):
                batch = vars(batch).values() if hasattr(batch, "__dict__") else ()
            return next(filter(None, map(size_of, batch)), 0)''').split("\n")


def to_device() -> Lines:
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


def flat() -> Lines:
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


def check_finite() -> Lines:
    """``Guard.loss`` and ``Guard.norm``."""
    return textwrap.dedent('''\
        def check_finite(name, value, step):
            """Raise an error where a value is NaN or infinite: the weights are still sound."""
            if not torch.isfinite(value):
                raise FloatingPointError(f"{name} is {value.item()} at step {step}")''').split("\n")


def check_weights(f: Facts) -> Lines:
    """``Guard.parameters``."""
    lines = textwrap.dedent('''\
        def check_weights(model):
            """Raise an error where a weight has become NaN or infinite."""
            for name, p in model.named_parameters():
                if p.requires_grad and not p.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite any more")''').split("\n")
    if f.lazy:
        lines[3:3] = [
            "        if torch.nn.parameter.is_lazy(p):",
            "            continue  # of a module that was never called: it holds nothing yet",
        ]
    return lines
