"""A recorded run's distributions, read from its mixture ledger."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron.errors import DataError
from megatron.mixing.observation import FloatArray
from megatron.mixing.simplex import is_distribution, normalise

LEDGER_NAME: Final = "mixture.jsonl"
_RECORDED_TOLERANCE: Final = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Ledger:
    """What a run drew from.

    Attributes:
        steps: the recorded steps, rising, int64 [N].
        probability: the distribution that drew each, with its recorded bits, [N, K].
    """

    steps: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]

    def average(self) -> FloatArray:
        """Return the mean distribution over the recorded steps, [K]."""
        return normalise(self.probability.mean(axis=0))


def read_ledger(path: str | os.PathLike[str], domains: Sequence[str]) -> Ledger:
    """Read a ``mixture.jsonl``, or the one in a run's folder.

    A last line that a killed run left torn is left out.

    Args:
        path: the ledger, or the folder that holds it.
        domains: names of the domains, in the order of the result.

    Raises:
        DataError: the file is missing, empty or damaged, its steps do not rise, or its
            domains are not ``domains``; the message names file and line.
    """
    file = Path(path)
    file = file / LEDGER_NAME if file.is_dir() else file
    steps: list[int] = []
    rows: list[list[float]] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                where = f"{file}, line {number}"
                step, row = _read_line(where, line, domains)
                if steps and step <= steps[-1]:
                    raise DataError(f"{where}: step {step} after step {steps[-1]}; steps must rise")
                steps.append(step)
                rows.append(row)
    except OSError as error:
        raise DataError(
            f"replay: cannot read {file} ({error.strerror}); give a run's {LEDGER_NAME} or folder"
        ) from error
    if not steps:
        raise DataError(f"replay: {file} holds no complete record; give the ledger of a run")
    return Ledger(steps=np.array(steps, dtype=np.int64), probability=np.array(rows))


def _read_line(where: str, line: bytes, domains: Sequence[str]) -> tuple[int, list[float]]:
    try:
        record: Any = json.loads(line)
        step, probability = record["step"], record["probability"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: not a ledger record (an object with step and probability); give a run's "
            f"{LEDGER_NAME}"
        ) from error
    if not isinstance(step, int) or not isinstance(probability, Mapping):
        raise DataError(f"{where}: step {step!r} with probability {probability!r} is no record")
    if probability.keys() != set(domains):
        raise DataError(
            f"{where}: it mixes the domains {sorted(probability)}, this run "
            f"{sorted(domains)}; replay needs the same domains"
        )
    row = [probability[domain] for domain in domains]
    return step, _distribution(where, row)


def _distribution(where: str, row: list[Any]) -> list[float]:
    if not all(isinstance(value, int | float) for value in row):
        raise DataError(f"{where}: probability {row!r} holds something that is no number")
    p = np.array(row, dtype=np.float64)
    if is_distribution(p):
        return row
    if not (np.isfinite(p).all() and (p >= 0).all() and abs(p.sum() - 1) <= _RECORDED_TOLERANCE):
        raise DataError(f"{where}: probability {row!r} is no distribution (at least 0, sum 1)")
    rescaled: list[float] = normalise(p).tolist()
    return rescaled
