"""Results of benchmarks as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def where(content: Mapping[str, Any]) -> str:
    """Return a line that says when, where and how results were measured."""
    at = content["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in at["packages"].items())
    return (
        f"\n{at['date']}, {at['processor']}, {at['threads']} thread, {versions}; "
        f"`{content['command']}`. Processes that wanted a core at the end: {at['load'][0]:.0f} "
        "(the machine was shared, so processor time is what to compare).\n"
    )


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return the results that a benchmark has left."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )
