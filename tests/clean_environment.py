"""The built wheel, and a clean environment that it is installed in: what a user has, without the download."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

OFFLINE = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise OSError(f"this must run offline, and asked for {event} {arguments}")

sys.addaudithook(refuse)
"""


def run(*command: str | Path, folder: Path | None = None) -> str:
    """What the command writes to its standard output; if it fails, an assertion that shows all that it wrote.

    Python's own settings, such as PYTHONPATH, are kept from it.
    """
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY", "PYTEST"))}
    ran = subprocess.run(
        command, cwd=folder, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


@functools.cache
def built_wheel(folder: Path) -> Path:
    """The wheel, built once below ``folder`` from this checkout."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


@functools.cache
def clean_python(folder: Path) -> Path:
    """The interpreter of a new environment that the wheel is installed in, and that cannot reach the network.

    torch and the rest are borrowed from the present environment. A folder that a ``.pth`` file names is searched, but
    the ``.pth`` files in it are not read: the editable installation there does not come along.
    """
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built_wheel(folder))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    (site / "offline.py").write_text(OFFLINE)
    (site / "offline.pth").write_text("import offline\n")
    return python
