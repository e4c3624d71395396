"""A bigram language model, counted: the loss that looking one token back gives.

p(next | token) = (count(token, next) + 1) / (count(token) + V), Laplace's rule.  Only pairs that
occur are kept, so memory grows with the text and not with the square of the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError


class Bigram:
    """Counts of pairs of tokens.

    Attributes:
        vocab_size: V, number of token ids.
        pairs: [n] codes token · V + next of the pairs that occur, ascending.
        counts: [n] how often.
    """

    def __init__(self, vocab_size: int) -> None:
        """Start with nothing counted."""
        if vocab_size < 1:
            raise ValueError(f"a vocabulary of {vocab_size} tokens")
        self.vocab_size = vocab_size
        self.pairs: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def update(self, rows: NDArray[Any]) -> None:
        """Count the pairs of rows of tokens [n, S + 1]."""
        pairs, counts = np.unique(self._codes(rows), return_counts=True)
        both = np.concatenate([self.pairs, pairs])
        self.pairs, place = np.unique(both, return_inverse=True)
        weights = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.pairs), dtype=np.int64)
        np.add.at(self.counts, place, weights)

    def losses(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Return the mean nats per token of each row of tokens [n, S + 1]."""
        codes = self._codes(rows)
        at = np.minimum(np.searchsorted(self.pairs, codes), max(len(self.pairs) - 1, 0))
        if len(self.pairs):
            count = np.where(self.pairs[at] == codes, self.counts[at], 0)
        else:
            count = np.zeros_like(codes)
        chance = (count + 1) / (self._totals()[codes // self.vocab_size] + self.vocab_size)
        losses: NDArray[np.float64] = -np.log(chance).mean(axis=1)
        return losses

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts: [n, 3] int64 of token, next and count; the first row holds V alone."""
        table = np.stack([self.pairs // self.vocab_size, self.pairs % self.vocab_size, self.counts])
        head = np.array([[self.vocab_size, -1, -1]], dtype=np.int64)
        temporary = Path(f"{os.fspath(path)}.tmp")
        with open(temporary, "wb") as out:
            np.save(out, np.concatenate([head, table.T]))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bigram:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: there is no such file, or it is something else.
        """
        try:
            table = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; count it first, with --train") from None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not a bigram model: {error}") from None
        form = isinstance(table, np.ndarray) and table.ndim == 2 and table.shape[1:] == (3,)
        if not form or not len(table) or (table[0, 1:] != -1).any():
            raise DataError(f"{path}: not a bigram model of this program; count it anew")
        model = cls(int(table[0, 0]))
        model.pairs = table[1:, 0] * model.vocab_size + table[1:, 1]
        model.counts = table[1:, 2].copy()
        return model

    def _codes(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        wide = rows.astype(np.int64)
        if wide.size and (wide.min() < 0 or wide.max() >= self.vocab_size):
            raise DataError(
                f"token id {wide.max()} is outside the vocabulary of {self.vocab_size} tokens"
            )
        codes: NDArray[np.int64] = wide[:, :-1] * self.vocab_size + wide[:, 1:]
        return codes

    def _totals(self) -> NDArray[np.int64]:
        totals = np.zeros(self.vocab_size, dtype=np.int64)
        np.add.at(totals, self.pairs // self.vocab_size, self.counts)
        return totals


def evaluate(model: Bigram, blocks: Iterable[NDArray[Any]]) -> tuple[float, float, int]:
    """Return mean loss, mean perplexity of the rows, and their number.

    Args:
        model: counted.
        blocks: of rows [n, S + 1].
    """
    losses = [model.losses(block) for block in blocks]
    rows = np.concatenate(losses) if losses else np.zeros(0)
    if not rows.size:
        return float("nan"), float("nan"), 0
    return float(rows.mean()), float(np.exp(rows).mean()), rows.size
