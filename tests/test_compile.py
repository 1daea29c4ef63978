"""``compile=True``: the user's module, in place, while it is fitted, and not a moment longer (P7)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from helpers import At, line_trainer, ragged
from loopwright import State


class Compilable(nn.Module):
    """Counts the calls of ``compile``, which takes a moment and a compiler, and puts the plain call in its place."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
        self.compiled = 0
        self.through = 0

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layers(inputs)
        return out

    def compile(self, *args: Any, **kwargs: Any) -> None:
        assert not args
        assert not kwargs
        self.compiled += 1

        def call(*args: Any, **kwargs: Any) -> Any:
            self.through += 1
            return self._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no annotation there

        self._compiled_call_impl = call


def test_the_model_is_compiled_once_for_training_and_validation_and_undone_after_fit() -> None:
    model = Compilable()
    names = list(model.state_dict())
    seen: list[bool] = []

    def note(state: State, *_: object) -> None:
        assert state.model is model
        assert type(model) is Compilable
        assert list(model.state_dict()) == names
        seen.append(model._compiled_call_impl is not None)

    at = At(on_fit_start=note, on_batch_end=note, on_eval_batch_end=note, on_fit_end=note)
    line_trainer(model, compile=True, callbacks=[at]).fit(ragged(4, 4), ragged(4), epochs=2)
    assert seen == [True] * 8
    assert model.compiled == 1
    assert model.through == 6
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == names
    model(torch.zeros(2, 3))
    assert model.through == 6


def test_it_is_undone_after_an_error_too() -> None:
    def fail(state: State) -> None:
        raise KeyboardInterrupt

    model = Compilable()
    with pytest.raises(KeyboardInterrupt):
        line_trainer(model, compile=True, callbacks=[At(on_step_end=fail)]).fit(ragged(4), epochs=1)
    assert model._compiled_call_impl is None


def test_a_second_fit_compiles_again_and_trains_on_as_without() -> None:
    model, twin = Compilable(), Compilable()
    trainer, plain = line_trainer(model, compile=True), line_trainer(twin)
    for epochs in (1, 3):
        result = trainer.fit(ragged(4, 4), ragged(4), epochs=epochs)
        assert result == plain.fit(ragged(4, 4), ragged(4), epochs=epochs)
    assert model.compiled == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_the_user_has_compiled_stays_compiled() -> None:
    model = Compilable()
    model.compile()
    mine = model._compiled_call_impl
    line_trainer(model, compile=True).fit(ragged(4), epochs=1)
    assert model.compiled == 1
    assert model._compiled_call_impl is mine
    line_trainer(model).fit(ragged(4), epochs=1)
    assert model._compiled_call_impl is mine


def test_by_default_and_in_other_calls_nothing_is_compiled() -> None:
    model = Compilable()
    line_trainer(model).fit(ragged(4), epochs=1)
    trainer = line_trainer(model, compile=True)
    trainer.evaluate(ragged(4))
    trainer.predict(ragged(4))
    assert model.compiled == 0


def test_a_compiled_model_can_be_copied_after_fit() -> None:
    model = Compilable()
    line_trainer(model, compile=True).fit(ragged(4), epochs=1)
    copy.deepcopy(model)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = in_sequence()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layers(inputs)
        return out


def in_sequence() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", [Plain, in_sequence], ids=["a class of one's own", "nn.Sequential"])
def test_torch_makes_one_graph_for_training_and_one_for_evaluation(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = CompileCounter()  # takes the graphs, and makes no machine code
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    model, twin = make(), make()
    line_trainer(model, compile=True).fit(ragged(4, 4, 4), ragged(4, 4), epochs=3)
    assert graphs.frame_count == 2
    line_trainer(twin).fit(ragged(4, 4, 4), ragged(4, 4), epochs=3)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# What torch imports for it still uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_a_model_in_machine_code_learns_what_the_plain_one_learns() -> None:
    compiled, plain = (
        line_trainer(Plain(), compile=compile_).fit(ragged(4, 4), epochs=2).history for compile_ in (True, False)
    )
    for row, expected in zip(compiled, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
