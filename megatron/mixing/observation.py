"""What one training step tells a mixing method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from enum import StrEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from megatron.errors import NeomixError

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

SUM_TOLERANCE: Final = 1e-6
"""How far given sampling weights may sum from 1 (float32 rounding of many domains)."""


class ObservationError(NeomixError, ValueError):
    """An observation or a step number that no training step can have produced."""


class Signal(StrEnum):
    """What a method reads, so that the loop measures nothing that nobody wants."""

    LOSS = "loss"
    """``loss_sum`` and ``token_count`` of the training batch."""
    VALID_LOSS = "valid_loss"
    """``valid_loss``, measured when a decision asks for it."""
    BATCH_VALID_LOSS = "batch_valid_loss"
    """``batch_valid_loss``: held-out loss on a batch mixed like the step's own."""
    EXCESS_LOSS = "excess_loss"
    """``excess_loss`` over a reference model, and the ``reference_loss``."""
    GRADIENT_ALIGNMENT = "gradient_alignment"
    """``gradient_alignment``, which needs one backward pass per domain."""
    LOSS_VARIANCE = "loss_variance"
    """``loss_square_sum`` and ``sample_count``, for standard errors."""
    LEARNING_RATE = "learning_rate"
    """``learning_rate`` of the step."""


SIGNAL_FIELDS: Final[dict[Signal, tuple[str, ...]]] = {
    Signal.LOSS: ("loss_sum", "token_count"),
    Signal.VALID_LOSS: ("valid_loss", "target_loss"),
    Signal.BATCH_VALID_LOSS: ("batch_valid_loss",),
    Signal.EXCESS_LOSS: ("excess_loss", "reference_loss"),
    Signal.GRADIENT_ALIGNMENT: ("gradient_alignment",),
    Signal.LOSS_VARIANCE: ("loss_square_sum", "sample_count"),
    Signal.LEARNING_RATE: ("learning_rate",),
}
NAN_MEANS_ABSENT: Final = frozenset(
    {"valid_loss", "target_loss", "batch_valid_loss", "excess_loss", "reference_loss"}
)
_COUNTS: Final = frozenset({"token_count", "sample_count", "samples_seen"})
_OWN_LENGTH: Final = frozenset({"target_loss"})


@dataclass(frozen=True, eq=False)
class Observation:
    """Per-domain sums of one step over the whole global batch (all ranks, all micro-batches).

    Every field after ``step`` is keyword-only; the vectors are float64 [K] in the
    order of the mixer's ``domains`` (lists and arrays are taken and copied).

    Attributes:
        step: the optimizer step this follows, from 1.  0 is for a validation
            measured before the first step.
        loss_sum: sum of the token losses (nats); NaN or infinite in a domain makes
            the whole observation void.
        token_count: unmasked tokens; 0 means that the domain is absent.
        sampling_weights: the distribution that drew this step; the mixer's own
            decision for the step if not given (they differ under lag or in a
            shadow run).  Importance-weighted rules divide by it.
        valid_loss: mean validation loss (nats per token); NaN where not measured.
        target_loss: mean validation loss of the domains that are never trained on, [M]
            in their order (nats per token); NaN where not measured.
        batch_valid_loss: mean held-out loss over as many samples of each domain as it has
            in the step (nats per token); NaN where absent.
        excess_loss: mean over the domain's tokens of max(loss - reference loss, 0)
            (nats per token); NaN where absent.
        reference_loss: mean loss of the reference model on the same tokens (nats per
            token); NaN where absent.
        gradient_alignment: <g_i, g_v> / mean norm of the g_i, before the learning rate.
        loss_square_sum: sum over samples of the squared per-sample mean loss.
        sample_count: samples per domain.
        samples_seen: samples drawn from each domain since the run began, this step's
            included.
        learning_rate: the step's learning rate.

    Raises:
        ObservationError: a vector is not one-dimensional or of another length than
            its fellows, a count is negative or not finite, the sampling weights are
            no distribution, or only one of ``loss_sum`` and ``token_count`` is given.
    """

    step: int
    _: KW_ONLY
    loss_sum: npt.ArrayLike | None = None
    token_count: npt.ArrayLike | None = None
    sampling_weights: npt.ArrayLike | None = None
    valid_loss: npt.ArrayLike | None = None
    target_loss: npt.ArrayLike | None = None
    batch_valid_loss: npt.ArrayLike | None = None
    excess_loss: npt.ArrayLike | None = None
    reference_loss: npt.ArrayLike | None = None
    gradient_alignment: npt.ArrayLike | None = None
    loss_square_sum: npt.ArrayLike | None = None
    sample_count: npt.ArrayLike | None = None
    samples_seen: npt.ArrayLike | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Copy the vectors to read-only float64 and check what can be checked without K."""
        object.__setattr__(self, "step", check_step(self.step, least=0))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("step", "learning_rate") and value is not None:
                object.__setattr__(self, field.name, _vector(self.step, field.name, value))
        lengths = {name: len(vector) for name, vector in self._vectors()}
        if len(set(lengths.values())) > 1:
            raise ObservationError(
                f"observation of step {self.step}: the vectors differ in length ({lengths}); "
                f"each holds one value per domain"
            )
        if (self.loss_sum is None) != (self.token_count is None):
            given, missing = (
                ("token_count", "loss_sum")
                if self.loss_sum is None
                else ("loss_sum", "token_count")
            )
            raise ObservationError(
                f"observation of step {self.step} has {given} and no {missing}; give both"
            )
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", _rate(self.step, self.learning_rate))

    def vector(self, name: str) -> FloatArray | None:
        """Return the vector field ``name`` as the float64 [K] it is, or None if not given."""
        value = getattr(self, name)
        return value if isinstance(value, np.ndarray) else None

    @property
    def length(self) -> int | None:
        """Number of domains its vectors speak of; None if it has no vector."""
        return next((len(vector) for _, vector in self._vectors()), None)

    def _vectors(self) -> Iterator[tuple[str, FloatArray]]:
        """Yield the vectors [K] that are given."""
        for field in fields(self):
            vector = self.vector(field.name)
            if vector is not None and field.name not in _OWN_LENGTH:
                yield field.name, vector

    @property
    def standard_error(self) -> FloatArray | None:
        """Standard error of each domain's mean loss over its samples, [K]; see the function."""
        given = [self.vector(name) for name in SIGNAL_FIELDS[Signal.LOSS_VARIANCE]]
        losses, tokens = self.vector("loss_sum"), self.vector("token_count")
        squares, samples = given
        if losses is None or tokens is None or squares is None or samples is None:
            return None
        return standard_error(losses, tokens, squares, samples)

    @property
    def present(self) -> BoolArray | None:
        """Which domains have tokens in the step, [K]; None without counts."""
        counts = self.vector("token_count")
        return None if counts is None else counts > 0

    @property
    def only_validation(self) -> bool:
        """Whether it reports a validation and no training tokens."""
        present = self.present
        return self.valid_loss is not None and (present is None or not present.any())

    def finite(self, needs: frozenset[Signal]) -> bool:
        """Whether the loss, and every signal in ``needs``, is free of NaN and infinity.

        NaN stands for "absent" in ``valid_loss`` and ``excess_loss`` and is allowed there.
        """
        names = {name for signal in needs | {Signal.LOSS} for name in SIGNAL_FIELDS[signal]}
        for name in names:
            values = self.vector(name)
            test: Callable[[FloatArray], BoolArray] = np.isfinite
            if name in NAN_MEANS_ABSENT:
                test = _not_infinite
            if values is not None and not test(values).all():
                return False
        return True


def standard_error(
    loss_sum: FloatArray, token_count: FloatArray, square_sum: FloatArray, sample_count: FloatArray
) -> FloatArray:
    """Return the standard error of each domain's mean loss, nats per token, [K].

    The samples of a domain are taken as independent draws of equal length:
    sqrt((mean of squares - square of the mean) / (n - 1)).

    Args:
        loss_sum: sum of token losses, [K].
        token_count: tokens, [K].
        square_sum: sum over samples of their squared mean losses, [K].
        sample_count: samples n, [K].

    Returns:
        [K]; NaN for a domain with fewer than two samples.
    """
    known = (sample_count >= 2) & (token_count > 0)
    count = np.where(known, sample_count, 2.0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = loss_sum / np.where(known, token_count, 1.0)
        variance = np.maximum(square_sum / count - mean * mean, 0.0) / (count - 1.0)
    return np.where(known, np.sqrt(variance), np.nan)


def check_fit(observation: object, domains: Sequence[str], targets: Sequence[str]) -> None:
    """Check that an observation is one, of these domains and of those that are measured only.

    Raises:
        ObservationError: it is something else, or of another number of domains.
    """
    if not isinstance(observation, Observation):
        raise ObservationError(f"observe takes an Observation, not {observation!r}")
    length = observation.length
    if length is not None and length != len(domains):
        raise ObservationError(
            f"observation of step {observation.step} has {length} values per vector and the "
            f"mixer {len(domains)} domains ({', '.join(domains)})"
        )
    measured = observation.vector("target_loss")
    if measured is not None and len(measured) != len(targets):
        raise ObservationError(
            f"observation of step {observation.step} has {len(measured)} values in target_loss "
            f"and the run {len(targets)} domains that are measured only"
        )


def check_step(step: object, *, least: int) -> int:
    """Return ``step`` as an int.

    Raises:
        ObservationError: it is not a whole number of at least ``least``.
    """
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < least:
        raise ObservationError(
            f"step is {step!r}; steps are whole numbers from {least} on (the first is step 1)"
        )
    return int(step)


def _not_infinite(values: FloatArray) -> BoolArray:
    return ~np.isinf(values)


def _vector(step: int, name: str, value: object) -> FloatArray:
    where = f"observation of step {step}: {name}"
    try:
        given = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"{where} is {value!r}, not one number per domain") from error
    if given.dtype.kind not in "fiu":  # texts, None and truth values are no measurements
        raise ObservationError(f"{where} is {value!r}, not one number per domain")
    array = np.array(given, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ObservationError(
            f"{where} has shape {array.shape}; it must be [K], one value per domain"
        )
    if name in _COUNTS and not (np.isfinite(array).all() and (array >= 0).all()):
        raise ObservationError(f"{where} is {array.tolist()}; counts are finite and at least 0")
    if name == "sampling_weights":
        total = float(array.sum())
        if not ((array >= 0).all() and abs(total - 1) <= SUM_TOLERANCE):
            raise ObservationError(
                f"{where} is {array.tolist()} (sum {total!r}); it must be the distribution that "
                f"drew the step: at least 0 each, sum 1"
            )
    array.flags.writeable = False
    return array


def _rate(step: int, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ObservationError(
            f"observation of step {step}: learning_rate is {value!r}, not a number"
        )
    rate = float(value)
    if not (np.isfinite(rate) and rate >= 0):
        raise ObservationError(
            f"observation of step {step}: learning_rate is {rate!r}; it must be at least 0"
        )
    return rate
