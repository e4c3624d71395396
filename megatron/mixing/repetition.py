"""What repeated data is worth."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from megatron.mixing.observation import FloatArray

R_STAR: Final = 15.4
"""Repetitions over which a repeated token loses 1 - 1/e of its value (the paper's fit)."""


def effective_data(
    drawn: npt.ArrayLike, unique: npt.ArrayLike, r_star: float = R_STAR
) -> FloatArray:
    """Return how much unique data the drawn data is worth.

    D' = U + U R* (1 - e^(-R / R*)), with R = D / U - 1 repetitions beyond the first pass;
    D' = D within the first pass.  However often data is read, it is worth less than
    (1 + R*) times itself.

    Args:
        drawn: data drawn D, in any unit, at least 0.
        unique: unique data U, in the same unit, above 0 (infinite: nothing repeats).
        r_star: R*, above 0.

    Source: Muennighoff et al., "Scaling Data-Constrained Language Models"
    (arXiv 2305.16264), equation 5 and its fit R* = 15.39.
    """
    drawn, unique, repeated = _repetitions(drawn, unique)
    with np.errstate(invalid="ignore"):
        extra = unique * (-np.expm1(-repeated / r_star)) * r_star
    return np.minimum(drawn, unique) + np.where(repeated > 0, extra, 0.0)


def marginal_value(
    drawn: npt.ArrayLike, unique: npt.ArrayLike, r_star: float = R_STAR
) -> FloatArray:
    """Return dD'/dD: what the next sample is worth, from 1 (fresh) towards 0.

    e^(-R / R*) beyond the first pass, 1 within it; arguments as :func:`effective_data`.
    """
    _, _, repeated = _repetitions(drawn, unique)
    return np.asarray(np.exp(-repeated / r_star), dtype=np.float64)


def _repetitions(
    drawn: npt.ArrayLike, unique: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    drawn = np.asarray(drawn, dtype=np.float64)
    unique = np.asarray(unique, dtype=np.float64)
    return drawn, unique, np.maximum(drawn / unique - 1.0, 0.0)
