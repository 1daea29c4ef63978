"""The look at the API since the last version: what breaks a program fails, unless the version says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import api_check
from clean_environment import run

ARGUMENT_GONE = "def fit(epochs: int) -> None: ...\n"
ARGUMENT_ADDED = "def fit(epochs: int, steps: int, *, resume: str = '') -> None: ...\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A repository with version 0.1.0 of a package of this name, not tagged yet."""
    write(tmp_path, "0.1.0", "def fit(epochs: int, steps: int) -> None: ...\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def write(folder: Path, version: str, code: str) -> None:
    (folder / "src" / "loopwright").mkdir(parents=True, exist_ok=True)
    text = f'__version__ = "{version}"\n{code}'
    (folder / "src" / "loopwright" / "__init__.py").write_text(text, encoding="utf-8")


def git(folder: Path, *arguments: str) -> None:
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments, folder=folder)


def test_before_the_first_tag_there_is_nothing_to_compare_with(
    package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(package, "0.1.0", ARGUMENT_GONE)
    assert api_check.check(package) == 0
    assert "no version is tagged yet" in capfd.readouterr().out


def test_what_breaks_a_program_fails_unless_the_version_says_so(
    package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    git(package, "tag", "v0.1.0")
    write(package, "0.1.0", ARGUMENT_ADDED)
    assert api_check.check(package) == 0
    write(package, "0.1.1", ARGUMENT_GONE)
    assert api_check.check(package) == 1
    out, err = capfd.readouterr()
    assert "steps" in out + err
    write(package, "0.2.0", ARGUMENT_GONE)
    assert api_check.check(package) == 0
    assert "which 0.2.0 may do" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("version", "tag", "may"),
    [
        ("0.1.1", "v0.1.0", False),
        ("0.2.0.dev0", "v0.1.3", True),
        ("1.0.0", "v0.9.0", True),
        ("1.1.0", "v1.0.0", False),
        ("2.0.0", "v1.9.0", True),
    ],
)
def test_a_minor_version_may_break_before_the_first_major_one_and_not_after(version: str, tag: str, may: bool) -> None:
    assert api_check.announced(version, tag) is may
