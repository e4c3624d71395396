"""What a run reports: one record per step, per validation and, when asked for, per plan.

The records are the input of every sink.  A record holds arrays in the order of
``domains``; the sinks name them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.monitor.overhead import check_kind

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

TIME_FIELDS: tuple[str, ...] = ("tokens_per_second", "seconds", "eta_seconds", "mfu", "overhead")
"""Fields of ``metrics.jsonl`` that depend on the clock.

Everything else in a run's files is a function of its configuration and data:
two runs are compared bit for bit after these fields have been dropped (and, where
``wall_clock_breakdown`` asks for them, those that begin with ``timers/``).
``mixture.jsonl`` and ``samples.jsonl`` have none.
"""


def is_logged(step: int, log_interval: int) -> bool:
    """Tell whether ``step`` (from 1) has a line in ``metrics.jsonl``.

    The first step and every multiple of ``log_interval`` have one.  It depends on
    nothing else, so an interrupted run logs the same steps as an uninterrupted one.
    """
    return step == 1 or step % max(1, log_interval) == 0


_SCALARS = (
    "loss",
    "learning_rate",
    "tokens_per_second",
    "seconds",
    "eta_seconds",
    "mfu",
    "grad_norm",
    "loss_scale",
)


LEDGER_VECTORS: tuple[str, ...] = (
    "loss_weight",
    "valid_loss",
    "controller_probability",
    "excess_loss",
    "reference_loss",
    "batch_valid_loss",
    "gradient_alignment",
)
"""Vectors that some steps have in ``mixture.jsonl``."""

METRICS_VECTORS: tuple[str, ...] = ("loss_error", "epochs_forecast")
"""Vectors that logged steps have in ``metrics.jsonl``, where they are known."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One training step, as it was drawn and as it turned out.

    Attributes:
        step: number of the step, from 1.
        domains: names of the K domains; every array below is ``[K]`` in this order.
        loss: mean nats per token over the global batch, every token counted alike.
        learning_rate: the rate that this step used.
        probability: the distribution that drew this step.
        domain_loss: mean nats per token of each domain, NaN where it was absent.
        tokens: tokens of the global batch by domain (those that count in the loss).
        samples: samples (windows) of the global batch by domain.
        epochs: passes over each domain's training split after this step.
        tokens_per_second: throughput over the last steps; a time field.
        seconds: duration of this step; a time field.
        eta_seconds: time to the end of the run; a time field.
        mfu: share of the machine's peak arithmetic (0 to 1), if a peak is known; a time field.
        grad_norm: norm of the gradient before clipping.
        loss_scale: fp16's loss scale.
        statistics: further numbers of a logged step by name: ``noise_scale``,
            ``gradient_norms/NAME`` and the like.
        loss_weight: weight of each token of a domain, when the method weights losses.
        valid_loss: validation loss that was measured for the controller at this step,
            NaN where not measured.
        fresh_quota: number of steps of the block that starts here, when a probe asked for one.
        probe: index of the probe that this step belongs to.
        skipped: whether the update was dropped (overflow, non-finite loss).
        controller_probability: what a controller that does not draw would have drawn.
        control: who draws in the method's place: ``"shadow"`` or ``"fallback"``.
        target_loss: validation loss of what is only measured, by name, where it was measured
            for the controller at this step.
        excess_loss: mean over a domain's tokens of max(loss - reference loss, 0), NaN where
            absent; None without a reference.
        reference_loss: the reference's mean loss on the same tokens; likewise.
        batch_valid_loss: held-out loss of as many samples as each domain has in the step,
            measured before it trained, NaN where absent.
        gradient_alignment: of each domain's gradient, measured before the step trained.
        loss_error: standard error of ``domain_loss``, NaN below two samples.
        epochs_forecast: passes over each domain at the end of the run if the weights hold.
        estimates: a mixer's own estimates for the charts (``Mixer.describe()``);
            not written to the ledger.
        overhead: seconds that mixing took since the step before, by kind (the kinds of
            :data:`megatron.monitor.overhead.KINDS`); a time field.
        extra_tokens: tokens that were computed, or drawn, for the controller and not to train
            best, by the same kinds; a function of configuration and data.
    """

    step: int
    domains: tuple[str, ...]
    loss: float
    learning_rate: float
    probability: FloatArray
    domain_loss: FloatArray
    tokens: IntArray
    samples: IntArray
    epochs: FloatArray
    tokens_per_second: float | None = None
    seconds: float | None = None
    eta_seconds: float | None = None
    mfu: float | None = None
    grad_norm: float | None = None
    loss_scale: float | None = None
    loss_weight: FloatArray | None = None
    valid_loss: FloatArray | None = None
    fresh_quota: int | None = None
    probe: int | None = None
    skipped: bool = False
    controller_probability: FloatArray | None = None
    control: str | None = None
    target_loss: Mapping[str, float] | None = None
    excess_loss: FloatArray | None = None
    reference_loss: FloatArray | None = None
    batch_valid_loss: FloatArray | None = None
    gradient_alignment: FloatArray | None = None
    loss_error: FloatArray | None = None
    epochs_forecast: FloatArray | None = None
    estimates: Mapping[str, Any] = field(default_factory=dict)
    overhead: Mapping[str, float] = field(default_factory=dict)
    extra_tokens: Mapping[str, int] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring numbers and arrays to Python's and NumPy's 64-bit types, check the shapes."""
        for name in ("probability", "domain_loss", "epochs"):
            self._take(name, np.asarray(getattr(self, name), dtype=np.float64))
        for name in (*LEDGER_VECTORS, *METRICS_VECTORS):
            if (value := getattr(self, name)) is not None:
                self._take(name, np.asarray(value, dtype=np.float64))
        for name in _SCALARS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        for name in ("fresh_quota", "probe"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))
        for name in ("tokens", "samples"):
            self._take(name, _whole(name, getattr(self, name)))
        for name in ("overhead", "extra_tokens"):
            for kind in getattr(self, name):
                check_kind(kind)

    def _take(self, name: str, value: npt.NDArray[Any]) -> None:
        if value.shape != (len(self.domains),):
            raise ValueError(
                f"StepRecord.{name} has shape {value.shape}, expected ({len(self.domains)},): "
                "one entry per domain"
            )
        object.__setattr__(self, name, value)


def _whole(name: str, value: Any) -> IntArray:
    """Return counts as int64; counts that came through a float reduction are whole numbers."""
    array = np.asarray(value)
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        if not np.array_equal(rounded, array):
            raise ValueError(f"StepRecord.{name} holds fractions or non-finite numbers: {array}")
        array = rounded
    return array.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One measurement of the held-out losses.

    Attributes:
        step: training steps done when it was measured (0: before the first).
        valid_loss: mean nats per token by domain.
        bits_per_byte: the same in bits per byte of text, where the bytes are known.
        character_loss: the same in nats per character, where that is wanted.
        weights: the mixture whose weighted average is wanted beside the plain one.
        split: ``"valid"`` or ``"test"``.
        seconds: duration; a time field.
        review: what the controller's guardrail did about it, if anything.
    """

    step: int
    valid_loss: Mapping[str, float]
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    character_loss: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None
    split: str = "valid"
    seconds: float | None = None
    review: str | None = None

    @property
    def average(self) -> float:
        """Plain mean over the measured domains, NaN if there is none."""
        known = [loss for loss in self.valid_loss.values() if math.isfinite(loss)]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def weighted_average(self) -> float:
        """Mean over the measured domains weighted by ``weights``, NaN without them."""
        if self.weights is None:
            return math.nan
        pairs = [
            (self.weights.get(name, 0.0), loss)
            for name, loss in self.valid_loss.items()
            if math.isfinite(loss)
        ]
        total = math.fsum(weight for weight, _ in pairs)
        return math.fsum(w * loss for w, loss in pairs) / total if total > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """One evaluation by tasks.

    Attributes:
        step: training steps done when it was measured.
        tasks: metrics of each task by name.
        num_fewshot: examples before every question of a task, where there are any.
        seconds: duration; a time field.
    """

    step: int
    tasks: Mapping[str, Mapping[str, float]]
    num_fewshot: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """The ordered global list of samples of one step.

    Attributes:
        step: number of the step.
        samples: (domain name, epoch, sample within the epoch) in the order of the global batch.
    """

    step: int
    samples: Sequence[Sequence[Any]]

    @classmethod
    def from_plan(
        cls,
        *,
        step: int,
        domains: Sequence[str],
        domain: npt.NDArray[np.integer[Any]],
        epoch: npt.NDArray[np.integer[Any]],
        sample: npt.NDArray[np.integer[Any]],
    ) -> AuditRecord:
        """Name the domains of a plan's arrays, each ``[G]``."""
        columns = zip(domain.tolist(), epoch.tolist(), sample.tolist(), strict=True)
        return cls(step=step, samples=[[domains[d], e, s] for d, e, s in columns])
