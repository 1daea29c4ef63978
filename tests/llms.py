"""docs/llms.txt, from which a language model can use the library: ``python tests/llms.py`` writes its second part anew.

The first part is written by hand and is run by tests/test_llms.py; the second is every public name with its signature
and its docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import FunctionType, ModuleType

import loopwright
import loopwright.callbacks
import loopwright.data
import loopwright.testing
from clean_environment import ROOT
from loopwright import Callback
from loopwright.callback import HOOKS

PAGE = ROOT / "docs" / "llms.txt"
MARK = "## API\n\n"
MODULES = [loopwright, loopwright.callbacks, loopwright.data, loopwright.testing]
ALIASES = {
    "LossFn": "Callable[[Any, Any], Tensor]\n\nA loss function: predictions and targets to a scalar tensor.",
    "Step": "Callable[[Model, Batch], Output | Tensor]\n\nA step: model and batch to an Output, or to just the loss.",
}


def signature(name: str, value: FunctionType | type) -> str:
    """``name(arguments) -> result``, as written, without self."""
    text = str(inspect.signature(value))
    text = re.sub(r"^\((self|cls)(, /)?(, )?", "(", text).replace("'", "")
    return name + re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)


def members(kind: type) -> Iterator[str]:
    """The public methods and properties that a class has of its own, hooks only for ``Callback`` itself."""
    for name, member in vars(kind).items():
        plain = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
        if name.startswith("_") or not isinstance(plain, FunctionType) or plain.__name__ != name:
            continue
        if issubclass(kind, Callback) and kind is not Callback and name in (*HOOKS, "state_dict", "load_state_dict"):
            continue
        if isinstance(member, property):
            yield f"- `{name}`: {first(inspect.getdoc(plain))}"
        else:
            yield f"- `{signature(name, plain)}`: {rest(inspect.getdoc(plain))}"


def first(text: str | None) -> str:
    return (text or "").partition("\n\n")[0].replace("\n", " ")


def rest(text: str | None) -> str:
    """The docstring without its examples, indented below the first line."""
    text = re.split(r"\n\nExamples:", text or "")[0]
    head, _, more = text.partition("\n\n")
    head = head.replace("\n", " ")
    return head + ("\n\n" + "\n".join(f"  {line}".rstrip() for line in more.splitlines()) + "\n" if more else "")


def entry(module: ModuleType, name: str) -> str:
    """One public name: its signature, its docstring with the example, and its methods."""
    value = getattr(module, name)
    if name in ALIASES:
        return f"### {name} = {ALIASES[name]}"
    error = isinstance(value, type) and issubclass(value, Exception)
    if error:
        bases = ", ".join(base.__name__ for base in value.__bases__)
        title = f"class {name}({bases}), id {value.id!r}"
    else:
        shown = getattr(value, "_is_protocol", False)
        title = f"class {name}: a protocol" if shown else signature(name, value)
        title = title.removesuffix(" -> None") if isinstance(value, type) else title
    parts = [f"### {title}", (inspect.getdoc(value) or "").rstrip()]
    if isinstance(value, type) and (listed := list(members(value))) and name != "SaveError":
        parts.append("Methods and properties:\n\n" + "\n".join(listed).rstrip())
    return "\n\n".join(parts)


def generated() -> str:
    """Every public name of every public module."""
    parts = []
    for module in MODULES:
        names = ", ".join(module.__all__)
        parts.append(f"## Module {module.__name__}\n\nNames: {names}.")
        parts += [entry(module, name) for name in module.__all__]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + MARK + generated(), encoding="utf-8")
