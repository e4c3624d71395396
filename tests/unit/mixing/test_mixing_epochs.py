"""Repetition: what repeated data is worth, forecasts of passes, and a limit that holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sampling_utils import Observation, RunContext, build_mixer
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.epoch_limit import EpochLimit
from megatron.mixing.repetition import R_STAR, effective_data, marginal_value
from megatron.mixing.simulate import Apportion, Multinomial

NAMES = ["a", "b", "c"]
SIZES = (100.0, 400.0, 500.0)


def context(steps=100, batch=10, sizes=SIZES):
    return RunContext(total_steps=steps, samples_per_step=batch, samples_per_epoch=sizes)


def build(method="static", limit=2.0, **options):
    return build_mixer(method, domains=NAMES, context=context(), max_epochs=limit, **options)


def step_of(step, seen, counts=(1, 1, 1), **more):
    return Observation(
        step, loss_sum=[2.0, 3.0, 4.0], token_count=list(counts), samples_seen=seen, **more
    )


def test_repeated_data_is_worth_what_the_paper_says():
    """U + U R* (1 - exp(-R / R*)): 4 passes are worth 3.73, 40 are worth 15.2."""
    unique = 1000.0
    for passes in (0.3, 1.0, 1.5, 4.0, 40.0):
        expected = passes * unique
        if passes > 1:
            expected = unique + unique * 15.4 * (1 - math.exp(-(passes - 1) / 15.4))
        assert effective_data(passes * unique, unique) == pytest.approx(expected, rel=1e-12)
    assert effective_data(4.0, 1.0) == pytest.approx(3.7259, abs=1e-4)
    assert effective_data(40.0, 1.0) == pytest.approx(15.18, abs=1e-2)
    assert effective_data(1e9, 1.0) == pytest.approx(1 + R_STAR)
    assert effective_data(7.0, math.inf) == 7.0


def test_the_marginal_value_is_the_slope():
    drawn = np.array([0.2, 0.999, 1.001, 3.0, 30.0])
    h = 1e-6
    slope = (effective_data(drawn + h, 1.0, 5.0) - effective_data(drawn - h, 1.0, 5.0)) / (2 * h)
    np.testing.assert_allclose(marginal_value(drawn, 1.0, 5.0), slope, rtol=1e-6)


def test_a_forecast_is_what_has_been_drawn_and_what_the_weights_will_draw():
    mixer = build(limit=None, weights=[0.5, 0.25, 0.25])
    np.testing.assert_allclose(mixer.decide(1).epochs, [5.0, 0.625, 0.5])
    mixer.observe(step_of(40, [120, 180, 100]))
    expected = (np.array([120, 180, 100]) + np.array([0.5, 0.25, 0.25]) * 600) / SIZES
    np.testing.assert_allclose(mixer.decide(41).epochs, expected)
    assert mixer.describe()["epochs_forecast"]["a"] == pytest.approx(expected[0])


def test_without_sizes_there_is_no_forecast():
    assert build_mixer("static", domains=NAMES).decide(1).epochs is None


@pytest.mark.parametrize("told", ["samples_seen", "sample_count", None])
def test_what_was_drawn_is_known_from_what_there_is(told):
    mixer = build(limit=None, weights=[0.5, 0.3, 0.2])
    more = {} if told is None else {told: [5, 3, 2]}
    mixer.observe(Observation(1, loss_sum=[1, 1, 1], token_count=[9, 9, 9], **more))
    assert mixer.state_dict()["epochs"]["drawn"] == pytest.approx({"a": 5, "b": 3, "c": 2})


def test_the_limit_moves_the_weights_no_further_than_it_must():
    p = build(weights=[0.5, 0.25, 0.25]).decide(1).sampling_weights
    np.testing.assert_allclose(p, [0.2, 0.4, 0.4])
    free = build(weights=[0.1, 0.45, 0.45]).decide(1).sampling_weights
    plain = build_mixer("static", domains=NAMES, weights=[0.1, 0.45, 0.45]).decide(1)
    assert free.tobytes() == plain.sampling_weights.tobytes()
    named = build(limit={"a": 0.5}, weights=[0.5, 0.25, 0.25]).decide(1)
    np.testing.assert_allclose(named.sampling_weights, [0.05, 0.475, 0.475])
    np.testing.assert_allclose(named.epochs[0], 0.5)


def test_a_limit_is_hard_and_a_floor_gives_way():
    p = build(limit={"a": 0.5}, floor={"a": 0.3, "b": 0.2}).decide(1).sampling_weights
    assert p[0] == pytest.approx(0.05)
    assert p[1] >= 0.2


def test_a_limit_keeps_to_the_ceilings_of_the_others():
    p = build(limit={"a": 0.5}, ceiling={"b": 0.5}, weights=[1, 2, 1]).decide(1).sampling_weights
    np.testing.assert_allclose(p, [0.05, 0.5, 0.45])


@pytest.mark.parametrize(
    ("limit", "options", "message"),
    [
        (0.5, {}, "allows 500 samples in all and the run draws 1,000: 500 too few.*at least 1"),
        ({"a": 1, "b": 0.5, "c": 0.5}, {}, "450 too few.*train for 55 steps at most"),
        ({"a": 1}, {"ceiling": {"b": 0.4, "c": 0.4}}, "100 too few .with the ceilings."),
        ({"a": 0}, {}, "max_epochs of domain 'a' is 0; it must be above 0"),
        (-1, {}, "max_epochs is -1; it must be above 0"),
        ({"ab": 1}, {}, "names the domain 'ab', which does not exist"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(limit, options, message):
    with pytest.raises(ConfigError, match=message):
        build(limit=limit, **options)


def test_a_limit_needs_the_sizes():
    with pytest.raises(ConfigError, match=r"samples of each domain .* the steps of the run"):
        build_mixer("static", domains=NAMES, max_epochs=2)
    with pytest.raises(ConfigError, match="samples_per_epoch has 3 values for 2 domains"):
        build_mixer("static", domains=["a", "b"], context=context())


def test_exactly_enough_is_enough():
    mixer = build(limit=1.0, weights=[1, 0, 0])
    np.testing.assert_allclose(mixer.decide(1).sampling_weights, np.array(SIZES) / 1000)


@pytest.mark.parametrize("options", [{"shadow": True}, {"warmup_steps": 50}])
def test_what_draws_in_the_methods_place_keeps_to_it_too(options):
    p = build("odm", limit={"a": 1}, weights=[8, 1, 1], **options).decide(1).sampling_weights
    assert p[0] == pytest.approx(0.1)


def test_a_probe_keeps_to_it_and_counts_what_it_trained_on():
    mixer = build("aioli", limit={"a": 2}, update_every=20, lp_rounds=1, lp_steps=2)
    probed, seen = {}, np.zeros(3)
    for step in range(1, 8):
        decision = mixer.decide(step)
        if decision.validate:
            mixer.observe(Observation(step - 1, valid_loss=[3.0, 2.0, 1.0]))
            decision = mixer.decide(step)
        if decision.probe is not None:
            probed[decision.probe] = decision.sampling_weights
        assert decision.epochs[0] <= 2 + 1e-9
        seen = seen + decision.sampling_weights * 10
        mixer.observe(step_of(step, seen, sampling_weights=decision.sampling_weights))
    assert sorted(probed) == [0, 1, 2]
    assert probed[0][0] == pytest.approx(0.2, abs=0.02)  # asked for 0.625


def test_counts_are_part_of_the_state():
    mixer = build(limit={"a": 1}, weights=[8, 1, 1])
    mixer.observe(step_of(30, [90, 100, 110]))
    again = build(limit={"a": 1}, weights=[8, 1, 1])
    again.load_state_dict(mixer.state_dict())
    first, second = mixer.decide(31), again.decide(31)
    assert first.sampling_weights.tobytes() == second.sampling_weights.tobytes()
    assert first.sampling_weights[0] == pytest.approx(10 / 700)
    old = {key: value for key, value in mixer.state_dict().items() if key != "epochs"}
    again.load_state_dict(old)  # of a version that did not count
    for damage in ({"step": -1, "drawn": {}}, {"drawn": {}}, {"step": 1, "drawn": {"a": "x"}}):
        with pytest.raises(CheckpointError, match="count of drawn samples"):
            again.load_state_dict({**old, "epochs": damage})


def test_a_limit_that_came_too_late_is_refused():
    """A run that went on without one for long may leave no way to keep it and the ceilings."""
    late = build(limit={"a": 1, "b": 1}, ceiling={"c": 0.55})
    free = build(limit=None, weights=[0, 1, 0])
    free.observe(step_of(50, [0, 500, 0]))
    with pytest.raises(ConfigError, match=r"allows 125 samples less .* 50 steps .* b 1.25, c 0"):
        late.load_state_dict(free.state_dict())
    early = build(limit=None)
    early.observe(step_of(20, [20, 80, 100]))
    late.load_state_dict(early.state_dict())
    assert late.decide(21).epochs[1] <= 1 + 1e-9


def test_a_domain_beyond_a_new_limit_is_left_out():
    free = build(limit=None, weights=[0, 1, 0])
    free.observe(step_of(50, [0, 500, 0]))
    late = build(limit={"b": 1})
    late.load_state_dict(free.state_dict())
    np.testing.assert_allclose(late.decide(51).sampling_weights, [0.5, 0, 0.5])


def test_a_broken_loss_counts_nothing():
    mixer = build(limit={"a": 1}, weights=[8, 1, 1])
    before = mixer.state_dict()
    mixer.observe(Observation(1, loss_sum=[math.nan, 1, 1], token_count=[1, 1, 1]))
    assert mixer.state_dict() == before


@st.composite
def whole_runs(draw):
    count = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(3, 400), min_size=count, max_size=count))
    steps, batch = draw(st.integers(2, 80)), draw(st.integers(1, 48))
    slack = draw(st.sampled_from([1.0, 1.0 + 1e-6, 1.1, 2.0]))
    return sizes, steps, batch, slack, draw(st.integers(0, 2**32)), draw(st.booleans())


@settings(derandomize=True, deadline=None, max_examples=150)
@given(run=whole_runs())
def test_no_domain_ever_passes_its_limit(run):
    """Whatever weights are asked for, over whole runs, by more than a step's rounding."""
    sizes, steps, batch, slack, seed, one_limit = run
    rng = np.random.default_rng(seed)
    count, unique = len(sizes), np.array(sizes, dtype=float)
    names = [f"d{i}" for i in range(count)]
    epochs = np.full(count, slack * steps * batch / unique.sum())
    if not one_limit:
        epochs = slack * rng.dirichlet(np.ones(count)) * steps * batch / unique
    limit = EpochLimit(
        dict(zip(names, epochs.tolist(), strict=True)),
        domains=names,
        ceiling=np.ones(count),
        context=context(steps, batch, tuple(unique)),
    )
    draw, seen = Apportion(count, batch), np.zeros(count)
    for step in range(1, steps + 1):
        p = limit.apply(rng.dirichlet(np.full(count, 0.3)))
        assert abs(math.fsum(p) - 1) <= 1e-9
        assert (p >= 0).all()
        forecast = limit.forecast(p)
        assert (forecast * unique <= epochs * unique + 2.0 + math.log(count)).all()
        seen = seen + draw(step, p, None)
        limit.observe(step_of_any(step, seen), p)
        assert (seen <= epochs * unique + 2.0 + math.log(count)).all()
    assert seen.sum() == steps * batch


def step_of_any(step, seen):
    return Observation(
        step, loss_sum=np.ones(len(seen)), token_count=np.ones(len(seen)), samples_seen=seen
    )


@pytest.mark.parametrize("told", [True, False])
def test_losses_are_weighed_once_for_the_draw_of_a_foreseen_step(told):
    """DoReMi's alpha / r with r what drew, whether it was said or not, and asked again or not."""

    def make():
        return build_mixer(
            "doremi",
            domains=NAMES,
            max_epochs={"b": 1.0},
            context=replace(context(sizes=(2000.0, 20.0, 2000.0)), vocab_size=100),
            loss_lag=0,
        )

    mixer = make()
    for step in range(1, 6):
        drawn_by = mixer.decide(step).sampling_weights
        assert drawn_by[1] < 0.1  # the limit holds, and the given weights are equal
        foreseen = Observation(
            step,
            loss_sum=[20, 20, 20],
            token_count=[10, 10, 10],
            excess_loss=[1.0, 0.5, 0.2],
            reference_loss=[1.0, 1.0, 1.0],
            sampling_weights=drawn_by if told else None,
        )
        weights = mixer.foresee(foreseen).loss_weights
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
        for one in (mixer, resumed):
            assert one.decide(step).loss_weights.tolist() == weights.tolist()
        mixer.observe(foreseen)
        alpha = np.array(list(mixer.describe()["domain_weights"].values()))
        np.testing.assert_allclose(weights, alpha / drawn_by / (alpha / drawn_by).sum())


def test_random_draws_overshoot_by_less_than_a_batch():
    limit = EpochLimit(
        {"a": 1.0}, domains=NAMES, ceiling=np.ones(3), context=context(200, 16, (300.0, 1e6, 1e6))
    )
    draw, seen = Multinomial(16, seed=3), np.zeros(3)
    for step in range(1, 201):
        p = limit.apply(np.array([0.9, 0.05, 0.05]))
        seen = seen + draw(step, p, None)
        limit.observe(step_of(step, seen), p)
    assert 300 - 16 <= seen[0] <= 300 + 16
