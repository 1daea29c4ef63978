"""Problems for the preflight: healthy ones over unlike models and data, and planted faults for each check."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from loopwright import Output, Trainer

Problem = tuple[Trainer[Any, Any], Any, Any]  # and its training and validation data


def mlp(outputs: int = 1, *, inputs: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


def trained_by(model: nn.Module, loss: Any = None, **settings: Any) -> Trainer[Any, Any]:
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.05)
    return Trainer(model, optimizer, loss, device="cpu", **settings)


def regression(n: int = 40, *, seed: int = 0) -> TensorDataset:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :1] - x[:, 1:2])


def classes(n: int = 40, *, count: int = 3, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, torch.arange(n)[torch.randperm(n, generator=generator)] % count)


def loader(dataset: Any, size: int = 8, *, shuffle: bool = True, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, size, shuffle=shuffle, **settings)


def over(model: nn.Module, loss: Any, dataset: Any, **settings: Any) -> Problem:
    return trained_by(model, loss, **settings), loader(dataset), None


class Residual(nn.Module):
    """A small residual network with batch norm, on images."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            for _ in range(blocks)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        out: Tensor = self.head(hidden.relu().mean((2, 3)))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(5, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.recurrent(inputs)[0][:, -1])
        return out


class Tokens(nn.Module):
    """Embeddings, attention with dropout, and an output for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.place = nn.Parameter(torch.zeros(1, 7, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embedding(tokens) + self.place))
        return out


class ZeroHead(nn.Module):
    """Begins with the same output for every sample, as careful initialisations do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(8), nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(inputs).relu())
        return out


class Scaled(nn.Module):
    """Takes pixels as they are, and normalises them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.body(pixels / 255 - 0.5)
        return out


def _by_token(model: nn.Module, batch: dict[str, Tensor]) -> Output:
    logits = model(batch["tokens"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["next"].flatten(), ignore_index=0)
    return Output(loss, weight=(batch["next"] != 0).sum(), predictions=logits, targets=batch["next"])


def _tokens() -> Problem:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 11, (30, 8), generator=generator)
    data = [{"tokens": row[:-1], "next": row[1:]} for row in rows]
    return trained_by(Tokens(), step=_by_token), loader(data), loader([*data[:4]], shuffle=False)


def _images() -> Problem:
    generator = torch.Generator().manual_seed(4)
    data = TensorDataset(torch.randn(41, 3, 6, 6, generator=generator), torch.arange(41) % 4)
    return trained_by(Residual(), nn.CrossEntropyLoss()), loader(data), None  # a last batch of one, of many pixels


def _sequences(kind: Callable[..., nn.Module]) -> Problem:
    data = TensorDataset(torch.randn(20, 4, 5), torch.randn(20, 2))
    return trained_by(Recurrent(kind), nn.SmoothL1Loss(), clip_norm=1.0), loader(data), None


def _two_parts(n: int = 60) -> Problem:
    whole = regression(n)
    train, val = Subset(whole, range(40)), Subset(whole, range(40, n))
    return trained_by(mlp(), nn.MSELoss()), loader(train), loader(val, shuffle=False)


def _pixels() -> Problem:
    data = TensorDataset(255 * torch.rand(40, 6), torch.arange(40) % 3)
    return over(Scaled(), nn.CrossEntropyLoss(), data)


class Stream:
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def _stream() -> Problem:
    batches = [(torch.randn(9, 6), torch.randn(9, 1)) for _ in range(4)]
    return trained_by(mlp(), nn.L1Loss(), accumulate=2), Stream(batches), batches[:1]


HEALTHY: dict[str, Callable[[], Problem]] = {
    "mlp": lambda: over(mlp(), nn.MSELoss(), regression()),
    "deep mlp": lambda: over(
        nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        classes(),
    ),
    "class weights": lambda: over(mlp(3), nn.CrossEntropyLoss(torch.tensor([1.0, 50.0, 1.0])), classes()),
    "log-probabilities": lambda: over(nn.Sequential(mlp(3), nn.LogSoftmax(1)), nn.NLLLoss(), classes()),
    "two classes": lambda: over(
        nn.Sequential(mlp(), nn.Flatten(0)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(30.0)),
        TensorDataset(torch.randn(40, 6), (torch.arange(40) % 2).float()),
    ),
    "probabilities": lambda: over(
        nn.Sequential(mlp(), nn.Sigmoid()), nn.BCELoss(), TensorDataset(torch.randn(40, 6), torch.rand(40, 1))
    ),
    "kaiming": lambda: over(_kaiming(mlp(3)), nn.CrossEntropyLoss(), classes()),
    "residual": _images,
    "lstm": lambda: _sequences(nn.LSTM),
    "gru": lambda: _sequences(nn.GRU),
    "tokens": _tokens,
    "zero head": lambda: over(ZeroHead(), nn.CrossEntropyLoss(), classes()),
    "pixels scaled within": _pixels,
    "two parts": _two_parts,
    "broadcasts that are meant": lambda: (
        trained_by(Centres(), step=_broadcasts_on_purpose),
        loader(regression()),
        None,
    ),
    "two labels in order": lambda: _in_order(torch.arange(80.0).reshape(40, 2) > 39),
    "probabilities in order": lambda: _in_order(torch.linspace(0, 1, 40)[:, None]),
    "stream": _stream,
    "bf16": lambda: over(mlp(3), nn.CrossEntropyLoss(), classes(), precision="bf16"),
    "fp16": lambda: over(mlp(), nn.MSELoss(), regression(), precision="fp16"),
    "sparse": lambda: _sparse(),
    "lbfgs": lambda: _lbfgs(),
    "one parameter frozen": lambda: _frozen(),
    "dropout and adam": lambda: _adam(),
    "norm before all": lambda: over(
        nn.Sequential(nn.BatchNorm1d(6), mlp(3)),
        nn.CrossEntropyLoss(),
        TensorDataset(300 * torch.randn(40, 6), _thirds()),
    ),
    "backward part by part": lambda: (trained_by(mlp(), step=_part_by_part), loader(regression()), None),
    "a loss with a parameter": lambda: _held_by_a_loss(),
    "a sum": lambda: over(mlp(), nn.MSELoss(reduction="sum"), regression()),
    "a sum over a window": lambda: over(mlp(), nn.MSELoss(reduction="sum"), regression(), accumulate=2),
    "each sample for itself": lambda: _reduced_by_itself(),
    "compiled": lambda: over(mlp(), nn.MSELoss(), regression(), compile=True),
    "workers": lambda: (trained_by(mlp(), nn.MSELoss()), loader(regression(), num_workers=1), None),
}


class Halved(nn.MSELoss):
    """It weighs the errors, and takes the mean of them itself."""

    def __init__(self) -> None:
        super().__init__(reduction="none")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).mean() / 2


def _reduced_by_itself() -> Problem:
    return over(mlp(), Halved(), regression())


def _in_order(targets: Tensor) -> Problem:
    """Of several labels to a sample, or of soft ones, no order is that of two classes."""
    model = mlp(targets.shape[1])
    data = TensorDataset(torch.randn(40, 6), targets.float())
    return trained_by(model, nn.BCEWithLogitsLoss()), loader(data, shuffle=False), None


def _thirds() -> Tensor:
    return torch.arange(40) % 3


def _kaiming(model: nn.Sequential) -> nn.Sequential:
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def _sparse() -> Problem:
    model = nn.Sequential(nn.EmbeddingBag(20, 6, sparse=True), nn.Linear(6, 3))
    data = TensorDataset(torch.randint(0, 20, (40, 5)), torch.arange(40) % 3)
    return over(model, nn.CrossEntropyLoss(), data)


def _lbfgs() -> Problem:
    model = mlp()
    return over(model, nn.MSELoss(), regression(), optimizer=torch.optim.LBFGS(model.parameters(), lr=0.1))


def _frozen() -> Problem:
    model = mlp()
    next(model.parameters()).requires_grad_(False)
    held = [p for p in model.parameters() if p.requires_grad]
    return over(model, nn.MSELoss(), regression(), optimizer=torch.optim.SGD(held, lr=0.1))


def _adam() -> Problem:
    model = nn.Sequential(nn.Dropout(0.3), mlp(3))
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)  # which wraps optimizer.step
    assert scheduler.optimizer is optimizer
    return over(model, nn.CrossEntropyLoss(), classes(), optimizer=optimizer)


@dataclass(frozen=True)
class Fault:
    """A problem with a fault, the check that finds it, and words that its row has to hold."""

    check: str
    words: str
    problem: Callable[[], Problem]


class Forgets(nn.Module):
    """Has a layer that forward does not call."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.used = mlp()
        self.forgotten = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.used(inputs)
        return out


class Detaches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(inputs).detach())
        return out


class IgnoresInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.out(torch.ones_like(inputs))
        return out


class Noisy(nn.Module):
    """Draws from a generator that nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        noise = 1e-3 * random.SystemRandom().random()
        out: Tensor = self.second(self.first(inputs) + noise)
        return out


CALLS = [0]


def _counts_calls(model: nn.Module, batch: Any) -> Tensor:
    """A loss that depends on a state outside of the model."""
    CALLS[0] += 1
    return F.mse_loss(model(batch[0]), batch[1]) * (1 + 1e-3 * CALLS[0])


class RaisesAt(Dataset[Any]):
    def __init__(self, index: int) -> None:
        self.index = index

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index == self.index:
            raise OSError(f"sample {index} cannot be read")
        return torch.randn(6), torch.randn(1)


def _backward_too(model: nn.Module, batch: Any, *, keep: bool = True) -> Tensor:
    loss = F.mse_loss(model(batch[0]), batch[1])
    loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]  # torch has no annotation there
    return loss


class AboutCentre(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(1))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predictions - self.centre, targets)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = self(model(batch[0]), batch[1])
        return loss


def _part_by_part(model: nn.Module, batch: Any) -> Tensor:
    """Calls backward on one half, and leaves the other to the trainer, as one does to spare memory."""
    half = len(batch[0]) // 2
    first = F.mse_loss(model(batch[0][:half]), batch[1][:half]) / 2
    first.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
    return F.mse_loss(model(batch[0][half:]), batch[1][half:]) / 2


def _held_by_a_loss() -> Problem:
    model, loss = mlp(), AboutCentre()
    return over(model, loss, regression(), optimizer=torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1))


def _by_hand(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = ((model(batch[0]) - batch[1]) ** 2).mean()
    return loss


def _squeezed_by_hand(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1].squeeze(1)).square().mean()
    return loss


def _off_by_another(model: nn.Module, batch: Any) -> Tensor:
    """As of values in reinforcement learning: the target is made by a model without a gradient."""
    x, y = batch
    with torch.no_grad():
        best = model(x.roll(1, 0)).max(1).values
    loss: Tensor = (y[:, 0] + 0.9 * best - model(x)).square().mean()
    return loss


class Centres(nn.Module):
    """As many centres as there are samples in a batch, which is no more than chance."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.widths = nn.Parameter(torch.linspace(-2, 2, 8)), nn.Parameter(torch.zeros(8))
        self.bias, self.head = nn.Parameter(torch.zeros(1)), nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        column = inputs[:, :1].clone()
        near = (-(column - self.centres).square()).exp() - (column - self.widths.exp().cumsum(0)).tanh()
        out: Tensor = self.head(near) - self.bias
        return out


def _broadcasts_on_purpose(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    out = model(x)
    wanted = y.double()[:, 0].float()
    apart = (out[:, 0][:, None] - out[:, 0][None, :]).abs() - (wanted[:, None] - wanted[None, :]).abs()
    moments = (out - y.mean(0)).mean().square() + (out - y.mean()).std() - (out - out.mean(0)).std()
    steps = (torch.arange(8.0) - out).tanh().mean() + (torch.linspace(0, 1, 8).to(x) - out).tanh().mean()
    steps = steps + (x.new_ones(8).cumsum(0) - out).tanh().mean() + (torch.ones_like(x[:, 0]) - out).tanh().mean()
    between = (x[:, None, 0] - x[None, :, 0]).mean() + (out - y.T).tanh().mean()
    loss: Tensor = F.mse_loss(out, y) + 0.01 * (apart.square().mean() + moments + steps + between)
    return loss


def _classes_by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _mse_by_hand(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(batch[1], model(batch[0]))


def _misnamed(model: Any, batch: Any) -> Tensor:
    x, y = batch
    loss: Tensor = model.layers(x).sum() + y.sum()
    return loss


def _nan_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) * 0).sum().log() * 0
    return loss


def _with(dataset: TensorDataset, index: int, value: Any) -> TensorDataset:
    tensors = [tensor.clone() for tensor in dataset.tensors]
    tensors[index] = value(tensors[index])
    return TensorDataset(*tensors)


def _replaced_head() -> Problem:
    model = mlp(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[2] = nn.Linear(16, 5)
    return over(model, nn.CrossEntropyLoss(), classes(count=5), optimizer=optimizer)


def _half_held() -> Problem:
    model = mlp()
    return over(model, nn.MSELoss(), regression(), optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1))


def _stranger() -> Problem:
    model, other = mlp(), nn.Linear(3, 3)
    both: Optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    return over(model, nn.MSELoss(), regression(), optimizer=both)


def _twice() -> Problem:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].append(model[0].weight)
    return over(model, nn.MSELoss(), regression(), optimizer=optimizer)


def _normed(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def _dead_end() -> Problem:
    model = mlp()
    with torch.no_grad():
        [*model.parameters()][-1].fill_(-100)
    return over(nn.Sequential(model, nn.ReLU()), nn.MSELoss(), regression())


def _loud(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        [*model.parameters()][2].mul_(200)
    return model


def _validated(val: Any, *, model: nn.Module | None = None, **settings: Any) -> Problem:
    return trained_by(mlp() if model is None else model, nn.MSELoss(), **settings), loader(regression()), val


class WrongMetric:
    def reset(self) -> None: ...

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        raise TypeError("targets must be integers")

    def compute(self) -> float:
        return 0.0


class BadInEval(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.body(inputs)
        return out if self.training else out * math.nan


def _one_dataset() -> Problem:
    whole = regression(60)
    return trained_by(mlp(), nn.MSELoss()), loader(Subset(whole, range(45))), loader(Subset(whole, range(40, 60)))


def _one_memory() -> Problem:
    x, y = regression(60).tensors
    train, val = TensorDataset(x[:45], y[:45]), TensorDataset(x[40:], y[40:])
    return trained_by(mlp(), nn.MSELoss()), loader(train), loader(val)


def _same_loader() -> Problem:
    data = loader(regression())
    return trained_by(mlp(), nn.MSELoss()), data, data


def _same_batches() -> Problem:
    batches = [(torch.randn(4, 6), torch.randn(4, 1)) for _ in range(4)]
    return trained_by(mlp(), nn.MSELoss()), batches[:3], batches[2:]


def _sorted(count: int) -> Problem:
    data = classes(count=count)
    data = TensorDataset(data.tensors[0], data.tensors[1].sort().values)
    return trained_by(mlp(count), nn.CrossEntropyLoss()), loader(data, shuffle=False), None


def _seldom_wrong(n: int = 400) -> Problem:
    data = _with(classes(n), 1, lambda y: torch.where(torch.arange(n) == n - 1, 3, y))
    return trained_by(mlp(3), nn.CrossEntropyLoss()), loader(data, shuffle=False), None


_RUNS, _FINITE, _SHAPES = "a training step runs", "loss is finite", "shapes of prediction and target"
_REDUCED = "reduction of the loss"
_GIVEN, _LABELS, _START = "what the loss is given", "labels and indices", "loss at the start"
_REACHED, _HELD, _NORM = "parameters get a gradient", "parameters in the optimizer", "batch norm and batch sizes"
_INPUTS, _DEPEND, _BITS = "inputs are normalised", "outputs depend on the inputs", "two runs give the same bits"
_VAL, _APART, _ORDER = "a validation step runs", "training and validation apart", "order of the classes"

FAULTS: dict[str, Fault] = {
    "a misspelt layer": Fault(
        _RUNS, "loss: Tensor = model.layers(x)", lambda: (trained_by(mlp(), step=_misnamed), loader(regression()), None)
    ),
    "too few features": Fault(_RUNS, "cannot be multiplied", lambda: over(mlp(inputs=5), nn.MSELoss(), regression())),
    "a sample that cannot be read": Fault(
        _RUNS,
        "sample 3 cannot be read",
        lambda: (trained_by(mlp(), nn.MSELoss()), loader(RaisesAt(3), shuffle=False), None),
    ),
    "nothing to learn from": Fault(
        _RUNS,
        "does not depend on any trainable parameter",
        lambda: (
            trained_by(mlp(), step=lambda model, batch: model(batch[0]).detach().mean()),
            loader(regression()),
            None,
        ),
    ),
    "a logarithm of zero": Fault(
        _FINITE, "the loss of batch 1 is nan", lambda: (trained_by(mlp(), step=_nan_loss), loader(regression()), None)
    ),
    "a missing value": Fault(
        _FINITE,
        "1 of 240 input values",
        lambda: (trained_by(mlp(), nn.MSELoss()), loader(_with(regression(), 0, _hole), 16, shuffle=False), None),
    ),
    "a rate far too high": Fault(
        _FINITE,
        "a smaller learning rate",
        lambda: over(m := mlp(), nn.MSELoss(), regression(), optimizer=torch.optim.SGD(m.parameters(), lr=1e30)),
    ),
    "a flat target": Fault(
        _SHAPES,
        "(8, 1), the target (8,)",
        lambda: over(mlp(), nn.MSELoss(), _with(regression(), 1, lambda y: y.flatten())),
    ),
    "a flat target in a step": Fault(
        _SHAPES,
        "a prediction (8,) and a target (8, 1)",
        lambda: (trained_by(mlp(), step=_mse_by_hand), loader(_with(regression(), 1, lambda y: y.flatten())), None),
    ),
    "a flat target by hand": Fault(
        _SHAPES,
        "a prediction (8, 1) and a target (8,)",
        lambda: (trained_by(mlp(), step=_by_hand), loader(_with(regression(), 1, lambda y: y.flatten())), None),
    ),
    "a target squeezed by hand": Fault(
        _SHAPES,
        "a prediction (8, 1) and a target (8,)",
        lambda: (trained_by(mlp(), step=_squeezed_by_hand), loader(regression()), None),
    ),
    "a target of another model": Fault(
        _SHAPES,
        "a prediction (8, 1) and a target (8,)",
        lambda: (trained_by(mlp(), step=_off_by_another), loader(regression()), None),
    ),
    "softmax twice": Fault(
        _GIVEN, "out of softmax", lambda: over(nn.Sequential(mlp(3), nn.Softmax(1)), nn.CrossEntropyLoss(), classes())
    ),
    "sigmoid twice": Fault(
        _GIVEN,
        "out of sigmoid",
        lambda: over(
            nn.Sequential(mlp(), nn.Sigmoid()),
            nn.BCEWithLogitsLoss(),
            TensorDataset(torch.randn(40, 6), torch.ones(40, 1)),
        ),
    ),
    "no log-softmax": Fault(_GIVEN, "nll_loss", lambda: over(mlp(3), nn.NLLLoss(), classes())),
    "one class": Fault(_GIVEN, "one class", lambda: over(mlp(1), nn.CrossEntropyLoss(), classes(count=1))),
    "one class in a step": Fault(
        _GIVEN,
        "and targets.unsqueeze(1).float()",
        lambda: (trained_by(mlp(1), step=_classes_by_hand), loader(classes(count=1)), None),
    ),
    "a loss for each element": Fault(
        _REDUCED, "MSELoss has reduction='none'", lambda: over(mlp(), nn.MSELoss(reduction="none"), regression())
    ),
    "a loss for each sample": Fault(
        _REDUCED,
        'CrossEntropyLoss(reduction="mean")',
        lambda: over(mlp(3), nn.CrossEntropyLoss(reduction="none"), classes()),
    ),
    "labels from 1": Fault(
        _LABELS,
        "from 1 to 3, with 3 classes",
        lambda: over(mlp(3), nn.CrossEntropyLoss(), _with(classes(), 1, lambda y: y + 1)),
    ),
    "a word too many": Fault(
        _LABELS,
        "with 5 rows",
        lambda: over(
            nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2)),
            nn.CrossEntropyLoss(),
            TensorDataset(torch.full((40, 2), 5), torch.arange(40) % 2),
        ),
    ),
    "a wrong label far behind": Fault(_LABELS, "1 labels of the training data", _seldom_wrong),
    "targets of -1 and 1": Fault(
        _LABELS,
        "from -1 to 1",
        lambda: over(
            mlp(), nn.BCEWithLogitsLoss(), TensorDataset(torch.randn(40, 6), (torch.arange(40.0) % 2 * 2 - 1)[:, None])
        ),
    ),
    "loud logits": Fault(
        _START, "is what guessing gives", lambda: over(_loud(mlp(3)), nn.CrossEntropyLoss(), classes())
    ),
    "loud binary logits": Fault(
        _START,
        "log(2)",
        lambda: over(
            _loud(mlp()), nn.BCEWithLogitsLoss(), TensorDataset(torch.randn(40, 6), (torch.arange(40.0) % 2)[:, None])
        ),
    ),
    "loud probabilities": Fault(
        _START,
        "binary_cross_entropy is ",
        lambda: over(
            nn.Sequential(_loud(mlp()), nn.Sigmoid()),
            nn.BCELoss(torch.full((1,), 0.01), reduction="sum"),
            TensorDataset(torch.randn(40, 6), (torch.arange(40.0) % 2)[:, None]),
        ),
    ),
    "tiny targets": Fault(
        _START, "predicting 0 is off by", lambda: over(mlp(), nn.MSELoss(), _with(regression(), 1, lambda y: y / 1000))
    ),
    "years": Fault(
        _START,
        "predicting their mean",
        lambda: (trained_by(mlp(), nn.L1Loss()), loader(_with(regression(), 1, lambda y: 1990 + y), 20), None),
    ),
    "a forgotten layer": Fault(_REACHED, "forgotten.0.weight", lambda: over(Forgets(), nn.MSELoss(), regression())),
    "a detached body": Fault(_REACHED, "body.weight, body.bias", lambda: over(Detaches(), nn.MSELoss(), regression())),
    "a dead end": Fault(_REACHED, "exactly 0", _dead_end),
    "backward in the step": Fault(
        _REACHED, "twice as large", lambda: (trained_by(mlp(), step=_backward_too), loader(regression()), None)
    ),
    "backward in the step, under fp16": Fault(
        _REACHED,
        "leave backward out",
        lambda: (trained_by(mlp(), step=_backward_too, precision="fp16"), loader(regression()), None),
    ),
    "backward in the step, and no graph left": Fault(
        _RUNS,
        "leave backward out",
        lambda: (trained_by(mlp(), step=lambda m, b: _backward_too(m, b, keep=False)), loader(regression()), None),
    ),
    "the parameters of a loss": Fault(_HELD, "centre of AboutCentre", lambda: over(mlp(), AboutCentre(), regression())),
    "a replaced head": Fault(_HELD, "2.weight, 2.bias", _replaced_head),
    "half of the model": Fault(_HELD, "0.weight, 0.bias", _half_held),
    "a stranger": Fault(_HELD, "2 that are not the model's", _stranger),
    "a parameter twice": Fault(_HELD, "1 are in SGD twice", _twice),
    "a last batch of one": Fault(_NORM, "8 and 1", lambda: over(_normed(), nn.MSELoss(), regression(41))),
    "a last batch of one in a list": Fault(
        _NORM,
        "4 and 1",
        lambda: (
            trained_by(_normed(), nn.MSELoss()),
            [(torch.randn(n, 6), torch.randn(n, 1)) for n in (4, 4, 4, 1)],
            None,
        ),
    ),
    "batches of one": Fault(
        _NORM, "batches are of 1;", lambda: (trained_by(_normed(), nn.MSELoss()), loader(regression(), 1), None)
    ),
    "raw pixels": Fault(
        _INPUTS,
        "all features",
        lambda: over(mlp(3), nn.CrossEntropyLoss(), _with(classes(), 0, lambda x: 255 * torch.rand_like(x))),
    ),
    "one raw feature": Fault(
        _INPUTS,
        "feature 2 of 6",
        lambda: over(
            mlp(3), nn.CrossEntropyLoss(), _with(classes(), 0, lambda x: x * torch.tensor([1, 1, 1e4, 1, 1, 1]))
        ),
    ),
    "tiny inputs": Fault(
        _INPUTS,
        "no feature is larger",
        lambda: over(mlp(3), nn.CrossEntropyLoss(), _with(classes(), 0, lambda x: x / 1e5)),
    ),
    "an offset": Fault(
        _INPUTS,
        "feature 0 of 6 has mean 30",
        lambda: (
            trained_by(mlp(3), nn.CrossEntropyLoss()),
            loader(_with(classes(), 0, lambda x: x + torch.tensor([30.0, 0, 0, 0, 0, 0])), 20),
            None,
        ),
    ),
    "missing values": Fault(
        _INPUTS,
        "feature 1 of 6",
        lambda: (trained_by(mlp(), nn.MSELoss()), loader(_with(regression(), 0, _hole), 16, shuffle=False), None),
    ),
    "an ignored input": Fault(
        _DEPEND, "same prediction", lambda: over(IgnoresInput(), nn.CrossEntropyLoss(), classes())
    ),
    "words that do not get through": Fault(
        _DEPEND,
        "same prediction",
        lambda: over(
            nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Threshold(1e9, 1.0), nn.Linear(8, 2)),
            nn.CrossEntropyLoss(),
            TensorDataset(torch.randint(5, (40, 2)), torch.arange(40) % 2),
        ),
    ),
    "an input cut off": Fault(
        _DEPEND,
        "same prediction",
        lambda: over(nn.Sequential(nn.Threshold(1e9, 1.0), mlp(3)), nn.CrossEntropyLoss(), classes()),
    ),
    "noise of its own": Fault(_BITS, "the output of second", lambda: over(Noisy(), nn.MSELoss(), regression())),
    "a state outside": Fault(
        _BITS, "step 1: the loss", lambda: (trained_by(mlp(), step=_counts_calls), loader(regression()), None)
    ),
    "another form in validation": Fault(_VAL, "'x'", lambda: _validated([{"x": torch.randn(3, 6)}])),
    "other features in validation": Fault(
        _VAL, "RuntimeError", lambda: _validated([(torch.randn(3, 5), torch.randn(3, 1))])
    ),
    "NaN in validation": Fault(_VAL, "is nan", lambda: _validated([(torch.full((3, 6), math.nan), torch.randn(3, 1))])),
    "NaN in eval mode": Fault(
        _VAL, "is nan", lambda: _validated([(torch.randn(3, 6), torch.randn(3, 1))], model=BadInEval())
    ),
    "a metric that refuses": Fault(
        _VAL,
        "targets must be integers",
        lambda: _validated([(torch.randn(3, 6), torch.randn(3, 1))], metrics={"bad": WrongMetric()}),
    ),
    "overlapping parts": Fault(_APART, "5 of 60", _one_dataset),
    "overlapping memory": Fault(_APART, "5 samples", _one_memory),
    "one loader for both": Fault(_APART, "the same object", _same_loader),
    "a batch in both lists": Fault(_APART, "1 batches", _same_batches),
    "classes in order": Fault(_ORDER, "class by class", lambda: _sorted(3)),
    "two classes in order": Fault(_ORDER, "class by class", lambda: _sorted(2)),
    "labels of 0 and 1 in order": Fault(
        _ORDER, "all 40 samples come class by class", lambda: _in_order(torch.arange(40.0)[:, None] > 29)
    ),
}


def _hole(x: Tensor) -> Tensor:
    x[3, 1] = math.nan
    return x
