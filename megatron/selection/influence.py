"""From gradient features to influence: how much a document's step lowers a target's loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.selection.base import FloatArray


def normalised(rows: NDArray[np.floating]) -> FloatArray:
    """Return rows of length 1, float64; a row of zeros becomes NaN."""
    rows = np.asarray(rows, dtype=np.float64)
    lengths = np.sqrt((rows**2).sum(axis=-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: FloatArray = np.where(lengths > 0, rows / lengths, np.nan)
    return found


def target_mean(rows: NDArray[np.floating]) -> FloatArray:
    """Return the mean of a subtask's normalised features, [d].

    A document's cosine with it is the mean of its cosines with every example, since both are
    normalised before.  An example whose gradient is 0 has no direction and does not count.
    """
    unit = normalised(rows)
    found: FloatArray = unit[~np.isnan(unit).any(axis=1)].mean(axis=0)
    return found


def checkpoint_weights(rates: Sequence[float]) -> FloatArray:
    """Return the checkpoints' weights: their mean learning rates, made to sum to 1."""
    found = np.asarray(rates, dtype=np.float64)
    return np.asarray(found / found.sum())


def influence(features: NDArray[np.floating], means: NDArray[np.floating]) -> FloatArray:
    """Return cosine influence at one checkpoint, [n, subtasks].

    Args:
        features: [n, d] of documents.
        means: [subtasks, d], see :func:`target_mean`.
    """
    found: FloatArray = normalised(features) @ np.asarray(means, dtype=np.float64).T
    return found
