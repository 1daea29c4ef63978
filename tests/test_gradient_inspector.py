"""GradientInspector measures what plain torch measures, at its cadence, and leaves no trace."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]  # it has no types
from torch import Tensor, nn

from faults_nets import Bag, Recurrent, mlp, series, tokens, vectors
from helpers import At, PassError, Unsized, all_equal, line, ragged, small_trainer, some_batches, weights_of
from loopwright import Callback, CheckpointError, ConfigError, Every, Schedule, State, Trainer, latest_checkpoint
from loopwright.callbacks import Checkpoint, CSVLogger, GradientInspector, TensorBoardLogger
from loopwright.inspecting.inspection import COLUMNS, MISSING
from loopwright.inspecting.probe import Probe
from loopwright.inspecting.sampled import _stride, differences, held, sample
from loopwright.testing import two_step_fit


def each_step(**settings: Any) -> GradientInspector:
    return GradientInspector(Every(steps=1), **settings)


class ByHand(Callback[Any]):
    """Measures one parameter at each step, as anybody would."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, []  # type: ignore[var-annotated]  # a list of dicts, filled below
        self.gradient: Tensor | None = None

    def on_before_step(self, state: State) -> None:
        parameter = dict(state.model.named_parameters())[self.name]
        assert parameter.grad is not None
        gradient = parameter.grad.to_dense().detach().clone()
        last, self.gradient = self.gradient, gradient
        cosine = math.nan if last is None else float(torch.sum(gradient * last) / gradient.norm() / last.norm())
        self.weight = parameter.detach().clone()
        self.rows.append({"grad": float(gradient.norm()), "zero": float((gradient == 0).float().mean()), "cos": cosine})

    def on_step_end(self, state: State) -> None:
        parameter = dict(state.model.named_parameters())[self.name].detach()
        weight = float(self.weight.norm())
        self.rows[-1] |= {"weight": weight, "ratio": float((parameter - self.weight).norm()) / weight}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.mark.parametrize("way", ["in python", "as one vector", "kernel by kernel"])
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"clip_norm": 0.01}, {"precision": "fp16"}], ids=str)
def test_the_numbers_are_those_of_plain_torch(
    settings: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kernel by kernel":
        monkeypatch.setattr("loopwright.inspecting.small._SMALL", 0)
    monkeypatch.setattr("loopwright.inspecting.small._COUNTED", 2**20 if way == "in python" else 0)
    by_hand, inspector = ByHand("2.weight"), each_step()
    torch.manual_seed(0)
    trainer = small_trainer(by_hand, inspector, model=mlp(3), optimizer=adam, **settings)
    trainer.fit(vectors(), steps=6)
    record = inspector._record
    assert [one.step for one in record.inspections] == [1, 2, 3, 4, 5, 6]
    at = [p.name for p in record.parameters].index("2.weight")
    size = record.parameters[at].size
    for one, row in zip(record.inspections, by_hand.rows, strict=True):
        assert one.grad[at] == pytest.approx(row["grad"], rel=1e-4)
        assert one.weight[at] == pytest.approx(row["weight"], rel=1e-4)
        assert one.update[at] / one.weight[at] == pytest.approx(row["ratio"], rel=1e-3)
        assert one.zeros[at] / size == pytest.approx(row["zero"])
        assert one.bad[at] == 0
        if one.then[at]:
            assert one.dot[at] / math.sqrt(one.now[at] * one.then[at]) == pytest.approx(row["cos"], abs=1e-3)
    # It is the step before that is compared with, but for the first one of the run.
    assert [bool(one.then[at]) for one in record.inspections] == [False, True, True, True, True, True]


def step_by_step(inspector: GradientInspector, name: str) -> list[tuple[int, float]]:
    """The cosine of one parameter at each inspection, where there is one."""
    at = [p.name for p in inspector._record.parameters].index(name)
    inspections = inspector._record.inspections
    return [(one.step, one.dot[at] / math.sqrt(one.now[at] * one.then[at])) for one in inspections if one.then[at]]


def test_a_sparse_gradient_is_compared_with_the_one_before_row_by_row() -> None:
    by_hand, inspector = ByHand("table.weight"), each_step()
    torch.manual_seed(0)
    model, optimizer, loss, data = make_sparse()
    Trainer(model, optimizer, loss, callbacks=[by_hand, inspector], device="cpu").fit(data, steps=6)
    steps, cosines = zip(*step_by_step(inspector, "table.weight"), strict=True)
    expected = [row["cos"] for row in by_hand.rows][1:]
    assert steps == (2, 3, 4, 5, 6)
    assert cosines == pytest.approx(expected, abs=1e-4)
    assert any(abs(cosine) > 0.01 for cosine in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_rows_that_one_of_two_sparse_gradients_lacks_are_zero_in_it(dtype: torch.dtype) -> None:
    def rows(*numbers: int) -> Tensor:
        values = torch.arange(1.0, len(numbers) + 1)[:, None].to(dtype)
        return torch.sparse_coo_tensor(torch.tensor([numbers]), values, (9, 1), check_invariants=True)

    one, other = sample(rows(7, 2, 7)), sample(rows(2, 4))
    (change,) = differences([one], [other])
    assert float(change.norm()) == pytest.approx(math.sqrt((2 - 1) ** 2 + (1 + 3) ** 2 + 2**2))
    assert float(held(one).norm()) == pytest.approx(math.sqrt(2**2 + 4**2))


@pytest.mark.parametrize("brought", ["sparse", "dense"])
def test_a_gradient_that_was_sparse_before_a_resume_and_is_not_now_is_not_compared(
    brought: str, tmp_path: Path
) -> None:
    def trainer_of(kind: str) -> tuple[Trainer, GradientInspector]:
        torch.manual_seed(0)
        model, inspector = Bag(sparse=kind == "sparse"), each_step()
        saving = Checkpoint(tmp_path / "run")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[inspector, saving], device="cpu"), inspector

    data = list(tokens())[:3]
    trainer_of(brought)[0].fit(data, epochs=1)
    first = latest_checkpoint(tmp_path / "run")
    assert first is not None
    for kind, compared in ((brought, [2, 3, 4, 5, 6]), ({"sparse": "dense", "dense": "sparse"}[brought], [2, 3, 5, 6])):
        trainer, inspector = trainer_of(kind)
        trainer.fit(data, epochs=2, resume=first)
        assert [step for step, _ in step_by_step(inspector, "table.weight")] == compared


@pytest.mark.parametrize(
    "shape",
    [
        *((1024, 1024), (4096, 11008), (768, 50257), (128, 784), (100, 100), (64, 128), (5000,), (30030, 2), (8192, 1)),
        *((64, 64, 3, 3), (512, 512, 3, 3), (2048, 512, 1, 1), (3, 7, 4096), (256, 2, 48, 2), (16384, 16384)),
    ],
    ids=str,
)
def test_a_sample_meets_rows_columns_and_channels_alike(shape: tuple[int, ...]) -> None:
    apart = _stride(torch.Size(shape))
    at = torch.arange(0, math.prod(shape), apart)
    assert len(at) <= 2 * 4096 or apart == 1
    assert len(at) >= 4096 / 1.3
    length = 1
    for size in reversed(shape):
        parts = math.gcd(size, 32)  # of equal width
        counts = ((at // length % size) * parts // size).bincount(minlength=parts)
        assert counts.min() > 0.75 * counts.max(), (size, counts)
        length *= size


class Cosines(Callback[Any]):
    """Compares what is logged of a layer's cosine with that of its whole gradient."""

    def __init__(self, layer: str) -> None:
        self.layer, self.last = layer, torch.zeros(0)
        self.pairs: list[tuple[float, float]] = []

    def on_before_step(self, state: State) -> None:
        parameters = state.model.get_submodule(self.layer).parameters()
        self.now = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    def on_step_end(self, state: State) -> None:
        if len(self.last):
            cosine = float(torch.cosine_similarity(self.now, self.last, 0))
            self.pairs.append((state.metrics[f"grad/{self.layer}/cosine"], cosine))
        self.last = self.now


@pytest.mark.parametrize("own", ["columns", "bias"])
def test_the_cosine_of_a_large_layer_is_near_that_of_all_its_elements(own: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 128), nn.Tanh(), nn.Linear(128, 4))
    data = []
    for _ in range(8):
        x = (1.0 if own == "columns" else 0.0) + 0.3 * torch.randn(32, 1024)
        x[:, ::32] = 3 * torch.randn(32, 32) * (own == "columns")  # every so many columns, as a stride would see them
        data.append((x, torch.arange(32) % 4))
    spy = Cosines("0")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[each_step(), spy], device="cpu")
    trainer.fit(data, epochs=1)
    assert len(spy.pairs) == 7
    assert all(logged == pytest.approx(true, abs=0.1) for logged, true in spy.pairs), spy.pairs


def test_a_checkpoint_of_the_first_version_goes_on_without_its_samples() -> None:
    inspector = each_step()
    small_trainer(inspector, model=mlp(3)).fit(vectors(), steps=3)
    state = inspector.state_dict()
    samples = state.pop("samples")
    assert set(samples) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}
    del state["began"], state["length"]
    another = each_step()
    another.load_state_dict({**state, "earlier": samples})
    assert another.state_dict()["samples"] == {}
    assert another._record.inspections == inspector._record.inspections
    for damaged in (5, ["earlier"], {"earlier": samples}):
        with pytest.raises(CheckpointError):
            each_step().load_state_dict(damaged)  # type: ignore[arg-type]  # as a file may hold it


def test_the_norm_and_ratio_of_a_layer_are_those_of_what_is_trained_of_it() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].get_parameter("weight").requires_grad_(False)
    by_hand = ByHand("0.bias")
    trainer = small_trainer(by_hand, each_step(), model=model)
    trainer.fit(some_batches(4), epochs=1)
    assert trainer.state.metrics["weight/0/norm"] == pytest.approx(by_hand.rows[-1]["weight"], rel=1e-4)
    assert trainer.state.metrics["update/0/ratio"] == pytest.approx(by_hand.rows[-1]["ratio"], rel=1e-3)


class Held(nn.Module):
    """Layers whose weights stand in a list or a dict, with a gate for each."""

    def __init__(self, kind: type[nn.Module], depth: int = 8) -> None:
        super().__init__()
        weights = [nn.Parameter(0.25 * torch.randn(16, 16)) for _ in range(depth)]
        named = {f"w{number}": weight for number, weight in enumerate(weights)}
        self.weights: Any = nn.ParameterDict(named) if kind is nn.ParameterDict else kind(weights)
        self.gates: Any = nn.ParameterList([nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 16))])
        self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.weights:
            weight = self.weights[name] if isinstance(name, str) else name
            x = torch.sigmoid(x @ weight)
        out: Tensor = self.last(x * self.gates[0] * self.gates[1])
        return out


@pytest.mark.parametrize("kind", [nn.ParameterList, nn.ParameterDict])
def test_each_matrix_in_a_list_or_a_dict_is_a_layer_and_gates_are_one(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    inspector = GradientInspector()
    trainer = small_trainer(inspector, model=Held(kind), optimizer=adam)
    trainer.fit(vectors(), steps=100)
    entries = range(8) if kind is nn.ParameterList else [f"w{number}" for number in range(8)]
    logged = [name for name in trainer.state.metrics if name.startswith("weight/")]
    assert logged == [*(f"weight/weights.{entry}/norm" for entry in entries), "weight/gates/norm", "weight/last/norm"]
    (finding,) = inspector.findings
    assert (finding.rule, finding.layer) == ("vanishing", f"weights.{entries[0]}")


def test_what_is_logged_has_these_names_and_is_finite(tmp_path: Path) -> None:
    inspector = GradientInspector(Every(steps=2))
    trainer = small_trainer(inspector, CSVLogger(tmp_path / "m.csv"), model=mlp(3, act=nn.Tanh))
    trainer.fit(vectors(), epochs=1)
    names = {name for name in trainer.state.metrics if not name.startswith("train/")}
    per_layer = {
        f"{n}"
        for la in "024"
        for n in (f"grad/{la}/norm", f"grad/{la}/cosine", f"weight/{la}/norm", f"update/{la}/ratio")
    }
    assert names == per_layer | {"grad/norm", "update/ratio"}
    assert all(math.isfinite(trainer.state.metrics[name]) for name in names)
    assert names <= set((tmp_path / "m.csv").read_text().splitlines()[0].split(","))


def test_of_many_layers_some_are_logged_and_all_are_measured() -> None:
    inspector = each_step(layers=3)
    trainer = small_trainer(inspector, model=mlp(9))
    trainer.fit(vectors(), steps=3)
    logged = [name for name in trainer.state.metrics if name.startswith("update/") and name != "update/ratio"]
    assert logged == ["update/0/ratio", "update/8/ratio", "update/16/ratio"]
    assert len(inspector.latest) == 18


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (Every(steps=50), 250, [1, 50, 100, 150, 200, 250]),
        (Every(steps=50), 199, [1, 4, 16, 49, 98, 147, 196]),
        (Every(steps=50), 10, [1, 2, 4, 6, 8, 10]),
        (Every(steps=2), 6, [1, 2, 3, 4, 5, 6]),
        (Every(epochs=2), 15, [1, 2, 3, 4, 6, 8, 9, 12, 14, 15]),
        (Every(epochs=2), 19, [1, 2, 4, 8, 12, 14, 16]),
        (Every(epochs=2), 20, [1, 2, 4, 8, 14, 16, 20]),
    ],
    ids=str,
)
def test_these_steps_are_inspected(every: Every, steps: int, expected: list[int]) -> None:
    inspector = GradientInspector(every)
    small_trainer(inspector, model=line()).fit(some_batches(3), steps=steps)
    assert [one.step for one in inspector._record.inspections] == expected


@pytest.mark.parametrize("sized", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [
        (1, 20, list(range(1, 21))),
        (1, 6, list(range(1, 7))),
        (3, 20, [1, 4, 7, 10, 13, 16, 19]),
        (5, 30, [1, 4, 6, 11, 16, 21, 26]),
    ],
)
def test_where_an_epoch_is_one_step_it_is_that_of_every_so_many_epochs(
    every: int, epochs: int, expected: list[int], accumulate: int, *, sized: bool
) -> None:
    inspector = GradientInspector(Every(epochs=every))
    data = some_batches(accumulate, 4)
    trainer = small_trainer(inspector, model=line(), accumulate=accumulate)
    trainer.fit(data if sized else Unsized(data), epochs=epochs)
    inspections = inspector._record.inspections
    if not sized and every > 1:  # the first epoch has not told yet that it is the only step
        expected = sorted({*expected, 2})
    assert [one.step for one in inspections] == expected
    assert [one.then[0] > 0 for one in inspections] == [one.step > 1 for one in inspections]  # each with a cosine


@pytest.mark.parametrize(
    ("batches", "sized", "plan", "expected"),
    [
        (10, True, {"epochs": 3}, [1, 2, 4, 7, 14, 16, 21, 22, 28]),
        (10, False, {"epochs": 5}, [1, 2, 4, 12, 16, 22, 32, 42]),  # how many epochs is all that is known
        (100, False, {"steps": 80}, [1, 2, 4, 16, 20, 40, 60, 80]),
        (2, True, {"epochs": 7}, [1, 2, 4, 6, 10, 14]),
    ],
)
def test_a_fit_too_short_for_four_inspections_by_epochs_gets_them(
    batches: int, plan: dict[str, int], expected: list[int], *, sized: bool
) -> None:
    inspector = GradientInspector(Every(epochs=2))
    data = some_batches(batches)
    small_trainer(inspector, model=line()).fit(data if sized else Unsized(data), **plan)  # type: ignore[arg-type]  # epochs or steps
    assert [one.step for one in inspector._record.inspections] == expected


def test_a_rate_of_zero_is_found_in_training_on_all_data_at_once() -> None:
    model = line()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch < 25))
    inspector = GradientInspector(Every(epochs=1))
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss(),
        schedule=Schedule(falls, each="epoch"),
        callbacks=[inspector],
        device="cpu",
    )
    trainer.fit(some_batches(1, 64), epochs=100)
    assert [finding.rule for finding in inspector.findings] == ["not moving"]


def test_epochs_of_unlike_lengths_are_inspected_once_each() -> None:
    class Growing:
        epoch = 0

        def __iter__(self) -> Iterator[Any]:
            self.epoch += 1
            yield from some_batches(20 if self.epoch > 20 else 1)

    inspector = GradientInspector(Every(epochs=1))
    small_trainer(inspector, model=line()).fit(Growing(), epochs=24)
    steps = [one.step for one in inspector._record.inspections]
    assert steps == [*range(1, 23), 42, 62, 82]  # 22 is what the epochs before let expect


@pytest.mark.parametrize("sized", [True, False], ids=["known", "unknown"])
def test_a_skipped_step_of_an_epoch_is_inspected_in_the_next_one(*, sized: bool) -> None:
    inspector = GradientInspector(Every(epochs=1))
    data = some_batches(1)

    def poison(state: State, output: Any) -> None:
        if state.progress.epoch in (7, 8):
            next(iter(state.model.parameters())).grad.fill_(math.nan)  # type: ignore[union-attr]  # it is there

    bad = At(on_backward_end=poison)
    trainer = small_trainer(bad, inspector, model=line(), on_nonfinite="skip")
    trainer.fit(data if sized else Unsized(data), epochs=20)
    assert trainer.state.progress.skipped == 2
    assert [one.step for one in inspector._record.inspections] == list(range(1, 19))


def make_sparse() -> tuple[nn.Module, Any, nn.Module, Any]:
    model = Bag(sparse=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), tokens()


def make_complex() -> tuple[nn.Module, Any, nn.Module, Any]:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 1, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.abs(x.to(torch.complex64) @ self.weight)

    model = Complex()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), some_batches(4)


def make_shared_empty_and_frozen() -> tuple[nn.Module, Any, nn.Module, Any]:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.empty = nn.Parameter(torch.zeros(0))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.out = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.b(torch.tanh(self.a(x))) * self.frozen)
            return out

    model = Odd()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), some_batches(4)


def make_lbfgs() -> tuple[nn.Module, Any, nn.Module, Any]:
    model = line()
    return model, torch.optim.LBFGS(model.parameters(), lr=0.1), nn.MSELoss(), some_batches(4)


def make_lazy() -> tuple[nn.Module, Any, nn.Module, Any]:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))
    model(torch.zeros(1, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), some_batches(4)


def make_bfloat16() -> tuple[nn.Module, Any, nn.Module, Any]:
    model = line().to(torch.bfloat16)
    data = [(x.bfloat16(), y.bfloat16()) for x, y in some_batches(4)]
    return model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), data


@pytest.mark.parametrize(
    "make", [make_sparse, make_complex, make_shared_empty_and_frozen, make_lbfgs, make_lazy, make_bfloat16]
)
def test_unusual_parameters_are_measured_and_the_weights_stay_the_same(
    make: Callable[[], tuple[nn.Module, Any, nn.Module, Any]],
) -> None:
    ends = []
    for callbacks in ([], [each_step()]):
        torch.manual_seed(0)
        model, optimizer, loss, data = make()
        trainer = Trainer(model, optimizer, loss, callbacks=callbacks, device="cpu")
        trainer.fit(data, steps=4)
        ends.append(weights_of(trainer))
    assert all_equal(*ends)
    (inspector,) = callbacks
    expected = {n for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    measured = {name for name, numbers in inspector.latest.items() if numbers.grad > 0 and numbers.ratio > 0}
    assert measured == expected


def test_a_layer_that_joins_late_is_measured_from_then_on() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)

    def thaw(state: State) -> None:
        if state.progress.step == 3:
            model[0].requires_grad_(True)

    inspector = each_step()
    small_trainer(At(on_step_end=thaw), inspector, model=model).fit(some_batches(6), steps=6)
    at = [p.name for p in inspector._record.parameters].index("0.weight")
    assert [one.grad[at] == MISSING for one in inspector._record.inspections] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("at_step", range(2, 6))
@pytest.mark.parametrize("add", ["a module", "a parameter"])
def test_what_is_added_without_telling_the_optimizer_is_seen_by_the_next_inspection(add: str, at_step: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 1))
    latest: list[set[str]] = []

    def grow(state: State, batch: Any) -> None:
        if state.progress.step == at_step and add == "a module":
            model[1] = nn.Linear(3, 3)
        elif state.progress.step == at_step:
            model.register_parameter("scale", nn.Parameter(torch.ones(1)))

    inspector = each_step()
    look = At(on_step_end=lambda state: latest.append(set(inspector.latest)))
    small_trainer(At(on_batch_start=grow), inspector, look, model=model).fit(some_batches(8), steps=8)
    new = {"1.weight", "1.bias"} if add == "a module" else {"scale"}
    assert [new <= names for names in latest] == [False] * at_step + [True] * (8 - at_step)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_on_the_model_in_an_inspected_forward_pass_only() -> None:
    seen: list[tuple[int, int]] = []
    model = Recurrent()

    class Spy(nn.Module):
        def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
            seen.append((trainer.state.progress.step + 1, hooks_of(model)))
            return nn.functional.mse_loss(predictions, targets)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, Spy(), callbacks=[GradientInspector(Every(steps=5))], device="cpu")
    trainer.fit(series(), steps=21)
    assert [step for step, hooks in seen if hooks] == [1, 5, 10, 15, 20]
    assert hooks_of(model) == 0


def test_an_error_in_an_inspected_step_leaves_no_hook() -> None:
    model = Recurrent()

    def fail(predictions: Tensor, targets: Tensor) -> Tensor:
        assert hooks_of(model)
        raise RuntimeError("planted")

    inspector = each_step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, fail, callbacks=[inspector], device="cpu")
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(series(), steps=3)
    assert hooks_of(model) == 0
    assert inspector._probe is None


def test_between_inspections_no_probe_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("remember", "before", "after"):
        method = getattr(Probe, name)

        def noting(self: Probe, *args: Any, name: str = name, method: Any = method, **more: Any) -> Any:
            asked.append(name)
            return method(self, *args, **more)

        monkeypatch.setattr(Probe, name, noting)
    inspector = GradientInspector(Every(steps=100))
    trainer = small_trainer(inspector, model=line())
    trainer.fit(some_batches(5), steps=400)
    assert len(inspector._record.inspections) == 5
    assert asked.count("before") == 5
    assert asked.count("remember") == 4  # at step 1 there is none before
    assert asked.count("after") == 5


@pytest.mark.parametrize("stop", [1, 3, 7, 8])
def test_a_resumed_run_has_the_inspections_of_an_unbroken_one(stop: int, tmp_path: Path) -> None:
    def trainer_of(name: str, *callbacks: Callback[Any]) -> tuple[Trainer, GradientInspector]:
        torch.manual_seed(0)
        inspector = GradientInspector(Every(steps=4))
        saving = Checkpoint(tmp_path / name, every=Every(steps=1))
        trainer = small_trainer(saving, inspector, *callbacks, model=mlp(3, act=nn.Tanh), optimizer=adam)
        return trainer, inspector

    data = list(vectors())[:6]
    whole, unbroken = trainer_of("whole")
    whole.fit(data, steps=17)

    def leave(state: State) -> None:
        if state.progress.step == stop:
            raise PassError

    first, _ = trainer_of("broken", At(on_before_step=leave))
    with pytest.raises(PassError):
        first.fit(data, steps=17)
    second, resumed = trainer_of("broken")
    second.fit(data, steps=17, resume="auto")
    assert resumed._record.inspections == unbroken._record.inspections
    assert resumed._record.parameters == unbroken._record.parameters
    assert resumed.report() == unbroken.report()
    assert all_equal(weights_of(whole), weights_of(second))


@pytest.mark.parametrize("sized", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_start"])
def test_a_resumed_run_of_one_step_to_an_epoch_has_the_inspections_of_an_unbroken_one(
    hook: str, stop: int, every: int, tmp_path: Path, *, sized: bool
) -> None:
    def trainer_of(name: str, *callbacks: Callback[Any]) -> tuple[Trainer, GradientInspector]:
        inspector = GradientInspector(Every(epochs=every))
        saving = Checkpoint(tmp_path / name, every=Every(steps=1))
        return small_trainer(saving, inspector, *callbacks, model=line(), accumulate=2), inspector

    data: Any = some_batches(2) if sized else Unsized(some_batches(2))
    whole, unbroken = trainer_of("whole")
    whole.fit(data, epochs=12)

    def leave(state: State) -> None:
        if state.progress.step == stop:
            raise PassError

    first, _ = trainer_of("broken", At(**{hook: leave}))
    with pytest.raises(PassError):
        first.fit(data, epochs=12)
    second, resumed = trainer_of("broken")
    second.fit(data, epochs=12, resume="auto")
    assert resumed._record.inspections == unbroken._record.inspections


def test_a_callback_used_by_two_trainers_tells_of_the_second_alone() -> None:
    inspector = each_step()
    small_trainer(inspector, model=mlp(5)).fit(vectors(), steps=3)
    small_trainer(inspector, model=line()).fit(some_batches(3), steps=3)
    assert set(inspector.latest) == {"weight", "bias"}
    assert len(inspector._record.inspections) == 3


def test_the_record_is_bounded_and_keeps_the_first_and_the_newest() -> None:
    inspector = each_step()
    small_trainer(inspector, model=line()).fit(some_batches(5), steps=500)
    steps = [one.step for one in inspector._record.inspections]
    assert len(steps) <= 64
    assert steps[:8] == list(range(1, 9))
    assert steps[-24:] == list(range(477, 501))
    assert inspector._record.count == 500
    numbers = inspector.state_dict()["record"]["numbers"]
    assert numbers.shape == (len(steps), len(COLUMNS), 2)


def test_skipped_attempts_at_a_step_are_one_inspection() -> None:
    inspector = each_step()
    bad = [(torch.full((2, 3), 1e30), torch.zeros(2, 1))] * 2
    trainer = small_trainer(inspector, model=line(), on_nonfinite="skip")
    trainer.fit([*bad, *some_batches(4)], epochs=1)
    assert trainer.state.progress.skipped == 2
    assert [one.step for one in inspector._record.inspections] == [1, 2, 3, 4]


def test_a_finding_goes_to_the_log_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = mlp(10, act=nn.Sigmoid)
    small_trainer(GradientInspector(), model=model, optimizer=adam).fit(vectors(), steps=40)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().startswith(
        "gradients, steps 1 to 40: 1 finding\nvanishing in layer 0: from layer 18 back to layer 0"
    )
    assert "likely cause: " in record.getMessage()
    assert "first remedy: " in record.getMessage()


def test_a_run_of_two_steps_says_that_it_says_little() -> None:
    inspector = GradientInspector()
    two_step_fit(inspector)
    assert inspector.findings == ()
    assert "fewer than three inspections say little" in inspector.report()
    assert GradientInspector().report() == "gradients: nothing was inspected"


def test_histograms_reach_tensorboard(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    small_trainer(board, each_step(histograms=board), model=line()).fit(some_batches(3), steps=3)
    events = event_accumulator.EventAccumulator(str(tmp_path), {event_accumulator.HISTOGRAMS: 0})
    events.Reload()
    tags = ["grad/bias", "grad/weight", "weight/bias", "weight/weight"]
    assert sorted(events.Tags()["histograms"]) == tags
    assert [event.step for event in events.Histograms("grad/weight")] == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_written_in_the_format_of_its_suffix(suffix: str, tmp_path: Path) -> None:
    inspector = each_step()
    small_trainer(inspector, model=mlp(4)).fit(vectors(), steps=4)
    path = tmp_path / "new" / f"gradients.{suffix}"
    inspector.plot(path)
    assert path.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[suffix]


def test_a_picture_of_nothing_or_of_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no gradients to draw"):
        GradientInspector().plot(tmp_path / "a.png")
    inspector = each_step()
    small_trainer(inspector, model=line()).fit(ragged(2, 2), steps=2)
    with pytest.raises(ConfigError, match=r"ends in \.doc"):
        inspector.plot(tmp_path / "a.doc")


def test_learning_curves_and_bar_leave_single_layers_out(tmp_path: Path) -> None:
    inspector = each_step()
    result = small_trainer(inspector, model=line()).fit(some_batches(3), epochs=1)
    assert "grad/Linear/norm" in result.history[0]
    path = tmp_path / "curves.svg"
    result.plot(path)
    assert "Linear" not in path.read_text()


@pytest.mark.parametrize("arguments", [{"every": 50}, {"layers": 0}, {"histograms": "runs"}], ids=str)
def test_wrong_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GradientInspector(**arguments)


def test_scripted_modules_are_inspected_without_hooks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would have other things than scripts
        scripted = torch.jit.script(nn.Linear(3, 4))
    model = nn.Sequential(scripted, nn.Tanh(), nn.Linear(4, 1))
    inspector = GradientInspector()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), callbacks=[inspector], device="cpu"
    )
    trainer.fit([(torch.randn(4, 3), torch.randn(4, 1))] * 20, epochs=1)
    assert any(name.startswith("grad/0/") for name in trainer.state.metrics)


def test_a_layer_that_takes_the_place_of_another_is_measured_in_its_stead() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def swap(state: State) -> None:
        if state.progress.epoch == 1:
            model[1] = nn.Linear(4, 1)
            optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())

    callbacks = [GradientInspector(every=Every(steps=1)), At(on_epoch_end=swap)]
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, device="cpu")
    trainer.fit([(torch.randn(4, 3), torch.randn(4, 1))] * 10, epochs=3)
    assert trainer.state.metrics["update/1/ratio"] > 0


def test_gradients_too_small_for_their_square_are_not_called_zero() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.faint, self.plain = nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.plain(x) + 1e-26 * self.faint(x).sum(1, keepdim=True)
            return out

    inspector = GradientInspector(every=Every(steps=1))
    model = Faint()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[inspector], device="cpu")
    trainer.fit([(torch.randn(8, 3), torch.randn(8, 1))] * 20, epochs=1)
    assert "exactly zero" not in inspector.report()


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_spikes_are_found_where_one_of_the_first_inspections_is_one_too(first: int) -> None:
    inspector = each_step()
    batches = some_batches(20, 8)
    for number in (first - 1, 10, 16):
        batches[number][1].mul_(1000)
    small_trainer(inspector, model=line(), clip_norm=0.1).fit(batches, epochs=1)
    assert "spikes" in [finding.rule for finding in inspector.findings]


class Reads(Callback[Any]):
    """Reads what there is at each step, so that nothing can wait."""

    def on_step_end(self, state: State) -> None:
        assert len(state.metrics)


class Fills(torch.optim.SGD):
    """Clears gradients by filling them with zeros, so that they are the same tensors at each step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


def filling(parameters: Any) -> torch.optim.Optimizer:
    return Fills(parameters, lr=0.01)


def freezes(state: State, batch: Any) -> None:
    next(iter(state.model.parameters())).requires_grad_(state.progress.step % 4 < 2)


def logs_too(state: State) -> None:
    state.log("grad/norm", float(state.progress.step))


@pytest.mark.parametrize("counted", [0, 2**20], ids=["as one vector", "in python"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_norm": 0.01},
        {"accumulate": 2},
        {"precision": "fp16"},
        {"optimizer": filling},
        {"callbacks": [At(on_batch_start=freezes)]},
        {"callbacks": [At(on_step_end=logs_too)]},
    ],
    ids=["plain", "clipped", "accumulated", "fp16", "filled with zeros", "frozen now and then", "logged by another"],
)
def test_what_is_worked_out_later_is_what_is_worked_out_at_once(
    settings: dict[str, Any], counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopwright.inspecting.small._COUNTED", counted)
    found = []
    others = settings.get("callbacks", [])
    rest = {name: value for name, value in settings.items() if name != "callbacks"}
    for reader in ([], [Reads()]):
        torch.manual_seed(0)
        inspector = GradientInspector(Every(steps=3))
        trainer = small_trainer(inspector, *others, *reader, model=mlp(3), **rest)
        result = trainer.fit(list(vectors())[:5], epochs=8)
        rows = [list(row.items()) for row in result.history]  # in the same order, too
        values = list(trainer.state.metrics.items())
        found.append((rows, values, inspector.report(), repr(inspector.latest)))  # in which NaN may be
    assert found[0] == found[1]


def test_an_inspection_waits_for_somebody_who_reads_and_not_without_end() -> None:
    waiting: list[int] = []
    inspector = each_step()
    note = At(on_step_end=lambda state: waiting.append(len(inspector._waiting)))
    small_trainer(inspector, note, model=line()).fit(some_batches(4), steps=100)
    assert waiting[:3] == [1, 2, 3]
    assert max(waiting) == 31
    assert not inspector._waiting
    waiting.clear()
    small_trainer(inspector, note, Reads(), model=line()).fit(some_batches(4), steps=9)
    assert waiting == [1] * 9


class Writing(torch.optim.SGD):
    """Writes to the gradients, which are views of one vector and are cleared with it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.all = torch.zeros(sum(p.numel() for p in self.param_groups[0]["params"]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        parameters = self.param_groups[0]["params"]
        self.all.zero_()
        for part, parameter in zip(torch.split(self.all, [p.numel() for p in parameters]), parameters, strict=True):
            parameter.grad = part.view_as(parameter)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # none of its callers has one
        super().step()
        self.all.sign_().add_(0.5)


@pytest.mark.parametrize("size", [0, 2**14], ids=["kernel by kernel", "as one vector"])
@pytest.mark.parametrize("model", [lambda: mlp(3), lambda: nn.Linear(16, 4, bias=False)], ids=["layers", "one tensor"])
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_compared_as_they_were_whoever_writes_to_them_later(
    size: int, model: Callable[[], nn.Module], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopwright.inspecting.small._SMALL", size)
    torch.manual_seed(0)
    net = model()
    name = next(iter(dict(net.named_parameters())))
    by_hand, inspector = ByHand(name), GradientInspector(Every(steps=every))

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(batch[0]).square().mean()
        return loss

    trainer = small_trainer(by_hand, inspector, model=net, optimizer=lambda p: Writing(p, lr=0.01), step=step)
    trainer.fit(list(vectors()), steps=30)
    assert inspector._record.count > 7
    for one in inspector._record.inspections:
        if one.then[0]:
            cosine = one.dot[0] / math.sqrt(one.now[0] * one.then[0])
            assert cosine == pytest.approx(by_hand.rows[one.step - 1]["cos"], abs=1e-3)


def widened(state: State) -> None:
    for parameter, shape in zip(state.model.parameters(), [(6, 3), (6,), (1, 6), (1,)], strict=True):
        parameter.grad, parameter.data = None, torch.ones(shape)


def doubled(state: State) -> None:
    state.model.double()


@pytest.mark.parametrize("size", [0, 2**14], ids=["kernel by kernel", "as one vector"])
@pytest.mark.parametrize("hook", ["on_batch_start", "on_before_step", "on_step_end"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("change", [widened, doubled])
def test_weights_may_take_another_shape_or_format_in_mid_run(
    change: Callable[[State], None], hook: str, size: int, monkeypatch: pytest.MonkeyPatch, *, first: bool
) -> None:
    if change is widened and hook == "on_before_step":
        hook = "on_backward_end"  # and its gradients are gone: the step changes nothing
    monkeypatch.setattr("loopwright.inspecting.small._SMALL", size)
    done: list[int] = []

    def go(state: State, *rest: Any) -> None:
        if state.progress.step == 4 and not done:
            done.append(state.progress.step)
            change(state)

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = (model(batch[0].to(next(model.parameters()).dtype)) - 1).square().mean()
        return loss

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    inspector, changing = each_step(), At(**{hook: go})
    callbacks = [changing, inspector] if first else [inspector, changing]
    trainer = small_trainer(*callbacks, model=model, step=step)
    trainer.fit(some_batches(5), steps=8)
    assert done
    newest = inspector._record.inspections[-1]
    assert newest.step == 8
    weights = [float(p.detach().norm()) for p in model.parameters()]
    assert newest.weight == pytest.approx(weights, rel=0.2)
    assert [p.size for p in inspector._record.parameters] == [p.numel() for p in model.parameters()]


def test_a_layer_that_comes_in_between_does_not_shift_the_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 1))
    inspector, by_hand = each_step(), ByHand("2.weight")

    def grow(state: State, batch: Any) -> None:
        if state.progress.step == 4:
            model[1] = nn.Linear(4, 4)
            state.optimizer.add_param_group({"params": list(model[1].parameters())})

    trainer = small_trainer(inspector, by_hand, At(on_batch_start=grow), model=model)
    trainer.fit([(torch.randn(5, 4), torch.randn(5, 1)) for _ in range(3)], steps=12)
    metrics = trainer.state.metrics
    assert metrics["grad/2/norm"] == inspector_norm(model[2])
    assert metrics["grad/1/norm"] == inspector_norm(model[1])
    assert metrics["update/1/ratio"] > 0


def inspector_norm(layer: nn.Module) -> Any:
    gradients = [p.grad.flatten() for p in layer.parameters() if p.grad is not None]
    return pytest.approx(float(torch.cat(gradients).norm()), rel=1e-4)


def test_a_checkpoint_whose_silences_have_one_row_is_gone_on_from_without_them() -> None:
    inspector, other = each_step(), each_step()
    small_trainer(inspector, model=mlp(3)).fit(vectors(), steps=3)
    state = inspector.state_dict()
    state["record"]["quiet"] = {"0.bias": torch.full((32,), 5, dtype=torch.int32)}  # as version 0.1.0 wrote it
    other.load_state_dict(state)
    assert other.report() == inspector.report()
