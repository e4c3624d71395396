"""What a run takes from an earlier one, and what to say when it is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.errors import DataError
from megatron.mixing.observation import FloatArray

METRICS_NAME: Final = "metrics.jsonl"


def how_to_make(file: Path) -> str:
    """Return the command of the run that writes ``file``, a record in a run's folder."""
    folder = file.parent
    if folder.name == "quickstart":
        return "make it with: ./deepy.py train.py -d configs local/quickstart mixing/odm"
    return (
        f"it is written by the run of that folder: ./deepy.py train.py YOUR_CONFIGS "
        f"--set run_dir={folder}"
    )


def final_losses(path: str | os.PathLike[str], domains: Sequence[str]) -> FloatArray:
    """Read a run's last validation losses.

    A last line that a killed run left torn is left out.

    Args:
        path: a ``metrics.jsonl``, or the run's folder.
        domains: names of the domains, in the order of the result.

    Returns:
        Nats per token, [K].

    Raises:
        DataError: the file is missing or damaged, holds no validation, or its last one
            lacks a domain.
    """
    file, records = _validations(path)
    return _vector(file, records[-1]["valid_loss"], domains)


def validation_losses(
    path: str | os.PathLike[str], names: Sequence[str], *, required: Sequence[str]
) -> tuple[tuple[int, ...], FloatArray]:
    """Read all of a run's report validations.

    Args:
        path: a ``metrics.jsonl``, or the run's folder.
        names: of what is wanted, in the order of the result, [N].
        required: those of them that every validation must have.

    Returns:
        The steps, rising, [P], and the losses in nats per token, [P, N]; NaN where a name
        that may be absent is.

    Raises:
        DataError: the file is missing or damaged, or lacks what is required.
    """
    file, records = _validations(path)
    by_step: dict[int, FloatArray] = {}
    for record in records:
        step, losses = record.get("step"), record["valid_loss"]
        if isinstance(step, bool) or not isinstance(step, int):
            raise DataError(f"{file}: a validation of step {step!r}; the record is damaged")
        _vector(file, losses, required)
        known = [name for name in names if isinstance(losses.get(name), int | float)]
        found = dict(zip(known, _vector(file, losses, known), strict=True)) if known else {}
        by_step[step] = np.array([found.get(name, np.nan) for name in names])
    steps = tuple(sorted(by_step))
    return steps, np.array([by_step[step] for step in steps])


def _validations(path: str | os.PathLike[str]) -> tuple[Path, list[dict[str, Any]]]:
    """Return a run's record of metrics, and the validations in it."""
    file = Path(path)
    file = file / METRICS_NAME if file.is_dir() or not file.suffix else file
    records: list[dict[str, Any]] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    records += _validation(f"{file}, line {number}", line)
    except OSError as error:
        raise DataError(
            f"cannot read the losses of an earlier run from {file} ({error.strerror}); "
            f"{how_to_make(file)}"
        ) from error
    if not records:
        raise DataError(f"{file} holds no validation losses; give a run that was validated")
    return file, records


def _validation(where: str, line: bytes) -> list[dict[str, Any]]:
    """Return the record of a line if it is a validation's; else nothing."""
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON ({error}); the record is damaged") from error
    is_one = isinstance(record, dict) and isinstance(record.get("valid_loss"), dict)
    return [record] if is_one else []


def _vector(file: Path, losses: dict[str, Any], domains: Sequence[str]) -> FloatArray:
    for name in domains:
        value = losses.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise DataError(
                f"{file}: a validation has no loss of the domain '{name}' (it has "
                f"{', '.join(sorted(losses))}); give a run of the same domains, or targets by name"
            )
    return np.array([losses[name] for name in domains], dtype=np.float64)
