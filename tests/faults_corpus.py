"""Planted faults and healthy runs over unlike architectures, and what the inspector has to say about each.

The limits of the rules were fixed on the cases whose ``half`` is "fixed", and the figures are shown for the others. A
case is built after ``torch.manual_seed(seed)``, so that weights and data differ from seed to seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from faults_nets import Attention, Bag, Recurrent, Residual, cnn, images, mlp, series, tokens, vectors
from loopwright import Every, NonFiniteError, Schedule, Trainer
from loopwright.callbacks import Finding, GradientInspector

SEEDS = range(5, 10)  # 0 to 4 are those with which the limits were fixed
CE, MSE = nn.CrossEntropyLoss, nn.MSELoss


@dataclass
class Plan:
    """What a trainer is given, and for how long it trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: nn.Module
    data: Iterable[Any]
    steps: int = 80
    every: int = 50
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A planted fault, or a healthy run where ``rule`` is None."""

    name: str
    build: Callable[[], Plan]
    rule: str | None = None
    layer: str | None = None  # the layer that has to be named, where there is one

    @property
    def half(self) -> Literal["fixed", "shown"]:
        """Whether the limits were fixed on it."""
        return "fixed" if [c.name for c in (FAULTS if self.rule else HEALTHY)].index(self.name) % 2 == 0 else "shown"


@dataclass(frozen=True)
class Outcome:
    """What the inspector said about one run."""

    case: Case
    seed: int
    findings: tuple[Finding, ...]
    report: str

    @property
    def found(self) -> bool:
        """Whether anything was found."""
        return bool(self.findings)

    @property
    def named(self) -> bool:
        """Whether the first finding is the planted fault, in the right layer."""
        first = self.findings[0] if self.findings else None
        if first is None or first.rule != self.case.rule:
            return False
        return self.case.layer is None or self.case.layer in (first.layer, *first.others)


def inspect(case: Case, seed: int) -> Outcome:
    """Run a case and take down what is found."""
    return run(case, seed)[0]


def run(case: Case, seed: int) -> tuple[Outcome, GradientInspector]:
    """Run a case; what is found, and the inspector itself."""
    torch.manual_seed(seed)
    plan = case.build()
    inspector = GradientInspector(every=Every(steps=plan.every))
    trainer = Trainer(plan.model, plan.optimizer, plan.loss, callbacks=[inspector], device="cpu", **plan.settings)
    try:
        trainer.fit(plan.data, steps=plan.steps)
    except NonFiniteError:
        assert case.rule, f"{case.name} is no healthy run"
    return Outcome(case, seed, inspector.findings, inspector.report()), inspector


def _plan(
    model: nn.Module, loss: type[nn.Module], data: Iterable[Any], *, lr: float = 1e-3, adam: bool = True, **more: Any
) -> Plan:
    own = {f.name for f in dataclasses.fields(Plan)}
    settings = {k: v for k, v in more.items() if k not in own}
    optimizer = Adam(model.parameters(), lr=lr) if adam else SGD(model.parameters(), lr=lr)
    return Plan(model, optimizer, loss(), data, settings=settings, **{k: v for k, v in more.items() if k in own})


def _biased(model: nn.Module, layer: str, by: float, share: float = 1.0) -> nn.Module:
    bias = model.get_submodule(layer).bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias[: round(share * len(bias))] += by
    return model


def _frozen(model: nn.Module, *but: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(but))
    return model


def _batch_norm_in_eval(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    return model


class Sign(nn.Module):
    """Passes no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)


class WithSpare(nn.Module):
    """Has a head that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = mlp(), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Rooted(nn.Module):
    """Takes the square root of what a mask has set to zero."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.last(torch.sqrt(hidden * (hidden > 0)))
        return out


class Scaled(nn.Module):
    """A loss times a number."""

    def __init__(self, loss: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = loss, by

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        out: Tensor = self.by * self.inner(predictions, targets)
        return out


def _head_replaced(model: nn.Sequential, loss: type[nn.Module], data: Iterable[Any]) -> Plan:
    plan = _plan(model, loss, data)
    last = model[-1]
    assert isinstance(last, nn.Linear)
    model[-1] = nn.Linear(last.in_features, last.out_features)
    return plan


def _part(model: nn.Module, part: str, loss: type[nn.Module], data: Iterable[Any]) -> Plan:
    return Plan(model, Adam(model.get_submodule(part).parameters(), lr=1e-3), loss(), data)


def _groups(model: nn.Module, slow: str, lr: float, loss: type[nn.Module], data: Iterable[Any]) -> Plan:
    own = [p for name, p in model.named_parameters() if name.startswith(slow)]
    rest = [p for name, p in model.named_parameters() if not name.startswith(slow)]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": own, "lr": lr}]
    return Plan(model, Adam(groups, lr=1e-3), loss(), data)


def _bfloat16(model: nn.Module, data: Iterable[Any], loss: type[nn.Module], lr: float) -> Plan:
    model = model.to(torch.bfloat16)
    cast = [tuple(t.to(torch.bfloat16) if t.is_floating_point() else t for t in batch) for batch in data]
    return _plan(model, loss, cast, lr=lr, adam=False)


def _run_out(model: nn.Module, loss: type[nn.Module], data: Iterable[Any]) -> Plan:
    plan = _plan(model, loss, data)
    plan.settings["schedule"] = Schedule(LambdaLR(plan.optimizer, lambda step: max(0.0, 1 - step / 20)), each="step")
    return plan


def _warming_up(model: nn.Module, loss: type[nn.Module], data: Iterable[Any]) -> Plan:
    plan = _plan(model, loss, data, steps=100)
    plan.settings["schedule"] = Schedule(LambdaLR(plan.optimizer, lambda step: 1e-6 + step / 1e5), each="step")
    return plan


def _one_cycle(model: nn.Module, loss: type[nn.Module], data: Iterable[Any]) -> Plan:
    plan = _plan(model, loss, data)
    plan.settings["schedule"] = Schedule(OneCycleLR(plan.optimizer, 0.01, total_steps=80), each="step")
    return plan


def _outliers(data: Iterable[Any], every: int, by: float) -> list[Any]:
    """Ready-made batches, of which each so manieth has targets, or inputs where targets are classes, far out."""
    batches = [tuple(batch) for batch in data]
    return [
        ((x, y * by) if y.is_floating_point() else (x * by, y)) if i % every == every - 1 else (x, y)
        for i, (x, y) in enumerate(batches)
    ]


FAULTS: tuple[Case, ...] = (
    Case("sigmoid MLP of 10 layers", lambda: _plan(mlp(10, act=nn.Sigmoid), MSE, vectors()), "vanishing"),
    Case(
        "sigmoid CNN of 8 layers",
        lambda: _plan(cnn(act=nn.Sigmoid, depth=8, batch_norm=False), CE, images()),
        "vanishing",
    ),
    Case(
        "tanh MLP with weights of 0.02",
        lambda: _plan(mlp(8, act=nn.Tanh, std=0.02), MSE, vectors(), adam=False, lr=0.01),
        "vanishing",
    ),
    Case(
        "ReLU MLP with weights of 0.02",
        lambda: _plan(mlp(8, std=0.02, out=3), CE, vectors(classes=3), adam=False, lr=0.01),
        "vanishing",
    ),
    Case("ReLU MLP with a gain of 4", lambda: _plan(mlp(10, gain=4.0), MSE, vectors()), "exploding"),
    Case(
        "CNN of 10 layers with a gain of 5",
        lambda: _plan(cnn(depth=10, batch_norm=False, gain=5.0), CE, images()),
        "exploding",
    ),
    Case(
        "residual branches thirty times too strong",
        lambda: _plan(Residual(8, scale=30.0, norm=False), MSE, vectors()),
        "exploding",
    ),
    Case(
        "linear layers in depth with a gain of 3",
        lambda: _plan(mlp(10, act=nn.Identity, gain=3.0), MSE, vectors()),
        "exploding",
    ),
    Case("MLP, a layer's biases at -20", lambda: _plan(_biased(mlp(5), "4", -20.0), MSE, vectors()), "dead units", "4"),
    Case(
        "CNN, a layer's biases at -20",
        lambda: _plan(_biased(cnn(batch_norm=False), "2", -20.0), CE, images()),
        "dead units",
        "2",
    ),
    Case(
        "MLP, most of a layer's biases at -20",
        lambda: _plan(_biased(mlp(5), "2", -20.0, 0.8), MSE, vectors()),
        "dead units",
        "2",
    ),
    Case(
        "transformer, feed-forward biases at -50",
        lambda: _plan(_biased(Attention(), "layers.1.linear1", -50.0), CE, tokens()),
        "dead units",
        "layers.1.linear1",
    ),
    Case(
        "bag of embeddings, hidden biases at -20",
        lambda: _plan(_biased(Bag(), "hidden", -20.0), CE, tokens()),
        "dead units",
        "hidden",
    ),
    Case(
        "an activation without a derivative",
        lambda: _plan(nn.Sequential(nn.Linear(16, 32), Sign(), nn.Linear(32, 1)), MSE, vectors()),
        "dead units",
        "0",
    ),
    Case(
        "tanh MLP on inputs in the hundreds",
        lambda: _plan(mlp(3, act=nn.Tanh), MSE, vectors(scale=300.0)),
        "saturated",
        "1",
    ),
    Case(
        "sigmoid MLP on inputs in the hundreds",
        lambda: _plan(mlp(3, act=nn.Sigmoid), MSE, vectors(scale=100.0, shift=100.0)),
        "saturated",
        "1",
    ),
    Case("tanh MLP with a gain of 30", lambda: _plan(mlp(5, act=nn.Tanh, gain=30.0), MSE, vectors()), "saturated"),
    Case(
        "tanh RNN on inputs in the hundreds",
        lambda: _plan(Recurrent(nn.RNN), MSE, series(scale=300.0)),
        "saturated",
        "rnn",
    ),
    Case(
        "all but the last layer frozen, all in the optimizer",
        lambda: _plan(_frozen(mlp(), "6"), MSE, vectors()),
        "frozen",
        "0",
    ),
    Case(
        "a transformer's layers frozen, all in the optimizer",
        lambda: _plan(_frozen(Attention(), "head", "embedding"), CE, tokens()),
        "frozen",
        "layers.0.linear1",
    ),
    Case(
        "CNN, batch norm in eval mode from the start",
        lambda: _plan(_batch_norm_in_eval(cnn()), CE, images()),
        "frozen",
        "1",
    ),
    Case(
        "MLP, batch norm in eval mode from the start",
        lambda: _plan(_batch_norm_in_eval(mlp(batch_norm=True)), MSE, vectors()),
        "frozen",
        "1",
    ),
    Case("a head that is never called", lambda: _plan(WithSpare(), MSE, vectors()), "no gradient", "spare"),
    Case("a detach between residual blocks", lambda: _cut_residual(), "no gradient", "blocks.3.3"),
    Case("an encoder under no_grad", lambda: _cut_attention(), "no gradient", "layers.1.norm2"),
    Case("embeddings taken by .data", lambda: _cut_bag(), "no gradient", "table"),
    Case(
        "a head replaced after the optimizer was made",
        lambda: _head_replaced(mlp(out=3), CE, vectors(classes=3)),
        "not in the optimizer",
        "6",
    ),
    Case(
        "CNN, a head replaced after the optimizer was made",
        lambda: _head_replaced(cnn(), CE, images()),
        "not in the optimizer",
        "11",
    ),
    Case(
        "an LSTM whose head the optimizer lacks",
        lambda: _part(Recurrent(), "rnn", MSE, series()),
        "not in the optimizer",
        "head",
    ),
    Case(
        "a transformer of which only the head is held",
        lambda: _part(Attention(), "head", CE, tokens()),
        "not in the optimizer",
        "embedding",
    ),
    Case(
        "a parameter group with a rate of 0",
        lambda: _groups(Recurrent(), "rnn", 0.0, MSE, series()),
        "not moving",
        "rnn",
    ),
    Case("embeddings with a rate of 0", lambda: _groups(Bag(), "table", 0.0, CE, tokens()), "not moving", "table"),
    Case("bfloat16 weights and a small rate", lambda: _bfloat16(mlp(3), vectors(), MSE, 1e-6), "not moving"),
    Case(
        "CNN in bfloat16 and a small rate", lambda: _bfloat16(cnn(batch_norm=False), images(), CE, 1e-6), "not moving"
    ),
    Case("a schedule that has run out", lambda: _run_out(mlp(), MSE, vectors()), "not moving"),
    Case("a transformer's schedule that has run out", lambda: _run_out(Attention(), CE, tokens()), "not moving"),
    Case("Adam with a rate of 1", lambda: _plan(mlp(), MSE, vectors(), lr=1.0), "updates too large"),
    Case(
        "a transformer, Adam with a rate of 0.5", lambda: _plan(Attention(), CE, tokens(), lr=0.5), "updates too large"
    ),
    Case("SGD with a rate of 3", lambda: _plan(mlp(), MSE, vectors(), lr=3.0, adam=False), "updates too large"),
    Case(
        "targets in the thousands",
        lambda: _plan(Recurrent(nn.GRU), MSE, [(x, 3000 * y) for x, y in series()], lr=0.1, adam=False),
        "updates too large",
    ),
    Case("SGD with a rate of 2e-6", lambda: _plan(mlp(), MSE, vectors(), lr=2e-6, adam=False), "updates too small"),
    Case("CNN, SGD with a rate of 2e-6", lambda: _plan(cnn(), CE, images(), lr=2e-6, adam=False), "updates too small"),
    Case("LSTM, Adam with a rate of 3e-8", lambda: _plan(Recurrent(), MSE, series(), lr=3e-8), "updates too small"),
    Case("a loss of a hundred-thousandth", lambda: _tiny_loss(), "updates too small"),
    Case(
        "targets far out in one batch of 8",
        lambda: _plan(mlp(), MSE, _outliers(vectors(), 8, 100.0), every=1),
        "spikes",
    ),
    Case(
        "LSTM, targets far out in one batch of 12",
        lambda: _plan(Recurrent(), MSE, _outliers(series(), 12, 200.0), every=1),
        "spikes",
    ),
    Case(
        "inputs far out in one batch of 8",
        lambda: _plan(mlp(out=3), CE, _outliers(vectors(classes=3), 8, 100.0), every=1),
        "spikes",
    ),
    Case(
        "CNN, pictures far out in one batch of 12",
        lambda: _plan(cnn(batch_norm=False), CE, _outliers(images(), 12, 200.0), every=1),
        "spikes",
    ),
    Case("clip_norm of 0.001", lambda: _plan(mlp(), MSE, vectors(), clip_norm=1e-3), "always clipped"),
    Case(
        "CNN, targets in the hundreds under clip_norm=1",
        lambda: _plan(cnn(out=1), MSE, images(classes=0, target=300.0), clip_norm=1.0),
        "always clipped",
    ),
    Case(
        "a transformer under clip_norm=0.01", lambda: _plan(Attention(), CE, tokens(), clip_norm=0.01), "always clipped"
    ),
    Case("LSTM under clip_norm=0.0001", lambda: _plan(Recurrent(), MSE, series(), clip_norm=1e-4), "always clipped"),
    Case(
        "a square root at zero",
        lambda: _plan(Rooted(nn.Linear(16, 32), nn.Linear(32, 1)), MSE, vectors()),
        "not finite",
        "first",
    ),
    Case(
        "CNN, a square root at zero",
        lambda: _plan(Rooted(cnn(out=8), nn.Linear(8, 4)), CE, images()),
        "not finite",
        "first.11",
    ),
)

HEALTHY: tuple[Case, ...] = (
    Case("MLP, Adam", lambda: _plan(mlp(), MSE, vectors())),
    Case("MLP, SGD with momentum", lambda: _momentum()),
    Case("residual network of 8 blocks at standard initialisation", lambda: _plan(Residual(), MSE, vectors())),
    Case(
        "residual network of 16 blocks without normalisation",
        lambda: _plan(Residual(16, norm=False, scale=0.25), MSE, vectors()),
    ),
    Case("residual network, SGD", lambda: _plan(Residual(out=3), CE, vectors(classes=3), lr=0.05, adam=False)),
    Case("CNN with batch norm, Adam", lambda: _plan(cnn(), CE, images())),
    Case("CNN with batch norm of 6 layers, SGD", lambda: _plan(cnn(depth=6), CE, images(), lr=0.05, adam=False)),
    Case("CNN without normalisation", lambda: _plan(cnn(batch_norm=False), CE, images())),
    Case("LSTM", lambda: _plan(Recurrent(), MSE, series())),
    Case("GRU", lambda: _plan(Recurrent(nn.GRU), MSE, series(), lr=3e-3)),
    Case("tanh RNN", lambda: _plan(Recurrent(nn.RNN), MSE, series())),
    Case("transformer, normalised first", lambda: _plan(Attention(), CE, tokens())),
    Case(
        "transformer, normalised last, with dropout",
        lambda: _plan(Attention(norm_first=False, dropout=0.1), CE, tokens()),
    ),
    Case("transformer of 4 layers under clip_norm=1", lambda: _plan(Attention(4), CE, tokens(), clip_norm=1.0)),
    Case("bag of embeddings", lambda: _plan(Bag(), CE, tokens(), lr=3e-3)),
    Case("bag of sparse embeddings, SGD", lambda: _plan(Bag(sparse=True), CE, tokens(), lr=0.1, adam=False)),
    Case("tanh MLP", lambda: _plan(mlp(5, act=nn.Tanh), MSE, vectors())),
    Case("GELU MLP of 8 layers with batch norm", lambda: _plan(mlp(8, act=nn.GELU, batch_norm=True), MSE, vectors())),
    Case("ReLU MLP of 12 layers at He's initialisation", lambda: _plan(mlp(12, width=64, gain=2**0.5), MSE, vectors())),
    Case(
        "logistic regression, SGD",
        lambda: _plan(nn.Sequential(nn.Linear(16, 3)), CE, vectors(classes=3), lr=0.1, adam=False),
    ),
    Case("linear regression until it has converged", lambda: _converged()),
    Case("fine-tuning, the frozen part left out of the optimizer", lambda: _tuned()),
    Case("warm-up from a rate of almost 0", lambda: _warming_up(mlp(), MSE, vectors())),
    Case("one cycle of the rate", lambda: _one_cycle(cnn(), CE, images())),
    Case("batches of one", lambda: _plan(mlp(3), MSE, vectors(size=1), steps=200)),
    Case("four batches a step", lambda: _plan(mlp(), MSE, vectors(), accumulate=4, steps=40)),
    Case("bfloat16 autocast", lambda: _plan(Attention(), CE, tokens(), precision="bf16")),
    Case("float16 autocast", lambda: _plan(mlp(), MSE, vectors(), precision="fp16")),
    Case("a sigmoid at the end, sure of itself", lambda: _sure()),
    Case("every step inspected", lambda: _plan(cnn(), CE, images(), every=1)),
)


def _momentum() -> Plan:
    model = mlp()
    return Plan(model, SGD(model.parameters(), lr=0.01, momentum=0.9), MSE(), vectors())


def _cut_residual() -> Plan:
    model = Residual()
    model.detached_after = 3
    return _plan(model, MSE, vectors())


def _cut_attention() -> Plan:
    model = Attention()
    model.no_grad = True
    return _plan(model, CE, tokens())


def _cut_bag() -> Plan:
    model = Bag()
    model.cut = True
    return _plan(model, CE, tokens())


def _tiny_loss() -> Plan:
    plan = _plan(Attention(), CE, tokens(), lr=0.3, adam=False)
    plan.loss = Scaled(CE(), 1e-5)
    return plan


def _converged() -> Plan:
    x = torch.randn(64, 16)
    y = x @ torch.randn(16, 1)
    return _plan(nn.Linear(16, 1), MSE, [(x, y)], lr=0.1, adam=False, steps=600)


def _tuned() -> Plan:
    model = _frozen(mlp(out=3), "6")
    return Plan(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), CE(), vectors(classes=3))


def _sure() -> Plan:
    x = torch.randn(256, 16)
    y = (x[:, :1] > 0).float()
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 256, 16)]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    return _plan(model, nn.BCELoss, batches, lr=0.02, steps=400)
