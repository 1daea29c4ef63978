"""The look at the site in a browser: what it takes for a problem, and, where Chromium is there, the site itself."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

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


BAD = """<meta name="viewport" content="width=device-width"><body><article style="color: #777; background: #888">
<p>Words</p>
<div style="width: 900px">x</div></article>
<a href="#nowhere">a</a><input data-md-component="search-query">
<script>fetch("http://elsewhere.example/x").catch(() => 0); console.error("oh");</script></body>"""


@pytest.mark.browser
def test_a_bad_page_is_found_to_be_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "PATIENCE", 0.5)
    (tmp_path / "index.html").write_text(BAD, encoding="utf-8")
    found = "\n".join(site_check.check(tmp_path))
    for words in ("oh", "elsewhere.example/x", "#nowhere", "on a phone of 390", "in place of slate", "the search for"):
        assert words in found


@pytest.mark.browser
@pytest.mark.slow
def test_nothing_is_wrong_with_the_site_in_a_browser(tmp_path: Path) -> None:
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path, folder=ROOT)
    assert site_check.check(tmp_path) == []
