"""What mkdocs does besides when it builds the site: pages and links from outside of docs/.

The documents are written to be read in the repository: their links are relative paths.  Three of
them lie at its root; they are taken into the site as they are, under the names of ``PAGES``.
Links between pages are turned to these names.  A link to any other file of the repository becomes
its address below ``repo_url``, or, where none is set, the words of the link alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Documents at the repository's root, and the pages that they are in the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
}
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the documents at the root to the site's pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page's text with its links turned to where the site has them."""
    sources = {name: source for source, name in PAGES.items()}
    document = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return turn_links(markdown, document, config.repo_url or "")


def turn_links(text: str, document: str, repo_url: str) -> str:
    """Turn the relative links of a document, all but those in its code blocks.

    Args:
        text: The document's Markdown.
        document: Its path in the repository, such as ``docs/data.md``.
        repo_url: The repository's address, or "" where it has none.
    """
    folder = posixpath.dirname(document)
    here = PAGES.get(document, document.removeprefix("docs/"))

    def turned(link: re.Match[str]) -> str:
        if "://" in link["path"] or link["path"].startswith("mailto:"):
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        if target in PAGES or target.startswith("docs/"):
            page = PAGES.get(target, target.removeprefix("docs/"))
            path = posixpath.relpath(page, posixpath.dirname(here) or ".")
        elif not (ROOT / target).exists():
            return link[0]  # mkdocs will say that there is no such file
        elif repo_url:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            path = f"{repo_url.rstrip('/')}/{kind}/HEAD/{target}"
        else:
            return link["words"]
        return f"{link['image']}[{link['words']}]({path}{link['anchor'] or ''})"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(turned, part) for part in parts)
