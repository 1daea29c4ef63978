"""The benchmark of memory runs, reports every way, and sees what is kept. No test here judges a process's size."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memory
from overhead import Terminal

SCRIPT = Path(memory.__file__)


def test_the_memory_benchmark_finds_every_way_flat(tmp_path: Path) -> None:
    figures, page = tmp_path / "memory.json", tmp_path / "memory.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(figures), "--markdown", str(page)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(figures.read_text())
    assert found.keys() == {"machine", "ways", "grows"}
    assert found["grows"] == []
    by_hand, bare, every_callback = found["ways"]
    for each, way in zip(found["ways"], ("by hand", "bare", "every callback"), strict=True):
        assert (each["way"], each["steps"], len(each["samples"])) == (way, 400, 20)
        assert all(sample["tensors"] > 0 and sample["resident_kb"] > 0 for sample in each["samples"])
        assert sum(line.startswith(way) for line in run.stdout.splitlines()) == 1
        assert sum(line.startswith(f"| {way} |") for line in page.read_text().splitlines()) == 1
    # By hand, the names of the loop hold the last step's graph while the next is computed.
    assert by_hand["graphs"]["second_half"] == [1, 1]
    assert bare["graphs"]["second_half"] == every_callback["graphs"]["second_half"] == [0, 0]
    assert bare["hooks"]["on_batch_start"][1] == bare["hooks"]["on_eval_batch_end"][1] == 0
    assert bare["hooks"]["on_backward_end"][1] == by_hand["hooks"]["on_backward_end"][1] == 1
    assert all(any(line.startswith(hook) for line in run.stdout.splitlines()) for hook in bare["hooks"])


class Keeping(memory.Watched):
    """A model that keeps what it has put out."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept.append(super().forward(inputs))
        return self.kept[-1]


def test_tensors_and_graphs_that_are_kept_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Watched", Keeping)
    with Terminal() as screen:
        samples = memory.over_steps("bare", 400, tmp_path, screen)
    found = memory.report("bare", {"samples": samples, "hooks": {}})
    assert [sample["graphs"] for sample in samples] == [step - 1 for step in range(20, 401, 20)]
    assert memory.growing([found], judge_process=False) == [
        "bare: the number of live tensors grows, from at most "
        f"{samples[9]['tensors']} to {samples[10]['tensors']} and more",
        "bare: the number of live graphs grows, from at most 199 to 219 and more",
    ]


def test_a_process_that_grows_faster_than_by_hand_is_found() -> None:
    alive = {"first_half": [5, 5], "second_half": [5, 5]}
    reports = [
        {"way": way, "tensors": alive, "graphs": alive, "resident_kb_per_step": slope}
        for way, slope in (("by hand", 0.05), ("bare", 0.14), ("every callback", 0.16))
    ]
    assert memory.growing(reports, judge_process=False) == []
    assert memory.growing(reports, judge_process=True) == [
        "every callback: the process grows by 110 kB in 1,000 steps more than by hand"
    ]


def test_the_slope_is_that_of_the_second_half() -> None:
    samples = [{"step": step, "x": 3.0 * step if step >= 500 else 0.0} for step in range(0, 1000, 50)]
    assert memory.slope(samples, "x") == pytest.approx(3.0)


def test_live_tensors_are_counted() -> None:
    gc.collect()
    before = memory.live_tensors()
    kept = [torch.zeros(1), torch.nn.Parameter(torch.zeros(1))]
    assert memory.live_tensors() - before == len(kept)


def test_steps_that_cannot_be_divided_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--steps", "150"])
    assert "a multiple of 100" in capsys.readouterr().err
