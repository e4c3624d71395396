"""What a comparison found, as one JSON-able object: ``compare.json``.

docs/experiments.md describes the fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.errors import RunError
from megatron.experiments.compare.league import League
from megatron.experiments.compare.made import made_with
from megatron.experiments.compare.playing import Played
from megatron.experiments.compare.task_facts import POWER, Facts, TaskFacts
from megatron.experiments.table import Row

NAME: Final = "compare.json"
FORMAT: Final = 1


def compare_facts(league: League, played: Played, rows: Sequence[Row]) -> Facts:
    """Return everything that a comparison found, JSON-able.

    Args:
        league: who took part.
        played: what became of the runs.
        rows: of the study's table.
    """
    file = league.file
    by_key: dict[str, list[Row]] = {}
    names: dict[str, str] = {}
    for row in rows:
        if names.setdefault(row["key"], row["run"]) == row["run"]:
            by_key.setdefault(row["key"], []).append(row)
    tasks = {task.name: TaskFacts(league, played, by_key, task).facts() for task in file.tasks}
    return {
        "format": FORMAT,
        "made": made_with(),
        "study": file.name,
        "label": file.label,
        "baseline": file.baseline,
        "measure": file.measure,
        "confidence": file.confidence,
        "power": POWER,
        "budget": vars(file.budget),
        "attention": "causal",
        "methods": [method.name for method in file.methods],
        "tasks": tasks,
        "failed": list(played.failed),
    }


def write_compare(facts: Facts, out: Path) -> Path:
    """Write ``compare.json``; numbers that are not finite become null.

    Raises:
        RunError: the disk refuses.
    """
    path = out / NAME
    text = json.dumps(_plain(facts), indent=1, ensure_ascii=False, allow_nan=False)
    with disk_errors(path):
        out.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    return path


def load_compare(path: Path) -> Facts:
    """Return what a comparison found.

    Args:
        path: its folder (``--out``), or the file.

    Raises:
        RunError: there is none, or it is of another format.
    """
    file = path / NAME if path.is_dir() else path
    try:
        facts: Facts = json.loads(file.read_text(encoding="utf-8"))
        version = facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} cannot be read as a comparison ({error}); give --out of tools/mix.py compare"
        ) from None
    if version != FORMAT:
        raise RunError(f"{file} is of format {version}, and this reads {FORMAT}; compare again")
    return facts


def _plain(value: Any) -> Any:
    """Return a value with what JSON has no word for as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
