"""Looks at the built site in Chromium: what only a browser can tell.

Every page is loaded from a server on this machine, wide, as on a phone, and in the dark. Reported are messages in
the console, requests to any other host, links and anchors that lead nowhere once the scripts have run, pages that are
wider than a phone, text that cannot be read in the dark, and a search that does not find ``EarlyStopping``.

$ make site-check

Chromium and chromium-driver are those of the system, as Debian has them. Screenshots of some pages show the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

PHONE = 390  # CSS pixels, the width of a usual phone
READABLE = 4.5  # the contrast that WCAG asks of text
PATIENCE = 3.0  # seconds that a search may take, and the theme's colours
SHOWN = (
    "",
    "start/",
    "tutorial/inside-a-step/",
    "howto/checkpoints/",
    "howto/explain/",
    "howto/gradients/",
    "howto/preflight/",
    "recipes/",
    "callbacks/",
    "gallery/",
    "coming-from/",
    "explanation/one-epoch/",
    "compared/",
    "performance/",
    "reference/trainer/",
    "reference/errors/",
    "reliability/",
)

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

_READ = """
const links = [...document.querySelectorAll("a[href]")].map(a => a.href);
const names = [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name);
return {links, names};
"""
_WIDTH = "return document.documentElement.scrollWidth"
_COLOURS = """
const article = document.querySelector("article") || document.body;
const text = getComputedStyle(article.querySelector("p") || article);
let at = article, back = "";
while (at && (back = getComputedStyle(at).backgroundColor) && /, 0\\)$/.test(back)) at = at.parentElement;
return {scheme: document.body.dataset.mdColorScheme, text: text.color, back: at ? back : "rgb(255, 255, 255)"};
"""


def available() -> bool:
    """Whether everything is here that the check needs."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return False
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder on a server of this machine; its address, without a slash at the end."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window, and with an empty profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def addresses(site: Path) -> list[str]:
    """The pages, as they are reached from the root: ``howto/data/``."""
    paths = (path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")))
    return [path.removesuffix("index.html") for path in paths]


def broken_links(root: str, site: Path, links: Mapping[str, Sequence[str]], names: Mapping[str, set[str]]) -> list[str]:
    """The links within the site that lead to no file, or to no such place on a page."""
    problems = []
    for page, targets in links.items():
        for target in dict.fromkeys(targets):
            address, fragment = urldefrag(target)
            if not address.startswith(f"{root}/"):
                continue
            path = unquote(urlsplit(address).path).lstrip("/").removesuffix("index.html")
            if path in names:
                # A menu's links end in an empty fragment or in one that a script makes use of.
                if fragment and unquote(fragment) not in names[path]:
                    problems.append(f"{page}: there is no #{fragment} on {path or 'the first page'}")
            elif not (site / path).is_file():
                problems.append(f"{page}: there is no {path}")
    return problems


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, ``rgb(r, g, b)``, as WCAG 2 defines it: from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


class Check:
    """One look at the whole site."""

    def __init__(self, driver: Any, site: Path, root: str, screenshots: Path | None) -> None:
        self.driver, self.site, self.root, self.screenshots = driver, site, root, screenshots
        self.problems: list[str] = []
        self.links: dict[str, list[str]] = {}
        self.names: dict[str, set[str]] = {}

    def run(self) -> list[str]:
        """All of it; what was found to be wrong."""
        self._begin(dark=True)
        for page in addresses(self.site):
            self._load(page)
            self._read(page)
            self._colours(page, "slate")
            self._shoot(page, "dark")
            self._narrow(page)
            self._listen(page)
        self.problems += broken_links(self.root, self.site, self.links, self.names)
        self._search("EarlyStopping")
        return self.problems

    def run_in_the_light(self) -> list[str]:
        """Some pages only: what has colours of its own has been seen in the dark."""
        self._begin(dark=False)
        for page in SHOWN:
            if (self.site / page / "index.html").is_file():
                self._load(page)
                self._colours(page, "default")
                self._shoot(page, "wide")
                self._narrow(page)
                self._shoot(page, "phone")
                self._listen(page)
        return self.problems

    def _begin(self, *, dark: bool) -> None:
        """Say what the reader likes, once: a browser that is told otherwise later on does not always follow."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # of the page that the browser itself begins with

    def _command(self, name: str, **arguments: object) -> None:
        self.driver.execute_cdp_cmd(name, arguments)

    def _window(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self._command("Emulation.setDeviceMetricsOverride", **size)

    def _load(self, page: str) -> None:
        self._window(1280)
        self.driver.get(f"{self.root}/{page}")

    def _narrow(self, page: str) -> None:
        self._window(PHONE)
        if (width := self.driver.execute_script(_WIDTH)) > PHONE:
            self.problems.append(f"{page}: is {width} pixels wide on a phone of {PHONE}")

    def _listen(self, page: str) -> None:
        for entry in self.driver.get_log("browser"):
            self.problems.append(f"{page}: the console says: {entry['message']}")
        for url in requested(self.driver.get_log("performance")):
            if not url.startswith((f"{self.root}/", "data:", "blob:", "about:")):
                self.problems.append(f"{page}: asks for {url}")

    def _read(self, page: str) -> None:
        read = self.driver.execute_script(_READ)
        if page != "404.html":  # it stands in for any address, so its links begin at the site's own
            self.links[page] = read["links"]
        self.names[page] = set(read["names"])

    def _colours(self, page: str, scheme: str) -> None:
        end = time.monotonic() + PATIENCE
        # The theme puts its colours on with a frame that may come after the page counts as loaded.
        while (seen := self.driver.execute_script(_COLOURS))["scheme"] != scheme and time.monotonic() < end:
            time.sleep(0.02)
        found = contrast(seen["text"], seen["back"])
        dark = contrast(seen["back"], "rgb(0, 0, 0)") < READABLE
        if seen["scheme"] != scheme or dark != (scheme == "slate") or found < READABLE:
            self.problems.append(f"{page}: {seen} in place of {scheme}, a contrast of {found:.1f}")

    def _shoot(self, page: str, how: str) -> None:
        if self.screenshots is not None and page in SHOWN:
            self.screenshots.mkdir(parents=True, exist_ok=True)
            name = page.strip("/").replace("/", "-") or "home"
            self.driver.save_screenshot(str(self.screenshots / f"{name}-{how}.png"))

    def _search(self, words: str) -> None:
        self._load("")
        self.driver.find_element("css selector", "[data-md-component=search-query]").send_keys(words)
        end = time.monotonic() + PATIENCE
        found: list[str] = []
        while not found and time.monotonic() < end:
            time.sleep(0.05)
            results = self.driver.find_elements("css selector", ".md-search-result__link")
            found = [r.get_attribute("href") for r in results if words in (r.get_attribute("textContent") or "")]
        if not any("reference/callbacks/" in href for href in found):
            self.problems.append(f"the search for {words} finds {found}")
        self._listen("the search")


def requested(entries: Sequence[Mapping[str, str]]) -> list[str]:
    """The addresses in Chromium's own record that a page has asked for."""
    messages = (json.loads(entry["message"])["message"] for entry in entries)
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def check(site: Path, screenshots: Path | None = None) -> list[str]:
    """What is wrong with the built site in this folder."""
    with served(site) as root:
        with browser() as driver:
            problems = Check(driver, site, root, screenshots).run()
        with browser() as driver:
            return problems + Check(driver, site, root, screenshots).run_in_the_light()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder of the built site")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of some pages")
    arguments = parser.parse_args()
    if not available():
        sys.exit("chromium, chromedriver or selenium is missing: apt-get install chromium chromium-driver")
    problems = check(arguments.site, arguments.screenshots)
    print("\n".join(problems) or f"{len(addresses(arguments.site))} pages, and nothing is wrong with them")  # noqa: T201
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
