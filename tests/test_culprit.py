"""Where what is not finite comes from (C11): the input, the weights, an operation, its gradient, or the update."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import pickle
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from helpers import At, Spare, Unsized, failing_the_second_time, line, line_trainer, ragged
from loopwright import ConfigError, Every, LoopwrightError, NonFiniteError, Output, Schedule, State, Trainer
from loopwright.callbacks import Checkpoint
from loopwright.data import Loader
from loopwright.nonfinite.culprit import Culprit
from loopwright.nonfinite.rerun import Replay
from loopwright.randomness import RandomState

Data = tuple[Tensor, Tensor]


class Between(nn.Module):
    """Two linear layers, and a function of one's own between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.function(self.body(inputs)))
        return out


class Log(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.log()


class Masking(nn.Module):
    """Attention over a sequence, with a mask of -inf that comes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        out: Tensor = self.head(self.attention(x, x, x, attn_mask=batch["mask"])[0]).mean()
        return out


class Own(torch.autograd.Function):
    """What torch's functions are not called for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * np.float32(math.inf))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Backwards(torch.autograd.Function):
    """Nothing is wrong with it but its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


class Ste(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = Backwards.apply(inputs)  # type: ignore[no-untyped-call]  # torch has no annotation there
        return out


class Opaque(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = Own.apply(inputs)  # type: ignore[no-untyped-call]  # torch has no annotation there
        return out


def samples(count: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(count, 3, generator=generator), torch.randn(count, 1, generator=generator))


def loader(data: TensorDataset | None = None, size: int = 5) -> DataLoader[Any]:
    return DataLoader(samples() if data is None else data, size, shuffle=True)


def poisoned(row: int, value: float, *, targets: bool = False) -> TensorDataset:
    data = samples()
    data.tensors[int(targets)][row] = value
    return data


def masks() -> list[dict[str, Tensor]]:
    causal = torch.full((4, 4), -math.inf).triu(1)
    empty = causal.clone()
    empty[2] = -math.inf
    return [{"x": torch.randn(2, 4, 4), "mask": mask} for mask in (causal, empty)]


def masked_softmax(h: Tensor) -> Tensor:
    scores = (h @ h.T).masked_fill(torch.ones(len(h), len(h), dtype=torch.bool), -math.inf)
    return scores.softmax(-1) @ h


def harmless_mask_then_log(h: Tensor) -> Tensor:
    scores = (h @ h.T).masked_fill(torch.ones(len(h), len(h), dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ h * 0).log()


def in_place(h: Tensor) -> Tensor:
    h = h.clone().abs_()
    h[0] = 0.0
    return h.log_()


def healed(h: Tensor) -> Tensor:
    """An infinity that goes nowhere, and a fault after it."""
    return (1 / (h * 0).exp().sub(1).reciprocal()) / 0


def column_over_zero(h: Tensor) -> Tensor:
    h = h * 1
    h[:, 1].div_(0.0)
    return h


def roots_within(h: Tensor) -> Tensor:
    h = h * 0 - 4
    h.view(-1)[3:5].sqrt_()
    return h


class Within(nn.Module):
    """A function as a module of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


def grown(h: Tensor) -> Tensor:
    return (h * 1e30).pow(3)


def terms_step(model: nn.Module, batch: Data) -> Output:
    predictions = model(batch[0])
    mse, kl = F.mse_loss(predictions, batch[1]), (predictions.mean() * 0 - 1).log()
    return Output(mse + 0.1 * kl, metrics={"mse": mse, "kl": kl})


def flat_step(model: nn.Module, batch: Data) -> Output:
    """Finite, but for its gradient."""
    return Output(model(batch[0]).mean() + (model(batch[0]).mean() * 0).sqrt())


def embedded() -> nn.Module:
    embedding = nn.Embedding(5, 3)
    with torch.no_grad():
        embedding.weight[3] = math.nan
    return nn.Sequential(embedding, nn.Flatten(), nn.Linear(3, 1))


def ruined_norm() -> nn.Module:
    """Frozen in eval mode, with running statistics that are NaN."""
    norm = nn.BatchNorm1d(3).eval()
    assert norm.running_mean is not None
    norm.running_mean.fill_(math.nan)
    return nn.Sequential(norm, nn.Linear(3, 1))


@dataclass(frozen=True)
class Fault:
    model: Callable[[], nn.Module]
    cause: str
    module: str | None = None
    operation: str | None = None
    says: tuple[str, ...] = ()
    data: Callable[[], Any] = loader
    settings: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Fault] = {
    "NaN in a sample": Fault(
        line,
        "input",
        "",
        "linear",
        ("batch[0] holds 3 NaN in 15 elements", "sample 7"),
        lambda: loader(poisoned(7, math.nan)),
    ),
    "inf in a target": Fault(
        line,
        "input",
        None,
        "mse_loss",
        ("batch[1] holds 1 inf", "sample 9"),
        lambda: loader(poisoned(9, math.inf, targets=True)),
    ),
    "-inf in a target": Fault(
        line, "input", None, "mse_loss", ("1 -inf", "sample 9"), lambda: loader(poisoned(9, -math.inf, targets=True))
    ),
    "log of a negative number": Fault(
        lambda: nn.Sequential(nn.Linear(3, 4), Log(), nn.Linear(4, 1)),
        "forward",
        "1",
        "log",
        ("Log (test_culprit.py, line", "clamp"),
    ),
    "log of zero, NaN later": Fault(
        lambda: Between(lambda h: (h * 0).log() * 0), "forward", "", "log", ("20 -inf", "NaN since mul", "that of 0")
    ),
    "0/0 in the middle": Fault(
        lambda: Between(lambda h: h.relu() * 0 / (h * 0).sum()), "forward", "", "div", ("zero by zero", "Between")
    ),
    "overflow in exp": Fault(
        lambda: Between(lambda h: (h.abs() * 1e4 + 100).exp()), "forward", "", "exp", ("3.403e+38", "logsumexp")
    ),
    "overflow in pow": Fault(lambda: Between(grown), "forward", "", "pow", ("the largest that went in",)),
    "root of a negative number": Fault(
        lambda: Between(lambda h: (-h.abs()).sqrt()), "forward", "", "sqrt", ("clamp(min=0)",)
    ),
    "a mask that leaves nothing": Fault(
        lambda: Between(masked_softmax), "forward", "", "softmax", ("a row of -inf alone",)
    ),
    "such a mask in the batch": Fault(
        Masking,
        "forward",
        "attention",
        "multi_head_attention_forward",
        ("batch['mask'] holds 9 -inf", "unmasked"),
        masks,
        {"step": lambda model, batch: Output(model(batch), weight=2)},
    ),
    "a mask that is meant, then another fault": Fault(lambda: Between(harmless_mask_then_log), "forward", "", "log"),
    "an infinity that is undone, then another fault": Fault(lambda: Between(healed), "forward", "", "div"),
    "in place": Fault(lambda: Between(in_place), "forward", "", "log_", ("that of 0", "clamp")),
    "past torch's functions": Fault(lambda: Between(Opaque()), "forward", "function", None, ("'function', Opaque",)),
    "the spread of one sample": Fault(
        lambda: Between(lambda h: (h - h.mean(0)) / h.var(0)),
        "forward",
        "",
        "var",
        ("correction=0",),
        lambda: loader(size=1),
    ),
    "no target that counts": Fault(
        lambda: nn.Linear(3, 4),
        "loss",
        None,
        "cross_entropy",
        ("a mean over nothing",),
        lambda: [(torch.randn(4, 3), torch.full((4,), -100))],
        {"loss": nn.CrossEntropyLoss()},
    ),
    "a loss of one's own": Fault(
        line, "loss", None, "log", ("the loss or the step",), loader, {"loss": lambda p, t: (p * 0).log().mean()}
    ),
    "several terms": Fault(line, "loss", None, "log", ("kl is nan", "mse is "), loader, {"step": terms_step}),
    "a number written down": Fault(
        line, "loss", None, "mul", ("the number nan",), loader, {"loss": lambda p, t: p.mean() * math.nan}
    ),
    "a learning rate that diverges": Fault(
        line, "loss", None, "mse_loss", ("smaller learning rate",), loader, {"lr": 1e25}
    ),
    "a NaN in an embedding": Fault(
        embedded,
        "weights",
        None,
        None,
        ("1 of 3 parameters are not finite: 0.weight", "clip_norm"),
        lambda: [(torch.tensor([1, 2]), torch.zeros(2, 1)), (torch.tensor([3, 2]), torch.zeros(2, 1))],
    ),
    "fp16": Fault(
        lambda: Between(lambda h: h.half() * 1e5),
        "forward",
        "",
        "mul",
        ("float16", "bf16"),
        loader,
        {"precision": "fp16"},
    ),
    "bf16": Fault(
        lambda: Between(lambda h: h * 1e38 * 1e10), "forward", "", "mul", ("bfloat16",), loader, {"precision": "bf16"}
    ),
    "a buffer": Fault(
        ruined_norm,
        "forward",
        "0",
        "batch_norm",
        ("buffer 0.running_mean", "not finite before it"),
    ),
    "the root's derivative at zero": Fault(
        line,
        "backward",
        None,
        "sqrt",
        ("those of weight and bias", "derivative at 0"),
        loader,
        {"step": flat_step, "clip_norm": 1.0},
    ),
    "the same in a module": Fault(
        lambda: Between(lambda h: (h * 0).norm(dim=1, keepdim=True).expand_as(h) + (h * 0).sqrt()),
        "backward",
        "",
        "sqrt",
        ("those of body.weight and body.bias",),
        loader,
        {"clip_norm": 1.0},
    ),
    "a column divided in place": Fault(
        lambda: Between(Within(column_over_zero)), "forward", "function", "div_", ("divides by zero", "5 elements")
    ),
    "a part of a view written to in place": Fault(
        lambda: Between(Within(roots_within)), "forward", "function", "sqrt_", ("no value for -4", "2 elements")
    ),
    "an input beyond fp16": Fault(
        lambda: Between(lambda h: h),
        "forward",
        "body",
        "linear",
        ("float16 holds numbers up to 6.55e+04; the largest that went in is 1e+05", 'fix: precision="bf16"'),
        lambda: loader(poisoned(7, 1e5)),
        {"precision": "fp16"},
    ),
    "a backward of one's own": Fault(
        lambda: nn.Sequential(nn.Linear(3, 4), Ste(), nn.Linear(4, 4), nn.Linear(4, 1)),
        "backward",
        "1",
        "Backwards",
        ("those of 0.weight and 0.bias",),
        loader,
        {"clip_norm": 1.0},
    ),
    "a backward of one's own in the step": Fault(
        line,
        "backward",
        None,
        "Backwards",
        ("Backwards in the loss or the step, outside of the model",),
        loader,
        {
            "clip_norm": 1.0,
            "step": lambda model, batch: Output(F.mse_loss(Ste().forward(model(batch[0])), batch[1])),
        },
    ),
    "torch.where does not help": Fault(
        lambda: Between(lambda h: torch.where(h > 99, (h * 0).sqrt(), h)),
        "backward",
        "",
        "sqrt",
        ("torch.where",),
        loader,
        {"clip_norm": 1.0},
    ),
}


def trainer_of(model: nn.Module, **settings: Any) -> Trainer:
    return line_trainer(model, **{"seed": 1, **settings})


def caught(model: nn.Module, data: Any, *, epochs: int = 3, **settings: Any) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as found:
        trainer_of(model, **settings).fit(data, epochs=epochs)
    return found.value


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", FAULTS)
def test_the_error_says_where_it_comes_from(name: str) -> None:
    fault = FAULTS[name]
    error = caught(fault.model(), fault.data(), **fault.settings)
    assert (error.cause, error.module, error.operation) == (fault.cause, fault.module, fault.operation), error
    for words in fault.says:
        assert words in str(error)
    assert error.why
    assert error.fix
    assert not error.inexact
    assert f"epoch {error.epoch}, batch {error.batch}, at optimizer step {error.step}" in error.what


@pytest.mark.parametrize("kind", ["DataLoader", "in order", "Loader", "list", "generator", "IterableDataset"])
def test_the_samples_are_named_where_they_can_be_known(kind: str) -> None:
    data = poisoned(7, math.nan)
    torch.manual_seed(0)
    batches = list(DataLoader(data, 5))

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(data[i] for i in range(20))

    loaders: dict[str, Any] = {
        "DataLoader": loader(data),
        "in order": DataLoader(data, 5),
        "Loader": Loader(data, 5, seed=3),
        "list": batches,
        "generator": (batch for batch in batches),
        "IterableDataset": DataLoader(Stream(), 5),
    }
    error = caught(line(), loaders[kind], epochs=1 if kind == "generator" else 3)
    assert error.cause == "input"
    assert "of 5" in str(error)
    known = kind in ("DataLoader", "in order", "Loader")
    assert error.bad_samples == ([7] if known else [])
    assert (error.samples is not None and 7 in error.samples) is known


class Sorting(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (
            [part[::-1] if isinstance(part, list) else part.flip(0) for part in batch] for batch in super().__iter__()
        )


class Table(Dataset[Any]):
    """Gives several samples at once in its own order, as a table in a database may."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[sorted(index) if isinstance(index, list) else index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.data[index] for index in sorted(indices)]


def reordered(kind: str, data: TensorDataset) -> Any:
    """A loader whose batches begin with another sample than the sampler's list does; the last has one alone."""

    def by_first(batch: list[Data]) -> Any:
        return default_collate(sorted(batch, key=lambda sample: -float(sample[0].nan_to_num()[0])))

    def alone(batch: list[Data]) -> Any:
        return default_collate(batch)

    order = [[3, 9, 1, 7, 4], [2, 0]]
    loaders: dict[str, Callable[[], Any]] = {
        "collate_fn": lambda: DataLoader(data, 5, collate_fn=by_first),
        "in workers": lambda: DataLoader(data, 5, collate_fn=by_first, num_workers=1),
        "Loader": lambda: Loader(data, 5, collate=by_first),
        "of a kind of its own": lambda: Sorting(data, 5),
        "__getitems__": lambda: DataLoader(Table(data), batch_sampler=order),
        "of a subset": lambda: DataLoader(Subset(Table(data), range(19, -1, -1)), 5),
        "whole batches": lambda: DataLoader(Table(data), batch_size=None, sampler=order),
        "one by one": lambda: DataLoader(data, 1, collate_fn=alone),
    }
    return loaders[kind]()


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    "kind",
    [
        "collate_fn",
        "in workers",
        "Loader",
        "of a kind of its own",
        "__getitems__",
        "of a subset",
        "whole batches",
        "one by one",
    ],
)
def test_no_sample_is_named_where_the_order_of_the_rows_is_not_known(
    kind: str, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = reordered(kind, poisoned(7, math.nan))
    if policy == "skip":
        trainer_of(line(), on_nonfinite="skip").fit(data, epochs=1)
        said = caplog.text
    else:
        error = caught(line(), data, epochs=1)
        said = str(error)
        assert error.cause == "input"
        assert error.bad_samples == ([7] if kind == "one by one" else [])
        assert error.samples is not None
    if kind == "one by one":  # there is but one that it can be
        assert "row 1 of 1: sample 7" in said
    else:
        assert "of 5, which may be any of the samples: the loader makes batches in a way of its own" in said
        assert "a look at sample" not in said
        assert re.search(r"samples: (\d+, ){4}\d+\n", said)


def test_a_number_made_in_the_model_is_not_put_down_to_a_sample_whose_order_is_not_known_either() -> None:
    data = samples()
    data.tensors[0].abs_().add_(1)
    data.tensors[0][7] *= -1

    def step(model: nn.Module, batch: Data) -> Tensor:
        return F.mse_loss(model(batch[0].log()), batch[1])

    known = caught(line(), DataLoader(data, 5), step=step)
    assert (known.operation, known.bad_samples) == ("log", [7])
    unknown = caught(line(), DataLoader(data, 5, collate_fn=lambda batch: default_collate(batch[::-1])), step=step)
    assert (unknown.operation, unknown.bad_samples) == ("log", [])
    assert "row 3 of 5, which may be any of the samples" in str(unknown)


def test_all_tensors_of_the_batch_that_are_not_finite_are_listed() -> None:
    x, y = torch.ones(4, 3), torch.ones(4, 1)
    error = caught(line(), [(x, y), (x / 0, y / 0)])
    assert (error.cause, error.inputs) == ("input", ["batch[0]", "batch[1]"])
    first, second = str(error).split("\n")[1:3]
    assert "in the data: batch[0] holds 12 inf in 12 elements; first used by linear" in first
    assert second == "  input: batch[1] holds 4 inf in 4 elements too"


# The second run.


class Chance(nn.Module):
    """Fails where its dropout leaves nothing, which no other state of the generator would have done."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(3, 1), nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        kept = self.drop(torch.ones(7)).sum()
        out: Tensor = self.body(inputs) + 0 * kept.log()
        return out


def test_the_batch_is_run_again_with_the_random_state_that_it_had() -> None:
    for seed in range(3):
        error = caught(Chance(), loader(samples(400), 1), seed=seed)
        assert (error.cause, error.operation) == ("forward", "log")
        assert not error.inexact
        assert error.step is not None
        assert error.step > 2  # else the first batches of an epoch alone would do


@pytest.mark.parametrize("source", ["python", "numpy"])
def test_where_something_else_than_torch_draws_the_error_says_that_it_is_not_exact(source: str) -> None:
    draws: dict[str, Callable[[], float]] = {"python": random.random, "numpy": np.random.rand}
    calls = 0

    def step(model: nn.Module, batch: Data) -> Output:
        nonlocal calls
        calls += 1
        chance = draws[source]()
        return Output(model(batch[0]).mean() * (math.nan if calls == 3 and chance < 2 else 1.0))

    error = caught(line(), loader(), step=step)
    assert [source in note for note in error.inexact] == [True]
    assert "run once more, the batch gave a finite loss" in str(error)
    assert error.cause is None


def test_where_the_step_writes_to_buffers_the_error_says_so_but_not_for_running_statistics() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.seen: Tensor
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, h: Tensor) -> Tensor:
            if self.written:
                self.seen.add_(1)
            out: Tensor = self.norm(h) / 0
            return out

        written = False

    module = Counts()
    assert not caught(Between(module), loader()).inexact
    module.written = True
    assert "function.seen" in caught(Between(module), loader()).inexact[0]


class Restless(nn.Module):
    """Whatever a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1))
        self.calls = 0
        self.register_buffer("kept", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.kept = inputs.mean().detach()
        self.latest = self.calls
        if self.calls == 3:
            self.body[2].eval()
        noise = random.random() + float(np.random.rand())
        out: Tensor = self.normed(self.body(inputs)) * noise
        return out / 0 if self.calls == 4 else out


@pytest.mark.parametrize(
    "made",
    [{}, {"accumulate": 3}, {"clip_norm": 1.0}, {"precision": "bf16"}, {"precision": "fp16"}, {"lbfgs": True}],
    ids=str,
)
def test_the_search_leaves_everything_as_it_was(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looked = Culprit.look
    found: list[dict[str, Any]] = []
    for searching in (True, False):
        monkeypatch.setattr(Culprit, "look", looked if searching else lambda *_, **__: None)
        torch.manual_seed(0)
        model, settings = Restless(), {**made, "seed": 1}
        if settings.pop("lbfgs", False):
            settings["optimizer"] = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2)
        with pytest.raises(NonFiniteError) as error:
            line_trainer(model, **settings).fit(loader(), epochs=3)
        assert error.value.searched is searching
        found.append(
            {
                "tensors": [t.clone() for t in model.state_dict().values()],
                "gradients": [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()],
                "torch": [torch.get_rng_state(), torch.tensor(RandomState.capture().numpy[1].astype(np.int64))],
                "others": (random.getstate(), [m.training for m in model.modules()], model.calls, model.latest),
                "attributes": [sorted(vars(m)) for m in model.modules()],
                "enabled": torch.is_grad_enabled(),
            }
        )
    one, other = found
    for kind in ("tensors", "gradients", "torch"):
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one[kind], other[kind], strict=True)
        ), kind
    for kind in ("others", "attributes", "enabled"):
        assert one[kind] == other[kind], kind


class Expanded(nn.Module):
    """A buffer that is one number seen four times, and may be written to through that number."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.first, self.last, self.writes, self.calls = nn.Linear(3, 4), nn.Linear(4, 1), writes, 0
        self.number = [torch.ones(1)]  # in a list, so that nothing else puts it back
        self.many: Tensor
        self.register_buffer("many", self.number[0].expand(4))
        self.states: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.writes:
            self.number[0].add_(1)
        hidden = F.dropout(self.first(inputs) * self.many.clone(), 0.3)
        self.states.append(torch.get_rng_state())
        out: Tensor = self.last((hidden * 0 - 1).log() if self.calls >= 3 else hidden)
        return out


@pytest.mark.parametrize("writes", [False, True])
def test_an_expanded_buffer_does_not_keep_the_rest_from_being_put_back(writes: bool) -> None:
    model = Expanded(writes=writes)
    error = caught(model, loader(), accumulate=4)
    assert (error.operation, error.batch, len(model.states)) == ("log", 3, 4)
    assert "put back" not in str(error)
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), model.states[2])
    assert model.many.tolist() == [4.0 if writes else 1.0] * 4
    assert model.calls == 3


def test_what_the_second_run_raises_does_not_hide_the_error() -> None:
    @failing_the_second_time
    def step(model: nn.Module, batch: Data) -> Output:
        return Output(model(batch[0]).mean() * math.inf)

    model = line()
    error = caught(model, loader(), step=step)
    assert "the loss is" in error.what
    assert "the search for the source failed: OSError: only once" in str(error)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_compiled_model_is_run_again_as_it_is_written() -> None:
    torch._dynamo.reset()

    class Compiled(Between):
        def compile(self, *args: Any, **kwargs: Any) -> None:
            super().compile(backend="eager")  # without the compiler that the default needs

    error = caught(Compiled(Log()), loader(), compile=True)
    assert (error.cause, error.module, error.operation) == ("forward", "function", "log")


def test_a_closures_evaluation_is_looked_into() -> None:
    model = line()
    error = caught(model, loader(), optimizer=torch.optim.LBFGS(model.parameters(), lr=1e30))
    assert (error.cause, error.operation) == ("loss", "mse_loss")


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_ruins_the_weights_within_a_closures_step_is_told(clip_norm: float | None) -> None:
    model = line()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    error = caught(model, loader(), optimizer=optimizer, step=flat_step, clip_norm=clip_norm)
    assert error.step == 1
    assert error.cause == ("backward" if clip_norm else "weights")
    if clip_norm is None:
        assert "before this evaluation of the loss" in error.why


def test_weights_that_were_never_finite_are_not_blamed_on_a_step() -> None:
    model = line()
    with torch.no_grad():
        model.bias.fill_(math.inf)
    error = caught(model, loader())
    assert (error.cause, error.parameters) == ("weights", ["bias"])
    assert "before the first step" in error.why


# Windows, steps, weights.


@pytest.mark.parametrize("bad", range(3))
def test_in_a_window_the_batch_at_fault_is_named_as_far_as_it_is_known(bad: int) -> None:
    batches = [(batch, index == bad) for index, batch in enumerate(ragged(2, 2, 2, 2))]

    def step(model: nn.Module, batch: tuple[Data, bool]) -> Output:
        loss = F.mse_loss(model(batch[0][0]), batch[0][1])
        return Output(loss + (loss * 0).sqrt() if batch[1] else loss, weight=2)

    error = caught(line(), batches, step=step, clip_norm=1.0, accumulate=3)
    assert error.parameters == ["weight", "bias"]
    if bad == 2:
        assert (error.cause, error.operation, error.batch) == ("backward", "sqrt", 3)
        assert "in epoch 1, batch 3, at optimizer step 1, in the window of batches 1 to 3" in error.what
    else:
        assert (error.batch, error.samples) == (1, None)
        assert "in one of the batches 1 to 2 of the window" in str(error)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_last_short_window_is_looked_at_where_only_the_end_of_the_data_tells_of_it(
    policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [(batch, index == 4) for index, batch in enumerate(ragged(2, 2, 2, 2, 2))]

    def step(model: nn.Module, batch: tuple[Data, bool]) -> Output:
        loss = F.mse_loss(model(batch[0][0]), batch[0][1])
        return Output(loss + (loss * 0).sqrt() if batch[1] else loss, weight=2)

    trainer = trainer_of(line(), step=step, clip_norm=1.0, accumulate=3, on_nonfinite=policy)
    if policy == "raise":
        with pytest.raises(NonFiniteError) as found:
            trainer.fit(Unsized(batches), epochs=1)
        text = str(found.value)
    else:
        trainer.fit(Unsized(batches), epochs=1)
        text = caplog.text
    assert "epoch 1, batch 4, at optimizer step 2" in text
    assert "not finite are those of weight and bias" in text
    assert "some steps later" not in text


def test_gradients_whose_norm_alone_is_too_large_are_not_called_bad() -> None:
    error = caught(line(), loader(), step=lambda model, batch: Output(model(batch[0]).mean() * 1e30), clip_norm=1.0)
    assert error.parameters == []
    assert "every gradient is finite by itself" in str(error)


def test_the_gradients_are_still_there_when_their_norm_is_not_finite() -> None:
    model = line()
    step = lambda model, batch: Output(model.bias.sum() + (model.weight * 0).sum().sqrt())  # noqa: E731
    caught(model, loader(), step=step, clip_norm=1.0)
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    assert bool(model.weight.grad.isnan().all())
    assert model.bias.grad.item() == 1.0


def test_weights_ruined_in_a_hook_are_found_as_weights() -> None:
    model = line()

    def ruin(state: State) -> None:
        if state.progress.step == 2:
            with torch.no_grad():
                model.bias.fill_(math.nan)

    error = caught(model, loader(), callbacks=[At(on_step_end=ruin)])
    assert (error.cause, error.parameters, error.step) == ("weights", ["bias"], 3)
    assert "step 2, or something before it" in error.why


@pytest.mark.parametrize("gradient", [True, False])
def test_of_weights_found_at_a_save_or_at_the_end_the_error_says_whether_the_last_gradients_were_at_fault(
    gradient: bool, tmp_path: Path
) -> None:
    model = line()

    def ruin(state: State) -> None:
        if not gradient and state.progress.step == 3:
            with torch.no_grad():
                model.weight.fill_(math.inf)

    def step(model: nn.Module, batch: Data) -> Output:
        loss = model(batch[0]).mean()
        return Output(loss + (loss * 0).sqrt() if gradient and trainer.state.progress.step == 2 else loss)

    saving = Checkpoint(tmp_path / "saved", every=Every(steps=1))
    trainer = trainer_of(model, step=step, callbacks=[At(on_step_end=ruin), saving])
    with pytest.raises(NonFiniteError, match="trainable parameters") as found:
        trainer.fit(loader(), epochs=3)
    error = found.value
    assert error.cause == ("backward" if gradient else "update")
    assert "of step 3" in str(error)
    assert (error.samples is not None and len(error.samples) == 5) is gradient
    assert error.checkpoint is not None
    assert error.checkpoint.name in ("step-000000001", "step-000000002")  # the newer one may be on its way yet
    resumed = trainer_of(line(), callbacks=[Checkpoint(tmp_path / "saved")])
    assert resumed.fit(loader(), epochs=3, resume=error.checkpoint).progress.epoch == 3


def test_without_a_checkpoint_none_is_named(tmp_path: Path) -> None:
    error = caught(line(), [(torch.ones(2, 3), torch.full((2, 1), math.nan))], callbacks=[Checkpoint(tmp_path)])
    assert error.checkpoint is None
    assert "saved:" not in str(error)


def test_after_a_resume_the_samples_are_still_known(tmp_path: Path) -> None:
    data = poisoned(7, math.nan)
    order = [i for batch in DataLoader(TensorDataset(torch.arange(20)), 5) for i in batch[0].tolist()]
    assert order.index(7) // 5 == 1
    first = trainer_of(line(), callbacks=[Checkpoint(tmp_path)])
    first.fit(DataLoader(data, 5), steps=1)
    second = trainer_of(line(), callbacks=[Checkpoint(tmp_path)])
    with pytest.raises(NonFiniteError) as found:
        second.fit(DataLoader(data, 5), steps=4, resume="auto")
    assert found.value.bad_samples == [7]
    assert (found.value.batch, found.value.step) == (2, 2)


# An accelerator's cadence: found some steps later.


@pytest.mark.parametrize("kind", ["DataLoader", "list", "generator", "Loader"])
def test_found_late_the_input_is_looked_at_where_it_can_be_fetched_once_more(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_read_each_step", False)
    data = poisoned(7, math.nan)
    batches = list(DataLoader(data, 5))
    loaders: dict[str, Any] = {
        "DataLoader": loader(data),
        "list": batches,
        "generator": (batch for batch in batches),
        "Loader": Loader(data, 5, seed=3),
    }
    error = caught(line(), loaders[kind], epochs=1 if kind == "generator" else 3)
    assert error.cause == ("input" if kind in ("DataLoader", "list") else None)
    assert (error.samples is not None and 7 in error.samples) is (kind in ("DataLoader", "Loader"))
    assert "2 parameters are not finite by now" in str(error)
    if error.cause is None:
        assert "the place above is exact" in str(error)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
@pytest.mark.parametrize("batches", [3, 300])
@pytest.mark.parametrize("validating", [True, False])
def test_a_weight_on_the_device_is_looked_at_as_late_as_the_loss_but_it_is(
    value: float, batches: int, validating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_read_each_step", False)
    model = line()

    def step(model: nn.Module, batch: tuple[Data, float]) -> Output:
        weight = torch.tensor(batch[1]) if model.training is not validating else torch.tensor(1.0)
        return Output(F.mse_loss(model(batch[0][0]), batch[0][1]), weight=weight)

    data = [(batch, value if index == batches - 2 else 2.0) for index, batch in enumerate(ragged(*[2] * batches))]
    with pytest.raises(ConfigError, match=r"the weight of a batch is (nan|-1.0|inf) in ") as found:
        line_trainer(model, step=step).fit(data, data, epochs=1)
    assert f"batch {batches - 1}" in found.value.what
    assert ("validation" in found.value.what) is validating


# "skip".


def test_skip_warns_of_the_first_and_counts_the_rest_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def step(model: nn.Module, batch: Data) -> Output:
        nonlocal calls
        calls += 1
        return Output(F.mse_loss(model(batch[0]), batch[1]))

    result = trainer_of(line(), step=step, on_nonfinite="skip").fit(loader(poisoned(7, math.nan)), epochs=3)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "sample 7" in warnings[0]
    assert "epoch 1, batch" in warnings[0]
    assert (
        "3 steps were skipped in this fit, 3 for their loss and 0 for their gradients, and 9 steps made" in warnings[1]
    )
    assert result.progress.skipped == 3
    assert calls == 12, "the run goes on, so that no batch is run a second time"


def test_skip_names_the_gradients_that_are_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    model = line()
    step = lambda model, batch: Output(model.bias.sum() + (model.weight * 0).sum().sqrt(), weight=1)  # noqa: E731
    trainer_of(model, step=step, on_nonfinite="skip").fit(loader(), epochs=1)
    assert "not finite are those of weight; the loss is finite" in caplog.text


def test_ignore_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(line(), on_nonfinite="ignore").fit(loader(poisoned(7, math.nan)), epochs=2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_skip_on_data_without_end_ends(fault: str) -> None:
    given = 0

    class Forever:
        def __iter__(self) -> Iterator[Data]:
            nonlocal given
            while given < 1500:
                given += 1
                yield torch.ones(1, 3), torch.ones(1, 1)

    step = flat_step if fault == "gradient" else lambda model, batch: Output(model(batch[0]).mean() * math.nan)
    with pytest.raises(NonFiniteError, match="1000 steps in a row were skipped"):
        trainer_of(line(), step=step, on_nonfinite="skip").fit(Forever(), steps=5)
    assert given == 1000


def test_an_epoch_in_which_fp16_skips_every_step_moves_no_schedule() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), each="epoch")

    def step(model: nn.Module, batch: Data) -> Output:
        loss = model(batch[0]).mean()
        first = trainer.state.progress.epoch == 0
        return Output(loss + (loss * 0).sqrt() if first else loss)

    rates: list[float] = []
    at = At(on_epoch_end=lambda state: rates.append(optimizer.param_groups[0]["lr"]))
    trainer = trainer_of(model, optimizer=optimizer, schedule=schedule, precision="fp16", step=step, callbacks=[at])
    trainer.fit(loader(), epochs=3)
    assert rates == [0.1, 0.05, 0.025]


# What it costs while nothing is wrong.


@pytest.mark.parametrize(
    ("model", "made", "notes"),
    [
        (line, {}, [2, 2]),
        (Chance, {}, [6, 6]),
        (Chance, {"on_nonfinite": "ignore"}, [0, 0]),
        (Chance, {"on_nonfinite": "skip"}, [0, 0]),
    ],
    ids=["nothing draws", "dropout", "ignore", "skip"],
)
def test_the_generators_state_is_copied_where_something_draws_alone(
    model: Callable[[], nn.Module], made: dict[str, Any], notes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = 0
    note = Replay.note

    def counting(self: Replay) -> None:
        nonlocal noted
        noted += 1
        note(self)

    monkeypatch.setattr(Replay, "note", counting)
    counts: list[int] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        at = At(on_epoch_end=lambda state: counts.append(noted))
        line_trainer(model(), callbacks=[at], **made).fit(ragged(*[2] * 6), epochs=2)
    assert [counts[0], counts[1] - counts[0]] == notes


@pytest.mark.parametrize(("made", "reads"), [({}, 1), ({"clip_norm": 1.0}, 2), ({"on_nonfinite": "ignore"}, 1)])
def test_a_step_reads_no_more_than_its_loss_and_its_norm(
    made: dict[str, Any], reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    item = Tensor.item

    def counting(self: Tensor) -> Any:
        nonlocal count
        count += 1
        return item(self)

    monkeypatch.setattr(Tensor, "item", counting)
    seen: list[int] = []
    at = At(on_batch_start=lambda state, batch: seen.append(count))
    line_trainer(callbacks=[at], **made).fit(ragged(*[2] * 6), epochs=1)
    assert [b - a for a, b in itertools.pairwise(seen)] == [reads] * 5


# The error itself.


def test_the_error_survives_pickling_with_all_it_knows() -> None:
    error = caught(line(), loader(poisoned(7, math.nan)))
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error)
    assert (back.cause, back.bad_samples, back.epoch, back.inputs) == ("input", [7], 1, ["batch[0]"])
    assert isinstance(back, FloatingPointError)
    assert isinstance(back, LoopwrightError)


def test_an_error_of_a_callbacks_own_is_left_alone() -> None:
    mine = NonFiniteError("mine", why="because", fix="nothing")

    def raising(state: State, output: Output) -> None:
        raise mine

    with pytest.raises(NonFiniteError) as found:
        trainer_of(line(), callbacks=[At(on_batch_end=raising)]).fit(loader(), epochs=1)
    assert found.value is mine
    assert str(mine) == "[non-finite] mine\n  why: because\n  fix: nothing"


def test_a_second_fit_after_a_search_goes_on_as_if_there_had_been_none(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = Culprit.look
    weights: list[Tensor] = []
    for searching in (True, False):
        monkeypatch.setattr(Culprit, "look", looked if searching else lambda *_, **__: None)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        data = poisoned(7, math.nan)
        trainer = line_trainer(model, seed=2)
        with pytest.raises(NonFiniteError):
            trainer.fit(loader(data), epochs=2)
        clean = copy.deepcopy(data)
        clean.tensors[0][7] = 0.5
        trainer.fit(loader(clean), epochs=2)
        weights.append(next(model.parameters()).detach().clone())
    assert torch.equal(*weights)


def test_skip_says_which_buffers_the_dropped_batch_has_ruined(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    trainer_of(model, on_nonfinite="skip").fit(loader(poisoned(7, math.nan)), epochs=1)
    assert "buffers: 0.running_mean and 0.running_var hold NaN" in caplog.text


def test_an_infinity_that_is_no_mask_is_followed_to_where_it_was_written_down() -> None:
    error = caught(Between(lambda h: h + torch.full((4,), math.inf)), loader())
    assert "the infinity that went in is that of full in the model's own forward, Between" in str(error)


class Bag:
    """A batch of one's own class, that moves itself."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def to(self, device: torch.device, **_: object) -> Bag:
        return Bag(self.inputs.to(device, copy=True), self.targets.to(device, copy=True))


def test_a_batch_of_ones_own_class_is_looked_into() -> None:
    bags = [Bag(x, y * math.nan if index else y) for index, (x, y) in enumerate(ragged(2, 2))]
    step = lambda model, batch: Output(F.mse_loss(model(batch.inputs), batch.targets), weight=2)  # noqa: E731
    error = caught(line(), bags, step=step)
    assert (error.cause, error.inputs) == ("input", ["batch.targets"])


@pytest.mark.parametrize("copied", [True, False])
def test_what_a_hook_does_to_a_batch_is_seen_unless_the_batch_is_a_copy(copied: bool) -> None:
    def spoil(state: State, batch: Any) -> None:
        (batch.targets if copied else batch[1]).fill_(math.nan)

    batches = [Bag(x, y) if copied else (x, y) for x, y in ragged(2, 2)]
    step = lambda model, batch: Output(  # noqa: E731
        F.mse_loss(model(batch.inputs), batch.targets) if copied else F.mse_loss(model(batch[0]), batch[1]), weight=2
    )
    error = caught(line(), batches, step=step, callbacks=[At(on_batch_start=spoil)])
    assert error.cause == (None if copied else "input")
    assert [("on_batch_start" in note) for note in error.inexact] == ([True] if copied else [])


def test_what_comes_from_outside_of_model_and_batch_is_told_from_what_they_compute() -> None:
    outside = torch.full((1,), math.nan)
    step = lambda model, batch: Output((model(batch[0]) * outside).mean())  # noqa: E731
    error = caught(line(), loader(), step=step)
    assert (error.cause, error.operation) == ("loss", "mul")
    assert "something that the step did not make with torch's functions, which holds NaN" in str(error)


class Stepwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.inner(x)[0], inputs[:, None], use_reentrant=False)
        each = torch.func.vmap(lambda row: row.abs().sqrt().log() * 0)(hidden[:, 0])
        out: Tensor = self.head(each * 0 + hidden[:, 0] / 0)
        return out


def test_checkpointed_parts_and_transforms_do_not_stop_the_search() -> None:
    error = caught(Stepwise(), loader())
    assert (error.cause, error.operation) == ("forward", "div")
    assert not error.inexact


class Reentrant(nn.Module):
    """Its inner part is checkpointed in the old way, which calls backward by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.inner(x) + (self.inner(x) * 0).sqrt(), self.body(inputs), use_reentrant=True)
        out: Tensor = self.head(hidden)
        return out


def test_a_part_checkpointed_in_the_old_way_does_not_stop_the_search_of_a_gradient() -> None:
    model = Reentrant()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    data = TensorDataset(torch.ones(20, 3), torch.zeros(20, 1))
    error = caught(model, loader(data), clip_norm=1.0)
    assert (error.cause, error.module, error.operation) == ("backward", "", "CheckpointFunction")
    assert error.parameters == ["body.weight", "body.bias", "inner.weight", "inner.bias"]
    assert not error.inexact
    assert model.head.weight.grad is not None
    assert bool(model.head.weight.grad.isfinite().all())


def test_the_gradients_are_named_where_the_search_of_their_source_fails() -> None:
    @failing_the_second_time
    def step(model: nn.Module, batch: Data) -> Output:
        return Output((model(batch[0]) * 0).sqrt().mean())

    error = caught(line(), loader(), step=step, clip_norm=1.0)
    assert "gradients: not finite are those of weight" in str(error)
    assert "the search for the source failed: OSError: only once" in str(error)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_part_that_is_never_called_is_left_out_of_every_look() -> None:
    def fit(data: Any, **settings: Any) -> None:
        torch.manual_seed(0)
        model = Spare()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, optimizer, nn.MSELoss(), device="cpu", **settings).fit(data, epochs=1)

    fit(loader())
    for settings in ({}, {"clip_norm": 1.0}):
        with pytest.raises(NonFiniteError) as found:
            fit(loader(poisoned(7, math.nan)), **settings)
        assert (found.value.cause, found.value.bad_samples) == ("input", [7])
        assert not found.value.inexact


def test_a_scripted_module_is_seen_from_outside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Log())
    error = caught(Between(scripted), loader())
    assert (error.cause, error.module) == ("forward", "function")


# Unlike architectures, with a fault planted at every leaf in turn.


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


class First(nn.Module):
    """What a recurrent layer gives at its last place."""

    def forward(self, given: tuple[Tensor, Any]) -> Tensor:
        return given[0][:, -1]


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 1)),
        (6,),
    ),
    "residual": (lambda: nn.Sequential(Residual(), Residual(), nn.Linear(6, 1)), (6,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2),
            nn.Flatten(),
            nn.Linear(4, 1),
        ),
        (2, 6, 6),
    ),
    "recurrent": (lambda: nn.Sequential(nn.GRU(3, 5, batch_first=True), First(), nn.Linear(5, 1)), (4, 3)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
            ),
            nn.Flatten(),
            nn.Linear(24, 1),
        ),
        (3, 8),
    ),
}


class Faulty(nn.Module):
    """A module whose output, or whose gradient, is not finite from the third call on."""

    def __init__(self, inner: nn.Module, *, backward: bool) -> None:
        super().__init__()
        self.inner, self.backward, self.calls = inner, backward, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        self.calls += 1
        if self.calls < 3:
            return out
        given = out[0] if isinstance(out, tuple) else out
        spoiled = given + (given * 0).sqrt() if self.backward else given + (given * 0 - 1).log()
        return (spoiled, *out[1:]) if isinstance(out, tuple) else spoiled


def leaves(model: nn.Module) -> list[str]:
    inside = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return [
        name
        for name, module in model.named_modules()
        if not list(module.children()) and not any(name.startswith(attention + ".") for attention in inside)
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fault_at_any_leaf_of_unlike_architectures_is_found_there(architecture: str, backward: bool) -> None:
    make, shape = ARCHITECTURES[architecture]
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(5, *shape, generator=generator), torch.randn(5, 1, generator=generator)) for _ in range(5)]
    names = leaves(make())
    assert len(names) >= 3
    for name in names:
        torch.manual_seed(0)
        model = make()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Faulty(model.get_submodule(name), backward=backward))
        error = caught(model, batches, clip_norm=1.0)
        assert (error.module, error.operation) == (name, "sqrt" if backward else "log"), error
        assert error.step == 3
        assert not error.inexact


def test_where_no_line_of_the_users_ran_the_operation_none_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), device="cpu")
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit([(torch.full((2, 3), math.nan), torch.zeros(2, 1))], epochs=1)
    assert caught.value.cause == "input"
    assert "line" not in str(caught.value).replace("linear", "")


def test_after_an_error_torch_has_no_hooks_left_that_it_would_warn_of_when_it_compiles() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    with pytest.raises(NonFiniteError):
        line_trainer().fit([(x / 0, y)], epochs=1)
    hooks = {name: value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_forward")}
    assert hooks
    assert [name for name, value in hooks.items() if value] == []


def test_an_empty_batch_is_said_to_be_empty() -> None:
    error = caught(line(), [*ragged(2), (torch.ones(0, 3), torch.ones(0, 1))])
    assert (error.cause, error.batch) == ("input", 2)
    assert error.why.startswith("the batch is empty")
    assert "sampler" in error.fix


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_what_is_advised_for_lbfgs_is_no_clipping(clip_norm: float | None) -> None:
    model = line()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e30)
    error = caught(model, loader(), optimizer=optimizer, clip_norm=clip_norm)
    assert "learning rate" in error.fix
    assert "clip_norm=1.0" not in error.fix
    assert ("no clip_norm" in error.fix) == (clip_norm is not None)
