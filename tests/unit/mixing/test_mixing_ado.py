"""ADO: its filter, its fit, its formula, and the laws that it finds in the simulator."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, build_mixer
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.power_law import fit_power_law, fit_power_laws
from megatron.mixing.simulate import simulate
from megatron.mixing.smoothing import SmoothedHistory
from megatron.mixing.worlds import PowerWorld


def filtered(values, window, order):
    """Savitzky-Golay with polynomials at the ends, one fit per value."""
    half, count, out = window // 2, len(values), []
    for place in range(count):
        start = min(max(place - half, 0), count - window)
        x = np.arange(start, start + window) - place
        out.append(np.polyfit(x, values[start : start + window], order)[-1])
    return np.array(out)


@pytest.mark.parametrize("count", [9, 10, 23, 57])
@pytest.mark.parametrize("every", [1, 4, 10])
def test_the_growing_filter_is_that_of_the_whole_history(count, every):
    rng = np.random.default_rng(count)
    values = rng.normal(3, 1, (count, 2))
    history = SmoothedHistory(window=9, order=3, every=every)
    for row in values:
        history.append(row)
    expected = np.stack([filtered(values[:, k], 9, 3) for k in range(2)], axis=1)
    np.testing.assert_allclose(history.values(), expected[::every], atol=1e-10)
    assert len(history) == count


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_a_history_shorter_than_the_window_takes_the_largest_that_fits(count):
    values = np.random.default_rng(count).normal(3, 1, (count, 1))
    history = SmoothedHistory(window=9, order=3, every=1)
    for row in values:
        history.append(row)
    odd = count if count % 2 else count - 1
    expected = filtered(values[:, 0], odd, 3) if odd > 3 else values[:, 0]
    np.testing.assert_allclose(history.values()[:, 0], expected, atol=1e-10)


def test_a_domain_that_comes_late_counts_as_if_it_had_always_been_so():
    history = SmoothedHistory(window=5, order=1, every=1)
    for value in (math.nan, math.nan, 4.0, 4.0, 4.0, 4.0):
        history.append(np.array([1.0, value]))
    np.testing.assert_allclose(history.values()[:, 1], 4.0)


LAWS = [(0.0, 12.0, 0.3), (1.7, 9.0, 0.15), (0.4, 300.0, 0.7), (2.5, 3.0, 0.05)]


@pytest.mark.parametrize(("epsilon", "beta", "alpha"), LAWS)
def test_a_law_without_noise_is_found(epsilon, beta, alpha):
    n = 256.0 * np.arange(1, 2001)
    law = fit_power_law(n, epsilon + beta * n**-alpha)
    assert law.alpha == pytest.approx(alpha, rel=1e-2)
    assert law.epsilon == pytest.approx(epsilon, abs=2e-2)
    np.testing.assert_allclose(
        law.epsilon + law.beta * n**-law.alpha, epsilon + beta * n**-alpha, rtol=1e-4
    )


def objective(log_loss, log_n, epsilon, log_beta, alpha):
    r = np.abs(log_loss - np.log(epsilon + np.exp(log_beta - alpha * log_n)))
    return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).mean()


def test_outliers_count_little_and_no_grid_point_is_better():
    rng = np.random.default_rng(0)
    n = 64.0 * np.arange(1, 801)
    loss = (1.2 + 20 * n**-0.35) * np.exp(rng.normal(0, 0.01, n.size))
    loss[::17] *= 1.5
    law = fit_power_law(n, loss)
    assert law.alpha == pytest.approx(0.35, abs=0.03)
    assert law.epsilon == pytest.approx(1.2, abs=0.05)
    log_n, log_loss = np.log(n), np.log(loss)
    reached = objective(log_loss, log_n, law.epsilon, math.log(law.beta), law.alpha)
    best = min(
        objective(log_loss, log_n, e, b, a)
        for e in np.linspace(0, 1.5, 31)
        for a in np.linspace(0.05, 0.8, 31)
        for b in np.linspace(0, 6.5, 40)
    )
    assert reached <= best


PLAIN = {
    40: [
        (0.0, 11.990880680441382, 0.2999194949388685),
        (1.597172883800023, 8.952682613146205, 0.14462054637432137),
        (0.3891666436137936, 286.70485807193165, 0.6924985688001204),
        (3.100173393969765, 4.248313144084892, 0.1275131117912323),
    ],
    700: [
        (5.883900769384101e-05, 12.003285061661533, 0.3000386822520256),
        (1.688162936846329, 8.974264337033745, 0.14910295255341743),
        (0.4007099300950669, 309.182540395635, 0.7034345919049036),
        (3.5889022017234966, 2.8655233683151557, 0.13671983658975623),
    ],
}
"""What the plain algorithm finds (every start, every step, nothing kept): epsilon, beta, alpha."""


@pytest.mark.parametrize("points", PLAIN)
def test_laws_are_those_of_the_plain_algorithm(points):
    rng = np.random.default_rng(points)
    n = 480.0 * np.arange(1, points + 1)
    losses = [
        (epsilon + beta * n**-alpha) * np.exp(noise * rng.normal(size=points))
        for (epsilon, beta, alpha), noise in zip(LAWS, (3e-4, 1e-3, 0.01, 0.03), strict=True)
    ]
    for loss, plain in zip(losses, PLAIN[points], strict=True):
        law = fit_power_law(n, loss)
        assert (law.epsilon, law.beta, law.alpha) == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("points", [5, 40, 300])
def test_many_laws_at_once_are_each_by_itself(points):
    rng = np.random.default_rng(1)
    n = np.cumsum(rng.uniform(100, 500, (points, 23)), axis=0)
    loss = (rng.uniform(0, 2, 23) + 9 * n**-0.2) * np.exp(rng.normal(0, 0.01, n.shape))
    loss[rng.random(n.shape) < 0.02] = np.nan  # so that not all have equally many
    loss[:, 3], loss[3:, 5] = np.nan, -1.0
    together = fit_power_laws(n, loss, least_epsilon=0.1)
    alone = [fit_power_law(n[:, k], loss[:, k], least_epsilon=0.1) for k in range(23)]
    assert repr(together) == repr(alone)  # NaN where there is none
    assert not together[3].finite
    assert not together[5].finite
    assert sum(law.finite for law in together) >= 20


def test_the_bounds_hold():
    n = 10.0 * np.arange(1, 500)
    steep = fit_power_law(n, 1e5 * n**-1.5 + 0.2, least_epsilon=0.5)
    assert steep.epsilon >= 0.5
    assert 0.001 <= steep.alpha <= 0.8
    assert math.log(steep.beta) <= 6.5 + 1e-9
    rising = fit_power_law(n, 2 + 1e-3 * n)
    assert rising.alpha >= 0.001
    assert rising.epsilon >= 0
    assert not fit_power_law(n[:3], n[:3]).finite
    assert not fit_power_law(n, np.full(n.size, -1.0)).finite
    assert fit_power_law(n, np.full(n.size, 1e300)).epsilon >= 0


def world(alpha=(0.3, 0.2, 0.5)):
    return PowerWorld(
        epsilon=np.array([1.0, 2.0, 0.3]),
        beta=np.array([10.0, 8.0, 40.0]),
        alpha=np.array(alpha),
        transfer=np.eye(3),
        batch=64,
        offset=64 / 3,  # so that the first sample counts as the first
    )


@pytest.mark.parametrize(("window", "order", "within"), [(1, 0, 0.02), (101, 3, 0.08)])
def test_it_recovers_the_laws_of_a_run(window, order, within):
    """Without the filter, which bends the steep first steps, to the digit."""
    true = world()
    mixer = build_mixer(
        "ado",
        domains=["d0", "d1", "d2"],
        context=RunContext(samples_per_step=64),
        count="own",
        first_fit=500,
        fit_every=500,
        smoothing_window=window,
        smoothing_order=order,
    )
    simulate(mixer, true, steps=3000, batch=64)
    shown = mixer.describe()
    for k, name in enumerate(["d0", "d1", "d2"]):
        assert shown["alpha"][name] == pytest.approx(true.alpha[k], rel=within)
        assert shown["beta"][name] == pytest.approx(true.beta[k], rel=2 * within)
        assert shown["epsilon"][name] == pytest.approx(true.epsilon[k], abs=within)


@pytest.mark.parametrize("count", ["all", "own"])
@pytest.mark.parametrize("credit", ["paper", "released"])
def test_the_formula(count, credit):
    """The weights of every step, computed from the laws that the log shows."""
    domains, mu = ["a", "b", "c"], np.array([0.5, 0.3, 0.2])
    mixer = build_mixer(
        "ado",
        domains=domains,
        weights=mu,
        count=count,
        credit=credit,
        first_fit=40,
        fit_every=30,
        smoothing_window=11,
        subsample=3,
        context=RunContext(samples_per_step=20),
    )
    rng = np.random.default_rng(5)
    h, mean, expected, seen, fits = mu, mu, mu, np.zeros(3), 0
    for step in range(1, 121):
        p = mixer.decide(step).sampling_weights
        np.testing.assert_allclose(p, expected, atol=1e-12)
        counts = rng.multinomial(20, p).astype(float)
        losses = np.array([1.0, 0.5, 2.0]) + 4 * np.maximum(20 * step * mu, 1) ** -np.array(
            [0.3, 0.5, 0.2]
        )
        before = mixer.describe().get("alpha")
        mixer.observe(Observation(step, loss_sum=losses * counts * 8, token_count=counts * 8))
        after = mixer.describe()
        fits += after.get("alpha") != before
        assert (after.get("alpha") != before) == (step in (40, 70, 100))
        h = 0.9 * h + 0.1 * counts / 20
        seen = seen + counts
        if step < 40:
            continue
        n = seen if count == "own" else np.full(3, seen.sum())
        alpha, beta = (
            np.array([after[key][name] for name in domains]) for key in ("alpha", "beta")
        )
        speed = np.maximum(alpha, 0.05) * (beta * n**-alpha) / n
        rho = mu * (h if credit == "paper" else h * (1 - h)) ** 0.5 * speed
        rho = np.maximum(rho / rho.sum(), 0.01)
        rho = rho / rho.sum()
        expected = 0.9 * mean + 0.1 * rho
        mean = mean + (rho - mean) / (step + 1)
    assert fits == 3


def test_it_resumes_with_the_same_bits_around_a_fit():
    options = {"first_fit": 30, "fit_every": 20, "smoothing_window": 9, "subsample": 2}
    names = ["d0", "d1", "d2"]
    whole, true = build_mixer("ado", domains=names, **options), world()
    mixer = build_mixer("ado", domains=names, **options)
    for step in range(1, 91):
        fresh = build_mixer("ado", domains=names, **options)
        fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
        mixer = fresh
        p = whole.decide(step).sampling_weights
        assert mixer.decide(step).sampling_weights.tobytes() == p.tobytes()
        counts = [30 + step % 3, 20, 0 if step % 2 else 14]
        seen = Observation(step, loss_sum=true.losses() * counts, token_count=counts)
        true.train(p)
        whole.observe(seen)
        mixer.observe(seen)


def test_a_fit_that_falls_on_a_skipped_step_is_made_at_the_next():
    mixer = build_mixer("ado", domains=["a", "b"], first_fit=20, fit_every=20, subsample=1)
    for step in range(1, 31):
        loss = math.nan if step in (20, 21) else 1 + 5 * step**-0.5
        mixer.observe(Observation(step, loss_sum=[loss] * 2, token_count=[1, 1]))
        assert ("alpha" in mixer.describe()) == (step >= 22)


def test_without_a_law_of_every_domain_the_given_weights_hold():
    mixer = build_mixer("ado", domains=["a", "b"], weights=[3, 1], first_fit=20)
    for step in range(1, 40):
        mixer.observe(Observation(step, loss_sum=[1 + 5 * step**-0.5, 0], token_count=[1, 0]))
    assert mixer.decide(40).sampling_weights.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("damage", [{"laws": {}}, {"credit": {}}, {"losses": {}}, {"next_fit": 0}])
def test_a_damaged_state_is_refused(damage):
    mixer = build_mixer("ado", domains=["a", "b"])
    mixer.observe(Observation(1, loss_sum=[1.0, 2.0], token_count=[1, 1]))
    state = mixer.state_dict()
    with pytest.raises(CheckpointError):
        mixer.load_state_dict(state | {"rule": state["rule"] | damage})
    assert mixer.state_dict() == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_fit": 0}, "first_fit is 0"),
        ({"smoothing_window": 10}, "smoothing_window is 10; it must be odd"),
        ({"smoothing_window": 3}, "smoothing_order is 3; .* below smoothing_window"),
        ({"least_epsilon": -1.0}, "least_epsilon is -1.0"),
        ({"count": "tokens"}, "count is 'tokens'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_mixer("ado", domains=["a", "b"], **options)
