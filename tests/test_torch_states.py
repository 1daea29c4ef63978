"""Every optimizer and every learning-rate scheduler of torch goes on from a checkpoint as if nothing had been."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from helpers import some_batches
from loopwright import CheckpointError, Trainer
from loopwright.adapters import check_optimizer, check_scaler, check_schedule, load_schedule, plain_state
from loopwright.callbacks import Checkpoint
from loopwright.plain import decode, encode, from_json, to_json

STEPS = 5


def through(state: Any) -> Any:
    """The state as a checkpoint would return it."""
    tree, tensors = encode(plain_state(state))
    return decode(from_json(to_json(tree)), {name: tensor.clone() for name, tensor in tensors.items()})


def flat(value: Any) -> Any:
    """A state in a form that ``==`` compares bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), str(value.layout), value.to_dense().tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


# --------------------------------------------------------------------------------------------------- optimizers

Parameters = list[nn.Parameter]
O = torch.optim  # noqa: E741  # a table follows


def groups(parameters: Parameters) -> list[dict[str, Any]]:
    return [{"params": parameters[:1], "lr": 0.2, "name": "first"}, {"params": parameters[1:]}]


OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "ASGD": lambda p: O.ASGD(p, lr=0.1, t0=2),
    "Adadelta": lambda p: O.Adadelta(p, weight_decay=0.1),
    "Adafactor": lambda p: O.Adafactor(p, lr=0.1),
    "Adagrad": lambda p: O.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adam": lambda p: O.Adam(p, lr=0.1),
    "Adam amsgrad": lambda p: O.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "Adam foreach": lambda p: O.Adam(p, lr=0.1, foreach=True),
    "Adam fused": lambda p: O.Adam(p, lr=0.1, fused=True),
    "Adam differentiable": lambda p: O.Adam(p, lr=0.1, maximize=True),
    "Adam with a tensor for a rate": lambda p: O.Adam(p, lr=torch.tensor(0.1)),
    "AdamW": lambda p: O.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW groups": lambda p: O.AdamW(groups(p), lr=0.1),
    "Adamax": lambda p: O.Adamax(p, lr=0.1),
    "LBFGS": lambda p: O.LBFGS(p, lr=0.1, history_size=3, max_iter=3),
    "LBFGS strong Wolfe": lambda p: O.LBFGS(p, line_search_fn="strong_wolfe", max_iter=3),
    "Muon": lambda p: O.Muon([x for x in p if x.dim() == 2], lr=0.1),
    "NAdam": lambda p: O.NAdam(p, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": lambda p: O.RAdam(p, lr=0.1),
    "RMSprop": lambda p: O.RMSprop(p, lr=0.1),
    "RMSprop centered": lambda p: O.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "Rprop": lambda p: O.Rprop(p, lr=0.1),
    "SGD": lambda p: O.SGD(p, lr=0.1),
    "SGD momentum": lambda p: O.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD Nesterov": lambda p: O.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SparseAdam": lambda p: O.SparseAdam(p, lr=0.1),
}


def some_parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 5), (4,), (2, 3, 4), (1,), (), (6, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer: Optimizer, number: int) -> None:
    """One step on a loss that is another one each time; the last parameter gets a gradient from the third step on."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sparse = isinstance(optimizer, O.SparseAdam)

    def closure() -> Tensor:
        optimizer.zero_grad()
        used = parameters if number >= 2 or len(parameters) == 1 else parameters[:-1]
        loss = torch.stack([((p - number) ** 2).mean() + (p**4).mean() for p in used]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
        for p in used:
            if sparse and p.dim() and p.grad is not None:
                p.grad = p.grad.to_sparse()
        return loss.detach()

    if isinstance(optimizer, O.LBFGS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch has no annotation there
    else:
        closure()
        optimizer.step()


def optimizer_named(name: str, parameters: Parameters) -> Optimizer:
    if name == "SparseAdam":
        parameters = [p for p in parameters if p.dim()]
    return OPTIMIZERS[name](parameters)


def test_every_optimizer_of_torch_is_tested() -> None:
    every = {name for name, found in vars(O).items() if inspect.isclass(found) and issubclass(found, Optimizer)}
    assert {name.split()[0] for name in OPTIMIZERS} == every - {"Optimizer"}


@pytest.mark.parametrize("saved_after", [0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_same_steps_after_a_checkpoint(name: str, saved_after: int) -> None:
    parameters = some_parameters()
    unbroken = optimizer_named(name, parameters)
    for number in range(saved_after):
        step(unbroken, number)

    saved = through(unbroken.state_dict())
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = optimizer_named(name, copies)
    check_optimizer(resumed, saved)
    resumed.load_state_dict(saved)
    assert flat(resumed.state_dict()) == flat(unbroken.state_dict())

    for number in range(saved_after, saved_after + STEPS):
        step(unbroken, number)
        step(resumed, number)
        assert flat(copies) == flat(parameters)
    assert flat(resumed.state_dict()) == flat(unbroken.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_at_a_state_changes_neither_it_nor_the_optimizer(name: str) -> None:
    parameters = some_parameters()
    optimizer = optimizer_named(name, parameters)
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *arguments: calls.append(arguments))
    for number in range(3):
        step(optimizer, number)
    saved = through(optimizer.state_dict())
    before = flat([saved, parameters, optimizer.state_dict(), [p.grad for p in parameters]])
    calls.clear()
    check_optimizer(optimizer, saved)
    after = flat([saved, parameters, optimizer.state_dict(), [p.grad for p in parameters]])
    assert after == before
    assert calls == []


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.split()[0] not in ("SGD", "Muon")])
def test_a_state_of_another_optimizer_is_refused(name: str) -> None:
    optimizer, other = optimizer_named(name, some_parameters()), O.SGD(some_parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        step(other, number)
    if name == "SparseAdam":
        other = O.SGD([p for p in some_parameters() if p.dim()], lr=0.1, momentum=0.9)
        for number in range(3):
            step(other, number)
    with pytest.raises(CheckpointError, match="of another optimizer"):
        check_optimizer(optimizer, through(other.state_dict()))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("SGD",)])
def test_a_state_with_a_tensor_of_another_shape_is_refused(name: str) -> None:
    optimizer = optimizer_named(name, some_parameters())
    for number in range(3):
        step(optimizer, number)
    kept = through(optimizer.state_dict())
    fields = [
        (i, key) for i, state in kept["state"].items() for key, value in state.items() if isinstance(value, Tensor)
    ]
    assert fields
    for number, key in fields:
        saved = copy.deepcopy(kept)
        saved["state"][number][key] = torch.zeros(7, 7)
        with pytest.raises(CheckpointError, match="of another optimizer"):
            check_optimizer(optimizer, saved)


class OfItsOwn(Optimizer):
    """An optimizer of a user's, that keeps what nobody else knows of."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's overloads
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["rows"] = [*state.get("rows", []), p.grad.flatten()[:1].clone()]
                    p.sub_(group["lr"] * p.grad * len(state["rows"]))


def test_a_users_own_optimizer_takes_the_same_steps_after_a_checkpoint() -> None:
    parameters = some_parameters()
    unbroken = OfItsOwn(parameters)
    step(unbroken, 0)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed, saved = OfItsOwn(copies), through(unbroken.state_dict())
    check_optimizer(resumed, saved)
    resumed.load_state_dict(saved)
    for number in range(1, STEPS):
        step(unbroken, number)
        step(resumed, number)
    assert flat(copies) == flat(parameters)


# --------------------------------------------------------------------------------------------------- schedulers


class Decay:
    """A function with a state, which LambdaLR saves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: float) -> float:
        self.calls += 1
        return float(0.9**epoch + 0.001 * self.calls)


L = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "ChainedScheduler": lambda o: L.ChainedScheduler([L.MultiStepLR(o, [1, 3, 3]), L.ExponentialLR(o, 0.9)]),
    "ConstantLR": lambda o: L.ConstantLR(o, total_iters=3),
    "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 6, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "CyclicLR": lambda o: L.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "CyclicLR scaled": lambda o: L.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=Decay(), scale_mode="iterations"),
    "ExponentialLR": lambda o: L.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: L.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR with a state": lambda o: L.LambdaLR(o, Decay()),
    "LinearLR": lambda o: L.LinearLR(o, total_iters=4),
    "MultiStepLR": lambda o: L.MultiStepLR(o, [2, 4, 4, 6]),
    "MultiplicativeLR": lambda o: L.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: L.OneCycleLR(o, 0.5, total_steps=30, three_phase=True),
    "PolynomialLR": lambda o: L.PolynomialLR(o, total_iters=6, power=2.0),
    "ReduceLROnPlateau": lambda o: L.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
    "SequentialLR": lambda o: L.SequentialLR(
        o, [L.LinearLR(o, total_iters=2), L.MultiStepLR(o, [1, 2]), L.ExponentialLR(o, 0.9)], [2, 5]
    ),
    "StepLR": lambda o: L.StepLR(o, 2),
}


def an_optimizer() -> Optimizer:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return O.SGD(groups([first, second]), lr=0.1, momentum=0.9)


def move(scheduler: LRScheduler, number: int) -> None:
    scheduler.optimizer.step()
    if isinstance(scheduler, L.ReduceLROnPlateau):
        scheduler.step([1.0, 0.9, 0.95, 0.95, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.1, 0.2, 0.3][number])
    else:
        scheduler.step()


def rates(optimizer: Optimizer) -> Any:
    return flat([{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups])


def state_of(scheduler: LRScheduler) -> Any:
    return flat(through(scheduler.state_dict()))


def test_every_scheduler_of_torch_is_tested() -> None:
    found = {name for name, kind in vars(L).items() if inspect.isclass(kind) and issubclass(kind, LRScheduler)}
    assert {name.split()[0] for name in SCHEDULERS} == found - {"LRScheduler", "_LRScheduler"} | {"SWALR"}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # from within SequentialLR
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("saved_after", [0, 1, 3, 6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_takes_the_same_steps_after_a_checkpoint(name: str, saved_after: int) -> None:
    optimizer = an_optimizer()
    unbroken = SCHEDULERS[name](optimizer)
    for number in range(saved_after):
        move(unbroken, number)

    saved, saved_optimizer = through(unbroken.state_dict()), through(optimizer.state_dict())
    other = an_optimizer()
    resumed = SCHEDULERS[name](other)
    check_optimizer(other, saved_optimizer)
    check_schedule(resumed, saved)
    other.load_state_dict(saved_optimizer)
    load_schedule(resumed, saved)
    assert state_of(resumed) == state_of(unbroken)

    for number in range(saved_after, saved_after + STEPS):
        move(unbroken, number)
        move(resumed, number)
        assert rates(other) == rates(optimizer)
        assert resumed.get_last_lr() == unbroken.get_last_lr()
    assert state_of(resumed) == state_of(unbroken)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_state_of_another_scheduler_is_refused(name: str) -> None:
    scheduler = SCHEDULERS[name](an_optimizer())
    other = L.StepLR(an_optimizer(), 3) if name != "StepLR" else L.LinearLR(an_optimizer())
    before = state_of(scheduler)
    with pytest.raises(CheckpointError, match="of another schedule"):
        check_schedule(scheduler, through(other.state_dict()))
    assert state_of(scheduler) == before


class Wavy(LRScheduler):
    """A scheduler of a user's, with a field that is there only after a step."""

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch > 0:
            self.wave = self.last_epoch % 2
        return [base * (1 + getattr(self, "wave", 0)) for base in self.base_lrs]


def test_a_users_own_scheduler_takes_the_same_steps_after_a_checkpoint() -> None:
    unbroken, resumed = Wavy(an_optimizer()), Wavy(an_optimizer())
    for number in range(3):
        move(unbroken, number)
    saved = through(unbroken.state_dict())
    check_schedule(resumed, saved)
    load_schedule(resumed, saved)
    assert state_of(resumed) == state_of(unbroken)


@pytest.mark.parametrize("key", ["step", "get_lr", "optimizer", "__class__", "load_state_dict"])
def test_no_state_takes_the_place_of_a_schedulers_methods(key: str) -> None:
    for scheduler in (Wavy(an_optimizer()), L.StepLR(an_optimizer(), 2)):
        with pytest.raises(CheckpointError, match="of another schedule"):
            check_schedule(scheduler, {**through(scheduler.state_dict()), key: 1})


def test_a_gradient_scaler_goes_on_where_it_was() -> None:
    scaler, other = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu")
    saved = through(scaler.state_dict())
    check_scaler(other, saved)
    other.load_state_dict(saved)
    assert other.get_scale() == 8.0
    for key in saved:
        with pytest.raises(CheckpointError, match="of another gradient scaler"):
            check_scaler(other, {**saved, key: "1"})


class Narrow(torch.optim.Optimizer):
    """An optimizer of the user's own that keeps sums wider than its parameters, and other things beside tensors."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch has two signatures there
        for parameter in self.param_groups[0]["params"]:
            kept = self.state[parameter]
            if not kept:
                zeros = torch.zeros(parameter.shape, dtype=torch.float32)
                kept |= {"sum": zeros, "kinds": ["warm", 1], "more": {"last": (zeros.double(), None)}}
            kept["sum"] += parameter.grad.float() ** 2
            kept["more"] = {"last": (parameter.grad.double(), None)}
            parameter -= (0.01 * parameter.grad.float() / (1e-3 + kept["sum"].sqrt())).to(parameter.dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (torch.optim.NAdam, torch.float64),
        (torch.optim.NAdam, torch.bfloat16),
        (torch.optim.ASGD, torch.float64),
        (torch.optim.AdamW, torch.float64),
        (Narrow, torch.bfloat16),
    ],
)
def test_what_an_optimizer_keeps_has_after_a_resume_the_format_that_it_had(
    kind: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    def run(*targets: int) -> tuple[nn.Module, dict[str, Any]]:
        for target in targets:
            torch.manual_seed(0)
            model = nn.Linear(3, 1).to(dtype)
            batches = [(x.to(dtype), y.to(dtype)) for x, y in some_batches(3)]
            optimizer = kind(model.parameters())
            saving = Checkpoint(tmp_path / str(len(targets)))
            trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving], device="cpu")
            trainer.fit(batches, steps=target, resume="auto")
        return model, next(iter(optimizer.state.values()))

    (unbroken, expected), (resumed, found) = run(20), run(7, 20)
    assert all(map(torch.equal, resumed.parameters(), unbroken.parameters()))
    assert flat(found) == flat(expected)


@pytest.mark.parametrize("kinds", [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_are_told_apart(kinds: tuple[str, str]) -> None:
    first, second = (getattr(torch.optim, kind)([nn.Parameter(torch.ones(2))], weight_decay=0.1) for kind in kinds)
    check_optimizer(first, through(first.state_dict()))
    with pytest.raises(CheckpointError, match=rf"another optimizer(.|\n)*as {kinds[0]} has it"):
        check_optimizer(second, through(first.state_dict()))
