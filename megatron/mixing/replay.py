"""A recorded run's decisions, read from its mixture ledger."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron.errors import DataError, did_you_mean
from megatron.mixing.earlier_run import how_to_make
from megatron.mixing.observation import FloatArray
from megatron.mixing.simplex import is_distribution, normalise

LEDGER_NAME: Final = "mixture.jsonl"
_RECORDED_TOLERANCE: Final = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Ledger:
    """What a run drew from, and how its losses counted.

    Attributes:
        steps: the recorded steps, rising, int64 [N].
        probability: the distribution that drew each, with its recorded bits, [N, K].
        loss_weight: recorded loss weights by step, each [K].
        fresh_quota: recorded lengths of blocks of their own, by first step.
        probe: recorded probe mixtures' indices, by step.
    """

    steps: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    loss_weight: Mapping[int, FloatArray]
    fresh_quota: Mapping[int, int]
    probe: Mapping[int, int]

    def average(self) -> FloatArray:
        """Return the mean distribution over the recorded steps, [K]."""
        return normalise(self.probability.mean(axis=0))


def read_ledger(path: str | os.PathLike[str], domains: Sequence[str]) -> Ledger:
    """Read a ``mixture.jsonl``, or the one in a run's folder.

    A last line that a killed run left torn is left out.

    Args:
        path: the ledger, or the folder that holds it.
        domains: names of the domains, in the order of the result.  The lines of a run whose
            domains were edited name different ones; a domain that a line does not name
            had probability 0.

    Raises:
        DataError: the file is missing, empty or damaged, its steps do not rise, or its
            domains, those of all lines together, are not ``domains``; the message names
            file and line.
    """
    file = Path(path)
    file = file / LEDGER_NAME if file.is_dir() or not file.suffix else file
    steps, rows = array("q"), array("d")  # compact: a long run has millions of numbers
    loss_weight: dict[int, FloatArray] = {}
    fresh_quota: dict[int, int] = {}
    probe: dict[int, int] = {}
    never = set(domains)
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                where = f"{file}, line {number}"
                record = _record(where, line)
                step = record["step"]
                if steps and step <= steps[-1]:
                    raise DataError(f"{where}: step {step} after step {steps[-1]}; steps must rise")
                steps.append(step)
                rows.extend(_distribution(where, record["probability"], domains))
                never -= record["probability"].keys()
                if record.get("loss_weight") is not None:
                    weights = _by_domain(
                        where, "loss_weight", record["loss_weight"], domains, missing=1.0
                    )
                    loss_weight[step] = np.array(weights, dtype=np.float64)
                for key, target in (("fresh_quota", fresh_quota), ("probe", probe)):
                    if record.get(key) is not None:
                        target[step] = _whole(f"{where}: {key}", record[key])
    except OSError as error:
        raise DataError(
            f"cannot read the ledger {file} ({error.strerror}); give a run's {LEDGER_NAME} or "
            f"folder ({how_to_make(file)})"
        ) from error
    if not steps:
        raise DataError(f"replay: {file} holds no complete record; give the ledger of a run")
    if never:
        raise DataError(
            f"replay: no line of {file} names {', '.join(map(repr, sorted(never)))}, and this run "
            f"mixes it; replay needs the domains of the ledger and no other"
        )
    return Ledger(
        steps=np.array(steps, dtype=np.int64),
        probability=np.array(rows, dtype=np.float64).reshape(len(steps), len(domains)),
        loss_weight=loss_weight,
        fresh_quota=fresh_quota,
        probe=probe,
    )


def _record(where: str, line: bytes) -> dict[str, Any]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON ({error}); the ledger is damaged") from error
    if not isinstance(record, dict) or not {"step", "probability"} <= record.keys():
        raise DataError(
            f"{where}: not a ledger record (an object with step and probability); give a run's "
            f"{LEDGER_NAME}"
        )
    record["step"] = _whole(f"{where}: step", record["step"])
    return record


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{name} is {value!r}; it must be a whole number of at least 0")
    return value


def _by_domain(
    where: str, name: str, values: object, domains: Sequence[str], *, missing: float
) -> list[float]:
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: {name} is {values!r}; it must be an object keyed by domain")
    strangers = sorted(values.keys() - set(domains))
    if strangers:
        raise DataError(
            f"{where}: {name} is of the domains {sorted(values)} and this run mixes "
            f"{sorted(domains)}: '{strangers[0]}' is not in both"
            f"{did_you_mean(strangers[0], domains)}; replay needs all domains that the ledger names"
        )
    row = [values.get(domain, missing) for domain in domains]
    if not all(isinstance(v, int | float) and np.isfinite(v) and v >= 0 for v in row):
        raise DataError(f"{where}: {name} {row!r} must be finite numbers of at least 0")
    return row


def _distribution(where: str, values: object, domains: Sequence[str]) -> list[float]:
    row = _by_domain(where, "probability", values, domains, missing=0.0)
    p = np.array(row, dtype=np.float64)
    if is_distribution(p):
        return row  # as recorded, to the bit
    if abs(p.sum() - 1) > _RECORDED_TOLERANCE:
        raise DataError(f"{where}: probability {row!r} sums to {p.sum():.9g}; it must sum to 1")
    rescaled: list[float] = normalise(p).tolist()
    return rescaled
