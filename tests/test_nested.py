"""Nested tensors in a batch, of either layout: they count by their parts, and all that looks at a batch takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopwright import NonFiniteError, Output, Trainer
from loopwright.callbacks import Checkpoint, GradientInspector
from loopwright.nonfinite.census import census

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

LAYOUTS = [torch.strided, torch.jagged]


def nested(layout: torch.layout, *lengths: int, features: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths) + features)
    parts = [torch.randn(length, features, generator=generator) for length in lengths]
    made: Tensor = torch.nested.nested_tensor(parts, layout=layout)
    return made


def with_nan(layout: torch.layout) -> Tensor:
    parts = [torch.ones(2, 3), torch.full((4, 3), float("nan")), torch.ones(1, 3)]
    made: Tensor = torch.nested.nested_tensor(parts, layout=layout)
    return made


class Sequences(nn.Module):
    """A number for each time of each sequence; or one for each sequence, which is their mean."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.pooled = nn.Linear(3, 1), pooled

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return torch.stack([part.mean(0) for part in out.unbind()]) if self.pooled else out


def squares(predictions: Tensor, targets: Tensor) -> Tensor:
    pairs = zip(predictions.unbind(), targets.unbind(), strict=True)
    return torch.stack([(one - other).square().mean() for one, other in pairs]).mean()


def mean_of_x(model: nn.Module, batch: Mapping[str, Tensor]) -> Output:
    return Output(torch.stack([part.mean() for part in model(batch["x"]).unbind()]).mean(), weight=2)


def trainer(model: nn.Module, loss: Any = None, *callbacks: Any, **settings: Any) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, loss, callbacks=callbacks, device="cpu", **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_ones_own_takes_it_with_and_without_a_weight(layout: torch.layout) -> None:
    data = [{"x": nested(layout, 2, 4)}, {"x": nested(layout, 3, 1, 2)}]
    by_hand = Sequences()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    losses = []
    for batch in data:
        loss = mean_of_x(by_hand, batch).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        optimizer.step()
        losses.append(loss.item())
    for step, weights in ((mean_of_x, (2, 2)), (lambda model, batch: mean_of_x(model, batch).loss, (2, 3))):
        ours = trainer(Sequences(), step=step)
        result = ours.fit(data, epochs=1)
        assert torch.equal(ours.state.model.get_parameter("layer.weight"), by_hand.layer.weight)
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert result.history[0]["train/loss"] == pytest.approx(mean)
        assert ours.state.progress.samples == 5
        assert ours.evaluate(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_and_targets_may_be_nested(layout: torch.layout, tmp_path: Path) -> None:
    data = [(nested(layout, 2, 4), nested(layout, 2, 4, features=1)) for _ in range(2)]
    ours = trainer(Sequences(), squares, GradientInspector(), Checkpoint(tmp_path))
    ours.fit(data, data, steps=1)
    resumed = trainer(Sequences(), squares, GradientInspector(), Checkpoint(tmp_path))
    resumed.fit(data, data, epochs=2, resume="auto")
    unbroken = trainer(Sequences(), squares)
    result = unbroken.fit(data, data, epochs=2)
    assert torch.equal(
        resumed.state.model.get_parameter("layer.weight"), unbroken.state.model.get_parameter("layer.weight")
    )
    assert result.history[-1]["val/loss"] < result.history[0]["val/loss"]
    (predictions,) = unbroken.predict(data[:1])
    assert [len(part) for part in predictions.unbind()] == [2, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [True, False])
def test_preflight_looks_at_it_like_at_any_other(layout: torch.layout, pooled: bool) -> None:
    lengths = ((2, 4, 3), (5, 1, 2))
    data = [(nested(layout, *n), torch.ones(3, 1) if pooled else nested(layout, *n, features=1)) for n in lengths]
    found = trainer(Sequences(pooled=pooled), nn.MSELoss() if pooled else squares).preflight(data)
    verdicts = {check.name: check.verdict for check in found.checks}
    assert "failed" not in verdicts.values()
    assert verdicts["outputs depend on the inputs"] == verdicts["inputs are normalised"] == "passed"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_preflight_finds_a_model_that_ignores_it(layout: torch.layout) -> None:
    class Ignores(Sequences):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + self.layer.bias

    data = [(nested(layout, 2, 4), torch.ones(2, 1)) for _ in range(2)]
    found = trainer(Ignores(pooled=True), nn.MSELoss()).preflight(data)
    assert "outputs depend on the inputs" in [check.name for check in found.checks if check.verdict == "failed"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_one_that_is_not_finite_the_part_is_named(layout: torch.layout) -> None:
    data = [(with_nan(layout), torch.ones(3, 1))]
    with pytest.raises(NonFiniteError, match=r"batch\[0\] holds 12 NaN in 21 elements, row 2 of 3") as caught:
        trainer(Sequences(pooled=True), nn.MSELoss()).fit(data, epochs=1)
    assert "first used by linear" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_buffer_may_be_nested_where_a_loss_is_not_finite(layout: torch.layout) -> None:
    class Weighted(nn.Linear):
        lengths: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.lengths.values().sum()

    model = Weighted(3, 1)
    model.register_buffer("lengths", nested(layout, 2, 4))
    with pytest.raises(NonFiniteError, match=r"first used by linear") as caught:
        trainer(model, nn.MSELoss()).fit([(torch.full((2, 3), float("nan")), torch.ones(2, 1))], epochs=1)
    assert "failed" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_on_one_that_is_not_finite_can_be_skipped(layout: torch.layout) -> None:
    data = [(with_nan(layout), torch.ones(3, 1)), (nested(layout, 2, 3), torch.ones(2, 1))]
    ours = trainer(Sequences(pooled=True), nn.MSELoss(), on_nonfinite="skip")
    ours.fit(data, epochs=1)
    assert (ours.state.progress.skipped, ours.state.progress.step) == (1, 1)


def test_what_lies_between_the_parts_of_a_view_is_not_counted() -> None:
    whole = torch.ones(2, 4, 3)
    whole[0, 2:] = float("nan")
    view = torch.nested.narrow(whole, 1, torch.tensor([0, 0]), torch.tensor([2, 4]), layout=torch.jagged)
    assert census(view) is None
    whole[1, 3] = float("nan")
    assert (found := census(view)) is not None
    assert (found.nan, found.length, found.rows) == (3, 2, (1,))
    nothing: list[Tensor] = []
    empty: Tensor = torch.nested.nested_tensor(nothing)
    assert census(empty) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_explain_asks_it_for_its_number_of_parts(layout: torch.layout, tmp_path: Path) -> None:
    data = [{"x": nested(layout, 2, 4)}, {"x": nested(layout, 3, 1, 2)}]
    ours = trainer(Sequences(), step=lambda model, batch: mean_of_x(model, batch).loss)
    ours.fit(data, epochs=1)
    plain = ours.explain()
    if layout == torch.jagged:
        assert 'weight = len(batch["x"])' in plain
        return
    assert "weight = size_of(batch)" in plain
    written: dict[str, Any] = {"torch": torch}
    exec("def size_of" + plain.split("def size_of")[1].split("\ndef ")[0], written)
    assert [written["size_of"](batch) for batch in data] == [2, 3]


def test_a_message_shows_the_sizes_that_its_parts_share() -> None:
    with pytest.raises(Exception, match=r"a batch is a tensor of shape \(2, \*, 3\)"):
        trainer(Sequences(), nn.MSELoss()).fit([nested(torch.strided, 2, 4)], epochs=1)

    def fails(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("mine")

    found = trainer(Sequences(), step=fails).preflight([{"x": nested(torch.strided, 2, 4)}])
    assert "batch['x'] (2, *, 3) float32" in found.checks[0].evidence


class Unreadable(Mapping[str, Tensor]):
    """A batch whose items cannot be listed."""

    def __getitem__(self, key: str) -> Tensor:
        return torch.ones(2, 3)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("mine")


def test_what_fails_after_a_batch_was_fetched_is_not_said_to_come_of_the_fetching() -> None:
    with pytest.raises(RuntimeError, match="mine") as caught:
        trainer(Sequences(), step=lambda model, batch: model(batch["x"]).mean()).fit([Unreadable()], epochs=1)
    assert not [note for note in caught.value.__notes__ if "fetching" in note or "loader" in note]
