"""Generated languages whose entropy is known exactly: what no model can get below.

Tokens are small integers.  A language is drawn from a seed; its text from another, so the same
language can be written again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]
LETTERS = 26
SEPARATOR = 26
_SHORTEST, _LONGEST = 3, 8
_POWER_STEPS = 2_000


class Language(Protocol):
    """A source of text."""

    @property
    def entropy(self) -> float:
        """Nats per token of the stationary source, given everything before the token."""
        ...

    def write(self, documents: int, length: int, seed: int) -> Tokens:
        """Return [documents, length] tokens; the same for the same seed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Markov:
    """Each symbol depends on the ``order`` symbols before it, by random distributions.

    Attributes:
        order: 0 for independent symbols.
        symbols: tokens 0 … symbols − 1 are used.
        concentration: of the Dirichlet that every distribution is drawn from: small ones make
            few symbols likely (much structure), large ones nearly even noise.
        seed: of the language.
    """

    order: int
    symbols: int
    concentration: float
    seed: int

    def table(self) -> NDArray[np.float64]:
        """Return the distributions of the next symbol, [symbols ** order, symbols]."""
        generator = np.random.default_rng([self.seed, self.order, self.symbols])
        shape = np.full(self.symbols, self.concentration)
        return generator.dirichlet(shape, size=self.symbols**self.order)

    @property
    def entropy(self) -> float:
        """Mean over contexts, as often as they occur, of the entropy of the next symbol."""
        table = self.table()
        with np.errstate(divide="ignore", invalid="ignore"):
            each = -np.where(table > 0, table * np.log(table), 0.0).sum(axis=1)
        return float(self._occurrence(table) @ each)

    def _occurrence(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how often each context occurs, [contexts], by power iteration.

        Raises:
            ValueError: contexts hardly mix, so that a text shows the ones that it began in.
        """
        contexts = len(table)
        share = np.full(contexts, 1.0 / contexts)
        if self.order == 0:
            return share
        for _ in range(_POWER_STEPS):
            # Context (a, b, …) followed by s becomes (b, …, s).
            flow: NDArray[np.float64] = (
                (share[:, None] * table).reshape(self.symbols, -1).sum(axis=0)
            )
            settled = bool(np.abs(flow - share).max() < 1e-15)
            share = flow
            if settled:
                return share
        raise ValueError(f"{self} stays among some of its contexts: give it more concentration")

    def write(self, documents: int, length: int, seed: int) -> Tokens:
        """Return [documents, length] tokens; contexts settle before the text begins."""
        generator = np.random.default_rng([seed, self.seed, 1])
        cumulative = self.table().cumsum(axis=1)
        cumulative[:, -1] = 1.0
        contexts = len(cumulative)
        state = generator.integers(contexts, size=documents)
        settle = 0 if self.order == 0 else 64
        text = np.empty((documents, length), np.uint16)
        for place in range(-settle, length):
            drawn = generator.random(documents)
            symbol = (drawn[:, None] >= cumulative[state]).sum(axis=1)
            state = (state * self.symbols + symbol) % contexts
            if place >= 0:
                text[:, place] = symbol
        return text


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Words of 3 to 8 letters, each drawn evenly from a list and ended by a separator.

    Attributes:
        words: in the list.
        replaced: share of the words in whose place stand random letters.
        seed: of the list.
    """

    words: int
    replaced: float
    seed: int

    def list(self) -> list[tuple[int, ...]]:
        """Return the words, all different."""
        generator = np.random.default_rng([self.seed, self.words])
        found: dict[tuple[int, ...], None] = {}
        while len(found) < self.words:
            found.setdefault(_random_word(generator))
        return list(found)

    @property
    def entropy(self) -> float:
        """Entropy of a word over its mean length with separator: words can be told apart."""
        lengths = np.arange(_SHORTEST, _LONGEST + 1)
        by_length = self.replaced / len(lengths)
        # As if every word were a replaced one …
        total = 0.0
        if self.replaced > 0:
            logs = np.log(by_length) - lengths * np.log(LETTERS)
            total -= float((by_length * logs).sum())
        letters = float(self.replaced * lengths.mean())
        for word in self.list():  # … then put the list's words right
            chance = (1.0 - self.replaced) / self.words
            letters += chance * len(word)
            by_accident = by_length * float(LETTERS) ** -len(word)
            if by_accident > 0:
                total += by_accident * np.log(by_accident)
            total -= (chance + by_accident) * np.log(chance + by_accident)
        return float(total / (letters + 1.0))

    def write(self, documents: int, length: int, seed: int) -> Tokens:
        """Return [documents, length] tokens; a document begins with a word and may end within."""
        generator = np.random.default_rng([seed, self.seed, 2])
        listed = [np.array([*word, SEPARATOR], np.uint16) for word in self.list()]
        text = np.empty((documents, length), np.uint16)
        most = length // (_SHORTEST + 1) + 1
        for row in text:
            which = generator.integers(self.words, size=most)
            other = generator.random(most) < self.replaced
            parts: list[Tokens] = []
            filled = 0
            for index, random in zip(which.tolist(), other.tolist(), strict=True):
                word = _ended(_random_word(generator)) if random else listed[index]
                parts.append(word)
                filled += len(word)
                if filled >= length:
                    break
            row[:] = np.concatenate(parts)[:length]
        return text


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The same symbols in the same order for ever: nothing to learn but one table of followers.

    Attributes:
        symbols: of a round, in an order drawn from the seed.
        seed: of the order.
    """

    symbols: int
    seed: int

    @property
    def entropy(self) -> float:
        """0: the symbol before says which one comes."""
        return 0.0

    def write(self, documents: int, length: int, seed: int) -> Tokens:
        """Return [documents, length] tokens; each document begins somewhere in the round."""
        order = np.random.default_rng([self.seed, self.symbols]).permutation(self.symbols)
        starts = np.random.default_rng([seed, self.seed, 3]).integers(self.symbols, size=documents)
        places = (starts[:, None] + np.arange(length)) % self.symbols
        text: Tokens = order[places].astype(np.uint16)
        return text


def _random_word(generator: np.random.Generator) -> tuple[int, ...]:
    length = int(generator.integers(_SHORTEST, _LONGEST + 1))
    return tuple(generator.integers(LETTERS, size=length).tolist())


def _ended(word: tuple[int, ...]) -> Tokens:
    return np.array([*word, SEPARATOR], np.uint16)
