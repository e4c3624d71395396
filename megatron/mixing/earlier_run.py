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
    file = Path(path)
    file = file / METRICS_NAME if file.is_dir() or not file.suffix else file
    losses: dict[str, Any] | None = None
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    losses = _losses(f"{file}, line {number}", line) or losses
    except OSError as error:
        raise DataError(
            f"cannot read the losses of an earlier run from {file} ({error.strerror}); "
            f"{how_to_make(file)}"
        ) from error
    if losses is None:
        raise DataError(f"{file} holds no validation losses; give a run that was validated")
    return _vector(file, losses, domains)


def _losses(where: str, line: bytes) -> dict[str, Any] | None:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON ({error}); the record is damaged") from error
    losses = record.get("valid_loss") if isinstance(record, dict) else None
    return losses if isinstance(losses, dict) else None


def _vector(file: Path, losses: dict[str, Any], domains: Sequence[str]) -> FloatArray:
    for name in domains:
        value = losses.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise DataError(
                f"{file}: the last validation has no loss of the domain '{name}' (it has "
                f"{', '.join(sorted(losses))}); give a run of the same domains, or targets by name"
            )
    return np.array([losses[name] for name in domains], dtype=np.float64)
