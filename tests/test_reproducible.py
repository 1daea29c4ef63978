"""Seeds, deterministic kernels, and that a fit says and leaves behind nothing of its own (U1)."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import At, Samples, line, line_trainer, ragged
from loopwright import Every, State, Trainer

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def draws() -> tuple[float, float, float]:
    """The next number of each generator."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(10, 3, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4, shuffle=True)


class Noisy(nn.Module):
    """Draws from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = line()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layer(inputs) + sum(draws())
        return out


# Seeds.


def run(seed: int | None) -> tuple[Tensor, list[dict[str, float]]]:
    model = Noisy()
    result = line_trainer(model, seed=seed, lr=0.01).fit(loader(), epochs=2)
    return model.layer.weight.detach(), result.history


def test_the_same_seed_gives_the_same_run_whatever_was_drawn_before() -> None:
    weight, history = run(7)
    draws()
    torch.manual_seed(99)
    again, history_again = run(7)
    assert torch.equal(weight, again)
    assert history == history_again
    other, _ = run(8)
    assert not torch.equal(weight, other)


def test_a_seed_seeds_python_numpy_and_torch_when_the_run_begins() -> None:
    seen: list[tuple[float, float, float]] = []
    at = At(setup=lambda state: seen.append(draws()))
    line_trainer(seed=3, callbacks=[at]).fit(ragged(2), epochs=1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert seen == [draws()]


def test_a_second_fit_of_one_run_seeds_nothing_again() -> None:
    whole, parts, data = Noisy(), Noisy(), loader()
    line_trainer(whole, seed=5, lr=0.01).fit(data, epochs=4)
    trainer = line_trainer(parts, seed=5, lr=0.01)
    trainer.fit(data, epochs=2)
    trainer.fit(data, epochs=4)
    assert torch.equal(whole.layer.weight, parts.layer.weight)


def test_a_run_that_was_stopped_before_its_first_batch_is_still_fresh() -> None:
    """So that the run begun after it is the one that the seed stands for."""
    model, twin = Noisy(), Noisy()
    reasons = ["not yet"]

    def stop_once(state: State) -> None:
        if reasons:
            state.stop(reasons.pop())

    trainer = line_trainer(model, seed=5, lr=0.01, callbacks=[At(on_fit_start=stop_once)])
    assert trainer.fit(loader(), epochs=2).stop_reason == "not yet"
    draws()
    assert trainer.fit(loader(), epochs=2).stop_reason == "epochs"
    line_trainer(twin, seed=5, lr=0.01).fit(loader(), epochs=2)
    assert torch.equal(model.layer.weight, twin.layer.weight)


def test_without_a_seed_the_generators_are_the_users_own() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    expected = draws()
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    line_trainer().fit(ragged(2, 2), ragged(2), epochs=2)  # nothing in there draws
    assert draws() == expected


def test_evaluate_and_predict_seed_nothing() -> None:
    torch.manual_seed(11)
    expected = draws()
    torch.manual_seed(11)
    trainer = line_trainer(seed=1)
    trainer.evaluate(ragged(2))
    trainer.predict(ragged(2))
    assert draws()[2] == expected[2]


# Deterministic kernels.


def settings_of_torch() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get(CUBLAS),
    )


@pytest.fixture(params=["off", "warn only", "on", "benchmarking"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """What the user had set."""
    monkeypatch.delenv(CUBLAS, raising=False)
    first = settings_of_torch()
    if request.param == "warn only":
        torch.use_deterministic_algorithms(True, warn_only=True)
    elif request.param == "on":
        torch.use_deterministic_algorithms(True)
        monkeypatch.setenv(CUBLAS, ":16:8")
    elif request.param == "benchmarking":
        torch.backends.cudnn.benchmark = True
    yield settings_of_torch()
    torch.use_deterministic_algorithms(first[0], warn_only=first[1])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = first[2:4]


def test_deterministic_kernels_are_on_in_every_call_and_off_again_after_it(before: tuple[Any, ...]) -> None:
    seen: list[tuple[Any, ...]] = []
    note = At(on_step_end=lambda state: seen.append(settings_of_torch()))
    trainer = line_trainer(deterministic=True, callbacks=[note])
    trainer.fit(ragged(2), epochs=1)
    assert settings_of_torch() == before
    trainer.evaluate(ragged(2))
    assert settings_of_torch() == before
    trainer.predict(ragged(2), forward=lambda model, batch: seen.append(settings_of_torch()))
    assert settings_of_torch() == before
    assert [found[:4] for found in seen] == [(True, False, True, False)] * 2
    assert all(found[4] in (":4096:8", ":16:8") for found in seen)


def test_deterministic_kernels_are_off_again_after_an_error(before: tuple[Any, ...]) -> None:
    def fail(state: State) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        line_trainer(deterministic=True, callbacks=[At(on_step_end=fail)]).fit(ragged(2), epochs=1)
    assert settings_of_torch() == before


def test_a_kernel_that_has_no_deterministic_form_is_torchs_error() -> None:
    def step(model: nn.Module, batch: Samples) -> Tensor:
        loss: Tensor = model(batch[0]).mean()
        return loss + torch.empty(1).put_(torch.zeros(1, dtype=torch.long), loss.reshape(1)).sum()

    line_trainer(step=step).fit(ragged(2), epochs=1)
    with pytest.raises(RuntimeError, match="deterministic"):
        line_trainer(step=step, deterministic=True).fit(ragged(2), epochs=1)


def test_by_default_torchs_settings_are_left_alone(before: tuple[Any, ...]) -> None:
    seen: list[tuple[Any, ...]] = []
    note = At(on_step_end=lambda state: seen.append(settings_of_torch()))
    line_trainer(callbacks=[note]).fit(ragged(2), epochs=1)
    assert seen == [before]


# U1: nothing is printed, nothing is made, one logger.

EVERYTHING: dict[str, Any] = {
    "accumulate": 2,
    "clip_norm": 1.0,
    "seed": 0,
    "deterministic": True,
    "on_nonfinite": "skip",
    "precision": "bf16",
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "many settings"])
def test_a_fit_prints_nothing_and_makes_no_file(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = line_trainer(**settings)
    trainer.fit(ragged(4, 4, 1), ragged(4), epochs=2, validate=Every(steps=1))
    trainer.evaluate(ragged(4))
    trainer.predict(ragged(4))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_program_of_its_own_prints_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Where no test framework has set up logging: what is at WARNING would go to stderr there."""
    program = """
        import torch
        from torch import nn
        from loopwright import Trainer

        model = nn.Linear(3, 1)
        model.eval()
        batches = [(torch.zeros(2, 3), torch.zeros(2, 1))]
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device="cpu")
        trainer.fit(batches, batches, epochs=2)
        trainer.fit(batches, batches, epochs=3)
        trainer.evaluate(batches)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_said_is_said_by_the_one_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    model = line()
    model.eval()
    bad = [(x, y * float("nan")) for x, y in ragged(2)]
    trainer = line_trainer(model)
    trainer.fit(ragged(2), bad, epochs=3)
    trainer.fit(ragged(2), bad, epochs=3)
    assert {record.name for record in caplog.records} == {"loopwright"}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 3  # eval mode, nan, nothing to train: none of them twice


def test_the_logger_has_no_handler_and_no_level_of_its_own() -> None:
    logger = logging.getLogger("loopwright")
    assert logger.handlers == []
    assert logger.level == logging.NOTSET
    assert logger.propagate


def test_a_fit_leaves_warning_filters_and_threads_alone() -> None:
    filters, threads = list(warnings.filters), torch.get_num_threads()
    trainer: Trainer = line_trainer(deterministic=True, seed=1)
    trainer.fit(ragged(2), epochs=1)
    assert warnings.filters == filters
    assert torch.get_num_threads() == threads
