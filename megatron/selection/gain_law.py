"""How performance grows with compute (arXiv 2410.16208, section 3).

    gain(C) = P0 + (P̄ - P0) (1 - exp(-λ C / C_total))

P0 is the performance of the untrained (or not yet tuned) model, P̄ what no compute exceeds, C_total
the compute of training on everything there is, and λ how fast a selector's choice pays.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from megatron.selection.base import FloatArray

PARAMETERS: Final = ("P0", "lambda", "P_bar")
"""Order of a law's numbers, [..., 3]."""


def gain(flops: ArrayLike, law: ArrayLike, total: ArrayLike) -> FloatArray:
    """Return the performance after so much compute.

    Args:
        flops: C, of any shape; below 0 is as 0.
        law: (P0, λ, P̄), [..., 3]; all but the last axis go with ``flops`` by NumPy's rules.
        total: C_total, above 0.
    """
    numbers = np.asarray(law, dtype=np.float64)
    start, rate, most = numbers[..., 0], numbers[..., 1], numbers[..., 2]
    spent = np.maximum(np.asarray(flops, dtype=np.float64), 0.0)
    share = spent / np.asarray(total, dtype=np.float64)
    return np.asarray(start - (most - start) * np.expm1(-rate * share))


def flops_for(performance: float, law: ArrayLike, total: float) -> float:
    """Return the compute that a performance takes; inf if the law never reaches it."""
    start, rate, most = (float(value) for value in np.asarray(law, dtype=np.float64))
    way = (performance - start) / (most - start) if most != start else float("nan")
    if np.isnan(way):
        return 0.0 if performance == start else float("inf")
    if way <= 0:
        return 0.0
    if way >= 1 or rate <= 0:
        return float("inf")
    return float(-np.log1p(-way) / rate * total)
