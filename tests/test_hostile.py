"""Checkpoints made to do harm: none runs code, writes, or is used; each is refused at once, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import hostile_checkpoints
from faults_table import Figures
from hostile_checkpoints import CASES

READER = Path(__file__).with_name("hostile_reader.py")
NAMES = [(kind, name) for kind, cases in CASES.items() for name in cases]
PARTS = {"nonsense for the run": 11, "values by the million": 4, "names": 3}  # every run reads 1 of so many
WAYS = ("read", "load_weights", "latest", "best", "inspect", "inspect --json", "fit")
Outcomes: TypeAlias = dict[str, dict[str, dict[str, Any]]]
MEMORY = 300 * 2**20  # bytes; the largest of them is 40 MB on the disk

pytestmark = [pytest.mark.xdist_group("hostile"), pytest.mark.slow]


def run_reader(*arguments: object) -> str:
    ran = subprocess.run(
        [sys.executable, str(READER), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.faults)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of the hostile checkpoints, or of a part of them, read in another process: by kind and name."""
    folder = tmp_path_factory.mktemp("hostile")
    run_reader("make", folder / "made")
    good = max((folder / "made" / "checkpoints").glob("step-*"), key=lambda path: (path.name[:14], len(path.name)))
    chosen = [pair for pair in NAMES if request.param == "all" or NAMES.index(pair) % PARTS.get(pair[0], 1) == 0]
    paths = {pair: str(hostile_checkpoints.build(good, folder / "corpus", *pair)) for pair in chosen}
    cases = {f"{kind}: {name}": path for (kind, name), path in paths.items()}
    (folder / "corpus.json").write_text(json.dumps({"good": str(good), "cases": cases}))
    before = listing(folder / "corpus")
    found = json.loads(run_reader("read", folder))
    assert listing(folder / "corpus") == before, "the corpus was written to"
    outcomes: Outcomes = {}
    for kind, name in chosen:
        outcomes.setdefault(kind, {})[name] = found[f"{kind}: {name}"]
    return outcomes


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_there_are_ten_or_more_of_each_kind() -> None:
    assert {kind: len(cases) for kind, cases in CASES.items() if len(cases) < 10} == {}


@pytest.mark.parametrize("kind", CASES)
def test_a_hostile_checkpoint_is_an_error_of_its_own_class_and_the_trainer_is_as_before(
    kind: str, outcomes: Outcomes
) -> None:
    for name, found in outcomes[kind].items():
        assert found["fit"]["kind"] == "CheckpointError", (name, found["fit"])
        assert found["unchanged"], name
        for way in ("read", "load_weights"):
            assert found[way]["kind"] in ("", "CheckpointError"), (name, way, found[way])
        for way in ("latest", "best", "inspect", "inspect --json"):
            assert found[way]["kind"] == "", (name, way, found[way])


@pytest.mark.parametrize("kind", CASES)
def test_what_does_not_pass_the_format_is_refused_in_every_way(kind: str, outcomes: Outcomes) -> None:
    for name, found in outcomes[kind].items():
        refused = found["read"]["kind"] == "CheckpointError"
        for way in ("inspect", "inspect --json"):
            assert found[way]["said"].startswith("1 " if refused else "0 "), (name, way, found[way])
        if refused:
            assert found["latest"]["said"].startswith("None "), (name, found["latest"])
    if kind not in ("names", "what looks like code", "nonsense for the run"):  # these pass as plain data here and there
        passed = [name for name, found in outcomes[kind].items() if found["read"]["kind"] == ""]
        assert passed == []


@pytest.mark.parametrize("kind", CASES)
def test_nothing_is_run_imported_opened_for_writing_or_deleted(kind: str, outcomes: Outcomes) -> None:
    events = {(name, way): found[way]["events"] for name, found in outcomes[kind].items() for way in WAYS}
    assert {where: forbidden for where, forbidden in events.items() if forbidden} == {}


def test_of_all_hostile_checkpoints_none_is_used(outcomes: Outcomes, figures: Figures) -> None:
    every = [found for kind in outcomes.values() for found in kind.values()]
    used = [found for found in every if found["fit"]["kind"] != "CheckpointError" or not found["unchanged"]]
    figures("hostile checkpoints", len(every), len(used))


@pytest.mark.parametrize("kind", CASES)
def test_each_is_refused_within_a_second_and_in_bounded_memory(kind: str, outcomes: Outcomes) -> None:
    slow = {
        (name, way): seconds
        for name, found in outcomes[kind].items()
        for way in WAYS
        if (seconds := found[way]["seconds"]) > 1
    }
    large = {name: memory for name, found in outcomes[kind].items() if (memory := found["memory"]) > MEMORY}
    assert slow == {}
    assert large == {}


def test_the_audit_sees_what_it_is_to_see(tmp_path: Path) -> None:
    program = (
        "import json, os, sys, time; from pathlib import Path; from hostile_reader import Audit\n"
        "audit = Audit(Path('/nowhere'))\n"
        "acts = [lambda: exec('1'), lambda: __import__('this'), lambda: os.system('true'), lambda: open('a', 'w'),\n"
        "        lambda: os.mkdir('b'), lambda: os.remove('a'), lambda: __import__('socket').socket()]\n"
        "print(json.dumps([audit.during(act)['events'] for act in acts]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(READER.parent), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert all(json.loads(ran.stdout.splitlines()[-1]))
