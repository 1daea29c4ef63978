"""What every benchmark here shares: fair timing, medians with their spread, aligned tables, and the machine."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

import loopwright

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def seconds(run: Callable[[], object]) -> float:
    """How long ``run`` takes, by the clock.

    The garbage that others left is collected before. The collector stays on meanwhile, since whoever makes garbage
    is to pay for it; but not for walking over all that importing torch has made, which ``freeze`` sees to.
    """
    gc.collect()
    start = perf_counter()
    run()
    return perf_counter() - start


def freeze() -> None:
    """Exempt all objects that exist by now from garbage collection: call it once, after the imports."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it: half of all measurements lie between those."""

    median: float
    quartile1: float
    quartile3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of two or more values."""
        quartile1, median, quartile3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, quartile1, quartile3)

    def text(self, digits: int) -> str:
        """For example ``0.71 (0.70-0.73)``."""
        return f"{self.median:.{digits}f} ({self.quartile1:.{digits}f}..{self.quartile3:.{digits}f})"


Table = Sequence[Sequence[str]]
"""Rows of cells; the first row is the heading."""


def aligned(table: Table) -> str:
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def markdown(table: Table) -> str:
    """The table for a page."""
    heading, *rows = table
    lines: Iterable[Sequence[str]] = (heading, ["---"] * len(heading), *rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def add_outputs(parser: argparse.ArgumentParser, *, plot: bool = False) -> None:
    """The options that say where the figures go."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there, for a page")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a picture there; needs matplotlib")


def put_out(
    options: argparse.Namespace,
    found: Mapping[str, Any],
    *tables: Table,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Print what was found, and write and draw it where the options say.

    Args:
        options: Those of ``add_outputs``.
        found: All that goes into the JSON file; under ``"machine"`` what the figures depend on.
        tables: What is printed, and goes into the page.
        draw: Draws the picture; it is given the path.
    """
    facts = found["machine"]
    print(*(f"{name}: {fact}" for name, fact in facts.items()), *(f"\n{aligned(table)}" for table in tables), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.markdown is not None:
        listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        options.markdown.write_text("\n\n".join([*map(markdown, tables), listed]) + "\n")
    if draw is not None and options.plot is not None:
        draw(options.plot)


def plain_axes(ax: Axes) -> None:
    """A light grid behind the data and no frame, like the learning curves that ``Result.plot`` draws."""
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def machine() -> dict[str, str]:
    """What the figures depend on: the processor, and the versions."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, of which one is used",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "loopwright": loopwright.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def disk(folder: Path) -> str:
    """The file system that a folder is on, as Linux tells it."""
    mounts, place = Path("/proc/mounts"), folder.resolve()
    rows = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    found = {row[1]: f"{row[2]} on {row[0]}" for row in rows if place.is_relative_to(row[1])}
    return found[max(found, key=len)] if found else "unknown"
