"""The benchmarks run, report what they say they do, and time nothing that ends with other bits. No test here times."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import measuring
import overhead
from overhead import Case, OtherBitsError, Problem, Way

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "overhead.py"
THREE_BATCHES = partial(overhead.ready_made, overhead.small_network, 3, (10, 10), clocked=False)
SMALL = Case("small", THREE_BATCHES, epochs=2, steps=6)


def test_the_overhead_benchmark_reports_every_case_with_the_bits_of_the_loop_by_hand(tmp_path: Path) -> None:
    figures, table = tmp_path / "overhead.json", tmp_path / "overhead.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(figures), "--markdown", str(table)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overhead.json", "overhead.md"]
    found = json.loads(figures.read_text())
    assert found.keys() == {"machine", "rounds", "cases"}
    assert {"processor", "python", "torch", "loopwright", "date"} <= found["machine"].keys()
    assert [(case["case"], case["epochs"], case["steps"]) for case in found["cases"]] == [
        ("document 000", 1, 10),
        ("document 001", 1, 1),
        ("document 002", 1, 4),
        ("ready-made batches", 1, 100),
        ("larger network", 1, 25),
        ("a single step", 1, 1),
    ]
    spread = {"median", "quartile1", "quartile3"}
    for case in found["cases"]:
        assert case["by_hand_us_per_step"].keys() == spread
        assert case["loopwright"].keys() == {"bare", "as used"}
        for way, reported in case["loopwright"].items():
            assert reported["rounds_with_equal_bits"] == found["rounds"] == 2
            assert reported["ratio"].keys() == reported["added_us_per_step"].keys() == spread
            assert sum(case["case"] in line and way in line for line in run.stdout.splitlines()) == 1
            assert sum(case["case"] in line and way in line for line in table.read_text().splitlines()) == 1


def longer(problem: Problem, case: Case) -> Callable[[], object]:
    return partial(problem.by_hand, case.epochs + 1)


def drawing(problem: Problem, case: Case) -> Callable[[], object]:
    def run() -> None:
        problem.by_hand(case.epochs)
        torch.rand(())

    return run


@pytest.mark.parametrize(("other", "differs"), [(longer, "0.weight"), (drawing, "random generator's state")])
def test_a_way_that_comes_to_other_bits_gets_no_time(other: Way, differs: str) -> None:
    with pytest.raises(OtherBitsError, match=f"small, other, round 0: other bits than by hand in .*{differs}"):
        overhead.measure(SMALL, {"by hand": overhead.by_hand, "other": other}, rounds=2)


@pytest.fixture
def untouched_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A benchmark sets up the process that it has for itself; here that is undone."""
    for name in ("TERM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.mark.usefixtures("untouched_process")
def test_a_benchmark_without_equal_bits_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "CASES", (SMALL,))
    monkeypatch.setattr(overhead, "bare", longer)
    with pytest.raises(SystemExit, match="small, bare, round 0"):
        overhead.main(["--quick"])


def test_the_ways_take_turns_in_an_order_that_is_reversed_every_round() -> None:
    turns = []

    def noting(name: str, problem: Problem, case: Case) -> Callable[[], object]:
        turns.append(name)
        return partial(problem.by_hand, case.epochs)

    times = overhead.measure(SMALL, {name: partial(noting, name) for name in "abc"}, rounds=3)

    assert "".join(turns) == "cbaabccbaabc"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}  # the first is not counted


def test_every_round_is_seeded_anew_and_alike_for_all_ways() -> None:
    weights: dict[str, list[float]] = {"a": [], "b": []}

    def noting(name: str, problem: Problem, case: Case) -> Callable[[], object]:
        weights[name].append(next(problem.model.parameters()).sum().item())
        return partial(problem.by_hand, case.epochs)

    overhead.measure(SMALL, {name: partial(noting, name) for name in weights}, rounds=2)

    assert weights["a"] == weights["b"]
    assert len(set(weights["a"])) == 3


def test_a_step_on_ready_made_batches_is_the_median_time_from_one_batch_to_the_next() -> None:
    data = overhead.Clocked([(torch.zeros(1), torch.zeros(1))] * 3)
    for _ in range(2):
        assert len(list(data)) == len(data) == 3
    assert len(data.asked) == 6
    data.asked = [0.0, 1.0, 2.0, 103.0, 105.0, 107.0]
    assert data.step() == 2.0


def test_added_time_and_ratio_are_taken_within_a_round() -> None:
    times = {"by hand": [6e-6, 12e-6], "bare": [9e-6, 15e-6]}
    found = overhead.report(SMALL, times)["loopwright"]["bare"]
    assert found["added_us_per_step"]["median"] == pytest.approx(3)
    assert found["ratio"]["median"] == pytest.approx((1.5 + 1.25) / 2)


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert measuring.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == measuring.Spread(3.0, 2.0, 4.0)
    assert measuring.Spread(0.714, 0.7, 0.73).text(2) == "0.71 (0.70..0.73)"


def test_garbage_of_others_is_collected_before_the_clock_starts() -> None:
    class Node:
        alive = 0

        def __init__(self) -> None:
            self.cycle = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    Node()
    seen = []
    assert measuring.seconds(lambda: seen.append(Node.alive)) > 0
    assert seen == [0]


def test_tables_are_aligned_on_a_terminal_and_ruled_on_a_page() -> None:
    table = [["case", "us"], ["a", "10.5"]]
    assert measuring.aligned(table) == "case  us\na     10.5"
    assert measuring.markdown(table) == "| case | us |\n| --- | --- |\n| a | 10.5 |"


def test_fewer_than_two_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err
