"""Power laws in steps and in model size, nested under a mixing law.

    L(x) = E + B x^-beta        E, B >= 0

Data Mixing Laws (arXiv 2403.16952), section 4 and algorithm 1: for every mixture, a law
over steps carries small runs to the target's steps, a law over sizes to its size; the static
law is then fitted to what they predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.libraries import load
from megatron.experiments.scores import r_squared

LEAST_EXPONENT: Final = 0.01
MOST_EXPONENT: Final = 3.0

_START_EXPONENTS: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.5)
_BEST_STARTS: Final = 3
_HUBER: Final = 1e-3
"""Of logarithms, as Hoffmann et al. 2022: beyond a thousandth, deviations count linearly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerCurves:
    """R losses as functions of one positive quantity.

    Attributes:
        constant: E, [R].
        coefficient: B in units of ``unit``, [R].
        exponent: beta, [R].
        unit: the quantity that counts as 1.
        r2: share of the variance explained, [R].
    """

    constant: FloatArray
    coefficient: FloatArray
    exponent: FloatArray
    unit: float
    r2: FloatArray

    def predict(self, at: float) -> FloatArray:
        """Return the losses at a quantity, [R]."""
        return np.asarray(self.constant + self.coefficient * (at / self.unit) ** -self.exponent)


def fit_power_curves(
    x: FloatArray, losses: FloatArray, *, shared_exponent: bool = False
) -> PowerCurves:
    """Fit power laws with scipy's ``least_squares`` on logarithms, robustly, from many starts.

    Args:
        x: the quantity (steps, tokens, parameters), above 0, [P].
        losses: nats per token, [R, P].
        shared_exponent: one beta for all R curves: steadier where there are few points.

    Raises:
        ConfigError: too few different points (four; with a shared exponent of several
            curves three), or numbers that are not finite and above 0.
        MissingExtraError: scipy is not installed.
    """
    x, losses = np.asarray(x, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    _check(x, losses, need=3 if shared_exponent and len(losses) > 1 else 4)
    unit = float(np.exp(np.log(x).mean()))
    groups = [losses] if shared_exponent else [row[None] for row in losses]
    found = [_fit_group(x / unit, group) for group in groups]
    curves = PowerCurves(
        constant=np.concatenate([one[0] for one in found]),
        coefficient=np.concatenate([one[1] for one in found]),
        exponent=np.concatenate([one[2] for one in found]),
        unit=unit,
        r2=np.empty(0),
    )
    fitted = np.stack([curves.predict(float(point)) for point in x])
    return PowerCurves(**{**vars(curves), "r2": r_squared(losses.T, fitted)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Held-out losses along one run.

    Every point is to be a loss that a run of so many steps would end with: of a constant
    learning rate, or of runs of their own.  Points on the way down a cosine, and points
    before a plateau is broken, lead the law astray.

    Attributes:
        mixture: the run's sampling weights, [K].
        size: the model's parameters.
        steps: where it was measured, [P].
        losses: nats per token, [P, M].
    """

    mixture: FloatArray
    size: float
    steps: FloatArray
    losses: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class NestedLosses:
    """What the nested laws predict for the target, one row per mixture.

    Attributes:
        mixtures: [R, K].
        losses: at the target's steps and size, [R, M].
        step_r2: least R² of a law over steps; None where no such law was needed.
        size_r2: least R² of a law over sizes; None where no such law was needed.
    """

    mixtures: FloatArray
    losses: FloatArray
    step_r2: float | None
    size_r2: float | None


def nested_losses(
    curves: Sequence[Curve], *, steps: float, size: float, shared_exponent: bool = True
) -> NestedLosses:
    """Carry every mixture's losses to the target's steps and size.

    What was measured at the target is taken as it is; a law is fitted only where the runs end
    before it.

    Args:
        curves: of all runs; each mixture at the same sizes, one run each.
        steps: of the target.
        size: of the target, parameters.
        shared_exponent: one exponent for all mixtures (per size and measured domain).

    Raises:
        ConfigError: sizes differ between mixtures, or too few points for a law.
        MissingExtraError: scipy is not installed.
    """
    mixtures, sizes, by_size = _arrange(curves)
    reached, step_r2 = [], []
    for group in by_size:
        losses, r2 = _at_steps(group, steps, shared_exponent)
        reached.append(losses)
        step_r2.extend(r2)
    losses, size_r2 = _carry(np.array(sizes), np.stack(reached), size, shared_exponent)
    return NestedLosses(
        mixtures=mixtures,
        losses=losses,
        step_r2=min(step_r2, default=None),
        size_r2=min(size_r2, default=None),
    )


def _arrange(curves: Sequence[Curve]) -> tuple[FloatArray, list[float], list[list[Curve]]]:
    """Return mixtures [R, K], sizes in order, and for each size the curves by mixture."""
    known: dict[tuple[float, ...], dict[float, Curve]] = {}
    for curve in curves:
        runs = known.setdefault(tuple(np.asarray(curve.mixture).round(9).tolist()), {})
        if curve.size in runs:
            raise ConfigError(
                f"mixture {curve.mixture} has two runs of {curve.size:,} parameters; average seeds"
            )
        runs[curve.size] = curve
    if not known:
        raise ConfigError("no curves are given; a law needs runs")
    sizes = sorted({curve.size for curve in curves})
    for mixture, runs in known.items():
        if missing := [size for size in sizes if size not in runs]:
            raise ConfigError(f"mixture {mixture} has no run of {missing[0]:,} parameters")
    first = [np.asarray(runs[sizes[0]].mixture, dtype=np.float64) for runs in known.values()]
    return np.stack(first), sizes, [[runs[size] for runs in known.values()] for size in sizes]


def _at_steps(group: Sequence[Curve], steps: float, shared: bool) -> tuple[FloatArray, list[float]]:
    """Return the losses [R, M] of one size's runs at ``steps``, and the R² of the laws used."""
    x = np.asarray(group[0].steps, dtype=np.float64)
    if any(not np.array_equal(curve.steps, x) for curve in group):
        raise ConfigError("runs of one size are measured at different steps; take those in common")
    return _carry(x, np.stack([curve.losses for curve in group], axis=1), steps, shared)


def _carry(
    x: FloatArray, losses: FloatArray, target: float, shared: bool
) -> tuple[FloatArray, list[float]]:
    """Return losses [P, R, M] measured at x [P] as [R, M] at ``target``, and the laws' R²."""
    there = np.flatnonzero(x == target)
    if len(there):
        return losses[there[0]], []
    columns, r2 = [], []
    for measured in range(losses.shape[2]):
        law = fit_power_curves(x, losses[:, :, measured].T, shared_exponent=shared)
        columns.append(law.predict(target))
        r2.append(float(law.r2.min()))
    return np.stack(columns, axis=1), r2


def _check(x: FloatArray, losses: FloatArray, *, need: int) -> None:
    if losses.ndim != 2 or losses.shape[1:] != x.shape:
        raise ConfigError(f"quantities {x.shape} and losses {losses.shape} do not fit")
    if not (np.isfinite(x) & (x > 0)).all() or not (np.isfinite(losses) & (losses > 0)).all():
        raise ConfigError("steps, sizes and losses must be finite and above 0")
    if len(np.unique(x)) < need:
        raise ConfigError(
            f"a power law needs {need} different steps or sizes, {len(np.unique(x))} are there; "
            f"measure more often, train more sizes, or ask for the largest that was run"
        )


def _fit_group(x: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return E [R], B [R] and the one beta of the group, [R]."""
    optimize = load("scipy.optimize", "fitting a law")
    rows, logs = len(losses), np.log(losses)

    def split(theta: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        power = x ** -theta[-1]  # [P]
        falling = theta[rows : 2 * rows, None] * power
        return power, falling, theta[:rows, None] + falling

    def residual(theta: FloatArray) -> FloatArray:
        return np.asarray((np.log(np.maximum(split(theta)[2], 1e-9)) - logs).ravel())

    def jacobian(theta: FloatArray) -> FloatArray:
        power, falling, fitted = split(theta)
        slope = np.zeros((rows, len(x), len(theta)))
        own = np.arange(rows)
        slope[own, :, own] = 1.0
        slope[own, :, rows + own] = power
        slope[:, :, -1] = -falling * np.log(x)
        slope /= np.maximum(fitted, 1e-9)[:, :, None]
        return slope.reshape(-1, len(theta))

    starts = [_start(x, losses, exponent) for exponent in _START_EXPONENTS]
    starts.sort(key=lambda start: float((residual(start) ** 2).sum()))
    low = np.append(np.zeros(2 * rows), LEAST_EXPONENT)
    high = np.append(np.full(2 * rows, np.inf), MOST_EXPONENT)
    best: Any = None
    for start in starts[:_BEST_STARTS]:
        found = optimize.least_squares(
            residual,
            start,
            jac=jacobian,
            bounds=(low, high),
            loss="huber",
            f_scale=_HUBER,
            x_scale="jac",
            max_nfev=1000,
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-12),
        )
        best = found if best is None or found.cost < best.cost else best
    theta = np.asarray(best.x)
    return theta[:rows], theta[rows : 2 * rows], np.full(rows, theta[-1])


def _start(x: FloatArray, losses: FloatArray, exponent: float) -> FloatArray:
    """Return (E, B, beta) with the E and B that are best for a beta, [2R + 1]."""
    optimize = load("scipy.optimize", "fitting a law")
    basis = np.stack((np.ones_like(x), x**-exponent), axis=1)
    both = np.stack([optimize.nnls(basis, row)[0] for row in losses])
    return np.concatenate((both[:, 0], both[:, 1], [exponent]))
