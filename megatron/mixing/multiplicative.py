"""Multiplicative weights: a distribution whose logarithms grow by gains, mixed with uniform."""

from __future__ import annotations

import numpy as np

from megatron.mixing.observation import BoolArray, FloatArray
from megatron.mixing.simplex import saturate, softmax


def multiply(
    log_weights: FloatArray, gain: FloatArray, *, smoothing: float, support: BoolArray
) -> FloatArray:
    """Return the logarithms of (1 - c) softmax(log w + gain) + c / K.

    They, and not the weights, are what a rule remembers: a weight too small for a float
    keeps its place, and can come back.

    Args:
        log_weights: log w, [K]; any number outside the support.
        gain: what is added, [K].
        smoothing: c, the share of the uniform distribution over the support.
        support: which domains there are; the others have weight 0, [K].

    Returns:
        [K]; 0 outside the support.
    """
    with np.errstate(over="ignore"):
        raised = saturate(log_weights + saturate(gain))
        shifted = saturate(raised - raised[support].max())
    with np.errstate(under="ignore"):
        normalised = shifted - np.log(np.exp(shifted[support]).sum())
        if smoothing > 0:
            floor = np.log(smoothing / support.sum())
            share = np.log1p(-smoothing) if smoothing < 1 else -np.inf
            normalised = np.logaddexp(share + normalised, floor)
    return np.where(support, normalised, 0.0)


def distribution(log_weights: FloatArray, support: BoolArray) -> FloatArray:
    """Return the weights of their logarithms, [K]; 0 outside the support."""
    weights = np.zeros(len(log_weights))
    weights[support] = softmax(log_weights[support])
    return weights


def logarithms(weights: FloatArray) -> FloatArray:
    """Return log w, [K]; 0 where w = 0, which is outside the support."""
    return np.log(np.where(weights > 0, weights, 1.0))


class RunningMean:
    """The mean of the distributions that it was given.

    Args:
        first: counts as the first of them, [K]; None = it starts with nothing.
        domains: K.
    """

    def __init__(self, domains: int, first: FloatArray | None = None) -> None:
        self.total: FloatArray = np.zeros(domains) if first is None else first.copy()
        self.count = 0 if first is None else 1

    def add(self, weights: FloatArray) -> None:
        """Take one more."""
        self.total = self.total + weights
        self.count += 1

    @property
    def value(self) -> FloatArray | None:
        """The mean, [K], of sum 1; None before the first."""
        return self.total / self.total.sum() if self.count else None
