"""The report of a fit or a plan: one HTML file with its figures inside."""

from __future__ import annotations

import base64
import datetime
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from megatron.monitor.report.shell import figures, script_json, shell, verdict, write_page
from megatron.selection.figures import Picture

NAME: Final = "report.html"

_STYLE: Final = """
.picture { padding: 12px 14px 14px; margin: 0 0 18px; }
.picture img { display: block; width: 100%; height: auto; margin: 8px auto 0; background: #fff;
  border-radius: 6px; }
.picture.narrow img { max-width: 820px; }
.picture p { margin: 2px 0 0; color: var(--soft); font-size: 13px; max-width: 100ch; }
pre.command { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 8px 12px; font-size: 12.5px; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
td.left { text-align: left; white-space: normal; min-width: 16em; }
"""


def write_report(
    out: Path,
    *,
    title: str,
    command: Sequence[str],
    tiles: Sequence[tuple[str, str]],
    sentences: tuple[Sequence[str], Sequence[str]],
    markdown: str,
    pictures: Sequence[Picture],
) -> Path:
    """Write ``report.html`` and return its path.

    Args:
        out: the folder.
        title: of the page.
        command: the words that made it; may be empty.
        tiles: (caption, figure) pairs for the head.
        sentences: what was found, the main ones first.
        markdown: the text that stands in the folder too; its headings, tables, lists and
            paragraphs become sections.
        pictures: drawn into the page.

    Raises:
        RunError: the disk refuses.
    """
    now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    said = f'<pre class="command">{escape(shlex.join(command))}</pre>' if command else ""
    shown = "".join(map(_picture, pictures))
    body = (
        f'<header class="top"><h1>{escape(title)}</h1>'
        f'<p class="made">{escape(str(out.resolve()))} · {now}</p>{said}'
        f"{figures(tiles)}{verdict(*sentences)}</header><main>"
        f"{'<h2>Figures</h2>' if shown else ''}{shown}{markdown_html(markdown)}</main>"
    )
    path = out / NAME
    write_page(path, shell(title, body, script_json({}), [], _STYLE))
    return path


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    narrow = " narrow" if picture.columns == 1 else ""
    return (
        f'<figure class="picture{narrow}"><figcaption>{escape(picture.title)}</figcaption>'
        f'<p>{escape(picture.text)}</p><img alt="{escape(picture.title)}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def markdown_html(text: str) -> str:
    """Return our own Markdown as HTML: headings of the second level, tables, lists, paragraphs."""
    parts: list[str] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.strip().split("\n") if line]
        if not lines or lines[0].startswith("# "):
            continue
        if lines[0].startswith("## "):
            parts.append(f"<h2>{_inline(lines[0][3:])}</h2>")
        elif lines[0].startswith("|"):
            parts.append(_table(lines))
        elif lines[0].startswith("- "):
            items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
            parts.append(f'<section id="notes"><ul>{items}</ul></section>')
        else:
            parts.append(f'<p class="rest">{_inline(" ".join(lines))}</p>')
    return "".join(parts)


def _table(lines: Sequence[str]) -> str:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{_inline(row[0])}</th>'
        + "".join(f"<td{_side(cell)}>{_inline(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[2:]
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _side(cell: str) -> str:
    return ' class="left"' if len(cell) > 30 else ""


def _inline(text: str) -> str:
    pieces = escape(text).split("**")
    return "".join(f"<b>{one}</b>" if place % 2 else one for place, one in enumerate(pieces))
