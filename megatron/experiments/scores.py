"""How good predictions are: the share of variance explained, and agreement of ranks."""

from __future__ import annotations

import numpy as np

from megatron.experiments.bounds import FloatArray
from megatron.experiments.libraries import load


def r_squared(actual: FloatArray, predicted: FloatArray) -> FloatArray:
    """Return 1 - squared errors / squared deviations from the mean, by column, [M].

    A column that does not vary scores 1 where it is predicted exactly, else -inf.

    Args:
        actual: what was measured, [N, M].
        predicted: [N, M].
    """
    errors = ((actual - predicted) ** 2).sum(axis=0)
    total = ((actual - actual.mean(axis=0)) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        score = 1.0 - errors / total
    return np.asarray(np.where(total > 0, score, np.where(errors > 0, -np.inf, 1.0)))


def rank_correlation(actual: FloatArray, predicted: FloatArray) -> float:
    """Return Spearman's rank correlation of two vectors; 0 where one does not vary.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if np.ptp(actual) == 0 or np.ptp(predicted) == 0:
        return 0.0
    stats = load("scipy.stats", "a rank correlation")
    return float(stats.spearmanr(actual, predicted).statistic)
