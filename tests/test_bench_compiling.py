"""The benchmark of compiling counts graphs, and says after how many steps compiling pays. No test here times."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compiling

SCRIPT = Path(compiling.__file__)


@pytest.mark.slow
def test_a_process_trains_plainly_and_compiled_and_has_a_graph_each_for_training_and_validation() -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--serve", compiling.CASES[0].name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["graphs"] == 2
    assert found["deviation"] == 0.0  # the same kernels: nothing was made machine code
    assert found["compile_s"] > 0
    assert min(found["eager_us"], found["compiled_us"], found["eager_val_us"], found["compiled_val_us"]) > 0


def test_it_pays_where_the_time_saved_has_made_up_for_compiling_or_never() -> None:
    assert compiling.break_even(2.0, 300.0, 100.0) == pytest.approx(10_000)
    assert compiling.break_even(2.0, 100.0, 100.0) == compiling.break_even(2.0, 100.0, 300.0) == math.inf


def said(**changes: float) -> dict[str, float]:
    return {
        "compile_s": 3.0,
        "compile_val_s": 1.0,
        "eager_us": 200.0,
        "compiled_us": 100.0,
        "graphs": 2,
        "deviation": 1e-8,
    } | changes


def reported(**changes: float) -> dict[str, Any]:
    warm = said(compile_s=1.0, **changes)
    return compiling.report(compiling.CASES[0], {compiling.COLD: [said(**changes)] * 2, compiling.WARM: [warm] * 2})


def test_a_report_has_the_break_even_of_both_states_of_the_cache() -> None:
    found = reported()
    assert found["break_even_steps"] == {"cold": pytest.approx(30_000), "warm": pytest.approx(10_000)}
    assert found["graphs"] == [2, 2]
    heading, cold, warm = compiling.as_table([found])
    assert len(heading) == len(cold) == len(warm)
    assert (cold[2], cold[7], warm[2], warm[7]) == ("cold", "30,000", "warm", "10,000")


def test_a_model_that_is_slower_compiled_never_gains_and_is_drawn_too(tmp_path: Path) -> None:
    never = reported(compiled_us=250.0)
    assert never["break_even_steps"] == {"cold": None, "warm": None}
    assert [row[7] for row in compiling.as_table([never])[1:]] == ["never", "never"]
    compiling.draw([reported(), never], tmp_path / "compiling.png")
    assert (tmp_path / "compiling.png").read_bytes().startswith(b"\x89PNG")


def test_how_far_apart_weights_are_is_a_share_of_their_size() -> None:
    one, other = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[3.0, 4.0]]))
        other.weight.copy_(torch.tensor([[3.0, 5.0]]))
    assert compiling.deviation(one, other) == pytest.approx(0.2)
    assert compiling.deviation(one, one) == 0.0
