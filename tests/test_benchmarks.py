"""The benchmarks run, report what they say they do, and time nothing that ends with other bits. No test here times."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoint
import measuring
import overhead
from loopwright.checkpoint.reading import read_checkpoint
from overhead import Case, OtherBitsError, Problem, Way

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "overhead.py"
THREE_BATCHES = partial(overhead.ready_made, overhead.small_network, 3, (10, 10), clocked=False)
SMALL = Case("small", THREE_BATCHES, epochs=2, steps=6)


def test_the_overhead_benchmark_reports_every_case_with_the_bits_of_the_loop_by_hand(tmp_path: Path) -> None:
    figures, table = tmp_path / "overhead.json", tmp_path / "overhead.md"
    picture = tmp_path / "overhead.png"
    files = ["--json", str(figures), "--markdown", str(table), "--plot", str(picture)]
    command = [sys.executable, str(SCRIPT), "--quick", *files]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overhead.json", "overhead.md", "overhead.png"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    assert found.keys() == {"machine", "rounds", "cases"}
    assert {"processor", "python", "torch", "loopwright", "date"} <= found["machine"].keys()
    assert [(case["case"], case["epochs"], case["steps"]) for case in found["cases"]] == [
        ("document 000", 1, 10),
        ("document 000, 100 steps", 1, 10),
        ("document 000, 1,000 steps", 1, 10),
        ("document 000, own dataset", 1, 10),
        ("document 001", 1, 1),
        ("document 002", 1, 4),
        ("ready-made batches", 1, 100),
        ("larger network", 1, 25),
        ("a single step", 1, 1),
    ]
    spread = {"median", "quartile1", "quartile3"}
    for case in found["cases"]:
        assert case["by_hand_us_per_step"].keys() == spread
        saved = {"with checkpoints"} if case["case"].endswith("0 steps") else set()
        assert case["loopwright"].keys() == {"bare", "as used"} | saved
        for way, reported in case["loopwright"].items():
            assert reported["rounds_with_equal_bits"] == found["rounds"] == 2
            assert reported["ratio"].keys() == reported["added_us_per_step"].keys() == spread
            for text in (run.stdout, table.read_text().replace(" | ", "  ").replace("| ", "")):
                rows = [
                    line for line in text.splitlines() if line.startswith(f"{case['case']}  ") and f" {way} " in line
                ]
                assert len(rows) == 1


def test_the_case_with_checkpoints_has_written_one_every_ten_epochs_and_at_the_end(tmp_path: Path) -> None:
    case = Case("small", THREE_BATCHES, epochs=25, steps=75, checkpoints=True)
    with overhead.Terminal() as screen:
        overhead.with_checkpoints(case.problem(), case, screen=screen, folder=tmp_path)()
    steps = [read_checkpoint(path).state["progress"]["step"] for path in sorted(tmp_path.glob("0/checkpoints/step-*"))]
    assert steps == [30, 60, 75]


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


TINY = checkpoint.Case("tiny", layers=2, width=8)
SAVES = [
    f"{save}: {what}"
    for save in ("first save", "later save")
    for what in ("the loop is blocked", "until it is durable")
]
RIVALS = ["torch.save", "torch.save + fsync", "raw write + fsync", "SHA-256"]


def test_the_checkpoint_benchmark_reports_every_way_for_every_size(tmp_path: Path) -> None:
    script = SCRIPT.with_name("checkpoint.py")
    figures, table = tmp_path / "checkpoint.json", tmp_path / "checkpoint.md"
    command = [sys.executable, str(script), "--quick", "--json", str(figures), "--markdown", str(table)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.md"]
    found = json.loads(figures.read_text())
    assert {"processor", "python", "torch", "loopwright", "date", "disk"} <= found["machine"].keys()
    assert found["rounds"] == 2
    (case,) = found["cases"]
    assert (case["case"], case["bytes"]) == ("100 kB", 2 * 3 * 4 * (64 * 64 + 64))  # weights and momentum
    assert list(case["ways"]) == SAVES + RIVALS
    for way, reported in case["ways"].items():
        assert reported.keys() == {"seconds", "mb_per_s", "of_torch_save", "of_raw_write_and_hash", "memory_mb"}
        assert reported["seconds"]["median"] > 0
        for text in (run.stdout, table.read_text()):
            assert sum(f"{way} " in line and "100 kB" in line for line in text.splitlines()) >= 1
    for save in ("first save", "later save"):
        blocked, durable = (case["ways"][way]["seconds"] for way in SAVES if way.startswith(save))
        assert blocked["median"] < durable["median"], "a save goes on once the loop does"


def test_the_saves_and_their_rivals_take_turns_in_an_order_that_is_reversed_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    took = checkpoint.Saves.took

    def noting(name: str, problem: checkpoint.Problem, path: Path) -> None:
        turns.append(name)

    def saving(saves: checkpoint.Saves) -> dict[str, checkpoint.Taken]:
        turns.append("save")
        return took(saves)

    monkeypatch.setattr(checkpoint, "RIVALS", {name: partial(noting, name) for name in RIVALS})
    monkeypatch.setattr(checkpoint.Saves, "took", saving)
    found = checkpoint.measure(TINY, 2, tmp_path)

    assert turns == ["save", *RIVALS[::-1], "save", "save", "save", *RIVALS]
    assert list(found["ways"]) == SAVES + RIVALS
    assert list(tmp_path.iterdir()) == []


def test_every_rival_writes_or_hashes_the_whole_state_and_syncs_where_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = checkpoint.Problem(TINY)
    state = b"".join(tensor.numpy().tobytes() for tensor in problem.tensors())
    synced: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    for name, rival in checkpoint.RIVALS.items():
        rival(problem, tmp_path / name)

    assert bytes(problem.bytes) == state
    assert (tmp_path / "raw write + fsync").read_bytes() == state
    for name in ("torch.save", "torch.save + fsync"):
        loaded = torch.load(tmp_path / name, weights_only=True)
        momentum = [entry["momentum_buffer"] for entry in loaded["optimizer"]["state"].values()]
        assert b"".join(tensor.numpy().tobytes() for tensor in (*loaded["model"].values(), *momentum)) == state
    assert synced == [(tmp_path / name).stat().st_ino for name in ("torch.save + fsync", "raw write + fsync")]
    assert not (tmp_path / "SHA-256").exists()


@pytest.mark.usefixtures("untouched_process")
def test_a_checkpoint_that_does_not_hold_the_state_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(path: Path) -> object:
        contents = read_checkpoint(path)
        contents.state["optimizer"]["state"][1]["momentum_buffer"][0] += 1.0
        return contents

    monkeypatch.setattr(checkpoint, "read_checkpoint", other)
    with pytest.raises(SystemExit, match="step-000000002 does not hold the weights and the momentum"):
        checkpoint.main(["--quick", "--folder", str(tmp_path)])


def test_ways_to_save_are_compared_within_a_round() -> None:
    torch_save, raw, sha256 = RIVALS[0], RIVALS[2], RIVALS[3]
    rounds = [dict.fromkeys(SAVES + RIVALS, checkpoint.Taken(seconds, 2e6)) for seconds in (1.0, 2.0)]
    rounds[0] |= {torch_save: checkpoint.Taken(4.0, 0), raw: checkpoint.Taken(1.0, 0), sha256: checkpoint.Taken(1.0, 0)}
    rounds[1] |= {torch_save: checkpoint.Taken(4.0, 0), raw: checkpoint.Taken(3.0, 0), sha256: checkpoint.Taken(5.0, 0)}
    found = checkpoint.report(TINY, 6_000_000, rounds)["ways"][SAVES[0]]
    medians = {name: spread["median"] for name, spread in found.items()}
    assert medians == {
        "seconds": 1.5,
        "mb_per_s": (6 + 3) / 2,
        "of_torch_save": (1 / 4 + 2 / 4) / 2,
        "of_raw_write_and_hash": (1 / 2 + 2 / 8) / 2,
        "memory_mb": 2.0,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_is_counted_from_where_the_measurement_begins() -> None:
    before = checkpoint.Memory()
    kept = mmap.mmap(-1, 10_000_000)  # from the system: the allocator may have as much at hand
    for page in range(0, len(kept), mmap.PAGESIZE):
        kept[page] = 1
    after = checkpoint.Memory()
    assert 9e6 < before.peak() < 12e6
    assert after.peak() < 2e6
    kept.close()


def test_the_library_is_as_quiet_as_before_once_nobody_listens() -> None:
    logger = logging.getLogger("loopwright")
    level, handlers = logger.level, list(logger.handlers)
    with contextlib.suppress(KeyError), checkpoint.listening(checkpoint.Saves(0)):
        assert logger.isEnabledFor(logging.DEBUG)
        raise KeyError
    assert (logger.level, list(logger.handlers)) == (level, handlers)


def test_fewer_than_two_rounds_of_saves_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checkpoint.main(["--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err
