"""R1: a run that is killed again and again, at any instant, ends as the one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kill_runs
from faults_table import Figures
from kill_runs import KINDS
from nursery import Nursery, nursery


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    with nursery() as found:
        yield found


def _result(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "result.json").read_text())
    return found


def _run_and_kill(children: Nursery, kind: str, folder: Path, seconds: float, chance: random.Random) -> tuple[int, str]:
    """Run it to its end, killed at random instants on the way; how often it was, and what it printed."""
    folder.mkdir()
    output = folder / "output.txt"
    kills = 0
    for attempt in range(20):
        pid = children.start(kill_runs.run, kind, str(folder), chance.choice([0, 1, 2]), output=output)
        if attempt < 5:
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        code = children.wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        assert code == -signal.SIGKILL, output.read_text()
    return kills, output.read_text()


@pytest.mark.parametrize(
    "runs", [pytest.param(4, id="4 runs"), pytest.param(200, id="200 runs", marks=pytest.mark.faults)]
)
def test_a_run_killed_at_random_instants_ends_as_the_one_never_killed(
    children: Nursery, tmp_path: Path, figures: Figures, runs: int
) -> None:
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)
    expected: dict[str, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    kinds = list(KINDS)
    chance.shuffle(kinds)
    lost: list[str] = []
    kills = 0
    for number in range(runs):
        kind = kinds[number % len(kinds)]
        if kind not in expected:
            whole = tmp_path / f"unbroken-{number}"
            whole.mkdir()
            begin = time.monotonic()
            code = children.run(kill_runs.run, kind, str(whole), 0, output=whole / "output.txt")
            seconds[kind] = time.monotonic() - begin
            assert code == 0, (whole / "output.txt").read_text()
            expected[kind] = _result(whole)
        folder = tmp_path / f"killed-{number}"
        killed, _ = _run_and_kill(children, kind, folder, seconds[kind], chance)
        kills += killed
        found = _result(folder)
        wrong = [name for name in expected[kind] if expected[kind][name] != found[name]]
        if wrong:
            lost.append(f"{kind} (run {number}, seed {seed}): {', '.join(wrong)} differ")
    assert kills >= runs, "too few of the runs were killed at all"
    assert lost == []
    figures(f"kill -9 at a random instant, {kills} of them, in runs", runs, len(lost))
