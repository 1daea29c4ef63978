"""What a save writes, byte for byte, and what it costs the loop: one copy, into memory that is there already."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import loopwright.saver
from helpers import At, small_trainer, some_batches
from loopwright import Every, State
from loopwright.callbacks import Checkpoint
from loopwright.checkpoint.format import MODEL, STATE_TENSORS
from loopwright.checkpoint.reading import read_checkpoint
from loopwright.checkpoint.writing import Snapshot, write_checkpoint
from loopwright.plain import _HELD
from loopwright.saver import Saver

FACTS = {"step": 1, "score": None, "mode": None}


def written(folder: Path, weights: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, Snapshot(FACTS, weights, {}, {}))


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def test_the_bytes_are_those_that_safetensors_makes_of_every_type_and_shape(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 5), (1, 1, 7), (2, 0, 3)]
    weights = {f"{dtype}.{shape}": some(dtype, *shape) for dtype in _HELD for shape in shapes}
    path = written(tmp_path, weights)

    assert len(_HELD) == 15
    assert (path / MODEL).read_bytes() == safetensors.torch.save(weights)
    assert (path / STATE_TENSORS).read_bytes() == safetensors.torch.save({})
    found = safetensors.torch.load_file(path / MODEL)
    assert found.keys() == weights.keys()
    assert all(found[name].dtype is tensor.dtype for name, tensor in weights.items())
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in weights.items())


def test_the_bytes_are_those_that_safetensors_makes_of_strange_names(tmp_path: Path) -> None:
    plain, odd = ("", " ", "Z", "a", "a.b", "a/b"), ('a"b', "a\\b", "\x00", "\x1f\n\t", "\x7f")
    names = (*plain, *odd, "\u00e9", "\u2028", "\uffff", "\U0001f600")
    weights = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    assert (written(tmp_path, weights) / MODEL).read_bytes() == safetensors.torch.save(weights)


def test_the_bytes_are_those_that_safetensors_makes_of_large_tensors_among_small_ones(tmp_path: Path) -> None:
    sizes = [1, 2**18, 3, 2**18 + 1, 2**17, 2**17, 5, 7, 2**19, 2**18 - 1, 0, 2]
    weights = {f"{number:02}": torch.randn(size) for number, size in enumerate(sizes)}
    path = written(tmp_path, weights)
    assert (path / MODEL).read_bytes() == safetensors.torch.save(weights)
    assert read_checkpoint(path).weights.keys() == weights.keys()  # so the hash is that of these bytes


def test_a_thousand_small_tensors_are_a_few_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = os.write

    def noting(descriptor: int, data: memoryview) -> int:
        sizes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", noting)
    path = written(tmp_path, {f"bias.{number}": torch.ones(1000) for number in range(1000)})
    assert len(sizes) < 12
    assert sum(sizes) == sum(file.stat().st_size for file in path.iterdir())


def test_elements_are_turned_round_where_the_machine_has_them_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopwright.checkpoint.tensors.sys", SimpleNamespace(byteorder="big"))
    weights = {"a": torch.tensor([1, 2]), "b": torch.tensor([[1], [2]], dtype=torch.int16), "c": torch.tensor(True)}
    data = (written(tmp_path, weights) / MODEL).read_bytes()
    assert data[8 + int.from_bytes(data[:8], "little") :].hex() == "000000000000000100000000000000020001000201"


def snapshot(weight: Tensor, **state: Tensor) -> Snapshot:
    return Snapshot(FACTS, {"weight": weight}, {}, state)


@pytest.fixture
def saver(tmp_path: Path) -> Any:
    saver = Saver(tmp_path / "checkpoints", keep=10)
    yield saver
    saver.close()


def saved(saver: Saver) -> list[dict[str, Any]]:
    """What is in each checkpoint, as lists."""
    saver.wait()
    paths = sorted(saver.folder.glob("step-*"), key=lambda path: (len(path.name), path.name))
    return [
        {
            **{name: tensor.tolist() for name, tensor in read_checkpoint(path).weights.items()},
            **{name: tensor.tolist() for name, tensor in safetensors.torch.load_file(path / STATE_TENSORS).items()},
        }
        for path in paths
    ]


@pytest.mark.parametrize("small", [2**17, -1], ids=["small", "large"])
def test_what_changes_once_save_has_returned_is_not_in_the_checkpoint(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(loopwright.saver, "_SMALL", small)
    weight = torch.zeros(3)
    for value in (1.0, 2.0, 3.0):
        weight.fill_(value)
        saver.save(snapshot(weight, momentum=-weight))
        weight.fill_(9.0)
    assert saved(saver) == [{"weight": [value] * 3, "momentum": [-value] * 3} for value in (1.0, 2.0, 3.0)]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all states be as large ones."""
    monkeypatch.setattr(loopwright.saver, "_SMALL", -1)


@pytest.mark.usefixtures("large")
def test_a_save_copies_into_the_memory_of_the_one_before(saver: Saver) -> None:
    places = []
    for _ in range(3):
        saver.save(snapshot(torch.ones(3), momentum=torch.ones(2)))
        copies = saver._copies
        places.append((copies.weights["weight"].data_ptr(), copies.tensors["momentum"].data_ptr()))
    assert len(set(places)) == 1


@pytest.mark.parametrize("small", [2**17, -1], ids=["small", "large"])
def test_tensors_of_another_shape_or_type_are_copied_as_they_are(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(loopwright.saver, "_SMALL", small)
    tensors = [
        torch.tensor([1.5, 2.5]),
        torch.tensor([1.5]),
        torch.tensor([[1.5, 2.5]]),
        torch.tensor([1, 2]),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(1).expand(2),
        torch.tensor(7.0),
    ]
    for number, tensor in enumerate(tensors):
        saver.save(snapshot(tensor, **({"new": tensor} if number == 3 else {})))
    assert [found["weight"] for found in saved(saver)] == [tensor.tolist() for tensor in tensors]
    assert ["new" in found for found in saved(saver)] == [number == 3 for number in range(len(tensors))]


@pytest.mark.parametrize("small", [2**17, -1], ids=["small", "large"])
def test_a_save_waits_for_the_one_before(saver: Saver, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(loopwright.saver, "_SMALL", small)
    for value in (1.0, 2.0, 3.0):
        saver.save(snapshot(torch.full((3,), value)))
        assert saver._pending == 1
    assert [found["weight"][0] for found in saved(saver)] == [1.0, 2.0, 3.0]


@pytest.mark.usefixtures("large")
def test_room_is_made_for_the_first_save_after_the_first_step(tmp_path: Path) -> None:
    seen: list[tuple[bool, dict[str, int]]] = []

    def look(state: State[Any], batch: object) -> None:
        (saver,) = trainer._saving._savers
        saver.wait()
        copies = {**saver._copies.weights, **saver._copies.tensors}
        seen.append((saver.has_room, {name: copy.data_ptr() for name, copy in copies.items()}))

    checkpoint = Checkpoint(tmp_path, every=Every(steps=3))
    trainer = small_trainer(
        checkpoint,
        At(on_batch_start=look),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    )
    trainer.fit(some_batches(4), epochs=1)

    names = {*trainer.state.model.state_dict()}
    names |= {f"optimizer.state.{number}.momentum_buffer" for number, _ in enumerate(trainer.state.model.parameters())}
    (before, nothing), (after, room), _, (_, used) = seen
    assert (before, nothing) == (False, {})
    assert after
    assert room.keys() == names
    assert {name: used[name] for name in names} == room, "the save after step 3 has taken it"
    assert not list(tmp_path.glob("step-000000001*")), "room is no checkpoint"


@pytest.mark.usefixtures("large")
def test_a_save_does_without_room_that_the_system_does_not_give(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensors: object) -> dict[str, Tensor]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loopwright.saver, "_zeros", refuse)
    saver.make_room({"weight": torch.ones(3)}, dict)
    saver.save(snapshot(torch.ones(3)))
    assert saved(saver) == [{"weight": [1.0] * 3}]
