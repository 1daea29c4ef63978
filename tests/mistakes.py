"""The mistakes that people make, and what each is answered: ``python tests/mistakes.py`` writes them into the page.

The page is docs/reference/errors.md: its table of classes, and its list of mistakes, stand between comments there.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright
import loopwright.callbacks
from loopwright import LoopwrightError

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "errors.md"


@dataclass(frozen=True)
class Mistake:
    """One mistake: its name, the code that makes it, and the class of the error that answers it."""

    name: str
    code: str
    error: str = "ConfigError"


MISTAKES = [
    Mistake("The model is a class", "Trainer(nn.Linear, optimizer, nn.MSELoss())"),
    Mistake("The optimizer is a class", "Trainer(model, torch.optim.SGD, nn.MSELoss())"),
    Mistake("The loss is a class", "Trainer(model, optimizer, nn.MSELoss)"),
    Mistake("A callback is a class", "Trainer(model, optimizer, nn.MSELoss(), callbacks=[ProgressBar])"),
    Mistake("The list of callbacks is a class", "Trainer(model, optimizer, nn.MSELoss(), callbacks=ProgressBar)"),
    Mistake("A metric is a class", 'Trainer(model, optimizer, nn.MSELoss(), metrics={"mae": MeanAbsoluteError})'),
    Mistake(
        "A hook is misspelt",
        "class PrintLoss(Callback):\n    def on_epoch_finish(self, state): ...",
        "TypeError",
    ),
    Mistake(
        "A hook has the name that another library gives it",
        "class PrintLoss(Callback):\n    def on_train_batch_end(self, state, output): ...",
        "TypeError",
    ),
    Mistake(
        "A hook's name is written in other letters",
        "class PrintLoss(Callback):\n    def setUp(self, state): ...",
        "TypeError",
    ),
    Mistake(
        "A hook has a wrong signature",
        "class PrintLoss(Callback):\n    def on_epoch_end(self): ...",
        "TypeError",
    ),
    Mistake("An argument is misspelt", "Trainer(model, optimizer, nn.MSELoss(), acumulate=2)", "TypeError"),
    Mistake("An argument of fit is misspelt", "trainer.fit(batches, epoch=2)", "TypeError"),
    Mistake("An argument of a callback is misspelt", 'EarlyStopping("val/loss", mode="min", patiance=2)', "TypeError"),
    Mistake("A choice is misspelt", 'Trainer(model, optimizer, nn.MSELoss(), precision="bf-16")'),
    Mistake(
        "The monitor is unknown",
        'stopping = EarlyStopping("val/los", mode="min")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[stopping]).fit(batches, batches, epochs=1)",
        "UnknownMetricError",
    ),
    Mistake(
        "A metric is read that nothing has logged", 'trainer.state.metrics["train/accuracy"]', "UnknownMetricError"
    ),
    Mistake(
        "A metric of the validation is monitored, and there is no validation data",
        'stopping = EarlyStopping("val/loss", mode="min")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[stopping]).fit(batches, epochs=1)",
    ),
    Mistake(
        "The same, with what metrics measure",
        'stopping = EarlyStopping("val/mae", mode="min")\n'
        'metrics = {"mae": MeanAbsoluteError()}\n'
        "trainer = Trainer(model, optimizer, nn.MSELoss(), metrics=metrics, callbacks=[stopping])\n"
        "trainer.fit(batches, epochs=1)",
    ),
    Mistake(
        "The same, with a checkpoint",
        'saving = Checkpoint("runs", monitor="val/loss", mode="min")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving]).fit(batches, epochs=1)",
    ),
    Mistake(
        "The same, with a schedule",
        "plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)\n"
        'schedule = Schedule(plateau, each="epoch", monitor="val/loss")\n'
        "Trainer(model, optimizer, nn.MSELoss(), schedule=schedule).fit(batches, epochs=1)",
    ),
    Mistake(
        "The loss is not a scalar",
        'Trainer(model, optimizer, nn.MSELoss(reduction="none")).fit(batches, epochs=1)',
    ),
    Mistake(
        "The loss is a number of Python's",
        "def loss(predictions, targets):\n    return (predictions - targets).abs().mean().item()\n\n\n"
        "Trainer(model, optimizer, loss).fit(batches, epochs=1)",
    ),
    Mistake(
        "The loss has no gradient",
        "def loss(predictions, targets):\n    return (predictions - targets).abs().mean().detach()\n\n\n"
        "Trainer(model, optimizer, loss).fit(batches, epochs=1)",
    ),
    Mistake(
        "The model is not the one that the optimizer holds",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nTrainer(nn.Linear(3, 1), optimizer, nn.MSELoss())",
    ),
    Mistake("The loader is a dataset", "trainer.fit(TensorDataset(x, y), epochs=1)"),
    Mistake("The loader is a tensor", "trainer.fit(x, epochs=1)"),
    Mistake("The loader is the inputs and the targets", "trainer.fit((x, y), epochs=1)", "DataError"),
    Mistake("The loader is a file's name", 'trainer.fit("train.csv", epochs=1)'),
    Mistake("The loader is a class", "trainer.fit(DataLoader, epochs=1)"),
    Mistake("The validation data is a dataset", "trainer.fit(batches, TensorDataset(x, y), epochs=1)"),
    Mistake("The validation data is a number", "trainer.fit(batches, 10, epochs=10)"),
    Mistake("The loader gives inputs alone", "trainer.fit(DataLoader(x, batch_size=4), epochs=1)", "DataError"),
    Mistake(
        "The loader is a generator, and is used up",
        "trainer.fit((batch for batch in batches), epochs=2)",
        "DataError",
    ),
    Mistake("The shapes would be broadcast", "trainer.fit([(x, y.squeeze())], epochs=1)", "ShapeMismatchError"),
    Mistake(
        "A metric is on another device",
        "class Error:\n"
        "    def reset(self):\n"
        '        self.sum = torch.zeros(4, device="meta")  # for example "cuda"\n\n'
        "    def update(self, predictions, targets):\n"
        "        self.sum = self.sum + (predictions - targets).abs().squeeze()\n\n"
        "    def compute(self):\n"
        "        return self.sum.mean()\n\n\n"
        'trainer = Trainer(model, optimizer, nn.MSELoss(), metrics={"error": Error()}, device="cpu")\n'
        "trainer.fit(batches, batches, epochs=1)",
    ),
    Mistake(
        "An extra is missing",
        'result = trainer.fit(batches, epochs=1)\nresult.plot("curves.png")  # where matplotlib is not installed',
    ),
    Mistake("A validation is asked for without data", "trainer.fit(batches, epochs=1, validate=Every(steps=1))"),
    Mistake(
        "Two loggers write to one file",
        'loggers = [CSVLogger("metrics.csv"), CSVLogger("metrics.csv")]\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=loggers)",
    ),
    Mistake("Nothing says how long to train", "trainer.fit(batches)"),
    Mistake("epochs is 0", "trainer.fit(batches, epochs=0)"),
    Mistake("epochs is negative", "trainer.fit(batches, epochs=-1)"),
    Mistake("epochs is True", "trainer.fit(batches, epochs=True)"),
    Mistake("epochs is a float", "trainer.fit(batches, epochs=10.0)"),
    Mistake(
        "The learning rate is not a number",
        'optimizer.param_groups[0]["lr"] = float("nan")\nTrainer(model, optimizer, nn.MSELoss())',
    ),
]


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Let a package be one that cannot be imported."""
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == package}
    sys.modules[package] = None  # type: ignore[assignment]  # which is how Python marks one as not to be found
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(held)


def answer(mistake: Mistake) -> Exception:
    """The error that the mistake is answered with; an assertion where there is none."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names: dict[str, Any] = {name: getattr(loopwright, name) for name in loopwright.__all__}
    names |= {name: getattr(loopwright.callbacks, name) for name in loopwright.callbacks.__all__}
    names |= {"torch": torch, "nn": nn, "DataLoader": DataLoader, "TensorDataset": TensorDataset, "Tensor": Tensor}
    names |= {"MeanAbsoluteError": torchmetrics.MeanAbsoluteError, "x": x, "y": y, "model": model}
    names |= {"optimizer": optimizer, "batches": [(x[:4], y[:4]), (x[4:], y[4:])]}
    names["trainer"] = loopwright.Trainer(model, optimizer, nn.MSELoss())
    missing = without("matplotlib") if "not installed" in mistake.code else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), missing:
        try:
            exec(mistake.code, names)
        except Exception as error:
            return error
    raise AssertionError(f"nobody minds: {mistake.code}")


def message(error: Exception) -> str:
    """The message as the page has it: from 3.13 on Python adds a suggestion of its own to a misspelt argument."""
    return re.sub(r"\. Did you mean '\w+'\?$", "", f"{type(error).__name__}: {error}")


def classes(error: type[LoopwrightError] = LoopwrightError) -> Iterator[type[LoopwrightError]]:
    """Every class of errors, each before those below it."""
    yield error
    for below in error.__subclasses__():
        if below.id != error.id:
            yield from classes(below)


def table() -> str:
    """The classes, their ids, what else they are, and their docstrings' first sentences."""
    lines = ["| id | class | also a | what it says |", "|---|---|---|---|"]
    for kind in classes():
        bases = [base.__name__ for base in kind.__bases__ if base is not LoopwrightError]
        also = ", ".join(f"`{base}`" for base in bases)
        sentence = (kind.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ").replace("``", "`")
        lines.append(f"| [`{kind.id}`](#{kind.id}) | `{kind.__name__}` | {also} | {sentence} |".replace("|  |", "| |"))
    return "\n".join(lines)


def listed() -> str:
    """Every mistake, with its code and its answer."""
    return "\n\n".join(
        f"### {mistake.name}\n\n```py\n{mistake.code}\n```\n\n```\n{message(answer(mistake))}\n```"
        for mistake in MISTAKES
    )


def generated() -> dict[str, str]:
    """What stands between the comments of the page, under their names."""
    return {"classes": table(), "mistakes": listed()}


def part(page: str, name: str) -> str:
    """What the page has between the comments of that name."""
    begin, end = f"<!-- {name}: written by tests/mistakes.py -->\n\n", f"\n\n<!-- end of {name} -->"
    return page[page.index(begin) + len(begin) : page.index(end)]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, new in generated().items():
        text = text.replace(part(text, name), new)
    PAGE.write_text(text, encoding="utf-8")
