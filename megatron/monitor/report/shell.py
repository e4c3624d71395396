"""What every report shares: one file around a body, its data and its scripts."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron.errors import RunError
from megatron.monitor.report.compare import EQUAL

OWN = "megatron.monitor.report"
COMMON = ("format.js", "chart.js", "stack.js", "widgets.js")


def asset(name: str, package: str = OWN) -> str:
    """Return a file of the ``assets`` beside a package's modules."""
    return files(package).joinpath("assets", name).read_text(encoding="utf-8")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Put ``parts`` in the place of their ``{{NAME}}`` in a template."""
    # One pass from left to right: a domain called {{DATA}} stays what it is.
    pieces = template.split("{{")
    result = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        result += [parts[name], rest]
    return "".join(result)


def shell(title: str, body: str, data: str, scripts: Sequence[str], style: str = "") -> str:
    """Return a whole page that needs no other file.

    Args:
        title: of the window, not escaped yet.
        body: HTML.
        data: JSON from :func:`script_json`; the scripts see it as ``data``.
        scripts: texts, run after the shared ones.
        style: CSS after the shared one.
    """
    parts = {
        "TITLE": escape(title),
        "STYLE": "\n".join([asset("page.css"), style]).rstrip(),
        "BODY": body,
        "DATA": data,
        "SCRIPT": "\n".join([*(asset(name) for name in COMMON), *scripts]),
    }
    return fill(asset("shell.html"), parts)


def write_page(path: Path, text: str) -> None:
    """Write a page; a reader finds the old one or the new one, whole.

    Raises:
        RunError: the disk refuses.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"{path}: the report cannot be written: {error.strerror}") from error


def script_json(data: Any) -> str:
    """Return JSON that is safe inside a script element; NaN is refused."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def figures(tiles: Sequence[tuple[str, str]]) -> str:
    """Return (caption, figure) pairs for the head of a page."""
    parts = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
        for name, value in tiles
    )
    return f'<dl class="tiles">{parts}</dl>'


def verdict(main: Sequence[str], rest: Sequence[str]) -> str:
    """Return the sentences at the head, the main ones large."""
    items = [f'<li class="main">{escape(sentence)}</li>' for sentence in main]
    items += [f"<li>{escape(sentence)}</li>" for sentence in rest]
    return f'<ul class="verdict">{"".join(items)}</ul>'


def run_head(index: int, name: str, note: str, scope: str = "col") -> str:
    """Return the head of a run's column or row, with its colour, which the script fills in."""
    return (
        f'<th scope="{scope}" data-run="{index}"><i class="key"></i>{escape(name)}'
        f"<small>{escape(note)}</small></th>"
    )


def cell(value: float, text: str, extra: str = "") -> str:
    """Return a cell that sorts by ``value``; a dash where it is not known."""
    if not math.isfinite(value):
        return "<td>–</td>"
    return f'<td data-value="{value!r}"{extra}>{escape(text)}</td>'


def shade(difference: float, spread: float) -> str:
    """Return the attributes that tint a cell: blue below zero, red above, full at ``spread``."""
    if not math.isfinite(difference) or abs(difference) < EQUAL:
        return ""
    side = "less" if difference < 0 else "more"
    return f' class="{side}" style="--much:{min(1.0, abs(difference) / spread):.3f}"'
