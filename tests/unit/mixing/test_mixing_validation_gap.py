"""The validation gap against its formula, written out here a second time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, Signal, build_mixer
from megatron.errors import ConfigError

NAMES = ["a", "b", "c"]


def build(**options):
    context = RunContext(draws_per_step=8)
    return build_mixer("validation_gap", domains=NAMES, context=context, **options)


def rate(step):
    return min(1 / 3, math.sqrt(math.log(3) / (3 * step))) if step else 1 / 3


def weights(gain, previous, step):
    shifted = np.exp(previous * (gain - gain.max()))
    p = (1 - 3 * rate(step)) * shifted / shifted.sum() + rate(step)
    return p / p.sum()


def foresight(step, valid, tokens=(4, 4, 4)):
    return Observation(step, batch_valid_loss=np.where(np.array(tokens) > 0, valid, np.nan))


def training(step, loss, tokens=(4, 4, 4)):
    return Observation(step, loss_sum=np.array(loss) * tokens, token_count=tokens)


@pytest.mark.parametrize("importance", ["probability", "inclusion"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_rule(importance, normalised, scaled):
    rng = np.random.default_rng(0)
    mixer = build(
        importance=importance,
        batch_normalized_reward=normalised,
        scale_by_reward_loss_diff=scaled,
    )
    gain, p, previous = np.zeros(3), np.full(3, 1 / 3), 1 / 3
    last = np.full(3, np.nan)
    for step in range(1, 80):
        loss, valid = rng.uniform(1, 3, 3), rng.uniform(1, 4, 3)
        tokens = rng.integers(0, 3, 3)
        if not tokens.any():
            continue
        assert mixer.decide(step).measure == {Signal.BATCH_VALID_LOSS}
        decision = mixer.foresee(foresight(step, valid, tokens))
        assert not decision.measure
        np.testing.assert_allclose(decision.sampling_weights, p, atol=1e-12)
        mixer.observe(training(step, loss, tokens))

        seen = np.flatnonzero(tokens)
        rewards = {i: valid[i] - loss[i] for i in seen}
        if normalised:
            low, high = min(rewards.values()), max(rewards.values())
            rewards = {
                i: (reward - low) / (high - low) if high > low else 0.0
                for i, reward in rewards.items()
            }
        if scaled:
            rewards = {
                i: reward * (0.0 if math.isnan(last[i]) else last[i] - valid[i])
                for i, reward in rewards.items()
            }
        chance = p if importance == "probability" else 1 - (1 - p) ** 8
        for i in seen:
            gain[i] += rewards[i] / 10 / chance[i]
            last[i] = valid[i]
        p, previous = weights(gain, previous, step), rate(step)
        np.testing.assert_allclose(mixer.decide(step + 1).sampling_weights, p, atol=1e-12)


def test_equal_rewards_are_none():
    mixer = build(batch_normalized_reward=True)
    mixer.foresee(foresight(1, (2.0, 3.0, 4.0)))
    mixer.observe(training(1, (1.5, 2.5, 3.5)))
    assert list(mixer.describe()["estimate"].values()) == [0.0] * 3


def test_a_domain_seen_alone_is_the_least_and_the_greatest():
    mixer = build(batch_normalized_reward=True)
    mixer.foresee(foresight(1, (2.0, 3.0, 4.0), tokens=(0, 5, 0)))
    mixer.observe(training(1, (1.5, 2.0, 3.5), tokens=(0, 5, 0)))
    assert list(mixer.describe()["estimate"].values()) == [0.0] * 3


def test_steps_are_pooled_by_their_tokens():
    mixer = build(update_every=2)
    for step, valid, loss, tokens in (
        (1, (2.0, 4.0, 1.0), (1.0, 1.0, 1.0), (6, 2, 0)),
        (2, (4.0, 2.0, 9.0), (2.0, 2.0, 9.0), (2, 2, 0)),
    ):
        assert mixer.decide(step).measure
        mixer.foresee(foresight(step, valid, tokens))
        mixer.observe(training(step, loss, tokens))
    gap = np.array([(6 * 1 + 2 * 2) / 8, (2 * 3 + 2 * 0) / 4, 0.0])
    np.testing.assert_allclose(list(mixer.describe()["estimate"].values()), gap / 10 * 3)


def test_without_pooling_only_the_steps_of_updates_are_measured():
    mixer = build(update_every=3, pool=False)
    for step in range(1, 8):
        assert bool(mixer.decide(step).measure) is (step % 3 == 0)
        mixer.foresee(foresight(step, (9.0, 9.0, 9.0)))
        mixer.observe(training(step, (1.0, 1.0, 1.0)))
    # Two updates, and nothing of the steps between.
    first, second = np.full(3, 0.8 * 3), np.full(3, 0.8 * 3)
    np.testing.assert_allclose(list(mixer.describe()["estimate"].values()), first + second)


def test_what_is_held_back_keeps_its_measurement():
    """With a least number of tokens, V and L of a domain wait together."""
    mixer = build(min_tokens=5)
    for step, valid, loss in ((1, 3.0, 1.0), (2, 5.0, 2.0)):
        mixer.foresee(foresight(step, (valid, 2.0, 2.0), tokens=(3, 9, 0)))
        mixer.observe(training(step, (loss, 2.0, 2.0), tokens=(3, 9, 0)))
        if step == 1:
            assert mixer.describe()["estimate"]["a"] == 0
    assert mixer.describe()["estimate"]["a"] == pytest.approx((4.0 - 1.5) / 10 * 3)


def test_a_measurement_waits_for_its_step_over_a_resume():
    whole = build()
    whole.foresee(foresight(1, (3.0, 2.0, 1.0)))
    resumed = build()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    assert not resumed.decide(1).measure
    for mixer in (whole, resumed):
        mixer.observe(training(1, (1.0, 1.0, 1.0)))
    assert json.dumps(whole.state_dict()) == json.dumps(resumed.state_dict())
    np.testing.assert_allclose(list(resumed.describe()["estimate"].values()), [0.6, 0.3, 0.0])


def test_a_step_that_was_skipped_leaves_nothing_behind():
    mixer = build()
    mixer.foresee(foresight(1, (30.0, 2.0, 1.0)))  # and then step 1 overflows
    mixer.foresee(foresight(2, (3.0, 2.0, 1.0)))
    mixer.observe(training(2, (1.0, 1.0, 1.0)))
    np.testing.assert_allclose(list(mixer.describe()["estimate"].values()), [0.6, 0.3, 0.0])


def test_a_loop_that_measures_while_it_trains_may_tell_afterwards():
    mixer = build()
    mixer.observe(
        Observation(1, loss_sum=[4, 4, 4], token_count=[4, 4, 4], batch_valid_loss=[3.0, 2.0, 1.0])
    )
    np.testing.assert_allclose(list(mixer.describe()["estimate"].values()), [0.6, 0.3, 0.0])


def test_without_measurements_nothing_moves():
    mixer = build()
    for step in range(1, 5):
        mixer.observe(training(step, (1.0, 2.0, 3.0)))
    assert mixer.decide(5).sampling_weights.tolist() == [1 / 3] * 3


def test_the_chance_of_being_drawn_must_be_known():
    with pytest.raises(ConfigError, match="draws_per_step"):
        build_mixer("validation_gap", domains=NAMES, importance="inclusion")
