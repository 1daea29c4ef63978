"""A process that has imported torch once, and forks one child for each run asked of it.

So a test can start real processes by the hundred and kill them, without waiting for the import each time. It reads one
JSON object a line, ``{"call": "module.function", "arguments": [...], "output": path}``, and answers with the child's
pid; each child is the leader of a session of its own. A line with a pid waits for that child, and is answered with its
exit status, -9 for SIGKILL; ``null`` is the end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class Nursery:
    """Starts and awaits the children of one nursery process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.running: set[int] = set()

    def start(self, call: Callable[..., object], *arguments: object, output: Path) -> int:
        """Start a child that calls a function of a module of tests; its pid.

        Args:
            call: The function.
            arguments: What it gets: plain data as JSON has it.
            output: Where its stdout and stderr go, appended.
        """
        name = f"{call.__module__}.{call.__qualname__}"
        pid = int(self._ask({"call": name, "arguments": arguments, "output": str(output)}))
        self.running.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Wait for a child; its exit code, or the negative number of the signal that ended it."""
        self.running.discard(pid)
        return int(self._ask(pid))

    def run(self, call: Callable[..., object], *arguments: object, output: Path) -> int:
        """Start a child and wait for it."""
        return self.wait(self.start(call, *arguments, output=output))

    def _ask(self, question: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the nursery has ended: {self._process.wait(10)}"
        return answer


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery process, and the end of it and of all its children."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    children = Nursery(process)
    try:
        yield children
    finally:
        for pid in children.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        # Not by the end of its input: workers that this process has forked may hold that open.
        process.communicate("null\n")
    assert process.returncode == 0, f"the nursery has ended: {process.returncode}"


def until(path: Path, *, seconds: float = 60) -> None:
    """Wait until a file exists: how a child says that it has come to a certain point."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear within {seconds} seconds"
        time.sleep(0.002)


def _child(question: Any) -> NoReturn:
    code = 70  # what stays where not even the interpreter's end was reached
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background
        output = os.open(question["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.close(output)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        module, name = question["call"].rsplit(".", 1)
        code = 0
        try:
            getattr(importlib.import_module(module), name)(*question["arguments"])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # As at a process's end, but for what belongs to the nursery: threads are awaited first.
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os._exit(code)


def _main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    importlib.import_module("broken_runs")  # and with it torch and loopwright
    for line in sys.stdin:
        if (question := json.loads(line)) is None:
            break
        if isinstance(question, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(question, 0)[1])
        elif (answer := os.fork()) == 0:
            _child(question)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
