"""Which documents to keep, and in which order: a ranking by score, and as much of it as a budget.

Orders: ``top`` takes the highest scores first.  ``low`` and ``mid`` rank by ascending score, cut
that into thirds, shuffle each third, and put the lowest or the middle one first (Yin and Rush
2024, arXiv 2410.16208, whose released ``top`` is ``low`` here).  ``sample`` draws without
replacement, each time with probability in proportion to exp(z / temperature), z the standardised
score: the Gumbel top-k (Kool et al. 2019, arXiv 1903.06059, section 3).  Equal scores keep the
order of the corpus.  A document without a score (NaN) is never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from megatron.errors import ConfigError, DataError
from megatron.selection.base import FloatArray

Order = Literal["top", "mid", "low", "sample"]
ORDERS: Final[tuple[Order, ...]] = ("top", "mid", "low", "sample")
Balance = Literal["share", "equal"]
Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How documents are ranked.

    Attributes:
        order: see the module.
        seed: of shuffles and draws.
        temperature: of ``sample``; a low one follows the scores, a high one is even.
        thirds_of: for ``low`` and ``mid``: ``all`` cuts all documents into thirds, and the budget
            takes what comes first; ``kept`` cuts what the budget keeps, which is the lowest
            scores, as the paper's program does (the same where everything is kept).
        per_source: ``share`` takes the same share of every source, ``equal`` as much of each as
            long as it lasts; None looks at scores alone.
    """

    order: Order = "top"
    seed: int = 0
    temperature: float = 1.0
    thirds_of: Literal["all", "kept"] = "all"
    per_source: Balance | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.temperature > 0:
            raise ConfigError(f"--temperature {self.temperature:g}: it must be above 0")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: at least 0")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much is kept: so many documents, or as many as have so many tokens together."""

    documents: int | None = None
    tokens: float | None = None


def choose(
    scores: FloatArray,
    ranking: Ranking,
    limit: Limit,
    *,
    tokens: NDArray[np.int64] | None = None,
    sources: NDArray[np.int32] | None = None,
) -> Places:
    """Return the places of the documents to keep [k], in their order.

    Args:
        scores: [n] by place in the corpus; NaN = never chosen.
        ranking: the order.
        limit: the budget.
        tokens: [n] counts, for a limit in tokens or equal parts of them.
        sources: [n] number of each document's source, for ``per_source``.

    Raises:
        DataError: no document has a score, or none fits into the budget.
    """
    scored = np.flatnonzero(~np.isnan(scores))
    if not scored.size:
        raise DataError("no document has a score: there is nothing to choose from")
    generator = np.random.Generator(np.random.Philox(key=ranking.seed))
    places = scored[_ranked(scores[scored], ranking, generator)]
    if ranking.per_source is not None:
        assert sources is not None
        weight = tokens if limit.tokens is not None else None
        places = _balanced(places, sources, ranking.per_source, weight)
    kept = places[: _fitting(places, limit, tokens)]
    if _thirds_of_kept(ranking):
        kept = kept[_in_thirds(len(kept), ranking.order, generator)]
    return kept


def share_of(documents: int, share: float) -> int:
    """Return how many documents a share is, at least one.

    Raises:
        ConfigError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--share {share:g}: above 0 and at most 1 (0.05 is five percent)")
    return max(int(documents * share * (1 + 1e-12)), 1)


def _thirds_of_kept(ranking: Ranking) -> bool:
    return ranking.order in ("low", "mid") and ranking.thirds_of == "kept"


def _ranked(scores: FloatArray, ranking: Ranking, generator: np.random.Generator) -> Places:
    """Return all places in their order."""
    if ranking.order == "top":
        return np.argsort(-scores, kind="stable")
    if ranking.order == "sample":
        keys = _standardised(scores) / ranking.temperature + generator.gumbel(size=len(scores))
        return np.argsort(-keys, kind="stable")
    ascending = np.argsort(scores, kind="stable")
    if _thirds_of_kept(ranking):
        return ascending
    ordered: Places = ascending[_in_thirds(len(scores), ranking.order, generator)]
    return ordered


def _in_thirds(count: int, order: Order, generator: np.random.Generator) -> Places:
    """Return 0 … count - 1 in thirds, each shuffled, the wanted one first."""
    thirds = np.split(np.arange(count), [count // 3, 2 * count // 3])
    low, middle, high = (generator.permutation(third) for third in thirds)
    return np.concatenate([middle, low, high] if order == "mid" else [low, middle, high])


def _standardised(scores: FloatArray) -> FloatArray:
    """Return scores of mean 0 and deviation 1; infinite ones as the most extreme finite ones."""
    finite = scores[np.isfinite(scores)]
    if not finite.size:
        return np.sign(scores)
    held: FloatArray = np.clip(scores, finite.min(), finite.max())
    deviation = float(held.std())
    return (held - held.mean()) / deviation if deviation > 0 else np.zeros_like(held)


def _balanced(
    places: Places,
    sources: NDArray[np.int32],
    balance: Balance,
    weight: NDArray[np.int64] | None,
) -> Places:
    """Return the places in an order of which every stretch from the start is balanced."""
    own = sources[places]
    keys = np.empty(len(places), dtype=np.float64)
    for source in np.unique(own):
        members = np.flatnonzero(own == source)
        if balance == "share":
            keys[members] = (np.arange(len(members)) + 1.0) / len(members)
        elif weight is None:
            keys[members] = np.arange(len(members))
        else:
            keys[members] = np.cumsum(weight[places[members]])
    ordered: Places = places[np.argsort(keys, kind="stable")]
    return ordered


def _fitting(places: Places, limit: Limit, tokens: NDArray[np.int64] | None) -> int:
    """Return how many of the first documents fit."""
    if limit.documents is not None:
        return min(limit.documents, len(places))
    assert tokens is not None
    assert limit.tokens is not None
    sums = np.cumsum(tokens[places])
    fitting = int(np.searchsorted(sums, limit.tokens, side="right"))
    if not fitting:
        raise DataError(
            f"the budget is {limit.tokens:,.0f} tokens, and the first document alone has "
            f"{sums[0]:,}; raise it"
        )
    return fitting
