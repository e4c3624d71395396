"""Mixtures to try: grids, random and well-spread points of the simplex, one-hot.

Every design returns float64 [N, K], rows that sum to 1 and respect the bounds, in an order
that is the same every time.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, FloatArray
from megatron.mixing.reading import require

MOST_POINTS: Final = 1_000_000
_REDRAWS: Final = 200


def one_hot(bounds: Bounds) -> FloatArray:
    """Return one mixture per domain with as much of it as the bounds allow, [K, K].

    Row i is the allowed mixture nearest to domain i alone; without bounds, domain i alone.
    """
    return np.stack([bounds.nearest(vertex) for vertex in np.eye(bounds.count)])


def grid(bounds: Bounds, *, parts: int) -> FloatArray:
    """Return all mixtures whose weights are multiples of 1/parts, C(parts+K-1, K-1) of them.

    With floors, the multiples divide what the floors leave, so that the corners of the
    allowed region are among them; points above a ceiling are left out.

    Args:
        bounds: the allowed mixtures.
        parts: steps along an edge.

    Raises:
        ConfigError: ``parts`` below 1, too many points, or none under the ceilings.
    """
    require("parts", parts, parts >= 1, "at least 1")
    count = math.comb(parts + bounds.count - 1, bounds.count - 1)
    if count > MOST_POINTS:
        raise ConfigError(
            f"a grid of {bounds.count} domains in {parts} parts has {count:,} points; "
            f"lower parts, or use a Dirichlet or well-spread design"
        )
    points = bounds.above_floor(_compositions(parts, bounds.count) / parts)
    points = points[bounds.contains(points)]
    if not len(points):
        raise ConfigError(
            f"no point of a grid in {parts} parts is under the ceilings {bounds.ceiling}; "
            f"raise parts"
        )
    return points


def dirichlet(
    bounds: Bounds,
    *,
    count: int,
    seed: int,
    concentration: float = 1.0,
    prior: FloatArray | None = None,
) -> FloatArray:
    """Draw mixtures from a Dirichlet distribution, [count, K].

    With floors, the draws divide what the floors leave.  Draws above a ceiling are drawn
    again; where the ceilings leave so little room that this would not end, the nearest
    allowed mixture takes their place.

    Args:
        bounds: the allowed mixtures.
        count: how many.
        seed: of the draws.
        concentration: the mean parameter of the distribution: 1 and no prior is uniform on
            the simplex, less favours its edges, more its centre.
        prior: expected mixture, all above 0; uniform if None.

    Raises:
        ConfigError: ``count`` below 1, ``concentration`` or a prior weight not above 0.
    """
    require("count", count, count >= 1, "at least 1")
    require("concentration", concentration, 0 < concentration < math.inf, "above 0")
    centre = np.ones(bounds.count) if prior is None else np.asarray(prior, dtype=np.float64)
    if len(centre) != bounds.count or not ((centre > 0) & np.isfinite(centre)).all():
        raise ConfigError(f"prior is {centre}; it must be above 0 for {bounds.count} domains")
    alpha = concentration * bounds.count * centre / centre.sum()
    generator = np.random.default_rng(seed)
    points = bounds.above_floor(generator.dirichlet(alpha, size=count))
    for _ in range(_REDRAWS):
        outside = ~bounds.contains(points)
        if not outside.any():
            return points
        points[outside] = bounds.above_floor(generator.dirichlet(alpha, size=int(outside.sum())))
    for row in np.flatnonzero(~bounds.contains(points)):
        points[row] = bounds.nearest(points[row])
    return points


def well_spread(
    bounds: Bounds,
    *,
    count: int,
    seed: int,
    oversample: int = 20,
    concentration: float = 1.0,
    prior: FloatArray | None = None,
) -> FloatArray:
    """Return mixtures that keep apart: many Dirichlet draws, merged down to ``count``.

    The two nearest points are replaced by their mean, weighted by how many draws each
    stands for, until ``count`` are left; means of allowed mixtures are allowed.

    Args:
        bounds: the allowed mixtures.
        count: how many are left, N.
        seed: of the draws.
        oversample: draws per point that is left.
        concentration: see :func:`dirichlet`.
        prior: see :func:`dirichlet`.

    Raises:
        ConfigError: see :func:`dirichlet`; or ``oversample`` below 1.
    """
    require("oversample", oversample, oversample >= 1, "at least 1")
    require("count", count, 1 <= count * oversample <= 20_000, "few enough to merge")
    points = dirichlet(
        bounds, count=count * oversample, seed=seed, concentration=concentration, prior=prior
    )
    return _merge(points, count)


def _merge(points: FloatArray, count: int) -> FloatArray:
    """Merge the nearest pair until ``count`` points are left."""
    points, mass = points.copy(), np.ones(len(points))
    square = (points**2).sum(axis=1)
    apart = square[:, None] + square[None, :] - 2 * points @ points.T
    np.fill_diagonal(apart, np.inf)
    alive = np.ones(len(points), dtype=bool)
    nearest = apart.argmin(axis=1)
    distance = apart[np.arange(len(points)), nearest]
    for _ in range(len(points) - count):
        first = int(np.where(alive, distance, np.inf).argmin())
        second = int(nearest[first])
        total = mass[first] + mass[second]
        points[first] = (mass[first] * points[first] + mass[second] * points[second]) / total
        mass[first], alive[second] = total, False
        fresh = np.where(alive, ((points - points[first]) ** 2).sum(axis=1), np.inf)
        fresh[first] = np.inf
        apart[first], apart[:, first] = fresh, fresh
        apart[second], apart[:, second] = np.inf, np.inf
        moved = alive & ((nearest == first) | (nearest == second))
        moved[first] = True
        nearest[moved] = apart[moved].argmin(axis=1)
        closer = alive & (fresh < distance) & ~moved
        nearest[closer] = first
        changed = moved | closer
        distance[changed] = apart[changed, nearest[changed]]
    return points[alive]


def _compositions(total: int, parts: int) -> FloatArray:
    """Return all ways to write ``total`` as an ordered sum of ``parts`` counts, [N, parts]."""
    rows = np.zeros((1, 0), dtype=np.int64)
    for _ in range(parts - 1):
        left = total - rows.sum(axis=1)
        repeats = left + 1
        start = np.repeat(np.cumsum(repeats) - repeats, repeats)
        column = np.arange(int(repeats.sum())) - start
        rows = np.concatenate((np.repeat(rows, repeats, axis=0), column[:, None]), axis=1)
    return np.concatenate((rows, (total - rows.sum(axis=1))[:, None]), axis=1).astype(np.float64)
