"""The linear dynamic law, and how near a method's matrix is to it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron.errors import ConfigError
from megatron.experiments.bounds import free_bounds
from megatron.experiments.designs import one_hot, well_spread
from megatron.experiments.dynamic_law import fidelity, fit_dynamic_law, mean_fidelity


@pytest.mark.parametrize("domains", [2, 3, 7])
def test_the_matrix_is_recovered(domains):
    random = np.random.default_rng(domains)
    matrix = random.normal(0.1, 0.05, (domains + 1, domains))
    parent = random.uniform(2, 3, domains + 1)
    for mixtures in (
        one_hot(free_bounds(domains)),
        well_spread(free_bounds(domains), count=3 * domains, seed=1),
    ):
        law = fit_dynamic_law(parent, mixtures, parent - mixtures @ matrix.T)
        np.testing.assert_allclose(law.matrix, matrix, atol=1e-10)
        np.testing.assert_allclose(law.predict(mixtures), parent - mixtures @ matrix.T)
        assert (law.r2 > 1 - 1e-9).all()


def test_noise_is_averaged_over_children_and_shows_in_r2():
    random = np.random.default_rng(0)
    matrix, parent = np.array([[0.4, 0.1], [0.0, 0.3]]), np.array([3.0, 2.0])
    mixtures = well_spread(free_bounds(2), count=200, seed=0)
    noise = 0.05 * random.normal(size=(200, 2))
    law = fit_dynamic_law(parent, mixtures, parent - mixtures @ matrix.T + noise)
    np.testing.assert_allclose(law.matrix, matrix, atol=0.02)
    assert (law.r2 < 0.95).all()
    assert (law.r2 > 0.3).all()


@pytest.mark.parametrize(
    ("parent", "mixtures", "message"),
    [
        (np.ones(2), np.full((4, 2), 0.5), "only 1 independent"),
        (np.ones(3), np.eye(2), "2 are needed"),
        (np.array([1.0, np.nan]), np.eye(2), "2 are needed"),
    ],
)
def test_children_that_do_not_tell_are_refused(parent, mixtures, message):
    with pytest.raises(ConfigError, match=message):
        fit_dynamic_law(parent, mixtures, np.ones((len(mixtures), 2)))


def test_fidelity_is_half_cosine_and_half_spearman():
    random = np.random.default_rng(1)
    for _ in range(20):
        ours, theirs = random.normal(size=(2, 4, 5))
        a, b = ours.sum(axis=0), theirs.sum(axis=0)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        expected = 0.5 * cosine + 0.5 * stats.spearmanr(a, b).statistic
        assert fidelity(ours, theirs) == pytest.approx(expected)
        assert fidelity(a, 7 * theirs) == pytest.approx(expected)
    assert fidelity(ours, ours) == pytest.approx(1.0)
    assert fidelity(ours, -ours) == pytest.approx(-1.0)


def test_a_matrix_that_knows_nothing():
    truth = np.array([[0.1, 0.2, 0.4]])
    flat = fidelity(np.ones((1, 3)), truth)  # uniform: a direction, and no order
    assert flat == pytest.approx(0.5 * truth.sum() / np.sqrt(3) / np.linalg.norm(truth))
    assert fidelity(np.zeros((1, 3)), truth) == 0.0
    assert mean_fidelity([truth, np.zeros((1, 3))], [truth, truth]) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="compares 2 domains with 3"):
        fidelity(np.ones(2), truth)
