"""Which selector a budget is best spent on, by the fitted laws of gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from megatron.errors import ConfigError
from megatron.selection.base import FloatArray
from megatron.selection.cost_model import Model
from megatron.selection.gain_law import gain
from megatron.selection.gains import Gain, Gains, laws_of, methods_of
from megatron.selection.laws_at import MEASURED, LawAt, law_at
from megatron.selection.prices import Prices

_OUTSIDE = 1.0 + 1e-6


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One selector, one model size and one budget.

    Attributes:
        task: whose laws these are.
        model: that is trained.
        method: that chooses.
        budget: operations in all.
        choosing: of them for scoring.
        training: of them for training; 0 where the scoring alone is too dear.
        corpus_share: of the corpus that is trained on.
        performance: that the law predicts; NaN where it is too dear.
        low: lower end of its interval.
        high: upper end.
        best_in: share of the laws that the runs allow under which no other selector is better.
        best: whether it is the best by the fitted laws.
        notes: what the prediction rests on beside what was measured.
    """

    task: str
    model: Model
    method: str
    budget: float
    choosing: float
    training: float
    corpus_share: float
    performance: float
    low: float
    high: float
    best_in: float
    best: bool
    notes: tuple[str, ...]

    @property
    def choosing_share(self) -> float:
        """Part of the budget that is spent on choosing; above 1 it is too dear."""
        return self.choosing / self.budget

    @property
    def affordable(self) -> bool:
        """Whether anything is left to train with."""
        return self.training > 0


def plan_choices(
    gains: Gains, task: str, models: Sequence[Model], budgets: Sequence[float], prices: Prices
) -> list[Choice]:
    """Return every selector for every size and budget, best first within each.

    Args:
        gains: fitted laws.
        task: of them.
        models: sizes that are planned for.
        budgets: operations for choosing and training together.
        prices: of selectors and of the corpus.

    Raises:
        ConfigError: a budget is not above 0, or a price is not known.
        DataError: no law of the task.
    """
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise ConfigError(f"a budget is {budget:g} FLOPs; it must be above 0")
    laws = gains.of(task)
    return [
        choice
        for model in models
        for budget in budgets
        for choice in _ranked(gains, task, laws, model, budget, prices)
    ]


def charged_compute(
    gains: Gains, budget: ArrayLike, choosing: float, total: ArrayLike
) -> FloatArray:
    """Return the C at which a law is read: what the budget leaves, at most the corpus once.

    Under ``total`` the laws count choosing as compute, and see both.
    """
    left = np.asarray(budget, dtype=np.float64) - choosing
    training = np.minimum(np.maximum(left, 0.0), total)
    if gains.compute == "total":
        training = np.where(training > 0, training + choosing, 0.0)
    return np.asarray(training)


def _ranked(
    gains: Gains, task: str, laws: Sequence[Gain], model: Model, budget: float, prices: Prices
) -> list[Choice]:
    total = prices.total(model, laws)
    methods = methods_of(laws)
    at = {name: law_at(laws_of(laws, name), model.parameters) for name in methods}
    costs = {name: prices.choosing(name, laws) for name in methods}
    compute = {name: float(charged_compute(gains, budget, costs[name], total)) for name in methods}
    draws = np.stack([_drawn(at[name], compute[name], total) for name in methods])  # [methods, R]
    wins = _wins(gains.sign * draws)
    tail = (1.0 - gains.confidence) / 2.0
    found = []
    for row, name in enumerate(methods):
        pays = budget > costs[name]
        value = float(gain(compute[name], at[name].law, total)) if pays else float("nan")
        ends = np.quantile(draws[row], (tail, 1.0 - tail)) if pays else (float("nan"),) * 2
        training = min(max(budget - costs[name], 0.0), total)
        found.append(
            Choice(
                task=task,
                model=model,
                method=name,
                budget=budget,
                choosing=costs[name],
                training=training,
                corpus_share=training / total,
                performance=value,
                low=float(ends[0]),
                high=float(ends[1]),
                best_in=float(wins[row]),
                best=False,
                notes=_notes(at[name], compute[name] / total, budget - costs[name], total),
            )
        )
    found.sort(key=lambda one: (not one.affordable, -gains.sign * _number(one.performance)))
    first = found[0]
    return [replace(first, best=first.affordable), *found[1:]]


def _number(value: float) -> float:
    return value if np.isfinite(value) else 0.0


def _drawn(at: LawAt, compute: float, total: float) -> FloatArray:
    values = gain(compute, at.draws, total)
    return values if compute > 0 else np.full_like(values, np.nan)


def _wins(values: FloatArray) -> FloatArray:
    """Return the share of the draws [methods, R] in which each is the best; ties are shared."""
    known = np.where(np.isfinite(values), values, -np.inf)
    best = (known == known.max(axis=0)) & np.isfinite(known)
    return np.asarray((best / np.maximum(best.sum(axis=0), 1)).mean(axis=1))


def _notes(at: LawAt, share: float, left: float, total: float) -> tuple[str, ...]:
    notes = []
    if at.how != MEASURED:
        notes.append(f"size {at.how}")
    if left <= 0:
        notes.append("too dear")
    elif share > at.seen[1] * _OUTSIDE:
        notes.append(f"more compute than its runs ({at.seen[1]:.0%} of the corpus)")
    elif share < at.seen[0] / _OUTSIDE:
        notes.append(f"less compute than its runs ({at.seen[0]:.1%} of the corpus)")
    if left >= total:
        notes.append("pays for the whole corpus: nothing is left to choose")
    return tuple(notes)
