"""The account of a step finds the trainer's lines by itself, sets torch's work apart, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import account
from account import Clock
from loopwright import Trainer


@pytest.fixture
def watched() -> dict[str, Any]:
    return account.account(2, deep=False)


def test_the_account_has_the_lines_of_a_step_and_torchs_work_by_hand(watched: dict[str, Any]) -> None:
    functions = {line["function"] for line in watched["lines"]}
    assert {"Trainer._train_epoch", "Trainer._train_batch"} <= functions
    kinds = [kind for line in watched["lines"] for kind in line["torchs"]]
    assert sorted(kinds) == sorted({account.FORWARD, account.LOSS, account.BACKWARD, account.STEP, account.ITEM})
    (backward,) = [line for line in watched["lines"] if account.BACKWARD in line["torchs"]]
    assert "backward" in backward["text"]
    assert [line["text"] for line in watched["by_hand_alone"] if "zero_grad" in line["text"]]
    assert watched["us"] == pytest.approx(sum(line["us"] for line in watched["lines"]))
    rows = account.as_table(watched)
    assert {len(row) for row in rows} == {5}
    assert len(rows) == 2 + len(watched["lines"]) + len(watched["by_hand_alone"])


def test_a_deep_account_has_lines_of_other_modules_too() -> None:
    found = {line["function"].partition(".")[0] for line in account.account(1, deep=True)["lines"]}
    assert found > {"Trainer"}


def test_the_functions_are_the_very_same_afterwards_and_the_bits_are_while_they_are_watched() -> None:
    before = dict(vars(Trainer))
    owned = account.functions_of_a_step(deep=True)
    plain, other = account.Training(), account.Training()
    plain.trainer()()
    clock = Clock()
    with account.in_place(owned, clock):
        assert dict(vars(Trainer)) != before
        other.trainer()()
    assert clock.reached
    assert dict(vars(Trainer)) == before
    assert all(vars(owner)[name] is function for owner, name, function in owned)
    assert all(map(torch.equal, plain.model.parameters(), other.model.parameters()))


def loop(numbers: list[int]) -> int:
    """Adds the even ones."""
    total = 0
    for number in numbers:
        if number % 2:
            continue
        total += number
    return total


def test_every_statement_is_reached_in_its_order_and_a_loop_goes_back_to_its_head() -> None:
    clock = Clock()
    copy: Callable[[list[int]], int] = account.copied(function(loop), clock)
    assert copy([1, 2]) == loop([1, 2]) == 2
    assert [clock.lines[key].text for key in clock.reached] == [
        "total = 0",
        "for number in numbers:",
        "if number % 2:",
        "for number in numbers:",
        "if number % 2:",
        "total += number",
        "for number in numbers:",
        "return total",
    ]
    assert len(clock.times) == len(clock.reached)


def function(found: Any) -> FunctionType:
    assert isinstance(found, FunctionType)
    return found


def test_a_line_takes_the_time_to_the_next_without_the_reading() -> None:
    clock = Clock()
    clock.reached[:], clock.times[:] = [0, 1, 0, 1], [0, 100, 150, 350]
    took, counts = clock.taken(cost=10)
    assert took == {0: 90 + 190, 1: 40}
    assert counts == {0: 2, 1: 1}


def test_a_reading_costs_something() -> None:
    clock = Clock()
    assert clock.cost() > 0
    assert clock.reached == clock.times == []


def test_the_account_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "account.json", tmp_path / "account.md"
    threads = torch.get_num_threads()
    try:
        account.main(["--quick", "--json", str(figures), "--markdown", str(page)])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(figures.read_text())
    assert {"machine", "added_us", "lines", "by_hand_alone", "us", "by_hand_us"} <= found.keys()
    assert "together" in capsys.readouterr().out
    assert page.read_text().startswith("| function | line |")


def test_code_in_a_cell_is_short_and_ends_no_cell() -> None:
    assert account.code("value: float | Tensor = 0.0  # why") == "`value: float \\| Tensor = 0.0`"
    assert len(account.code("x" * 100)) == 72
