"""Small networks of unlike kinds and data for them, for the corpus of planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


def vectors(*, classes: int = 0, scale: float = 1.0, shift: float = 0.0, target: float = 1.0, size: int = 16) -> Loader:
    """Inputs (16,), and one number or a class that a smooth function makes of them."""
    x = torch.randn(256, 16)
    score = torch.tanh(x @ torch.randn(16, max(1, classes))) + 0.1 * torch.randn(256, max(1, classes))
    y = score.argmax(1) if classes else target * score
    return DataLoader(TensorDataset(scale * x + shift, y), batch_size=size, shuffle=True)


def images(*, classes: int = 4, target: float = 1.0, scale: float = 1.0) -> Loader:
    """Inputs (1, 8, 8) with a bright stripe, and which of the stripes it is, or a number for it."""
    y = torch.randint(0, 4, (192,))
    x = 0.5 * torch.randn(192, 1, 8, 8)
    x[torch.arange(192), 0, 2 * y] += 1.5
    label = y if classes else target * (y[:, None].float() - 1.5)
    return DataLoader(TensorDataset(scale * x, label), batch_size=16, shuffle=True)


def tokens(*, outliers: int = 0) -> Loader:
    """Sequences of 10 tokens out of 30, and whether the first half of the table outweighs the second."""
    x = torch.randint(0, 30, (256, 10))
    return DataLoader(TensorDataset(x, ((x < 15).sum(1) > 5).long()), batch_size=16, shuffle=True)


def series(*, scale: float = 1.0) -> Loader:
    """Series of 12 steps of 3 numbers, and the tanh of their mean."""
    x = torch.randn(192, 12, 3)
    return DataLoader(TensorDataset(scale * x, torch.tanh(x.mean((1, 2)))[:, None]), batch_size=16, shuffle=True)


def mlp(
    depth: int = 4,
    width: int = 32,
    act: Callable[[], nn.Module] = nn.ReLU,
    *,
    out: int = 1,
    std: float | None = None,
    gain: float | None = None,
    batch_norm: bool = False,
    bias: bool = True,
) -> nn.Sequential:
    """An MLP of 16 inputs; ``std`` or ``gain`` (over the square root of the inputs) say how wide its weights are."""
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        layers.append(nn.Linear(16 if i == 0 else width, width, bias=bias))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(act())
    layers.append(nn.Linear(width, out))
    for layer in layers:
        if isinstance(layer, nn.Linear) and (std is not None or gain is not None):
            wide = std if std is not None else (gain or 0.0) / math.sqrt(layer.in_features)
            nn.init.normal_(layer.weight, std=wide)
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Blocks of ``x + scale * f(x)`` at standard initialisation."""

    def __init__(
        self, blocks: int = 8, width: int = 32, scale: float = 1.0, *, norm: bool = True, out: int = 1
    ) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width) if norm else nn.Identity(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, width),
            )
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, out)
        self.detached_after = -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = x + self.scale * block(x)
            if i == self.detached_after:
                x = x.detach()
        out: Tensor = self.last(x)
        return out


def cnn(
    *,
    batch_norm: bool = True,
    act: Callable[[], nn.Module] = nn.ReLU,
    depth: int = 3,
    out: int = 4,
    gain: float | None = None,
) -> nn.Sequential:
    """Convolutions of 8 channels, a mean over the picture, and a linear layer."""
    layers: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(1 if i == 0 else 8, 8, 3, padding=1, bias=not batch_norm)
        if gain is not None:
            nn.init.normal_(conv.weight, std=gain / math.sqrt(conv.weight[0].numel()))
        layers += [conv, *([nn.BatchNorm2d(8)] if batch_norm else []), act()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1 if batch_norm else 2), nn.Flatten(), nn.Linear(8 if batch_norm else 32, out)
    )


class Recurrent(nn.Module):
    """A recurrent layer over a series, and a linear layer on its last state."""

    def __init__(self, kind: type[nn.RNN | nn.LSTM | nn.GRU] = nn.LSTM, width: int = 16) -> None:
        super().__init__()
        self.rnn = kind(3, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        out: Tensor = self.head(states[:, -1])
        return out


class Attention(nn.Module):
    """A transformer's encoder over tokens, and a linear layer on the mean of its outputs."""

    def __init__(self, layers: int = 2, width: int = 16, *, norm_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.position = nn.Parameter(0.02 * torch.randn(10, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, dropout, batch_first=True, norm_first=norm_first)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 2)
        self.no_grad = False

    def encode(self, x: Tensor) -> Tensor:
        h: Tensor = self.embedding(x) + self.position
        for layer in self.layers:
            h = layer(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        if self.no_grad:
            with torch.no_grad():
                h = self.encode(x)
        else:
            h = self.encode(x)
        out: Tensor = self.head(h.mean(1))
        return out


class Bag(nn.Module):
    """The mean of embeddings, and two linear layers."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(30, 16, mode="mean", sparse=sparse)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 2)
        self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        out: Tensor = self.head(torch.relu(self.hidden(h.data if self.cut else h)))
        return out
