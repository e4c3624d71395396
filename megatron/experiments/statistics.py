"""Honest comparisons: paired differences over seeds, corrected for how many were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.libraries import load
from megatron.mixing.reading import require

RESAMPLES: Final = 10_000
MOST_SEEDS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A method less a baseline, over seeds that both ran with.

    Attributes:
        count: seeds, S.
        mean: of the differences; below 0, the method has the lower loss.
        sd: standard deviation of the differences (S - 1).
        t: mean / (sd / sqrt S).
        p: two-sided, of Student's t with S - 1 degrees of freedom.
        p_holm: ``p`` after Holm's correction over the methods compared; ``p`` itself alone.
        confidence: of the intervals.
        interval: of the mean difference, by Student's t.
        bootstrap: of the mean difference, by percentiles of resampled seeds.  With five
            seeds it is too short by about a third; read it beside the other.
        interval_holm: ``interval`` at the level at which Holm's procedure tested this
            method: it leaves out 0 exactly if the corrected test rejects.
        bootstrap_holm: ``bootstrap`` at the same level.
        wins: seeds in which the method's loss is lower.
        losses: seeds in which it is higher; the rest are ties.
    """

    count: int
    mean: float
    sd: float
    t: float
    p: float
    p_holm: float
    confidence: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    interval_holm: tuple[float, float]
    bootstrap_holm: tuple[float, float]
    wins: int
    losses: int


def compare_paired(
    methods: Mapping[str, FloatArray],
    baseline: FloatArray,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Compare every method with one baseline, seed by seed, Holm-corrected over the methods.

    Args:
        methods: final losses by method, each [S] in the order of the same seeds.
        baseline: the baseline's losses, [S].
        confidence: of the intervals, and 1 - alpha of the tests.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than two seeds, unequal numbers of them, or a loss that is not
            finite: a failed run is to be repeated, or its seed left out of all methods.
        MissingExtraError: scipy is not installed.
    """
    require("confidence", confidence, 0 < confidence < 1, "between 0 and 1")
    differences = {name: _difference(name, losses, baseline) for name, losses in methods.items()}
    tests = {name: _t_test(values) for name, values in differences.items()}
    raw = {name: p for name, (_, p) in tests.items()}
    corrected, levels = holm(raw), _holm_levels(raw, 1.0 - confidence)
    compared = {}
    for name, values in differences.items():
        means = _resampled_means(values, resamples, seed)
        strict = 1.0 - levels[name]
        compared[name] = PairedDifference(
            count=len(values),
            mean=float(values.mean()),
            sd=_sd(values),
            t=tests[name][0],
            p=raw[name],
            p_holm=corrected[name],
            confidence=confidence,
            interval=t_interval(values, confidence=confidence),
            bootstrap=_percentiles(means, confidence),
            interval_holm=t_interval(values, confidence=strict),
            bootstrap_holm=_percentiles(means, strict),
            wins=int((values < 0).sum()),
            losses=int((values > 0).sum()),
        )
    return compared


def t_interval(values: FloatArray, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of the mean of values [S], S >= 2."""
    quantile = float(_stats().t.ppf(0.5 + confidence / 2.0, len(values) - 1))
    half = quantile * _sd(values) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap_interval(
    values: FloatArray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean of values [S], by resampling them."""
    return _percentiles(_resampled_means(values, resamples, seed), confidence)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number (Holm 1979, step-down).

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's.
    """
    corrected, least = {}, 0.0
    order = sorted(p_values, key=lambda name: p_values[name])
    for place, name in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}


def paired_power(effect: float, seeds: int, *, alpha: float = 0.05) -> float:
    """Return the power of the two-sided paired t-test (noncentral t, both tails).

    Args:
        effect: true mean difference in standard deviations of the differences.
        seeds: pairs, at least 2.
        alpha: level of the test.

    Raises:
        ConfigError: ``seeds`` below 2 or ``alpha`` outside (0, 1).
    """
    require("seeds", seeds, seeds >= 2, "at least 2")
    require("alpha", alpha, 0 < alpha < 1, "between 0 and 1")
    stats = _stats()
    freedom, shift = seeds - 1, abs(effect) * np.sqrt(seeds)
    limit = stats.t.ppf(1.0 - alpha / 2.0, freedom)
    if shift > 37.0:  # the noncentral tails underflow, and only the spread's estimate matters
        return float(stats.chi2.cdf(freedom * (shift / limit) ** 2, freedom))
    return float(stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift))


def seeds_needed(effect: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Return the fewest seeds with which a two-sided paired t-test has the power.

    Args:
        effect: true mean difference in standard deviations of the differences; not 0.
        power: wanted chance to find it.
        alpha: level of the test; divide it by the number of methods for a safe plan
            under Holm's correction.

    Raises:
        ConfigError: no effect, ``power`` outside (alpha, 1), or more than 100,000 seeds.
    """
    require("effect", effect, bool(np.isfinite(effect)) and effect != 0, "finite, and not 0")
    require("power", power, alpha < power < 1, f"between alpha ({alpha}) and 1")
    low, high = 1, 2
    while paired_power(effect, high, alpha=alpha) < power:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            raise ConfigError(f"an effect of {effect} standard deviations needs > {MOST_SEEDS:,}")
    while high - low > 1:
        middle = (low + high) // 2
        enough = paired_power(effect, middle, alpha=alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class Regret:
    """How much worse than the best static mixture a method is.

    Attributes:
        mean: method less oracle, nats per token; below 0, the method is better.
        interval: of the mean by Student's t.
        recovered: share of the oracle's gain over the baseline that the method reaches, 1
            for the oracle, 0 for the baseline; NaN where the oracle gains nothing.
    """

    mean: float
    interval: tuple[float, float]
    recovered: float


def oracle_of_sweep(losses: FloatArray) -> int:
    """Return the row of a sweep with the least mean loss, of losses [N, S] over seeds.

    Its own losses in the sweep are too good, having been chosen for it: run the mixture
    again with seeds that the sweep has not seen, and give those to :func:`regret`.

    Raises:
        ConfigError: a loss is not finite.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or not losses.size or not np.isfinite(losses).all():
        raise ConfigError(f"the sweep's losses {losses.shape} must be finite, [mixtures, seeds]")
    return int(losses.mean(axis=1).argmin())


def regret(
    method: FloatArray, oracle: FloatArray, baseline: FloatArray, *, confidence: float = 0.95
) -> Regret:
    """Return a method's regret to the oracle, over paired seeds [S].

    Raises:
        ConfigError: see :func:`compare_paired`.
    """
    values = _difference("the method", method, oracle)
    gain = float(_difference("the oracle", oracle, baseline).mean())
    reached = float(_difference("the method", method, baseline).mean())
    return Regret(
        mean=float(values.mean()),
        interval=t_interval(values, confidence=confidence),
        recovered=reached / gain if gain < 0 else float("nan"),
    )


def _difference(name: str, method: FloatArray, baseline: FloatArray) -> FloatArray:
    ours, theirs = np.asarray(method, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise ConfigError(
            f"{name} has losses {ours.shape} and what it is compared with {theirs.shape}; a paired "
            f"comparison needs the same seeds, two at least"
        )
    wrong = np.flatnonzero(~(np.isfinite(ours) & np.isfinite(theirs)))
    if len(wrong):
        raise ConfigError(
            f"{name}: pair {wrong[0]} has the losses {ours[wrong[0]]} and {theirs[wrong[0]]}; "
            f"repeat the failed run, or leave its seed out of every method"
        )
    return ours - theirs


def _sd(values: FloatArray) -> float:
    # Differences that are all the same have none, whatever their mean is rounded to.
    return float(values.std(ddof=1)) if np.ptp(values) > 0 else 0.0


def _t_test(values: FloatArray) -> tuple[float, float]:
    """Return t and its two-sided p; without any spread 0 and 1, or infinity and 0."""
    mean, error = float(values.mean()), _sd(values) / np.sqrt(len(values))
    if error == 0:
        return (0.0, 1.0) if mean == 0 else (float(np.copysign(np.inf, mean)), 0.0)
    t = mean / error
    return float(t), float(2.0 * _stats().t.sf(abs(t), len(values) - 1))


def _holm_levels(p_values: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Return the level at which each hypothesis is tested; after the first kept, its level."""
    levels, rejecting, level = {}, True, alpha
    order = sorted(p_values, key=lambda name: p_values[name])
    for place, name in enumerate(order):
        if rejecting:
            level = alpha / (len(order) - place)
            rejecting = p_values[name] <= level
        levels[name] = level
    return levels


def _resampled_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(values), size=(resamples, len(values)))
    return np.asarray(values[drawn].mean(axis=1))


def _percentiles(means: FloatArray, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, (tail, 1.0 - tail))
    return float(low), float(high)


def _stats() -> Any:
    return load("scipy.stats", "a comparison over seeds")
