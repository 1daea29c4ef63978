"""The mistakes that people make: each is answered with what, why and the fix, and the page of errors says so."""

from __future__ import annotations

import re
import sys

import pytest

import loopwright
from loopwright import LoopwrightError
from mistakes import MISTAKES, PAGE, Mistake, answer, classes, generated, message, part


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_answered_with_what_why_and_the_fix(mistake: Mistake) -> None:
    error = answer(mistake)
    assert type(error).__name__ == mistake.error
    if isinstance(error, LoopwrightError):
        assert str(error).startswith(f"[{type(error).id}] {error.what}\n  why: {error.why}")
        assert error.fix
        assert type(error) is getattr(loopwright, mistake.error)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if "is misspelt" in m.name], ids=lambda mistake: mistake.name)
def test_what_is_misspelt_is_named_and_so_is_what_was_meant(mistake: Mistake) -> None:
    meant = {"acumulate": "accumulate", "epoch": "epochs", "patiance": "patience"}
    said = str(answer(mistake))
    if argument := re.search(r"unexpected keyword argument '(\w+)'", said):
        # Python says what was meant from 3.13 on.
        assert f"Did you mean '{meant[argument[1]]}'?" in said or sys.version_info < (3, 13)
    else:
        assert "did you mean" in said


def test_every_mistake_is_answered_in_a_way_of_its_own() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    assert len({mistake.code for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("name", ["classes", "mistakes"])
def test_the_page_of_errors_is_what_the_classes_and_the_mistakes_give(name: str) -> None:
    """``python tests/mistakes.py`` writes it anew."""
    assert part(PAGE.read_text(encoding="utf-8"), name) == generated()[name]


def test_every_public_error_is_in_the_table_with_a_cause_and_a_cure() -> None:
    page = PAGE.read_text(encoding="utf-8")
    kinds = list(classes())
    public = {name for name in loopwright.__all__ if name.endswith("Error")}
    assert {kind.__name__ for kind in kinds} == public
    for kind in kinds:
        section = page.partition(f"## `{kind.id}` {{ #{kind.id} }}")[2].partition("\n## ")[0]
        assert "**Cause.**" in section, kind
        assert "**Cure.**" in section or kind is LoopwrightError, kind


def test_a_suggestion_of_pythons_own_is_left_out_of_the_page() -> None:
    assert message(TypeError("f() got x 'a'. Did you mean 'b'?")) == "TypeError: f() got x 'a'"
