"""One tidy table per study: a row for every held-out loss of every run."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.errors import MissingExtraError, RunError
from megatron.experiments.finished import read_finish
from megatron.experiments.study import PlannedRun, Tag
from megatron.model.accounting import flops_per_token
from megatron.monitor.jsonl import METRICS, MIXTURE
from megatron.monitor.report.lines import LineCount, read_lines

Row = dict[str, Any]

COLUMNS: dict[str, type] = {
    "study": str,
    "run": str,
    "key": str,
    "seed": int,
    "method": str,
    "domain": str,
    "step": int,
    "last": bool,
    "split": str,
    "loss": float,
    "bits_per_byte": float,
    "start_weight": float,
    "weight": float,
    "share": float,
    "tokens": int,
    "domain_tokens": int,
    "extra_tokens": int,
    "extra_by_kind": str,
    "flops": float,
    "seconds": float,
    "run_seconds": float,
    "weights": str,
    "tags": str,
}
"""Columns of a study's table, in their order; ``docs/experiments.md`` describes them."""


def study_rows(study: str, runs: Iterable[PlannedRun]) -> list[Row]:
    """Return the rows of a study's runs, in their order.

    Args:
        study: its name.
        runs: those that have been started; an unfinished one gives what it has measured.

    Raises:
        RunError: a run's files are missing or damaged.
    """
    return [row for run in runs for row in run_rows(study, run)]


def run_rows(study: str, run: PlannedRun) -> list[Row]:
    """Return a row for every validation of a run, domain and split.

    Raises:
        RunError: the run's files are missing or damaged.
    """
    course = _Course(run)
    finish = read_finish(run)
    whole = finish.seconds if finish is not None else None
    rows: list[Row] = []
    for record in course.validations:
        step = int(record["step"])
        split = "valid" if "valid_loss" in record else "test"
        at = course.at(step)
        bits = record.get("bits_per_byte") or {}
        for domain, loss in record[f"{split}_loss"].items():
            rows.append(
                {
                    "study": study,
                    "run": run.name,
                    "key": run.key,
                    "seed": run.seed,
                    "method": run.method,
                    "domain": domain,
                    "step": step,
                    "last": step == course.last,
                    "split": split,
                    "loss": _number(loss),
                    "bits_per_byte": _number(bits.get(domain)),
                    "start_weight": run.weights.get(domain, 0.0),
                    "weight": at.weight.get(domain, 0.0),
                    "share": at.share.get(domain, 0.0),
                    "tokens": at.tokens,
                    "domain_tokens": at.domain_tokens.get(domain, 0),
                    "extra_tokens": sum(at.extra.values()),
                    "extra_by_kind": json.dumps(at.extra),
                    "flops": at.tokens * flops_per_token(run.config.model),
                    "seconds": at.seconds,
                    "run_seconds": math.nan if whole is None else whole,
                    "weights": json.dumps(at.weight, ensure_ascii=False),
                    "tags": json.dumps(dict(run.tags), ensure_ascii=False),
                }
            )
    return rows


class _At:
    """What a run has done by one of its steps."""

    def __init__(self) -> None:
        self.weight: dict[str, float] = {}
        self.share: dict[str, float] = {}
        self.domain_tokens: dict[str, int] = {}
        self.tokens = 0
        self.extra: dict[str, int] = {}
        self.seconds = math.nan


class _Course:
    """A run's ledger, summed up to each of its validations."""

    def __init__(self, run: PlannedRun) -> None:
        for name in (METRICS, MIXTURE):
            if not (run.folder / name).is_file():
                raise RunError(
                    f"run '{run.name}': {run.folder / name} is missing; if the folder was emptied, "
                    "remove all of it, and the run is done again"
                )
        count = LineCount()
        metrics = list(read_lines(run.folder / METRICS, count))
        self.validations = [
            record for record in metrics if "valid_loss" in record or "test_loss" in record
        ]
        self._start = dict(run.weights)
        self._seconds = _training_seconds(metrics, run.tokens / run.steps)
        wanted = {int(record["step"]) for record in self.validations}
        self.last = 0
        self._points: dict[int, _At] = {0: self._beginning()}
        self._sum(run.folder / MIXTURE, wanted, count)
        if count.unreadable:
            raise RunError(
                f"run '{run.name}': {count.unreadable} lines of its files in {run.folder} cannot "
                "be read; remove the folder, and the run is done again"
            )

    def at(self, step: int) -> _At:
        """Return what was done by a step at which there was a validation."""
        return self._points.get(step) or self._points[max(self._points)]

    def _beginning(self) -> _At:
        at = _At()
        at.weight = self._start
        at.seconds = 0.0
        return at

    def _sum(self, path: Path, wanted: set[int], count: LineCount) -> None:
        names = list(self._start)
        weight, tokens, samples = np.zeros((3, len(names)))
        extra: dict[str, int] = {}
        steps = 0
        for record in read_lines(path, count):
            steps += 1
            self.last = int(record["step"])
            weight += [_number(record["probability"].get(name, 0.0)) for name in names]
            tokens += [record["tokens"].get(name, 0) for name in names]
            samples += [record["samples"].get(name, 0) for name in names]
            for kind, more in (record.get("extra_tokens") or {}).items():
                extra[kind] = extra.get(kind, 0) + int(more)
            if self.last not in wanted:
                continue
            at = _At()
            at.weight = dict(zip(names, (weight / steps).tolist(), strict=True))
            drawn = samples / max(1.0, samples.sum())
            at.share = dict(zip(names, drawn.tolist(), strict=True))
            at.domain_tokens = {name: int(n) for name, n in zip(names, tokens, strict=True)}
            at.tokens, at.extra = int(tokens.sum()), dict(extra)
            at.seconds = self._seconds.get(self.last, math.nan)
            self._points[self.last] = at


def _training_seconds(
    metrics: Sequence[Mapping[str, Any]], tokens_per_step: float
) -> dict[int, float]:
    """Return the seconds of training by the steps that have a line, as their rates say."""
    steps: dict[int, float] = {}
    total, before = 0.0, 0
    for record in metrics:
        step = int(record["step"])
        if "loss" in record:
            total += (step - before) * tokens_per_step / _number(record["tokens_per_second"])
            before = step
        steps[step] = total
    return steps


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def write_table(rows: Sequence[Row], folder: Path) -> tuple[Path, ...]:
    """Write ``table.csv`` and ``table.parquet`` and return their paths.

    Raises:
        MissingExtraError: pyarrow is not installed; the CSV file has been written.
        RunError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "table.csv"
    with disk_errors(path):
        replace_file(path, text.getvalue().encode())
    return path, _write_parquet(rows, folder / "table.parquet")


def _write_parquet(rows: Sequence[Row], path: Path) -> Path:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "studies", "a study's table in Parquet") from error
    kinds = {str: arrow.string(), int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}
    columns = {
        name: arrow.array([row[name] for row in rows], type=kinds[kind])
        for name, kind in COLUMNS.items()
    }
    buffer = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), buffer)
    with disk_errors(path):
        replace_file(path, buffer.getvalue().to_pybytes())
    return path


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table that :func:`write_table` wrote, from the CSV file.

    Args:
        path: the file, or the study's folder.

    Raises:
        RunError: there is none, or it is not a study's table.
    """
    file = path / "table.csv" if path.is_dir() else path
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}; give a study's folder") from None
    missing = COLUMNS.keys() - (rows[0].keys() if rows else set(COLUMNS))
    if missing:
        raise RunError(f"{file} is not a study's table: it has no column {sorted(missing)[0]}")
    return [{name: _typed(row[name], kind) for name, kind in COLUMNS.items()} for row in rows]


def _typed(text: str, kind: type) -> Any:
    return text == "True" if kind is bool else kind(text)


def tag(row: Row, name: str) -> Tag | None:
    """Return a fact of the run that a row is of."""
    value: Tag | None = json.loads(row["tags"]).get(name)
    return value
