"""The documentation site: built strictly, whole, and without anything from a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.source import ROOT, tracked_files

pytest.importorskip("mkdocs")
sys.path.insert(0, str(ROOT / "tools"))

from site_hooks import PAGES, turn_links

REPOSITORY = "https://example.org/group/neomix"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        # Not --quiet: warnings that are not shown are not counted by --strict either.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "REPO_URL": REPOSITORY},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Documentation built" in done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches by itself when it shows a page, and where links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "link" and found.get("rel") not in {"canonical", "prev", "next"}:
            self.fetched.append(found.get("href") or "")
        if tag in {"script", "img", "iframe", "source", "video", "audio"}:
            self.fetched.append(found.get("src") or "")
        if tag == "a":
            self.links.append(found.get("href") or "")


def loaded(page: Path) -> Loaded:
    parser = Loaded()
    parser.feed(page.read_text())
    return parser


def test_every_document_is_a_page(site):
    documents = {path.name for path in tracked_files() if path.parts[0] == "docs"}
    wanted = {name.replace(".md", ".html") for name in documents if name.endswith(".md")}
    wanted |= {name.replace(".md", ".html") for name in PAGES.values()}
    assert {path.name for path in site.glob("*.html")} == wanted | {"404.html"}


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.glob("*.html"))
    assert len(pages) > 10
    for page in pages:
        for name in loaded(page).fetched:
            assert not re.match(r"(\w+:)?//", name), f"{page.name} fetches {name}"
            if name:
                assert (site / name.partition("?")[0].lstrip("/")).exists(), f"{page.name}: {name}"


def test_what_the_documents_link_to_is_there(site):
    for page in site.glob("*.html"):
        for link in loaded(page).links:
            path = link.partition("#")[0]
            if path.startswith(f"{REPOSITORY}/"):
                kind, _, name = path.removeprefix(f"{REPOSITORY}/").partition("/HEAD/")
                assert (ROOT / name).is_dir() if kind == "tree" else (ROOT / name).is_file(), link
            elif path and page.name != "404.html" and "://" not in path:
                assert (site / path).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("document", "link", "turned", "without_address"),
    [
        ("README.md", "[a](docs/data.md)", "[a](data.md)", None),
        ("README.md", "![a](docs/images/a.png)", "![a](images/a.png)", None),
        ("README.md", "[a](LICENSE)", f"[a]({REPOSITORY}/blob/HEAD/LICENSE)", "a"),
        ("README.md", "[a](configs)", f"[a]({REPOSITORY}/tree/HEAD/configs)", "a"),
        ("ARCHITECTURE.md", "[a](README.md#two)", "[a](index.md#two)", None),
        ("docs/data.md", "[a](../README.md)", "[a](index.md)", None),
        ("docs/data.md", "[a](running.md#x)", "[a](running.md#x)", None),
        ("docs/data.md", "[a](../train.py)", f"[a]({REPOSITORY}/blob/HEAD/train.py)", "a"),
        ("docs/data.md", "[a](https://x.org/b)", "[a](https://x.org/b)", None),
        ("docs/data.md", "[a](../gone.md)", "[a](../gone.md)", None),
        ("docs/data.md", "[a](#here)", "[a](#here)", None),
        ("docs/data.md", "```\n[a](../train.py)\n```", "```\n[a](../train.py)\n```", None),
    ],
)
def test_links_are_turned(document, link, turned, without_address):
    assert turn_links(link, document, REPOSITORY) == turned
    assert turn_links(link, document, "") == (without_address or turned)
