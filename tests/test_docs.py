"""The site: it builds without a warning, is whole, asks no other host, and says what the code says.

That its Python blocks run and print what it says they do is seen to by conftest.py.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import conftest
import pytest
from sybil import Document

import loopwright
import loopwright.callbacks
import loopwright.data
import loopwright.testing
import mistakes
from clean_environment import ROOT, run
from loopwright.callback import HOOKS
from one_epoch import PAGE, record_one_epoch, recorded_part, table

pytestmark = pytest.mark.xdist_group("site")

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

LOADS = {"src", "srcset", "poster", "data", "action", "formaction", "background"}  # attributes whose address is fetched
FETCHED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "dns-prefetch", "modulepreload", "manifest"}


class Page(HTMLParser):
    """What a page is made of: its anchors, its links, and the addresses that a browser fetches to show it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.details: list[str] = []  # the classes of collapsible boxes
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.fetched += [value for name, value in given.items() if name in LOADS]
        self.fetched += addresses_in_css(given.get("style", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("image", "use") or (tag == "link" and FETCHED_LINKS & set(given.get("rel", "").split())):
            self.fetched += [given["href"]] if "href" in given else []
        elif tag == "details":
            self.details.append(given.get("class", ""))
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.fetched += addresses_in_css(data)


def addresses_in_css(css: str) -> list[str]:
    found = re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", css)
    return [first or second for first, second in found]


def is_elsewhere(address: str) -> bool:
    """Whether an address is of another host; what is inside the page itself (``data:``) is not."""
    return urlsplit(address).scheme not in ("", "data") or bool(urlsplit(address).netloc)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: a warning of mkdocs makes the fixture fail."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder, folder=ROOT)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


def test_a_page_is_read_for_all_that_a_browser_fetches() -> None:
    page = Page(
        '<link rel="stylesheet" href="a"><link rel="canonical" href="no"><img src="b"><a href="c" id="d">x</a>'
        '<p style="background: url(e)"><style>@import "f"; p { color: url("g") }</style><script src="//h/i"></script>'
    )
    assert page.fetched == ["a", "b", "e", "f", "g", "//h/i"]
    assert (page.links, page.anchors) == (["c"], {"d"})
    assert is_elsewhere("//h/i")
    assert is_elsewhere("https://h/i")
    assert not is_elsewhere("../b.css")
    assert not is_elsewhere("data:image/png,")


def test_showing_a_page_asks_no_other_host(site: Path, pages: dict[str, Page]) -> None:
    fetched = {(name, address) for name, page in pages.items() for address in page.fetched}
    styles = {
        (path.name, address)
        for path in site.rglob("*.css")
        for address in addresses_in_css(path.read_text(encoding="utf-8"))
    }
    assert fetched
    assert styles
    assert [place for place in sorted(fetched | styles) if is_elsewhere(place[1])] == []


def test_what_makes_the_theme_ask_other_hosts_is_not_used(site: Path) -> None:
    """Its script knows three hosts: for facts about a repository, for diagrams, and for browsers of before 2020."""
    html = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    assert "md-source" not in html
    assert "mermaid" not in html
    [script] = site.glob("assets/javascripts/bundle.*.min.js")
    hosts = set(re.findall(r"https?://([\w.-]+)", script.read_text(encoding="utf-8").partition("sourceMappingURL")[0]))
    assert hosts <= {"api.github.com", "unpkg.com", "clipboardjs.com"}  # the last one in a comment


def test_the_page_for_language_models_is_served_as_it_is(site: Path) -> None:
    assert (site / "llms.txt").read_bytes() == (DOCS / "llms.txt").read_bytes()


def test_every_internal_link_and_anchor_resolves(site: Path, pages: dict[str, Page]) -> None:
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue  # its links begin at the root, since it stands in for any address
        for link in page.links:
            if is_elsewhere(link):
                continue
            target = urlsplit(urljoin(f"https://here/{name}", link))
            path = unquote(target.path).lstrip("/")
            path = f"{path}index.html" if path.endswith("/") or not path else path
            if path in pages:
                if target.fragment and unquote(target.fragment) not in pages[path].anchors:
                    broken.append(f"{name}: {link} has no such anchor")
            elif not (site / path).is_file():
                broken.append(f"{name}: {link}")
    assert broken == []


@pytest.mark.parametrize(
    "module", [loopwright, loopwright.callbacks, loopwright.data, loopwright.testing], ids=lambda m: m.__name__
)
def test_every_public_name_is_in_the_reference(module: object, pages: dict[str, Page]) -> None:
    anchors = {anchor for name, page in pages.items() if name.startswith("reference/") for anchor in page.anchors}
    missing = [name for name in module.__all__ if f"{module.__name__}.{name}" not in anchors]  # type: ignore[attr-defined]  # it is a module
    assert missing == []


def test_every_hook_is_in_the_reference(pages: dict[str, Page]) -> None:
    anchors = pages["reference/callback/index.html"].anchors
    assert [hook for hook in HOOKS if f"loopwright.Callback.{hook}" not in anchors] == []


def test_no_docstring_has_a_section_that_the_reference_does_not_know(pages: dict[str, Page]) -> None:
    """Such as Example: for Examples: it becomes a box in which the code is a quotation."""
    assert {name: page.details for name, page in pages.items() if page.details} == {}


def test_the_page_of_errors_has_every_class_under_its_id(site: Path) -> None:
    html = (site / "reference" / "errors" / "index.html").read_text(encoding="utf-8")
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## `([\w-]+)` \{ #([\w-]+) \}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    found_classes = list(mistakes.classes())
    classes = {error.id: error.__name__ for error in found_classes}
    assert len(classes) == len(found_classes), "an id is used twice"
    assert {found for found, _, _ in sections} == set(classes)
    for found, anchor, section in sections:
        assert anchor == found
        assert f"\n::: loopwright.{classes[found]}\n" in section
        assert f"| [`{found}`](#{found}) | " in text
    assert len(re.findall("<strong>Cause.</strong>", html)) == len(sections) + 1  # and TypeError


def test_the_page_on_one_epoch_is_what_a_run_recorded() -> None:
    _, recorded, _ = recorded_part(PAGE.read_text(encoding="utf-8"))
    assert recorded == table(), "python tests/one_epoch.py writes it anew"


def test_the_recorded_epoch_calls_every_hook_of_a_run_that_goes_well() -> None:
    hooks = {event.name for event in record_one_epoch() if event.progress is not None}
    assert hooks == set(HOOKS) - {"on_exception"}


@dataclass(frozen=True)
class Include:
    """A fence that shows a file, or some lines of it."""

    page: str
    title: str
    path: str
    lines: str


def includes() -> list[Include]:
    fence = re.compile(r'^ *``` \{ \.python title="([^"]*)" \}\n *--8<-- "([^":]+)((?::\d+)*)"\n *```$', re.MULTILINE)
    return [Include(page.name, *found) for page in PAGES for found in fence.findall(page.read_text(encoding="utf-8"))]


@functools.cache
def definitions(path: str) -> dict[str, tuple[int, int]]:
    """The first and last lines of what a file defines."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name: (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


MAP = """index start tutorial/index howto/callback callbacks gallery recipes coming-from howto/explain
    explanation/one-epoch reference/trainer reference/errors reliability performance compared decisions changelog"""
LESSONS = ["the-same-loop", "inside-a-step", "means-and-evaluation", "learning-and-diverging", "the-workflow"]


def test_every_station_of_the_site_is_in_its_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert [name for name in MAP.split() if not re.search(rf" {name}\.md$", menu, re.MULTILINE)] == []
    order = [menu.index(f"tutorial/{name}.md") for name in LESSONS]
    assert order == sorted(order)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_the_documents_idea_both_loops_and_what_happens_inside_by_a_run(name: str) -> None:
    text = (DOCS / "tutorial" / f"{name}.md").read_text(encoding="utf-8")
    assert "**The document's idea.** " in text
    assert {'=== "With the trainer"', '=== "By hand"'} <= set(text.splitlines())
    inside = text.partition("## What happens inside\n")[2]
    assert re.search(r"^```python\n.*?^```\n\n```text\n\S", inside, re.MULTILINE | re.DOTALL)


def test_what_is_shown_of_a_file_is_what_the_title_says() -> None:
    """A title is the file's path, or its path and the names of what is shown of it."""
    assert includes()
    for include in includes():
        path, _, names = include.title.partition(": ")
        assert path == include.path, include
        if not include.lines:
            assert not names, include
            continue
        found = [definitions(path)[name] for name in names.split(", ")]
        assert include.lines == f":{found[0][0]}:{found[-1][1]}", f"{include} has moved"


def test_every_file_that_is_shown_is_an_example() -> None:
    shown = {include.path for include in includes()}
    assert shown
    assert [path for path in sorted(shown) if not path.startswith("examples/")] == []


def test_every_example_is_shown() -> None:
    whole = {include.path for include in includes() if not include.lines}
    assert whole == {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")}


def test_what_the_page_on_reading_a_checkpoint_shows_needs_no_loopwright(tmp_path: Path) -> None:
    text = (DOCS / "howto" / "read-a-checkpoint.md").read_text(encoding="utf-8")
    making, *reading = [match[1] for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    by_hand = [code for code in reading if '"loopwright"' not in code]  # but for the command line
    assert len(by_hand) == 3
    run(sys.executable, "-c", making, folder=tmp_path)
    blocked = 'import sys\nsys.modules["loopwright"] = None\n'
    assert "loopwright checkpoint 1" in run(sys.executable, "-c", blocked + "".join(by_hand), folder=tmp_path)


def run_page(text: str, tmp_path: Path) -> str | None:
    """What conftest.py has to say against a page."""
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    [example] = Document.parse(str(path), conftest.parse_page)
    return conftest.run_page(example)


def test_a_page_whose_output_is_another_fails(tmp_path: Path) -> None:
    assert run_page("```python\nprint(1)\n```\n\n```text\n1\n```\n", tmp_path) is None
    assert "line 2" in str(run_page("```python\nprint(1)\n```\n\n```text\n2\n```\n", tmp_path))
    assert run_page("```python\nprint(1)\n```\n\nSome words.\n\n```text\n1\n```\n", tmp_path) is not None
    assert run_page("```python\nprint(1)\n```\n", tmp_path) is not None


def test_a_page_is_compared_to_six_decimals_and_up_to_dots(tmp_path: Path) -> None:
    page = "```python\nprint(0.1234567891, 'seconds: 5')\n```\n\n```text\n{}\n```\n"
    assert run_page(page.format("0.1234567855 seconds: ..."), tmp_path) is None
    assert run_page(page.format("0.1234557891 seconds: ..."), tmp_path) is not None
    assert run_page(page.format("0.1234567891 minutes: ..."), tmp_path) is not None


def test_the_blocks_of_a_page_share_their_names_and_an_empty_folder(tmp_path: Path) -> None:
    page = (
        "```python\nfrom pathlib import Path\n\nclass A: ...\n\nhere = list(Path().iterdir())\n```\n"
        "=== tab\n\n"
        "    ```python\n    import pickle\n\n    print(here, type(pickle.loads(pickle.dumps(A()))) is A)\n    ```\n\n"
        "    ```text\n    [] True\n    ```\n"
    )
    assert run_page(page, tmp_path) is None
    assert "page" not in sys.modules


def test_an_error_in_a_block_shows_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("# Title\n\n```python\nx = 0\n1 / x\n```\n", tmp_path)
    last = caught.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("page.md", 5)
