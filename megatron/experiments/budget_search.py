"""The joint search: selector, share, mixing method and model size under one budget.

The performance of a choice is the fitted law of its selector at the model's size, read at the
compute that choosing has left, with the effect of the mixing method added.  That the two add up is
assumed: nobody has measured them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.budget_mixing import MixingOption
from megatron.selection.cost_model import FREE, Model, base_method
from megatron.selection.gain_law import gain
from megatron.selection.gains import Gain, Gains, laws_of, methods_of
from megatron.selection.laws_at import MEASURED, LawAt, law_at
from megatron.selection.prices import Prices

SHARES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REPEATS: Final = 15.4
"""How fast repeated text loses its worth, R* of Muennighoff et al. 2023 (arXiv 2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is searched for.

    Attributes:
        budget: operations for everything.
        task: of the gains.
        shares: of the corpus that may be chosen; what the budget pays for once is tried too.
        max_epochs: most passes over what was chosen.
        per_nat: performance that a nat of held-out loss is worth, where gains are no losses.
    """

    budget: float
    task: str
    shares: tuple[float, ...] = SHARES
    max_epochs: float = 4.0
    per_nat: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One way to spend the budget.

    Attributes:
        model: that is trained.
        selector: method that chooses.
        share: of the corpus that is chosen.
        epochs: passes over it.
        mixing: how domains are mixed.
        choosing: operations of scoring.
        beside: operations that the mixing method spends beside training.
        training: operations of training steps.
        performance: predicted.
        low: lower end of its interval.
        high: upper end.
        draws: predictions that laws and runs allow, [R].
        best_in: share of the draws in which no other candidate of the ranking is better.
        notes: what the prediction rests on beside what was measured.
    """

    model: Model
    selector: str
    share: float
    epochs: float
    mixing: MixingOption
    choosing: float
    beside: float
    training: float
    performance: float
    low: float
    high: float
    draws: FloatArray
    best_in: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def spent(self) -> float:
        """All of it."""
        return self.choosing + self.beside + self.training


def search(
    gains: Gains,
    models: Sequence[Model],
    mixing: Sequence[MixingOption],
    prices: Prices,
    aim: Aim,
) -> list[Candidate]:
    """Return the best share for every model, selector and way of mixing, best first.

    Args:
        gains: fitted laws of selectors.
        models: that may be trained.
        mixing: ways of mixing.
        prices: of selectors and corpus.
        aim: budget and limits.

    Raises:
        ConfigError: nothing is affordable, or gains and mixing have no unit in common.
    """
    _check(gains, mixing, aim)
    laws = gains.of(aim.task)
    found: list[Candidate] = []
    for model in models:
        for selector in methods_of(laws):
            cost = prices.choosing(selector, laws)
            at = law_at(laws_of(laws, selector), model.parameters)
            for option in mixing:
                best = _best_share(gains, laws, model, selector, at, option, cost, prices, aim)
                if best is not None:
                    found.append(best)
    if not found:
        raise ConfigError(
            f"{aim.budget:.3g} FLOPs pay for no choice with any training left; raise the budget, "
            "or fit a selector that costs nothing (random, bm25)"
        )
    found.sort(key=lambda one: -gains.sign * one.performance)
    return _with_wins(found, gains.sign)


def _check(gains: Gains, mixing: Sequence[MixingOption], aim: Aim) -> None:
    if not 0 < aim.budget < float("inf"):
        raise ConfigError(f"--flops is {aim.budget:g}; it must be above 0")
    if aim.max_epochs <= 0:
        raise ConfigError(f"--max-epochs is {aim.max_epochs:g}; it must be above 0")
    for share in aim.shares:
        if not 0 < share <= 1:
            raise ConfigError(f"--share is {share:g}; it must be above 0 and at most 1")
    if aim.per_nat is not None and gains.better == "lower":
        raise ConfigError(
            f"--per-nat {aim.per_nat:g}: the gains are of losses, to which mixing adds as it is; "
            "leave it out"
        )
    effects = any(np.any(one.draws) for one in mixing)
    if effects and gains.better == "higher" and aim.per_nat is None:
        raise ConfigError(
            f"the gains are of {gains.unit}, where higher is better, and mixing methods are "
            "measured in nats of held-out loss: fit the gains of a held-out loss, or say how much "
            "of the performance a nat is worth (--per-nat)"
        )


def _best_share(
    gains: Gains,
    laws: Sequence[Gain],
    model: Model,
    selector: str,
    at: LawAt,
    option: MixingOption,
    cost: float,
    prices: Prices,
    aim: Aim,
) -> Candidate | None:
    total = prices.total(model, laws)
    left = aim.budget - cost
    if left <= 0:
        return None
    # Where methods were compared at other budgets, what one spends beside training is missing.
    left_to_learn = left if option.charged else left * (1.0 - option.overhead)
    best: Candidate | None = None
    pays = min(1.0, left_to_learn / total)
    for share in sorted({*aim.shares, pays}):
        epochs = min(aim.max_epochs, left_to_learn / (share * total))
        if epochs < 1.0 - 1e-9:
            continue
        one = _candidate(gains, model, selector, at, option, cost, total, share, epochs, aim)
        if best is None or gains.sign * one.performance > gains.sign * best.performance + 1e-12:
            best = one
    return best


def _candidate(
    gains: Gains,
    model: Model,
    selector: str,
    at: LawAt,
    option: MixingOption,
    cost: float,
    total: float,
    share: float,
    epochs: float,
    aim: Aim,
) -> Candidate:
    used = share * epochs * total
    effective = min(worth(share, epochs), 1.0) * total
    seen = effective + (cost if gains.compute == "total" else 0.0)
    scale = 1.0 if gains.better == "lower" else -(aim.per_nat or 0.0)
    count = min(len(at.draws), len(option.draws))
    draws = gain(seen, at.draws[:count], total) + scale * option.draws[:count]
    tail = (1.0 - gains.confidence) / 2.0
    low, high = np.quantile(draws, (tail, 1.0 - tail))
    value = float(gain(seen, at.law, total)) + scale * option.effect
    beside = used * option.overhead if option.charged else _beside(used, option.overhead)
    return Candidate(
        model=model,
        selector=selector,
        share=share,
        epochs=epochs,
        mixing=option,
        choosing=cost,
        beside=beside,
        training=used - beside if option.charged else used,
        performance=value,
        low=min(float(low), value),
        high=max(float(high), value),
        draws=draws,
        notes=_notes(selector, at, option, seen / total, share, epochs),
    )


def _beside(used: float, overhead: float) -> float:
    return used * overhead / (1.0 - overhead)


def worth(share: float, epochs: float, repeats: float = REPEATS) -> float:
    """Return how much of the corpus, read once, a share read several times is worth.

    Repeats lose their worth by e every R* passes (Muennighoff et al. 2023, equation 5).
    """
    if epochs <= 1:
        return share * epochs
    return share * (1.0 + repeats * -float(np.expm1(-(epochs - 1.0) / repeats)))


def _notes(
    selector: str, at: LawAt, option: MixingOption, seen: float, share: float, epochs: float
) -> tuple[str, ...]:
    notes = []
    if at.how != MEASURED:
        notes.append(f"size {at.how}")
    if seen > at.seen[1] * (1 + 1e-6):
        notes.append(f"more compute than the runs of {selector} ({at.seen[1]:.0%} of the corpus)")
    elif seen < at.seen[0] * (1 - 1e-6):
        notes.append(f"less compute than the runs of {selector} ({at.seen[0]:.1%} of the corpus)")
    if epochs > 1 + 1e-6:
        notes.append(f"{epochs:.1f} passes, by a published law of repeats")
    if share >= 1 and base_method(selector) not in FREE:
        notes.append("the whole corpus: nothing is left to choose")
    return (*notes, *option.notes)


def _with_wins(found: Sequence[Candidate], sign: float) -> list[Candidate]:
    count = min(len(one.draws) for one in found)
    draws = sign * np.stack([one.draws[:count] for one in found])
    best = draws == draws.max(axis=0)
    wins = (best / best.sum(axis=0)).mean(axis=1)
    return [replace(one, best_in=float(share)) for one, share in zip(found, wins, strict=True)]
