"""The numbers of a run under the chart names that users of NeoX dashboards know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron.monitor.interval import Interval
from megatron.monitor.record import (
    AuditRecord,
    FloatArray,
    StepRecord,
    TaskRecord,
    ValidationRecord,
    is_logged,
)

Scalars = dict[str, float]


class ChartSink:
    """What TensorBoard, Weights & Biases and Comet have in common.

    A point is made on every logged step; losses and shares speak for all the
    steps since the point before.  A subclass opens its service in ``start`` and
    says what to do with named numbers in ``emit``.
    """

    essential = False

    def __init__(self, *, log_interval: int = 1) -> None:
        """Make a point every ``log_interval`` steps."""
        self._log_interval = log_interval
        self._interval = Interval()
        self._samples_before: Mapping[str, float] = {}
        self._samples: FloatArray = np.zeros(0)

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Take up the counts from before (``info["samples_seen"]``) and open the service."""
        self._samples_before = info.get("samples_seen") or {}
        self.open(resume_step, info)

    def open(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Open the service."""
        raise NotImplementedError

    def emit(self, scalars: Scalars, step: int) -> None:
        """Send named numbers for ``step``."""
        raise NotImplementedError

    def step(self, record: StepRecord) -> None:
        """Sum up, and send on a logged step."""
        self._interval.add(record)
        if len(self._samples) != len(record.domains):
            before = [self._samples_before.get(name, 0) for name in record.domains]
            self._samples = np.asarray(before, dtype=np.float64)
        self._samples = self._samples + record.samples
        if is_logged(record.step, self._log_interval):
            self.emit(step_scalars(record, self._interval, self._samples), record.step)
            self._interval.clear()

    def validation(self, record: ValidationRecord) -> None:
        """Send a validation."""
        self.emit(validation_scalars(record), record.step)

    def tasks(self, record: TaskRecord) -> None:
        """Send an evaluation by tasks."""
        self.emit(task_scalars(record), record.step)

    def audit(self, record: AuditRecord) -> None:
        """Ignore: sample lists are for files."""

    def flush(self) -> None:
        """Do nothing unless the service needs it."""

    def close(self) -> None:
        """Do nothing unless the service needs it."""


def step_scalars(record: StepRecord, interval: Interval, samples_seen: FloatArray) -> Scalars:
    """Return the named numbers of a logged step.

    Args:
        record: the step.
        interval: the steps since the last point, this one included.
        samples_seen: samples by domain since the run began, ``[K]``.
    """
    scalars: Scalars = {"train/lm_loss": record.loss, "train/learning_rate": record.learning_rate}
    runtime = {
        "train/loss_scale": record.loss_scale,
        "train/grad_norm": record.grad_norm,
        "runtime/tokens_per_sec": record.tokens_per_second,
        "runtime/iteration_time": record.seconds,
        "runtime/mfu": record.mfu,
    }
    scalars.update({name: value for name, value in runtime.items() if value is not None})
    for name, value in record.statistics.items():
        scalars[name if "/" in name else f"train/{name}"] = value
    if record.seconds:
        scalars["runtime/samples_per_sec"] = float(record.samples.sum()) / record.seconds
    total = max(1.0, float(samples_seen.sum()))
    vectors: dict[str, Any] = {
        "train/lm_loss": interval.domain_loss,
        "train/iterations": samples_seen,
        "train/percent": 100 * samples_seen / total,
        "train/epochs": record.epochs,
        "train/_probabilities": record.probability,
        "train/_loss_errors": record.loss_error,
        "train/_loss_weights": record.loss_weight,
        "train/_controller_probabilities": record.controller_probability,
    }
    for name, vector in vectors.items():
        if vector is not None:
            scalars.update(by_domain(name, record.domains, vector.tolist()))
    for name, value in record.estimates.items():
        if name in ("step", "weights"):  # known under other names
            continue
        title = "estimated_reward" if name == "estimate" else name
        scalars.update(estimate(f"train/_{title}", record.domains, value))
    return finite(scalars)


def validation_scalars(record: ValidationRecord) -> Scalars:
    """Return the named numbers of a validation."""
    group = "validation" if record.split == "valid" else record.split
    scalars: Scalars = {}
    for domain, loss in record.valid_loss.items():
        scalars[f"{group}/lm_loss/{domain}"] = loss
        scalars[f"{group}/lm_loss_ppl/{domain}"] = perplexity(loss)
    for domain, bits in record.bits_per_byte.items():
        scalars[f"{group}/bits_per_byte/{domain}"] = bits
    for domain, loss in record.character_loss.items():
        scalars[f"{group}/lm_loss_char_lvl_ppl/{domain}"] = perplexity(loss)
    known = {name: loss for name, loss in record.valid_loss.items() if math.isfinite(loss)}
    if known:
        scalars[f"{group}/avg_lm_loss"] = record.average
        scalars[f"{group}/avg_ppl"] = sum(map(perplexity, known.values())) / len(known)
    if record.weights is not None:
        total = sum(record.weights.get(name, 0.0) for name in known)
        scalars[f"{group}/weighted_avg_lm_loss"] = record.weighted_average
        if total > 0:
            scalars[f"{group}/weighted_avg_ppl"] = (
                sum(record.weights.get(name, 0.0) * perplexity(x) for name, x in known.items())
                / total
            )
    if record.seconds is not None:
        scalars[f"runtime/{group}_seconds"] = record.seconds
    return finite(scalars)


def task_scalars(record: TaskRecord) -> Scalars:
    """Return the named numbers of an evaluation by tasks."""
    return finite(
        {
            f"test/{task}/{metric}": value
            for task, metrics in record.tasks.items()
            for metric, value in metrics.items()
        }
    )


def by_domain(name: str, domains: Sequence[str], values: Sequence[float]) -> Scalars:
    """Return ``{name/domain: value}``."""
    return {f"{name}/{domain}": value for domain, value in zip(domains, values, strict=True)}


def estimate(name: str, domains: Sequence[str], value: Any) -> Scalars:
    """Name a mixer's estimate: one number, one per domain (list or mapping), else nothing."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, int | float):
        return {name: float(value)}
    if isinstance(value, Mapping):
        numbers = {k: v for k, v in value.items() if isinstance(v, int | float)}
        return {f"{name}/{domain}": float(v) for domain, v in numbers.items()}
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        numbers_list = [v for v in value if isinstance(v, int | float | np.number)]
        if len(numbers_list) == len(domains) == len(value):
            return by_domain(name, domains, [float(v) for v in numbers_list])
    return {}


def finite(scalars: Scalars) -> Scalars:
    """Return the finite numbers: a chart has no place for the others."""
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
