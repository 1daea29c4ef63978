"""What a user's own type checker says: mypy --strict over a project that uses the installed wheel."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from clean_environment import ROOT, clean_python

pytestmark = pytest.mark.xdist_group("wheel")

PROJECT = ROOT / "tests" / "typing"


class Message(NamedTuple):
    """One message of mypy's."""

    line: int
    severity: str
    code: str | None
    text: str


@functools.cache
def messages(folder: Path) -> dict[str, list[Message]]:
    """What mypy says about each file of the user's project, which lies outside the checkout as a user's does."""
    project = shutil.copytree(PROJECT, folder / "project", ignore=shutil.ignore_patterns("__pycache__"))
    names = sorted(path.name for path in project.glob("*.py"))
    options = ["--strict", "--config-file=", "--output=json", "--cache-dir", str(folder / "cache")]
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--python-executable", str(clean_python(folder)), *names],
        cwd=project,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MYPY", "PYTHON"))},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr  # errors were found, and mypy itself had none
    assert ran.stderr == ""
    said: dict[str, list[Message]] = {name: [] for name in names}
    for record in map(json.loads, ran.stdout.splitlines()):
        said[record["file"]].append(Message(record["line"], record["severity"], record["code"], record["message"]))
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Message]]:
    return messages(tmp_path_factory.getbasetemp())


def stated(name: str, word: str) -> dict[int, list[str]]:
    """The lines of a file that end in a comment ``# word: this; that``, and what it states, sorted."""
    lines = enumerate((PROJECT / name).read_text(encoding="utf-8").splitlines(), start=1)
    found = {number: re.search(rf"# {word}: (.*)$", line) for number, line in lines}
    return {number: sorted(match[1].split("; ")) for number, match in found.items() if match}


def test_right_uses_are_clean(said: dict[str, list[Message]]) -> None:
    assert said["right_uses.py"] == []


def test_each_wrong_use_is_an_error_on_its_line(said: dict[str, list[Message]]) -> None:
    found: dict[int, list[str]] = defaultdict(list)
    for message in said["wrong_uses.py"]:
        if message.severity == "error":
            found[message.line].append(message.code or "")
    assert {line: sorted(codes) for line, codes in found.items()} == stated("wrong_uses.py", "error")
    assert len(found) > 40


def test_the_users_own_model_and_batch_are_revealed(said: dict[str, list[Message]]) -> None:
    found: dict[int, list[str]] = defaultdict(list)
    for message in said["reveals.py"]:
        assert message.severity == "note", message
        revealed = message.text.removeprefix('Revealed type is "').removesuffix('"')
        found[message.line].append(re.sub(r"\b(?:\w+\.)+(?=\w)", "", revealed))
    assert {line: sorted(types) for line, types in found.items()} == stated("reveals.py", "reveals")
