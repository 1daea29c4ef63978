"""Runs what the documentation shows: the Python blocks of README.md and docs/, and the examples in the docstrings.

A page is one test. Its blocks marked ``python`` run from top to bottom in one module and one empty working folder, and
a block marked ``text`` that comes directly after one is what that one prints, all of it; ``...`` there stands for
anything, and a number with more than six decimals may differ by a millionth. A block without such output has to print
nothing.

A block that includes a file runs as that file if its output is shown; else ``tests/test_examples.py`` is what runs it.
It begins with ``{ .python``: in a block marked ``python``, ruff would take the line that includes for code.

A docstring is one test too: its lines after ``>>>`` run where the public names of loopwright, ``torch``, ``nn`` and a
model, an optimizer, a loss and two loaders exist.
"""

from __future__ import annotations

import contextlib
import difflib
import doctest
import io
import math
import re
import runpy
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example, Region, Sybil

ROOT = Path(__file__).parent
_FENCE = re.compile(
    r"^(?P<indent> *)```(?: \{ \.)?(?P<language>\w+)[^\n`]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_INCLUDE = re.compile(r'^--8<-- "(?P<path>[^":]+)(?P<lines>[:,\d]*)"$')


@dataclass(frozen=True)
class Block:
    """A Python block of a page: its code, where that begins, and what it is to print."""

    code: str
    line: int
    printed: str

    def run(self, page: str, module: types.ModuleType) -> None:
        """Run it in ``module``, or the file that it includes by itself."""
        if (include := _INCLUDE.match(self.code.strip())) is None:
            exec(compile("\n" * (self.line - 1) + self.code, page, "exec"), vars(module))
        elif self.printed:
            assert not include["lines"], f"{page}, line {self.line}: output is shown for a part of {include['path']}"
            runpy.run_path(str(ROOT / include["path"]), run_name="__main__")


def parse_page(document: Document) -> Iterable[Region]:
    """All of the page as one region: its Python blocks, in order."""
    fences = list(_FENCE.finditer(document.text))
    blocks = []
    for index, fence in enumerate(fences):
        if fence["language"] != "python":
            continue
        after = fences[index + 1] if index + 1 < len(fences) else None
        follows = after is not None and not document.text[fence.end() : after.start()].strip()
        output = after["body"] if after is not None and follows and after["language"] == "text" else ""
        line = document.text.count("\n", 0, fence.start()) + 2
        blocks.append(Block(textwrap.dedent(fence["body"]), line, textwrap.dedent(output)))
    if blocks:
        yield Region(fences[0].start(), fences[-1].end(), blocks, run_page)


def run_page(example: Example) -> str | None:
    """Run the blocks; what is wrong with what one printed, or None."""
    module = types.ModuleType("page")  # a module, so that what it defines can be pickled
    with _empty_folder(), _imported(module):
        for block in example.parsed:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                block.run(example.path, module)
            if not _as_shown(block.printed, printed.getvalue()):
                return f"the block at line {block.line} printed something else:\n" + "\n".join(
                    difflib.unified_diff(
                        block.printed.splitlines(), printed.getvalue().splitlines(), "the page", "the run", lineterm=""
                    )
                )
    return None


def _as_shown(printed: str, found: str) -> bool:
    """Whether that was printed: another processor may round the last digits otherwise."""
    long = re.compile(r"(\.\.\.|-?\d+\.\d{7,})")
    parts = long.split(printed)
    pattern = "".join(
        re.escape(part) if index % 2 == 0 else ".*" if part == "..." else r"(-?\d+\.\d+)"
        for index, part in enumerate(parts)
    )
    match = re.fullmatch(pattern, found, re.DOTALL)
    shown = [float(part) for part in parts[1::2] if part != "..."]
    return match is not None and all(
        math.isclose(number, float(other), rel_tol=0, abs_tol=1e-6)
        for number, other in zip(shown, match.groups(), strict=True)
    )


@contextlib.contextmanager
def _empty_folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _imported(module: types.ModuleType) -> Iterator[None]:
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]


def parse_docstring(document: Document) -> Iterable[Region]:
    """All of the docstring as one region: its lines after ``>>>``, and what follows them."""
    if examples := doctest.DocTestParser().get_examples(document.text):
        yield Region(0, len(document.text), examples, run_docstring)


def run_docstring(example: Example) -> str | None:
    """Run the lines; doctest's own report of what they printed instead, or None."""
    report: list[str] = []
    write: Callable[[str], object] = report.append
    test = doctest.DocTest(example.parsed, _names(), Path(example.path).stem, example.path, example.line - 1, None)
    with _empty_folder():
        results = doctest.DocTestRunner(verbose=False).run(test, out=write)
    return "".join(report) if results.failed else None


def _names() -> dict[str, Any]:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import loopwright.callbacks
    import loopwright.data
    import loopwright.testing

    public = {
        name: getattr(module, name)
        for module in (loopwright, loopwright.callbacks, loopwright.data, loopwright.testing)
        for name in module.__all__
    }
    model = nn.Linear(3, 1)
    data = TensorDataset(torch.randn(20, 3), torch.randn(20, 1))
    return public | {
        "Mapping": Mapping,
        "Path": Path,
        "loss": nn.MSELoss(),
        "model": model,
        "nn": nn,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "torch": torch,
        "train_loader": DataLoader(data, batch_size=5, shuffle=True),
        "val_loader": DataLoader(data, batch_size=5),
    }


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a browser or an accelerator where there is none."""
    import torch

    from site_check import available

    lacking = {"gpu"} if not torch.cuda.is_available() else set()
    if any(item.get_closest_marker("browser") for item in items) and not available():
        lacking.add("browser")
    missing = [item for item in items if any(item.get_closest_marker(marker) for marker in lacking)]
    if missing:
        config.hook.pytest_deselected(items=missing)
        items[:] = [item for item in items if item not in missing]


_pages = Sybil([parse_page], patterns=["README.md", "docs/*.md", "docs/*/*.md"])
_docstrings = Sybil([parse_docstring], patterns=["src/loopwright/*.py", "src/loopwright/callbacks/*.py"])
pytest_collect_file = (_pages + _docstrings).pytest()
