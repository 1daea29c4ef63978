"""The one command runs every benchmark, and puts what each writes where the documentation looks for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import everything
from everything import BENCHMARKS, HERE, ROOT, Benchmark


def test_every_benchmark_of_the_folder_is_run() -> None:
    shared, of_other_pages = {"everything", "measuring"}, {"callbacks", "diagnosis"}  # the gallery's, and the rules'
    scripts = {path.stem for path in HERE.glob("*.py")} - shared - of_other_pages
    assert {benchmark.name for benchmark in BENCHMARKS} == scripts


def test_every_figure_and_picture_of_the_page_is_written_by_a_benchmark() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    inspections = (ROOT / "docs" / "howto" / "gradients.md").read_text()
    shown = set(re.findall(r'--8<-- "benchmarks/results/(\w+)\.md"', page + inspections)) - {"diagnosis"}
    assert shown == {each.name for each in BENCHMARKS}
    assert set(re.findall(r"\(assets/bench_(\w+)\.png\)", page)) == {each.name for each in BENCHMARKS if each.plots}


def test_a_benchmark_is_told_where_to_write_and_the_other_interpreter_only_where_it_needs_it() -> None:
    plain, full = Benchmark("passes"), Benchmark("peers", plots=True, peers=True)
    found = everything.command(plain, Path("x"), "py", ("--quick",))
    assert found[0] == sys.executable
    assert found[1:] == [str(HERE / "passes.py"), "--quick", "--json", "x/passes.json", "--markdown", "x/passes.md"]
    assert everything.command(full, Path("x"), "py", ())[-4:] == ["--plot", "x/peers.png", "--python", "py"]
    assert "--python" not in everything.command(full, Path("x"), None, ())


def test_what_a_benchmark_writes_comes_to_its_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, pictures = tmp_path / "results", tmp_path / "pictures"
    places = ["--results", str(results), "--pictures", str(pictures)]
    monkeypatch.setattr(everything, "BENCHMARKS", (Benchmark("scaling", ("--quick", "--up-to", "10"), plots=True),))
    everything.main(["--short", "--only", "scaling", *places])
    assert sorted(path.name for path in results.iterdir()) == ["scaling.json", "scaling.md"]
    assert [path.name for path in pictures.iterdir()] == ["bench_scaling.png"]
    assert "== scaling" in capfd.readouterr().out


def test_a_benchmark_that_fails_is_named_and_leaves_the_former_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passes.md").write_text("former")
    monkeypatch.setattr(everything, "BENCHMARKS", (Benchmark("passes", short=("--rounds", "1")),))
    with pytest.raises(SystemExit, match="failed: passes"):
        everything.main(["--short", "--results", str(tmp_path), "--pictures", str(tmp_path)])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["former"]
