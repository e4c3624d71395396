"""Observations since the last update, pooled into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from megatron.mixing.observation import BoolArray, FloatArray, Observation, standard_error
from megatron.mixing.simplex import saturate
from megatron.state import check_state

_ADDED: Final = ("loss_sum", "token_count", "loss_square_sum", "sample_count")
_VECTORS: Final = (
    *_ADDED,
    "step_count",
    "sampling_weights",
    "excess_sum",
    "excess_tokens",
    "reference_sum",
    "gradient_alignment",
    "valid_loss",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """What one or several steps observed; a signal that was not given counts as 0 or absent.

    Attributes:
        steps: how many observations it holds.
        step_count: how many of them speak for each domain, [K]: as many, or more where
            evidence was held back from an earlier update.
        loss_sum: added, [K].
        token_count: added, [K].
        sampling_weights: mean over a domain's steps of its probability, [K]: its expected
            share in the window.
        excess_sum: excess loss times the domain's tokens, added over the steps that
            measured it, [K].
        excess_tokens: tokens of those steps, [K].
        reference_sum: reference loss times tokens, added over the same steps, [K].
        gradient_alignment: mean over the steps, [K].
        loss_square_sum: added, [K].
        sample_count: added, [K].
        valid_loss: the latest measurement of each domain, NaN where there is none, [K].
        learning_rate: mean over the steps.
    """

    steps: int
    loss_sum: FloatArray
    token_count: FloatArray
    step_count: FloatArray
    sampling_weights: FloatArray
    excess_sum: FloatArray
    excess_tokens: FloatArray
    reference_sum: FloatArray
    gradient_alignment: FloatArray
    loss_square_sum: FloatArray
    sample_count: FloatArray
    valid_loss: FloatArray
    learning_rate: float

    @classmethod
    def empty(cls, domains: int) -> Window:
        """Return the window of no step."""
        vectors = {name: np.zeros(domains) for name in _VECTORS}
        vectors["valid_loss"] = np.full(domains, np.nan)
        return cls(steps=0, learning_rate=0.0, **vectors)

    def add(self, observation: Observation, sampling_weights: FloatArray) -> Window:
        """Return the window with one more step, which ``sampling_weights`` drew."""
        steps, step_count = self.steps + 1, self.step_count + 1.0

        def mean(old: FloatArray, new: FloatArray) -> FloatArray:
            # This form leaves the mean of equal values equal to them, bit for bit.
            return old + (new / step_count - old / step_count)

        changes: dict[str, Any] = {
            "steps": steps,
            "step_count": step_count,
            "sampling_weights": mean(self.sampling_weights, sampling_weights),
        }
        present = observation.present
        for name in _ADDED:
            vector = observation.vector(name)
            if vector is not None:
                # Without tokens there is no loss, whatever a sum says.
                counted = vector if present is None else np.where(present, vector, 0.0)
                changes[name] = _add(getattr(self, name), counted)
        changes |= self._excess(observation)
        alignment = observation.vector("gradient_alignment")
        if alignment is not None:
            changes["gradient_alignment"] = saturate(mean(self.gradient_alignment, alignment))
        valid = observation.vector("valid_loss")
        if valid is not None:
            changes["valid_loss"] = np.where(np.isnan(valid), self.valid_loss, valid)
        if observation.learning_rate is not None:
            rate = self.learning_rate
            changes["learning_rate"] = rate + (observation.learning_rate - rate) / steps
        return replace(self, **changes)

    def release(self, min_tokens: int) -> tuple[Window | None, Window | None]:
        """Divide into what an update may learn from, and what waits for more evidence.

        Args:
            min_tokens: tokens that a domain must have for its estimate to move.

        Returns:
            The window of the domains with that many tokens (the others absent), None if
            there is no such domain; and the window of the others, None if they have none.
        """
        short = self.present & (self.token_count < min_tokens)
        if not short.any():
            return self, None
        held = self._only(short)
        return (self._only(~short) if (self.present & ~short).any() else None), held

    def _only(self, kept: BoolArray) -> Window:
        """Return the window of the domains in ``kept``; the others start anew."""
        fresh = Window.empty(len(kept))
        vectors = {
            name: np.where(kept, getattr(self, name), getattr(fresh, name)) for name in _VECTORS
        }
        return replace(self, **vectors)

    def _excess(self, observation: Observation) -> dict[str, FloatArray]:
        """Return the excess sums with one more step; a mean counts for its domain's tokens."""
        excess, tokens = observation.vector("excess_loss"), observation.vector("token_count")
        if excess is None or tokens is None:
            return {}
        measured = np.isfinite(excess) & (tokens > 0)
        reference = observation.vector("reference_loss")
        given = np.zeros(len(excess)) if reference is None else reference

        def total(means: FloatArray) -> FloatArray:
            with np.errstate(over="ignore"):
                return saturate(np.where(measured & np.isfinite(means), means, 0.0) * tokens)

        return {
            "excess_sum": _add(self.excess_sum, total(excess)),
            "reference_sum": _add(self.reference_sum, total(given)),
            "excess_tokens": _add(self.excess_tokens, np.where(measured, tokens, 0.0)),
        }

    @property
    def present(self) -> BoolArray:
        """Which domains have tokens in the window, bool [K]."""
        return self.token_count > 0

    @property
    def mean_loss(self) -> FloatArray:
        """Mean loss of each domain in nats per token, [K]; 0 for the absent (see ``present``)."""
        return _ratio(self.loss_sum, self.token_count)

    @property
    def mean_excess(self) -> FloatArray:
        """Mean excess loss in nats per token, [K]; NaN for a domain that never measured it."""
        means = _ratio(self.excess_sum, self.excess_tokens)
        return np.where(self.excess_tokens > 0, means, np.nan)

    @property
    def mean_reference(self) -> FloatArray:
        """Mean reference loss in nats per token, [K]; NaN for a domain that never measured it."""
        means = _ratio(self.reference_sum, self.excess_tokens)
        return np.where(self.excess_tokens > 0, means, np.nan)

    @property
    def standard_error(self) -> FloatArray:
        """Standard error of ``mean_loss``, nats per token, [K]; NaN below two samples."""
        return standard_error(
            self.loss_sum, self.token_count, self.loss_square_sum, self.sample_count
        )

    def state_dict(
        self, by_name: Callable[[FloatArray], dict[str, float | None]]
    ) -> dict[str, Any]:
        """Return the window, JSON-able; ``by_name`` turns a vector into a mapping."""
        state: dict[str, Any] = {name: by_name(getattr(self, name)) for name in _VECTORS}
        return {
            "version": 1,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            **state,
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], vector: Callable[[Any, str], FloatArray]
    ) -> Window:
        """Rebuild a window; ``vector`` turns a mapping by name back into [K]."""
        check_state(
            "the mixing window", state, version=1, keys=("steps", "learning_rate", *_VECTORS)
        )
        vectors = {name: vector(state[name], name) for name in _VECTORS}
        return cls(
            steps=int(state["steps"]), learning_rate=float(state["learning_rate"]), **vectors
        )


def _add(total: FloatArray, values: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return saturate(total + values)


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        quotient = numerator / np.where(denominator > 0, denominator, 1.0)
    return saturate(np.where(denominator > 0, quotient, 0.0))
