"""Modes and gradient mode around passes that train nothing (C9, C10)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn

from helpers import At, PassError, Samples, line, line_trainer, ragged, raising_after, small_model, some_batches
from loopwright import Every, Output, State, Trainer


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Stubborn(nn.Module):
    """Its ``train`` keeps a part in eval mode, counts its calls, and says what mode it is in elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 1))
        self.mode = "training"
        self.train()

    def train(self, mode: bool = True) -> Stubborn:
        super().train(mode)
        self.backbone.eval()
        self.mode = "training" if mode else "evaluation"
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.mode == ("training" if self.training else "evaluation")
        out: Tensor = self.head(self.backbone(inputs))
        return out


def mixed() -> nn.Module:
    """A root in training mode, with parts in both modes at every depth."""
    middle = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.5)))
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 1))
    middle.eval()
    middle[1].train()
    return model


def shared() -> nn.Module:
    """One module at two places."""
    norm = nn.BatchNorm1d(3)
    norm.eval()
    return nn.Sequential(norm, nn.Linear(3, 3), norm, nn.Linear(3, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixed": mixed,
    "frozen batch norm": small_model,
    "overridden train": Stubborn,
    "shared": shared,
}


def _fail(*_: object) -> None:
    raise PassError


@pytest.mark.parametrize("root", [True, False], ids=["root in training mode", "root in eval mode"])
@pytest.mark.parametrize("kind", MODELS)
def test_evaluate_and_predict_put_back_the_mode_of_every_submodule(kind: str, root: bool) -> None:
    model = MODELS[kind]()
    model.training = root
    seen: list[list[bool]] = []
    before = flags(model)
    trainer = line_trainer(model, callbacks=[At(on_eval_batch_end=lambda state, output: seen.append(flags(model)))])
    trainer.evaluate(ragged(4, 3))
    assert flags(model) == before
    trainer.predict(ragged(4, 3), forward=lambda model, batch: seen.append(flags(model)))
    assert flags(model) == before
    assert len(seen) == 4
    assert not any(flag for pass_ in seen for flag in pass_)


@pytest.mark.parametrize("kind", MODELS)
def test_modes_are_put_back_after_a_pass_that_raises(kind: str) -> None:
    model = MODELS[kind]()
    before = flags(model)
    trainer = line_trainer(model)
    with pytest.raises(PassError):
        trainer.evaluate(raising_after(ragged(4)))
    assert flags(model) == before
    with pytest.raises(PassError):
        trainer.predict(raising_after(ragged(4)))
    assert flags(model) == before
    with pytest.raises(PassError):
        trainer.fit(ragged(4), raising_after(ragged(4)), epochs=1)
    assert flags(model) == before
    for hook in ("on_eval_start", "on_eval_batch_end", "on_eval_end"):
        with pytest.raises(PassError):
            line_trainer(model, callbacks=[At(**{hook: _fail})]).fit(ragged(4), ragged(4), epochs=1)
        assert flags(model) == before


@pytest.mark.parametrize("kind", MODELS)
def test_training_keeps_the_modes_that_the_user_set(kind: str) -> None:
    model = MODELS[kind]()
    before = flags(model)
    seen: list[list[bool]] = []
    at = At(on_step_end=lambda state: seen.append(flags(model)))
    line_trainer(model, callbacks=[at]).fit(ragged(4, 4), ragged(4), epochs=2, validate=Every(steps=1))
    assert seen == [before] * 4
    assert flags(model) == before


def test_a_frozen_batch_norm_keeps_its_statistics_and_a_free_one_moves_in_training_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    frozen, free = model[0], model[1]
    assert isinstance(frozen, nn.BatchNorm1d)
    assert isinstance(free, nn.BatchNorm1d)
    frozen.eval()
    trainer = line_trainer(model)
    trainer.fit(ragged(4, 4), ragged(4), epochs=2)
    assert frozen.num_batches_tracked == 0
    assert frozen.running_mean is not None
    assert torch.equal(frozen.running_mean, torch.zeros(3))
    assert free.num_batches_tracked == 4
    trainer.evaluate(ragged(4))
    trainer.predict(ragged(4))
    assert free.num_batches_tracked == 4


def test_a_step_sees_that_the_model_is_training_in_training_alone() -> None:
    seen: list[tuple[str, bool]] = []

    def step(model: nn.Module, batch: Samples) -> Output:
        seen.append((trainer.state.stage, model.training))
        predictions = model(batch[0])
        return Output(F.mse_loss(predictions, batch[1]), predictions=predictions)

    model = small_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, device="cpu")
    data = some_batches()
    trainer.fit(data, data, epochs=2)
    trainer.evaluate(data)
    trainer.predict(data)
    assert set(seen) == {("train", True), ("val", False), ("test", False), ("predict", False)}


def test_a_model_in_eval_mode_is_put_in_training_mode_once_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="loopwright")
    model = mixed().eval()
    line_trainer(model).fit(ragged(4), ragged(4), epochs=3)
    assert all(flags(model))
    assert [record.getMessage() for record in caplog.records if "eval mode" in record.getMessage()] == [
        "the model was in eval mode; it has been put in training mode, with all of its submodules"
    ]


# C10: the mode of gradients.


@pytest.mark.parametrize("outer", [True, False], ids=["gradients on", "gradients off"])
def test_the_mode_of_gradients_is_what_it_was_whatever_happens(outer: bool) -> None:
    calls: list[Callable[[Trainer], object]] = [
        lambda trainer: trainer.fit(ragged(2), ragged(2), epochs=1),
        lambda trainer: trainer.evaluate(ragged(2)),
        lambda trainer: trainer.predict(ragged(2)),
    ]
    failing: list[Callable[[Trainer], object]] = [
        lambda trainer: trainer.fit(raising_after(ragged(2)), epochs=5),
        lambda trainer: trainer.fit(ragged(2), raising_after(ragged(2)), epochs=5),
        lambda trainer: trainer.evaluate(raising_after(ragged(2))),
        lambda trainer: trainer.predict(raising_after(ragged(2))),
    ]
    with torch.set_grad_enabled(outer):
        for call in calls:
            call(line_trainer())
            assert torch.is_grad_enabled() == outer
        for call in failing:
            with pytest.raises(PassError):
                call(line_trainer())
            assert torch.is_grad_enabled() == outer


def test_a_fit_under_no_grad_trains() -> None:
    model, twin = line(), line()
    line_trainer(twin).fit(ragged(2, 2), epochs=1)
    with torch.no_grad():
        line_trainer(model).fit(ragged(2, 2), epochs=1)
    assert torch.equal(model.weight, twin.weight)


def test_a_step_may_enable_gradients_in_validation_and_none_of_it_leaks() -> None:
    slopes: list[Tensor] = []

    def step(model: nn.Module, batch: Samples) -> Output:
        """A penalty on the gradient by the inputs, which needs gradients in validation too."""
        torch.set_grad_enabled(True)  # on purpose: it is never switched back
        inputs = batch[0].clone().requires_grad_()
        out = model(inputs)
        (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=model.training)
        slopes.append(slope.detach())
        return Output(F.mse_loss(out, batch[1]) + slope.square().mean(), predictions=out)

    seen: list[tuple[str, bool]] = []
    at = At(
        on_eval_end=lambda state: seen.append(("after", True)),
        on_epoch_end=lambda state: seen.append(("epoch", torch.is_grad_enabled())),
        on_eval_batch_end=lambda state, output: seen.append(("output", output.loss.requires_grad)),
    )
    trainer = line_trainer(step=step, callbacks=[at])
    trainer.fit(ragged(2), ragged(2), epochs=1)
    assert seen == [("output", False), ("after", True), ("epoch", True)]
    assert len(slopes) == 2
    with torch.no_grad():
        trainer.evaluate(ragged(2))
        outputs = trainer.predict(ragged(2))
        assert not torch.is_grad_enabled()
    assert not outputs[0].requires_grad


def test_validation_makes_no_gradients_and_no_inference_tensors() -> None:
    kept: list[Tensor] = []
    at = At(on_eval_batch_end=lambda state, output: kept.append(output.predictions))
    model = line()
    trainer = line_trainer(model, callbacks=[at])
    trainer.evaluate(ragged(2))
    assert not kept[0].requires_grad
    assert not kept[0].is_inference()
    assert all(parameter.grad is None for parameter in model.parameters())
    (kept[0] * model.weight.sum()).sum().backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
    assert model.weight.grad is not None


def test_validation_leaves_the_gradients_of_training_alone() -> None:
    model = line()
    seen: list[Tensor] = []

    def note(state: State) -> None:
        assert model.weight.grad is not None
        seen.append(model.weight.grad.clone())

    at = At(on_eval_start=note, on_eval_end=note)
    line_trainer(model, callbacks=[at]).fit(ragged(2, 2), ragged(2), epochs=1)
    assert torch.equal(seen[0], seen[1])
