"""The pictures of docs/callbacks.md, from one real run: a network that learns 60 noisy samples, and then their noise.

$ make pictures

What a terminal or a file shows is drawn as text; the curves are read from the files that the callbacks wrote. The run
has one thread, so that it ends with the same bits wherever the processor is of one kind, and a picture in which nothing
but a time would be another one stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import html
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopwright import Callback, Result, Schedule, State, Trainer
from loopwright.callbacks import (
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    GradientInspector,
    LearningRateMonitor,
    Logger,
    ProgressBar,
    TensorBoardLogger,
)
from loopwright.schedule import Every

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
BLUE, ORANGE = "#3f51b5", "#e07b00"
_TIMES = re.compile(r"\d\d:\d\d(?::\d\d)?|[\d.]+ ?(?=batch/s|s/batch)|(?:width|viewBox)=\"[^\"]*\"")


class Screen(io.StringIO):
    """A terminal: a carriage return begins the line anew."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What stands on it."""
        return [line.rsplit("\r", 1)[-1].rstrip() for line in self.getvalue().rstrip().split("\n")]


class PrintLoss(Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_epoch_end(self, state: State) -> None:
        self.lines.append(f"epoch {state.progress.epoch}: loss {state.metrics['train/loss']:.4f}")


class PrintLogger(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self.lines.append(f"{epoch} {step} { {name: round(value, 3) for name, value in values.items()} }")


def text_picture(path: Path, title: str, lines: Sequence[str]) -> None:
    """Lines of a terminal or of a file, as an SVG."""
    width = 8.43 * max(map(len, [title, *lines])) + 36
    height = 20 * len(lines) + 58
    rows = "".join(f'<text x="18" y="{58 + 20 * i}">{html.escape(line)}</text>' for i, line in enumerate(lines))
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" '
        f'xml:space="preserve"><rect width="100%" height="100%" rx="6" fill="#1e2129"/>'
        f'<g fill="#9aa5ce"><text x="18" y="27">{html.escape(title)}</text></g><g fill="#e4e7f2">{rows}</g></svg>\n'
    )
    if not path.exists() or _TIMES.sub("", path.read_text(encoding="utf-8")) != _TIMES.sub("", text):
        path.write_text(text, encoding="utf-8")


def chart(path: Path, title: str, label: str, **curves: tuple[Sequence[float], Sequence[float]]) -> Axes:
    """Curves over the x that each brings. The figure is saved by ``save``."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, 3.2), layout="constrained").subplots()
    for (name, (x, y)), colour in zip(curves.items(), (BLUE, ORANGE), strict=False):
        axes.plot(x, y, color=colour, label=name.replace("_", "/"))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(label)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(axes: Axes, path: Path) -> None:
    """One legend and one file, with no date in it."""
    axes.legend(frameon=False)
    figure = axes.get_figure()
    assert figure is not None
    figure.savefig(path, dpi=110)  # type: ignore[union-attr]  # these axes are in no subfigure


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """What is summed up by several threads may be another number in its last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*callbacks: Callback) -> Result:
    """The run, in the present folder; the same one whatever watches it."""
    torch.manual_seed(0)
    x = torch.rand(160, 1) * 6
    y = torch.sin(x) + 0.25 * torch.randn(160, 1)
    train = DataLoader(TensorDataset(x[:60], y[:60]), batch_size=10, shuffle=True)
    val = DataLoader(TensorDataset(x[60:], y[60:]), batch_size=50)
    model = nn.Sequential(nn.Linear(1, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=6 * 300)
    schedule = Schedule(rates, each="step")
    trainer = Trainer(model, optimizer, nn.MSELoss(), schedule=schedule, callbacks=callbacks, device="cpu")
    return trainer.fit(train, val, epochs=300)


def draw(assets: Path) -> None:
    """Run in an empty folder, and draw every picture."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), one_thread():
        screen, loss, logger = Screen(), PrintLoss(), PrintLogger()
        stopping = EarlyStopping("val/loss", mode="min", patience=40, restore_best=True)
        result = run(
            ProgressBar(file=screen),
            CSVLogger("metrics.csv"),
            LearningRateMonitor(),
            TensorBoardLogger("log"),
            stopping,
            Checkpoint("checkpoints", every=Every(epochs=10), monitor="val/loss", mode="min", keep=2),
            loss,
            logger,
        )
        text_picture(assets / "callback-progress-bar.svg", "$ python train.py", screen.lines())
        table = Path("metrics.csv").read_text(encoding="utf-8").splitlines()
        text_picture(assets / "callback-csv.svg", "$ head -n 6 metrics.csv", table[:6])
        text_picture(assets / "callback-base.svg", "PrintLoss", loss.lines[:4])
        text_picture(assets / "callback-logger.svg", "PrintLogger", logger.lines[:4])
        files = sorted(p for p in Path("checkpoints").rglob("*") if p.is_file() and p.parent.name.startswith("step-"))
        text_picture(assets / "callback-checkpoint.svg", "$ find checkpoints/step-* -type f", [str(p) for p in files])
        _draw_curves(assets, result, stopping)
        inspector = GradientInspector(every=Every(steps=25))  # by itself: its names would fill the others' pictures
        run(inspector)
        inspector.plot(assets / "callback-gradient-inspector.png")


def _draw_curves(assets: Path, result: Result, stopping: EarlyStopping) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # it has no types
        EventAccumulator,
    )

    with Path("metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps, rates = [float(row["step"]) for row in rows], [float(row["lr"]) for row in rows]
    path = assets / "callback-learning-rate.png"
    save(chart(path, "lr, as OneCycleLR moves it until the run stops", "step", lr=(steps, rates)), path)

    history = result.history
    epochs = [row["epoch"] for row in history]
    path = assets / "callback-early-stopping.png"
    axes = chart(path, "patience=40", "epoch", val_loss=(epochs, [row["val/loss"] for row in history]))
    assert stopping.best_epoch is not None
    axes.axvline(stopping.best_epoch, color=ORANGE, linestyle="--", label=f"best: epoch {stopping.best_epoch}")
    axes.axvline(epochs[-1], color="0.4", linestyle=":", label=f"stopped: epoch {epochs[-1]:.0f}")
    axes.set_yscale("log")
    save(axes, path)

    events = EventAccumulator("log")
    events.Reload()
    curves = {
        tag.replace("/", "_"): ([e.step for e in events.Scalars(tag)], [e.value for e in events.Scalars(tag)])
        for tag in ("train/loss", "val/loss")
    }
    path = assets / "callback-tensorboard.png"
    axes = chart(path, "scalars of the event file", "step", **curves)
    axes.set_yscale("log")
    save(axes, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ASSETS, help="the folder of the pictures")
    draw(parser.parse_args().into.absolute())
