"""What a study's folder holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from megatron.errors import RunError
from megatron.experiments.report.made import Made, read_note
from megatron.experiments.study import PLAN
from megatron.experiments.table import Row, read_table
from megatron.training.product import NAME as MIXTURE

REPORT = "report.html"
TABLE = "table.csv"
LAW = "law.json"
LAW_FOLDER = "law"
COMPARE = "compare.json"
REGMIX = "regmix.json"
GRAPH = "graph.json"
FIDELITY = "fidelity.json"
# Results that are sections of their own, by the file that holds them.
RESULTS = (LAW, COMPARE, REGMIX, GRAPH, FIDELITY)


@dataclass(frozen=True, kw_only=True)
class StudyFiles:
    """A study as its files tell it.

    Attributes:
        out: its folder.
        plan: ``plan.json``; empty if there is none.
        rows: of ``table.csv``.
        made: ``made.json``.
        results: the other JSON files that it holds, by name.
        mixture: weights in ``mixture.yml``, by domain.
    """

    out: Path
    plan: Mapping[str, Any]
    rows: tuple[Row, ...]
    made: Made
    results: Mapping[str, Any]
    mixture: Mapping[str, float]

    @property
    def planned(self) -> list[Mapping[str, Any]]:
        """The planned runs."""
        return list(self.plan.get("runs", ()))

    @property
    def name(self) -> str:
        """The study's name."""
        known = self.plan.get("study") or next((row["study"] for row in self.rows), "")
        return str(known or self._named_by_results() or self.out.resolve().name)

    def _named_by_results(self) -> str:
        names = {LAW: "fit-law", REGMIX: "regmix"}
        return next((name for file, name in names.items() if file in self.results), "")

    def link(self, run: str) -> str | None:
        """Return where a run's own report, or else its folder, lies; None if it does not."""
        for planned in self.planned:
            if planned.get("run") == run and planned.get("folder"):
                return beside(self.out, Path(planned["folder"]))
        return None


def beside(out: Path, folder: Path) -> str | None:
    """Return a link from ``out`` to a run's report, or to its folder; None if there is none."""
    if not folder.is_dir():
        return None
    target = folder / REPORT if (folder / REPORT).is_file() else folder
    way = os.path.relpath(target.resolve(), out.resolve())
    # "./" first: a folder called "javascript:…" stays a folder.
    return "./" + quote(Path(way).as_posix()) + ("" if target.is_file() else "/")


def load_study(out: Path) -> StudyFiles:
    """Read a study's folder.

    Raises:
        RunError: it holds no study, or a file of it cannot be read.
    """
    results = {name: _json(out / name) for name in RESULTS if (out / name).is_file()}
    if LAW not in results and (out / LAW_FOLDER / LAW).is_file():
        results[LAW] = _json(out / LAW_FOLDER / LAW)
    plan = _json(out / PLAN) if (out / PLAN).is_file() else {}
    rows = read_table(out) if (out / TABLE).is_file() else []
    if not (plan or rows or results):
        raise RunError(
            f"{out} holds no study ({PLAN}, {TABLE} or {', '.join(RESULTS)}); give the folder "
            "(--out) of a tools/mix.py command"
        )
    return StudyFiles(
        out=out,
        plan=plan,
        rows=tuple(rows),
        made=read_note(out),
        results=results,
        mixture=_mixture(out / MIXTURE),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); give the command again") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no mapping; give the command again")
    return found


def _mixture(path: Path) -> dict[str, float]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["mixing"]["weights"]
        return {str(name): float(weight) for name, weight in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return {}
