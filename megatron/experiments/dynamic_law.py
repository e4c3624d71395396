"""The linear dynamic law: what each domain's data does to each loss, from one point of a run.

    L_i(t+1) = L_i(t) - sum_j A_ij p_j(t)

Aioli (Chen et al., arXiv 2411.05735), equations 1 and 2 and section 4: A is measured by
training briefly on several mixtures from one checkpoint, and compared with the A that a
mixing method acts on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.libraries import load
from megatron.experiments.scores import r_squared, rank_correlation
from megatron.experiments.static_law import check_runs


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicLaw:
    """The measured A* of one point of a run.

    Attributes:
        matrix: A, how far a child run on domain j alone lowers loss i, nats per token, [M, K].
        parent: losses at the parent checkpoint, [M].
        r2: share of the variance between the children that the law explains, [M].
        residual: measured less fitted losses of the children, [R, M].
    """

    matrix: FloatArray
    parent: FloatArray
    r2: FloatArray
    residual: FloatArray

    def predict(self, mixtures: FloatArray) -> FloatArray:
        """Return the losses [..., M] after as many steps as the children had."""
        return np.asarray(self.parent - mixtures @ self.matrix.T)


def fit_dynamic_law(parent: FloatArray, mixtures: FloatArray, losses: FloatArray) -> DynamicLaw:
    """Fit A by least squares to the losses of runs that begin at one checkpoint.

    Args:
        parent: losses at the checkpoint, nats per token, [M].
        mixtures: of the child runs, [R, K]; R >= K, and more tell how good the law is.
        losses: at the ends of the child runs, all of the same length, [R, M].

    Raises:
        ConfigError: the mixtures do not span the simplex, or losses are missing.
        MissingExtraError: scipy is not installed.
    """
    mixtures, losses = check_runs(mixtures, losses)
    parent = np.asarray(parent, dtype=np.float64)
    if parent.shape != losses.shape[1:] or not np.isfinite(parent).all():
        raise ConfigError(f"the parent's losses are {parent}; {losses.shape[1]} are needed")
    linalg = load("scipy.linalg", "fitting a law")
    solution, _, rank, _ = linalg.lstsq(mixtures, parent - losses, cond=1e-9)
    if rank < mixtures.shape[1]:
        raise ConfigError(
            f"the {len(mixtures)} child runs have only {rank} independent mixtures of "
            f"{mixtures.shape[1]} domains; add children (one per domain, mostly on it, will do)"
        )
    matrix = np.asarray(solution).T
    fitted = parent - mixtures @ matrix.T
    return DynamicLaw(
        matrix=matrix, parent=parent, r2=r_squared(losses, fitted), residual=losses - fitted
    )


def fidelity(acted_on: FloatArray, measured: FloatArray) -> float:
    """Return how near a method's A is to the measured one, from -1 to 1.

    Half the cosine and half Spearman's rank correlation of the column sums (what each
    domain's data does for all losses together), scaled to unit length (Aioli, section 4.2).
    Where either has no order, or no length, its part is 0: such an A knows nothing of
    that kind.

    Args:
        acted_on: the method's Ã [M, K], or its column sums [K].
        measured: A* [M, K], or its column sums [K].

    Raises:
        ConfigError: different numbers of domains, or numbers that are not finite.
    """
    ours, theirs = _unit(acted_on), _unit(measured)
    if ours.shape != theirs.shape:
        raise ConfigError(f"fidelity compares {len(ours)} domains with {len(theirs)}")
    return 0.5 * float(ours @ theirs) + 0.5 * rank_correlation(ours, theirs)


def mean_fidelity(acted_on: Sequence[FloatArray], measured: Sequence[FloatArray]) -> float:
    """Return the mean of :func:`fidelity` over the points of a run's trajectory.

    Raises:
        ConfigError: no point, or not as many on both sides.
    """
    if not acted_on or len(acted_on) != len(measured):
        raise ConfigError(f"{len(acted_on)} matrices are compared with {len(measured)}")
    return float(np.mean([fidelity(*pair) for pair in zip(acted_on, measured, strict=True)]))


def _unit(matrix: FloatArray) -> FloatArray:
    given = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(given).all() or given.ndim not in (1, 2):
        raise ConfigError(f"the matrix is {given}; it must be finite, [M, K] or [K]")
    sums = given.sum(axis=0) if given.ndim == 2 else given
    length = float(np.linalg.norm(sums))
    return np.asarray(sums / length if length > 0 else sums)
