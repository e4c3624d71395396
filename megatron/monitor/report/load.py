"""A run folder, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron.errors import RunError
from megatron.monitor.jsonl import METRICS, MIXTURE, RUN_INFO
from megatron.monitor.record import FloatArray
from megatron.monitor.report.ledger import Ledger, bin_limit, bin_width, read_ledger
from megatron.monitor.report.lines import LineCount, last_step, read_lines
from megatron.monitor.report.measured import (
    CheckpointLosses,
    TaskEvaluation,
    Validation,
    is_number,
    read_checkpoints,
    read_tasks,
    read_validation,
)

METRIC_NAMES = ("tokens_per_second", "learning_rate", "grad_norm", "mfu")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything that the report says about one run.

    Attributes:
        name: short name, unique among the runs of a report.
        path: the run folder.
        method: name of the mixing method, ``""`` if the folder does not tell.
        seed: the run's seed, ``None`` if the folder does not tell.
        total_steps: planned length, if known.
        ledger: ``mixture.jsonl``, summed.
        validations: on the validation split, by rising step.
        tests: on the test split.
        tasks: evaluations by tasks, in training and by ``evaluate.py``, by rising step.
        checkpoints: held-out losses that ``evaluate.py`` measured, by rising step.
        metric_steps: last step of each bin of ``metrics``, ``[M]``.
        metrics: binned means of the logged numbers, each ``[M]``.
        overhead: seconds that mixing took by kind, and those of all steps, as logged.
        info: ``run.json``.
        config: ``config.yml``.
        notes: what a reader should know about the files.
    """

    name: str
    path: Path
    method: str
    seed: int | None
    total_steps: int | None
    ledger: Ledger
    validations: tuple[Validation, ...]
    tests: tuple[Validation, ...]
    tasks: tuple[TaskEvaluation, ...]
    checkpoints: tuple[CheckpointLosses, ...]
    metric_steps: FloatArray
    metrics: Mapping[str, FloatArray]
    overhead: Mapping[str, float]
    info: Mapping[str, Any]
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """The last step recorded."""
        return int(self.ledger.steps[-1])

    @property
    def mixing(self) -> str:
        """The mixing method in words, with the kind of weights for static ones."""
        block = self.config.get("mixing")
        weights = block.get("weights") if isinstance(block, dict) else None
        if self.method == "static" and isinstance(weights, str):
            return f"static {weights}"
        return self.method

    def natural_weights(self) -> FloatArray | None:
        """Return the shares that token counts alone would give, ``[K]``, if they can be known.

        ``run.json`` says them or the tokens of each split; otherwise samples ÷ epochs
        gives the windows of a domain that was drawn from.
        """
        given = self.info.get("natural_weights") or self.info.get("train_tokens")
        if isinstance(given, Mapping) and all(name in given for name in self.ledger.domains):
            size = np.array([float(given[name]) for name in self.ledger.domains])
        else:
            epochs = self.ledger.epochs[-1]
            if not np.all((self.ledger.samples > 0) & (epochs > 0)):
                return None
            size = self.ledger.samples / epochs
        total = float(size.sum())
        return size / total if total > 0 else None


def load_runs(folders: Sequence[Path | str]) -> list[RunData]:
    """Read run folders and give each a short name of its own.

    Raises:
        RunError: a folder is no run, or has recorded no step.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        check_run(path)
    names = short_names([path.resolve() for path in paths])
    return [load_run(path, name) for path, name in zip(paths, names, strict=True)]


def check_run(path: Path) -> None:
    """Check that ``path`` is a run folder.

    Raises:
        RunError: it is not; the message names runs inside it, if there are any.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunError(f"{path} {what}; give the run folder (run_dir) of a training run")
    if (path / MIXTURE).is_file():
        return
    inside = sorted(str(found.parent) for found in path.glob(f"*/{MIXTURE}"))[:3]
    hint = f"; there are runs inside it: {', '.join(inside)}" if inside else ""
    raise RunError(f"{path} is not a run folder: it holds no {MIXTURE}{hint}")


def load_run(path: Path, name: str) -> RunData:
    """Read one run folder."""
    end = last_step(path / MIXTURE)
    if end is None:
        raise RunError(f"{path}: no step has been recorded yet; make the report again later")
    count = LineCount()
    records = read_lines(path / MIXTURE, count)
    first = next(records, None)
    start = first["step"] if first is not None else 1
    ledger = read_ledger(_chain(first, records), first_step=start, last_step=max(start, end))
    if not len(ledger.steps):
        raise RunError(f"{path / MIXTURE}: none of its {count.records} records is a step's")
    info, config = _json(path / RUN_INFO), _yaml(path / "config.yml")
    notes = list(ledger.notes)
    metrics = read_metrics(path / METRICS, ledger, count)
    if count.unreadable:
        notes.append(f"{count.unreadable} lines could not be read and were left out")
    mixing = config.get("mixing")
    method = info.get("method") or (mixing.get("method") if isinstance(mixing, dict) else None)
    seed = info.get("seed", config.get("seed"))
    total = info.get("total_steps") or config.get("train_iters")
    return RunData(
        name=name,
        path=path,
        method=str(method or ""),
        seed=seed if isinstance(seed, int) else None,
        total_steps=total if isinstance(total, int) else None,
        ledger=ledger,
        validations=metrics.validations,
        tests=metrics.tests,
        tasks=read_tasks(path, count),
        checkpoints=read_checkpoints(path, ledger, count),
        metric_steps=metrics.steps,
        metrics=metrics.columns,
        overhead=metrics.overhead,
        info=info,
        config=config,
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """``metrics.jsonl``, summed; see the attributes of the same names in :class:`RunData`."""

    steps: FloatArray
    columns: Mapping[str, FloatArray]
    overhead: Mapping[str, float]
    validations: tuple[Validation, ...]
    tests: tuple[Validation, ...]


def read_metrics(path: Path, ledger: Ledger, count: LineCount) -> Metrics:
    """Read ``metrics.jsonl``: binned numbers, overhead, validations, tests."""
    rows: list[tuple[float, ...]] = []
    steps: list[int] = []
    validations: dict[int, Validation] = {}
    tests: dict[int, Validation] = {}
    overhead: dict[str, float] = {}
    for record in read_lines(path, count) if path.is_file() else ():
        for name, found in (("valid_loss", validations), ("test_loss", tests)):
            if isinstance(record.get(name), dict):
                found[record["step"]] = read_validation(record, name, ledger)
        if "loss" in record:
            steps.append(record["step"])
            rows.append(tuple(_float(record.get(name)) for name in METRIC_NAMES))
            for kind, seconds in (record.get("overhead") or {}).items():
                overhead[kind] = overhead.get(kind, 0.0) + seconds
    edges, columns = _bin(np.array(steps, dtype=np.float64), np.array(rows, dtype=np.float64))
    known = {
        name: columns[:, index]
        for index, name in enumerate(METRIC_NAMES)
        if columns.size and np.isfinite(columns[:, index]).any()
    }
    return Metrics(
        steps=edges,
        columns=known,
        overhead=overhead,
        validations=tuple(validations[step] for step in sorted(validations)),
        tests=tuple(tests[step] for step in sorted(tests)),
    )


def _bin(steps: FloatArray, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Average rows ``[T, C]`` over equal ranges of steps; NaN entries do not count."""
    if not len(steps):
        return steps, np.zeros((0, len(METRIC_NAMES)))
    width = bin_width(int(steps[-1] - steps[0]) + 1, bin_limit(1))
    _, where = np.unique((steps - steps[0]) // width, return_inverse=True)
    known = np.isfinite(rows)
    sums, counts = np.zeros((2, int(where.max()) + 1, rows.shape[1]))
    np.add.at(sums, where, np.where(known, rows, 0.0))
    np.add.at(counts, where, known)
    edges = np.zeros(len(sums))
    np.maximum.at(edges, where, steps)
    return edges, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return for each path the shortest tail that tells it from the others.

    The same folder given twice is told apart by a number.
    """
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]).lstrip("/") for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _chain(first: dict[str, Any] | None, rest: Any) -> Any:
    if first is not None:
        yield first
    yield from rest


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _float(value: Any) -> float:
    return float(value) if is_number(value) else float("nan")
