"""The benchmark of scaling runs, reports every point, and times nothing that ends with other bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import scaling
from overhead import OtherBitsError
from scaling import Point, Side, Turns

SCRIPT = Path(scaling.__file__)
POINT = Point(5, lambda: nn.Linear(3, 1), (2, 3))


def test_the_scaling_benchmark_reports_and_draws_every_point(tmp_path: Path) -> None:
    figures, page, picture = tmp_path / "scaling.json", tmp_path / "scaling.md", tmp_path / "scaling.png"
    files = ["--json", str(figures), "--markdown", str(page), "--plot", str(picture)]
    command = [sys.executable, str(SCRIPT), "--quick", "--up-to", "1000", *files]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(figures.read_text())
    assert found.keys() == {"machine", "rounds", "curves"}
    assert [(curve["curve"], [point["value"] for point in curve["points"]]) for curve in found["curves"]] == [
        ("parameters", [10, 100, 1_000]),
        ("batch size", [1, 4, 16, 64, 256]),
        ("callbacks, idle in a step", [0, 1, 2, 5, 10, 20, 50]),
        ("callbacks, called in a step", [0, 1, 2, 5, 10, 20, 50]),
    ]
    for curve in found["curves"]:
        for text, mark in ((run.stdout, curve["curve"]), (page.read_text(), f"| {curve['curve']} |")):
            assert sum(line.startswith(mark) for line in text.splitlines()) == len(curve["points"])
        for point in curve["points"]:
            assert point["by_hand_us_per_step"]["median"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("parameters", [10, 100, 1_000, 10_000, 100_000, 1_000_000])
def test_a_network_has_about_as_many_parameters_as_it_says(parameters: int) -> None:
    there = sum(weight.numel() for weight in scaling.network(parameters).parameters())
    assert there == pytest.approx(parameters, rel=0.1)


@pytest.mark.parametrize("way", [Side.fit, Side.by_hand])
def test_both_make_every_step_on_the_same_batches(way: Callable[[Side, Point, Turns], None]) -> None:
    pairs = scaling.one_round(POINT, way, number=1, turns=4)
    assert len(pairs) == 3  # the first is not counted
    assert all(hand > 0 and other > 0 for hand, other in pairs)


def test_a_round_with_other_bits_does_not_count() -> None:
    def twice(side: Side, point: Point, data: Turns) -> None:
        side.by_hand(point, data)
        side.optimizer.step()

    with pytest.raises(OtherBitsError, match="5, round 1: other bits than by hand in"):
        scaling.one_round(POINT, twice, number=1, turns=2)


def test_a_step_is_the_median_time_once_it_has_settled() -> None:
    times = [0.0, 50.0, 100.0, 150.0, 200.0, 201.0, 203.0, 206.0]
    assert scaling.step(times) == 2.0
