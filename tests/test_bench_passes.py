"""The benchmark of evaluation and prediction runs, and times nothing that comes to something else than by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import overhead
import passes
from overhead import OtherBitsError
from passes import Case

BATCHES = partial(overhead.ready_made, overhead.small_network, 3, (10, 10), clocked=False)
SMALL = Case("small", BATCHES, passes=2, batches=6)


@pytest.mark.parametrize("what", [passes.EVALUATE, passes.PREDICT])
@pytest.mark.parametrize("case", passes.CASES, ids=lambda case: case.name)
def test_every_case_is_measured_with_the_results_by_hand(case: Case, what: str) -> None:
    short = case.shortened()
    found = passes.report(short, what, passes.measure(short, what, rounds=2))
    assert (found["case"], found["what"], found["passes"]) == (case.name, what, 1)
    assert found["by_hand_us_per_batch"]["median"] > 0
    assert found["ratio"]["median"] > 0
    assert found["batches"] == len(list(short.problem().data))


@pytest.mark.parametrize(
    ("what", "way"), [(passes.EVALUATE, "evaluated_by_hand"), (passes.PREDICT, "predicted_by_hand")]
)
def test_other_results_get_no_time(what: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(passes, way)
    monkeypatch.setattr(passes, way, lambda *arguments: [each * 1.0001 for each in right(*arguments)])
    with pytest.raises(OtherBitsError, match=f"small, {what}, round 0: other results than by hand"):
        passes.measure(SMALL, what, rounds=2)


def test_other_draws_get_no_time() -> None:
    states = {"by hand": torch.zeros(2), "loopwright": torch.ones(2)}
    with pytest.raises(OtherBitsError, match="random generator's state"):
        passes.compare("x", {"by hand": [1.0], "loopwright": [1.0]}, states)


def test_added_time_of_a_batch_is_taken_within_a_round() -> None:
    found = passes.report(SMALL, passes.EVALUATE, {"by hand": [6e-6, 12e-6], "loopwright": [9e-6, 15e-6]})
    assert found["added_us_per_batch"]["median"] == pytest.approx(3)
    assert found["ratio"]["median"] == pytest.approx((1.5 + 1.25) / 2)


def test_the_table_has_a_row_for_each_case() -> None:
    found = passes.report(SMALL, passes.PREDICT, {"by hand": [2e-6, 2e-6], "loopwright": [1e-6, 1e-6]})
    heading, row = passes.as_table([found])
    assert len(heading) == len(row)
    assert row[:4] == ["small", "predict", "2", "3"]
    assert row[5:] == ["0.50 (0.50..0.50)", "-1.0 (-1.0..-1.0)"]


def test_fewer_than_two_rounds_of_passes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        passes.main(["--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err
