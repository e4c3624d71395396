"""The carry rule against a one-at-a-time oracle and against adversaries."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron.data.apportion import ExhaustedError, apportion, draw_multinomial, largest_carry
from megatron.data.quota import Quota

Floats = NDArray[np.float64]
SLACK = 1e-9


def ties(size: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.Philox(key=seed).random_raw(size)


def one_at_a_time(carry: Floats, units: int, order: NDArray[np.uint64]) -> list[int]:
    left, counts = carry.copy(), [0] * carry.size
    for _ in range(units):
        best = min(range(carry.size), key=lambda k: (-left[k], order[k]))
        counts[best] += 1
        left[best] -= 1
    return counts


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    # Eighths: exact in binary, so that equal carries are equal and the tie rule is tested too.
    carry=st.lists(st.integers(-40, 90), min_size=1, max_size=12),
    units=st.integers(0, 60),
    seed=st.integers(0, 5),
)
def test_counts_are_those_of_giving_one_at_a_time(carry: list[int], units: int, seed: int) -> None:
    owed = np.array(carry) / 8
    order = ties(owed.size, seed)
    counts = largest_carry(owed, units, order)
    assert counts.tolist() == one_at_a_time(owed, units, order)


Adversary = Callable[[Floats, np.random.Generator, int], Floats]


def starve(carry: Floats, _: np.random.Generator, step: int) -> Floats:
    """Ask equally for those that have got nothing yet: reaches H_K − 1, the most there is."""
    size = carry.size
    unserved = carry >= np.sort(carry)[::-1][size - 1 - (step - 1) % size]
    return unserved / unserved.sum()


def feed_the_top(carry: Floats, random: np.random.Generator, _: int) -> Floats:
    """Ask for a random number of those owed the most."""
    top = np.argsort(-carry)[: random.integers(1, carry.size + 1)]
    weights = np.zeros(carry.size)
    weights[top] = 1 / top.size
    return weights


def feed_the_bottom(carry: Floats, random: np.random.Generator, _: int) -> Floats:
    """Ask for those owed the least, which cannot be given fast enough."""
    return feed_the_top(-carry, random, 0)


def spike(carry: Floats, random: np.random.Generator, _: int) -> Floats:
    """Everything for one domain, at random."""
    return np.eye(carry.size)[random.integers(carry.size)]


def jitter(carry: Floats, random: np.random.Generator, _: int) -> Floats:
    """Weights over thirty orders of magnitude."""
    weights = 10.0 ** random.uniform(-30, 0, carry.size)
    return weights / weights.sum()


def keep_whole(carry: Floats, random: np.random.Generator, _: int) -> Floats:
    """Ask each domain just short of its next unit, then let the rest pile up on one."""
    gap = np.maximum(np.ceil(carry) - carry - 1e-9, 0)
    weights = gap + 1e-12
    return weights / weights.sum()


ADVERSARIES = [starve, feed_the_top, feed_the_bottom, spike, jitter, keep_whole]


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("domains", [1, 2, 3, 7, 22, 64])
@pytest.mark.parametrize("units", [1, 2, 5, 48])
def test_no_adversary_beats_the_bound(adversary: Adversary, domains: int, units: int) -> None:
    """The adversary sees every carry before it chooses the next weights."""
    quota, random = Quota(domains), np.random.default_rng(domains * 1000 + units)
    asked, given_out = np.zeros(domains), np.zeros(domains)
    most = sum(1 / k for k in range(2, domains + 1))
    for step in range(1, 400):
        weights = adversary(asked - given_out, random, step)
        counts = quota.draw(weights, units, capacity=None, ties=ties(domains, step))
        asked, given_out = asked + weights * units, given_out + counts
        assert counts.sum() == units
        assert (counts >= 0).all()
        carry = asked - given_out
        assert carry.max() <= most + SLACK <= 1 + math.log(domains) + SLACK
        assert carry.min() > -1 - SLACK
        np.testing.assert_allclose(carry, quota.carry, atol=1e-9)


@pytest.mark.parametrize("domains", [2, 7, 64])
def test_the_bound_is_reached(domains: int) -> None:
    """So the argument gives nothing away, and a weaker rule would be caught by the tests."""
    quota, carry, worst = Quota(domains), np.zeros(domains), 0.0
    served: set[int] = set()
    for step in range(1, domains):
        unserved = np.array([k not in served for k in range(domains)], dtype=float)
        weights = unserved / unserved.sum()
        counts = quota.draw(weights, 1, capacity=None, ties=ties(domains, step))
        served.add(int(np.argmax(counts)))
        carry = quota.carry
        worst = max(worst, float(carry.max()))
    assert worst == pytest.approx(sum(1 / k for k in range(2, domains + 1)))


def test_a_climbing_adversary_stays_within_the_bound() -> None:
    """At every step the worst of many random choices, looked one step ahead."""
    random = np.random.default_rng(5)
    for domains in (4, 16, 64):
        quota = Quota(domains)
        for step in range(150):
            best, worst = None, -1.0
            before = quota.snapshot()
            for _ in range(8):
                adversary = ADVERSARIES[random.integers(len(ADVERSARIES))]
                weights = adversary(quota.carry, random, step + 1)
                quota.draw(weights, 3, capacity=None, ties=ties(domains, step))
                reach = float(np.abs(quota.carry).max())
                if reach > worst:
                    best, worst = weights, reach
                quota.restore(before)
            assert best is not None
            quota.draw(best, 3, capacity=None, ties=ties(domains, step))
            assert np.abs(quota.carry).max() <= 1 + math.log(domains)


weight_lists = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.sampled_from([1e-300, 1.0])),
    min_size=1,
    max_size=10,
).filter(lambda values: sum(values) > 1e-200)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    weights=weight_lists,
    units=st.integers(1, 20),
    steps=st.integers(1, 12),
    before=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_a_block_is_within_one_unit(
    weights: list[float], units: int, steps: int, before: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    size = len(weights)
    quota, share = Quota(size), np.array(weights) / sum(weights)
    for step in range(before):
        quota.draw(random.dirichlet(np.ones(size)), units, capacity=None, ties=ties(size, step))
    total = np.zeros(size)
    for step in range(steps):
        assert quota.in_block == (step > 0)
        total += quota.draw(
            share,
            units,
            capacity=None,
            ties=ties(size, 100 + step),
            fresh_quota=steps if step == 0 else None,
        )
        inside = np.abs(total - share * units * (step + 1))
        assert inside.max() <= 1 + math.log(size) + SLACK
    assert np.abs(total - share * units * steps).max() < 1
    assert not total[share == 0].any()
    assert not quota.in_block
    assert not quota.carry.any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(1, 6), units=st.integers(4, 20), steps=st.integers(2, 8))
def test_weights_that_change_inside_a_block_are_followed(
    data: st.DataObject, size: int, units: int, steps: int
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    change = data.draw(st.integers(1, steps - 1))
    quota, asked, total = Quota(size), np.zeros(size), np.zeros(size)
    first, second = random.dirichlet(np.ones(size), 2)
    for step in range(steps):
        share = first if step < change else second
        asked += share * units
        total += quota.draw(
            share, units, capacity=None, ties=ties(size, step), fresh_quota=None if step else steps
        )
    # What was given before the change cannot be taken back; else the whole is within one.
    assert np.abs(total - asked).max() < 2
    assert (total - asked).sum() == pytest.approx(0)


def test_a_new_block_closes_the_old_one() -> None:
    quota = Quota(2)
    half = np.array([0.5, 0.5])
    quota.draw(half, 1, capacity=None, ties=ties(2), fresh_quota=10)
    counts = [
        quota.draw(half, 3, capacity=None, ties=ties(2), fresh_quota=None if step else 2)
        for step in range(2)
    ]
    assert sum(counts).tolist() == [3, 3]
    assert not quota.in_block


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    weights=weight_lists,
    capacity=st.lists(st.integers(0, 12), min_size=10, max_size=10),
    units=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_capacity_is_kept_and_used(
    weights: list[float], capacity: list[int], units: int, seed: int
) -> None:
    size = len(weights)
    share, most = np.array(weights) / sum(weights), np.array(capacity[:size])
    available = int(most[share > 0].sum())
    random = np.random.default_rng(seed)
    for draw in ("carry", "multinomial"):
        try:
            if draw == "carry":
                counts, carry = apportion(share * units, share, units, most, ties(size, seed))
                assert carry.sum() == pytest.approx(0, abs=1e-9)
            else:
                drawn = draw_multinomial(share, random.random(units), most, ties(units, seed))
                counts = np.bincount(drawn, minlength=size)
        except ExhaustedError:
            assert available < units
            continue
        assert counts.sum() == units
        assert (counts <= most).all()
        assert not counts[share == 0].any()
        assert available >= units
