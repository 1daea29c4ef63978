"""A constructor says what was meant by an argument that it does not have, and takes all others as it always did."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from helpers import library_frames, line, line_trainer, ragged
from loopwright import Callback, Every, Schedule, Trainer
from loopwright.callbacks import Checkpoint, EarlyStopping
from loopwright.data import Loader


class Mine(Callback):
    """A callback with arguments of its own."""

    def __init__(self, first: int = 1, /, threshold: float = 0.5, *, quiet: bool = False) -> None:
        self.values = first, threshold, quiet


class Silent(Callback):
    """A callback without a constructor."""


class Anything(Callback):
    """A callback that takes every name."""

    def __init__(self, **names: Any) -> None:
        self.names = names


@dataclass
class Described(Callback):
    """A callback that is a dataclass."""

    every: int = 5


class Particular:
    """A class that is made in a way of its own."""

    def __new__(cls, size: int) -> Particular:
        made = super().__new__(cls)
        made.__dict__["size"] = size
        return made


class Both(Callback, Particular, abc.ABC):
    """A callback that is such a class as well."""

    def __init__(self, size: int) -> None:
        pass


CALLS: dict[str, tuple[type, dict[str, object], str]] = {
    "the trainer": (Trainer, {"acumulate": 2}, "Trainer has no argument 'acumulate'; did you mean 'accumulate'?"),
    "another library's": (Trainer, {"gradient_clip_val": 1.0}, "; did you mean 'clip_norm'?"),
    "fit's": (Trainer, {"epochs": 2}, "Trainer has no argument 'epochs'; it is one of fit's\n"),
    "fit's, elsewhere": (
        Trainer,
        {"max_epochs": 2},
        "argument 'max_epochs'; it is one of fit's, 'epochs'\n",
    ),
    "the optimizer's": (Trainer, {"lr": 0.1}, "; it is one of the optimizer's"),
    "a callback": (EarlyStopping, {"patiance": 2}, "; did you mean 'patience'?"),
    "a callback's, elsewhere": (Checkpoint, {"save_top_k": 2}, "; did you mean 'keep'?"),
    "one's own callback": (Mine, {"treshold": 0.1}, "; did you mean 'threshold'?"),
    "a dataclass": (Described, {"evry": 2}, "; did you mean 'every'?"),
    "a cadence": (Every, {"step": 2}, "; did you mean 'steps'?"),
    "a schedule": (Schedule, {"when": "step"}, "Schedule has no argument 'when'\n"),
    "a loader": (Loader, {"num_workers": 2}, "; did you mean 'workers'?"),
    "nothing near": (Mine, {"zzz": 1}, "Mine has no argument 'zzz'\n  its arguments are: threshold, quiet"),
    "no arguments at all": (Silent, {"zzz": 1}, "Silent() takes no arguments"),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_what_was_meant_by_an_argument_that_there_is_none_of(name: str) -> None:
    cls, given, expected = CALLS[name]
    with pytest.raises(TypeError) as caught:
        cls(**given)
    assert expected in str(caught.value)


def test_an_argument_that_is_there_counts_for_what_it_always_did() -> None:
    assert Mine(3, threshold=0.1, quiet=True).values == (3, 0.1, True)
    assert Anything(whatever=1).names == {"whatever": 1}
    assert Described(every=2).every == 2
    assert Both(4).__dict__["size"] == 4
    assert Every(steps=3) == Every(steps=3)


def test_a_position_too_many_is_refused_as_python_refuses_it() -> None:
    with pytest.raises(TypeError, match=r"Silent\(\) takes no arguments"):
        Silent(3)  # type: ignore[call-arg]  # that is the mistake
    with pytest.raises(TypeError, match="positional argument"):
        Mine(1, 2, True)  # type: ignore[call-arg]  # that is the mistake


def test_what_a_constructor_raises_itself_has_no_frame_of_the_check() -> None:
    class Fails(Callback):
        def __init__(self, *, size: int) -> None:
            raise ValueError(size)

    with pytest.raises(ValueError, match="3") as caught:
        Fails(size=3)
    assert library_frames(caught.value) == []


class Named(Trainer):
    """A trainer with nothing of its own."""


@pytest.mark.parametrize("cls", [Trainer, Named, EarlyStopping, Silent, Mine, Described, Every, Callback])
def test_help_shows_the_arguments_of_the_constructor(cls: type[Any]) -> None:
    constructor = inspect.signature(cls.__init__) if cls.__init__ is not object.__init__ else None
    expected = list(constructor.parameters.values())[1:] if constructor else []
    assert list(inspect.signature(cls).parameters.values()) == expected


class Made(Callback):
    """A callback whose arguments are those of ``__new__``."""

    def __new__(cls, size: int, *, quiet: bool = False) -> Made:
        return super().__new__(cls)


class MadeSo(Made):
    """One more of them."""


class MadeElsewhere(Callback, Particular):
    """A callback that another class makes."""


class MadeOfAnything(Made):
    """A callback whose own constructor comes before."""

    def __new__(*names: Any, **more: Any) -> Any:
        return Callback.__new__(*names[:1])


class Begun(Made):
    """A callback with both: the arguments are named in the constructor."""

    def __new__(cls, *names: Any, **more: Any) -> Any:
        return super().__new__(cls, 1)

    def __init__(self, rate: float) -> None:
        self.rate = rate


@pytest.mark.parametrize(
    ("cls", "shown"),
    [
        (Made, "(size: 'int', *, quiet: 'bool' = False)"),
        (MadeSo, "(size: 'int', *, quiet: 'bool' = False)"),
        (MadeElsewhere, "(size: 'int')"),
        (MadeOfAnything, "(*names: 'Any', **more: 'Any')"),
        (Begun, "(rate: 'float')"),
        (Both, "(size: 'int')"),
    ],
)
def test_help_shows_what_a_class_is_made_with_where_it_has_no_constructor_of_its_own(cls: type, shown: str) -> None:
    assert str(inspect.signature(cls)).partition(" ->")[0] == shown
    if cls is not MadeOfAnything:
        inspect.signature(cls).bind(4)
        cls(4)


class Warm(Callback):
    """A callback with rates of its own, that can be called."""

    def __init__(self, lrs: tuple[float, ...] = ()) -> None:
        self.lrs = lrs

    def __call__(self, model: nn.Module, batch: Any) -> None: ...


def test_a_setting_of_the_optimizer_is_one_only_to_what_has_an_optimizer() -> None:
    with pytest.raises(TypeError, match="Warm has no argument 'lr'; did you mean 'lrs'"):
        Warm(lr=3)  # type: ignore[call-arg]  # that is the mistake


def test_the_signature_of_a_callback_that_can_be_called_is_that_of_the_call() -> None:
    assert list(inspect.signature(Warm()).parameters) == ["model", "batch"]


def test_trainers_and_callbacks_are_copied_and_pickled_as_before() -> None:
    stopping = pickle.loads(pickle.dumps(EarlyStopping("val/loss", mode="min", patience=7)))
    assert stopping.patience == 7
    assert pickle.loads(pickle.dumps(Every(steps=3))) == Every(steps=3)
    model = line()
    trainer = copy.deepcopy(line_trainer(model))
    trainer.fit(ragged(3, 3), epochs=1)
    assert torch.equal(model.weight, line().weight)
    assert isinstance(trainer.state.model, nn.Linear)
