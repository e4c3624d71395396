"""What holds for every registered method, whatever it observes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mixing import ALONE, LEDGERS, build_any, go

from data_sampling_utils import Observation, available_methods
from megatron.mixing.reported import Reported

TOLERANCE = 1e-12
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
LOSS = st.one_of(
    st.floats(0, 12),
    st.sampled_from([0.0, 1e-300, 5e-324, 60.0, 800.0, 1e150, 1e300, 1.7e308, -3.0, -1e300]),
)
BROKEN = st.sampled_from([math.nan, math.inf, -math.inf])
COUNT = st.one_of(st.just(0.0), st.integers(1, 10**12).map(float))


@st.composite
def set_up(draw):
    """Domains, weights and the common options, with floors and ceilings that can be met."""
    count = draw(st.integers(1, 6))
    weights = draw(
        st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=count, max_size=count)
    )
    if not any(weights):
        weights[draw(st.integers(0, count - 1))] = 1.0
    shares = np.array(draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count)))
    shares /= shares.sum()  # a distribution that the bounds leave room for
    floor = (shares * draw(st.floats(0, 1))).tolist()
    ceiling = (shares + (1 - shares) * draw(st.floats(0, 1))).tolist()
    return {
        "domains": [f"d{i}" for i in range(count)],
        "weights": weights,
        "floor": floor,
        "ceiling": [min(1.0, max(c, f)) for c, f in zip(ceiling, floor, strict=True)],
        "warmup_steps": draw(st.sampled_from([0, 0, 0, 1, 3])),
        "update_every": draw(st.sampled_from([1, 1, 2, 3])),
        "pool": draw(st.booleans()),
    }


@st.composite
def observations(draw, count, *, broken=True):
    """A run's worth of observations, with gaps, absent domains and broken sums."""
    step, made = 0, []
    for _ in range(draw(st.integers(1, 8))):
        step += draw(st.sampled_from([1, 1, 1, 2, 40]))
        loss = draw(st.lists(LOSS, min_size=count, max_size=count))
        tokens = draw(st.lists(COUNT, min_size=count, max_size=count))
        if broken and draw(st.integers(0, 5)) == 0:
            loss[draw(st.integers(0, count - 1))] = draw(BROKEN)
        with np.errstate(over="ignore"):
            sums = np.array(loss) * np.maximum(np.array(tokens), 1.0)
        sums = np.where(np.isinf(sums) & np.isfinite(loss), loss, sums)
        made.append(Observation(step, loss_sum=sums, token_count=tokens))
    return made


@st.composite
def runs(draw, *, broken=True):
    arguments = draw(set_up())
    return arguments, draw(observations(len(arguments["domains"]), broken=broken))


def weights_of(mixer, step):
    return mixer.decide(step=step).sampling_weights


def check_weights(p, arguments):
    assert p.dtype == np.float64
    assert p.shape == (len(arguments["domains"]),)
    assert np.isfinite(p).all()
    assert (p >= 0).all()
    assert abs(math.fsum(p) - 1) <= TOLERANCE
    assert (p >= np.array(arguments["floor"]) - TOLERANCE).all()
    assert (p <= np.array(arguments["ceiling"]) + TOLERANCE).all()


@pytest.mark.parametrize("method", available_methods())
@SETTINGS
@given(run=runs())
def test_weights_are_a_distribution_within_the_bounds(method, run):
    arguments, observed = run
    mixer = build_any(method, **arguments)
    check_weights(weights_of(mixer, 1), arguments)
    for observation in observed:
        go(mixer, observation)
        check_weights(weights_of(mixer, observation.step + 1), arguments)
        json.dumps([mixer.state_dict(), mixer.describe()], allow_nan=False)


@pytest.mark.parametrize("method", available_methods())
@SETTINGS
@given(run=runs(broken=False), data=st.data())
def test_a_broken_loss_changes_nothing(method, run, data):
    arguments, observed = run
    mixer = build_any(method, **arguments)
    for observation in observed:
        go(mixer, observation)
    count = len(arguments["domains"])
    loss = [2.0] * count
    loss[data.draw(st.integers(0, count - 1))] = data.draw(BROKEN)
    before, step = mixer.state_dict(), observed[-1].step + 1
    p = weights_of(mixer, step + 1)
    mixer.observe(Observation(step, loss_sum=loss, token_count=[5.0] * count))
    assert mixer.state_dict() == before
    assert weights_of(mixer, step + 1).tobytes() == p.tobytes()


@pytest.mark.parametrize("method", available_methods())
@SETTINGS
@given(run=runs())
def test_decide_is_pure_and_hands_out_copies(method, run):
    arguments, observed = run
    mixer = build_any(method, **arguments)
    for observation in observed:
        go(mixer, observation)
    before = json.dumps(mixer.state_dict())
    step = observed[-1].step + 1
    first = weights_of(mixer, step)
    kept = first.copy()
    first[:] = -1.0
    mixer.decide(step=step + 1000)
    assert weights_of(mixer, step).tobytes() == kept.tobytes()
    assert json.dumps(mixer.state_dict()) == before


@pytest.mark.parametrize("method", available_methods())
@SETTINGS
@given(run=runs(), data=st.data())
def test_a_restored_mixer_goes_on_with_the_same_bits(method, run, data):
    arguments, observed = run
    whole = build_any(method, **arguments)
    cut = data.draw(st.integers(0, len(observed)))
    for observation in observed[:cut]:
        go(whole, observation)
    text = json.dumps(whole.state_dict(), allow_nan=False)
    resumed = build_any(method, **arguments)
    resumed.load_state_dict(json.loads(text))
    assert json.dumps(resumed.state_dict()) == text
    for observation in observed[cut:]:
        go(whole, observation)
        go(resumed, observation)
        step = observation.step + 1
        assert weights_of(whole, step).tobytes() == weights_of(resumed, step).tobytes()
    assert json.dumps(whole.state_dict()) == json.dumps(resumed.state_dict())


def estimates(mixer):
    """The per-domain estimates that a method shows, whatever it calls them."""
    shown = mixer.describe()
    return {
        key: value
        for key, value in shown.items()
        if isinstance(value, dict)
        and value.keys() == set(mixer.domains)
        # Of sum 1, or carried to the end of the run and pooled: they move with step and others.
        and key not in ("weights", "domain_weights", "gain")
    }


@pytest.mark.parametrize("method", available_methods())
@SETTINGS
@given(run=runs(broken=False))
def test_an_absent_domain_keeps_its_estimate(method, run):
    arguments, observed = run
    mixer = build_any(method, **arguments | {"update_every": 1})
    for observation in observed:
        before = estimates(mixer)
        go(mixer, observation)
        after = estimates(mixer)
        for name, tokens in zip(mixer.domains, observation.token_count, strict=True):
            for key in before:
                assert tokens > 0 or after[key][name] == before[key][name]


@pytest.mark.parametrize("method", available_methods())
@SETTINGS
@given(run=runs(broken=False), seed=st.integers(0, 2**32 - 1))
def test_the_loss_sum_of_an_absent_domain_is_never_read(method, run, seed):
    arguments, observed = run
    noise = np.random.default_rng(seed)
    clean, noisy = build_any(method, **arguments), build_any(method, **arguments)
    for observation in observed:
        tokens = np.array(observation.token_count)
        sums = np.where(tokens > 0, observation.loss_sum, 0.0)
        garbage = np.where(tokens > 0, sums, noise.normal(0, 1e6, len(tokens)))
        clean.observe(Observation(observation.step, loss_sum=sums, token_count=tokens))
        noisy.observe(Observation(observation.step, loss_sum=garbage, token_count=tokens))
        assert clean.state_dict() == noisy.state_dict()


@pytest.mark.parametrize("method", available_methods())
def test_huge_rewards_stay_finite(method):
    mixer = build_any(method, domains=["a", "b", "c"], weights=[1e-12, 0.5, 0.5], update_every=2)
    for step in range(1, 41):
        observation = Observation(step, loss_sum=[1e300, 1.7e308, 2.0], token_count=[1.0, 1.0, 1.0])
        go(mixer, observation)
        p = weights_of(mixer, step + 1)
        assert np.isfinite(p).all()
        assert abs(p.sum() - 1) <= TOLERANCE
    json.dumps(mixer.state_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ALONE)
def test_a_single_domain_always_has_weight_one(method):
    mixer = build_any(method, domains=["only"], weights=[3.0])
    for step in range(1, 20):
        assert weights_of(mixer, step).tolist() == [1.0]
        mixer.observe(Observation(step, loss_sum=[step * 2.0], token_count=[4]))


@pytest.mark.parametrize("method", available_methods())
def test_every_method_builds_without_options_and_starts_uniform(method):
    mixer = build_any(method, domains=["a", "b", "c", "d"])
    assert weights_of(mixer, 1).tolist() == [0.25] * 4


@pytest.mark.parametrize("method", sorted(set(available_methods()) - LEDGERS))
@settings(SETTINGS, max_examples=12)
@given(run=runs())
def test_controls_around_it_keep_all_of_that(method, run):
    """Groups and a guardrail that gives way at once: bounds, and a state that goes on, hold."""
    arguments, observed = run
    names = arguments["domains"]
    if len(names) < 3:
        return
    controls = {
        "groups": {"members": {"some": names[:2]}},
        "guardrail": {"tolerance": 0.0, "retry_after": 2, "fallback": "uniform"},
        "of": len(names) - 1,
    }

    def make():
        return build_any(method, **arguments, **controls)

    whole = resumed = make()
    for observation in observed:
        for mixer in {id(m): m for m in (whole, resumed)}.values():
            go(mixer, observation)
            tokens = np.maximum(np.array(observation.token_count), 1.0)
            with np.errstate(over="ignore"):
                loss = np.array(observation.loss_sum) / tokens
            mixer.review(
                Reported(
                    step=observation.step,
                    loss=loss,
                    window_loss=np.repeat(loss, 2),
                    window_domain=np.repeat(np.arange(len(loss)), 2),
                )
            )
        text = json.dumps([whole.state_dict(), whole.describe()], allow_nan=False)
        state, resumed = resumed.state_dict(), make()
        resumed.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
        assert json.dumps([resumed.state_dict(), resumed.describe()]) == text
        for step in range(observation.step + 1, observation.step + 4):
            p = weights_of(whole, step)
            check_weights(p, arguments)
            assert p.tobytes() == weights_of(resumed, step).tobytes()
