"""The count model: against dictionaries that count the same, and against known entropies."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from megatron.data.corpora.languages import Cycle, Lexicon, Markov
from megatron.data.count_model import HELD_OUT, count_loss


def plain(windows, vocab_size, longest):
    """Interpolated absolute discounting, token by token; (loss, order) of the best order."""
    windows = [tuple(int(token) for token in window) for window in windows]
    at = min(HELD_OUT, len(windows)) - 1
    seen = [window for place, window in enumerate(windows) if place % HELD_OUT != at]
    unseen = [window for place, window in enumerate(windows) if place % HELD_OUT == at]
    tables, discounts = [], []
    for order in range(min(longest, len(windows[0]) - 1) + 1):
        table = defaultdict(Counter)
        for window in seen:
            for place in range(order, len(window)):
                table[window[place - order : place]][window[place]] += 1
        counts = [count for followers in table.values() for count in followers.values()]
        once, twice = counts.count(1), counts.count(2)
        tables.append(table)
        discounts.append(once / (once + 2 * twice) if once else 0.1)

    def chance(window, place, order):
        if order < 0:
            return 1.0 / vocab_size
        shorter = chance(window, place, order - 1)
        followers = tables[order].get(window[place - order : place])
        if followers is None:
            return shorter
        discount, total = discounts[order], sum(followers.values())
        kept = max(followers[window[place]] - discount, 0.0)
        return (kept + discount * len(followers) * shorter) / total

    losses = []
    for order in range(len(tables)):
        logs = [
            [math.log(chance(window, place, min(place, order))) for place in range(len(window))]
            for window in unseen
        ]
        losses.append(-np.mean([np.mean(window) for window in logs]))
    return min(losses), int(np.argmin(losses))


TEXTS = {
    "markov": lambda: Markov(order=1, symbols=6, concentration=0.3, seed=1).write(20, 40, 1),
    "far": lambda: Markov(order=2, symbols=4, concentration=0.2, seed=2).write(33, 60, 1),
    "words": lambda: Lexicon(words=20, replaced=0.1, seed=3).write(17, 50, 1),
    "cycle": lambda: Cycle(symbols=5, seed=4).write(8, 30, 1),
    "noise": lambda: np.random.default_rng(5).integers(0, 40, (24, 25)),
    "two windows": lambda: Markov(order=1, symbols=3, concentration=0.3, seed=6).write(2, 30, 1),
    "one token each": lambda: np.random.default_rng(7).integers(0, 9, (50, 1)),
    "two tokens each": lambda: np.random.default_rng(8).integers(0, 3, (50, 2)),
    "large ids": lambda: np.random.default_rng(9).integers(0, 7, (30, 20)) * 40_000_000,
    "one token for ever": lambda: np.zeros((10, 20), np.uint16),
}


@pytest.mark.parametrize("longest", [0, 1, 4, 8])
@pytest.mark.parametrize("name", TEXTS)
def test_it_is_what_dictionaries_come_to(name, longest):
    windows = TEXTS[name]()
    vocab_size = int(windows.max()) + 3
    found = count_loss(windows, vocab_size, longest=longest)
    loss, order = plain(windows, vocab_size, longest)
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert found.order == order
    held = max(1, sum(place % HELD_OUT == HELD_OUT - 1 for place in range(len(windows))))
    assert found.counted == (len(windows) - held) * windows.shape[1]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_of_a_markov_text_it_comes_close_to_the_entropy_and_never_below(order):
    language = Markov(order=order, symbols=8, concentration=0.3, seed=11)
    found = count_loss(language.write(800, 512, 1), 8)
    assert language.entropy - 4 * found.error < found.loss < language.entropy + 0.02
    assert found.order >= order


def test_noise_is_worth_the_logarithm_of_its_symbols():
    found = count_loss(np.random.default_rng(0).integers(0, 64, (400, 256)), 128)
    assert found.loss == pytest.approx(math.log(64), abs=0.01)
    assert found.order == 0
    assert found.error < 0.01


def test_more_text_counts_for_more():
    language = Lexicon(words=300, replaced=0.0, seed=1)
    losses = [count_loss(language.write(size, 256, 2), 27).loss for size in (16, 64, 512)]
    assert losses[0] > losses[1] > losses[2] > language.entropy


def test_what_was_never_seen_costs_the_vocabulary():
    """Seven windows of one token, one of another: the discount's share of an even chance."""
    windows = np.zeros((8, 1), np.uint16)
    windows[7] = 1
    # Nothing was seen once, so the discount is 0.1: of 7 counts 0.1 is left to 1/500 each.
    assert count_loss(windows, 500).loss == pytest.approx(-math.log(0.1 / 7 / 500))


def test_the_kind_of_number_does_not_matter():
    windows = TEXTS["words"]()
    found = [count_loss(windows.astype(kind), 27) for kind in (np.uint16, np.int32, np.int64)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("number", [0, 1])
def test_one_window_cannot_be_counted_and_measured_on(number):
    with pytest.raises(ValueError, match=f"{number} windows are too few"):
        count_loss(np.zeros((number, 10), np.uint16), 5)
