"""``python -m loopwright inspect``: what is in a checkpoint, verified, in words and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import small_trainer, some_batches
from hostile_checkpoints import put, seal, with_manifest
from loopwright.__main__ import main
from loopwright.callbacks import Checkpoint, EarlyStopping
from loopwright.checkpoint import MODEL, list_checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoints of two epochs."""
    stopping = EarlyStopping("val/loss", mode="min", restore_best=True)
    saving = Checkpoint(tmp_path / "checkpoints", monitor="val/loss", mode="min")
    small_trainer(stopping, saving).fit(some_batches(), some_batches(), epochs=2)
    return tmp_path / "checkpoints"


def damage(checkpoint: Path) -> None:
    data = bytearray((checkpoint / MODEL).read_bytes())
    data[-1] ^= 1
    (checkpoint / MODEL).write_bytes(data)


def test_it_shows_what_is_in_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list_checkpoints(folder)[0]
    assert main(["inspect", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{path}: whole"
    assert "  step: 3" in lines
    assert "  monitor: val/loss" in lines
    assert "  callbacks: Checkpoint, EarlyStopping" in lines
    assert "  model.safetensors: 38 numbers, tensors: 9" in lines
    assert "    0.weight  float32  (4, 3)" in lines


def test_of_a_folder_it_shows_every_checkpoint_oldest_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": whole")]
    assert found == [f"{path}: whole" for path in list_checkpoints(folder)]
    assert len(found) >= 2


def test_as_json_each_is_one_object_on_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(list_checkpoints(folder)[0])
    assert main(["inspect", "--json", str(folder)]) == 1
    first, second, *_ = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first.keys() == {"path", "whole", "error"}
    assert first["whole"] is False
    assert "SHA-256 differs" in first["error"]
    assert second["whole"] is True
    assert second["facts"]["step"] == 6
    assert second["callbacks"] == ["Checkpoint", "EarlyStopping"]
    assert second["weights"]["3.bias"] == {"dtype": "float32", "shape": [1]}


def test_a_damaged_one_is_named_and_the_others_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good, *_ = list_checkpoints(folder)
    damage(bad)
    assert main(["inspect", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert f"{good}: whole" in out
    assert f"{bad}: whole" not in out
    assert str(bad / MODEL) in err
    assert "  fix: an older checkpoint" in err


@pytest.mark.parametrize(
    ("name", "words"), [("none", "cannot be read"), ("empty", "holds no checkpoints"), ("file", "is no folder")]
)
def test_where_there_is_no_checkpoint_it_says_so_and_what_to_give(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["inspect", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{tmp_path / name} {words}" in err
    assert "  fix: " in err
    assert "manifest.json" not in err


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["inspect", "a", "b"], ["inspekt", "a"], ["inspect", "-x", "a"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m loopwright" in capsys.readouterr().err


def test_the_help_says_what_the_exit_codes_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0, all of them are whole; 1, one is not, or there is none; 2, wrong usage." in said


def test_a_checkpoint_that_holds_another_is_one_that_is_not_whole(folder: Path) -> None:
    outer, inner, *_ = list_checkpoints(folder)
    inner.rename(outer / inner.name)
    assert main(["inspect", str(outer)]) == 1


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_nothing_in_a_checkpoint_reaches_the_terminal_as_a_command(
    as_json: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = list_checkpoints(folder)
    escape = "\x1b]0;owned\x07\x9b31m\r\u202e"
    put("callbacks", {escape: {}})(first)
    with_manifest(lambda head: head["facts"].update({escape: escape}))(first)
    (second / f"a{escape}").write_text("")
    main(["inspect", *as_json, str(folder)])
    out, err = capsys.readouterr()
    assert "owned" in out + err
    for char in "\x1b\x07\x9b\r\u202e":
        assert char not in out + err


def test_facts_of_odd_types_are_shown_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list_checkpoints(folder)[0]
    seal(path, lambda head: head["facts"].update(score={"$float": "nan"}, more={"$tuple": [1, {"$dict": [[2, None]]}]}))
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["facts"]
    assert facts["score"] == {"$float": "nan"}
    assert main(["inspect", str(path)]) == 0
    assert "  more: (1, {2: None})" in capsys.readouterr().out.splitlines()


def test_it_runs_as_a_module_and_returns_its_code(folder: Path) -> None:
    for path, code in ((folder, 0), (folder / "none", 1)):
        ran = subprocess.run([sys.executable, "-m", "loopwright", "inspect", str(path)], capture_output=True, text=True)
        assert ran.returncode == code
        assert "Traceback" not in ran.stderr
