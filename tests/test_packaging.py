"""What a user installs: the wheel's contents, its metadata, and the README's quickstart run from it."""

from __future__ import annotations

import email
import json
import re
import resource
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import loopwright
from clean_environment import ROOT, built_wheel, clean_python, run

pytestmark = pytest.mark.xdist_group("wheel")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_wheel(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def files(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def metadata(wheel: Path, files: list[str]) -> Message:
    [name] = [file for file in files if file.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def test_the_wheel_holds_the_package_and_nothing_else(files: list[str]) -> None:
    sources = (ROOT / "src" / "loopwright").rglob("*")
    expected = {str(path.relative_to(ROOT / "src")) for path in sources if path.suffix in (".py", ".typed")}
    assert "loopwright/py.typed" in expected
    assert {file for file in files if ".dist-info/" not in file} == expected


def test_the_licence_is_an_expression_and_its_text_is_inside(wheel: Path, files: list[str], metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert [c for c in metadata.get_all("Classifier", []) if c.startswith("License")] == []
    [name] = [file for file in files if file.endswith(".dist-info/licenses/LICENSE")]
    assert "Apache License" in zipfile.ZipFile(wheel).read(name).decode()


def test_the_wheel_says_what_it_is(metadata: Message) -> None:
    assert metadata["Name"] == "loopwright"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


def test_an_installation_requires_five_packages_and_caps_none(metadata: Message) -> None:
    required = {r.name: str(r.specifier) for r in requirements(metadata) if r.marker is None}
    assert required.keys() == {"torch", "tqdm", "tensorboard", "safetensors", "typing-extensions"}
    assert required["torch"] == ">=2.10"
    assert [name for name, range_ in required.items() if not re.fullmatch(r">=[\d.]+", range_)] == []


def test_the_extras_are_extras_of_the_package(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == {"plot", "metrics", "examples", "docs", "dev"}
    of = {
        extra: {r.name for r in requirements(metadata) if r.marker is not None and r.marker.evaluate({"extra": extra})}
        for extra in ("plot", "metrics", "examples", "docs", "dev")
    }
    assert of["plot"] == {"matplotlib"}
    assert of["metrics"] == {"torchmetrics"}
    assert of["examples"] == {"matplotlib", "numpy", "scikit-learn"}
    assert of["docs"] == {"mkdocs", "mkdocs-material", "mkdocstrings"}
    assert of["dev"] >= {"hatchling", "mypy", "pyright", "pytest", "ruff"}
    assert "dependency-groups" not in PROJECT  # the usual pip is older than those


def test_every_direct_dependency_is_pinned_to_a_version_that_its_range_allows() -> None:
    project = PROJECT["project"]
    declared = [
        *PROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(r.name): r for r in map(Requirement, (li for li in lines if li and li[0] != "#"))}
    assert pins[canonicalize_name("torch")].specifier == SpecifierSet("==2.13.0")
    for requirement in map(Requirement, declared):
        if requirement.name == "loopwright":
            continue
        [pin] = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def quickstart() -> tuple[str, str]:
    """The first Python block of the README, and the block that follows it: the output that it states."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    first = next(index for index, (language, _) in enumerate(blocks) if language == "python")
    (_, code), (language, output) = blocks[first : first + 2]
    assert language == "text"
    return code, output


def test_the_quickstart_is_at_most_25_lines() -> None:
    assert len(quickstart()[0].splitlines()) <= 25


def test_the_quickstart_prints_what_the_readme_says(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Verbatim, offline, from the wheel, in a clean environment, in under 10 seconds of computing.

    Computing, not waiting: what else the machine has to do is not the quickstart's.
    """
    python = clean_python(tmp_path_factory.getbasetemp())
    where = run(python, "-I", "-c", "import loopwright; print(loopwright.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parent.parent)

    code, output = quickstart()
    (tmp_path / "quickstart.py").write_text(code, encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(python, "-I", "quickstart.py", folder=tmp_path) == output
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_the_clean_environment_is_offline(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    python = clean_python(tmp_path_factory.getbasetemp())
    program = (
        "import socket\n"
        "try:\n"
        "    socket.create_connection(('localhost', 9))\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    assert "this must run offline" in run(python, "-I", "-c", program, folder=tmp_path)


def test_the_wheel_and_the_sdist_pass_twines_strict_check_and_the_sdist_makes_the_same_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    """The commands of a release: ``python -m build``, which makes the wheel from the sdist, and ``twine check``."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)
    [sdist], [second] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert zipfile.ZipFile(second).namelist() == zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"PKG-INFO", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/test_packaging.py"}
    checked = run(sys.executable, "-m", "twine", "check", "--strict", sdist, second)
    assert checked.count("PASSED") == 2


def test_the_version_is_one_everywhere(metadata: Message) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert metadata["Version"] == loopwright.__version__
    assert loopwright.__version__ == released[0] or ".dev" in loopwright.__version__


def test_the_command_line_runs_from_the_wheel(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    python = clean_python(tmp_path_factory.getbasetemp())
    report = json.loads(run(python, "-I", "-m", "loopwright", "doctor", "--json", folder=tmp_path))
    assert report["versions"]["loopwright"] == loopwright.__version__
    assert report["problems"] == []
