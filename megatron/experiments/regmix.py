"""RegMix on the mixtures of a study: how well they are ranked, and the mixture that is found.

Liu et al., "RegMix: Data Mixture as Regression for Language Model Pre-training"
(arXiv 2407.01492), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.experiments.bounds import Bounds, FloatArray
from megatron.experiments.optimum import objective_weights
from megatron.experiments.proxies import Proxies, unseen_mixtures
from megatron.experiments.regression import (
    HeldOutRanks,
    IntArray,
    Regressor,
    Simulated,
    best_simulated,
    fit_regression,
    ranks_of,
)

LOW_RANKS: Final = 0.7
"""A rank correlation below this is too low to choose a mixture by."""
_ONE_IN_TWENTY: Final = 1.645


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """What is asked of the mixture, and how it is looked for.

    Attributes:
        regressors: that are tried; the one with the highest rank correlation of the objective
            finds the mixture, the first of equals.
        bounds: the allowed mixtures.
        weights: how much each measured domain counts, [M]; equally if None.
        unseen: mixtures that are kept out of the fit to be ranked.
        simulated: mixtures that are drawn.
        best: how many of them are averaged.
        seed: of the draws, the fits, and the choice of what is kept out.
        concentration: of the simulated mixtures.
        prior: their centre, [K]; all domains alike if None.
    """

    regressors: tuple[Regressor, ...]
    bounds: Bounds
    weights: FloatArray | None
    unseen: int
    simulated: int
    best: int
    seed: int
    concentration: float
    prior: FloatArray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What RegMix has found.

    Attributes:
        regressor: that found the mixture.
        ranks: how well each regressor ranked the mixtures kept out of its fit.
        unseen: which mixtures these were.
        simulated: the mean of the best, by a fit to all mixtures.
        even: the objective that this fit predicts for the even mixture (the nearest allowed).
        share: how much each measured domain counts, [M], sum 1.
    """

    regressor: Regressor
    ranks: Mapping[Regressor, HeldOutRanks]
    unseen: IntArray
    simulated: Simulated
    even: float
    share: FloatArray


def search(proxies: Proxies, asked: Search) -> Found:
    """Rank the mixtures kept out, then fit to all of them and average the best simulated.

    Raises:
        ConfigError: too few mixtures, or numbers that do not fit.
        MissingExtraError: scikit-learn or scipy is not installed.
    """
    mixtures, losses, weights, seed = proxies.mixtures, proxies.losses, asked.weights, asked.seed
    share = objective_weights(weights, losses.shape[1])
    unseen = unseen_mixtures(asked.unseen, len(mixtures), seed)
    ranks = {
        one: ranks_of(mixtures, losses, unseen, regressor=one, weights=weights, seed=seed)
        for one in asked.regressors
    }
    chosen = max(asked.regressors, key=lambda one: ranks[one].objective)
    fit = fit_regression(mixtures, losses, regressor=chosen, seed=seed)
    simulated = best_simulated(
        fit,
        asked.bounds,
        weights=weights,
        simulated=asked.simulated,
        best=asked.best,
        seed=seed,
        concentration=asked.concentration,
        prior=asked.prior,
    )
    even = asked.bounds.nearest(np.full(asked.bounds.count, 1 / asked.bounds.count))
    return Found(
        regressor=chosen,
        ranks=ranks,
        unseen=unseen,
        simulated=simulated,
        even=float((fit.predict(even[None]) @ share)[0]),
        share=share,
    )


def warnings_of(found: Found) -> list[str]:
    """Return why the mixture may not be worth much, in sentences."""
    rank, count = found.ranks[found.regressor].objective, len(found.unseen)
    # Under no relation a rank correlation's standard deviation is 1 / sqrt(n - 1).
    chance = min(1.0, _ONE_IN_TWENTY / math.sqrt(count - 1))
    told = []
    if rank < LOW_RANKS:
        told.append(
            f"The rank correlation of the objective, {rank:.2f}, is low (below {LOW_RANKS}): the "
            "order of mixtures that were not fitted to is hardly predicted, and the mixture is "
            "little better than a guess. Run more proxies, longer ones, or more seeds of each."
        )
    if rank < chance:
        told.append(
            f"{count} mixtures were held out; by chance alone one in twenty rank correlations of "
            f"so few is above {chance:.2f}. Hold out more to know how far to trust the mixture."
        )
    return told


def search_facts(proxies: Proxies, asked: Search, found: Found) -> dict[str, Any]:
    """Return everything that is known of a search, JSON-able."""
    best = found.simulated
    measured = proxies.losses @ found.share
    top = int(measured.argmin())
    return {
        "regressor": str(found.regressor),
        "mixtures": len(proxies.names),
        "seeds": list(proxies.seeds),
        "left_out": list(proxies.left_out),
        "domains": list(proxies.domains),
        "measured": list(proxies.measured),
        "objective": _named(proxies.measured, found.share),
        "floor": asked.bounds.floor.tolist(),
        "ceiling": asked.bounds.ceiling.tolist(),
        "rank_correlation": {
            str(one): {
                "objective": ranks.objective,
                "domains": _named(proxies.measured, ranks.domains),
            }
            for one, ranks in found.ranks.items()
        },
        "held_out": [
            {
                "run": proxies.names[index],
                "mixture": _named(proxies.domains, proxies.mixtures[index]),
                "measured": float(measured[index]),
                "predicted": {
                    str(one): float(ranks.predicted[place] @ found.share)
                    for one, ranks in found.ranks.items()
                },
            }
            for place, index in enumerate(found.unseen.tolist())
        ],
        "simulated": asked.simulated,
        "best": asked.best,
        "seed": asked.seed,
        "concentration": asked.concentration,
        "prior": None if asked.prior is None else (asked.prior / asked.prior.sum()).tolist(),
        "mixture": _named(proxies.domains, best.mixture),
        "spread": _named(proxies.domains, best.spread),
        "losses": _named(proxies.measured, best.losses),
        "deviation": _named(proxies.measured, proxies.losses.std(axis=0)),
        "value": float(best.losses @ found.share),
        "value_of_even": found.even,
        "best_proxy": {
            "run": proxies.names[top],
            "value": float(measured[top]),
            "mixture": _named(proxies.domains, proxies.mixtures[top]),
        },
        "warnings": warnings_of(found),
    }


def _named(names: Sequence[str], values: FloatArray) -> dict[str, float]:
    return dict(zip(names, map(float, values), strict=True))
