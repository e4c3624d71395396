"""Counting a run's own training data: lazily, the same on every rank, no more than is asked."""

from __future__ import annotations

import types

import numpy as np
import pytest

from megatron.data.count_model import count_loss
from megatron.data.domain import open_domain
from megatron.data.writer import TokenWriter
from megatron.training import counting
from megatron.training.domains import OpenDomains

LENGTH = 16


def make(folder, sizes):
    """Open domains of so many random tokens each."""
    rng = np.random.default_rng(0)
    opened = []
    for name, size in sizes.items():
        with TokenWriter(folder / name, np.uint16) as writer:
            writer.add(rng.integers(0, 9, size).astype(np.uint16))
        opened.append(open_domain(name, [folder / name], seq_length=LENGTH, seed=3))
    none = (None,) * len(opened)
    return OpenDomains(
        names=tuple(sizes), targets=(), train=tuple(opened), valid=none, test=none, notes=()
    )


def counter(domains, vocab_size=9):
    model = types.SimpleNamespace(context_length=LENGTH, vocab_size=vocab_size)
    return counting.counter(domains, model)


@pytest.fixture
def seen(monkeypatch):
    """What the count model is given, call by call."""
    given = []

    def watched(windows, vocab_size):
        given.append((windows, vocab_size))
        return count_loss(windows, vocab_size)

    monkeypatch.setattr(counting, "count_loss", watched)
    return given


def test_windows_are_the_first_ones_of_the_first_pass(tmp_path, seen):
    domains = make(tmp_path, {"a": 5000, "b": 5000})
    losses = counter(domains)(np.array([1600.0, 320.0]))
    assert [len(windows) for windows, _ in seen] == [
        1600 * 8 // 7 // LENGTH,
        320 * 8 // 7 // LENGTH,
    ]
    for domain, (windows, vocab_size), loss in zip(domains.train, seen, losses, strict=True):
        for place, window in enumerate(windows):
            assert window.tolist() == domain.sample(0, place)[:LENGTH].tolist()
        assert vocab_size == 9
        assert loss == count_loss(windows, 9).loss
    domains.close()


def test_every_rank_comes_to_the_same(tmp_path):
    losses = []
    for _ in range(2):
        domains = make(tmp_path, {"a": 3000, "b": 700})
        losses.append(counter(domains)(np.array([1e6, 1e6])).tobytes())
        domains.close()
    assert losses[0] == losses[1]


def test_no_more_is_read_than_there_is_and_no_less_than_can_be_counted(tmp_path, seen):
    domains = make(tmp_path, {"a": 500, "b": 5000, "c": 2 * LENGTH + 1, "d": LENGTH + 1})
    losses = counter(domains)(np.array([1e6, 0.0, 1e6, 1e6]))
    sizes = [len(windows) for windows, _ in seen]
    assert sizes[0] == domains.train[0].num_windows(0)
    assert sizes[1] == 8, "a domain that the run hardly reads still has a number"
    assert (losses[:2] > 1.5).all()
    assert losses[3] == 0.0, "one window: what is repeated can be learnt by heart"
    domains.close()


def test_without_a_known_vocabulary_the_text_says_how_large_it_is(tmp_path, seen):
    domains = make(tmp_path, {"a": 500})
    counter(domains, vocab_size=None)(np.array([1e6]))
    assert seen[0][1] == int(seen[0][0].max()) + 1
    domains.close()
