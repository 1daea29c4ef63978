"""What the public API has lost or changed since the last version that is tagged.

$ make api-check

It fails where a user's program could fail, unless the version of the package says so: a new major one, or, before 1.0,
a new minor one. Where no version is tagged there is nothing to compare with.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def last_tag(root: Path) -> str | None:
    """The newest version's tag that the present state comes from."""
    command = ["git", "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return found.stdout.strip() or None


def announced(version: str, tag: str) -> bool:
    """Whether a version may break what worked with the tagged one, as Semantic Versioning has it."""
    major, minor, *_ = map(int, re.findall(r"\d+", version))
    old_major, old_minor, *_ = map(int, re.findall(r"\d+", tag))
    return (major, minor) > (old_major, old_minor) if old_major == 0 else major > old_major


def check(root: Path) -> int:
    """Compare, print what is found, and give the exit code."""
    if (tag := last_tag(root)) is None:
        print("no version is tagged yet: there is nothing to compare the API with")  # noqa: T201
        return 0
    print(f"the API since {tag}:", flush=True)  # noqa: T201
    command = ["check", "loopwright", "--search", "src", "--against", tag, "--format", "verbose"]
    code = subprocess.run([sys.executable, "-m", "griffe", *command], cwd=root).returncode
    text = (root / "src" / "loopwright" / "__init__.py").read_text(encoding="utf-8")
    [version] = re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    if code and announced(version, tag):
        print(f"which {version} may do")  # noqa: T201
        return 0
    return code


if __name__ == "__main__":
    sys.exit(check(ROOT))
