"""What holds on a CPU holds on an accelerator: each test here runs on both, the latter where there is one.

On the CPU they run at the accelerator's cadence: values are read where they are written down, not at each step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import At, PassError, all_equal, weights_of
from loopwright import Callback, Every, NonFiniteError, State, Trainer, latest_checkpoint, load_weights
from loopwright.callbacks import Checkpoint, EarlyStopping, GradientInspector

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each device in turn, with its own generator at a known place."""
    monkeypatch.setattr(Trainer, "_read_each_step", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else convolutions may add in another order
    torch.manual_seed(3)
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device(request.param)


def net() -> nn.Sequential:
    """A convolution, batch norm, dropout: buffers that move, and random numbers of the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv1d(2, 6, 3, padding=1),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(6 * 8, 3),
        )


def batches(count: int = 6, size: int = 5) -> Batches:
    """Inputs ``(size, 2, 8)`` and classes ``(size,)``, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 2, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def trainer_on(
    device: torch.device, *callbacks: Callback[Any], model: nn.Module | None = None, **settings: Any
) -> Trainer:
    """A trainer of that net by momentum."""
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, device=device, **settings)


def by_hand(
    device: torch.device, data: Batches, epochs: int, *, accumulate: int, clip: float, dtype: torch.dtype | None
) -> list[Tensor]:
    """The weights and buffers that the plain loop comes to."""
    model = net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    loss_fn = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for start in range(0, len(data), accumulate):
            optimizer.zero_grad()
            window = data[start : start + accumulate]
            for inputs, targets in window:
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    loss = loss_fn(model(inputs.to(device)), targets.to(device))
                scaler.scale(loss / len(window)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_weights_are_those_of_the_loop_by_hand(
    device: torch.device, precision: str, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(4)
    expected = by_hand(device, batches(), 2, accumulate=2, clip=0.5, dtype=dtype)

    torch.manual_seed(4)
    trainer = trainer_on(device, accumulate=2, clip_norm=0.5, precision=precision)
    trainer.fit(batches(), epochs=2)

    assert all_equal(expected, weights_of(trainer))
    assert {value.device for value in weights_of(trainer)} == {device}


def test_a_loader_with_workers_and_pinned_memory_trains_as_ready_made_batches_do(device: torch.device) -> None:
    data = batches()
    dataset = TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    loader = DataLoader(
        dataset,
        batch_size=5,
        num_workers=1,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # from which it draws its workers' seed, and not from the one of dropout
    )
    found = []
    for source in (data, loader):
        torch.manual_seed(5)
        trainer = trainer_on(device)
        trainer.fit(source, epochs=2)
        found.append(weights_of(trainer))

    assert all_equal(*found)


def test_the_step_gets_every_tensor_of_a_nested_batch_on_the_device(device: torch.device) -> None:
    seen: list[torch.device] = []

    def step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs, targets = batch["pair"]
        seen.extend([inputs.device, targets.device, batch["more"]["mask"].device])
        assert batch["name"] == "kept"
        return nn.functional.cross_entropy(model(inputs), targets)

    model = net()
    nested = [{"pair": pair, "more": {"mask": torch.ones(5)}, "name": "kept"} for pair in batches(2)]
    trainer: Trainer[Any, Any] = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, device=device)
    trainer.fit(nested, epochs=1)

    assert set(seen) == {device}


def test_evaluation_and_metrics_are_computed_there_and_predictions_come_back(device: torch.device) -> None:
    model = net()
    trainer = trainer_on(device, model=model, metrics={"accuracy": torchmetrics.Accuracy("multiclass", num_classes=3)})
    scores = trainer.evaluate(batches())
    outputs = trainer.predict(batches())

    model.eval()
    with torch.no_grad():
        logits = [model(inputs.to(device)) for inputs, _ in batches()]
    right = sum(int((out.argmax(1).cpu() == y).sum()) for out, (_, y) in zip(logits, batches(), strict=True))
    assert scores["test/accuracy"] == pytest.approx(right / 30)
    assert {out.device.type for out in outputs} == {"cpu"}
    assert all_equal(outputs, [out.cpu() for out in logits])


@pytest.mark.gpu
def test_nothing_waits_for_the_device_between_two_log_points() -> None:
    def start(state: State) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def end(state: State) -> None:
        torch.cuda.set_sync_debug_mode("default")

    device = torch.device("cuda", 0)
    ready = [(x.to(device), y.to(device)) for x, y in batches(20)]
    trainer = trainer_on(device, At(on_epoch_start=start, on_epoch_end=end), accumulate=2, clip_norm=1.0)
    try:
        trainer.fit(ready, epochs=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert trainer.state.progress.step == 20


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_broken_off(
    device: torch.device, precision: str, tmp_path: Path
) -> None:
    def run(folder: Path, *others: Callback[Any]) -> Trainer:
        keeper = Checkpoint(folder, every=Every(steps=1), keep=2)
        return trainer_on(device, *others, keeper, precision=precision, seed=11)

    whole = run(tmp_path / "whole")
    whole.fit(batches(), epochs=3)

    def crash(state: State) -> None:
        if state.progress.step == 8:
            raise PassError

    with pytest.raises(PassError):
        run(tmp_path / "broken", At(on_batch_start=lambda state, batch: crash(state))).fit(batches(), epochs=3)
    torch.randn(5, device=device)  # what happens in between takes nothing from it
    resumed = run(tmp_path / "broken")
    result = resumed.fit(batches(), epochs=3, resume="auto")

    assert result.progress.step == 18
    assert all_equal(weights_of(whole), weights_of(resumed))


def test_weights_saved_there_load_into_a_model_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    trainer = trainer_on(device, Checkpoint(tmp_path / "kept"))
    trainer.fit(batches(), epochs=1)

    other = net()
    saved = latest_checkpoint(tmp_path / "kept")
    assert saved is not None
    load_weights(saved, other)

    assert all_equal(other.state_dict().values(), [value.cpu() for value in weights_of(trainer)])


def test_the_best_weights_come_back_on_the_device(device: torch.device) -> None:
    best: list[list[Tensor]] = []

    def keep(state: State) -> None:
        if state.metrics["val/loss"] <= min(losses, default=math.inf):
            best[:] = [[value.detach().clone() for value in state.model.state_dict().values()]]
        losses.append(state.metrics["val/loss"])

    losses: list[float] = []
    stopping = EarlyStopping("val/loss", mode="min", patience=1, restore_best=True)
    trainer = trainer_on(device, At(on_epoch_end=keep), stopping)
    trainer.fit(batches(), batches(2), epochs=12)

    assert all_equal(best[0], weights_of(trainer))


def test_the_first_bad_step_is_named_though_it_is_looked_at_later(device: torch.device) -> None:
    data = batches()
    data[3][0][2, 1, 4] = math.inf
    trainer = trainer_on(device)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(data, epochs=3)

    assert "epoch 1, batch 4" in str(caught.value)


def test_the_inspector_measures_the_norms_and_the_true_update(device: torch.device) -> None:
    found: dict[str, float] = {}

    def before(state: State) -> None:
        found["grad"] = float(torch.cat([p.grad.flatten() for p in model[5].parameters() if p.grad is not None]).norm())
        held.append([p.detach().clone() for p in model[5].parameters()])

    def after(state: State) -> None:
        change = [a.detach() - b for a, b in zip(model[5].parameters(), held[-1], strict=True)]
        weight = torch.cat([b.flatten() for b in held[-1]]).norm()
        found["ratio"] = float(torch.cat([c.flatten() for c in change]).norm() / weight)

    held: list[list[Tensor]] = []
    model = net()
    trainer = trainer_on(
        device, GradientInspector(every=Every(steps=1)), At(on_before_step=before, on_step_end=after), model=model
    )
    trainer.fit(batches(), epochs=1)

    assert trainer.state.metrics["grad/5/norm"] == pytest.approx(found["grad"], rel=1e-4)
    assert trainer.state.metrics["update/5/ratio"] == pytest.approx(found["ratio"], rel=1e-3)


def test_preflight_passes_and_leaves_weights_and_random_numbers_as_they_were(device: torch.device) -> None:
    model = net().to(device)
    trainer = trainer_on(device, model=model)
    before = copy.deepcopy(model.state_dict())
    expected = torch.randn(3, generator=copy_of(device), device=device)
    report = trainer.preflight(batches(), batches(2))

    assert not report.failed, str(report)
    assert all_equal(before.values(), model.state_dict().values())
    assert torch.equal(torch.randn(3, device=device), expected)


def copy_of(device: torch.device) -> torch.Generator:
    """A generator at the place of the device's own."""
    generator = torch.Generator(device)
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    generator.set_state(state)
    return generator


def test_the_explained_loop_comes_to_the_same_bits(device: torch.device) -> None:
    torch.manual_seed(6)
    trainer = trainer_on(device, accumulate=2, clip_norm=0.5)
    trainer.fit(batches(), epochs=2)
    text = trainer.explain()

    torch.manual_seed(6)
    names: dict[str, Any] = {}
    exec(compile(text, "explained", "exec"), names)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train: Callable[..., Any] = names["train"]
    train(model, optimizer, nn.CrossEntropyLoss(), batches(), epochs=2)

    assert all_equal(model.state_dict().values(), weights_of(trainer))


def test_two_runs_from_one_seed_are_the_same(device: torch.device) -> None:
    def weights() -> Iterator[list[Tensor]]:
        for _ in range(2):
            trainer = trainer_on(device, seed=5)
            trainer.fit(batches(), epochs=2)
            yield weights_of(trainer)

    assert all_equal(*weights())
