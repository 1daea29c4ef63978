"""The benchmark of imports runs, reports what is installed, and names the modules. No test here times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import imports

SCRIPT = Path(imports.__file__)


def test_the_imports_of_loopwright_are_reported_and_what_is_not_installed_is_named(tmp_path: Path) -> None:
    figures, page = tmp_path / "imports.json", tmp_path / "imports.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(figures), "--markdown", str(page)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(figures.read_text())
    assert found.keys() == {"machine", "rounds", "not_installed", "imports", "loaded_ms"}
    measured = {each["statement"]: each for each in found["imports"]}
    packages = {package for statement, package in imports.STATEMENTS.items() if statement in measured}
    assert packages | set(found["not_installed"]) == set(imports.STATEMENTS.values())
    assert not packages & set(found["not_installed"])
    for statement, each in measured.items():
        assert each["clock_ms"]["median"] > 0
        assert each["processor_ms"]["median"] > 0
        assert each["modules"] > 0
        assert any(statement in line for line in run.stdout.splitlines())
        assert any(statement in line for line in page.read_text().splitlines())
    assert len(found["loaded_ms"]) == measured[imports.LOOPWRIGHT]["modules"]
    assert {"loopwright", "loopwright.trainer"} <= found["loaded_ms"].keys()
    times = list(found["loaded_ms"].values())
    assert times == sorted(times, reverse=True)


def test_what_torch_has_imported_is_not_counted() -> None:
    said = imports.fresh(sys.executable, imports.FRESH.format(statement="import json, torch, torch.nn")).stdout
    (start, torch_there, used, there, used_then), loaded = json.loads(said)
    assert loaded == []
    assert 0 < there - torch_there < torch_there - start
    assert used_then - used >= 0


def test_fewer_than_two_rounds_of_imports_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        imports.main(["--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err
