"""Every public name is documented: what it takes, returns and raises, and an example that the tests run.

A hook needs no list of arguments: they are the same few everywhere, and ``Callback`` explains them once. Nor does a
method that overrides one which is documented.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import conftest
import griffe
import pytest

import loopwright
import loopwright.callbacks
import loopwright.data
import loopwright.testing
from loopwright import Callback, LoopwrightError
from loopwright.callback import HOOKS

MODULES = [loopwright, loopwright.callbacks, loopwright.data, loopwright.testing]
PUBLIC = {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__}
ALIASES = {"loopwright.LossFn", "loopwright.Step"}  # of types: they have no docstring of their own at run time
INHERITED = (*HOOKS, "state_dict", "load_state_dict")


@dataclass(frozen=True)
class Documented:
    """A public class, function, method or property, with its docstring taken apart."""

    path: str
    function: FunctionType | None  # whose signature and body count: of a class, that of __init__
    text: str
    is_class: bool = False
    is_property: bool = False

    def named(self, kind: str) -> set[str]:
        """The names that the sections of a kind list."""
        return {str(getattr(item, "name", None) or item.annotation) for item in self._section(kind)}

    def has(self, kind: str) -> bool:
        return bool(self._section(kind))

    def _section(self, kind: str) -> list[Any]:
        sections = griffe.Docstring(self.text, parser="google").parse(warnings=False)
        return [item for section in sections if section.kind.value == kind for item in section.value]

    @property
    def parameters(self) -> set[str]:
        if self.function is None:
            return set()
        return set(inspect.signature(self.function).parameters) - {"self", "cls"}

    @property
    def returns(self) -> bool:
        annotation = self.function.__annotations__.get("return") if self.function is not None else None
        return annotation not in (None, "None", "NoReturn") and not self.is_class and not self.is_property

    @property
    def raised(self) -> set[str]:
        """The exceptions that the body itself raises by name."""
        if self.function is None:
            return set()
        if self.function.__code__.co_filename == "<string>":  # the __init__ of a dataclass
            return set()
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)} - {
            "unknown_metric"
        }


def everything() -> Iterator[Documented]:
    for path, value in PUBLIC.items():
        if path in ALIASES:
            continue
        if isinstance(value, FunctionType):
            yield Documented(path, value, value.__doc__ or "")
            continue
        yield Documented(path, own_init(value), value.__doc__ or "", is_class=True)
        for name, member in vars(value).items():
            plain = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
            if name.startswith("_") or not isinstance(plain, FunctionType) or plain.__name__ != name:
                continue
            if name in INHERITED and issubclass(value, Callback):
                continue
            if any(hasattr(base, name) for base in value.__mro__[1:] if base in PUBLIC.values()):
                continue
            yield Documented(f"{path}.{name}", plain, plain.__doc__ or "", is_property=isinstance(member, property))


def own_init(kind: type) -> FunctionType | None:
    init = None if getattr(kind, "_is_protocol", False) else vars(kind).get("__init__")
    return init if isinstance(init, FunctionType) else None


EVERYTHING = {documented.path: documented for documented in everything()}


@pytest.mark.parametrize("path", EVERYTHING)
def test_it_says_what_it_takes_returns_and_raises(path: str) -> None:
    documented = EVERYTHING[path]
    assert documented.text.strip(), "no docstring"
    about = documented.named("parameters") | (documented.named("attributes") if documented.is_class else set())
    assert {name.lstrip("*") for name in about} >= documented.parameters, "Args"
    assert documented.has("returns") or not documented.returns, "Returns"
    assert documented.named("raises") >= documented.raised, "Raises"


@pytest.mark.parametrize("path", [path for path, value in PUBLIC.items() if path in EVERYTHING])
def test_every_class_and_function_has_an_example(path: str) -> None:
    assert ">>>" in EVERYTHING[path].text


def test_every_argument_that_is_documented_is_there() -> None:
    unknown = {
        path: missing
        for path, documented in EVERYTHING.items()
        if documented.function is not None
        and (missing := {n.lstrip("*") for n in documented.named("parameters")} - documented.parameters)
    }
    assert unknown == {}


def test_the_arguments_of_the_hooks_are_explained_once() -> None:
    arguments = {name for hook in HOOKS for name in inspect.signature(getattr(Callback, hook)).parameters} - {"self"}
    text = Callback.__doc__ or ""
    assert arguments == {"state", "batch", "output", "error"}
    assert [name for name in sorted(arguments) if f"``{name}``" not in text] == []
    assert [hook for hook in INHERITED if not getattr(Callback, hook).__doc__] == []


def test_the_aliases_of_types_are_documented_where_they_stand() -> None:
    source = inspect.getsource(__import__("loopwright.step", fromlist=["step"]))
    nodes = ast.parse(source).body
    for path in ALIASES:
        name = path.rpartition(".")[2]
        [index] = [i for i, n in enumerate(nodes) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == name]
        after = nodes[index + 1]
        assert isinstance(after, ast.Expr)
        assert isinstance(after.value, ast.Constant)
        assert str(after.value.value).startswith("A ")


def test_every_error_has_an_id_and_an_example() -> None:
    errors = [value for value in PUBLIC.values() if isinstance(value, type) and issubclass(value, LoopwrightError)]
    assert len(errors) == len({error.id for error in errors}) >= 9


def test_the_examples_are_run_in_whichever_file_of_the_library_they_are() -> None:
    files = {path for path in (conftest.ROOT / "src").rglob("*.py") if ">>> " in path.read_text("utf-8")}
    assert len(files) > 10
    assert {str(path) for path in files if not conftest._docstrings.should_parse(path)} == set()
