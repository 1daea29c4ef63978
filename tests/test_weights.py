"""Means weighted by samples or by the step's weight (C7), and where a batch's size comes from (C8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from helpers import At, Samples, Unsized, line, line_trainer, ragged
from loopwright import ConfigError, DataError, Output, State, Trainer
from loopwright.sizes import batch_size

IGNORED = -100


@pytest.fixture(params=[True, False], ids=["read each step", "read at log points"])
def cadence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(Trainer, "_read_each_step", request.param)
    return bool(request.param)


def whole(batches: list[Samples]) -> Samples:
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def mse_over(model: nn.Module, batches: list[Samples]) -> float:
    with torch.no_grad():
        inputs, targets = whole(batches)
        return F.mse_loss(model(inputs), targets).item()


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(4, 4, 1), (7, 1, 1, 2), (1, 9), (5,)], ids=str)
def test_epoch_means_are_those_over_all_samples_in_training_and_validation(
    sizes: tuple[int, ...], accumulate: int
) -> None:
    train, val = ragged(*sizes), ragged(*reversed(sizes), seed=9)
    model = line()
    expected = mse_over(model, train)
    trainer = line_trainer(model, lr=0.0, accumulate=accumulate)  # the weights stay, so the mean can be told
    (row,) = trainer.fit(train, val, epochs=1).history
    assert row["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert row["val/loss"] == pytest.approx(mse_over(model, val), rel=1e-6)
    assert trainer.evaluate(train) == {"test/loss": pytest.approx(expected, rel=1e-6)}


@pytest.mark.usefixtures("cadence")
def test_the_mean_of_losses_that_change_is_weighted_by_the_size_of_their_batches() -> None:
    losses: list[float] = []
    at = At(on_batch_end=lambda state, output: losses.append(output.loss.item()))
    sizes = (5, 2, 1)
    (row,) = line_trainer(callbacks=[at]).fit(ragged(*sizes), epochs=1).history
    assert row["train/loss"] == pytest.approx(sum(map(math.prod, zip(losses, sizes, strict=True))) / 8, rel=1e-12)
    assert row["train/loss"] != pytest.approx(sum(losses) / 3, rel=1e-3)


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("kind", ["int", "float", "tensor", "int tensor", "tensor of shape (1,)", "numpy", "fraction"])
def test_the_weight_of_a_step_counts_in_training_and_evaluation_for_the_loss_and_all_its_metrics(kind: str) -> None:
    make: dict[str, Callable[[int], Any]] = {
        "int": int,
        "float": float,
        "tensor": lambda n: torch.tensor(float(n)),
        "int tensor": torch.tensor,
        "tensor of shape (1,)": lambda n: torch.tensor([float(n)]),
        "numpy": np.int64,
        "fraction": Fraction,
    }

    def step(model: nn.Module, batch: tuple[Tensor, int]) -> Output:
        inputs, tokens = batch
        loss = model(inputs).mean()
        return Output(loss, weight=make[kind](tokens), metrics={"twice": 2 * loss, "three": 3.0, "n": tokens})

    batches = [(torch.full((2, 3), float(value)), tokens) for value, tokens in [(1, 1), (2, 10), (4, 0), (8, 3)]]
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 1 / 3)
    trainer = line_trainer(model, lr=0.0, step=step)
    (row,) = trainer.fit(batches, batches, epochs=1).history
    scores = trainer.evaluate(batches)
    for found in (
        {name.removeprefix("train/"): value for name, value in row.items()},
        {name.removeprefix("val/"): value for name, value in row.items()},
        {name.removeprefix("test/"): value for name, value in scores.items()},
    ):
        assert found["loss"] == pytest.approx((1 * 1 + 2 * 10 + 8 * 3) / 14, rel=1e-6)
        assert found["twice"] == pytest.approx(2 * found["loss"], rel=1e-6)
        assert found["three"] == pytest.approx(3, rel=1e-12)
        assert found["n"] == pytest.approx((1 + 100 + 9) / 14, rel=1e-12)
    assert trainer.state.progress.samples == 8  # the batches' size, whatever they count for


@pytest.mark.usefixtures("cadence")
def test_a_metric_that_only_some_steps_return_is_the_mean_over_those() -> None:
    def step(model: nn.Module, batch: Samples) -> Output:
        loss = model(batch[0]).mean()
        return Output(loss, metrics={"size": len(batch[0])} if len(batch[0]) > 1 else {})

    (row,) = line_trainer(step=step).fit(ragged(1, 3, 5, 1), epochs=1).history
    assert row["train/size"] == pytest.approx((9 + 25) / 8)


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("ignored", [IGNORED, 0])
def test_under_an_ignore_index_the_mean_is_that_over_all_valid_targets(ignored: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    batches = []
    for valid, n in [(5, 5), (1, 5), (3, 3), (2, 6)]:
        targets = torch.randint(1, 4, (n,))
        targets[valid:] = ignored
        batches.append((torch.randn(n, 3), targets))
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    inputs, targets = whole(batches)
    expected = loss(model(inputs), targets).item()
    trainer = line_trainer(model, lr=0.0, loss=loss)
    (row,) = trainer.fit(batches, batches, epochs=1).history
    assert row["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert row["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.state.progress.samples == 19


@pytest.mark.usefixtures("cadence")
def test_a_batch_without_one_valid_target_does_not_spoil_an_evaluation() -> None:
    model = nn.Linear(3, 4)
    good = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    empty = torch.randn(4, 3), torch.full((4,), IGNORED)
    trainer = line_trainer(model, loss=nn.CrossEntropyLoss())
    scores = trainer.evaluate([empty, good, empty])
    assert scores == {"test/loss": pytest.approx(F.cross_entropy(model(good[0]), good[1]).item(), rel=1e-6)}


def test_soft_targets_are_weighted_by_samples_although_the_loss_has_an_ignore_index() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    batches = [(torch.randn(n, 3), torch.rand(n, 4).softmax(1)) for n in (5, 1)]
    expected = nn.CrossEntropyLoss()(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
    scores = line_trainer(model, loss=nn.CrossEntropyLoss()).evaluate(batches)
    assert scores["test/loss"] == pytest.approx(expected.item(), rel=1e-6)


# C8: where the size comes from.


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    ids: list[str]


SIZES: dict[str, tuple[Any, int | None]] = {
    "tensor": (torch.zeros(5, 2), 5),
    "pair": ((torch.zeros(5, 2), torch.zeros(5)), 5),
    "list": ([torch.zeros(5, 2), torch.zeros(5)], 5),
    "dict": ({"x": torch.zeros(5, 2), "y": torch.zeros(5)}, 5),
    "dict with a scalar": ({"x": torch.zeros(5, 2), "temperature": torch.tensor(0.5)}, 5),
    "dict with other things": ({"x": torch.zeros(5, 2), "id": "abc", "k": 7, "none": None}, 5),
    "named tuple": (Pair(torch.zeros(5, 2), torch.zeros(5)), 5),
    "dataclass": (Record(torch.zeros(5, 2), ["a"] * 5), 5),
    "nested": (({"x": torch.zeros(5, 2), "more": [torch.zeros(5)]}, torch.zeros(5)), 5),
    "strings": (["a", "b", "c"], 3),
    "strings and targets": ((["a", "b", "c"], torch.zeros(3)), 3),
    "packed sequence": (pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), 2),
    "packed sequence of one": (pack_sequence([torch.zeros(3, 2)]), 1),
    "packed sequence and targets": ((pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), torch.zeros(2)), 2),
    "empty batch": (torch.zeros(0, 2), 0),
    "two sizes": ({"x": torch.zeros(5, 2), "y": torch.zeros(10)}, None),
    "graph": ({"nodes": torch.zeros(5, 2), "edges": torch.zeros(2, 9, dtype=torch.long)}, None),
    "scalars": ({"a": torch.tensor(1.0)}, None),
    "number": (3, None),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_size_of_a_batch_is_found_or_said_to_be_unclear(case: str) -> None:
    batch, size = SIZES[case]
    assert batch_size(batch) == size


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("call", ["fit", "validation", "evaluate"])
def test_an_unclear_size_is_an_error_that_names_the_candidates(call: str) -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch["nodes"]).mean()
        return loss

    trainer = line_trainer(step=step)
    graphs = [{"nodes": torch.randn(5, 3), "more": [torch.zeros(2, 9)]}]
    clear = [{"nodes": torch.randn(5, 3)}]
    calls: dict[str, Callable[[], object]] = {
        "fit": lambda: trainer.fit(graphs, epochs=1),
        "validation": lambda: trainer.fit(clear, graphs, epochs=1),
        "evaluate": lambda: trainer.evaluate(graphs),
    }
    with pytest.raises(DataError) as caught:
        calls[call]()
    assert "batch['nodes'] has 5" in caught.value.what
    assert "batch['more'][0] has 2" in caught.value.what
    assert "weight=" in caught.value.fix


def test_candidates_are_named_as_they_are_typed() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(torch.ones(1, 3)).mean()
        return loss

    batches: list[tuple[Any, str]] = [
        (Pair(torch.zeros(2), torch.zeros(3)), "batch.x has 2, batch.y has 3"),
        ((torch.zeros(2), Record(torch.zeros(3), [])), "batch[0] has 2, batch[1].x has 3"),
        ({"n": 3}, "it holds no tensor"),
    ]
    for batch, words in batches:
        with pytest.raises(DataError) as caught:
            line_trainer(step=step).fit([batch], epochs=1)
        assert words in caught.value.what


@pytest.mark.usefixtures("cadence")
def test_a_step_that_gives_the_weight_needs_no_clear_size() -> None:
    def step(model: nn.Module, batch: Any) -> Output:
        return Output(model(batch["nodes"]).mean(), weight=torch.tensor(len(batch["nodes"])))

    graphs = [{"nodes": torch.randn(n, 3), "edges": torch.zeros(2, 9)} for n in (5, 3)]
    result = line_trainer(step=step).fit(graphs, epochs=1)
    assert result.progress.samples == 8


BAD_WEIGHTS: dict[str, Any] = {
    "negative": -1,
    "NaN": math.nan,
    "infinite": math.inf,
    "bool": True,
    "string": "3",
    "two": torch.ones(2),
    "complex": 1j,
    "negative tensor": torch.tensor(-1.0),
    "NaN tensor": torch.tensor(math.nan),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_a_weight_that_is_no_number_of_at_least_0_is_an_error(kind: str, call: str) -> None:
    def step(model: nn.Module, batch: Samples) -> Output:
        return Output(model(batch[0]).mean(), weight=BAD_WEIGHTS[kind])

    trainer = line_trainer(step=step)
    with pytest.raises(ConfigError, match="weight of a batch"):
        trainer.fit(ragged(2), epochs=1) if call == "fit" else trainer.evaluate(ragged(2))


@pytest.mark.usefixtures("cadence")
def test_an_evaluation_in_which_nothing_counts_has_no_mean() -> None:
    def step(model: nn.Module, batch: Samples) -> Output:
        return Output(model(batch[0]).mean(), weight=0)

    assert math.isnan(line_trainer(step=step).evaluate(ragged(2, 3))["test/loss"])


@pytest.mark.usefixtures("cadence")
@pytest.mark.parametrize("known", [True, False], ids=["length known", "length unknown"])
def test_samples_are_counted_over_all_epochs_and_windows(known: bool) -> None:
    seen: list[int] = []

    def note(state: State, output: Output) -> None:
        seen.append(state.progress.samples)

    data: Any = ragged(4, 4, 1) if known else Unsized(ragged(4, 4, 1))
    line_trainer(accumulate=2, callbacks=[At(on_batch_end=note)]).fit(data, epochs=2)
    assert seen == [4, 8, 9, 13, 17, 18]


@pytest.mark.usefixtures("cadence")
def test_the_newest_value_within_an_epoch_is_the_windows_weighted_mean() -> None:
    newest: list[float] = []
    at = At(on_step_end=lambda state: newest.append(state.metrics["train/loss"]))
    batches = ragged(5, 1, 2)
    model = line()
    expected = [mse_over(model, batches[:2]), mse_over(model, batches[2:])]
    line_trainer(model, lr=0.0, accumulate=2, callbacks=[at]).fit(batches, epochs=1)
    assert newest == pytest.approx(expected, rel=1e-6)
