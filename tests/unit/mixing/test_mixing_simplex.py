"""Arithmetic on the simplex, checked against conditions and against other ways to compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.mixing.simplex import exploration_rate, explore, normalise, project, softmax
from megatron.mixing.weights import (
    document_weights,
    natural_weights,
    nopack_weights,
    padded_windows,
    temperature_weights,
    uniform_weights,
)

SETTINGS = settings(derandomize=True, deadline=None, max_examples=300)


@st.composite
def problems(draw):
    count = draw(st.integers(1, 12))
    raw = draw(st.lists(st.floats(-2, 3), min_size=count, max_size=count))
    shares = np.array(draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count)))
    shares /= shares.sum()
    floor = shares * draw(st.sampled_from([0.0, 0.3, 0.99, 1.0]))
    ceiling = shares + (1 - shares) * draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    return np.array(raw), floor, ceiling


def by_bisection(p, floor, ceiling):
    """The same projection by 200 halvings of the shift."""
    low, high = (p - ceiling).min(), (p - floor).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if np.clip(p - middle, floor, ceiling).sum() > 1
            else (
                low,
                middle,
            )
        )
    return np.clip(p - (low + high) / 2, floor, ceiling)


@SETTINGS
@given(problem=problems())
def test_projection_is_feasible_and_nearest(problem):
    p, floor, ceiling = problem
    x = project(p, floor, ceiling)
    assert (x >= floor).all()
    assert (x <= ceiling).all()
    assert abs(x.sum() - 1) <= 1e-12
    np.testing.assert_allclose(x, by_bisection(p, floor, ceiling), atol=1e-9)
    # No feasible point is nearer: the gradient at x points away from each of them.
    for other in (project(np.roll(p, 1), floor, ceiling), project(-p, floor, ceiling)):
        assert (x - p) @ (other - x) >= -1e-9


@SETTINGS
@given(problem=problems())
def test_projection_leaves_what_is_feasible_as_it_is(problem):
    p, floor, ceiling = problem
    x = project(p, floor, ceiling)
    assert project(x, floor, ceiling).tobytes() == x.tobytes()


def test_projection_against_a_hand_computed_case():
    x = project(np.array([0.7, 0.2, 0.1]), np.array([0.0, 0.0, 0.25]), np.ones(3))
    np.testing.assert_allclose(x, [0.625, 0.125, 0.25], atol=1e-15)


def test_projection_of_many_domains():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(2000, 0.05))
    x = project(p, np.full(2000, 1e-4), np.full(2000, 0.01))
    assert abs(x.sum() - 1) <= 1e-12
    assert x.min() >= 1e-4
    assert x.max() <= 0.01


@SETTINGS
@given(
    scores=st.lists(
        st.one_of(st.floats(-50, 50), st.sampled_from([1e308, -1e308, 1.7e308, 0.0])), min_size=1
    )
)
def test_softmax_is_a_distribution_for_any_scores(scores):
    p = softmax(np.array(scores))
    assert np.isfinite(p).all()
    assert (p >= 0).all()
    assert abs(math.fsum(p) - 1) <= 1e-12


@pytest.mark.parametrize(
    "weights", [[1e308, 1e308, 1e308], [5e-324, 5e-324], [1e-310, 3e-310], [0.0, 2.0]]
)
def test_normalise_at_the_ends_of_the_range(weights):
    p = normalise(np.array(weights))
    assert abs(p.sum() - 1) <= 1e-12
    assert p[-1] / p.max() == pytest.approx(weights[-1] / max(weights))


def test_exploration_rate():
    assert exploration_rate(0, 5) == exploration_rate(1, 5) == 0.2
    assert exploration_rate(1000, 5) == math.sqrt(math.log(5) / 5000)
    assert exploration_rate(7, 1) == 0.0  # one domain leaves nothing to explore


@pytest.mark.parametrize("count", range(1, 200))
def test_full_exploration_is_uniform(count):
    p = explore(np.eye(count)[0], 1 / count)
    np.testing.assert_allclose(p, np.full(count, 1 / count), atol=1e-15)


class TestWeights:
    def test_uniform_and_natural(self):
        assert uniform_weights(4).tolist() == [0.25] * 4
        assert natural_weights([10, 30]).tolist() == [0.25, 0.75]

    def test_nopack_counts_padded_windows(self):
        counts = [padded_windows([1, 8, 9], 8), padded_windows([], 8), padded_windows([16], 8)]
        assert counts == [4, 0, 2]
        assert nopack_weights(counts).tolist() == [4 / 6, 0.0, 2 / 6]

    def test_temperature(self):
        counts = [100, 400, 0]
        np.testing.assert_allclose(temperature_weights(counts, 0.5), [1 / 3, 2 / 3, 0])
        np.testing.assert_allclose(temperature_weights(counts, 1), natural_weights(counts))
        assert temperature_weights(counts, 0).tolist() == [0.5, 0.5, 0.0]
        assert np.isfinite(temperature_weights([1e15, 1], 40)).all()

    def test_documents(self):
        q = np.array([0.2, 0.8])
        expected = q**0.3 * (1 - q)
        np.testing.assert_allclose(document_weights([20, 80]), expected / expected.sum())
        assert document_weights([7]).tolist() == [1.0]
        assert document_weights([7, 0]).tolist() == [1.0, 0.0]

    @pytest.mark.parametrize("bad", [[], [[1, 2]], [1, -1], [0, 0], [1, math.nan]])
    def test_bad_counts_are_refused(self, bad):
        for weights in (natural_weights, nopack_weights, document_weights):
            with pytest.raises(ConfigError):
                weights(bad)
        with pytest.raises(ConfigError):
            temperature_weights(bad, 0.5)

    @pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
    def test_bad_exponents_are_refused(self, alpha):
        for weights in (temperature_weights, document_weights):
            with pytest.raises(ConfigError, match="alpha"):
                weights([1, 2], alpha)

    def test_no_domain_is_no_mixture(self):
        with pytest.raises(ConfigError):
            uniform_weights(0)
        with pytest.raises(ConfigError):
            padded_windows([1], 0)
