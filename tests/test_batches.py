"""A batch moves to the device whatever it is (C16)."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from helpers import line_trainer, ragged
from loopwright.device import map_tensors, move

META = torch.device("meta")
CPU = torch.device("cpu")


def x() -> Tensor:
    return torch.arange(6.0).reshape(2, 3)


class Named(NamedTuple):
    x: Tensor
    name: str
    mask: Tensor | None = None


class Renamed(Named):
    """A named tuple that another class was made of."""


@dataclass
class Plain:
    x: Tensor
    names: list[str]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    names: tuple[str, ...] = ("a", "b")


@dataclass(slots=True)
class Slotted:
    x: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FrozenSlotted:
    x: Tensor
    inner: Plain


@dataclass
class WithInitVar:
    x: Tensor
    scale: InitVar[float]
    scaled: Tensor = field(init=False)

    def __post_init__(self, scale: float) -> None:
        self.scaled = self.x * scale


@dataclass
class OnlyOnce:
    """Its ``__post_init__`` must not run again: it would scale a second time."""

    x: Tensor
    beside: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.x.device == CPU
        self.beside = self.x * 2
        self.total = self.x.sum()  # no field, but a tensor all the same

    @cached_property
    def lengths(self) -> Tensor:
        return (self.x > 0).sum(1)


@dataclass
class Unfinished:
    x: Tensor
    late: Tensor = field(init=False)  # never set


class Words(dict[str, Any]):
    """A dict with something beside its items."""

    language = "none"


class Bag(MutableMapping[str, Any]):
    """Holds its items in an attribute, which a shallow copy would share."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class ReadOnly(Mapping[str, Any]):
    """Made from a mapping."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class ByKeyword(ReadOnly):
    """Cannot be made from a mapping."""

    def __init__(self, *, language: str, **items: Any) -> None:
        super().__init__(items)
        self.language = language


class Mover:
    """Its ``to`` gives a new object."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Mover:
        return Mover(self.x.to(device))


class InPlaceMover(Mover):
    """Its ``to`` changes the object, and returns it."""

    def to(self, device: torch.device) -> Mover:
        self.x = self.x.to(device)
        return self


class SilentMover(Mover):
    """Its ``to`` changes the object, and returns nothing."""

    def to(self, device: torch.device) -> None:  # type: ignore[override]  # that is what is tested
        self.x = self.x.to(device)


class Store:
    """Its ``to`` changes a dict and a list that it holds."""

    def __init__(self, x: Tensor) -> None:
        self.held = {"x": x}
        self.more = [x]

    def to(self, device: torch.device) -> Store:
        for key in self.held:
            self.held[key] = self.held[key].to(device)
        self.more[0] = self.more[0].to(device)
        return self


class Encoding(UserDict[str, Tensor]):
    """As tokenizers give them: a mapping with a ``to`` that changes it in place."""

    def to(self, device: torch.device) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Rows(list[Tensor]):
    pass


def _unfinished() -> Unfinished:
    return Unfinished(x())


def _looked_at() -> OnlyOnce:
    batch = OnlyOnce(x())
    assert len(batch.lengths) == 2  # now it is kept
    return batch


Read = Callable[[Any], list[Tensor]]
CASES: dict[str, tuple[Callable[[], Any], Read]] = {
    "tensor": (x, lambda b: [b]),
    "dict": (lambda: {"x": x(), "id": "a", "n": None, "k": 3}, lambda b: [b["x"]]),
    "list": (lambda: [x(), None, "a", x()], lambda b: [b[0], b[3]]),
    "tuple": (lambda: (x(), None, 1.5), lambda b: [b[0]]),
    "nested": (lambda: {"a": [(x(), {"b": x()})], "c": None}, lambda b: [b["a"][0][0], b["a"][0][1]["b"]]),
    "named tuple": (lambda: Named(x(), "a"), lambda b: [b.x]),
    "named tuple of a subclass": (lambda: Renamed(x(), "a", x()), lambda b: [b.x, b.mask]),
    "list of a class of its own": (lambda: Rows([x(), x()]), list),
    "dataclass": (lambda: Plain(x(), ["a", "b"]), lambda b: [b.x]),
    "frozen dataclass": (lambda: Frozen(x()), lambda b: [b.x]),
    "dataclass with slots": (lambda: Slotted(x()), lambda b: [b.x]),
    "frozen dataclass with slots": (lambda: FrozenSlotted(x(), Plain(x(), [])), lambda b: [b.x, b.inner.x]),
    "dataclass with an InitVar": (lambda: WithInitVar(x(), 2.0), lambda b: [b.x, b.scaled]),
    "dataclass with __post_init__": (lambda: OnlyOnce(x()), lambda b: [b.x, b.beside, b.total]),
    "dataclass with a cached property": (_looked_at, lambda b: [b.x, b.lengths]),
    "dataclass with a field never set": (_unfinished, lambda b: [b.x]),
    "OrderedDict": (lambda: OrderedDict(b=x(), a=x()), lambda b: [b["b"], b["a"]]),
    "defaultdict": (lambda: defaultdict(list, x=[x()]), lambda b: b["x"]),
    "dict of a class of its own": (lambda: Words(x=x()), lambda b: [b["x"]]),
    "UserDict": (lambda: UserDict(x=x()), lambda b: [b["x"]]),
    "mutable mapping": (lambda: Bag(x=x(), name="a"), lambda b: [b["x"]]),
    "read-only mapping": (lambda: ReadOnly({"x": x()}), lambda b: [b["x"]]),
    "read-only mapping with other arguments": (lambda: ByKeyword(language="en", x=x()), lambda b: [b["x"]]),
    "mapping proxy": (lambda: MappingProxyType({"x": x()}), lambda b: [b["x"]]),
    "packed sequence": (lambda: pack_sequence([x(), x()[:1]]), lambda b: [b.data]),
    "object with to": (lambda: Mover(x()), lambda b: [b.x]),
    "object with to in place": (lambda: InPlaceMover(x()), lambda b: [b.x]),
    "object with to that returns nothing": (lambda: SilentMover(x()), lambda b: [b.x]),
    "object with to that changes what it holds": (lambda: Store(x()), lambda b: [b.held["x"], b.more[0]]),
    "mapping with to in place": (lambda: Encoding(x=x()), lambda b: [b["x"]]),
    "objects with to, nested": (lambda: {"a": [InPlaceMover(x())]}, lambda b: [b["a"][0].x]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_moves_whatever_it_is_and_the_input_stays_as_it_was(case: str) -> None:
    make, read = CASES[case]
    batch = make()
    before = read(batch)
    moved = move(batch, META)
    assert type(moved) is type(batch)
    assert [tensor.device for tensor in read(moved)] == [META] * len(before)
    assert [tensor.shape for tensor in read(moved)] == [tensor.shape for tensor in before]
    assert all(now is then for now, then in zip(read(batch), before, strict=True))
    assert {tensor.device for tensor in before} == {CPU}


@pytest.mark.parametrize("case", [case for case in CASES if not {"to", "to,", "packed"} & set(case.split())])
def test_a_batch_that_is_there_already_is_the_very_same_object(case: str) -> None:
    batch = CASES[case][0]()
    assert move(batch, CPU) is batch


@pytest.mark.parametrize("case", [case for case in CASES if "object" not in case and "with to" not in case])
def test_detaching_reaches_every_tensor_of_an_output(case: str) -> None:
    make, read = CASES[case]
    batch = make()
    for tensor in read(batch):
        if tensor.is_floating_point() and tensor.is_leaf:
            tensor.requires_grad_()
    detached = map_tensors(Tensor.detach, batch)
    assert type(detached) is type(batch)
    assert not any(tensor.requires_grad for tensor in read(detached))
    assert any(tensor.requires_grad for tensor in read(batch))


def test_what_is_no_tensor_is_kept() -> None:
    moved = move({"id": "a", "n": None, "k": 3, "b": b"x", "kind": Tensor, "set": {1}}, META)
    assert moved == {"id": "a", "n": None, "k": 3, "b": b"x", "kind": Tensor, "set": {1}}
    assert move(Named(x(), "a"), META)[1:] == ("a", None)
    assert move(Plain(x(), ["a"]), META).names == ["a"]
    assert move(Frozen(x()), META).names == ("a", "b")


def test_a_moved_dict_keeps_its_order_and_what_its_class_adds() -> None:
    assert list(move(OrderedDict(b=x(), a=x()), META)) == ["b", "a"]
    assert move(defaultdict(list, x=[x()]), META)["new"] == []
    words = Words(x=x())
    words.language = "en"
    assert move(words, META).language == "en"
    assert move(ByKeyword(language="en", x=x()), META).language == "en"


def test_a_moved_packed_sequence_keeps_its_order_and_its_lengths_on_the_cpu() -> None:
    packed = pack_sequence([x()[:1], x()], enforce_sorted=False)
    moved = move(packed, META)
    assert isinstance(moved, PackedSequence)
    assert moved.batch_sizes.tolist() == [2, 1]  # torch wants them on the CPU
    assert moved.sorted_indices is not None
    assert moved.sorted_indices.device == META


def test_a_step_gets_the_batch_that_the_loader_gave() -> None:
    batches = [Plain(inputs, ["a"] * len(inputs)) for inputs, _ in ragged(2, 3)]
    seen: list[Plain] = []

    def step(model: nn.Module, batch: Plain) -> Tensor:
        seen.append(batch)
        loss: Tensor = model(batch.x).square().mean()
        return loss

    result = line_trainer(step=step).fit(batches, epochs=1)
    assert [id(batch) for batch in seen] == [id(batch) for batch in batches]
    assert result.progress.samples == 5
