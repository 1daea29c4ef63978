"""Every benchmark, one after the other: tables on the terminal, JSON and Markdown into a folder, and the pictures.

The pages of the documentation include what this writes. Each benchmark is a process of its own, and one that fails
leaves its former figures as they are.

$ python benchmarks/everything.py --peers .venv-peers/bin/python
$ python benchmarks/everything.py --quick --results /tmp/figures --pictures /tmp/figures
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder: what it writes, and how it is run when time is short."""

    name: str
    short: tuple[str, ...] = ("--rounds", "5")  # a few minutes for all of them together
    whole: tuple[str, ...] = ()  # and when it is not
    plots: bool = False
    peers: bool = False  # whether it needs the interpreter with the other trainers


BENCHMARKS = (
    Benchmark("overhead", ("--rounds", "10"), plots=True),
    Benchmark("account", whole=("--callgrind",) if shutil.which("valgrind") else ()),
    Benchmark("passes", ("--rounds", "10")),
    Benchmark("peers", ("--rounds", "3"), plots=True, peers=True),
    Benchmark("inspector", ("--rounds", "5")),
    Benchmark("imports", peers=True),
    Benchmark("memory", ("--steps", "2000"), plots=True),
    Benchmark("scaling", ("--rounds", "2", "--up-to", "1000000"), plots=True),
    Benchmark("compiling", ("--rounds", "2"), plots=True),
    Benchmark("checkpoint", ("--rounds", "3")),
)


def command(benchmark: Benchmark, into: Path, python: str | None, length: Sequence[str]) -> list[str]:
    """What runs it, and writes into the folder."""
    found = [sys.executable, str(HERE / f"{benchmark.name}.py"), *length]
    found += ["--json", str(into / f"{benchmark.name}.json"), "--markdown", str(into / f"{benchmark.name}.md")]
    if benchmark.plots:
        found += ["--plot", str(into / f"{benchmark.name}.png")]
    if benchmark.peers and python is not None:
        found += ["--python", python]
    return found


def run(benchmark: Benchmark, python: str | None, length: Sequence[str], results: Path, pictures: Path) -> bool:
    """Run it and, if all went well, put what it wrote where it belongs."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(command(benchmark, Path(folder), python, length), check=False).returncode:
            return False
        for written in Path(folder).iterdir():
            place = pictures / f"bench_{written.name}" if written.suffix == ".png" else results / written.name
            place.write_bytes(written.read_bytes())
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--peers", metavar="PYTHON", help="the interpreter with the other trainers (default: this)")
    shorter = parser.add_mutually_exclusive_group()
    shorter.add_argument("--short", action="store_true", help="few rounds of everything: some minutes")
    shorter.add_argument("--quick", action="store_true", help="what shows that it runs, and no times")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="FOLDER", help="for JSON and Markdown"
    )
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "assets", metavar="FOLDER")
    options = parser.parse_args(arguments)
    for folder in (options.results, options.pictures):
        folder.mkdir(parents=True, exist_ok=True)

    failed = []
    for benchmark in BENCHMARKS:
        if options.only is not None and benchmark.name not in options.only:
            continue
        print(f"\n== {benchmark.name}", flush=True)
        length = ("--quick",) if options.quick else benchmark.short if options.short else benchmark.whole
        start = perf_counter()
        if not run(benchmark, options.peers, length, options.results, options.pictures):
            failed.append(benchmark.name)
        print(f"\n({perf_counter() - start:.0f} s)", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
