"""``python -m loopwright doctor``: what it finds, what it calls a problem, and how every command ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import loopwright
from clean_environment import ROOT
from loopwright import doctor
from loopwright.__main__ import main
from test_packaging import PROJECT

SHORT = 0.01


def hide(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let packages be of other versions, or missing, as far as the installation's metadata say."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package not in versions:
            return real(package)
        if (other := versions[package]) is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return other

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_it_requires_what_the_package_requires() -> None:
    declared = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["project"]["dependencies"])}
    assert {name: f">={oldest}" for name, oldest in doctor.REQUIRED.items()} == declared
    optional = PROJECT["project"]["optional-dependencies"]
    assert doctor.EXTRAS.keys() == optional.keys() - {"docs", "dev"}
    for extra, packages in doctor.EXTRAS.items():
        declared = {r.name: str(r.specifier) for r in map(Requirement, optional[extra])}
        assert {name: f">={oldest}" for name, oldest in packages.items()} == declared


def test_a_sound_installation_has_no_problem_and_its_fit_learns() -> None:
    report = doctor.examine(SHORT)
    assert report["problems"] == []
    assert report["versions"]["loopwright"] == loopwright.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"].keys() >= {"cpu"}
    assert {extra["install"] for extra in report["extras"].values()} == {None}
    assert report["threads"]["torch"] == torch.get_num_threads()
    fit = report["fit"]
    assert fit is not None
    assert fit["steps"] >= 1
    assert fit["steps_per_second"] == pytest.approx(fit["steps"] / fit["seconds"])
    assert fit["loss"][1] < fit["loss"][0]


def test_it_leaves_the_random_numbers_as_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    doctor.examine(SHORT)
    assert torch.equal(torch.rand(3), expected)


def test_a_missing_extra_is_no_problem_and_comes_with_the_line_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, torchmetrics=None, matplotlib="3.7.9")
    report = doctor.examine(SHORT)
    assert report["problems"] == []
    assert report["extras"]["metrics"] == {
        "packages": {"torchmetrics": None},
        "install": 'pip install "loopwright[metrics]"',
    }
    assert report["extras"]["plot"]["install"] == 'pip install "loopwright[plot]"'  # it is there, and too old
    assert 'torchmetrics missing; pip install "loopwright[metrics]"' in doctor.as_text(report)


def test_a_missing_or_old_requirement_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, tensorboard=None, torch="2.9.1+cu128")
    assert doctor.examine(SHORT)["problems"] == [
        'torch 2.9.1+cu128 is older than loopwright requires: pip install "torch>=2.10"',
        'tensorboard is not installed, and loopwright requires it: pip install "tensorboard>=2.16"',
    ]


def test_a_folder_that_is_gone_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    report = doctor.examine(SHORT)
    assert report["folders"]["temporary"]["writable"] is False
    assert report["folders"]["working"]["writable"] is True
    [problem] = report["problems"]
    assert "the folder for temporary files" in problem
    assert "No such file or directory" in problem


def test_a_working_folder_that_is_gone_is_a_problem_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor.examine(SHORT)  # MKL finds its libraries at the first product, and from no folder that is gone
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    report = doctor.examine(SHORT)
    assert report["folders"]["working"] == {"path": "none", "writable": False, "free_mib": None}
    assert report["problems"] == ["the working folder (none) cannot be written to: No such file or directory"]


def test_a_small_shared_memory_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine(SHORT)
    if report["shared_memory_mib"] is None:
        pytest.skip("this system has none there")
    assert bool(report["notes"]) == (report["shared_memory_mib"] <= 64)
    monkeypatch.setattr(doctor, "_MIB", 2**60)  # which makes any memory a small one
    assert "num_workers=0" in doctor.examine(SHORT)["notes"][0]
    monkeypatch.setattr(doctor, "_SHARED", tmp_path / "nowhere")
    report = doctor.examine(SHORT)
    assert report["shared_memory_mib"] is None
    assert "shared memory: not known here" in doctor.as_text(report)


def test_a_fit_that_fails_is_a_problem_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> None:
        raise RuntimeError(f"{Path.home()}/lib.so: no kernel image")

    monkeypatch.setattr(torch.nn.functional, "mse_loss", broken)
    report = doctor.examine(SHORT)
    assert report["fit"] is None
    [problem] = report["problems"]
    assert problem.startswith("a small fit failed with RuntimeError: ~/lib.so: no kernel image")
    assert "PROBLEM: a small fit failed" in doctor.as_text(report)


def test_the_path_of_the_home_folder_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    work, other = tmp_path / "jane" / "work", tmp_path / "janet"
    work.mkdir(parents=True)
    other.mkdir()
    monkeypatch.chdir(work)
    report = doctor.examine(SHORT)
    assert report["folders"]["working"]["path"] == "~/work"
    assert "jane" not in doctor.as_text(report)
    monkeypatch.chdir(other)  # whose name only begins like it
    assert doctor.examine(SHORT)["folders"]["working"]["path"] == str(other)


# The command


def test_the_command_prints_words_or_one_json_object_and_says_so_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.examine
    monkeypatch.setattr("loopwright.__main__.examine", lambda: real(SHORT))
    assert main(["doctor"]) == 0
    words = capsys.readouterr().out
    assert words.splitlines()[-1] == "all is well"
    assert re.search(r"^fit on \w+(:\d+)?: [\d,]+ steps per second", words, re.MULTILINE)
    hide(monkeypatch, tqdm=None)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == doctor.Report.__annotations__.keys()
    assert report["versions"]["tqdm"] is None
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--jsno"])
    assert caught.value.code == 2


def test_the_page_names_every_key_of_the_json_object() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert [key for key in doctor.Report.__annotations__ if f"`{key}`" not in page] == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_the_code_that_a_shell_gives(signum: int, code: int, tmp_path: Path) -> None:
    """The signal comes from within the fit, so that it is sent when the command is at work, without any waiting."""
    program = (
        "import os, runpy, sys\n"
        "from loopwright import doctor\n"
        "class Clock(doctor._Clock):\n"
        "    def on_batch_end(self, state, output):\n"
        f"        os.kill(os.getpid(), {int(signum)})\n"
        "doctor._Clock = Clock\n"
        "sys.argv = ['loopwright', 'doctor']\n"
        "runpy.run_module('loopwright', run_name='__main__')\n"
    )
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=quiet)
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
