"""How far the run is, on the terminal, in a notebook or as plain lines."""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import sys
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from loopwright.callback import Callback, after_the_others, without_output
from loopwright.errors import ConfigError
from loopwright.metrics import of_one_layer

if TYPE_CHECKING:
    from loopwright.state import Plan, State
    from loopwright.step import Output

    Tqdm = tqdm[NoReturn]
else:
    Tqdm = tqdm

_PAUSE = 0.1  # seconds between two drawings of the bar
_MOST = 8  # values that are shown at once

logger: logging.Logger = logging.getLogger("loopwright")


class _Bar(Tqdm):
    monitor_interval = 0  # no thread beside the loop: it is drawn from the hooks alone


class ProgressBar(Callback[Any]):
    """Shows how far the run is: epoch, rate, time left and the newest metrics.

    On a terminal it is one tqdm bar for the whole fit, redrawn about ten times a second. Between two redraws a batch
    costs it one look at the clock, and metrics are read only to be drawn. The rate and the time left are taken from
    all of the fit so far, validation included. In a notebook the bar is a widget, or text where there is no
    ipywidgets. Everywhere else, as in a log file or under ``TERM=dumb``, it is one plain line for each epoch:
    ``epoch 3/10  step 30  train/loss 0.1234  val/loss 0.2345  812 samples/s``, where the rate is that of training
    alone. ``evaluate`` gets a bar or a line too.

    No colour is ever used. The environment variable ``TQDM_DISABLE=1`` silences it, and of several processes only
    rank 0 shows anything. At most eight values are shown, ``train/`` and ``val/`` first. What other callbacks log when
    an epoch ends is in its line wherever in the list the bar stands: its ``on_epoch_end`` and ``on_eval_end`` are
    called after theirs, in a subclass that overrides them too. To print while the bar is up, use ``tqdm.write``.

    Args:
        file: Where to write, a file opened for text; by default what ``sys.stderr`` is when fit is called.

    Raises:
        ConfigError: ``file`` is none.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[ProgressBar()])
        >>> result = trainer.fit(train_loader, epochs=2)
    """

    def __init__(self, *, file: TextIO | None = None) -> None:
        if file is not None:
            _check_file(file)
        self.file = file
        self._lines: TextIO | None = None  # where plain lines go, if it is plain lines
        self._make_bar: Callable[..., Tqdm] | None = None  # what makes a bar, if it is a bar
        self._bar: Tqdm | None = None
        self._due = math.inf  # when the bar is to be drawn again
        self._mark = 0  # metrics logged after this mark are shown
        self._began = self._paused = 0.0  # when training began in this epoch, and the evaluation
        self._samples = 0  # the samples seen by then
        self._evaluated = 0  # batches of the present evaluation
        self._shown = 0  # epochs that have their line, or need none
        self._ended = False  # whether the call ended without an error

    def setup(self, state: State) -> None:
        """Find out what there is to write to."""
        self._ended, self._shown = False, state.progress.epoch
        file = sys.stderr if self.file is None else self.file
        if file is None or _rank() != 0 or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
            return
        notebook = self.file is None and _in_notebook()
        if not notebook and (not _is_terminal(file) or os.environ.get("TERM") == "dumb"):
            self._lines = file
            return
        widget = _widget_bar() if notebook else None
        self._make_bar = widget or functools.partial(_Bar, file=file, dynamic_ncols=True)

    def on_fit_start(self, state: State) -> None:
        """Put up the bar, as far along as the run is."""
        self._mark = state.metrics.mark
        unit, total = _target(state.plan)
        self._start_bar(_epoch(state, state.progress.epoch + 1), unit, total, self._count(state))

    def on_epoch_start(self, state: State) -> None:
        """Note when the epoch begins, for its rate."""
        self._began, self._samples = monotonic(), state.progress.samples

    @without_output
    def on_batch_end(self, state: State, output: Output) -> None:
        """Draw the bar if it is time to."""
        if monotonic() >= self._due:
            self._draw(state)

    def on_eval_start(self, state: State) -> None:
        """Note when the evaluation begins; one outside of fit gets its own bar."""
        self._paused, self._evaluated = monotonic(), 0
        if state.stage == "test":
            self._mark = state.metrics.mark
            self._start_bar("test", "batch", state.plan.val_batches, 0)

    @without_output
    def on_eval_batch_end(self, state: State, output: Output) -> None:
        """Draw the bar if it is time to."""
        self._evaluated += 1
        if monotonic() >= self._due:
            self._draw(state)

    @after_the_others
    def on_eval_end(self, state: State) -> None:
        """Leave the evaluation out of the epoch's rate; one outside of fit gets its line."""
        if state.stage == "val":
            self._began += monotonic() - self._paused
            return
        self._print("test", *self._values(state))
        self._end(state)

    @after_the_others
    def on_epoch_end(self, state: State) -> None:
        """Print the epoch's line."""
        self._print_epoch(state)
        self._shown = state.progress.epoch
        if monotonic() >= self._due:
            self._draw(state)

    def on_fit_end(self, state: State) -> None:
        """Draw the bar as it stands at the end, or print the line of an epoch that was not finished."""
        if state.progress.batch and state.progress.samples > self._samples:
            self._print_epoch(state)
        self._end(state)

    def on_exception(self, state: State, error: BaseException) -> None:
        """Print the line of an epoch in whose end another callback has failed."""
        if state.stage == "train" and state.progress.epoch > self._shown:
            self._print_epoch(state)

    def teardown(self, state: State) -> None:
        """Leave the bar as it stands, and let go of the file."""
        bar, self._bar = self._bar, None
        self._lines = self._make_bar = None
        self._due = math.inf
        if bar is not None:
            bar.n = self._count(state)  # an error has left it as it was last drawn
            bar.close()
            widget = getattr(bar, "container", None)
            if widget is not None and self._ended:
                # tqdm takes every bar that is not full for a failure, but a run may well stop early.
                widget.children[1].bar_style = "success" if bar.n == bar.total else "info"

    def _start_bar(self, title: str, unit: str, total: int | None, initial: int) -> None:
        if self._make_bar is None:
            return
        self._bar = self._make_bar(
            desc=title,
            unit=unit,
            total=total,
            initial=initial,
            # Drawn whenever it is told to: when that is, is decided here.
            mininterval=0,
            miniters=0,
            smoothing=0,  # of the whole fit: tenths of a second are too short to tell the time left
            # Whatever TQDM_... variables say.
            disable=False,
            colour=None,
            leave=True,
        )
        self._due = monotonic() + _PAUSE

    def _draw(self, state: State) -> None:
        bar = self._bar
        assert bar is not None, "nothing is due without a bar"
        title = "test" if state.stage == "test" else _epoch(state, max(state.progress.epoch_number, 1))
        if state.stage == "val":
            title += f", validating {_of(self._evaluated, state.plan.val_batches)}"
        bar.set_description_str(title, refresh=False)
        bar.set_postfix_str(", ".join(self._values(state)), refresh=False)
        bar.update(self._count(state) - bar.n)
        self._due = monotonic() + _PAUSE

    def _end(self, state: State) -> None:
        self._ended = True
        if self._bar is not None:
            self._draw(state)

    def _count(self, state: State) -> int:
        progress, plan = state.progress, state.plan
        if state.stage == "test":
            return self._evaluated
        if _target(plan)[0] == "step" or plan.batches is None:
            return progress.step
        return progress.epoch * plan.batches + progress.batch

    def _print_epoch(self, state: State) -> None:
        if self._lines is None:
            return
        progress, plan = state.progress, state.plan
        words = [_epoch(state, progress.epoch_number)]
        if progress.batch:
            words.append(f"batch {_of(progress.batch, plan.batches)}")
        words += [f"step {progress.step}", *self._values(state)]
        seconds = monotonic() - self._began
        if seconds > 0:
            rate = (progress.samples - self._samples) / seconds
            words.append(f"{rate:.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s")
        self._print(*words)
        self._mark, self._samples = state.metrics.mark, progress.samples

    def _print(self, *words: str) -> None:
        file = self._lines
        if file is None:
            return
        try:
            file.write(_encodable("  ".join(words), file) + "\n")
            file.flush()
        except (OSError, ValueError) as error:  # such as a closed pipe: no reason to lose the run
            self._lines = None
            logger.warning("the progress cannot be printed any more, and the run goes on without: %s", error)

    def _values(self, state: State) -> list[str]:
        """The newest values as words. Reading them is what waits for the device."""
        metrics = state.metrics
        names = [name for name in metrics if metrics.mark_of(name) > self._mark and not of_one_layer(name)]
        names.sort(key=lambda name: not name.startswith(("train/", "val/")))
        return [f"{name} {metrics[name]:.4g}" for name in names[:_MOST]]


def _target(plan: Plan) -> tuple[str, int | None]:
    """What is counted, and how many of them make the whole run; None if that is not known."""
    if plan.epochs is None or plan.batches is None:
        return "step", plan.steps
    total = plan.epochs * plan.batches
    if plan.steps is not None:
        epochs, steps = divmod(plan.steps, math.ceil(plan.batches / plan.accumulate))
        total = min(total, epochs * plan.batches + steps * plan.accumulate)
    return "batch", total


def _epoch(state: State, number: int) -> str:
    return f"epoch {_of(number, state.plan.epochs)}"


def _of(number: int, total: int | None) -> str:
    return str(number) if total is None else f"{number}/{total}"


def _check_file(file: object) -> None:
    """Raise ConfigError unless text can be written to it."""
    binary = isinstance(file, (io.RawIOBase, io.BufferedIOBase))
    missing = [method for method in ("write", "flush") if not callable(getattr(file, method, None))]
    if binary or missing:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else getattr(file, "name", None)
        raise ConfigError(
            f"file is {file!r}" + (", opened for bytes" if binary else f", which has no {', no '.join(missing)}"),
            why="the lines are text, and are written to it as to sys.stderr",
            fix=f"file=open({name!r}, 'w')" if isinstance(name, str) else "file=sys.stdout, or leave it out",
        )


def _is_terminal(file: TextIO) -> bool:
    """What has nothing to say about it, such as a class of one's own that copies all to a second file, is none."""
    return callable(isatty := getattr(file, "isatty", None)) and bool(isatty())


def _encodable(text: str, file: TextIO) -> str:
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel. IPython is not imported to find out: in one, it has been."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    return "IPKernelApp" in getattr(shell, "config", ())


def _widget_bar() -> Callable[..., Tqdm] | None:
    """What makes a bar in a notebook, or None where there is no ipywidgets."""
    from tqdm import notebook

    if getattr(notebook, "IProgress", None) is None:
        return None
    return type("WidgetBar", (notebook.tqdm,), {"monitor_interval": 0})
