"""Power laws in steps and sizes, alone and nested."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.experiments.bounds import free_bounds
from megatron.experiments.designs import grid
from megatron.experiments.static_law import StaticLaw, fit_static_law
from megatron.experiments.step_law import Curve, fit_power_curves, nested_losses

STEPS = np.array([200, 400, 800, 1200, 1600, 2000], dtype=np.float64)


@pytest.mark.parametrize("exponent", [0.08, 0.5, 1.2])
@pytest.mark.parametrize("constant", [0.0, 2.0])
@pytest.mark.parametrize("shared", [False, True])
def test_a_curve_is_recovered_and_carried_on(exponent, constant, shared):
    curves = np.stack([constant + b * (STEPS / 500) ** -exponent for b in (0.5, 1.5)])
    law = fit_power_curves(STEPS, curves, shared_exponent=shared)
    np.testing.assert_allclose(law.exponent, exponent, rtol=1e-3)
    truth = constant + np.array([0.5, 1.5]) * (20_000 / 500) ** -exponent
    np.testing.assert_allclose(law.predict(20_000), truth, rtol=1e-3)
    assert (law.r2 > 0.9999).all()


def test_one_wrong_point_hardly_counts():
    curve = 1.5 + 2.0 * STEPS**-0.3
    wrong = curve.copy()
    wrong[2] += 0.5
    law = fit_power_curves(STEPS, wrong[None])
    assert law.predict(4000)[0] == pytest.approx(1.5 + 2.0 * 4000**-0.3, abs=5e-3)


def test_sharing_the_exponent_steadies_the_prediction():
    random = np.random.default_rng(0)
    truth = np.stack([1.0 + b * STEPS**-0.5 for b in np.linspace(10, 20, 12)])
    noisy = truth * np.exp(2e-3 * random.normal(size=truth.shape))
    target = 1.0 + np.linspace(10, 20, 12) * 50_000**-0.5
    error = {
        shared: np.abs(
            fit_power_curves(STEPS, noisy, shared_exponent=shared).predict(50_000) - target
        ).max()
        for shared in (False, True)
    }
    assert error[True] < 0.7 * error[False]


LAW = StaticLaw(constant=np.array([1.0, 0.6]), rate=np.array([[1.2, 0.1], [-0.1, 0.9]]))


def loss(mixture, size, steps):
    """Losses [P, M] that obey all three laws."""
    return (
        LAW.predict(mixture)
        + 40 * steps[:, None] ** -0.6 * mixture.max()
        + 3e3 * float(size) ** -0.9
    )


def curves(sizes, steps=STEPS):
    return [
        Curve(mixture=p, size=size, steps=steps, losses=loss(p, size, steps))
        for p in grid(free_bounds(2), parts=6)
        for size in sizes
    ]


def test_nested_laws_reach_the_target_and_the_mixing_law_beyond_it():
    found = nested_losses(curves([1e4, 3e4, 1e5]), steps=20_000, size=1e7)
    truth = np.concatenate([loss(p, 1e7, np.array([20_000.0])) for p in found.mixtures])
    np.testing.assert_allclose(found.losses, truth, atol=5e-3)
    assert found.step_r2 is not None
    assert found.size_r2 is not None
    assert min(found.step_r2, found.size_r2) > 0.999
    assert (fit_static_law(found.mixtures, found.losses).r2 > 0.99).all()


def test_what_was_measured_is_taken_as_it_is():
    found = nested_losses(curves([1e4]), steps=2000, size=1e4)
    expected = np.concatenate([loss(p, 1e4, np.array([2000.0])) for p in found.mixtures])
    assert (found.losses == expected).all()
    assert found.step_r2 is None
    assert found.size_r2 is None


@pytest.mark.parametrize(
    ("given", "target", "message"),
    [
        (curves([1e4, 1e5]), (2000, 1e6), "needs 3 different steps or sizes, 2 are there"),
        (curves([1e4], STEPS[:2]), (2000, 1e4), "needs 3 different"),
        (curves([1e4, 1e5])[:-1], (2000, 1e4), "no run of 100,000"),
        (curves([1e4]) + curves([1e4])[:1], (2000, 1e4), "two runs"),
        (curves([1e4])[:1] + curves([1e4], STEPS[1:])[1:], (2000, 1e4), "different steps"),
        ([], (2000, 1e4), "no curves"),
    ],
)
def test_runs_that_do_not_allow_it_are_refused(given, target, message):
    with pytest.raises(ConfigError, match=message):
        nested_losses(given, steps=target[0], size=target[1])
