"""Fitted laws of gains by task, model size and selector: the file that ``fit`` leaves.

``gains.json`` keeps of every law the numbers, their intervals and draws, so that what reads it
(``plan``, the joint search) can say how sure it is without the runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.checkpoint.files import write_text
from megatron.errors import DataError, did_you_mean
from megatron.selection.base import FloatArray
from megatron.selection.cost_model import size_name

NAME: Final = "gains.json"
FORMAT: Final = 1
COMPUTE: Final = ("training", "total")


@dataclass(frozen=True, kw_only=True, eq=False)
class Gain:
    """The law of one selector on one task and model size.

    Attributes:
        task: that the performance is of.
        method: that chose the documents.
        size: parameters of the trained model.
        law: (P0, λ, P̄).
        low: lower ends of their intervals.
        high: upper ends.
        draws: laws that the runs allow, [R, 3].
        total: C_total, operations of training on everything.
        choosing: operations of scoring, mean over the runs.
        flops: C of the runs, [n], as the law sees it.
        performance: of the runs, [n].
        r2: share of the variance explained.
        rmse: root of the mean squared residual.
        fixed: whether P̄ was given.
    """

    task: str
    method: str
    size: float
    law: FloatArray
    low: FloatArray
    high: FloatArray
    draws: FloatArray
    total: float
    choosing: float
    flops: FloatArray
    performance: FloatArray
    r2: float
    rmse: float
    fixed: bool

    @property
    def name(self) -> str:
        """Task, size and method in words."""
        return f"{self.task}, {size_name(self.size)}, {self.method}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Gains:
    """All laws of a fit.

    Attributes:
        gains: one for each task, size and method.
        compute: what C is: ``training`` alone, choosing being paid before; or ``total``, both.
        better: whether a ``higher`` or a ``lower`` performance is.
        unit: of the performance, for axes ("accuracy", "nats per token").
        confidence: of the intervals.
        intervals: how they were made.
        left_out: why some have no law, by their name.
    """

    gains: tuple[Gain, ...]
    compute: str
    better: str
    unit: str
    confidence: float
    intervals: str
    left_out: Mapping[str, str]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of the runs."""
        return tuple(dict.fromkeys(gain.task for gain in self.gains))

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1."""
        return 1.0 if self.better == "higher" else -1.0

    def of(self, task: str) -> tuple[Gain, ...]:
        """Return the laws of a task, or raise if there are none."""
        found = tuple(gain for gain in self.gains if gain.task == task)
        if not found:
            raise DataError(
                f"there is no law of the task '{task}'{did_you_mean(task, self.tasks)} "
                f"(fitted: {', '.join(self.tasks)})"
            )
        return found


def sizes_of(gains: Sequence[Gain]) -> tuple[float, ...]:
    """Return the sizes of some laws, smallest first."""
    return tuple(sorted({gain.size for gain in gains}))


def laws_of(gains: Sequence[Gain], method: str) -> list[Gain]:
    """Return the laws of one method, in their order."""
    return [gain for gain in gains if gain.method == method]


def methods_of(gains: Sequence[Gain]) -> tuple[str, ...]:
    """Return the methods of some laws, in their order."""
    return tuple(dict.fromkeys(gain.method for gain in gains))


def gains_facts(gains: Gains) -> dict[str, Any]:
    """Return everything of a fit, JSON-able; numbers that do not exist are null."""
    return {
        "format": FORMAT,
        "form": "P0 + (P_bar - P0) (1 - exp(-lambda C / C_total))",
        "compute": gains.compute,
        "better": gains.better,
        "unit": gains.unit,
        "confidence": gains.confidence,
        "intervals": gains.intervals,
        "gains": [
            {name: _plain(value) for name, value in vars(one).items()} for one in gains.gains
        ],
        "left_out": dict(gains.left_out),
    }


def write_gains(gains: Gains, folder: Path) -> Path:
    """Write ``gains.json`` and return its path.

    Raises:
        RunError: the disk refuses.
    """
    text = json.dumps(gains_facts(gains), ensure_ascii=False, allow_nan=False, indent=1)
    return write_text(folder / NAME, text)


def read_gains(path: Path) -> Gains:
    """Read what ``fit`` has left.

    Args:
        path: the file, or its folder.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    file = path / NAME if path.is_dir() else path
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        version = found["format"]
        if version == FORMAT:
            return Gains(
                gains=tuple(_gain(one) for one in found["gains"]),
                compute=str(found["compute"]),
                better=str(found["better"]),
                unit=str(found["unit"]),
                confidence=float(found["confidence"]),
                intervals=str(found["intervals"]),
                left_out={str(k): str(v) for k, v in found["left_out"].items()},
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} cannot be read as fitted gains ({error}); give --out of "
            "tools/select_data.py fit"
        ) from None
    raise DataError(f"{file} is of format {version}, and this reads {FORMAT}; fit again")


def _gain(found: Mapping[str, Any]) -> Gain:
    arrays = {"law", "low", "high", "draws", "flops", "performance"}
    values: dict[str, Any] = {}
    for name in (one.name for one in fields(Gain)):
        value = found[name]
        if name in arrays:
            value = np.array(
                [[np.nan if v is None else v for v in row] for row in value]
                if name == "draws"
                else [np.nan if v is None else v for v in value],
                dtype=np.float64,
            )
        values[name] = value
    return Gain(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value
