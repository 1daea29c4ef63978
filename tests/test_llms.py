"""docs/llms.txt: its code runs, and its list of the API is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llms import MARK, MODULES, PAGE, generated
from loopwright.callback import HOOKS

TEXT = PAGE.read_text(encoding="utf-8")
HEAD, _, API = TEXT.partition(MARK)


def test_its_list_of_the_api_is_what_the_code_says() -> None:
    assert generated() == API, "python tests/llms.py writes it anew"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_its_signature_there(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]  # it is a module
    assert [name for name in names if not re.search(rf"^### (class )?{name}\b", API, re.MULTILINE)] == []


def test_its_code_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", HEAD, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    exec("".join(blocks), {})
    assert (tmp_path / "runs" / "metrics.csv").exists()


def test_it_names_every_hook_in_the_order_of_a_run() -> None:
    order = re.findall(r"\b(setup|teardown|on_\w+)\b", HEAD.rpartition("A run calls")[2])
    first = list(dict.fromkeys(order))
    assert sorted(first) == sorted(HOOKS)
    assert first[:8] == list(HOOKS[:8])


def test_no_address_of_this_machine_is_in_it() -> None:
    assert not re.search(r" at 0x|/home/|/root/|/work/", TEXT)
