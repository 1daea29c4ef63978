"""The benchmark of GradientInspector and the table of planted faults run, and report what they say they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from faults_corpus import FAULTS, HEALTHY

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_inspected_runs_come_to_the_bits_of_the_loop_by_hand(tmp_path: Path) -> None:
    figures = tmp_path / "inspector.json"
    command = [sys.executable, str(BENCHMARKS / "inspector.py"), "--quick", "--json", str(figures)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    cases = json.loads(figures.read_text())["cases"]
    assert [case["steps"] for case in cases] == [10, 10, 10]
    assert all(case["added_percent_of_bare"].keys() == {"median", "quartile1", "quartile3"} for case in cases)


def test_the_committed_table_has_a_row_for_each_case_and_no_miss() -> None:
    table = (BENCHMARKS / "results" / "diagnosis.md").read_text()
    for case in FAULTS:
        assert f"| {case.name} | {case.rule} | {'yes' if case.half == 'fixed' else 'no'} | 5 of 5 | 5 of 5 |" in table
    for case in HEALTHY:
        assert f"| {case.name} | {'yes' if case.half == 'fixed' else 'no'} | 0 of 5 |" in table
