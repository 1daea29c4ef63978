"""What one epoch does, recorded from a run: the table of docs/explanation/one-epoch.md.

$ python tests/one_epoch.py

writes the table anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn

from loopwright import Callback, Output, Progress, Schedule, State, Trainer
from loopwright.testing import HookRecorder

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "one-epoch.md"
BEGIN, END = "<!-- recorded by tests/one_epoch.py -->\n", "<!-- end of the record -->\n"

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Event:
    """One line of the record: a hook with the counters that it saw, or a line of the loop."""

    name: str
    progress: Progress | None = None


class Record(HookRecorder):
    """Writes hooks and the loop's own lines into one list."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def record(self, hook: str, state: State) -> None:
        super().record(hook, state)
        self.events.append(Event(hook, dataclasses.replace(state.progress)))

    def line(self, text: str) -> None:
        self.events.append(Event(text))

    def backward(self, gradient: Tensor) -> None:
        """What the step's loss was divided by shows in the gradient that reaches it."""
        k = round(1 / gradient.item())
        self.line("loss.backward()" if k == 1 else f"(loss / {k}).backward()")


class Batches:
    """Batches of four, which say when they are fetched."""

    def __init__(self, record: Record, name: str, count: int) -> None:
        self.record, self.name, self.count = record, name, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        self.record.line(f"batches = iter({self.name})")
        for _ in range(self.count):
            self.record.line("batch = next(batches)")
            yield torch.ones(4, 1), torch.zeros(4, 1)


class Optimizer(torch.optim.SGD):
    """Plain SGD that says what is asked of it."""

    def __init__(self, record: Record, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.01)
        self.record = record

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.record.line("optimizer.zero_grad()")
        super().zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure comes here
        self.record.line("optimizer.step()")
        super().step()


class Model(nn.Linear):
    """A model that says when its mode is set."""

    def __init__(self, record: Record) -> None:
        super().__init__(1, 1)
        self.record = record

    def train(self, mode: bool = True) -> Self:
        self.record.line("model.train()" if mode else "model.eval()")
        return super().train(mode)


def record_one_epoch() -> list[Event]:
    """An epoch of three batches, two to an optimizer step, with clipping, a validation and a schedule by epochs."""
    record = Record()

    def step(model: Model, batch: Batch) -> Output:
        record.line("output = step(model, batch)")
        inputs, targets = batch
        loss = nn.functional.mse_loss(model(inputs), targets)
        if loss.requires_grad:
            loss.register_hook(record.backward)  # type: ignore[no-untyped-call]  # torch has no annotation there
        return Output(loss)

    def clip(*args: Any) -> None:
        record.line("clip_grad_norm_(model.parameters(), clip_norm)")
        clip_grads_with_norm_(*args)

    def move() -> None:
        record.line("lr_scheduler.step()")
        move_rates()

    model = Model(record)
    optimizer = Optimizer(record, model)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    move_rates, clip_grads_with_norm_ = lr_scheduler.step, nn.utils.clip_grads_with_norm_
    with patch.object(lr_scheduler, "step", move), patch.object(nn.utils, "clip_grads_with_norm_", clip):
        trainer = Trainer(
            model,
            optimizer,
            step=step,
            schedule=Schedule(lr_scheduler, each="epoch"),
            callbacks=[record],
            device="cpu",
            accumulate=2,
            clip_norm=1.0,
        )
        trainer.fit(Batches(record, "train", 3), Batches(record, "val", 1), epochs=1)
    return record.events


def first_line(hook: str) -> str:
    """The first line of a hook's docstring, in Markdown."""
    return (inspect.getdoc(getattr(Callback, hook)) or "").partition("\n")[0].replace("``", "`")


def table() -> str:
    """The record as a table: a line a row, and what holds in a hook where it is called first."""
    lines = ["| epoch, batch, step | what happens |", "|---|---|"]
    seen: set[str] = set()
    for event in record_one_epoch():
        if event.progress is None:
            lines.append(f"| | `{event.name}` |")
            continue
        progress = event.progress
        link = f"[**{event.name}**](../reference/callback.md#loopwright.Callback.{event.name})"
        words = "" if event.name in seen else f". {first_line(event.name)}"
        lines.append(f"| {progress.epoch}, {progress.batch}, {progress.step} | {link}{words} |")
        seen.add(event.name)
    return "\n".join(lines) + "\n"


def recorded_part(page: str) -> tuple[str, str, str]:
    """A page in three: what stands before the table, the table, and what comes after it."""
    found = re.fullmatch(f"(.*{re.escape(BEGIN)}\n)(.*)(\n{re.escape(END)}.*)", page, flags=re.DOTALL)
    assert found is not None, f"{PAGE.name} has lost the comments around its table"
    before, recorded, after = found.groups()
    return before, recorded, after


if __name__ == "__main__":
    before, _, after = recorded_part(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(before + table() + after, encoding="utf-8")
