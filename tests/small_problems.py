"""Tiny models, data, loaders, optimizers and schedules, each built anew from its name and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

Loss = Callable[[Any, Any], Tensor]
Samples = tuple[Tensor, Tensor]  # inputs and targets
BATCH = 4


class LastOfSequence(nn.Module):
    """A recurrent layer with dropout, read out at the end of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(3, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.recurrent(inputs)
        out: Tensor = self.head(hidden[:, -1])
        return out


class WithIdleParts(nn.Module):
    """A plain net with a frozen weight, a layer that gets a gradient only now and then, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.seldom = nn.Linear(6, 2)
        self.idle = nn.Linear(3, 3)
        next(self.layers.parameters()).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layers(inputs)
        return out + self.seldom(inputs) if inputs[0, 0] > 0.5 else out


def _classes(n: int) -> Tensor:
    return torch.randint(0, 3, (n,))


PROBLEMS: dict[str, Callable[[], nn.Module]] = {
    "plain": WithIdleParts,
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)),
    "batchnorm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
    "embedding": lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)),
    "recurrent": LastOfSequence,
}


def samples(problem: str, n: int) -> Samples:
    """``n`` samples for one of the problems, from the global generator."""
    inputs = {
        "embedding": lambda: torch.randint(0, 9, (n, 3)),
        "recurrent": lambda: torch.randn(n, 4, 3),
    }.get(problem, lambda: torch.randn(n, 6))()
    targets = _classes(n) if problem in ("dropout", "embedding") else torch.randn(n, 2)
    return inputs, targets


def loss_of(problem: str) -> Loss:
    """Cross entropy where the targets are classes, else the squared error."""
    return nn.CrossEntropyLoss() if problem in ("dropout", "embedding") else nn.MSELoss()


def make_optimizer(name: str, model: nn.Module) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    if name == "nesterov":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01)
    if name == "adamw":
        half = len(parameters) // 2
        groups: list[dict[str, Any]] = [
            {"params": parameters[:half]},
            {"params": parameters[half:], "lr": 0.003, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=0.005, momentum=0.5, centered=True)
    raise ValueError(name)


def make_scheduler(name: str, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    if name == "none":
        return None
    if name == "steplr each epoch":
        return StepLR(optimizer, step_size=1, gamma=0.5)
    if name == "onecycle each step":
        return OneCycleLR(optimizer, max_lr=0.05, total_steps=total_steps)
    if name == "cosine each step":
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    if name == "plateau each epoch":
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
    raise ValueError(name)


class Endless(IterableDataset[Samples]):
    """Samples that come one after the other; how many is not known before."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Samples]:
        for i in torch.randperm(len(self.data[0])).tolist():
            yield self.data[0][i], self.data[1][i]


class Augmented(Dataset[Samples]):
    """Every access draws from the global generator, as random augmentation does."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> Samples:
        inputs = self.data[0][index]
        return inputs.roll(int(torch.randint(0, 3, ()))), self.data[1][index]


class Shifted(TensorDataset):
    """A TensorDataset only by descent: what it returns is not what it holds."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, targets = (tensor[index] for tensor in self.tensors)
        return inputs.roll(1), targets


class WithoutLength:
    """Batches from a generator that draws at each batch: fetching one early would change what comes after."""

    def __init__(self, batches: Sequence[Samples]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Samples]:
        for i in torch.randperm(len(self.batches)).tolist():
            inputs, targets = self.batches[i]
            order = torch.randperm(len(inputs))
            yield inputs[order], targets[order]


def cut(data: Samples, *, drop_last: bool = False, size: int = BATCH) -> list[Samples]:
    """The samples in ready-made batches, in their order."""
    batches = list(zip(torch.split(data[0], size), torch.split(data[1], size), strict=True))
    return batches[:-1] if drop_last and len(batches[-1][0]) < size else batches


def _without_first(samples: list[Samples]) -> Samples:
    """A collate function: it drops the first sample of each batch of more than one."""
    kept = samples[1:] or samples
    return torch.stack([inputs for inputs, _ in kept]), torch.stack([targets for _, targets in kept])


def make_loader(kind: str, data: Samples, *, drop_last: bool = False) -> Any:
    dataset = TensorDataset(*data)
    n = len(dataset)
    if kind == "shuffled":
        return DataLoader(dataset, BATCH, shuffle=True, drop_last=drop_last)
    if kind == "own generator":
        generator = torch.Generator().manual_seed(77)
        return DataLoader(dataset, BATCH, shuffle=True, drop_last=drop_last, generator=generator)
    if kind == "list":
        return cut(data, drop_last=drop_last)
    if kind == "without length":
        return WithoutLength(cut(data, drop_last=drop_last))
    if kind == "weighted sampler":
        weighted = WeightedRandomSampler([1.0 + i % 5 for i in range(n)], n)
        return DataLoader(dataset, BATCH, sampler=weighted, drop_last=drop_last)
    if kind == "augmented":
        return DataLoader(Augmented(data), BATCH, shuffle=True, drop_last=drop_last)
    if kind == "iterable dataset":
        return DataLoader(Endless(data), BATCH, drop_last=drop_last)
    return _rarer_loader(kind, data, drop_last=drop_last)


RARER = (
    "in order",
    "tuple",
    "two workers",
    "two workers, augmented",
    "persistent workers",
    "shifted dataset",
    "with replacement",
    "subset",
    "sampler with its own generator",
    "batch sampler",
    "sequential batch sampler",
    "no batching",
    "own collate function",
    "batches of one",
)


def _rarer_loader(kind: str, data: Samples, *, drop_last: bool) -> Any:
    dataset = TensorDataset(*data)
    n = len(dataset)
    if kind == "in order":
        return DataLoader(dataset, BATCH, drop_last=drop_last)
    if kind == "tuple":
        return tuple(cut(data, drop_last=drop_last))
    if kind == "two workers":
        return DataLoader(dataset, BATCH, shuffle=True, drop_last=drop_last, num_workers=2)
    if kind == "two workers, augmented":
        return DataLoader(Augmented(data), BATCH, shuffle=True, drop_last=drop_last, num_workers=2)
    if kind == "persistent workers":
        return DataLoader(dataset, BATCH, shuffle=True, num_workers=1, persistent_workers=True)
    if kind == "shifted dataset":
        return DataLoader(Shifted(*data), BATCH, shuffle=True, drop_last=drop_last)
    if kind == "with replacement":
        drawn = RandomSampler(dataset, replacement=True, num_samples=n - 3)
        return DataLoader(dataset, BATCH, sampler=drawn, drop_last=drop_last)
    if kind == "subset":
        return DataLoader(dataset, BATCH, sampler=SubsetRandomSampler(range(1, n, 2)), drop_last=drop_last)
    if kind == "sampler with its own generator":
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(78))
        return DataLoader(dataset, BATCH, sampler=sampler, drop_last=drop_last)
    if kind == "batch sampler":
        batched = BatchSampler(RandomSampler(dataset), batch_size=3, drop_last=drop_last)
        return DataLoader(dataset, batch_sampler=batched)
    if kind == "sequential batch sampler":
        uneven = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10], list(range(11, n))]
        return DataLoader(dataset, batch_sampler=uneven)
    if kind == "no batching":
        whole = BatchSampler(SequentialSampler(dataset), BATCH, drop_last)
        return DataLoader(dataset, batch_size=None, sampler=whole)
    if kind == "own collate function":
        return DataLoader(dataset, BATCH, shuffle=True, drop_last=drop_last, collate_fn=_without_first)
    if kind == "batches of one":
        return DataLoader(dataset, shuffle=True)
    raise ValueError(kind)


def generator_of(loader: Any) -> torch.Generator | None:
    """A loader's own generator, or its sampler's."""
    for owner in (loader, getattr(loader, "sampler", None)):
        found = getattr(owner, "generator", None)
        if isinstance(found, torch.Generator):
            return found
    return None
