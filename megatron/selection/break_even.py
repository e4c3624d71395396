"""From which model size, and from which budget on, a selector pays for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.selection.base import FloatArray
from megatron.selection.budget_plan import charged_compute
from megatron.selection.cost_model import FREE, Model, base_method, sized_model
from megatron.selection.gain_law import gain
from megatron.selection.gains import Gain, Gains, laws_of, methods_of
from megatron.selection.laws_at import law_at, laws_along
from megatron.selection.prices import Prices

SHARES: Final = (0.05, 0.1, 0.25, 0.5)
"""Parts of the corpus that a budget would train on if choosing were free."""

_SMALLEST, _LARGEST = 1e-3, 1e5
_HALVINGS: Final = 60
_BUDGETS: Final = 4000


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Where a selector begins to beat one that costs nothing.

    Attributes:
        method: that costs.
        against: that does not.
        share: the budget, as a part of C_total of the model.
        selector: parameters of the model that scores; None: not known.
        size: least parameters of the trained model at which it pays; inf: it never does; 0: at
            every size.
        low: lower end of its interval, over the laws that the runs allow.
        high: upper end.
    """

    method: str
    against: str
    share: float
    selector: float | None
    size: float
    low: float
    high: float

    @property
    def ratio(self) -> float | None:
        """Trained parameters for each of the scoring model; None where that is not known."""
        return None if self.selector is None else self.size / self.selector


def break_even_sizes(
    gains: Gains,
    task: str,
    prices: Prices,
    *,
    shares: Sequence[float] = SHARES,
    against: str | None = None,
) -> list[BreakEven]:
    """Return the break-even sizes of every selector that costs something.

    The budget grows with the model: it is ``share`` of what training on the whole corpus takes.
    Scoring costs the same whichever model is trained, so that the greater it is, the less of the
    budget goes into choosing.  Laws are read at the fitted sizes' nearest, beyond them unchanged.

    With P0 and P̄ alike, size / scoring model is 1 / (3 s (1 - λ_free / λ)) for one forward pass
    and 1 / (s (1 - λ_free / λ)) for gradients.

    Args:
        gains: fitted laws.
        task: of them.
        prices: of selectors and corpus.
        shares: of the corpus, see above.
        against: method to beat; the best of those that cost nothing if None.

    Raises:
        ConfigError: nothing to compare with, or a price is not known.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError(f"a share of the corpus is {share:g}; it must be in (0, 1]")
    laws = gains.of(task)
    rivals = rivals_of(laws, against)
    found = []
    for method in methods_of(laws):
        if base_method(method) in FREE or method in rivals:
            continue
        model = prices.model(method)
        for share in shares:
            size, draws = _least_size(gains, laws, method, rivals, share, prices)
            tail = (1.0 - gains.confidence) / 2.0
            low, high = np.quantile(draws, (tail, 1.0 - tail), method="inverted_cdf")
            found.append(
                BreakEven(
                    method=method,
                    against=" or ".join(rivals),
                    share=share,
                    selector=None if model is None else model.parameters,
                    size=size,
                    low=min(float(low), size),
                    high=max(float(high), size),
                )
            )
    return found


def rivals_of(laws: Sequence[Gain], against: str | None) -> tuple[str, ...]:
    """Return the methods that a selector has to beat.

    Raises:
        ConfigError: there is none.
    """
    methods = methods_of(laws)
    if against is not None:
        if against not in methods:
            raise ConfigError(
                f"--against {against}: no fitted method (fitted: {', '.join(methods)})"
            )
        return (against,)
    return tuple(name for name in methods if base_method(name) in FREE)


def break_even_budget(
    gains: Gains, task: str, model: Model, method: str, prices: Prices, against: str | None = None
) -> float:
    """Return the least budget at which a selector beats those that cost nothing; inf if none.

    At most as much as choosing and training on the whole corpus take.
    """
    laws = gains.of(task)
    rivals = rivals_of(laws, against)
    total, cost = prices.total(model, laws), prices.choosing(method, laws)
    if not rivals:
        return float("inf")
    budgets = np.geomspace(max(cost, 1e-6 * total), cost + total, _BUDGETS)
    rows = []
    for name in (method, *rivals):
        law = law_at(laws_of(laws, name), model.parameters).law
        spent = charged_compute(gains, budgets, prices.choosing(name, laws), total)
        rows.append(gains.sign * gain(spent, law, total))
    better = (rows[0] >= np.max(rows[1:], axis=0)) & (budgets > cost)
    return float(budgets[better.argmax()]) if better.any() else float("inf")


def _least_size(
    gains: Gains,
    laws: Sequence[Gain],
    method: str,
    rivals: Sequence[str],
    share: float,
    prices: Prices,
) -> tuple[float, FloatArray]:
    """Return the least size that pays by the fitted laws, and by every draw."""
    if not rivals:
        raise ConfigError(
            "no selector that costs nothing was fitted, against which others could pay; add runs "
            "of 'random' or 'bm25', or say --against METHOD"
        )
    selector = prices.model(method)
    centre = selector.parameters if selector else laws[0].size
    per_parameter = prices.total(sized_model(centre), laws) / centre
    own = {name: laws_of(laws, name) for name in (method, *rivals)}
    costs = {name: prices.choosing(name, laws) for name in own}
    count = 1 + min(len(one.draws) for one in laws)

    def ahead(sizes: FloatArray) -> npt.NDArray[np.bool_]:
        """Tell of each law whether the selector is ahead at a size of its own."""
        total = per_parameter * sizes
        rows = []
        for name, mine in own.items():
            spent = charged_compute(gains, share * total, costs[name], total)
            rows.append(gains.sign * gain(spent, laws_along(mine, sizes), total))
        return np.asarray(rows[0] >= np.max(rows[1:], axis=0))

    low = np.full(count, centre * _SMALLEST)
    high = np.full(count, centre * _LARGEST)
    at_low, at_high = ahead(low), ahead(high)
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high)
        pays = ahead(middle)
        low, high = np.where(pays, low, middle), np.where(pays, middle, high)
    found = np.where(~at_high, np.inf, np.where(at_low, 0.0, high))
    return float(found[0]), found[1:]
