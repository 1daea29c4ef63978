"""What the parts of the plain loop's text are made of: lines, comments, and what stands in several parts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from loopwright.explaining.facts import WIDTH, Facts, Lines


def indented(lines: Lines) -> Lines:
    """The lines, one level further in."""
    return [line and f"    {line}" for line in lines]


def note(text: str, level: int) -> Lines:
    """A comment, broken into lines that fit at that level."""
    return textwrap.wrap(text, WIDTH - 4 * level, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def hook(f: Facts, hook: str, level: int, remark: str = "") -> Lines:
    """A comment that says which callbacks' hook runs here."""
    names = f.hooks.get(hook)
    return note(f"{hook}{remark}: {', '.join(names)}", level) if names else []


def call(head: str, arguments: Sequence[str], tail: str, level: int = 0) -> Lines:
    """A call or a definition, broken as ruff breaks it at that level."""
    width = WIDTH - 4 * level
    if len(line := f"{head}({', '.join(arguments)}){tail}") <= width:
        return [line]
    if len(line := f"    {', '.join(arguments)}") <= width:
        return [f"{head}(", line, f"){tail}"]
    return [f"{head}(", *(f"    {argument}," for argument in arguments), f"){tail}"]


def function(f: Facts) -> str:
    """The name of what makes a loss of a batch."""
    return "step_fn" if f.custom_step else "loss_fn"


def quoted(text: str) -> str:
    """The text as a literal, quoted as ruff does."""
    single = repr(text)
    return single if '"' in text or "\\" in single else f'"{text}"'


def device_type(f: Facts) -> str:
    """The expression for the kind of device."""
    return "torch.device(device).type" if f.moves else quoted(f.device.partition(":")[0])


def parameters(f: Facts) -> str:
    """The expression for what the optimizer trains."""
    return "parameters" if f.sorted_out else "model.parameters()"


def model(f: Facts) -> str:
    """The name of what is called as the model."""
    return "compiled" if f.compile == "wrapped" else "model"


def autocast(f: Facts, lines: Lines) -> Lines:
    """The lines, in the number format that is asked for."""
    if f.precision == "fp32":
        return lines
    dtype = "bfloat16" if f.precision == "bf16" else "float16"
    return [f"with torch.autocast({device_type(f)}, dtype=torch.{dtype}):", *indented(lines)]


def weighed(f: Facts) -> Lines:
    """What a batch counts for."""
    if f.custom_step:
        return [f"loss, {'values, ' if f.measures else ''}weight = read(output, batch)"]
    if f.ignores:
        return ["weight = (targets != loss_fn.ignore_index).sum().item()"]
    return [f"weight = {f.size}"] if f.windows else []


def counted(f: Facts, loss: str = "loss.item()") -> Lines:
    """A batch's part in the epoch's means."""
    if f.measures:
        return ["rows.append((values, weight))"]
    added = [f"total += {loss} * {f.weight}", f"count += {f.weight}"]
    return ["if weight:", *indented(added)] if f.weightless else added


def checked(f: Facts, value: str = "loss", words: str = "the loss") -> Lines:
    """An error where a value is not finite."""
    return [f'check_finite("{words}", {value}, step + 1)'] if f.policy == "raise" else []


def to_device_lines(f: Facts) -> Lines:
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
