"""Noise: standard errors of each domain's loss, alone and pooled, and least evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer
from megatron.mixing.observation import standard_error
from megatron.mixing.window import Window

RNG_SEED = 5
TOKENS = 64


def step_of(step, samples):
    """Return a step whose domains have these per-sample mean losses."""
    return Observation(
        step,
        loss_sum=[TOKENS * float(np.sum(values)) for values in samples],
        token_count=[TOKENS * len(values) for values in samples],
        loss_square_sum=[float(np.sum(np.square(values))) for values in samples],
        sample_count=[len(values) for values in samples],
    )


def test_it_is_the_textbooks():
    rng = np.random.default_rng(RNG_SEED)
    samples = [rng.normal(3.0, 0.7, 40), rng.normal(1.0, 0.01, 7), rng.normal(2.0, 1.0, 2)]
    expected = [np.std(values, ddof=1) / math.sqrt(len(values)) for values in samples]
    np.testing.assert_allclose(step_of(1, samples).standard_error, expected, rtol=1e-6)


def test_below_two_samples_there_is_none():
    found = step_of(1, [[2.0, 3.0], [2.0], []]).standard_error
    assert found[0] == pytest.approx(0.5)
    assert np.isnan(found[1:]).all()
    assert Observation(1, loss_sum=[1.0], token_count=[1]).standard_error is None


def test_equal_samples_have_none_and_rounding_makes_no_root_of_a_negative():
    loss = 3.1234567
    found = standard_error(
        np.array([loss * 1000]), np.array([1000.0]), np.array([10 * loss**2 * (1 - 1e-15)]),
        np.array([10.0]),
    )  # fmt: skip
    assert 0 <= found[0] < 1e-6


def test_it_says_how_far_a_mean_lies_from_the_truth():
    """Over many steps the distance from the truth, in standard errors, has variance 1."""
    rng = np.random.default_rng(RNG_SEED)
    distances = []
    for step in range(1, 2001):
        observed = step_of(step, [rng.normal(2.0, 0.5, 30)])
        mean = observed.vector("loss_sum") / observed.vector("token_count")
        distances.append(float((mean - 2.0)[0] / observed.standard_error[0]))
    assert np.std(distances) == pytest.approx(1.0, abs=0.08)


def test_a_window_pools_samples_and_not_errors():
    rng = np.random.default_rng(RNG_SEED)
    parts = [[rng.normal(3.0, 0.7, n), rng.normal(1.0, 0.3, n + 2)] for n in (4, 9, 2)]
    window = Window.empty(2)
    for step, samples in enumerate(parts, start=1):
        window = window.add(step_of(step, samples), np.array([0.5, 0.5]))
    whole = [np.concatenate([part[k] for part in parts]) for k in range(2)]
    expected = [np.std(values, ddof=1) / math.sqrt(len(values)) for values in whole]
    np.testing.assert_allclose(window.standard_error, expected, rtol=1e-9)
    assert np.isnan(Window.empty(2).standard_error).all()


def test_least_evidence_waits_for_tokens_of_each_domain():
    """An estimate moves with the step that brings its domain to min_tokens, and not before."""
    mixer = build_mixer("smoothed_mean", domains=["a", "b"], min_tokens=100, smoothing_factor=0.0)
    for step, (common, rare, known) in enumerate(
        [(100, 40, {"a"}), (100, 40, {"a"}), (100, 40, {"a", "b"})], start=1
    ):
        mixer.observe(
            Observation(step, loss_sum=[2.0 * common, 3.0 * rare], token_count=[common, rare])
        )
        estimate = mixer.describe()["estimate"]
        assert {name for name, value in estimate.items() if value} == known
    assert mixer.describe()["estimate"]["b"] == pytest.approx(math.exp(3.0))
