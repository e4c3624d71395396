"""What was measured of a run's model, read for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.monitor.jsonl import EVALUATIONS, METRICS
from megatron.monitor.report.ledger import Ledger
from megatron.monitor.report.lines import LineCount, read_lines

AVERAGES = ("avg_lm_loss", "avg_ppl", "weighted_avg_lm_loss", "weighted_avg_ppl")
"""Averages over domains, by the names that ODM's fork of GPT-NeoX logs them by."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation record.

    Attributes:
        step: steps done when it was measured.
        tokens: tokens trained on by then.
        loss: mean nats per token by domain.
        bits_per_byte: by domain, where known.
        averages: over domains, by :data:`AVERAGES`.
    """

    step: int
    tokens: float
    loss: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    averages: Mapping[str, float] = field(default_factory=dict)

    def average(self, domains: Sequence[str] | None = None) -> float:
        """Plain mean over ``domains`` (default: all that were measured), NaN if there is none."""
        names = self.loss if domains is None else domains
        values = [self.loss[name] for name in names if name in self.loss]
        return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """What lm-eval's tasks found.

    Attributes:
        step: steps done when it was measured.
        metrics: value by task and metric.
    """

    step: int
    metrics: Mapping[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True)
class CheckpointLosses:
    """What ``evaluate.py`` found on held-out data.

    Attributes:
        split: ``"valid"`` or ``"test"``.
        losses: of the checkpoint.
    """

    split: str
    losses: Validation


def read_tasks(path: Path, count: LineCount) -> tuple[TaskEvaluation, ...]:
    """Read what tasks found in training and, in place of that, by ``evaluate.py``."""
    found: dict[int, dict[tuple[str, str], float]] = {}
    for name in (METRICS, EVALUATIONS):
        for record in read_lines(path / name, count) if (path / name).is_file() else ():
            tasks, shots = record.get("tasks"), record.get("num_fewshot")
            for task, metrics in tasks.items() if isinstance(tasks, dict) else ():
                examples = shots.get(task) if isinstance(shots, dict) else None
                shown = f"{task} ({examples}-shot)" if examples else task
                found.setdefault(record["step"], {}).update(
                    {(shown, metric): float(v) for metric, v in metrics.items() if is_number(v)}
                )
    return tuple(TaskEvaluation(step=step, metrics=found[step]) for step in sorted(found))


def read_checkpoints(path: Path, ledger: Ledger, count: LineCount) -> tuple[CheckpointLosses, ...]:
    """Read the newest measurement of every checkpoint on each split."""
    found: dict[tuple[int, str], CheckpointLosses] = {}
    file = path / EVALUATIONS
    for record in read_lines(file, count) if file.is_file() else ():
        for split in ("valid", "test"):
            if isinstance(record.get(f"{split}_loss"), dict):
                losses = read_validation(record, f"{split}_loss", ledger)
                found[record["step"], split] = CheckpointLosses(split=split, losses=losses)
    return tuple(found[key] for key in sorted(found, key=lambda key: (key[1] == "test", key[0])))


def read_validation(record: Mapping[str, Any], name: str, ledger: Ledger) -> Validation:
    """Return the validation in a line of ``metrics.jsonl`` or ``evaluations.jsonl``.

    Args:
        record: the line.
        name: of its losses, ``valid_loss`` or ``test_loss``.
        ledger: knows how many tokens were trained on by then.
    """
    bits = record.get("bits_per_byte")
    group = "validation" if name == "valid_loss" else "test"
    return Validation(
        step=record["step"],
        tokens=ledger.tokens_after(record["step"]),
        loss={k: float(v) for k, v in record[name].items() if is_number(v)},
        bits_per_byte={k: float(v) for k, v in bits.items() if is_number(v)}
        if isinstance(bits, dict)
        else {},
        averages={
            key: float(record[f"{group}/{key}"])
            for key in AVERAGES
            if is_number(record.get(f"{group}/{key}"))
        },
    )


def is_number(value: Any) -> bool:
    """Tell whether a value of a JSON line is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
