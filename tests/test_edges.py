"""What fresh eyes found: corners where a run went on wrongly, or an error said the wrong thing."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from loopwright import (
    Callback,
    ConfigError,
    DataError,
    NonFiniteError,
    Output,
    ShapeMismatchError,
    State,
    Trainer,
)
from loopwright.callbacks import EarlyStopping
from loopwright.testing import tiny_state

Pairs = list[tuple[Tensor, Tensor]]


def batches(number: int = 4) -> Pairs:
    return [(torch.full((4, 3), float(i + 1)), torch.ones(4, 1)) for i in range(number)]


def trainer_of(lr: float = 0.01, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), nn.MSELoss(), **settings)


class InterruptedOnce(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, state: State) -> None:
        self.steps += 1
        if self.steps == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_batch_whose_step_was_made_is_not_trained_on_again_after_an_error(accumulate: int) -> None:
    unbroken = trainer_of(accumulate=accumulate)
    expected = unbroken.fit(batches(), epochs=2)
    trainer = trainer_of(accumulate=accumulate, callbacks=[InterruptedOnce()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(batches(), epochs=2)
    result = trainer.fit(batches(), epochs=2)
    assert (result.progress, result.history) == (expected.progress, expected.history)
    assert torch.equal(trainer.state.model.get_parameter("weight"), unbroken.state.model.get_parameter("weight"))


def test_a_fit_with_nothing_left_to_do_does_not_return_weights_that_are_not_finite() -> None:
    class Ruin(Callback):
        def on_epoch_end(self, state: State) -> None:
            with torch.no_grad():
                state.model.get_parameter("weight").fill_(math.nan)

    trainer = trainer_of(callbacks=[Ruin()])
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="1 of 2 trainable parameters"):
            trainer.fit(batches(), epochs=1)


def test_a_fit_with_nothing_left_to_do_restores_the_best_weights_that_an_error_had_kept_back() -> None:
    class Fails(Callback):
        def on_fit_end(self, state: State) -> None:
            raise RuntimeError("too late")

    stopper = EarlyStopping("val/loss", mode="max", restore_best=True)  # the first epoch's is the largest
    trainer = trainer_of(callbacks=[stopper, Fails()])
    with pytest.raises(RuntimeError, match="too late"):
        trainer.fit(batches(), batches(), epochs=2)
    result = trainer.fit(batches(), batches(), epochs=2)
    best = stopper.best_weights
    assert best is not None
    assert result.restored_epoch == stopper.best_epoch
    assert torch.equal(trainer.state.model.get_parameter("weight"), best["weight"])


def head_trainer(**settings: Any) -> Trainer:
    """Fine-tunes the second of two layers; the first needs gradients, but no optimizer holds it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return Trainer(model, torch.optim.SGD(model[1].parameters(), lr=0.1), nn.MSELoss(), device="cpu", **settings)


def test_gradients_outside_the_optimizer_do_not_pile_up_and_are_not_clipped() -> None:
    class Norms(Callback):
        def on_before_step(self, state: State) -> None:
            gradient = state.model.get_parameter("0.weight").grad
            assert gradient is not None
            seen.append(gradient.clone())

    seen: list[Tensor] = []
    trainer = head_trainer(clip_norm=1e-9, callbacks=[Norms()])
    trainer.fit([batches(1)[0]] * 2, epochs=1)
    # The clipped head has hardly moved, so the same batch gives the same gradient: once, and not the sum of two.
    torch.testing.assert_close(seen[0], seen[1])
    outside = trainer.state.model.get_parameter("0.weight").grad
    assert outside is not None
    assert torch.equal(outside, seen[1])


def test_one_bad_batch_outside_the_optimizer_does_not_stop_all_training_under_skip() -> None:
    bad = (torch.full((4, 3), 1e30), torch.ones(4, 1))
    good = batches(1)[0]
    result = head_trainer(on_nonfinite="skip").fit([good, good, bad, good, good], epochs=1)
    assert (result.progress.step, result.progress.skipped) == (4, 1)


def test_a_loader_that_is_its_own_iterator_and_starts_anew_is_gone_on_with_where_it_was_left() -> None:
    class Rewinds:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.at = 0
            return self

        def __next__(self) -> tuple[Tensor, Tensor]:
            if self.at == 4:
                raise StopIteration
            self.at += 1
            return batches()[self.at - 1]

    unbroken, trainer = trainer_of(), trainer_of()
    unbroken.fit(batches(), epochs=2)
    loader = Rewinds()
    trainer.fit(loader, steps=3)
    assert trainer.fit(loader, epochs=2).progress.step == 8
    assert torch.equal(trainer.state.model.get_parameter("weight"), unbroken.state.model.get_parameter("weight"))


@pytest.mark.parametrize("loss", [nn.PoissonNLLLoss(), nn.MSELoss(), functional.mse_loss, functional.l1_loss])
def test_a_column_of_predictions_against_a_row_of_whole_numbers_is_refused(loss: Any) -> None:
    model = nn.Linear(3, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    with pytest.raises(ShapeMismatchError, match=r"\(4, 1\).*\(4,\)"):
        trainer.fit([(torch.ones(4, 3), torch.ones(4, dtype=torch.long))], epochs=1)


def test_indices_of_classes_are_left_alone_in_a_loss_of_the_users_own() -> None:
    def focal(predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions, targets) ** 2

    model = nn.Linear(3, 4)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), focal)
    assert trainer.fit([(torch.ones(4, 3), torch.arange(4))], epochs=1).progress.step == 1


def test_an_empty_loader_with_a_batch_sampler_of_its_own_says_why_it_is_empty() -> None:
    dataset = TensorDataset(torch.ones(16, 3), torch.ones(16, 1))
    loader = DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 32, drop_last=True))
    with pytest.raises(DataError, match="dataset size 16, batch size 32, drop_last True"):
        trainer_of().fit(loader, epochs=1)


def test_a_metric_of_the_steps_and_one_of_the_trainers_cannot_have_one_name() -> None:
    class Mean:
        def update(self, predictions: Tensor, targets: Tensor) -> None: ...
        def compute(self) -> float:
            return 1.0

        def reset(self) -> None: ...

    def step(model: nn.Module, batch: Tensor) -> Output:
        prediction = model(batch)
        return Output(prediction.mean(), predictions=prediction, targets=batch, metrics={"mae": 2.0})

    model = nn.Linear(3, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, metrics={"mae": Mean()})
    with pytest.raises(ConfigError, match="'test/mae' is measured twice"):
        trainer.evaluate([torch.ones(2, 3)])


@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_a_learning_rate_that_is_no_number_is_refused_before_the_first_step(lr: float) -> None:
    with pytest.raises(ConfigError, match="the learning rate of parameter group 0 is"):
        trainer_of(lr=lr)


def test_what_callbacks_set_on_the_state_by_mistake_is_an_error() -> None:
    with pytest.raises(AttributeError, match="should_stop"):
        tiny_state().should_stop = True  # type: ignore[attr-defined]  # that is the test


def test_a_misspelt_hook_is_found_in_a_mixin_too() -> None:
    class Mixin:
        def on_epoch_finish(self, state: State) -> None: ...

    with pytest.raises(TypeError, match="on_epoch_finish is not a hook"):
        type("Mixed", (Mixin, Callback), {})


def test_a_validation_metric_of_a_callbacks_own_may_be_monitored_without_validation_data() -> None:
    class Logs(Callback):
        def on_epoch_end(self, state: State) -> None:
            state.log("val/auc", 0.5)

    result = trainer_of(callbacks=[Logs(), EarlyStopping("val/auc", mode="max", patience=2)]).fit(batches(), epochs=9)
    assert result.progress.epoch == 3


def test_an_unknown_monitor_says_that_validation_data_was_forgotten() -> None:
    trainer = trainer_of(callbacks=[EarlyStopping("val_loss", mode="min")])
    with pytest.raises(ConfigError, match="fit was given no validation data"):
        trainer.fit(batches(), epochs=1)


def test_predict_gives_a_model_the_whole_of_a_packed_sequence() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, packed: PackedSequence) -> Tensor:
            assert isinstance(packed, PackedSequence)
            return self.weight * packed.data.sum()

    model = Sums()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss())
    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    assert torch.equal(trainer.predict([packed])[0], torch.tensor(3.0))


def test_a_validation_that_was_given_up_draws_nothing() -> None:
    class GivesUpOnce(Callback):
        failed = False

        def on_eval_batch_end(self, state: State, output: Output) -> None:
            if not self.failed:
                self.failed = True
                raise KeyboardInterrupt

    def run(*callbacks: Callback) -> tuple[Trainer, DataLoader[Any], DataLoader[Any]]:
        torch.manual_seed(1)
        data = TensorDataset(torch.arange(24.0).reshape(8, 3), torch.ones(8, 1))
        train, val = DataLoader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=4, shuffle=True)
        return trainer_of(lr=1e-4, callbacks=callbacks, seed=5), train, val

    unbroken, train, val = run()
    expected = unbroken.fit(train, val, epochs=3)
    trainer, train, val = run(GivesUpOnce())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(train, val, epochs=3)
    assert trainer.fit(train, val, epochs=3).history == expected.history


def _kept_graph(model: nn.Module, batch: Any, kept: list[Tensor]) -> Tensor:
    kept.append(model(batch[0]).mean() + (kept[-1] if kept else 0))
    return kept[-1]


def _backward_in_the_step(model: nn.Module, batch: Any, kept: list[Tensor]) -> Tensor:
    loss: Tensor = model(batch[0]).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
    return loss


@pytest.mark.parametrize("way", [_backward_in_the_step, _kept_graph])
def test_a_second_backward_through_one_graph_says_what_a_step_must_not_do(way: Any) -> None:
    kept: list[Tensor] = []
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, step=lambda model, batch: way(model, batch, kept), device="cpu")
    with pytest.raises(RuntimeError, match="second time") as caught:
        trainer.fit([(torch.ones(2, 3), torch.ones(2, 1))] * 3, epochs=1)
    assert any("a step that calls it itself" in note and "detached" in note for note in caught.value.__notes__)
