"""The mistakes that people make, and what each is answered: ``python tests/mistakes.py`` writes them into the page.

The page is docs/reference/errors.md. Its table of classes and a section for each class, with the mistakes that it
answers, stand between comments there; cause and cure come from the docstrings of the classes.
"""

from __future__ import annotations

import contextlib
import os
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
    """One mistake: its name, the code that makes it, the class of the error that answers it, and what was meant."""

    name: str
    code: str
    error: str = "ConfigError"
    meant: str = ""


MISTAKES = [
    Mistake("The model is a class", "Trainer(nn.Linear, optimizer, nn.MSELoss())"),
    Mistake("The optimizer is a class", "Trainer(model, torch.optim.SGD, nn.MSELoss())"),
    Mistake("The loss is a class", "Trainer(model, optimizer, nn.MSELoss)"),
    Mistake("A callback is a class", "Trainer(model, optimizer, nn.MSELoss(), callbacks=[ProgressBar])"),
    Mistake("The list of callbacks is a class", "Trainer(model, optimizer, nn.MSELoss(), callbacks=ProgressBar)"),
    Mistake("A metric is a class", 'Trainer(model, optimizer, nn.MSELoss(), metrics={"mae": MeanAbsoluteError})'),
    Mistake(
        "One metric has two names",
        'mae = MeanAbsoluteError()\nTrainer(model, optimizer, nn.MSELoss(), metrics={"mae": mae, "error": mae})',
    ),
    Mistake(
        "A metric is measured by itself and in a collection",
        "mae = MeanAbsoluteError()\n"
        'metrics = {"mae": mae, "all": MetricCollection([mae])}\n'
        "Trainer(model, optimizer, nn.MSELoss(), metrics=metrics)",
    ),
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
    Mistake(
        "An argument is misspelt",
        "Trainer(model, optimizer, nn.MSELoss(), acumulate=2)",
        "TypeError",
    ),
    Mistake(
        "An argument of fit is given to the trainer",
        "Trainer(model, optimizer, nn.MSELoss(), max_epochs=2)",
        "TypeError",
    ),
    Mistake("An argument of fit is misspelt", "trainer.fit(batches, epoch=2)", "TypeError", meant="epochs"),
    Mistake(
        "An argument of a callback is misspelt",
        'EarlyStopping("val/loss", mode="min", patiance=2)',
        "TypeError",
    ),
    Mistake("Nothing says what better means", 'EarlyStopping("val/loss")', "TypeError"),
    Mistake("A choice is misspelt", 'Trainer(model, optimizer, nn.MSELoss(), precision="bf-16")'),
    Mistake("A choice has another library's name", 'Trainer(model, optimizer, nn.MSELoss(), precision="16-mixed")'),
    Mistake(
        "A cadence is in the plural",
        'Schedule(torch.optim.lr_scheduler.StepLR(optimizer, step_size=30), each="epochs")',
    ),
    Mistake(
        "Weights are float16 where precision= says what to compute in",
        'model.half()\nTrainer(model, optimizer, nn.MSELoss(), precision="fp16").fit(batches, epochs=1)',
    ),
    Mistake("There are several optimizers", "Trainer(model, [optimizer, optimizer], nn.MSELoss())"),
    Mistake(
        "The monitor is unknown",
        'stopping = EarlyStopping("val/los", mode="min")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[stopping]).fit(batches, batches, epochs=1)",
        "UnknownMetricError",
    ),
    Mistake(
        "What metrics= measures is monitored as if the training measured it",
        'stopping = EarlyStopping("train/mae", mode="min")\n'
        'metrics = {"mae": MeanAbsoluteError()}\n'
        "trainer = Trainer(model, optimizer, nn.MSELoss(), metrics=metrics, callbacks=[stopping])\n"
        "trainer.fit(batches, batches, epochs=1)",
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
        "The schedule is shorter than the run",
        "rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2)\n"
        'schedule = Schedule(rates, each="step")\n'
        "Trainer(model, optimizer, nn.MSELoss(), schedule=schedule).fit(batches, epochs=2)",
    ),
    Mistake("There is neither a loss nor a step", "Trainer(model, optimizer)"),
    Mistake(
        "The step takes something else",
        "def step(batch):\n"
        "    x, y = batch\n"
        "    return nn.functional.mse_loss(model(x), y)\n\n\n"
        "Trainer(model, optimizer, step=step)",
    ),
    Mistake(
        "What a step measures has no names",
        "def step(model, batch):\n"
        "    x, y = batch\n"
        "    error = (model(x) - y).abs()\n"
        "    return Output(error.mean(), metrics=[error.max()])\n\n\n"
        "Trainer(model, optimizer, step=step).fit(batches, epochs=1)",
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
        "The loss is a cross-entropy, and the model has one output",
        "Trainer(model, optimizer, nn.CrossEntropyLoss()).fit([(x, (y > 0).float())], epochs=1)",
    ),
    Mistake(
        "The model is not the one that the optimizer holds",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nTrainer(nn.Linear(3, 1), optimizer, nn.MSELoss())",
    ),
    Mistake(
        "The model holds no values",
        'model = nn.Linear(3, 1, device="meta")\n'
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        'Trainer(model, optimizer, nn.MSELoss(), device="cpu").fit(batches, epochs=1)',
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
        "The loader can be read once, and several epochs are asked for",
        "trainer.fit(zip(x.split(4), y.split(4)), epochs=2)",
        "DataError",
    ),
    Mistake(
        "The loader is a generator, and is used up",
        "trainer.fit((batch for batch in batches), epochs=2)",
        "DataError",
    ),
    Mistake(
        "The loader has no whole batch",
        "loader = DataLoader(TensorDataset(x, y), batch_size=16, drop_last=True)\ntrainer.fit(loader, epochs=1)",
        "DataError",
    ),
    Mistake(
        "The size of a batch is not clear",
        "def step(model, batch):\n"
        '    return nn.functional.mse_loss(model(batch["x"]), batch["y"])\n\n\n'
        'batch = {"x": x, "y": y, "class weights": torch.ones(3)}\n'
        "Trainer(model, optimizer, step=step).fit([batch], epochs=1)",
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
    Mistake("The progress is to go into a file, and that is a name", 'ProgressBar(file="log.txt")'),
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
    Mistake("A run is to go on, and nothing saves it", 'trainer.fit(batches, epochs=1, resume="auto")'),
    Mistake("The data is not finite", "trainer.fit([(x, y), (x / 0, y)], epochs=1)", "NonFiniteError"),
    Mistake(
        "The learning rate is far too high",
        "optimizer = torch.optim.SGD(model.parameters(), lr=1e12)\n"
        "Trainer(model, optimizer, nn.MSELoss()).fit(batches, epochs=10)",
        "NonFiniteError",
    ),
    Mistake(
        "A checkpoint is damaged",
        'saving = Checkpoint("runs/line")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving]).fit(batches, epochs=1)\n"
        'path = "runs/line/step-000000002"\n'
        'with open(f"{path}/model.safetensors", "r+b") as file:\n'
        '    file.write(b"?")  # what a failing disk does\n'
        "trainer.fit(batches, epochs=2, resume=path)",
        "CheckpointError",
    ),
    Mistake(
        "A checkpoint is of another model",
        "larger = nn.Linear(3, 2)\n"
        "other = torch.optim.SGD(larger.parameters(), lr=0.1)\n"
        'saving = Checkpoint("runs/line")\n'
        "Trainer(larger, other, nn.MSELoss(), callbacks=[saving]).fit([(x, torch.cat([y, y], 1))], epochs=1)\n"
        'trainer.fit(batches, epochs=2, resume="runs/line/step-000000001")',
        "CheckpointError",
    ),
    Mistake(
        "A callback's state cannot be saved",
        "class Watch(Callback):\n"
        "    def state_dict(self):\n"
        '        return {"seen": {1, 2}}\n\n\n'
        'saving = Checkpoint("runs/line")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving, Watch()]).fit(batches, epochs=1)",
        "CheckpointError",
    ),
    Mistake(
        "The folder cannot be written to",
        'with open("file", "w") as file:\n'
        '    file.write("no folder")\n'
        'saving = Checkpoint("file")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving]).fit(batches, epochs=1)",
        "SaveError",
    ),
    Mistake(
        "Two runs save into one folder",
        "class Second(Callback):\n"
        "    def on_fit_start(self, state):\n"
        '        saving = Checkpoint("runs/line")\n'
        "        Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving]).fit(batches, epochs=1)\n\n\n"
        'saving = Checkpoint("runs/line")\n'
        "Trainer(model, optimizer, nn.MSELoss(), callbacks=[saving, Second()]).fit(batches, epochs=1)",
        "LockedError",
    ),
]

# Where more about a class stands, from the page's own folder.
GUIDES = {
    "NonFiniteError": "[NaN and infinite values](../howto/non-finite.md)",
    "ShapeMismatchError": "[Write your own step](../howto/custom-step.md)",
    "UnknownMetricError": "[Stop early](../howto/early-stopping.md), [Measure more than the loss](../howto/metrics.md)",
    "DataError": "[Write your own step](../howto/custom-step.md), "
    "[Say what a batch counts for](../howto/custom-step.md#say-what-a-batch-counts-for)",
    "CheckpointError": "[Save a run, and go on with it](../howto/checkpoints.md), "
    "[Read a checkpoint without loopwright](../howto/read-a-checkpoint.md)",
    "SaveError": "[Save a run, and go on with it](../howto/checkpoints.md), [Reliability](../reliability.md)",
    "LockedError": "[Save a run, and go on with it](../howto/checkpoints.md)",
}

# Those that are made by hand, with arguments or attributes that say something.
CONSTRUCTED = {"LoopwrightError", "NonFiniteError"}


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
    names |= {name: getattr(torchmetrics, name) for name in ("MeanAbsoluteError", "MetricCollection")}
    names |= {"x": x, "y": y, "model": model}
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
    """The message as the page has it: without the folder that it was made in, and without what Python 3.13 adds."""
    folders = re.escape(os.path.realpath(tempfile.gettempdir())) + r"/tmp\w+"
    return re.sub(r"\. Did you mean '\w+'\?$", "", re.sub(folders, "...", f"{type(error).__name__}: {error}"))


def classes(error: type[LoopwrightError] = LoopwrightError) -> Iterator[type[LoopwrightError]]:
    """Every class of errors, each before those below it."""
    yield error
    for below in error.__subclasses__():
        if below.id != error.id:
            yield from classes(below)


def table() -> str:
    """The classes, their ids, what else they are, and their docstrings' first sentences."""
    lines = ["| id | when | class |", "|---|---|---|"]
    for kind in classes():
        bases = " and ".join(f"`{base.__name__}`" for base in kind.__bases__ if base is not LoopwrightError)
        also = f", a {bases}".replace("a `OS", "an `OS").replace("a `Exc", "an `Exc") if bases else ""
        lines.append(f"| [`{kind.id}`](#{kind.id}) | {sentence(kind)} | `{kind.__name__}`{also} |")
    return "\n".join(lines)


def sentence(kind: type[LoopwrightError]) -> str:
    """The first one of the docstring."""
    return (kind.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ").replace("``", "`")


def shown(mistake: Mistake) -> str:
    """A mistake with its code and its answer."""
    text = f"### {mistake.name}\n\n```py\n{mistake.code}\n```\n\n``` {{ .text }}\n{message(answer(mistake))}\n```"
    return f"{text}\n\nPython 3.13 and newer add: `Did you mean '{mistake.meant}'?`" if mistake.meant else text


def section(kind: type[LoopwrightError]) -> str:
    """A class: its docstring, which says cause and cure, and the mistakes that it answers."""
    options = ["heading_level: 3", "show_root_toc_entry: false"]
    if kind.__name__ not in CONSTRUCTED:
        options += ["show_signature: false", "separate_signature: false"]
    if kind is not LoopwrightError:
        options.append("members: []")
    lines = "\n".join(f"      {option}" for option in options)
    parts = [f"## `{kind.id}` {{ #{kind.id} }}", f"::: loopwright.{kind.__name__}\n    options:\n{lines}"]
    if guides := GUIDES.get(kind.__name__):
        parts.append(f"More: {guides}.")
    return "\n\n".join(parts + [shown(mistake) for mistake in MISTAKES if mistake.error == kind.__name__])


def of_python() -> str:
    """The mistakes that Python itself answers, or that are answered as it does."""
    return "\n\n".join(shown(mistake) for mistake in MISTAKES if mistake.error == "TypeError")


def generated() -> dict[str, str]:
    """What stands between the comments of the page, under their names."""
    sections = "\n\n".join(section(kind) for kind in classes())
    return {"table": table(), "classes": sections, "TypeError": of_python()}


def part(page: str, name: str) -> str:
    """What the page has between the comments of that name."""
    begin, end = marks(name)
    return page[page.index(begin) + len(begin) : page.index(end)]


def marks(name: str) -> tuple[str, str]:
    """What a generated part begins and ends with."""
    return f"<!-- {name}: written by tests/mistakes.py -->\n\n", f"\n\n<!-- end of {name} -->"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, new in generated().items():
        begin, end = marks(name)
        before, _, after = text.partition(begin)
        text = before + begin + new + end + after.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")
