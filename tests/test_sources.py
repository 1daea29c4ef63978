"""Where what is not finite comes from, hooks, transforms, masks, frozen parts, fp16."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import failing_the_second_time
from loopwright import NonFiniteError, Output, Schedule, Trainer

Data = tuple[Tensor, Tensor]


def three() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def samples(count: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(count, 3, generator=generator), torch.randn(count, 1, generator=generator))


def caught(model: nn.Module, data: Any = None, **settings: Any) -> NonFiniteError:
    trainable = [p for p in model.parameters() if p.requires_grad]
    loss = None if "step" in settings else nn.MSELoss()
    settings = {"seed": 1, "device": "cpu", **settings}
    trainer = Trainer(model, torch.optim.SGD(trainable, lr=0.01), loss, **settings)
    with pytest.raises(NonFiniteError) as found:
        trainer.fit(DataLoader(samples(), 5, shuffle=True) if data is None else data, epochs=9)
    return found.value


def own_hooks(model: nn.Module) -> list[dict[str, Any]]:
    """All that torch keeps of a module's hooks."""
    return [{k: dict(v) for k, v in vars(m).items() if k.startswith("_forward")} for m in model.modules()]


def in_place(out: Tensor) -> Tensor:
    out.data.fill_(math.nan)
    return out


def by_numpy(out: Tensor) -> Tensor:
    return torch.from_numpy(np.full_like(out.detach().numpy(), math.inf))


SPOILS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "log": (lambda out: (out * 0 - 1).log(), "log"),
    "div": (lambda out: out / 0, "div"),
    "in place": (in_place, "fill_"),
    "numpy": (by_numpy, None),
}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("1", "numpy"), *((name, spoil) for name in ("1", "2", "") for spoil in SPOILS if spoil != "numpy")],
)
@pytest.mark.parametrize("before", [True, False], ids=["pre-hook", "hook"])
def test_what_a_forward_hook_makes_is_told_of_the_hook_and_its_module(name: str, before: bool, spoil: str) -> None:
    model, (function, operation) = three(), SPOILS[spoil]
    module = model.get_submodule(name)
    hook: Any
    if before:
        hook = module.register_forward_pre_hook(lambda _, given: (function(given[0].clone()),))
    else:
        hook = module.register_forward_hook(lambda _, given, out: function(out))
    kept = own_hooks(model)
    error = caught(model)
    kind = f"a forward {'pre-' if before else ''}hook of the {'module' if name else 'model itself'}"
    if operation is None and before:  # nothing was seen of it before the module used it
        assert "something that the step did not make with torch's functions" in str(error)
    else:
        assert (error.module, error.operation) == (name, operation)
        assert kind in str(error)
    assert error.cause == "forward"
    assert not error.inexact
    assert own_hooks(model) == kept
    hook.remove()


def test_what_a_module_makes_is_not_told_of_its_hooks() -> None:
    model = three()
    model[1].register_forward_hook(lambda module, given, out: out * 1)
    model[1].register_forward_pre_hook(lambda module, given: (given[0] * 1,))
    model[1].forward = lambda inputs: (inputs * 0).log()
    error = caught(model)
    assert (error.cause, error.module, error.operation) == ("forward", "1", "log")
    assert "first in log in the module '1', ReLU" in str(error)


def test_a_hook_of_the_loss_is_told_as_one() -> None:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, given, out: out / 0)
    model = three()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), loss, device="cpu")
    with pytest.raises(NonFiniteError) as found:
        trainer.fit(DataLoader(samples(), 5), epochs=1)
    assert (found.value.cause, found.value.operation) == ("loss", "div")
    assert "a forward hook of the loss, MSELoss" in str(found.value)


def of_module(model: nn.Sequential) -> None:
    model[1].register_full_backward_hook(lambda module, inward, outward: (torch.full((5, 4), math.nan),))


def of_module_before(model: nn.Sequential) -> None:
    model[1].register_full_backward_pre_hook(lambda module, outward: (torch.full((5, 4), math.nan),))


def of_tensor(model: nn.Sequential) -> None:
    def hooked(module: nn.Module, given: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient / 0)  # type: ignore[no-untyped-call]  # torch has no annotation

    model[1].register_forward_hook(hooked)


def of_parameter(model: nn.Sequential) -> None:
    next(model[0].parameters()).register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]  # torch has no annotation


def accumulated(model: nn.Sequential) -> None:
    def spoil(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.fill_(math.nan)

    next(model[0].parameters()).register_post_accumulate_grad_hook(spoil)  # type: ignore[no-untyped-call]  # torch has no annotation


BACKWARD_HOOKS: dict[str, tuple[Callable[[nn.Sequential], None], str | None, str]] = {
    "of a module": (of_module, "1", "first in a backward hook of the module '1', ReLU"),
    "of a module, before it": (of_module_before, "1", "first in a backward hook of the module '1', ReLU"),
    "of a tensor": (of_tensor, "1", "first in a hook on what relu in the module '1', ReLU gave"),
    "of a parameter": (of_parameter, None, "first in a hook on the parameter 0.weight"),
    "of a parameter, after it": (accumulated, None, "a hook may change them"),
}


@pytest.mark.parametrize("kind", BACKWARD_HOOKS)
def test_what_a_hook_makes_of_a_gradient_is_told_of_the_hook(kind: str) -> None:
    register, module, words = BACKWARD_HOOKS[kind]
    model = three()
    register(model)
    error = caught(model, clip_norm=1.0)
    assert words in str(error)
    assert (error.module, error.operation) == (module, None)
    assert error.parameters[0] == "0.weight"
    assert error.cause == (None if kind.endswith("after it") else "backward")
    assert "learning rate" not in error.fix


def test_a_sum_of_gradients_that_is_too_large_is_not_blamed_on_an_operation() -> None:
    def step(model: nn.Module, batch: Data) -> Output:
        out = model(batch[0]).sum()
        zero = out - out.detach()
        return Output(zero * 3e38 + zero * 3e38)

    error = caught(nn.Linear(3, 1), step=step, clip_norm=1.0)
    assert error.cause == "backward"
    assert "first in the sum of several gradients of what sub in the loss or the step" in str(error)


class Own(torch.autograd.Function):
    """Its backward divides by zero, for one of its two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradients[0] * scale, (gradients[0] * x).sum(0) / 0


class Owned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.head = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(Own.apply(self.body(inputs).float(), self.scale))  # type: ignore[no-untyped-call]  # torch has no annotation there
        return out


def test_a_backward_of_ones_own_is_named_with_its_line() -> None:
    error = caught(Owned(), clip_norm=1.0)
    assert (error.cause, error.module, error.operation) == ("backward", "", "Own")
    assert error.parameters == ["scale"]
    assert f"(test_sources.py, line {Own.backward.__code__.co_firstlineno})" in str(error)
    assert error.why.startswith("what Own.backward returns")


def test_the_sample_whose_derivative_is_infinite_is_named() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 4)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            apart: Tensor = self.body(one) - self.body(other)
            return apart.pow(2).sum(1).sqrt()

    x, y = samples().tensors[0], samples().tensors[0].flip(0)
    y[7] = x[7]
    data = TensorDataset(x, y, torch.ones(20))
    error = caught(
        Twins(),
        DataLoader(data, 5, shuffle=True),
        step=lambda model, batch: F.mse_loss(model(batch[0], batch[1]), batch[2]),
        clip_norm=1.0,
    )
    assert (error.cause, error.operation, error.bad_samples) == ("backward", "sqrt", [7])
    assert error.samples is not None
    assert f"row {error.samples.index(7) + 1} of 5: sample 7" in str(error)


class Mapped(nn.Module):
    """A function of one row, for all of them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(3, 4, bias=False), nn.Linear(4, 1), function

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(torch.func.vmap(self.function)(self.body(inputs)))
        return out


def within_a_gradient(row: Tensor) -> Tensor:
    slope: Tensor = torch.func.grad(lambda x: (x * 0).sqrt().sum())(row)
    return row + slope


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda row: row / (row * 0).sum(), "div"),
        (lambda row: (row * 0 - 1).log() * 0, "log"),
        (within_a_gradient, "grad"),
    ],
    ids=["div", "log", "a gradient within"],
)
def test_an_operation_within_a_transform_is_found(function: Any, operation: str) -> None:
    error = caught(Mapped(function))
    assert (error.cause, error.module, error.operation) == ("forward", "", operation)
    assert "(test_sources.py, line" in str(error)
    assert not error.inexact


def test_the_sample_is_named_within_a_transform_too() -> None:
    data = samples()
    data.tensors[0][13] = 0
    error = caught(Mapped(lambda row: row / row.norm()), DataLoader(data, 5, shuffle=True))
    assert (error.operation, error.bad_samples) == ("div", [13])


class Attention(nn.Module):
    """The mask is made in forward, and reaches the softmax through other operations."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head, self.way = nn.Linear(3, 4), nn.Linear(4, 1), way

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        scores, count = hidden @ hidden.transpose(1, 2), inputs.shape[1]
        scores = scores + torch.full((count, count), -math.inf).triu(1)
        away = inputs[..., 0] > 9
        if self.way == "added":
            scores = scores + torch.zeros(away.shape).masked_fill(away, -math.inf)[:, None]
        else:
            scores = scores.masked_fill(away[:, None], -math.inf)
        out: Tensor = self.head((scores.softmax(-1) @ hidden).mean(1))
        return out


@pytest.mark.parametrize("way", ["added", "filled"])
def test_a_mask_that_is_added_is_no_more_blamed_than_one_that_is_filled_in(way: str) -> None:
    x = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0)).clamp(max=3)
    x[6, :, 0] = 10.0
    error = caught(Attention(way), DataLoader(TensorDataset(x, torch.zeros(20, 1)), 5, shuffle=True))
    assert (error.operation, error.bad_samples) == ("softmax", [6])
    assert error.why.startswith("a row of -inf alone")
    assert "the infinity that went in is that of" in str(error)


def test_a_frozen_parameter_that_is_not_finite_is_found_as_a_weight() -> None:
    model = three()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model.get_parameter("0.weight")[1, 1] = math.nan
    error = caught(model)
    assert (error.cause, error.parameters, error.module) == ("weights", ["0.weight"], "0")
    assert "frozen" in error.fix


def test_a_teachers_parameter_is_named() -> None:
    teacher = nn.Linear(3, 1)
    with torch.no_grad():
        teacher.weight.fill_(math.nan)
    error = caught(three(), step=lambda model, batch: F.mse_loss(model(batch[0]), teacher(batch[0]).detach()))
    assert error.cause == "loss"
    assert "parameter weight of a Linear outside of the model, which holds 3 NaN" in str(error)


def test_a_number_that_is_given_by_name_is_seen() -> None:
    error = caught(three(), step=lambda model, batch: torch.add(model(batch[0]).sum(), batch[1].sum(), alpha=math.nan))
    assert "what went in: the number nan" in str(error)


def ctc(model: nn.Module, batch: Data) -> Tensor:
    rows = len(batch[0])
    return F.ctc_loss(
        model(batch[0])[None].expand(2, -1, -1).log_softmax(-1),
        torch.ones(rows, 3, dtype=torch.long),
        torch.full((rows,), 2),
        torch.full((rows,), 3),
    )


REASONS: dict[str, tuple[Callable[[], nn.Module], Any, str, str]] = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), Zero(), nn.LayerNorm(4, eps=0), nn.Linear(4, 1)),
        None,
        "layer_norm",
        "the root of a variance",
    ),
    "layer norm of large numbers": (
        lambda: nn.Sequential(nn.Linear(3, 4), Large(), nn.LayerNorm(4), nn.Linear(4, 1)),
        None,
        "layer_norm",
        "it squares what went in",
    ),
    "weight norm": (lambda: zero_rows(), None, "_weight_norm", "a row of zeros"),
    "ctc": (lambda: nn.Linear(3, 5), ctc, "ctc_loss", "longer than its input"),
    "gradient": (
        lambda: nn.Linear(3, 1),
        lambda model, batch: (
            torch.func.grad(lambda x: (model(x) * 0).sqrt().sum())(batch[0]).sum() + model(batch[0]).sum()
        ),
        "grad",
        "a derivative that it computes",
    ),
}


class Large(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 1e25


class Zero(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 0


def zero_rows() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    with torch.no_grad():
        layer.get_parameter("parametrizations.weight.original1")[2] = 0
    return nn.Sequential(layer, nn.Linear(4, 1))


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_that_of_the_operation(name: str) -> None:
    model, step, operation, words = REASONS[name]
    error = caught(model(), **({} if step is None else {"step": step}))
    assert error.operation == operation
    assert words in error.why


def test_a_bad_input_is_told_where_the_search_of_its_use_fails() -> None:
    @failing_the_second_time
    def step(model: nn.Module, batch: Data) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    data = samples()
    data.tensors[0][3, 1] = math.nan
    error = caught(three(), DataLoader(data, 5), step=step)
    assert (error.cause, error.inputs, error.bad_samples) == ("input", ["batch[0]"], [3])
    assert "the search for the source failed: OSError: only once" in str(error)


def test_under_skip_a_mask_in_the_batch_is_not_called_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -math.inf)
    batches = [{"x": torch.randn(4, 3), "mask": mask}] * 2

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Output:
        out = model(batch["x"])
        return Output(((out @ out.T + batch["mask"]).softmax(-1) @ out).mean() / 0, weight=4)

    model = three()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), step=step, on_nonfinite="skip", device="cpu")
    with caplog.at_level(logging.WARNING, logger="loopwright"):
        trainer.fit(batches, epochs=1)
    assert "input: batch['mask'] holds 6 -inf in 16 elements, which a mask may mean" in caplog.text
    assert "where: in the data" not in caplog.text


def fp16(policy: Any, epochs: int) -> tuple[Trainer[Any, Any], Callable[[], Any]]:
    model = Owned()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        precision="fp16",
        on_nonfinite=policy,
        device="cpu",
    )
    return trainer, lambda: trainer.fit(DataLoader(samples(), 5), epochs=epochs)


def test_a_gradient_that_no_scale_makes_finite_ends_an_fp16_run_as_it_ends_others() -> None:
    trainer, fit = fp16("raise", 9)
    before = [parameter.clone() for parameter in trainer.state.model.parameters()]
    with pytest.raises(NonFiniteError, match=r"33 times in a row, down to a loss scale of 7\.62939e-06") as found:
        fit()
    error = found.value
    assert (error.found, error.cause, error.operation) == ("gradient", "backward", "Own")
    assert (error.epoch, error.batch, error.step, error.parameters) == (9, 1, 1, ["scale"])
    assert trainer.state.progress.skipped == 33
    assert all(map(torch.equal, trainer.state.model.parameters(), before))


@pytest.mark.parametrize("policy", ["skip", "ignore"])
def test_under_the_other_policies_such_a_run_goes_on(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, fit = fp16(policy, 9)
    with caplog.at_level(logging.WARNING, logger="loopwright"):
        assert fit().progress.skipped == 36
    assert ("33 times in a row" in caplog.text) == (policy == "skip")


@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_a_fit_under_fp16_that_makes_no_step_says_so(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, fit = fp16(policy, 1)
    with caplog.at_level(logging.WARNING, logger="loopwright"):
        fit()
    assert "no optimizer step was made in this fit: 4 were skipped" in caplog.text


def test_a_weights_rows_are_not_taken_for_samples_where_there_are_as_many() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    with torch.no_grad():
        layer.get_parameter("parametrizations.weight.original1")[2] = 0
    error = caught(nn.Sequential(layer, nn.Linear(5, 1)))
    assert (error.operation, error.bad_samples) == ("_weight_norm", [])
    assert "samples: " in str(error)


def test_nor_are_those_of_its_gradient() -> None:
    def step(model: nn.Module, batch: Data) -> Tensor:
        out = model(batch[0].abs() + 1)
        loss: Tensor = ((out - out.detach()) * torch.tensor([1, 3e38, 1, 1, 1])).sum()
        return loss

    error = caught(nn.Linear(3, 5), step=step, clip_norm=1.0)
    assert (error.cause, error.operation, error.bad_samples) == ("backward", "linear", [])


@pytest.mark.parametrize("gradient", [True, False])
def test_of_weights_that_the_last_step_of_all_has_ruined_the_epoch_and_the_batch_are_named(gradient: bool) -> None:
    def step(model: nn.Module, batch: Data) -> Tensor:
        loss: Tensor = model(batch[0]).mean()
        return loss + (loss * 0).sqrt() if gradient and trainer.state.progress.step == 7 else loss

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda made: math.inf if made == 7 and not gradient else 1.0)
    trainer = Trainer(model, optimizer, step=step, schedule=Schedule(rates, each="step"), seed=1, device="cpu")
    batches = list(range(20))
    data = DataLoader(samples(), 5, sampler=batches)
    with pytest.raises(NonFiniteError, match="trainable parameters") as found:
        trainer.fit(data, epochs=2)
    error = found.value
    assert (error.epoch, error.batch, error.step) == (2, 4, 8)
    assert error.cause == ("backward" if gradient else "update")
    assert "of epoch 2, batch 4," in str(error)
    assert error.samples == (batches[15:] if gradient else None)


def rows(bad: bool = False) -> list[dict[str, Tensor]]:
    x, y = samples().tensors
    x = x.clone()
    if bad:
        x[7, 1] = math.nan
    return [{"x": x[i : i + 5], "y": y[i : i + 5]} for i in range(0, 20, 5)]


def test_a_step_that_takes_from_its_batch_is_told_of_and_so_is_a_bad_input() -> None:
    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        targets = batch.pop("y")
        return F.mse_loss(model(batch["x"]), targets)

    error = caught(three(), rows(bad=True), step=step)
    assert (error.cause, error.inputs) == ("input", ["batch['x']"])
    assert "the step may have taken something out of its batch" in str(error)


@pytest.mark.parametrize("known", [True, False])
def test_what_a_step_writes_into_its_batch_is_not_taken_for_the_data_where_that_can_be_known(known: bool) -> None:
    def step(model: nn.Module, batch: Data) -> Tensor:
        batch[0].div_(batch[0].std(0) * 0)
        return F.mse_loss(model(batch[0]), batch[1])

    data: Any = samples() if known else list(zip(*samples().tensors, strict=True))
    error = caught(three(), DataLoader(data, 5), step=step)
    assert (error.cause, error.operation) == (("loss", "div_") if known else ("input", "std"))
    assert "the step writes to its batch" in str(error) or known
    assert ("it is the step that writes to it" in str(error)) == known


def test_a_missing_target_that_where_hides_from_the_loss_is_told_of_the_gradient() -> None:
    data = samples()
    data.tensors[1][3] = math.nan

    def step(model: nn.Module, batch: Data) -> Tensor:
        out = model(batch[0])
        return torch.where(batch[1].isnan(), torch.zeros_like(out), (out - batch[1]) ** 2).mean()

    error = caught(three(), DataLoader(data, 5), step=step, clip_norm=1.0)
    assert (error.cause, error.inputs, error.bad_samples) == ("backward", ["batch[1]"], [3])
    assert "input: batch[1] holds 1 NaN in 5 elements" in str(error)
    assert "0 * NaN is NaN" in error.why


class Threaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(self.body(inputs) / 0))
        thread.start()
        thread.join()
        return found[0]


def test_of_what_was_not_seen_no_reason_is_guessed() -> None:
    error = caught(Threaded())
    assert (error.cause, error.module, error.operation) == ("forward", "", None)
    assert "could not be seen" in error.why


@pytest.mark.parametrize("decomposition", [torch.linalg.eigh, torch.linalg.svd])
def test_a_decomposition_with_equal_values_is_told_of_what_its_derivative_divides_by(decomposition: Any) -> None:
    def step(model: nn.Module, batch: Data) -> Tensor:
        outputs = model(batch[0])
        matrix = outputs.T @ outputs * 0 + torch.eye(3)
        last: Tensor = decomposition(matrix)[-1]
        value: Tensor = last.abs().sum() + outputs.mean()
        return value

    error = caught(nn.Linear(3, 3), step=step, clip_norm=1.0)
    assert error.cause == "backward"
    assert error.operation in ("linalg_eigh", "linalg_svd")
    assert "differences of eigenvalues or singular values" in error.why
