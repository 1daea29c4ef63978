"""ProgressBar: what stands on a terminal, in a log file, in a notebook; how often it is drawn, and what that costs."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tqdm
from torch import nn

from loopwright import Callback, ConfigError, Every, Output, State, Trainer
from loopwright.callbacks import Checkpoint, ProgressBar
from loopwright.testing import tiny_data, tiny_model, tiny_state, two_step_fit


class Terminal(io.StringIO):
    """A file that says it is a terminal; ``drawn`` is what stood on its line, drawing after drawing."""

    def isatty(self) -> bool:
        return True

    @property
    def drawn(self) -> list[str]:
        return [text.strip() for text in re.split(r"[\r\n]+", self.getvalue()) if text.strip()]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "TQDM_DISABLE", "NO_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)


def trainer_with(*callbacks: Callback[Any], **settings: Any) -> Trainer:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=callbacks, device="cpu", **settings)


@contextlib.contextmanager
def pseudo_terminal(columns: int = 120) -> Iterator[tuple[int, Callable[[], str]]]:
    """A terminal to write to, and a function that closes it and gives what it received."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        # Linux reports the end of a pseudo-terminal as an error, others as an empty read.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    still_open = contextlib.ExitStack()
    still_open.callback(os.close, ours)
    still_open.callback(reader.join)
    still_open.callback(os.close, theirs)

    def text() -> str:
        still_open.close()
        return b"".join(received).decode()

    with still_open:
        yield theirs, text


PROGRAM = (
    "from loopwright.callbacks import ProgressBar\n"
    "from loopwright.testing import two_step_fit\n"
    "two_step_fit(ProgressBar(), epochs=3)\n"
)


def run_program(stderr: int, **environment: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**inherited, "TERM": "xterm-256color", **environment},
        timeout=300,
        check=True,
    )


LINE = r"epoch {}/3  step {}  train/loss \d\.\d+  val/loss \d\.\d+  \d+ samples/s"


def test_redirected_output_is_a_plain_line_an_epoch_and_nothing_else() -> None:
    ran = run_program(subprocess.PIPE)
    assert [byte for byte in ran.stderr if (byte < 32 and byte != 10) or byte >= 127] == []
    lines = ran.stderr.decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(LINE.format(number, 2 * number), line)
    assert ran.stdout == b""


def test_on_a_terminal_one_line_is_drawn_over_and_left_in_its_final_state_without_colour() -> None:
    with pseudo_terminal() as (terminal, text):
        run_program(terminal, NO_COLOR="1", TQDM_COLOUR="green", TQDM_DISABLE="0")
        output = text()
    assert output.count("\n") == 1
    assert output.endswith("\r\n")
    drawn = output.strip().split("\r")
    assert len(drawn) >= 3
    assert drawn[0].startswith("epoch 1/3:   0%")
    values = r"train/loss \d\.\d+, val/loss \d\.\d+"
    assert re.fullmatch(rf"epoch 3/3: 100%\|█+\| 6/6 \[\d\d:\d\d<00:00, +\d+\.\d\dbatch/s, {values}\]", drawn[-1])
    assert all(len(line) <= 120 for line in drawn)
    assert "\x1b" not in output


def test_a_narrow_terminal_gets_a_line_that_fits() -> None:
    with pseudo_terminal(columns=40) as (terminal, text):
        with open(terminal, "w", closefd=False) as file:
            two_step_fit(ProgressBar(file=file), epochs=3)
        output = text()
    assert "epoch 3/3: 100%" in output
    assert max(len(line) for line in output.strip().split("\r")) <= 40


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with pseudo_terminal() as (terminal, text):
        with open(terminal, "w", closefd=False) as file:
            two_step_fit(ProgressBar(file=file), epochs=3)
        lines = text().split("\r\n")  # it is the terminal that adds the return
    assert lines.pop() == ""
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(LINE.format(number, 2 * number), line)


@pytest.mark.parametrize("terminal", [True, False])
def test_tqdm_disable_silences_everything(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    file = Terminal() if terminal else io.StringIO()
    trainer, _ = two_step_fit(ProgressBar(file=file))
    trainer.evaluate(tiny_data())
    assert file.getvalue() == ""


def test_tqdm_disable_may_also_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TQDM_DISABLE", "0")
    two_step_fit(ProgressBar(file=terminal))
    assert "100%" in terminal.drawn[-1]


def test_without_a_standard_error_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    _, result = two_step_fit(ProgressBar())
    assert result.stop_reason == "epochs"


def test_standard_error_is_looked_up_when_fit_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = ProgressBar()
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    two_step_fit(bar)
    assert later.getvalue().startswith("epoch 1/1  step 2  ")


def test_only_rank_0_shows_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for rank in ("0", "1", "12"):
        monkeypatch.setenv("RANK", rank)
        file = io.StringIO()
        two_step_fit(ProgressBar(file=file))
        shown[rank] = bool(file.getvalue())
    assert shown == {"0": True, "1": False, "12": False}


def test_the_rank_of_torch_distributed_counts_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        file = io.StringIO()
        two_step_fit(ProgressBar(file=file))
    finally:
        torch.distributed.destroy_process_group()
    assert file.getvalue()


# Plain lines.


def lines_of(file: io.StringIO) -> list[str]:
    """The lines without their rates, which no test can know."""
    return [re.sub(r"  [\d.]+ samples/s$", "", line) for line in file.getvalue().splitlines()]


def without_values(lines: list[str]) -> list[str]:
    return [re.sub(r"(\S+/\S+) \d\S*(?=  |$)", r"\1", line.replace("epoch ", "epoch:")) for line in lines]


def test_a_line_holds_the_values_of_its_epoch_only() -> None:
    file = io.StringIO()
    trainer_with(ProgressBar(file=file)).fit(tiny_data(), tiny_data(), epochs=3, validate=Every(epochs=2))
    assert without_values(lines_of(file)) == [
        "epoch:1/3  step 2  train/loss",
        "epoch:2/3  step 4  train/loss  val/loss",
        "epoch:3/3  step 6  train/loss",
    ]


def test_a_partial_last_epoch_gets_a_line_and_the_fit_that_ends_it_another() -> None:
    file = io.StringIO()
    trainer = trainer_with(ProgressBar(file=file))
    trainer.fit(tiny_data(12), steps=4)
    trainer.fit(tiny_data(12), epochs=2)
    assert without_values(lines_of(file)) == [
        "epoch:1  step 3  train/loss",
        "epoch:2  batch 1/3  step 4  train/loss",
        "epoch:2/2  step 6  train/loss",
    ]


def test_data_without_a_length_gets_lines_too() -> None:
    class WithoutLength:
        def __iter__(self) -> Iterator[Any]:
            yield from tiny_data()

    file = io.StringIO()
    trainer = trainer_with(ProgressBar(file=file))
    trainer.fit(WithoutLength(), epochs=1)
    trainer.fit(WithoutLength(), steps=3)
    assert without_values(lines_of(file)) == ["epoch:1/1  step 2  train/loss", "epoch:2  batch 1  step 3  train/loss"]


def test_the_rate_is_that_of_training_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("loopwright.callbacks.progress_bar.monotonic", lambda: now)
    file, state = io.StringIO(), tiny_state()
    bar = ProgressBar(file=file)
    bar.setup(state)
    bar.on_epoch_start(state)
    state.progress.samples, now = 10, 3.0
    state.stage = "val"
    bar.on_eval_start(state)
    now = 99.0
    bar.on_eval_end(state)
    state.stage, now = "train", 100.0
    state.progress.epoch, state.progress.step = 1, 5
    state.log("train/loss", math.nan)
    bar.on_epoch_end(state)
    assert file.getvalue() == "epoch 1  step 5  train/loss nan  2.5 samples/s\n"


def test_evaluate_gets_a_line() -> None:
    file = io.StringIO()
    trainer = trainer_with(ProgressBar(file=file))
    scores = trainer.evaluate(tiny_data())
    trainer.evaluate(tiny_data(), name="held-out")
    value = f"{scores['test/loss']:.4g}"
    assert file.getvalue().splitlines() == [f"test  test/loss {value}", f"test  held-out/loss {value}"]


def test_predict_shows_nothing() -> None:
    file = io.StringIO()
    trainer_with(ProgressBar(file=file)).predict(tiny_data())
    assert file.getvalue() == ""


def test_of_many_values_eight_are_shown_and_the_losses_first() -> None:
    class LogsMany(Callback[Any]):
        def on_epoch_start(self, state: State) -> None:
            for number in range(20):
                state.log(f"gradient/{number}", number)

    file = io.StringIO()
    trainer_with(LogsMany(), ProgressBar(file=file)).fit(tiny_data(), tiny_data(), epochs=1)
    (line,) = without_values(lines_of(file))
    others = "".join(f"  gradient/{number}" for number in range(6))
    assert line == f"epoch:1/1  step 2  train/loss  val/loss{others}"


class LogsAtEnds(Callback[Any]):
    """Logs the epoch's number as each epoch ends, and something as an evaluation does."""

    def on_epoch_end(self, state: State) -> None:
        state.log("number", state.progress.epoch)

    def on_eval_end(self, state: State) -> None:
        state.log("evaluated", 7.0)


@pytest.mark.parametrize("first", [True, False])
def test_a_line_holds_what_is_logged_at_its_own_epochs_end_wherever_the_bar_stands(first: bool) -> None:
    file = io.StringIO()
    bar, logs = ProgressBar(file=file), LogsAtEnds()
    trainer = trainer_with(*((bar, logs) if first else (logs, bar)))
    trainer.fit(tiny_data(), epochs=3)
    assert [line.rpartition("  ")[2] for line in lines_of(file)] == ["number 1", "number 2", "number 3"]
    assert [int(line.split("step ")[1].split()[0]) for line in lines_of(file)] == [2, 4, 6]
    trainer.evaluate(tiny_data())
    assert file.getvalue().splitlines()[-1].endswith("  evaluated 7")


@pytest.mark.parametrize("first", [True, False])
def test_a_bar_of_ones_own_that_overrides_these_hooks_keeps_its_place(first: bool) -> None:
    file = io.StringIO()

    class OwnBar(ProgressBar):
        def on_epoch_end(self, state: State) -> None:
            super().on_epoch_end(state)
            file.write(f"and {state.metrics['number']:g}\n")

        def on_eval_end(self, state: State) -> None:
            super().on_eval_end(state)

    bar, logs = OwnBar(file=file), LogsAtEnds()
    trainer = trainer_with(*((bar, logs) if first else (logs, bar)))
    trainer.fit(tiny_data(), epochs=2)
    written = file.getvalue().splitlines()
    assert written[1::2] == ["and 1", "and 2"]
    assert ["number 1" in written[0], "number 2" in written[2]] == [True, True]
    trainer.evaluate(tiny_data())
    assert file.getvalue().splitlines()[-1].endswith("  evaluated 7")
    shown = " ".join(trainer.explain(callbacks=True).replace("#", " ").split())
    assert re.search(r"on_epoch_end: \S*LogsAtEnds, \S*OwnBar\b", shown)


def test_the_line_is_there_before_the_epochs_save(tmp_path: Path) -> None:
    file = io.StringIO()
    lines_at_saves: list[int] = []

    class Looks(Callback[Any]):
        def state_dict(self) -> dict[str, Any]:
            lines_at_saves.append(len(lines_of(file)))
            return {}

    trainer_with(Checkpoint(tmp_path), ProgressBar(file=file), LogsAtEnds(), Looks()).fit(tiny_data(), epochs=3)
    assert lines_at_saves == [0, 1, 2, 3, 3]  # the first is the rehearsal, the last what is kept for a later fit


def test_an_epoch_in_whose_end_another_callback_fails_has_its_line_once() -> None:
    class Fails(Callback[Any]):
        def __init__(self, hook: str) -> None:
            self.hook = hook

        def on_epoch_start(self, state: State) -> None:
            self.fail("start", state)

        def on_epoch_end(self, state: State) -> None:
            self.fail("end", state)

        def fail(self, hook: str, state: State) -> None:
            if hook == self.hook and state.progress.epoch == 2:
                raise ValueError("enough")

    for hook in ("start", "end"):
        file = io.StringIO()
        with pytest.raises(ValueError, match="enough"):
            trainer_with(ProgressBar(file=file), Fails(hook)).fit(tiny_data(), epochs=3)
        assert without_values(lines_of(file)) == ["epoch:1/3  step 2  train/loss", "epoch:2/3  step 4  train/loss"]


def test_the_bar_ends_with_what_a_later_callback_logged_at_the_last_epochs_end() -> None:
    terminal = Terminal()
    trainer_with(ProgressBar(file=terminal), LogsAtEnds()).fit(tiny_data(), epochs=2)
    assert "number 2" in terminal.drawn[-1]


def test_a_name_that_the_file_cannot_encode_is_written_escaped() -> None:
    class LogsOwn(Callback[Any]):
        def on_epoch_end(self, state: State) -> None:
            state.log("größe", 1.0)

    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    two_step_fit(LogsOwn(), ProgressBar(file=file))
    assert b"gr\\xf6\\xdfe 1" in raw.getvalue()


def test_a_closed_pipe_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as file:
        _, result = two_step_fit(ProgressBar(file=file), epochs=3)
        # What could not be written is still in the buffer, and closing would try again.
        with pytest.raises(BrokenPipeError):
            file.close()
    assert result.progress.epoch == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# The bar.


def count_of(terminal: Terminal) -> str:
    """The count at the end, such as ``6/6``."""
    found = re.search(r" (\d+/\d+|\d+(?:step|batch)) \[", terminal.drawn[-1])
    assert found is not None, terminal.drawn[-1]
    return found.group(1)


@pytest.mark.parametrize(
    ("accumulate", "targets", "count"),
    [
        (1, {"epochs": 3}, "21/21"),
        (1, {"epochs": 3, "steps": 100}, "21/21"),
        (1, {"epochs": 3, "steps": 10}, "10/10"),
        (3, {"epochs": 3, "steps": 8}, "20/20"),  # 7 batches are 3 steps: two epochs, and two steps by three batches
        (3, {"epochs": 3, "steps": 9}, "21/21"),
        (3, {"steps": 4}, "4/4"),
    ],
)
def test_the_whole_is_what_the_first_target_comes_to(accumulate: int, targets: dict[str, Any], count: str) -> None:
    terminal = Terminal()
    trainer_with(ProgressBar(file=terminal), accumulate=accumulate).fit(tiny_data(28), **targets)
    assert count_of(terminal) == count
    assert "100%" in terminal.drawn[-1]


def test_data_without_a_length_is_counted_in_steps_without_an_end() -> None:
    class WithoutLength:
        def __iter__(self) -> Iterator[Any]:
            yield from tiny_data()

    terminal = Terminal()
    trainer = trainer_with(ProgressBar(file=terminal))
    trainer.fit(WithoutLength(), epochs=2)
    assert count_of(terminal) == "4step"
    assert terminal.drawn[-1].startswith("epoch 2/2: ")
    trainer.fit(WithoutLength(), steps=7)
    assert count_of(terminal) == "7/7"


def test_a_fit_that_goes_on_begins_where_the_last_ended() -> None:
    first, second = Terminal(), Terminal()
    bar = ProgressBar(file=first)
    trainer = trainer_with(bar)
    trainer.fit(tiny_data(), epochs=2)
    bar.file = second
    trainer.fit(tiny_data(), epochs=8)
    assert count_of(first) == "4/4"
    assert second.drawn[0].startswith("epoch 3/8:  25%")
    assert count_of(second) == "16/16"


def test_validation_in_mid_epoch_is_named_and_not_counted() -> None:
    class Slow(Callback[Any]):
        def on_eval_batch_end(self, state: State, output: Output) -> None:
            time.sleep(0.11)

    terminal = Terminal()
    trainer = trainer_with(Slow(), ProgressBar(file=terminal))
    trainer.fit(tiny_data(16), tiny_data(), epochs=1, validate=Every(steps=3))
    assert [line.split(":")[0] for line in terminal.drawn if "validating" in line] == [
        "epoch 1/1, validating 1/2",
        "epoch 1/1, validating 2/2",
    ]
    assert " 3/4 [" in next(line for line in terminal.drawn if "validating" in line)
    assert count_of(terminal) == "4/4"
    assert terminal.drawn[-1].startswith("epoch 1/1: 100%")


class StopsAt(Callback[Any]):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: State) -> None:
        if state.progress.step == self.step:
            state.stop("enough")


def test_a_run_that_was_stopped_is_left_where_it_stopped() -> None:
    terminal = Terminal()
    trainer_with(ProgressBar(file=terminal), StopsAt(5)).fit(tiny_data(16), epochs=10)
    assert count_of(terminal) == "5/40"
    assert terminal.drawn[-1].startswith("epoch 2/10:  12%")
    assert terminal.getvalue().endswith("\n")


def test_an_error_leaves_the_bar_where_it_came_and_ends_its_line() -> None:
    class Fails(Callback[Any]):
        def on_batch_end(self, state: State, output: Output) -> None:
            if state.progress.step == 5:
                raise RuntimeError("mine")

    terminal = Terminal()
    with pytest.raises(RuntimeError, match="mine"):
        trainer_with(ProgressBar(file=terminal), Fails()).fit(tiny_data(16), epochs=10)
    assert count_of(terminal) == "5/40"
    assert terminal.getvalue().endswith("\n")


def test_evaluate_gets_a_bar() -> None:
    terminal = Terminal()
    trainer_with(ProgressBar(file=terminal)).evaluate(tiny_data(12))
    assert terminal.drawn[0].startswith("test:   0%")
    assert re.search(r"^test: 100%.* 3/3 \[.*, test/loss \d\.\d+\]$", terminal.drawn[-1])


def test_the_values_shown_are_the_newest() -> None:
    terminal = Terminal()
    trainer = trainer_with(ProgressBar(file=terminal))
    result = trainer.fit(tiny_data(), tiny_data(), epochs=3)
    last = result.history[-1]
    assert f"train/loss {last['train/loss']:.4g}, val/loss {last['val/loss']:.4g}]" in terminal.drawn[-1]


def test_a_fast_run_is_drawn_about_ten_times_a_second_and_metrics_read_only_then() -> None:
    class LogsTensor(Callback[Any]):
        def on_batch_end(self, state: State, output: Output) -> None:
            state.log("own", torch.ones(()))

    terminal = Terminal()
    trainer = trainer_with(LogsTensor(), ProgressBar(file=terminal))
    began = time.monotonic()
    trainer.fit(tiny_data(8000), epochs=1)
    seconds = time.monotonic() - began
    assert trainer.state.progress.step == 2000
    drawings = len(terminal.drawn)
    assert 2 <= drawings <= 4 + 10 * seconds  # at the start, at the end, once more as it is closed
    assert trainer.state.metrics.reads <= drawings


@pytest.mark.parametrize("terminal", [True, False])
def test_between_two_drawings_a_batch_costs_one_look_at_the_clock(terminal: bool) -> None:
    bar = ProgressBar(file=Terminal() if terminal else io.StringIO())
    state, output = tiny_state(), Output(torch.zeros(()))
    bar.setup(state)
    bar.on_fit_start(state)
    calls: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(frame.f_code.co_name if event == "call" else argument.__name__)

    sys.setprofile(profile)
    bar.on_batch_end(state, output)
    sys.setprofile(None)
    bar.teardown(state)
    assert calls == ["on_batch_end", "monotonic", "setprofile"]


def test_no_thread_watches_the_bar() -> None:
    class Looks(Callback[Any]):
        def on_batch_end(self, state: State, output: Output) -> None:
            threads.update(type(thread).__name__ for thread in threading.enumerate())

    if tqdm.tqdm.monitor is not None:  # a bar of another test's, drawn by another library
        tqdm.tqdm.monitor.exit()  # type: ignore[no-untyped-call]  # the stubs leave it out
        tqdm.tqdm.monitor = None
    threads: set[str] = set()
    two_step_fit(ProgressBar(file=Terminal()), Looks())
    assert "TMonitor" not in threads


def test_it_can_be_pickled_before_and_after_a_fit_on_a_terminal() -> None:
    bar = ProgressBar()
    pickle.loads(pickle.dumps(bar))
    bar.file = Terminal()
    two_step_fit(bar)
    bar.file = None
    two_step_fit(pickle.loads(pickle.dumps(bar)))


# Notebooks, with stand-ins for IPython and ipywidgets that have what tqdm uses of them.


class Widget:
    """A widget: what it was made with, and the last values it was given."""

    def __init__(self, children: tuple[Any, ...] = (), **settings: Any) -> None:
        self.children = children
        self.layout, self.style = SimpleNamespace(), SimpleNamespace()
        self.value: Any = ""
        self.bar_style = ""
        vars(self).update(settings)


class FloatProgress(Widget): ...


class HTML(Widget): ...


class HBox(Widget): ...


class Notebook:
    """A Jupyter kernel, as far as the modules that are loaded can tell; ``shown`` is what was displayed."""

    def __init__(self, application: str = "IPKernelApp") -> None:
        self.shown: list[Widget] = []
        shell = SimpleNamespace(config={application: {}})
        display = SimpleNamespace(display=self.shown.append)
        widgets = SimpleNamespace(FloatProgress=FloatProgress, HTML=HTML, HBox=HBox)
        self.modules: dict[str, SimpleNamespace | None] = {
            "IPython": SimpleNamespace(get_ipython=lambda: shell, display=display),
            "IPython.display": display,
            "ipywidgets": widgets,
        }

    def lines(self) -> list[str]:
        """Left text, value and end of the bar, its style, right text."""
        return [
            f"{left.value} {bar.value}/{bar.max} {bar.bar_style} {right.value}".replace("\u2007", " ")
            for left, bar, right in (box.children for box in self.shown)
        ]


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Notebook], io.StringIO]]:
    """Enters a notebook, and gives what stands for its standard error."""
    # tqdm.notebook looks for ipywidgets when it is imported, and has to look again in each test.
    earlier = sys.modules.pop("tqdm.notebook", None)
    monkeypatch.delattr(tqdm, "notebook", raising=False)

    def enter(notebook: Notebook) -> io.StringIO:
        for name, module in notebook.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert isinstance(sys.stderr, io.StringIO)
        return sys.stderr

    yield enter
    sys.modules.pop("tqdm.notebook", None)
    if earlier is not None:
        sys.modules["tqdm.notebook"] = earlier


Enter = Callable[[Notebook], io.StringIO]


def test_in_a_notebook_the_bar_is_a_widget(enter: Enter) -> None:
    notebook = Notebook()
    errors = enter(notebook)
    trainer, _ = two_step_fit(ProgressBar(), epochs=3)
    trainer.evaluate(tiny_data())
    fit, evaluation = notebook.lines()
    assert re.fullmatch(r"epoch 3/3: 100% 6/6 success  6/6 \[.*batch/s, train/loss .*, val/loss .*\]", fit)
    assert re.fullmatch(r"test: 100% 2/2 success  2/2 \[.*, test/loss .*\]", evaluation)
    assert errors.getvalue() == ""


def test_in_a_notebook_only_an_error_is_shown_as_a_failure(enter: Enter) -> None:
    class Fails(Callback[Any]):
        def on_epoch_end(self, state: State) -> None:
            raise RuntimeError("mine")

    notebook = Notebook()
    enter(notebook)
    two_step_fit(ProgressBar(), StopsAt(2), epochs=3)
    with pytest.raises(RuntimeError, match="mine"):
        two_step_fit(ProgressBar(), Fails(), epochs=3)
    assert [re.findall(r"% (\d/\d) (\w+)", line) for line in notebook.lines()] == [
        [("2/6", "info")],
        [("2/6", "danger")],
    ]


def test_in_a_notebook_the_bar_can_be_pickled_after_a_fit(enter: Enter) -> None:
    enter(Notebook())
    bar = ProgressBar()
    two_step_fit(bar)
    two_step_fit(pickle.loads(pickle.dumps(bar)))


def test_in_a_notebook_without_ipywidgets_the_bar_is_text(enter: Enter) -> None:
    notebook = Notebook()
    notebook.modules["ipywidgets"] = None  # an import of it fails
    errors = enter(notebook).getvalue
    two_step_fit(ProgressBar(), epochs=3)
    assert notebook.shown == []
    assert errors().startswith("\r")
    assert errors().count("\n") == 1
    assert errors().split("\r")[-1].startswith("epoch 3/3: 100%")


def test_ipython_without_a_kernel_is_no_notebook(enter: Enter) -> None:
    notebook = Notebook("TerminalIPythonApp")
    errors = enter(notebook)
    two_step_fit(ProgressBar(), epochs=3)
    assert notebook.shown == []
    assert re.fullmatch(LINE.format(1, 2), errors.getvalue().splitlines()[0])


def test_in_a_notebook_a_file_that_was_given_gets_its_lines(enter: Enter) -> None:
    notebook, file = Notebook(), io.StringIO()
    errors = enter(notebook)
    two_step_fit(ProgressBar(file=file), epochs=3)
    assert len(file.getvalue().splitlines()) == 3
    assert (notebook.shown, errors.getvalue()) == ([], "")


def test_nothing_is_logged_by_a_fit_that_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "loopwright"):
        two_step_fit(ProgressBar(file=Terminal()))
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


@pytest.mark.parametrize(
    ("file", "what", "fix"),
    [
        ("log.txt", "file is 'log.txt', which has no write, no flush", "file=open('log.txt', 'w')"),
        (Path("log.txt"), "which has no write, no flush", "file=open('log.txt', 'w')"),
        (True, "file is True, which has no write", "file=sys.stdout, or leave it out"),
        (io.BytesIO(), ", opened for bytes", "file=sys.stdout, or leave it out"),
    ],
)
def test_what_text_cannot_be_written_to_is_refused_by_the_constructor(file: Any, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ProgressBar(file=file)
    assert what in caught.value.what
    assert caught.value.fix == fix


def test_a_file_that_is_opened_for_bytes_is_answered_with_its_name(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("wb") as file, pytest.raises(ConfigError) as caught:
        ProgressBar(file=file)  # type: ignore[arg-type]  # what a type checker says too
    assert caught.value.fix == f"file=open({str(tmp_path / 'log.txt')!r}, 'w')"


class Tee:
    """What copies all to a second place, as people write it: with nothing that says whether it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_a_file_of_ones_own_that_does_not_say_whether_it_is_a_terminal_gets_plain_lines() -> None:
    tee = Tee()
    two_step_fit(ProgressBar(file=tee))  # type: ignore[arg-type]  # no whole TextIO
    assert tee.text.startswith("epoch 1/1  step 2  train/loss ")
