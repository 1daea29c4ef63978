"""The comparison with other trainers runs, reports whom it finds, and times nobody who trains something else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import overhead
import peers
from overhead import Case, Problem
from peers import FailedError, Measured, Peer, Prepared, Process, WrongTrainingError

SCRIPT = Path(peers.__file__)
READY_MADE = partial(overhead.ready_made, overhead.small_network, 3, (10, 10), clocked=True)
SMALL = Case("small", READY_MADE, epochs=2, steps=6)


def test_the_comparison_reports_every_case_and_who_is_not_installed(tmp_path: Path) -> None:
    figures, page, picture = tmp_path / "peers.json", tmp_path / "peers.md", tmp_path / "peers.png"
    files = ["--json", str(figures), "--markdown", str(page), "--plot", str(picture)]
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "Ignite", *files]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peers.json", "peers.md", "peers.png"]
    found = json.loads(figures.read_text())
    assert found.keys() == {"machine", "not_installed", "failed", "cases"}
    assert found["failed"] == []
    there = {"loopwright", "Ignite"} - set(found["not_installed"])
    assert "loopwright" in there
    assert [(case["case"], case["epochs"], case["steps"], case["rounds"]) for case in found["cases"]] == [
        ("document 000", 1, 10, 2),
        ("document 001", 1, 1, 2),
        ("document 002", 1, 4, 2),
        ("ready-made batches", 1, 100, 2),
        ("medium network", 1, 10, 2),
    ]
    spread = {"median", "quartile1", "quartile3"}
    for case in found["cases"]:
        assert case["trainers"].keys() == there
        for name, each in case["trainers"].items():
            assert each.keys() == {"by_hand_us_per_step", "lean", "as used"}
            for way in ("lean", "as used"):
                assert each[way]["rounds_with_equal_bits"] == 2
                assert each[way]["deviation_on_one_batch"] == 0.0
                assert each[way]["ratio"].keys() == each[way]["us_per_step"].keys() == spread
                rows = [row for row in page.read_text().splitlines() if f"| {case['case']} | {way} | {name} |" in row]
                assert len(rows) == 1
                assert rows[0].endswith("| equal |")
    assert picture.read_bytes().startswith(b"\x89PNG")


def longer(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    return Prepared(partial(problem.by_hand, case.epochs + (not lean)), problem.model.parameters)


def test_a_turn_says_how_far_from_the_loop_by_hand_each_way_ends(tmp_path: Path) -> None:
    found = peers.turn(Peer("", "", longer), SMALL, 0, tmp_path, backwards=False)
    assert found["deviations"].keys() == {"lean", "as used"}
    assert found["deviations"]["lean"] == 0.0
    assert 0.1 < found["deviations"]["as used"] < 1.0  # three epochs instead of two
    assert all(took > 0 for took in found["seconds"].values())
    assert list(tmp_path.iterdir()) == []


def test_the_ways_of_a_turn_are_reversed_and_come_to_the_same_bits(tmp_path: Path) -> None:
    forwards, backwards = (
        peers.turn(peers.PEERS["loopwright"], SMALL, 3, tmp_path, backwards=backwards) for backwards in (False, True)
    )
    assert list(forwards["seconds"]) == ["by hand", "lean", "as used"]
    assert list(backwards["seconds"]) == ["as used", "lean", "by hand"]
    assert forwards["by_hand"] == backwards["by_hand"]
    assert set(forwards["deviations"].values()) == set(backwards["deviations"].values()) == {0.0}


def test_a_deviation_is_zero_only_where_the_weights_are_equal() -> None:
    start, hand = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])
    assert peers.deviation(start, hand, hand.clone()) == 0.0
    assert peers.deviation(start, hand, torch.tensor([3.0, 5.0])) == pytest.approx(0.2)
    assert peers.deviation(start, hand, torch.tensor([3.0, 4.0 + 1e-6])) > 0.0


@pytest.mark.parametrize(
    ("largest", "words"),
    [(0.0, "equal"), (2e-7, "within 2e-07"), (0.3, "other order of samples; on one batch within 4e-08")],
)
def test_the_weights_are_described_in_words(largest: float, words: str) -> None:
    assert peers.bits({"largest_deviation": largest, "deviation_on_one_batch": 4e-8}) == words


@pytest.mark.parametrize("deviation", [0.06, float("nan")])
def test_another_training_is_refused(deviation: float) -> None:
    peers.check_training({"lean": 0.0, "as used": 0.01})
    with pytest.raises(FailedError, match="it has trained something else: "):
        peers.check_training({"lean": 0.0, "as used": deviation})


class Scripted(Process):
    """Answers as it is told to, without a process."""

    def __init__(self, turns: list[tuple[str, int]], name: str, *, deviation: float = 0.0, hand: str = "same") -> None:
        self.name, self.turns, self.deviation, self.hand = name, turns, deviation, hand

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self.turns.append((self.name, order["seed"]))
        if self.deviation > 1:
            raise FailedError("too far")
        deviations = {"lean": self.deviation, "as used": 0.0}
        return {"seconds": dict.fromkeys(("by hand", *deviations), 1.0), "deviations": deviations, "by_hand": self.hand}


def test_the_trainers_take_turns_in_an_order_that_is_reversed_every_round() -> None:
    turns: list[tuple[str, int]] = []
    found = peers.measure("x", {name: Scripted(turns, name) for name in "ab"}, 2, quick=True)
    assert turns == [("a", -1), ("b", -1), ("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert found["a"].seconds["by hand"] == [1.0, 1.0]  # neither the one batch nor the first round is counted


def test_a_trainer_that_fails_is_left_out_of_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[tuple[str, int]] = []
    processes: dict[str, Process] = {name: Scripted(turns, name, deviation=2.0 * (name == "b")) for name in "ab"}
    found = peers.measure("x", processes, 2, quick=True)
    assert list(found) == list(processes) == ["a"]
    assert turns.count(("b", -1)) == 1
    assert not [seed for name, seed in turns if name == "b" and seed >= 0]
    assert capsys.readouterr().err == "x, b: too far\n"


def test_other_bits_of_loopwright_or_of_the_loop_by_hand_end_the_benchmark() -> None:
    with pytest.raises(WrongTrainingError, match="x, loopwright, round -1: other bits than by hand"):
        peers.measure("x", {"loopwright": Scripted([], "loopwright", deviation=1e-9)}, 2, quick=True)
    with pytest.raises(WrongTrainingError, match="x, round -1: the loop by hand differs among processes"):
        peers.measure("x", {name: Scripted([], name, hand=name) for name in "ab"}, 2, quick=True)


def test_a_ratio_is_taken_within_a_round() -> None:
    seconds = {"by hand": [1e-6, 2e-6], "lean": [2e-6, 3e-6]}
    found = peers.figures(Measured(seconds, {"lean": [0.0, 1e-7]}, {"lean": 0.0}), "lean")
    assert found["ratio"]["median"] == pytest.approx(1.75)
    assert found["added_us_per_step"]["median"] == pytest.approx(1.0)
    assert (found["rounds_with_equal_bits"], found["largest_deviation"]) == (1, 1e-7)


def test_an_interpreter_that_cannot_run_the_trainers_is_an_error(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="the process of loopwright has ended, with the exit status 3"):
        peers.main(["--python", str(python)])


def test_every_trainer_is_pinned() -> None:
    lines = peers.REQUIREMENTS.read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert pinned == {peer.distribution for name, peer in peers.PEERS.items() if name != "loopwright"}


def test_fewer_than_two_rounds_of_the_trainers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err
