"""ADO with a discount of repeated data: the formula, and what it wins where data is scarce."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, build_mixer
from megatron.errors import ConfigError
from megatron.mixing.simulate import simulate
from megatron.mixing.worlds import PowerWorld, scarce_world

NAMES = ["a", "b", "c"]
SIZES = (200.0, 5000.0, 800.0)
COUNTS = np.array([30.0, 30.0, 40.0])
FITS = {"first_fit": 20, "fit_every": 1000}
SMOOTHING = {"smoothing_window": 1, "smoothing_order": 0, "subsample": 1}


def worth(drawn, unique, star):
    """What D is worth, and what one more is, in plain Python."""
    if drawn <= unique:
        return drawn, 1.0
    again = drawn / unique - 1
    return unique + unique * star * (1 - math.exp(-again / star)), math.exp(-again / star)


def run(steps, **options):
    context = RunContext(samples_per_step=100, samples_per_epoch=SIZES)
    mixer = build_mixer("ado", domains=NAMES, context=context, **FITS, **SMOOTHING, **options)
    for step in range(1, steps + 1):
        losses = np.array([1.0, 1.5, 0.5]) + np.array([4.0, 3.0, 6.0]) * step**-0.4
        mixer.observe(
            Observation(step, loss_sum=losses * COUNTS, token_count=COUNTS, sample_count=COUNTS)
        )
    return mixer


@pytest.mark.parametrize("count", ["all", "own"])
def test_it_counts_in_n_and_in_the_slope(count):
    """p at the first step with laws, from the laws that it shows, one domain at a time."""
    star, steps = 5.0, 20
    mixer = run(steps, r_star=star, count=count)
    shown = mixer.describe()
    pairs = [worth(steps * n, u, star) for n, u in zip(COUNTS, SIZES, strict=True)]
    assert [value < 1 for _, value in pairs] == [True, False, False]
    raw = []
    for k, name in enumerate(NAMES):
        n = pairs[k][0] if count == "own" else sum(value for value, _ in pairs)
        law = {key: shown[key][name] for key in ("epsilon", "beta", "alpha")}
        speed = max(law["alpha"], 0.05) * law["beta"] * n ** -law["alpha"] / n
        share = 1 / 3 * 0.9**steps + COUNTS[k] / 100 * (1 - 0.9**steps)
        raw.append(math.sqrt(share) * speed * pairs[k][1])
    rho = np.maximum(np.array(raw) / sum(raw), 0.01)
    rho = rho / rho.sum()
    expected = 0.9 / 3 + 0.1 * rho
    np.testing.assert_allclose(mixer.decide(steps + 1).sampling_weights, expected, rtol=1e-9)


def test_without_repetition_it_changes_nothing():
    plain, large = run(30), run(30, r_star=1e12)
    np.testing.assert_allclose(
        plain.decide(31).sampling_weights, large.decide(31).sampling_weights, rtol=1e-6
    )
    assert (
        run(30, r_star=15.4).decide(31).sampling_weights[0] < plain.decide(31).sampling_weights[0]
    )


def test_it_needs_the_sizes_and_a_number_above_0():
    with pytest.raises(ConfigError, match="r_star is given, but the samples of each domain"):
        build_mixer("ado", domains=NAMES, r_star=15.4)
    with pytest.raises(ConfigError, match="r_star is 0; it must be above 0, or null"):
        run(1, r_star=0)


def test_a_world_where_data_repeats():
    world = PowerWorld(
        epsilon=np.array([1.0]), beta=np.array([5.0]), alpha=np.array([0.3]),
        transfer=np.eye(1), batch=10, offset=50.0, unique=np.array([100.0]),
    )  # fmt: skip
    for _ in range(40):
        world.train(np.ones(1))
    value, next_ = worth(400.0, 100.0, 15.4)
    assert world.losses()[0] == pytest.approx(1 + 5 * (50 + value) ** -0.3, rel=1e-12)
    slope = 0.3 * 5 * (50 + value) ** -1.3 * 10 * next_
    assert world.slopes()[0, 0] == pytest.approx(slope, rel=1e-12)


def test_where_data_is_scarce_the_discount_wins():
    steps = 2000
    world = scarce_world(steps=steps)
    best = world.best_fixed(steps)
    assert best.gap < 1e-9
    context = RunContext(
        total_steps=steps, samples_per_step=256, samples_per_epoch=tuple(world.unique)
    )
    ends = {}
    for star in (None, 15.4):
        mixer = build_mixer(
            "ado", domains=list(world.domains), context=context,
            first_fit=200, fit_every=200, r_star=star,
        )  # fmt: skip
        result = simulate(mixer, world, steps=steps, noise=1.0, record_every=steps)
        ends[star] = result.final - best.value
    assert 0 <= ends[15.4] < 0.5 * ends[None]


@pytest.mark.parametrize("method", ["ado", "odm"])
def test_a_limit_holds_in_a_simulated_run(method):
    steps = 400
    world = scarce_world(steps=steps)
    context = RunContext(
        total_steps=steps, samples_per_step=256, samples_per_epoch=tuple(world.unique)
    )
    options = {"first_fit": 50, "fit_every": 50} if method == "ado" else {}
    mixer = build_mixer(
        method, domains=list(world.domains), context=context, max_epochs=3.0, **options
    )
    result = simulate(mixer, world, steps=steps, record_every=steps)
    passes = result.drawn / world.unique
    assert (result.drawn <= 3 * world.unique + 3).all()
    assert passes.max() == pytest.approx(3.0, abs=0.01)
