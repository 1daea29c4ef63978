"""The look at the site in a browser: what it takes for a problem, and, where Chromium is there, the site itself."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import site_check
from clean_environment import ROOT, run


def test_a_link_to_a_page_or_a_place_that_is_not_there_is_broken(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    names = {"": {"top"}, "howto/data/": {"what-it-does"}}
    here = "http://127.0.0.1:1"
    right = [f"{here}/#top", f"{here}/howto/data/#what-it-does", f"{here}/howto/data/index.html", f"{here}/picture.png"]
    assert site_check.broken_links(here, tmp_path, {"": [*right, "https://elsewhere/x"]}, names) == []
    wrong = [f"{here}/#bottom", f"{here}/howto/date/", f"{here}/other.png"]
    assert site_check.broken_links(here, tmp_path, {"": wrong}, names) == [
        ": there is no #bottom on the first page",
        ": there is no howto/date/",
        ": there is no other.png",
    ]


def test_contrast_is_that_of_wcag() -> None:
    assert site_check.contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert site_check.contrast("rgb(119, 119, 119)", "rgba(255, 255, 255, 1)") == pytest.approx(4.48, abs=0.01)


def test_a_request_is_read_from_the_record_of_the_browser() -> None:
    sent = {"method": "Network.requestWillBeSent", "params": {"request": {"url": "https://elsewhere/x"}}}
    other = {"method": "Network.dataReceived", "params": {}}
    entries = [{"message": json.dumps({"message": message})} for message in (sent, other)]
    assert site_check.requested(entries) == ["https://elsewhere/x"]


def test_the_site_is_served_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "howto").mkdir()
    (tmp_path / "howto" / "index.html").write_text("words", encoding="utf-8")
    assert site_check.addresses(tmp_path) == ["howto/"]
    with site_check.served(tmp_path) as root, urllib.request.urlopen(f"{root}/howto/") as answer:
        assert answer.read() == b"words"


GOOD = """<!doctype html><html><head><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<script>
addEventListener("DOMContentLoaded", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.body.dataset.mdColorScheme = dark ? "slate" : "default";
  document.body.style.background = dark ? "#111" : "#fff";
  document.body.style.color = dark ? "#ddd" : "#222";
});
</script></head><body><article><p id="here">Words</p>FAULT</article>
<input data-md-component="search-query">
<a class="md-search-result__link" href="/reference/callbacks/">EarlyStopping</a></body></html>"""

FAULTS = {
    "a message in the console": ('<script>console.error("oh dear")</script>', "oh dear"),
    "an exception in a script": ("<script>nowhere.at.all()</script>", "nowhere is not defined"),
    "a picture that is not there": ('<img src="none.png">', "none.png"),
    "a script of another host": (
        '<script src="https://elsewhere.example/x.js"></script>',
        "asks for https://elsewhere",
    ),
    "a request to another host": (
        '<script>fetch("http://elsewhere.example/x").catch(() => 0)</script>',
        "asks for http://elsewhere.example/x",
    ),
    "a dead link": ('<a href="howto/nowhere/">a</a>', "there is no howto/nowhere/"),
    "a dead anchor": ('<a href="#nowhere">a</a>', "there is no #nowhere on the first page"),
    "a dead anchor of another page": (
        '<a href="reference/callbacks/#no">a</a>',
        "there is no #no on reference/callbacks/",
    ),
    "a page wider than a phone": ('<div style="width: 900px">x</div>', "on a phone of 390"),
    "text that is hard to read": ("<style>p { color: #777 }</style>", "a contrast of "),
    "a dark page that stays white": ("<style>body { background: #fff !important }</style>", "in place of slate"),
}


def site_with(fault: str, folder: Path) -> Path:
    """A site of two pages, the first with that in it."""
    (folder / "reference" / "callbacks").mkdir(parents=True)
    (folder / "index.html").write_text(GOOD.replace("FAULT", fault), encoding="utf-8")
    (folder / "reference" / "callbacks" / "index.html").write_text(GOOD.replace("FAULT", ""), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dark() -> Iterator[Any]:
    """A browser for all of these: to start one takes longer than to look."""
    with site_check.browser() as driver:
        yield driver


def look(driver: Any, site: Path) -> list[str]:
    with site_check.served(site) as root:
        return site_check.Check(driver, site, root, None).run()


@pytest.mark.browser
def test_nothing_is_wrong_with_a_good_page(dark: Any, tmp_path: Path) -> None:
    """Else it would be no proof that a fault is found in a bad one."""
    good = site_with('<a href="#here">a</a>', tmp_path)
    assert look(dark, good) == []
    assert site_check.check(good) == []  # in the light as well


@pytest.mark.browser
@pytest.mark.parametrize("name", FAULTS)
def test_a_page_with_one_fault_is_found_to_have_it(name: str, dark: Any, tmp_path: Path) -> None:
    fault, words = FAULTS[name]
    found = look(dark, site_with(fault, tmp_path))
    assert words in "\n".join(found)
    assert [problem for problem in found if not problem.startswith((": ", "the search: "))] == []


@pytest.mark.browser
def test_a_search_that_finds_nothing_is_found(dark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "PATIENCE", 0.5)
    site_with("", tmp_path)
    page = tmp_path / "index.html"
    page.write_text(page.read_text(encoding="utf-8").replace(">EarlyStopping<", "><"), encoding="utf-8")
    assert look(dark, tmp_path) == ["the search for EarlyStopping finds []"]


@pytest.mark.browser
@pytest.mark.slow
def test_nothing_is_wrong_with_the_site_in_a_browser(tmp_path: Path) -> None:
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path, folder=ROOT)
    assert site_check.check(tmp_path) == []
