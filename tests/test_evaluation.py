"""What evaluate and predict give, and metrics over whole passes."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
import torchmetrics
from torch import Tensor, nn

from helpers import At, PassError, Samples, line, line_trainer, ragged, raising_after, small_model
from loopwright import Callback, ConfigError, DataError, Every, Output, Schedule, State, Trainer
from loopwright.callbacks import CSVLogger, EarlyStopping
from loopwright.testing import HookRecorder


def test_evaluate_names_its_scores_and_its_stage_is_test_whatever_the_name() -> None:
    recorder = HookRecorder()
    trainer = line_trainer(callbacks=[recorder], metrics={"mae": torchmetrics.MeanAbsoluteError()})
    assert list(trainer.evaluate(ragged(2))) == ["test/loss", "test/mae"]
    assert list(trainer.evaluate(ragged(2), name="held out/2024")) == ["held out/2024/loss", "held out/2024/mae"]
    assert {call.stage for call in recorder.calls} == {"test"}
    once = ["setup", "on_eval_start", "on_eval_batch_end", "on_eval_end", "teardown"]
    assert recorder.hooks == once * 2
    assert all(type(value) is float for value in trainer.evaluate(ragged(2)).values())
    assert trainer.state.metrics["held out/2024/loss"] > 0


@pytest.mark.parametrize("name", ["", "../test", "/test", "=1+1", "a\nb", " ", 3, None])
def test_a_name_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a metric"):
        line_trainer().evaluate(ragged(2), name=name)


def test_evaluate_draws_and_changes_nothing_of_the_run() -> None:
    model = small_model()
    trainer = line_trainer(model)
    result = trainer.fit(ragged(4, 4), ragged(4), epochs=2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    scores = trainer.evaluate(ragged(4, 2))
    assert scores == trainer.evaluate(ragged(4, 2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert trainer.state.progress == result.progress
    assert trainer.state.stage == "train"


def test_test_passes_are_in_no_history_and_in_no_record(tmp_path: Path) -> None:
    """What a callback logs in a test pass is the test's as well."""

    def note(state: State) -> None:
        if state.stage == "test":
            state.log("beside the test", 1.0)

    path = tmp_path / "metrics.csv"
    trainer = line_trainer(callbacks=[CSVLogger(path), At(on_eval_end=note)])
    trainer.evaluate(ragged(2), name="before")
    trainer.fit(ragged(2), ragged(2), epochs=1)
    trainer.evaluate(ragged(2))
    trainer.evaluate(ragged(2), name="train")
    result = trainer.fit(ragged(2), ragged(2), epochs=2)
    expected = {"epoch", "step", "train/loss", "val/loss"}
    assert [set(row) for row in result.history] == [expected, expected]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert set(rows[0]) == expected
    assert float(rows[1]["train/loss"]) == result.history[1]["train/loss"]


def test_a_test_pass_under_the_name_of_the_validation_is_not_taken_for_one() -> None:
    """Neither as the first value, nor as a fresh one, nor as the end of what was logged before."""
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    stopping = EarlyStopping("val/loss", mode="min", patience=2)
    trainer = line_trainer(
        model, optimizer=optimizer, callbacks=[stopping], schedule=Schedule(plateau, "epoch", "val/loss")
    )
    good = ragged(2)
    huge = [(good[0][0], good[0][1] + 1000)]
    trainer.evaluate(huge, name="val")
    trainer.fit(good, good, epochs=1, validate=Every(epochs=2))
    assert stopping.best is None
    trainer.fit(good, good, epochs=2, validate=Every(epochs=2))
    best = stopping.best
    assert best is not None
    assert best < 100
    trainer.evaluate(huge, name="val")
    trainer.fit(good, good, epochs=3, validate=Every(epochs=2))
    assert stopping.best == best
    assert stopping.waited == 0
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_test_pass_that_fails_leaves_nothing_fresh_behind() -> None:
    def fail_in_test(state: State) -> None:
        if state.stage == "test":
            raise PassError

    trainer = line_trainer(callbacks=[At(on_eval_end=fail_in_test)])
    with pytest.raises(PassError):
        trainer.evaluate(ragged(2))
    assert set(trainer.fit(ragged(2), epochs=1).history[0]) == {"epoch", "step", "train/loss"}


def test_early_stopping_ignores_test_passes() -> None:
    stopping = EarlyStopping("test/loss", mode="min")
    trainer = line_trainer(callbacks=[stopping])
    trainer.evaluate(ragged(2))
    assert stopping.best is None


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_step_end", "on_eval_end", "on_epoch_end", "on_fit_end"])
@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_a_call_of_the_trainer_from_a_hook_is_an_error_and_does_no_harm(hook: str, call: str) -> None:
    holder: list[Trainer] = []

    class Nested(Callback[Any]):
        armed = True

    def nest(self: Nested, state: State) -> None:
        if self.armed:
            self.armed = False
            trainer = holder[0]
            if call == "fit":
                trainer.fit(ragged(2), epochs=5)
            elif call == "evaluate":
                trainer.evaluate(ragged(2))
            else:
                trainer.predict(ragged(2))

    nested = type("Nested", (Nested,), {hook: nest})()
    trainer = line_trainer(callbacks=[nested])
    holder.append(trainer)
    with pytest.raises(ConfigError, match="while the trainer is at work") as caught:
        trainer.fit(ragged(2), ragged(2), epochs=2)
    assert any(hook in note for note in caught.value.__notes__)
    result = trainer.fit(ragged(2), ragged(2), epochs=3)
    assert result.progress.epoch == 3
    assert trainer.evaluate(ragged(2)).keys() == {"test/loss"}


# What predict gives.


class Boxed(NamedTuple):
    inputs: Tensor
    note: str


@dataclass
class Fancy:
    logits: Tensor
    hidden: dict[str, Tensor]


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Fancy:
        out = self.layer(inputs)
        return Fancy(out, {"inputs": out * 2})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inputs: inputs,
        lambda inputs: (inputs, torch.zeros(len(inputs))),
        lambda inputs: [inputs, torch.zeros(len(inputs))],
        lambda inputs: (inputs,),
        lambda inputs: Boxed(inputs, "a"),
    ],
    ids=["tensor", "tuple", "list", "tuple of one", "named tuple"],
)
def test_predict_gives_the_models_output_for_each_batch_on_the_cpu(wrap: Callable[[Tensor], Any]) -> None:
    inputs = [torch.randn(n, 3) for n in (4, 1)]
    model = small_model()
    outputs = line_trainer(model).predict([wrap(x) for x in inputs])
    model.eval()
    assert torch.equal(torch.cat(outputs), torch.cat([model(x) for x in inputs]))
    assert all(output.device.type == "cpu" and not output.requires_grad for output in outputs)


def test_predict_gives_a_dict_to_the_model_whole() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            out: Tensor = self.layer(batch["x"])
            return out

    assert line_trainer(Takes()).predict([{"x": torch.zeros(2, 3)}])[0].shape == (2, 1)


def test_predict_keeps_the_structure_of_an_output() -> None:
    (output,) = line_trainer(Several()).predict([torch.zeros(2, 3)])
    assert isinstance(output, Fancy)
    assert not output.logits.requires_grad
    assert torch.equal(output.hidden["inputs"], output.logits * 2)


def test_predict_brings_home_an_output_that_moves_itself() -> None:
    went: list[torch.device] = []

    class Moving:
        def to(self, device: torch.device) -> Moving:
            went.append(device)
            return self

    outputs = line_trainer().predict([torch.zeros(2, 3)], forward=lambda model, batch: Moving())
    assert isinstance(outputs[0], Moving)
    assert went == [torch.device("cpu")]


def test_predict_fires_no_hook_and_its_stage_is_predict() -> None:
    recorder = HookRecorder()
    stages: list[str] = []
    trainer = line_trainer(callbacks=[recorder])
    trainer.predict([torch.zeros(2, 3)], forward=lambda model, batch: stages.append(trainer.state.stage))
    assert recorder.calls == []
    assert stages == ["predict"]
    assert trainer.state.stage == "train"


def test_with_a_step_predict_takes_its_predictions_and_forward_goes_before_both() -> None:
    def step(model: nn.Module, batch: Samples) -> Output:
        out = model(batch[0])
        return Output(out.mean(), predictions={"twice": 2 * out})

    model = line()
    (batch,) = ragged(4)
    trainer = line_trainer(model, step=step)
    assert torch.equal(trainer.predict([batch])[0]["twice"], 2 * model(batch[0]).detach())
    assert trainer.predict([batch], forward=lambda model, batch: len(batch[0])) == [4]


def test_a_step_without_predictions_is_an_error_in_predict_that_names_forward() -> None:
    trainer = line_trainer(step=lambda model, batch: model(batch[0]).mean())
    with pytest.raises(ConfigError, match="no predictions") as caught:
        trainer.predict(ragged(2))
    assert "forward=" in caught.value.fix


def test_predict_of_no_batches_is_an_empty_list() -> None:
    assert line_trainer().predict([]) == []


# Metrics.


class Count:
    """A metric of nobody's library: how many predictions there were, and how often it was reset."""

    def __init__(self) -> None:
        self.seen = 0
        self.resets = 0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        assert not predictions.requires_grad
        self.seen += len(targets)

    def compute(self) -> float:
        return float(self.seen)

    def reset(self) -> None:
        self.seen = 0
        self.resets += 1


class Spread:
    """Computes several values at once, one below the other."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.errors = (predictions - targets).abs()

    def compute(self) -> dict[str, Any]:
        return {"least": self.errors.min(), "most": {"of all": self.errors.max().item()}}

    def reset(self) -> None: ...


def test_metrics_are_computed_over_whole_passes_and_named_after_them() -> None:
    metrics: dict[str, Any] = {
        "mae": torchmetrics.MeanAbsoluteError(),
        "r2": torchmetrics.R2Score(),
        "count": Count(),
        "spread": Spread(),
        "errors": torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()]),
    }
    model = line()
    trainer = line_trainer(model, lr=0.0, metrics=metrics)
    val = ragged(5, 2, 1)
    (row,) = trainer.fit(ragged(2), val, epochs=1).history
    inputs, targets = torch.cat([x for x, _ in val]), torch.cat([y for _, y in val])
    errors = (model(inputs) - targets).abs()
    assert row["val/mae"] == pytest.approx(errors.mean().item(), rel=1e-6)
    assert row["val/r2"] == pytest.approx(
        1 - (errors.square().sum() / (targets - targets.mean()).square().sum()).item(), rel=1e-4
    )
    assert row["val/count"] == 8
    assert row["val/errors/MeanSquaredError"] == pytest.approx(row["val/loss"], rel=1e-6)
    assert row["val/errors/MeanAbsoluteError"] == pytest.approx(row["val/mae"], rel=1e-6)
    assert {"val/spread/least", "val/spread/most/of all"} < row.keys()
    assert not any(name.startswith("train/") and name != "train/loss" for name in row)
    assert trainer.evaluate(val)["test/mae"] == row["val/mae"]


def test_a_metric_starts_anew_at_every_pass_also_after_one_that_failed() -> None:
    count = Count()
    trainer = line_trainer(metrics={"n": count})
    result = trainer.fit(ragged(2), ragged(3, 3), epochs=3)
    assert [row["val/n"] for row in result.history] == [6, 6, 6]
    with pytest.raises(PassError):
        trainer.evaluate(raising_after(ragged(3)))
    assert trainer.evaluate(ragged(2))["test/n"] == 2
    assert count.resets == 5


def test_one_metric_used_by_two_trainers_gives_what_two_would() -> None:
    metric = torchmetrics.MeanAbsoluteError()
    one, two = line(seed=1), line(seed=2)
    trainers = [line_trainer(model, metrics={"mae": metric}) for model in (one, two)]
    histories = [trainer.fit(ragged(2, 2), ragged(3), epochs=2).history for trainer in trainers]
    fresh = [
        line_trainer(line(seed=seed), metrics={"mae": torchmetrics.MeanAbsoluteError()})
        .fit(ragged(2, 2), ragged(3), epochs=2)
        .history
        for seed in (1, 2)
    ]
    assert histories == fresh
    assert [trainer.evaluate(ragged(3)) for trainer in trainers] == [
        {"test/loss": row[-1]["val/loss"], "test/mae": row[-1]["val/mae"]}
        for row in (trainer.fit(ragged(2, 2), epochs=2).history for trainer in trainers)
    ]


@pytest.mark.parametrize("missing", ["predictions", "targets"])
def test_a_step_without_what_metrics_need_is_an_error_that_says_what(missing: str) -> None:
    def step(model: nn.Module, batch: Samples) -> Output:
        out = model(batch[0])
        given: dict[str, Any] = {"predictions": out, "targets": batch[1]}
        return Output(F.mse_loss(out, batch[1]), **{name: value for name, value in given.items() if name != missing})

    trainer = line_trainer(step=step, metrics={"mae": torchmetrics.MeanAbsoluteError()})
    with pytest.raises(ConfigError, match=rf"the metric 'mae' needs .* no {missing}"):
        trainer.fit(ragged(2), ragged(2), epochs=1)


def test_a_metric_of_several_values_is_an_error_that_names_it() -> None:
    metric = torchmetrics.MeanAbsoluteError(num_outputs=2)
    trainer = line_trainer(nn.Linear(3, 2), metrics={"mae": metric})
    with pytest.raises(ConfigError, match="test/mae"):
        trainer.evaluate([(torch.zeros(2, 3), torch.zeros(2, 2))])


def test_a_step_may_not_call_a_metric_loss() -> None:
    trainer = line_trainer(step=lambda model, batch: Output(model(batch[0]).mean(), metrics={"loss": 1.0}))
    with pytest.raises(ConfigError, match="named 'loss'"):
        trainer.fit(ragged(2), epochs=1)


def test_a_nan_in_a_pass_is_in_its_scores_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Undefined(Count):
        def compute(self) -> float:
            return math.nan

    trainer = line_trainer(metrics={"odd": Undefined()})
    bad: Iterable[Samples] = [(x, y * math.inf) for x, y in ragged(2)]
    result = trainer.fit(ragged(2), bad, epochs=3)
    assert [math.isfinite(row["val/loss"]) for row in result.history] == [False] * 3
    assert all(math.isnan(row["val/odd"]) for row in result.history)
    for name in ("val/loss", "val/odd"):
        assert len([record for record in caplog.records if name in record.getMessage()]) == 1


def test_an_evaluation_error_is_a_data_error_that_names_the_data() -> None:
    with pytest.raises(DataError, match="held out data gave no batch"):
        line_trainer().evaluate([], name="held out")
