"""The mistakes that people make: each is answered with what, why and the fix, and the page of errors says so."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest

import loopwright
from loopwright import LoopwrightError
from mistakes import GUIDES, MISTAKES, PAGE, Mistake, answer, classes, generated, message, part


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_answered_with_what_why_and_the_fix(mistake: Mistake) -> None:
    error = answer(mistake)
    assert type(error).__name__ == mistake.error
    if isinstance(error, LoopwrightError):
        assert str(error).startswith(f"[{type(error).id}] {error.what}\n")
        assert str(error).endswith(f"\n  why: {error.why}\n  fix: {error.fix}")
        assert error.why
        assert error.fix
        assert type(error) is getattr(loopwright, mistake.error)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if "is misspelt" in m.name], ids=lambda mistake: mistake.name)
def test_what_is_misspelt_is_named_and_so_is_what_was_meant(mistake: Mistake) -> None:
    said = str(answer(mistake))
    if "unexpected keyword argument" in said:  # of a method, where Python says what was meant from 3.13 on
        assert f"Did you mean '{mistake.meant}'?" in said or sys.version_info < (3, 13)
        assert mistake.meant
    else:
        assert "did you mean" in said


def test_every_mistake_is_answered_in_a_way_of_its_own() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    assert len({mistake.code for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("name", ["table", "classes", "TypeError"])
def test_the_page_of_errors_is_what_the_classes_and_the_mistakes_give(name: str) -> None:
    """``python tests/mistakes.py`` writes it anew."""
    assert part(PAGE.read_text(encoding="utf-8"), name) == generated()[name]


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_every_error_is_public_says_cause_and_cure_and_has_a_mistake_that_it_answers(
    kind: type[LoopwrightError],
) -> None:
    assert getattr(loopwright, kind.__name__) is kind
    cause, _, cure = (kind.__doc__ or "").partition("**Cause.** ")[2].partition("**Cure.** ")
    assert cause
    if kind is not LoopwrightError:  # which is never raised itself
        assert cure
        assert [mistake for mistake in MISTAKES if mistake.error == kind.__name__]


def test_no_public_error_and_no_guide_is_of_a_class_that_the_page_does_not_have() -> None:
    names = {kind.__name__ for kind in classes()}
    assert {name for name in loopwright.__all__ if name.endswith("Error")} == names
    assert names >= GUIDES.keys()
    assert {mistake.error for mistake in MISTAKES} <= names | {"TypeError"}


def test_a_suggestion_of_pythons_own_is_left_out_of_the_page() -> None:
    assert message(TypeError("f() got x 'a'. Did you mean 'b'?")) == "TypeError: f() got x 'a'"


def test_a_folder_for_temporary_files_is_left_out_of_the_page() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert message(OSError(f"{os.path.realpath(folder)}/runs/line is full")) == "OSError: .../runs/line is full"
