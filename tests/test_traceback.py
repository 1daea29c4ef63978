"""A2: from an error in the user's step to the user's call, at most four frames are the library's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import Unsized, library_frames, sgd, small_trainer, some_batches
from loopwright import Callback, Every, Output, State, Trainer

FEW = 4


class PlantedError(Exception):
    pass


class BreaksAt(nn.Module):
    """A model that raises in its n-th forward pass in training or in evaluation mode."""

    def __init__(self, *, training: bool, number: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.mode, self.left = training, number

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training == self.mode:
            self.left -= 1
            if self.left == 0:
                raise PlantedError
        out: Tensor = self.linear(inputs)
        return out


def my_step(model: nn.Module, batch: Any) -> Output:
    predictions = model(batch[0])
    return Output((predictions - batch[1]).square().mean(), predictions=predictions)


class Everything(Callback):
    """Overrides what the loop calls around a step, as real callbacks do."""

    def on_batch_start(self, state: State, batch: Any) -> None: ...
    def on_backward_end(self, state: State, output: Output) -> None: ...
    def on_batch_end(self, state: State, output: Output) -> None: ...
    def on_eval_batch_end(self, state: State, output: Output) -> None: ...


def lbfgs(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=3)


Call = Callable[[Trainer], object]
PLACES: dict[str, tuple[Call, bool, int, dict[str, Any]]] = {}


def place(name: str, call: Call, *, training: bool = True, number: int = 1, **settings: Any) -> None:
    PLACES[name] = (call, training, number, settings)


two, five = some_batches(2), some_batches(5)
place("training", lambda t: t.fit(two, epochs=1))
place("a later epoch", lambda t: t.fit(two, epochs=2), number=4)
place("the middle of a window", lambda t: t.fit(five, epochs=1), number=2, accumulate=3)
place("the end of a window", lambda t: t.fit(five, epochs=1), number=3, accumulate=3)
place("the last, short window", lambda t: t.fit(five, epochs=1), number=5, accumulate=3)
place("a window of unknown length", lambda t: t.fit(Unsized(five), epochs=1), number=5, accumulate=3)
place("training under bf16 with clipping", lambda t: t.fit(two, epochs=1), precision="bf16", clip_norm=1.0)
place("training under fp16", lambda t: t.fit(two, epochs=1), precision="fp16")
place("training under skip", lambda t: t.fit(two, epochs=1), on_nonfinite="skip")
place("training with deterministic kernels", lambda t: t.fit(two, epochs=1), deterministic=True)
place("the validation of an epoch", lambda t: t.fit(two, two, epochs=1), training=False)
place("a validation by steps", lambda t: t.fit(five, two, epochs=1, validate=Every(steps=2)), training=False)
place(
    "a validation after the last, short window of unknown length",
    lambda t: t.fit(Unsized(two), two, epochs=1, validate=Every(steps=1)),
    training=False,
    accumulate=3,
)
place("evaluate", lambda t: t.evaluate(two), training=False)
place("predict", lambda t: t.predict(two), training=False)
place("LBFGS's first evaluation", lambda t: t.fit(two, epochs=1), optimizer=lbfgs)
place("LBFGS's second evaluation", lambda t: t.fit(two, epochs=1), number=2, optimizer=lbfgs)


def raised_in(name: str, **how: Any) -> BaseException:
    call, training, number, settings = PLACES[name]
    model = BreaksAt(training=training, number=number)
    trainer = small_trainer(Everything(), Everything(), model=model, **{"optimizer": sgd, **settings, **how})
    with pytest.raises(PlantedError) as caught:
        call(trainer)
    return caught.value


@pytest.mark.parametrize("name", PLACES)
def test_a_traceback_from_the_users_step_shows_at_most_four_frames_of_the_library(name: str) -> None:
    error = raised_in(name, step=my_step)
    frames = library_frames(error)
    assert 1 <= len(frames) <= FEW, frames
    assert error.__context__ is None  # no second traceback above it
    assert traceback.extract_tb(error.__traceback__)[-1].name == "forward"


@pytest.mark.parametrize("name", [name for name in PLACES if "LBFGS" not in name])
def test_a_traceback_from_the_model_shows_as_few_where_the_trainer_was_given_a_loss(name: str) -> None:
    frames = library_frames(raised_in(name))
    assert 1 <= len(frames) <= FEW, frames


def test_a_validation_that_failed_is_gone_on_with_in_as_few_frames() -> None:
    calls = iter([False, True, True])

    def step(model: nn.Module, batch: Any) -> Tensor:
        if not model.training and next(calls):
            raise PlantedError
        loss: Tensor = model(batch[0]).mean()
        return loss

    trainer = small_trainer(step=step)
    for _ in range(2):
        with pytest.raises(PlantedError) as caught:
            trainer.fit(five, two, steps=4, validate=Every(steps=2))
        assert len(library_frames(caught.value)) <= FEW


def test_the_frames_are_of_one_file() -> None:
    for name in PLACES:
        error = raised_in(name, step=my_step)
        ours = library_frames(error)
        files = {Path(f.filename).name for f in traceback.extract_tb(error.__traceback__) if f.name in ours}
        assert files == {"trainer.py"}, name
