"""docs/callbacks.md: every public callback has its card, its example runs, its state makes the round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gallery import MADE, PAGE, cards, facts, generated, public, state_after_a_fit
from gallery_pictures import ASSETS, draw, text_picture
from loopwright import Callback
from loopwright.testing import two_step_fit

CARDS = cards(PAGE.read_text(encoding="utf-8"))
PICTURE = re.compile(r"^!\[([^\]]+)\]\(assets/(callback-[\w.-]+)\)$", re.MULTILINE)


def same(one: Any, other: Any) -> bool:
    """Whether two states are the same, tensors by their bits."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and repr(one) == repr(other)  # nan is nan


def test_every_public_callback_has_a_card_and_no_other_class_has() -> None:
    assert set(CARDS) == set(public()) == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_a_card_says_what_the_class_says_and_what_was_measured(name: str) -> None:
    assert facts(name) in CARDS[name], "python tests/gallery.py writes it anew"


def test_a_card_that_says_something_else_is_written_anew() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert generated(text) == text
    assert generated(text.replace("`on_batch_end`", "`on_batch_start`")) == text


@pytest.mark.parametrize("name", MADE)
def test_a_card_has_an_example_with_its_output_and_a_picture(name: str) -> None:
    """That the example runs, and prints this, is seen to by conftest.py."""
    [code] = re.findall(r"^```python\n(.*?)^```\n\n```text\n.+?^```$", CARDS[name], re.MULTILINE | re.DOTALL)
    assert re.search(rf"\b{name}\b", code)
    assert len([line for line in code.splitlines() if line]) <= 5
    [(described, picture)] = PICTURE.findall(CARDS[name])
    assert described
    assert (ASSETS / picture).is_file()


def test_the_pictures_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.glob("callback-*")) < 1_500_000


def test_the_pictures_are_those_that_the_script_draws_twice_alike_with_any_number_of_threads(tmp_path: Path) -> None:
    draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in ASSETS.glob("callback-*")}
    assert drawn == {picture for card in CARDS.values() for _, picture in PICTURE.findall(card)}
    first = {name: (tmp_path / name).read_bytes() for name in drawn}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        draw(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert [name for name, content in first.items() if (tmp_path / name).read_bytes() != content] == []


def test_a_picture_is_written_anew_where_more_than_a_time_differs(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    line = "1446/1800 [{time}<00:00, {rate}batch/s, train/loss {loss}]"
    text_picture(path, "title", [line.format(time="00:00", rate="1763.51", loss=0.1)])
    first = path.read_text(encoding="utf-8")
    text_picture(path, "title", [line.format(time="00:03", rate="99.1", loss=0.1)])
    assert path.read_text(encoding="utf-8") == first
    text_picture(path, "title", [line.format(time="00:03", rate="99.1", loss=0.2)])
    assert "99.1batch/s, train/loss 0.2" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MADE)
def test_a_state_makes_the_round_trip(name: str, tmp_path: Path) -> None:
    """A fresh callback that takes the state gives the same one, and a fit goes on with it."""
    saved = state_after_a_fit(name, tmp_path)
    fresh = MADE[name](tmp_path)
    fresh.load_state_dict(saved)
    assert same(fresh.state_dict(), saved)


def test_a_state_that_is_not_taken_is_noticed(tmp_path: Path) -> None:
    saved = state_after_a_fit("EarlyStopping", tmp_path)
    assert not same(MADE["EarlyStopping"](tmp_path).state_dict(), saved)


def test_callbacks_without_a_state_of_their_own_have_none() -> None:
    callback = Callback[Any]()
    two_step_fit(callback)
    assert callback.state_dict() == {}
