"""Metrics as TensorBoard's event files."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from loopwright.errors import ConfigError
from loopwright.forms import Count, check_form
from loopwright.logger import Logger
from loopwright.metrics import check_name
from loopwright.paths import file_in_the_way, numbered, path_of
from loopwright.schedule import Every

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from loopwright.state import State

_EVENTS = "events.out.tfevents.*"  # the names that TensorBoard looks for
_HPARAMS = ".hparams"  # how the names of the files with hyperparameters end
# The event files that were there when a run of this process was over: in a notebook one follows another.
_OVER: set[str] = set()

logger: logging.Logger = logging.getLogger("loopwright")


class _Saved(TypedDict):
    written: Count
    begun: bool
    step: Count
    values: dict[str, float]
    shown: list[str]


class TensorBoardLogger(Logger):
    """Writes the metrics into event files for TensorBoard: ``tensorboard --logdir runs``.

    Every name in ``state.metrics`` becomes the scalar of that tag, at the number of optimizer steps, and ``epoch``
    another one. What is written at one step comes together in one point for each name. When a fit ends without an
    error, the hyperparameters and the names of the final metrics are written too: the model's class and size, the
    optimizer and its settings, and what the fit was asked for. The model's graph is not, for torch
    deprecates the tracer that it takes.

    A fresh run begins a new event file, and those that are already there are set aside into the folder
    ``previous-1``, ``previous-2`` and so on, which TensorBoard shows as runs of their own. What this process has
    written there since its last run in the folder belongs to the new one and stays: a ``SummaryWriter`` of your own
    may add text or images, before ``fit`` or in a callback. A second ``fit`` of the same trainer continues the run,
    without double points.

    Args:
        folder: The run's folder, for example ``"runs/line"``. It is made as needed.
        every: How often to write.

    Raises:
        ConfigError: In fit, before the first step: the path is a file. From ``Trainer``: another TensorBoardLogger in
            the list has the same folder.
        OSError: In fit: the folder or a file in it cannot be made or written.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[TensorBoardLogger("runs/line")])
        >>> result = trainer.fit(train_loader, epochs=2)
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: Every = Every(epochs=1)) -> None:  # noqa: B008
        super().__init__(every=every)
        self.folder: Path = path_of("folder", folder, 'TensorBoardLogger("runs/line")')
        self._writer: SummaryWriter | None = None
        self._settings: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        # The newest record. An event file cannot be corrected, so its values wait here until the step is over or
        # somebody wants to see them; `_shown` are the names whose values have been handed on.
        self._step = 0
        self._values: dict[str, float] = {}
        self._shown: set[str] = set()

    def open(self, state: State, *, fresh: bool) -> None:
        """Begin a new event file; TensorBoard takes it for the continuation of those that are there."""
        if (other := file_in_the_way(self.folder)) is not None:
            within = "which" if other == self.folder else f"and {str(other)!r}"
            raise ConfigError(
                f"TensorBoardLogger is to write into {str(self.folder)!r}, {within} is a file",
                why="TensorBoard reads folders, one for each run",
                fix="give it a folder, for example TensorBoardLogger('runs/line')",
            )
        self._settings = _optimizer_settings(state)
        if fresh:
            self._forget()
            self._set_aside()
            self._writer = self._new_writer(purge_step=None)
            return
        # A run that was killed may have written more at this step, and beyond. So all of that is disowned, and what is
        # known of this step is written again.
        self._writer = self._new_writer(purge_step=self._step)
        shown, self._shown = self._shown, set()
        self._hand_on(shown)
        self._writer.flush()

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Keep one record, after the one before it has been handed on; or add to that of the same step."""
        if step != self._step:
            self._hand_on(self._values)
            self._forget()
        self._step = step
        self._values |= {"epoch": epoch, **values}

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Draw the values of a tensor at one step; ``GradientInspector(histograms=...)`` calls it.

        NaN and infinities are left out. A resume disowns the histograms of the step from which it goes on.

        Args:
            name: The tag.
            values: Any tensor that holds numbers.
            step: The number of optimizer steps made.
        """
        if self._writer is None:
            return
        values = values.coalesce().values() if values.is_sparse else values
        values = (torch.view_as_real(values) if values.is_complex() else values).float()
        values = values[values.isfinite()]
        if values.numel():
            self._writer.add_histogram(check_name(name), values.cpu(), step)

    def flush(self) -> None:
        """Hand everything on to the system, so that TensorBoard sees it."""
        if self._writer is not None:
            self._hand_on(self._values)
            self._writer.flush()

    def on_fit_end(self, state: State) -> None:
        """Write what is left, and the hyperparameters."""
        super().on_fit_end(state)
        self._write_hyperparameters(state)

    def _destination(self) -> Path:
        return self.folder

    def close(self) -> None:
        """Close the event file, and end the thread that writes it."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            _OVER.update(map(os.path.realpath, self.folder.glob(_EVENTS)))

    def state_dict(self) -> dict[str, Any]:
        """The newest record, and which of its values have been handed on."""
        newest = {"step": self._step, "values": dict(self._values), "shown": sorted(self._shown)}
        return {**super().state_dict(), **newest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the record of which ``state_dict`` told; what was written later is disowned."""
        check_form(state, _Saved)
        for name in {*state["values"], *state["shown"]} - {"epoch"}:
            check_name(name)
        super().load_state_dict(state)
        self._step, self._values, self._shown = state["step"], dict(state["values"]), set(state["shown"])

    def _hand_on(self, names: Container[str]) -> None:
        """Give the writer the values of these names, unless it has one at this step: the first then stands."""
        assert self._writer is not None, "open comes before write"
        for name, value in self._values.items():
            if name in names and name not in self._shown:
                self._writer.add_scalar(name, value, self._step)
                self._shown.add(name)

    def _new_writer(self, *, purge_step: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder.mkdir(parents=True, exist_ok=True)
        there = set(self.folder.glob(_EVENTS))
        writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        if self._comes_after(there):
            return writer
        # Event files are read in the order of their names, which hold the second and, without leading zeros, a count.
        # Out of order, this one could disown nothing in those before it. A second later it can.
        writer.close()
        for path in set(self.folder.glob(_EVENTS)) - there:
            path.unlink()
        time.sleep(1.0)
        writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        if not self._comes_after(there):
            logger.warning("%s holds event files from the future; TensorBoard may show points twice", self.folder)
        return writer

    def _comes_after(self, there: set[Path]) -> bool:
        return not there or max(self.folder.glob(_EVENTS)) not in there

    def _set_aside(self) -> None:
        if earlier := sorted(path for path in self.folder.glob(_EVENTS) if not _is_new(path)):
            aside = numbered(self.folder / "previous")
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
            logger.info("%s held event files of an earlier run, which are now in %s", self.folder, aside)

    def _write_hyperparameters(self, state: State) -> None:
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import hparams

        plan = state.plan
        settings = {
            "model": type(state.model).__name__,
            "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            **self._settings,
            "epochs": plan.epochs,
            "steps": plan.steps,
            "batches": plan.batches,
            "accumulate": plan.accumulate,
        }
        metrics = {name: state.metrics[name] for name in state.metrics if state.metrics.mark_of(name)}
        # TensorBoard keeps the first hyperparameters that it finds in a folder. So those of the fit before have to go,
        # which is why they stand in a file of their own.
        outdated = list(self.folder.glob(_EVENTS + _HPARAMS))
        writer = FileWriter(str(self.folder), filename_suffix=_HPARAMS)
        for summary in hparams(settings, metrics):  # type: ignore[no-untyped-call]  # torch has no annotation there
            writer.add_summary(summary)
        writer.close()
        for path in outdated:
            path.unlink()


def _is_new(path: Path) -> bool:
    """Whether this process has begun an event file since its last run in the folder.

    Its name says when it was begun, and by which process. Another one may have had this number before.
    """
    begun = re.match(rf"events\.out\.tfevents\.(\d+)\.{re.escape(socket.gethostname())}\.{os.getpid()}\.", path.name)
    now = logging.makeLogRecord({})
    loaded = now.created - now.relativeCreated / 1000  # of logging, which torch and TensorBoard import
    return begun is not None and int(begun[1]) >= int(loaded) and os.path.realpath(path) not in _OVER


def _optimizer_settings(state: State) -> dict[str, Any]:
    """The optimizer's class and the settings of its first group, as they are before a schedule moves them."""
    optimizer, group = state.optimizer, state.optimizer.param_groups[0]
    settings: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for name in optimizer.defaults:
        value = group.get(f"initial_{name}", group.get(name))
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, (bool, int, float, str)):
            settings[name] = value
        elif isinstance(value, tuple):
            settings[name] = str(value)  # such as Adam's betas
    return settings
