"""The tables of docs/coming-from.md: what stands in their column of ours exists."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest
import torch

import loopwright
import loopwright.callbacks
from clean_environment import ROOT
from loopwright import Output
from loopwright.callback import HOOKS
from loopwright.hook_names import ELSEWHERE
from loopwright.testing import tiny_state, two_step_fit

PAGE = ROOT / "docs" / "coming-from.md"
PLAIN = {"nn.Module"}  # torch's own, in a sentence


def ours() -> list[str]:
    """The code in the right column of each table."""
    rows = re.findall(r"^\| .* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return sorted({code for cell in rows for code in re.findall(r"`([^`]+)`", cell)} - PLAIN)


def public() -> dict[str, Any]:
    names = {n: getattr(m, n) for m in (loopwright, loopwright.callbacks) for n in m.__all__}
    trainer, result = two_step_fit()
    return names | {"trainer": trainer, "result": result, "state": tiny_state(), "output": Output(torch.zeros(()))}


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression names; a call has to fit the signature of what it calls."""
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(resolve(node.value, names), node.attr)
    assert isinstance(node, ast.Call), ast.dump(node)
    function = resolve(node.func, names)
    inspect.signature(function).bind_partial(*node.args, **{str(k.arg): k.value for k in node.keywords})
    for keyword in node.keywords:
        if isinstance(keyword.value, ast.Call):
            resolve(keyword.value, names)
    return function


@pytest.mark.parametrize("code", ours())
def test_a_name_of_ours_in_the_tables_exists(code: str) -> None:
    resolve(ast.parse(code, mode="eval").body, public())


def test_a_name_or_an_argument_that_does_not_exist_is_found() -> None:
    for code, error in [
        ("Trainr(model)", KeyError),
        ("trainer.train", AttributeError),
        ("Trainer(clip=1.0)", TypeError),
        ("trainer.fit(train, validate=Every(batches=1))", TypeError),
    ]:
        with pytest.raises(error):
            resolve(ast.parse(code, mode="eval").body, public())


def test_a_hook_of_another_library_in_the_tables_is_suggested_to_whoever_writes_it() -> None:
    compared = 0
    for row in re.findall(r"^\| .* \| .* \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        theirs, ours = (re.findall(r"`\w*Callback\.(\w+)`", cell) for cell in row.strip("| ").split(" | "))
        for name, hook in zip(theirs, ours, strict=False):
            compared += 1
            # They share a few names with us; on_step_end is another moment there, and an allowed name here.
            assert ELSEWHERE.get(name, name) == hook or name in HOOKS
    assert compared > 20


def test_each_peer_has_a_table() -> None:
    sections = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == ["Raw PyTorch", "Lightning", "Ignite", "Keras", "The Trainer of Hugging Face"]
    assert len(ours()) > 50
