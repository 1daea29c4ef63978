"""``python -m loopwright explain``: a trainer found by its name, its loop on the screen or in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopwright.__main__ import main

SCRIPT = """
import torch
from torch import nn

from loopwright import Trainer
from loopwright.callbacks import ProgressBar

print("made")


class Net(nn.Module):
    pass


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


class Setup:
    trainer = None


setup = Setup()
model = nn.Linear(3, 1)
trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device="cpu", accumulate=2)
number = 3


def make_trainer() -> Trainer:
    print("called")
    return Trainer(model, trainer.state.optimizer, nn.MSELoss(), callbacks=[ProgressBar()], device="cpu")


def make_with(lr: float) -> Trainer:
    return trainer


def make_number() -> int:
    return 3


def fail() -> Trainer:
    raise ValueError("no data here")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is importable for this test, and for no other."""
    name = f"script_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return name


def test_it_prints_the_loop_of_a_trainer_or_of_what_a_function_returns(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{script}:trainer"]) == 0
    out, err = capsys.readouterr()
    assert out == sys.modules[script].trainer.explain()
    assert err == "made\n"
    assert main(["explain", f"{script}:make_trainer", "--callbacks"]) == 0
    out, err = capsys.readouterr()
    assert "# on_batch_end: ProgressBar" in out
    assert "called" in err


def test_it_writes_a_file_that_runs_and_writes_it_anew_until_somebody_changes_it(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "loop.py"
    assert main(["explain", f"{script}:trainer", "-o", str(path)]) == 0
    first = path.read_text()
    assert first.endswith(sys.modules[script].trainer.explain())
    assert capsys.readouterr().out == ""
    exec(compile(first, "loop.py", "exec"), {})
    assert main(["explain", f"{script}:make_trainer", "-o", str(path)]) == 0
    assert path.read_text() != first
    changed = path.read_text().replace("optimizer.step()", "optimizer.step()  # mine")
    path.write_text(changed)
    assert main(["explain", f"{script}:trainer", "-o", str(path)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == changed


@pytest.mark.parametrize("content", ["", "x = 1\n", "# Written by hand\n\n"])
def test_a_file_of_somebody_elses_is_never_overwritten(
    script: str, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    assert main(["explain", f"{script}:trainer", "-o", str(path)]) == 1
    assert path.read_text() == content
    assert f"{path} is there already" in capsys.readouterr().err


def test_where_the_system_refuses_the_file_it_says_so(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{script}:trainer", "-o", str(tmp_path / "none" / "loop.py")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("{}", "is not MODULE:OBJECT"),
        (":trainer", "is not MODULE:OBJECT"),
        ("{}:", "is not MODULE:OBJECT"),
        ("{}:trayner", "did you mean 'trainer'?"),
        ("{}:number", "is an object of type int"),
        ("{}:number", "{}:trainer is one"),
        ("{}:make_number", "{}:make_number returned an object of type int"),
        ("{}:Net", "{}:Net is a class, and calling it makes no Trainer"),
        ("{}:Net", "{}:trainer is one"),
        ("{}:Layer", "{}:Layer is a class, and cannot be called without arguments"),
        ("{}.py:trainer", "'{}.py' is a path"),
        ("{}.py:trainer", "fix: {}:trainer\n"),
        ("./{}.py:trainer", "'./{}.py' is a path"),
        ("./{}.py:trainer", "fix: {}:trainer\n"),
        ("part/of/{}.py:setup.trainer", "fix: part.of.{}:setup.trainer\n"),
        ("part/../{}:trainer", "fix: {}:trainer\n"),
        ("../elsewhere/{}.py:trainer", "fix: {}:trainer, from the folder ../elsewhere\n"),
        ("./my-digits.py:trainer", "fix: MODULE:OBJECT, for example"),
        (".{}:trainer", "'.{}' is a relative name"),
        (".{}:trainer", "fix: {}:trainer\n"),
        ("{}:setup.trayner", "did you mean 'trainer'?"),
        ("{}:setap", "did you mean 'setup'?"),
        ("{}:make_with", "cannot be called without arguments: missing a required argument: 'lr'"),
        ("{}_x:trainer", "did you mean '{}'?"),
        ("{}.part:trainer", "there is no module"),
        ("a_module_of_no_name:trainer", "there is no module 'a_module_of_no_name'"),
    ],
)
def test_what_is_not_there_is_wrong_usage(
    script: str, named: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", named.format(script)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said.format(script) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("named", "near"),
    [
        ("{}:Trainr", "Trainer"),
        ("{}:nm", "nn"),
        ("{}:Lyer", "Layer"),
        ("torchh:nn", "torch"),
        ("pytestt:main", "pytest"),
    ],
)
def test_nothing_is_proposed_that_the_folder_does_not_hold_or_that_is_no_trainer(
    script: str, named: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", named.format(script)]) == 2
    assert f"did you mean {near!r}?" not in capsys.readouterr().err


def test_a_module_of_a_package_of_this_folder_is_proposed(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / f"package_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "digits.py").touch()
    assert main(["explain", f"{package.name}.digitz:trainer"]) == 2
    assert f"did you mean '{package.name}.digits'?" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_module_runs(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "none" / "loop.py")
    for name, said in [
        ("mine.py", "is there already"),
        ("none/loop.py", "No such file or directory"),
        ("link.py", "No such file or directory"),
        ("mine.py/loop.py", "Not a directory"),
        (".", "Is a directory"),
    ]:
        assert main(["explain", f"{script}:trainer", "-o", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    assert script not in sys.modules


def test_a_folder_that_must_not_be_written_to_is_refused_before_the_module_runs(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root nothing is refused
    assert main(["explain", f"{script}:trainer", "-o", str(tmp_path / "closed" / "loop.py")]) == 1
    assert "Permission denied" in capsys.readouterr().err
    assert script not in sys.modules


def test_a_file_is_written_through_a_link_to_one_that_is_not_there_yet(script: str, tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to(tmp_path / "loop.py")
    assert main(["explain", f"{script}:trainer", "-o", str(tmp_path / "link.py")]) == 0
    assert (tmp_path / "loop.py").read_text().endswith(sys.modules[script].trainer.explain())


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (SCRIPT, "fail"),
        ("raise ValueError('no data here')", "trainer"),
        ("import a_module_of_no_name", "trainer"),
        ("raise SystemExit(0)", "trainer"),
    ],
)
def test_what_the_module_raises_is_shown_with_its_traceback(
    tmp_path: Path, source: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"bad_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", f"{name}:{named}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" in err
    assert "raised" in err.splitlines()[-1]


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["explain"], ["explain", "a:b", "c:d"], ["explain", "a:b", "-x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: python -m loopwright explain" in capsys.readouterr().err


def test_it_runs_as_a_module_from_the_folder_of_the_script(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loopwright", "explain", f"{script}:trainer"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stdout.startswith('"""The loop of a loopwright Trainer in plain PyTorch')
    assert ran.stderr == "made\n"


@pytest.mark.parametrize("named", ["{}:nope", "{}", "{}:"])
def test_where_no_object_of_the_module_was_named_the_trainers_in_it_are(
    script: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", named.format(script)]) == 2
    err = capsys.readouterr().err
    assert f"fix: {script}:trainer is one, and so are {script}:make_trainer, {script}:fail\n" in err
    assert "make_with" not in err


def test_where_there_is_no_such_module_the_example_is_one_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "no_such_module_here"]) == 2
    assert "for example my_script:make_trainer" in capsys.readouterr().err
