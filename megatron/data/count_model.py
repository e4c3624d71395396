"""What a table of counts can predict of a text: a loss that is known before any training.

A backing-off model over the last tokens (absolute discounting, interpolated; Ney, Essen and Kneser
1994) is counted on some windows of a domain and measured on others.  Text that is noise, or soon
learnt, has nothing below that loss; other text has, and a language model gets there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HELD_OUT: Final = 8
"""One window in so many is measured on and not counted."""
LONGEST: Final = 8
_MIXER: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(29)

Hashes = NDArray[np.uint64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CountLoss:
    """What a count model came to.

    Attributes:
        loss: mean nats per token of the held-out windows, by the best number of tokens looked
            back at.
        error: standard error of ``loss`` over the windows.
        order: that number.
        counted: tokens counted.
    """

    loss: float
    error: float
    order: int
    counted: int


def count_loss(windows: NDArray[Any], vocab_size: int, *, longest: int = LONGEST) -> CountLoss:
    """Count a text and say how well its own counts predict the rest of it.

    Args:
        windows: [N, S] tokens, N >= 2, each window to be predicted from its first token on.
        vocab_size: number of token ids.
        longest: most tokens that a prediction looks back at.

    Raises:
        ValueError: fewer than two windows.
    """
    if len(windows) < 2:
        raise ValueError(f"{len(windows)} windows are too few to count some and measure others")
    held = np.arange(len(windows)) % HELD_OUT == min(HELD_OUT, len(windows)) - 1
    tokens = np.asarray(windows, dtype=np.uint64)
    seen, unseen = tokens[~held], tokens[held]
    chance = np.full(unseen.shape, 1.0 / vocab_size)
    losses: list[FloatArray] = []
    for order in range(min(longest, tokens.shape[1] - 1) + 1):
        chance[:, order:] = _refined(seen, unseen, order, chance[:, order:])
        losses.append(-np.log(chance).mean(axis=1))
    best = int(np.argmin([loss.mean() for loss in losses]))
    chosen = losses[best]
    error = float(chosen.std(ddof=1) / np.sqrt(len(chosen))) if len(chosen) > 1 else 0.0
    return CountLoss(loss=float(chosen.mean()), error=error, order=best, counted=seen.size)


def _refined(seen: Hashes, unseen: Hashes, order: int, shorter: FloatArray) -> FloatArray:
    """Return the chances of the unseen tokens by contexts of ``order`` tokens.

    Args:
        seen: windows counted, [N, S].
        unseen: windows predicted, [M, S].
        order: length of the context.
        shorter: chances by the contexts that are one token shorter, [M, S - order].
    """
    context, token = _contexts(seen, order)
    pair = _mixed(context, token)
    contexts, totals = np.unique(context, return_counts=True)
    pairs, first, counts = np.unique(pair, return_index=True, return_counts=True)
    # Of each context, in the same order: how many different tokens follow it.
    _, followers = np.unique(context[first], return_counts=True)
    discount = _discount(counts)
    wanted, next_token = _contexts(unseen, order)
    at, known = _find(contexts, wanted)
    pair_at, pair_known = _find(pairs, _mixed(wanted, next_token))
    count = np.where(pair_known, np.maximum(counts[pair_at] - discount, 0.0), 0.0)
    rest = discount * followers[at] * shorter.ravel()
    chance = np.where(known, (count + rest) / totals[at], shorter.ravel())
    return np.asarray(chance.reshape(shorter.shape))


def _contexts(windows: Hashes, order: int) -> tuple[Hashes, Hashes]:
    """Return hashes of the ``order`` tokens before each token, and the token, both flat."""
    length = windows.shape[1] - order
    hashed = np.zeros((len(windows), length), np.uint64)
    for place in range(order):
        hashed = _mixed(hashed, windows[:, place : place + length])
    return hashed.ravel(), windows[:, order:].ravel()


def _mixed(hashed: Hashes, token: Hashes) -> Hashes:
    """Return 64-bit hashes of (hash, token); two different ones hardly ever agree."""
    with np.errstate(over="ignore"):
        mixed = (hashed ^ (token + np.uint64(1))) * _MIXER
        return np.asarray(mixed ^ (mixed >> _SHIFT))


def _discount(counts: NDArray[np.int64]) -> float:
    """Return what is taken off every count: n1 / (n1 + 2 n2)."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.1


def _find(table: Hashes, wanted: Hashes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted
