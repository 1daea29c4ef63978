"""C2 to C4: a window of batches trains as the one big batch that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loopwright import Callback, Output, State, Trainer

Samples = tuple[Tensor, Tensor]
IGNORED = -100


class WithoutLength:
    """Batches whose number nobody knows before."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


class Lying(WithoutLength):
    """Batches with a length that is not theirs."""

    def __init__(self, batches: Sequence[Any], length: int) -> None:
        super().__init__(batches)
        self.length = length

    def __len__(self) -> int:
        return self.length


class Fetched(WithoutLength):
    """Counts the batches that were asked for, in all."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.count += 1
            yield batch


class FetchedWithLength(Fetched):
    def __len__(self) -> int:
        return len(self.batches)


@pytest.fixture(params=["each step", "rarely"], scope="module", autouse=True)
def values_are_read(request: pytest.FixtureRequest) -> Iterator[None]:
    """As on a CPU, and as on an accelerator, where each look at a value would wait for the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_read_each_step", request.param == "each step")
        yield


@dataclass
class Windowed:
    """One optimizer step as the callback saw it."""

    batches: list[int]
    gradients: list[Tensor]  # in on_before_step
    clipped: list[Tensor]  # in on_step_end
    weights: list[Tensor]  # before the step
    loss: float  # the newest train/loss in on_step_end


class Windows(Callback):
    """Records which batches each step was made of, and its gradients."""

    def __init__(self) -> None:
        self.steps: list[Windowed] = []
        self.backwards = 0
        self._open: list[int] = []

    def on_batch_start(self, state: State, batch: Any) -> None:
        self._open.append(state.progress.batch)

    def on_backward_end(self, state: State, output: Output) -> None:
        self.backwards += 1

    def on_before_step(self, state: State) -> None:
        weights = [p.detach().clone() for p in state.model.parameters()]
        self.steps.append(Windowed(self._open, gradients_of(state.model), [], weights, 0.0))
        self._open = []

    def on_step_end(self, state: State) -> None:
        self.steps[-1].clipped = gradients_of(state.model)
        self.steps[-1].loss = state.metrics["train/loss"]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def norm(gradients: list[Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients]).norm())


def regression(sizes: Sequence[int], seed: int = 0) -> tuple[nn.Module, list[Samples]]:
    """A model in double precision, and batches of these sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, [(torch.randn(n, 4).double(), 3 * torch.randn(n, 2).double()) for n in sizes]


def joined(batches: Sequence[Samples]) -> Samples:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(found, expected, strict=True)
    )


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_each_step_has_the_gradient_of_its_windows_mean(
    model: nn.Module, batches: Sequence[Samples], windows: Windows
) -> None:
    """Whatever the windows are: the loss and the gradient of each are those of all of its samples at once."""
    for step in windows.steps:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), step.weights, strict=True):
                parameter.copy_(value)
        inputs, targets = joined([batches[i] for i in step.batches])
        model.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        assert close(step.gradients, gradients_of(model)), step.batches
        assert step.loss == pytest.approx(loss.item(), rel=1e-9)


def runs_of(sizes: Sequence[object], accumulate: int) -> list[list[int]]:
    """The indices of the batches of each window."""
    return [list(range(start, min(start + accumulate, len(sizes)))) for start in range(0, len(sizes), accumulate)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    accumulate=st.integers(1, 5),
    known=st.booleans(),
    epochs=st.integers(1, 2),
)
def test_accumulating_equals_training_on_the_big_batches(
    sizes: list[int], accumulate: int, known: bool, epochs: int
) -> None:
    model, batches = regression(sizes)
    windows = Windows()
    data: Any = batches if known else WithoutLength(batches)
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=accumulate)
    result = trainer.fit(data, epochs=epochs)

    twin, batches = regression(sizes)
    big = [joined([batches[i] for i in window]) for window in runs_of(sizes, accumulate)]
    expected = Trainer(twin, sgd(twin), nn.MSELoss(), device="cpu").fit(big, epochs=epochs)

    assert close(weights_of(model), weights_of(twin))
    assert [step.batches for step in windows.steps] == runs_of(sizes, accumulate) * epochs
    assert windows.backwards == len(sizes) * epochs
    assert result.progress.step == expected.progress.step
    assert [row["train/loss"] for row in result.history] == pytest.approx(
        [row["train/loss"] for row in expected.history], rel=1e-9
    )
    assert_each_step_has_the_gradient_of_its_windows_mean(model, batches, windows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=7),
    accumulate=st.integers(1, 4),
    known=st.booleans(),
    kind=st.sampled_from(["int", "float", "tensor", "loss="]),
)
@example(lengths=[[1], [1]], accumulate=1, known=True, kind="float")
@example(lengths=[[0], [3], [1, 2]], accumulate=3, known=False, kind="tensor")
def test_windows_of_ragged_token_counts_equal_the_big_batch(
    lengths: list[list[int]], accumulate: int, known: bool, kind: str
) -> None:
    """A batch is some rows of 5 tokens, of which the first few are valid; also none at all."""
    if kind == "loss=" or accumulate == 1:
        # The mean over no token is NaN there, and NaN is an error: at once, or where it is not known in time
        # that the weight is 0.
        assume((accumulate > 1 and Trainer._read_each_step) or all(map(any, lengths)))
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4)).double()
    initial = weights_of(model)
    batches = []
    for rows in lengths:
        tokens, targets = torch.randint(0, 7, (len(rows), 5)), torch.randint(0, 4, (len(rows), 5))
        for row, valid in enumerate(rows):
            targets[row, valid:] = IGNORED
        batches.append((tokens, targets))
    cross_entropy = nn.CrossEntropyLoss(ignore_index=IGNORED)

    summed = nn.CrossEntropyLoss(ignore_index=IGNORED, reduction="sum")

    def transposed(logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(logits.transpose(1, 2), targets)
        return loss

    def step(model: nn.Module, batch: Samples) -> Output:
        valid = (batch[1] != IGNORED).sum()
        loss = summed(model(batch[0]).transpose(1, 2), batch[1]) / valid.clamp(min=1)
        if kind == "tensor":
            return Output(loss, weight=valid)
        return Output(loss, weight=int(valid) if kind == "int" else 0.1 * int(valid))

    recorder = Windows()
    if kind == "loss=":
        loss = Transposed(ignore_index=IGNORED)
        trainer = Trainer(model, sgd(model), loss, callbacks=[recorder], device="cpu", accumulate=accumulate)
    else:
        trainer = Trainer(model, sgd(model), step=step, callbacks=[recorder], device="cpu", accumulate=accumulate)
    result = trainer.fit(batches if known else WithoutLength(batches), epochs=1)

    twin = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4)).double()
    with torch.no_grad():
        for parameter, value in zip(twin.parameters(), initial, strict=True):
            parameter.copy_(value)
    optimizer = sgd(twin)
    total, count = 0.0, 0
    for window in runs_of(lengths, accumulate):
        tokens, targets = joined([batches[i] for i in window])
        valid = int((targets != IGNORED).sum())
        optimizer.zero_grad()
        if valid:
            big = transposed(twin(tokens), targets)
            big.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            total, count = total + big.item() * valid, count + valid
            optimizer.step()
        else:  # a mean over nothing: nothing to learn, but what momentum goes on with
            continue
    if all(any(sum(lengths[i]) for i in window) for window in runs_of(lengths, accumulate)):
        assert close(weights_of(model), weights_of(twin))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    if count:
        assert result.history[0]["train/loss"] == pytest.approx(total / count, rel=1e-9)


class Transposed(nn.CrossEntropyLoss):
    """The loss over tokens, for logits whose classes come last."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.transpose(1, 2), targets)


@pytest.mark.parametrize("weight", [0.1, 0.3, 2.0 / 3.0, 7, torch.tensor(0.1), torch.tensor(7)])
@pytest.mark.parametrize("accumulate", [3, 6, 7])
def test_windows_of_equal_weights_have_the_bits_of_loss_over_k(weight: float | Tensor, accumulate: int) -> None:
    model, batches = regression([3] * 2 * accumulate)
    optimizer = sgd(model)
    for _ in range(2):
        for i, (inputs, targets) in enumerate(batches):
            if i % accumulate == 0:
                optimizer.zero_grad()
            (nn.functional.mse_loss(model(inputs), targets) / accumulate).backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            if (i + 1) % accumulate == 0:
                optimizer.step()

    def step(model: nn.Module, batch: Samples) -> Output:
        return Output(nn.functional.mse_loss(model(batch[0]), batch[1]), weight=weight)

    for data in (batches, WithoutLength(batches)):
        twin, _ = regression([3] * 2 * accumulate)
        Trainer(twin, sgd(twin), step=step, device="cpu", accumulate=accumulate).fit(data, epochs=2)
        assert all(map(torch.equal, weights_of(twin), weights_of(model)))


@pytest.mark.parametrize("weight", [0.1, 1e-30, 3, torch.tensor(0.3)])
def test_without_accumulation_the_weight_changes_no_bit_of_the_training(weight: float | Tensor) -> None:
    model, batches = regression([3, 5, 2])
    optimizer = sgd(model)
    for inputs, targets in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        optimizer.step()
    twin, _ = regression([3, 5, 2])

    def step(model: nn.Module, batch: Samples) -> Output:
        return Output(nn.functional.mse_loss(model(batch[0]), batch[1]), weight=weight)

    Trainer(twin, sgd(twin), step=step, device="cpu").fit(batches, epochs=1)
    assert all(map(torch.equal, weights_of(twin), weights_of(model)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("masked", [[0], [1], [2], [0, 1], [1, 2], [3], [3, 4]])
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_batch_of_weight_zero_counts_for_nothing_wherever_it_stands(
    kind: str, masked: list[int], known: bool
) -> None:
    """Its loss may well be NaN, as a mean over no tokens is, where it is known in time that it weighs nothing."""
    masked_loss = float("nan") if kind == "number" or Trainer._read_each_step else 7.0
    model, batches = regression([3, 2, 4, 3, 2])

    def step(model: nn.Module, batch: Samples) -> Output:
        index = next(i for i, (inputs, _) in enumerate(batches) if inputs is batch[0])
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        if index in masked:
            return Output(loss * masked_loss, weight=0 if kind == "number" else torch.tensor(0))
        return Output(loss, weight=len(batch[0]) if kind == "number" else torch.tensor(len(batch[0])))

    trainer = Trainer(model, sgd(model), step=step, device="cpu", accumulate=3)
    result = trainer.fit(batches if known else WithoutLength(batches), epochs=1)

    twin, _ = regression([3, 2, 4, 3, 2])
    optimizer = sgd(twin)
    for window in ([0, 1, 2], [3, 4]):
        kept = [batches[i] for i in window if i not in masked]
        if kept:
            inputs, targets = joined(kept)
            optimizer.zero_grad()
            nn.functional.mse_loss(twin(inputs), targets).backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            optimizer.step()
        else:
            assert result.history[0]["train/loss"] > 0
    if masked != [3, 4]:
        assert close(weights_of(model), weights_of(twin))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("known", [True, False])
def test_seven_batches_by_four_are_exactly_two_steps_an_epoch(known: bool) -> None:
    model, batches = regression([3] * 7)
    windows = Windows()
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=4)
    result = trainer.fit(batches if known else WithoutLength(batches), epochs=3)
    assert result.progress.step == 6
    assert [row["step"] for row in result.history] == [2, 4, 6]
    assert [step.batches for step in windows.steps] == [[0, 1, 2, 3], [4, 5, 6]] * 3
    assert_each_step_has_the_gradient_of_its_windows_mean(model, batches, windows)


@pytest.mark.parametrize("known", [True, False])
def test_eight_batches_by_four_make_no_third_step(known: bool) -> None:
    model, batches = regression([3] * 8)
    windows = Windows()
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=4)
    assert trainer.fit(batches if known else WithoutLength(batches), epochs=2).progress.step == 4
    assert [step.batches for step in windows.steps] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize("known", [True, False])
def test_one_window_may_be_longer_than_the_epoch(known: bool) -> None:
    model, batches = regression([3, 2])
    windows = Windows()
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=100)
    assert trainer.fit(batches if known else WithoutLength(batches), epochs=2).progress.step == 2
    assert_each_step_has_the_gradient_of_its_windows_mean(model, batches, windows)


@pytest.mark.parametrize("kind", [Fetched, FetchedWithLength])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_batch_is_fetched_ahead_of_its_turn(kind: type[Fetched], accumulate: int) -> None:
    model, batches = regression([3] * 7)
    loader = kind(batches)
    at_batches: list[int] = []
    at_steps: list[int] = []

    class Watch(Callback):
        def on_epoch_start(self, state: State) -> None:
            assert loader.count == 7 * state.progress.epoch

        def on_batch_start(self, state: State, batch: Any) -> None:
            at_batches.append(loader.count)

        def on_step_end(self, state: State) -> None:
            at_steps.append(loader.count)

        def on_batch_end(self, state: State, output: Output) -> None:
            assert loader.count == at_batches[-1]

    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[Watch()], device="cpu", accumulate=accumulate)
    trainer.fit(loader, epochs=2)
    assert at_batches == list(range(1, 15))
    assert at_steps == (list(range(1, 15)) if accumulate == 1 else [4, 7, 11, 14])


def test_a_known_short_window_steps_within_the_epochs_last_batch() -> None:
    model, batches = regression([3] * 7)
    order: list[str] = []

    class Order(Callback):
        def on_step_end(self, state: State) -> None:
            order.append("step")

        def on_batch_end(self, state: State, output: Output) -> None:
            order.append(str(state.progress.batch))

    for data in (batches, WithoutLength(batches)):
        order.append(type(data).__name__)
        Trainer(model, sgd(model), nn.MSELoss(), callbacks=[Order()], device="cpu", accumulate=4).fit(data, epochs=1)
    known = ["list", "1", "2", "3", "step", "4", "5", "6", "step", "7"]
    assert order == [*known, "WithoutLength", "1", "2", "3", "step", "4", "5", "6", "7", "step"]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 8, 9, 12, 100])
@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_a_length_that_is_wrong_still_gives_every_window_the_gradient_of_its_mean(length: int, accumulate: int) -> None:
    model, batches = regression([3, 1, 4, 2, 3, 3, 2])
    windows = Windows()
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=accumulate)
    result = trainer.fit(Lying(batches, length), epochs=2)
    assert result.progress.batch == 0
    assert result.progress.epoch == 2
    assert [batch for step in windows.steps for batch in step.batches] == list(range(7)) * 2
    assert all(len(step.batches) <= accumulate for step in windows.steps)
    assert_each_step_has_the_gradient_of_its_windows_mean(model, batches, windows)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_sees_the_mean_gradient_once_a_step(accumulate: int, known: bool) -> None:
    model, batches = regression([3, 2, 4, 1, 3])
    windows = Windows()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, before, nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=accumulate, clip_norm=0.7
    )
    trainer.fit(batches if known else WithoutLength(batches), epochs=2)
    after = [*[step.weights for step in windows.steps[1:]], weights_of(model)]
    clipped = 0
    for step, then in zip(windows.steps, after, strict=True):
        found = norm(step.gradients)
        factor = min(1.0, 0.7 / (found + 1e-6))
        clipped += factor < 1
        assert close(step.clipped, [factor * g for g in step.gradients])
        assert close(then, [w - 0.1 * g for w, g in zip(step.weights, step.clipped, strict=True)])
    assert clipped > 0
    assert_each_step_has_the_gradient_of_its_windows_mean(model, batches, windows)


def test_a_norm_that_is_below_the_limit_changes_no_bit() -> None:
    model, batches = regression([3, 2, 4, 1, 3])
    twin, _ = regression([3, 2, 4, 1, 3])
    Trainer(model, sgd(model), nn.MSELoss(), device="cpu", accumulate=2).fit(batches, epochs=2)
    Trainer(twin, sgd(twin), nn.MSELoss(), device="cpu", accumulate=2, clip_norm=1e9).fit(batches, epochs=2)
    assert all(map(torch.equal, weights_of(model), weights_of(twin)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_target_in_steps_is_met_exactly_and_at_the_end_of_a_window(steps: int, known: bool) -> None:
    model, batches = regression([3] * 7)
    windows = Windows()
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=[windows], device="cpu", accumulate=4)
    result = trainer.fit(batches if known else WithoutLength(batches), steps=steps)
    assert result.progress.step == len(windows.steps) == steps
    assert [step.batches for step in windows.steps] == ([[0, 1, 2, 3], [4, 5, 6]] * 3)[:steps]
    assert result.stop_reason == "steps"


def test_a_stop_in_mid_window_waits_for_its_step() -> None:
    model, batches = regression([3] * 9)
    windows = Windows()

    class Stop(Callback):
        def on_batch_end(self, state: State, output: Output) -> None:
            if state.progress.batch == 5:
                state.stop("enough")

    callbacks = [windows, Stop()]
    trainer = Trainer(model, sgd(model), nn.MSELoss(), callbacks=callbacks, device="cpu", accumulate=3)
    result = trainer.fit(batches, epochs=2)
    assert (result.stop_reason, result.progress.step, result.progress.batch) == ("enough", 2, 6)
    assert [step.batches for step in windows.steps] == [[0, 1, 2], [3, 4, 5]]
    assert trainer.fit(batches, epochs=1).progress.step == 3
    assert windows.steps[-1].batches == [6, 7, 8]
    assert_each_step_has_the_gradient_of_its_windows_mean(model, batches, windows)


def test_output_metrics_are_averaged_over_the_window_and_the_epoch_like_the_loss() -> None:
    model, batches = regression([3, 1, 4, 2])
    seen: list[float] = []

    def step(model: nn.Module, batch: Samples) -> Output:
        error = model(batch[0]) - batch[1]
        return Output(error.square().mean(), metrics={"size": float(len(batch[0]))})

    class Newest(Callback):
        def on_step_end(self, state: State) -> None:
            seen.append(state.metrics["train/size"])

    trainer = Trainer(model, sgd(model), step=step, callbacks=[Newest()], device="cpu", accumulate=2)
    history = trainer.fit(batches, epochs=1).history
    assert seen == pytest.approx([(9 + 1) / 4, (16 + 4) / 6])
    assert history[0]["train/size"] == pytest.approx((9 + 1 + 16 + 4) / 10)


class Thaws(Callback[Any]):
    """Has the optimizer train the first layer too from the second epoch on."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_epoch_start(self, state: State) -> None:
        if state.progress.epoch == 1 and not isinstance(state.model, nn.Linear):
            state.optimizer.add_param_group({"params": list(next(state.model.children()).parameters())})

    def on_step_end(self, state: State) -> None:
        self.norms.append(norm([p.grad for g in state.optimizer.param_groups for p in g["params"]]))


@pytest.mark.parametrize("setting", [{"clip_norm": 0.05}, {"accumulate": 2}, {"on_nonfinite": "skip"}], ids=str)
def test_parameters_that_the_optimizer_gets_in_mid_run_belong_to_its_steps(setting: dict[str, Any]) -> None:
    model, batches = regression([2, 5, 3, 4])
    first, last, thaws = next(model.children()), list(model.children())[-1], Thaws()
    trainer = Trainer(model, sgd(last), nn.MSELoss(), callbacks=[thaws], device="cpu", **setting)
    trainer.fit(batches, epochs=3)

    size, largest = setting.get("accumulate", 1), setting.get("clip_norm")
    twin, _ = regression([2, 5, 3, 4])
    optimizer = sgd(list(twin.children())[-1])
    for epoch in range(3):
        if epoch == 1:
            optimizer.add_param_group({"params": list(next(twin.children()).parameters())})
        for window in runs_of(batches, size):
            twin.zero_grad()
            inputs, targets = joined([batches[i] for i in window])
            nn.functional.mse_loss(twin(inputs), targets).backward()  # type: ignore[no-untyped-call]  # as above
            if largest is not None:
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], largest)
            optimizer.step()
    assert close(weights_of(model), weights_of(twin))
    assert not torch.equal(next(first.parameters()), next(next(regression([2])[0].children()).parameters()))
    assert largest is None or max(thaws.norms) <= largest * (1 + 1e-6)


def test_a_gradient_that_overflows_in_a_layer_that_came_late_skips_its_step() -> None:
    model, batches = regression([2, 2])

    class Overflows(Thaws):
        def on_before_step(self, state: State) -> None:
            gradient = next(model.parameters()).grad
            if state.progress.epoch == 1 and gradient is not None:
                gradient.fill_(torch.inf)

    optimizer = sgd(list(model.children())[-1])
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[Overflows()], device="cpu", on_nonfinite="skip")
    assert trainer.fit(batches, epochs=2).progress.skipped == 2


class Growing:
    """A loader with another number of batches in each epoch, as samplers have that fill batches with tokens."""

    def __init__(self, batches: Sequence[Samples], first: int, more: int) -> None:
        self.batches, self.first, self.more = batches, first, more
        self.epoch = 0

    def __len__(self) -> int:
        return self.first + self.more * self.epoch

    def __iter__(self) -> Iterator[Samples]:
        return iter(self.batches[: len(self)])


@pytest.mark.parametrize(("first", "more"), [(6, 1), (6, -1), (3, 2), (5, -2)])
def test_the_length_of_each_epoch_is_asked_anew(first: int, more: int, caplog: pytest.LogCaptureFixture) -> None:
    model, batches = regression([2] * 8)
    data, ends = Growing(batches, first, more), []

    class Turns(Callback[Any]):
        def on_epoch_start(self, state: State) -> None:
            data.epoch = state.progress.epoch

        def on_epoch_end(self, state: State) -> None:
            ends.append((state.progress.step, state.plan.batches))

    def fresh() -> Trainer:
        ends.clear()
        data.epoch = 0
        return Trainer(model, sgd(model), nn.MSELoss(), callbacks=[Turns()], device="cpu", accumulate=4)

    lengths = [first, first + more, first + 2 * more]
    steps = [-(-length // 4) for length in lengths]
    fresh().fit(data, epochs=3)
    assert ends == [(sum(steps[: k + 1]), lengths[k]) for k in range(3)]

    in_the_second = steps[0] + 1
    progress = fresh().fit(data, steps=in_the_second).progress
    over = steps[1] == 1
    assert (progress.epoch, progress.batch) == ((2, 0) if over else (1, 4))
    assert "has a length of" not in caplog.text
