"""What a preflight puts back around a step, and whose parameters it says that other inputs may reach."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Preflight, Trainer
from loopwright.checks.recorder import fingerprint

QUEUE = torch.zeros(8, 4)
PLACE = [0]
CALLS = 0
NOT_YET: Any = None


def of_globals(model: nn.Module, batch: Any) -> Tensor:
    global CALLS, NOT_YET
    CALLS += 1
    NOT_YET = NOT_YET or {"made": "at the first call"}
    out: Tensor = model(batch[0])
    with torch.no_grad():
        QUEUE[torch.arange(PLACE[0], PLACE[0] + len(out)) % 8] = out
        PLACE[0] = (PLACE[0] + len(out)) % 8
    return F.mse_loss(out, batch[1])


def in_globals() -> tuple[Any, Callable[[], Any]]:
    return of_globals, lambda: (QUEUE.clone(), list(PLACE), CALLS, NOT_YET)


def in_a_closure() -> tuple[Any, Callable[[], Any]]:
    mean, temperature = torch.zeros(4), torch.ones((), requires_grad=True)
    losses, seen, recent, counts = [1.0], {3}, collections.deque([1], 4), {"calls": 0}
    calls, late = 0, None

    def step(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls, late
        calls, late = calls + 1, "assigned"
        out: Tensor = model(batch[0])
        mean.mul_(0.9).add_(0.1 * out.detach().mean(0))
        loss = F.mse_loss(out, batch[1]) * temperature
        losses.append(float(loss))
        losses[0] = 2.0
        seen.add(calls)
        recent.append(calls)
        counts["calls"] = calls
        counts[f"call {calls}"] = 1
        return loss

    def state() -> Any:
        return mean.clone(), temperature.grad, list(losses), set(seen), list(recent), list(counts.items()), calls, late

    return step, state


class Centres:
    """A step that cannot be copied, with attributes of its own."""

    def __init__(self) -> None:
        self.centres, self.calls, self.losses, self.lock = torch.zeros(4), 0, [0.5], threading.Lock()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])
        self.calls += 1
        self.centres.add_(out.detach().mean(0))
        loss = (out - self.centres).square().mean()
        self.losses.append(loss.item())
        return loss

    def state(self) -> Any:
        return self.centres.clone(), self.calls, list(self.losses)


def in_an_object() -> tuple[Any, Callable[[], Any]]:
    centres = Centres()
    return centres, centres.state


def in_a_partial() -> tuple[Any, Callable[[], Any]]:
    mean, losses, array = torch.zeros(4), [0.0], np.zeros(3)

    def step(model: nn.Module, batch: Any, *, mean: Tensor, losses: list[float]) -> Tensor:
        out: Tensor = model(batch[0])
        array[1] += 1
        mean.copy_(out.detach().mean(0))
        losses.append(1.0)
        return F.mse_loss(out, batch[1])

    return functools.partial(step, mean=mean, losses=losses), lambda: (mean.clone(), list(losses), array.tolist())


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def data(outputs: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, generator=generator), torch.randn(24, outputs, generator=generator)
    return DataLoader(TensorDataset(x, y), 4)


def preflight_of(model: nn.Module, loss: Any = None, **settings: Any) -> Preflight:
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, device="cpu", **settings)
    return trainer.preflight(data(settings.pop("outputs", 4)), data(4))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("around", [in_globals, in_a_closure, in_an_object, in_a_partial])
def test_variables_lists_and_plain_tensors_of_a_step_are_put_back(around: Any) -> None:
    step, state = around()
    before = state()
    report = preflight_of(linear(), step=step)
    assert report["a training step runs"].verdict == "passed", report
    assert same(state(), before)
    step(linear(), next(iter(data())))
    assert not same(state(), before)  # else the step would change nothing


def test_what_a_step_did_not_change_is_not_written_to() -> None:
    mean, names = torch.zeros(3), {"b": 1, "a": 2}
    version = mean._version

    def step(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0] - mean)
        return out.square().mean() * names["b"]

    assert preflight_of(linear(), step=step).ok
    assert mean._version == version
    assert list(names) == ["b", "a"]


def test_a_step_that_depends_on_such_a_state_is_still_told_to_differ() -> None:
    calls = [0]

    def step(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        return F.mse_loss(model(batch[0]), batch[1]) * (1 + 1e-3 * calls[0])

    check = preflight_of(linear(), step=step)["two runs give the same bits"]
    assert check.verdict == "failed"
    assert "keeps a state outside of the model" in check.cause
    assert calls == [0]


class Experts(nn.Module):
    """Of which those are called that the inputs choose."""

    def __init__(self, *, copied: bool = True, forgotten: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.experts = nn.Linear(3, 6), nn.ModuleList(nn.Linear(3, 4) for _ in range(6))
        with torch.no_grad():
            self.gate.bias[2] = 9.0  # which all of the data chooses
        self.lock = None if copied else threading.Lock()
        if forgotten:
            self.forgotten = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        weights = self.gate(inputs).softmax(1)
        rows = zip(inputs, weights, weights.argmax(1).tolist(), strict=True)
        return torch.stack([self.experts[chosen](row) * weight[chosen] for row, weight, chosen in rows])


class ByToken(nn.Module):
    """Expert and token go together; the batches hold few of the tokens between their smallest and largest."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(nn.Linear(1, 1) for _ in range(12))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([self.rows[token](torch.ones(1)) for token in tokens.flatten().tolist()])


@pytest.mark.parametrize("copied", [True, False])
def test_experts_that_no_batch_chooses_are_no_failure_where_other_inputs_do(copied: bool) -> None:
    report = preflight_of(Experts(copied=copied), nn.MSELoss())
    check = report["parameters get a gradient"]
    assert check.verdict == "not applicable", report
    assert "got none in 3 batches: experts.0.weight" in check.evidence
    assert "with other inputs others get one" in check.evidence
    assert report.ok


def test_experts_by_token_are_no_failure_either() -> None:
    model = ByToken()
    batches = [(torch.tensor([[0], [11]]), torch.zeros(2, 1))] * 3
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device="cpu")
    check = trainer.preflight(batches)["parameters get a gradient"]
    assert check.verdict == "not applicable"


class Unused(nn.Module):
    def __init__(self, *, copied: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.out, self.lock = nn.Linear(3, 4), None if copied else threading.Lock()

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            inputs = layer(inputs).relu()
        out: Tensor = self.out(inputs)
        return out


@pytest.mark.parametrize("copied", [True, False])
def test_a_layer_that_no_input_reaches_is_a_failure_among_its_like_too(copied: bool) -> None:
    torch.manual_seed(0)
    check = preflight_of(Unused(copied=copied), nn.MSELoss())["parameters get a gradient"]
    assert check.verdict == "failed"
    assert "2 of 8 got none in 3 batches: layers.2.weight, layers.2.bias" in check.evidence


def test_the_probe_leaves_the_generators_as_they_were() -> None:
    model = Experts()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    preflight_of(model, nn.MSELoss())
    assert torch.equal(torch.get_rng_state(), before)


def assigned(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def enlarged(tensor: Tensor) -> None:
    assigned(tensor, torch.cat([tensor.detach(), torch.ones(2, *tensor.shape[1:])]))


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "more rows": enlarged,
    "one row, which broadcasts": lambda t: assigned(t, torch.full((1, 4), 5.0)),
    "resized to more": lambda t: t.resize_(4, 9).fill_(2.0),
    "resized to less": lambda t: t.resize_(2, 2).fill_(2.0),
    "other memory of the same shape": lambda t: assigned(t, torch.ones(4, 4)),
    "another order in memory": lambda t: t.t_(),
    "another format": lambda t: assigned(t, t.detach().half()),
    "its memory given back": lambda t: t.untyped_storage().resize_(0),
    "values alone": lambda t: t.fill_(3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_a_step_gives_another_shape_or_memory_gets_back_its_own(change: str) -> None:
    state = torch.arange(16.0).view(4, 4)
    tied, row, flat, before = state.view(4, 4), state[1], state.view(-1), state.clone()

    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            CHANGES[change](state)
        return F.mse_loss(model(batch[0]), batch[1])

    report = preflight_of(linear(), step=step)
    assert report["a training step runs"].verdict == "passed", report
    assert torch.equal(state, before)
    assert state.dtype == before.dtype
    state[1] += 1.0
    for other, index in ((tied, 1), (row, ...), (flat.view(4, 4), 1)):
        assert torch.equal(other[index], before[1] + 1)


class Grows(nn.Module):
    """It exchanges the memory of a buffer and of a parameter in forward, and takes no copy."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.lock = change, threading.Lock()
        self.seen: Tensor
        self.register_buffer("seen", torch.ones(4, 4))
        self.one, self.tied = nn.Linear(3, 3, bias=False), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.full((4, 4), 2.0))
        self.row = self.scale.detach()[0]  # which shares its memory

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.tied(self.one(inputs)) * self.scale.sum()
        with torch.no_grad():
            self.change(self.seen)
            self.change(self.scale)
        summed: Tensor = out.detach() + self.one(inputs).sum()
        return summed


@pytest.mark.parametrize("change", ["more rows", "one row, which broadcasts", "other memory of the same shape"])
def test_buffers_and_parameters_of_a_module_that_is_not_copied_get_back_theirs(change: str) -> None:
    model = Grows(CHANGES[change])
    seen, scale = model.seen, model.scale
    preflight_of(model, nn.MSELoss())
    assert model.seen is seen
    assert model.scale is scale
    assert torch.equal(seen, torch.ones(4, 4))
    assert torch.equal(scale, torch.full((4, 4), 2.0))
    with torch.no_grad():
        scale.add_(1)
    assert torch.equal(model.row, torch.full((4,), 3.0))
    assert scale.requires_grad


def test_a_gradient_that_a_plain_tensor_had_is_not_added_to_and_no_graph_is_kept() -> None:
    temperature, total = torch.ones((), requires_grad=True), torch.zeros(4)
    temperature.grad = gradient = torch.full((), 7.0)

    def step(model: nn.Module, batch: Any) -> Tensor:
        nonlocal total
        out: Tensor = model(batch[0])
        total.detach_()
        total += out.mean(0)
        return (total.sum() + F.mse_loss(out, batch[1])) * temperature

    before = total
    preflight_of(linear(), step=step)
    assert temperature.grad is gradient
    assert gradient == 7.0
    assert total is before
    assert not total.any()
    assert not total.requires_grad


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(4)


def add_in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.add_(1)


ODD: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "inference": (inference_tensor, add_in_inference_mode),
    "expanded": (lambda: torch.zeros(2, 1).expand(2, 4), lambda t: t[:, 0].add_(1)),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda t: t.add_(torch.ones(3, 3).to_sparse())),
    "sparse, resized": (lambda: torch.eye(3).to_sparse(), lambda t: t.sparse_resize_((5, 5), 2, 0)),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), lambda t: t.values().add_(1)),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda t: t.values().add_(1)),
    "ragged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda t: t.values().add_(1),
    ),
    "an array": (lambda: np.zeros((2, 3)), lambda a: a.fill(1.0)),
    "a longer array": (lambda: np.zeros(3), lambda a: a.resize((7,), refcheck=False)),
    "an array of another shape": (lambda: np.arange(6.0), lambda a: a.resize((2, 3), refcheck=False)),
}


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_tensors_of_other_kinds_and_arrays_are_put_back_too(name: str) -> None:
    make, change = ODD[name]
    state, before = make(), make()

    def step(model: nn.Module, batch: Any) -> Tensor:
        change(state)
        return F.mse_loss(model(batch[0]), batch[1])

    assert preflight_of(linear(), step=step)["a training step runs"].verdict == "passed"
    if isinstance(state, np.ndarray):
        assert state.shape == before.shape
        assert state.tobytes() == before.tobytes()
    else:
        assert fingerprint([state]) == fingerprint([before])
        change(before)
        assert fingerprint([state]) != fingerprint([before])  # else nothing would have been changed
