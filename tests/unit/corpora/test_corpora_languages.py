"""Generated languages: their entropies by brute force, and their texts by their tables."""

from __future__ import annotations

import itertools
import math
import string

import numpy as np
import pytest
from scipy import stats

from megatron.data.corpora.languages import LETTERS, SEPARATOR, Cycle, Lexicon, Markov
from megatron.data.count_model import count_loss

EVERY = [
    Markov(order=0, symbols=9, concentration=1.0, seed=1),
    Markov(order=1, symbols=7, concentration=0.2, seed=2),
    Markov(order=2, symbols=5, concentration=0.1, seed=3),
    Lexicon(words=40, replaced=0.3, seed=4),
    Cycle(symbols=11, seed=5),
]


def matrix(language):
    """The chain of a Markov language's contexts, [contexts, contexts], from its table alone."""
    table, symbols = language.table(), language.symbols
    contexts = list(itertools.product(range(symbols), repeat=language.order))
    place = {context: number for number, context in enumerate(contexts)}
    chain = np.zeros((len(contexts), len(contexts)))
    for context, symbol in itertools.product(contexts, range(symbols)):
        chain[place[context], place[(*context, symbol)[1:]]] += table[place[context], symbol]
    return chain


def occurrence(language):
    values, vectors = np.linalg.eig(matrix(language).T)
    found = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return found / found.sum()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("concentration", [0.2, 1.0])
def test_a_markov_entropy_is_that_of_its_eigenvector(order, concentration):
    language = Markov(order=order, symbols=4, concentration=concentration, seed=order)
    table = language.table()
    assert table.shape == (4**order, 4)
    np.testing.assert_allclose(table.sum(axis=1), 1.0)
    each = [-sum(p * math.log(p) for p in row if p > 0) for row in table.tolist()]
    assert language.entropy == pytest.approx(float(occurrence(language) @ each), abs=1e-9)


def test_a_language_that_hardly_mixes_has_no_entropy_of_its_text():
    language = Markov(order=3, symbols=4, concentration=0.05, seed=3)
    assert np.sort(np.abs(np.linalg.eigvals(matrix(language))))[-2] > 0.9999
    with pytest.raises(ValueError, match="stays among some of its contexts"):
        _ = language.entropy


@pytest.mark.parametrize("order", [1, 2])
def test_it_is_what_longer_blocks_have_more_of(order):
    """H(n + 1 symbols) - H(n symbols), every block of them enumerated, from order on exact."""
    language = Markov(order=order, symbols=3, concentration=0.4, seed=8)
    table, start = language.table(), occurrence(language)
    entropies = []
    for length in range(order, order + 4):
        total = 0.0
        for block in itertools.product(range(3), repeat=length):
            context = 0
            for symbol in block[:order]:
                context = context * 3 + symbol
            chance = start[context]
            for symbol in block[order:]:
                chance *= table[context, symbol]
                context = (context * 3 + symbol) % 3**order
            total -= chance * math.log(chance)
        entropies.append(total)
    np.testing.assert_allclose(np.diff(entropies), language.entropy, rtol=1e-9)


@pytest.mark.parametrize("language", EVERY[:3], ids=["0", "1", "2"])
def test_a_text_is_drawn_from_the_table(language):
    """Contexts as often as they occur from the first token on, and symbols as the table says."""
    text = language.write(2000, 60, seed=4).astype(int)
    order, symbols = language.order, language.symbols
    for place in (0, 20):  # one context of each document: draws that do not depend on each other
        context = np.zeros(len(text), int)
        for step in range(order):
            context = context * symbols + text[:, place + step]
        whole = context * symbols + text[:, place + order]
        share = occurrence(language) if order else np.ones(1)
        expected = (share[:, None] * language.table()).ravel() * len(text)
        seen = np.bincount(whole, minlength=len(expected))
        often = expected >= 5
        rest_seen, rest = seen[~often].sum(), expected[~often].sum()
        seen, expected = [*seen[often], rest_seen], [*expected[often], rest]
        if rest < 1e-9:
            seen, expected = seen[:-1], expected[:-1]
        assert stats.chisquare(seen, expected, sum_check=False).pvalue > 1e-3


def test_a_lexicons_entropy_by_every_word_there_is(monkeypatch):
    """With 3 letters and words of 1 or 2 of them, each possible word can be listed."""
    from megatron.data.corpora import languages

    monkeypatch.setattr(languages, "LETTERS", 3)
    monkeypatch.setattr(languages, "_SHORTEST", 1)
    monkeypatch.setattr(languages, "_LONGEST", 2)
    for replaced in (0.0, 0.4, 1.0):
        language = Lexicon(words=5, replaced=replaced, seed=2)
        chances = dict.fromkeys(
            [word for size in (1, 2) for word in itertools.product(range(3), repeat=size)], 0.0
        )
        for word in language.list():
            chances[word] += (1 - replaced) / 5
        for word in chances:
            chances[word] += replaced / 2 / 3 ** len(word)
        assert sum(chances.values()) == pytest.approx(1.0)
        entropy = -sum(p * math.log(p) for p in chances.values() if p > 0)
        tokens = sum(p * (len(word) + 1) for word, p in chances.items())
        assert language.entropy == pytest.approx(entropy / tokens, rel=1e-12)


def test_a_list_has_as_many_words_as_it_says():
    words = Lexicon(words=500, replaced=0.0, seed=1).list()
    assert len(set(words)) == len(words) == 500
    assert {len(word) for word in words} == set(range(3, 9))
    assert {letter for word in words for letter in word} == set(range(LETTERS))


@pytest.mark.parametrize("replaced", [0.0, 0.3])
def test_a_text_of_words_is_of_the_lists_words(replaced):
    language = Lexicon(words=30, replaced=replaced, seed=6)
    letters = string.ascii_lowercase + "|"
    text = ["".join(letters[t] for t in row) for row in language.write(400, 300, 1).tolist()]
    listed = {"".join(letters[t] for t in word) for word in language.list()}
    words = [word for row in text for word in row.split("|")[:-1]]  # the last may be cut
    assert all(3 <= len(word) <= 8 for word in words)
    known = [word for word in words if word in listed]
    assert len(known) / len(words) == pytest.approx(1 - replaced, abs=0.03)
    counts = [known.count(word) for word in sorted(listed)]
    # The cut takes a few long words more than short ones, and no more than that.
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("replaced", [0.0, 0.5])
def test_no_count_model_gets_below_a_lexicons_entropy(replaced):
    language = Lexicon(words=30, replaced=replaced, seed=6)
    found = count_loss(language.write(1000, 512, 1), SEPARATOR + 1)
    assert language.entropy - 4 * found.error < found.loss < 1.15 * language.entropy + 0.02


def test_a_cycle_goes_round_for_ever():
    text = Cycle(symbols=7, seed=1).write(50, 30, 2)
    order = np.random.default_rng([1, 7]).permutation(7)
    follower = {int(a): int(b) for a, b in zip(order, np.roll(order, -1), strict=True)}
    for row in text.tolist():
        assert all(follower[a] == b for a, b in itertools.pairwise(row))
    assert len(set(text[:, 0].tolist())) == 7
    assert Cycle(symbols=7, seed=1).entropy == 0.0


@pytest.mark.parametrize("language", EVERY, ids=lambda language: type(language).__name__)
@pytest.mark.parametrize("length", [1, 5, 200])
def test_documents_have_the_length_that_was_asked_for_and_the_seeds_bits(language, length):
    text = language.write(6, length, seed=1)
    assert text.shape == (6, length)
    assert text.dtype == np.uint16
    assert text.tobytes() == language.write(6, length, seed=1).tobytes()
    if length == 200:
        assert text.tobytes() != language.write(6, length, seed=2).tobytes()
        assert len({row.tobytes() for row in text}) > 1
        assert int(text.max()) < getattr(language, "symbols", SEPARATOR + 1)


@pytest.mark.parametrize("language", EVERY, ids=lambda language: type(language).__name__)
def test_another_seed_is_another_language(language):
    other = type(language)(**{**vars(language), "seed": 99})
    assert other.write(4, 100, 1).tobytes() != language.write(4, 100, 1).tobytes()
