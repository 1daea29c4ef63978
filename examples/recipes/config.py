"""A configuration that is a typed dataclass: a misspelt name is an error, and it is saved beside what it made."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from torch import nn

from loopwright import Trainer


@dataclass(frozen=True)
class Optimizer:
    name: Literal["SGD", "AdamW"] = "AdamW"
    lr: float = 1e-2

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.name == "SGD":
            return torch.optim.SGD(model.parameters(), lr=self.lr)
        return torch.optim.AdamW(model.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Config:
    width: int = 16
    epochs: int = 30
    clip_norm: float | None = 1.0
    optimizer: Optimizer = field(default_factory=Optimizer)

    @classmethod
    def read(cls, path: Path) -> Self:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"optimizer": Optimizer(**values.get("optimizer", {}))})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")


def train(config: Config) -> float:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = nn.Sequential(nn.Linear(3, config.width), nn.ReLU(), nn.Linear(config.width, 1))
    trainer = Trainer(model, config.optimizer.build(model), nn.MSELoss(), clip_norm=config.clip_norm, device="cpu")
    result = trainer.fit([(x, x.sum(1, keepdim=True))], epochs=config.epochs)
    return result.history[-1]["train/loss"]


if __name__ == "__main__":
    config = Config(width=32, optimizer=Optimizer(lr=0.03))  # a type checker knows every name and type
    config.write(Path("config.json"))
    print(Path("config.json").read_text(encoding="utf-8"))
    print("read back, it trains to the same loss:", train(Config.read(Path("config.json"))) == train(config))
