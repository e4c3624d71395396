"""Performance against compute, as a table says it: one row for each finished run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron.errors import DataError, did_you_mean
from megatron.selection.cost_model import TRAINING_PER_PARAMETER, read_number
from megatron.selection.libraries import load

UNTRAINED: Final = "none"
"""Method of a row that tells the performance before any training: a point of every curve."""

COLUMNS: Final = (
    "method",
    "size",
    "task",
    "performance",
    "flops",
    "training_flops",
    "selection_flops",
    "tokens",
    "total_flops",
    "ceiling",
    "seed",
    "run",
)
SUFFIXES: Final = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: what was spent, and how good the model is.

    Attributes:
        method: that chose its documents ("bm25", "ppl-top", "random").
        task: that its performance is measured on.
        size: parameters of the trained model.
        performance: a score or a loss, of the run's end.
        training: operations of its training.
        choosing: operations of scoring the documents.
        total: operations of training the model on the whole corpus, C_total; None: not said.
        ceiling: P̄ of this model and task; None: not said.
        seed: of the run; None: not said.
        source: where it is from, for messages.
    """

    method: str
    task: str
    size: float
    performance: float
    training: float
    choosing: float = 0.0
    total: float | None = None
    ceiling: float | None = None
    seed: int | None = None
    source: str = ""

    @property
    def flops(self) -> float:
        """Operations of choosing and training together."""
        return self.training + self.choosing


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read tables of runs: CSV, JSONL or Parquet.

    Columns are those of :data:`COLUMNS`.  ``method``, ``size`` and ``performance`` must be there,
    and one of ``flops`` (choosing and training together), ``training_flops`` and ``tokens``
    (trained on, priced at 6 a parameter).

    Raises:
        DataError: a file is missing or of another kind, a column is missing or unknown, or a value
            cannot be, naming file and row.
        MissingExtraError: pyarrow is not installed, and a table is Parquet.
    """
    return [run for path in paths for run in _read_table(path)]


def _read_table(path: Path) -> list[Run]:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path}: a table of runs is a file ending in {', '.join(SUFFIXES)}; give one, or a "
            "folder of finished runs (--runs)"
        )
    try:
        rows = list(_rows(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give a table of runs") from None
    if not rows:
        raise DataError(f"{path}: there are no rows; a fit needs runs")
    _check_columns(path, rows)
    return [_run(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        parquet = load("pyarrow.parquet", "reading a table of runs in Parquet")
        try:
            rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: is no Parquet file ({error}); write it again") from None
        return rows
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".csv":
            return [
                {k: v for k, v in row.items() if k is not None} for row in csv.DictReader(lines)
            ]
        return [_json(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _json(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: is no JSON ({error}); mend or remove it") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}, line {number}: is no JSON object; write one for each run")
    return found


def _check_columns(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    there = {name for row in rows for name in row}
    for name in sorted(there - set(COLUMNS)):
        raise DataError(
            f"{path}: there is no column '{name}'{did_you_mean(name, COLUMNS)} "
            f"(known: {', '.join(COLUMNS)})"
        )
    for name in ("method", "size", "performance"):
        if name not in there:
            raise DataError(f"{path}: the column '{name}' is missing; a fit needs it")
    if not there & {"flops", "training_flops", "tokens"}:
        raise DataError(
            f"{path}: no column says what the runs cost; add 'flops' (choosing and training "
            "together), 'training_flops' or 'tokens' (trained on)"
        )


def _run(row: Mapping[str, Any], place: str) -> Run:
    method = str(_given(row, "method") or "")
    if not method:
        raise DataError(f"{place}: 'method' is empty; name what chose the documents")
    size = _size(row, place)
    choosing = _number(row, "selection_flops", place, least=0.0) or 0.0
    performance = _number(row, "performance", place)
    if performance is None:
        raise DataError(f"{place}: 'performance' is empty; leave out runs that have none")
    seed = _number(row, "seed", place)
    return Run(
        method=method,
        task=str(_given(row, "task") or "target"),
        size=size,
        performance=performance,
        training=_training(row, place, size, choosing),
        choosing=choosing,
        total=_number(row, "total_flops", place, above=0.0),
        ceiling=_number(row, "ceiling", place),
        seed=None if seed is None else int(seed),
        source=str(_given(row, "run") or place),
    )


def _size(row: Mapping[str, Any], place: str) -> float:
    value = _given(row, "size")
    if value is None:
        raise DataError(f"{place}: 'size' is empty; give the parameters of the trained model")
    return read_number(value, f"{place}: 'size'")


def _training(row: Mapping[str, Any], place: str, size: float, choosing: float) -> float:
    alone = _number(row, "training_flops", place, least=0.0)
    whole = _number(row, "flops", place, least=0.0)
    tokens = _number(row, "tokens", place, least=0.0)
    if alone is not None:
        if whole is not None and not math.isclose(whole, alone + choosing, rel_tol=1e-3):
            raise DataError(
                f"{place}: 'flops' is {whole:.6g}, and training and choosing together are "
                f"{alone + choosing:.6g}; leave one column out, or mend it"
            )
        return alone
    if whole is not None:
        if whole < choosing:
            raise DataError(
                f"{place}: 'flops' is {whole:.6g}, less than its 'selection_flops' {choosing:.6g}; "
                "it is choosing and training together"
            )
        return whole - choosing
    if tokens is not None:
        return TRAINING_PER_PARAMETER * size * tokens
    raise DataError(f"{place}: 'flops' is empty; say what the run cost")


def _given(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    return None if value is None or (isinstance(value, str) and not value.strip()) else value


def _number(
    row: Mapping[str, Any],
    name: str,
    place: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
) -> float | None:
    value = _given(row, name)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{place}: '{name}' is {value!r}, which is no number") from None
    if not math.isfinite(number) or number < least or not number > above:
        limit = f"at least {least:g}" if math.isfinite(least) else "finite"
        limit = f"above {above:g}" if math.isfinite(above) else limit
        raise DataError(f"{place}: '{name}' is {number}; it must be {limit}")
    return number
