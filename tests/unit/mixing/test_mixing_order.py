"""The order of operations: rates, warm-up, cadence, pooling, bounds, importance weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer

METHODS = ["odm", "smoothed_mean", "smoothed_mean_exp", "exp3", "ema"]
DOMAINS = ["a", "b", "c"]
WEIGHTS = [3.0, 2.0, 1.0]
ALPHA = 0.9


def rate(step, count=3):
    return min(1 / count, math.sqrt(math.log(count) / (count * step))) if step else 1 / count


def losses(step):
    """Losses that differ between domains and move; which domain is absent moves too."""
    return [3.0 + math.sin(step), 2.0 + math.cos(step), 1.0 + 0.5 * math.sin(2 * step)], [
        float((step + i) % 3 > 0) * (2 + i) for i in range(3)
    ]


def observation(step, **more):
    loss, tokens = losses(step)
    sums = [x * n for x, n in zip(loss, tokens, strict=True)]
    return Observation(step, loss_sum=sums, token_count=tokens, **more)


class Plain:
    """The rules in plain Python, sharing nothing with the package."""

    def __init__(self, method):
        self.method = method
        self.p = [w / sum(WEIGHTS) for w in WEIGHTS]
        self.estimate = list(WEIGHTS) if method == "ema" else [0.0] * 3
        self.before = rate(0)

    def update(self, step, loss, seen, p=None):
        p = p or self.p
        now = rate(step)
        for i in range(3):
            old = self.estimate[i]
            if not seen[i]:
                continue
            if self.method == "odm":
                self.estimate[i] = ALPHA * old + (1 - ALPHA) * loss[i] / p[i]
            elif self.method == "exp3":
                self.estimate[i] = old + loss[i] / 10 / p[i]
            elif self.method == "ema":
                share = 2 / (1 + step)
                self.estimate[i] = share * loss[i] + (1 - share) * old
            else:
                self.estimate[i] = ALPHA * old + (1 - ALPHA) * math.exp(min(loss[i], 50))
        if self.method in ("ema", "smoothed_mean"):
            raw = self.estimate
        else:
            raw = [math.exp(self.before * r) for r in self.estimate]
        share = [r / sum(raw) for r in raw]
        if self.method == "ema":
            self.p = share
        else:
            self.p = [(1 - 3 * now) * q + now for q in share]
        self.before = now


def build(method, **options):
    if method in ("odm", "smoothed_mean", "smoothed_mean_exp"):
        options["smoothing_factor"] = ALPHA
    return build_mixer(method, domains=DOMAINS, weights=WEIGHTS, **options)


def close(mixer, step, expected):
    p = mixer.decide(step=step).sampling_weights
    np.testing.assert_allclose(p, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_step(method):
    mixer, plain = build(method), Plain(method)
    close(mixer, 1, plain.p)
    for step in range(1, 60):
        loss, tokens = losses(step)
        mixer.observe(observation(step))
        plain.update(step, loss, tokens)
        close(mixer, step + 1, plain.p)


@pytest.mark.parametrize("method", METHODS)
def test_warm_up_holds_the_start_and_learns_nothing(method):
    mixer, plain = build(method, warmup_steps=10), Plain(method)
    start = list(plain.p)
    for step in range(1, 11):
        mixer.observe(observation(step))
        close(mixer, step + 1, start)
    for step in range(11, 30):  # the step keeps its number: rates and shares are those of 11, 12, …
        mixer.observe(observation(step))
        plain.update(step, *losses(step))
        close(mixer, step + 1, plain.p)


@pytest.mark.parametrize("method", METHODS)
def test_decisions_within_the_warm_up_are_the_start_at_any_time(method):
    mixer = build(method, warmup_steps=10)
    assert mixer.decide(10).sampling_weights.tolist() == [0.5, 1 / 3, 1 / 6]
    mixer.observe(observation(12))
    mixer.observe(observation(13))
    assert mixer.decide(14).sampling_weights.tolist() != [0.5, 1 / 3, 1 / 6]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_pooled_updates(method, warmup):
    mixer, plain = build(method, update_every=4, warmup_steps=warmup), Plain(method)
    sums, counts = [0.0] * 3, [0.0] * 3
    for step in range(1, 50):
        mixer.observe(observation(step))
        loss, tokens = losses(step)
        if step > warmup:
            sums = [s + x * n for s, x, n in zip(sums, loss, tokens, strict=True)]
            counts = [c + n for c, n in zip(counts, tokens, strict=True)]
            if step % 4 == 0:
                means = [s / c if c else 0.0 for s, c in zip(sums, counts, strict=True)]
                plain.update(step, means, counts)
                sums, counts = [0.0] * 3, [0.0] * 3
        close(mixer, step + 1, plain.p)


@pytest.mark.parametrize("method", METHODS)
def test_updates_from_one_step_alone(method):
    mixer, plain = build(method, update_every=4, pool=False), Plain(method)
    for step in range(1, 50):
        mixer.observe(observation(step))
        if step % 4 == 0:
            plain.update(step, *losses(step))
        close(mixer, step + 1, plain.p)
    assert mixer.state_dict()["window"] is None


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_uses_up_its_number_and_its_data(method):
    """Not called for it, or called with a broken loss: the same, and no estimate has moved."""
    left_out, broken, plain = build(method), build(method), Plain(method)
    for step in range(1, 40):
        if step % 7 == 0:
            broken.observe(Observation(step, loss_sum=[1.0, math.nan, 1.0], token_count=[1, 1, 1]))
            continue
        left_out.observe(observation(step))
        broken.observe(observation(step))
        plain.update(step, *losses(step))
        close(left_out, step + 1, plain.p)
        assert left_out.state_dict() == broken.state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_an_update_step_that_is_skipped_leaves_its_pool_to_the_next(method):
    mixer, whole = build(method, update_every=4), build(method, update_every=8)
    for step in [1, 2, 3, 5, 6, 7, 8]:
        mixer.observe(observation(step))
        whole.observe(observation(step))
        assert mixer.decide(step + 1).sampling_weights.tolist() == (
            whole.decide(step + 1).sampling_weights.tolist()
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_tokens_changes_nothing(method):
    mixer = build(method)
    mixer.observe(observation(1))
    before = mixer.state_dict()
    mixer.observe(Observation(2, loss_sum=[0.0, 0.0, 0.0], token_count=[0, 0, 0]))
    assert mixer.state_dict() == before


def test_an_update_step_without_tokens_uses_the_pool():
    full, empty = build("odm", update_every=2), build("odm", update_every=2)
    for mixer in (full, empty):
        mixer.observe(observation(1))
    empty.observe(Observation(2, loss_sum=[0.0, 0.0, 0.0], token_count=[0, 0, 0]))
    plain = Plain("odm")
    plain.update(2, *losses(1))
    close(empty, 3, plain.p)
    assert empty.step == 2
    assert empty.state_dict()["window"] is None


@pytest.mark.parametrize("method", ["odm", "exp3"])
def test_given_sampling_weights_are_what_rewards_are_divided_by(method):
    mixer, plain = build(method), Plain(method)
    drew = [0.2, 0.3, 0.5]
    for step in range(1, 20):
        mixer.observe(observation(step, sampling_weights=drew))
        plain.update(step, *losses(step), p=drew)
        close(mixer, step + 1, plain.p)


def test_pooled_rewards_are_divided_by_the_mean_of_what_drew_them():
    mixer, plain = build("odm", update_every=2), Plain("odm")
    draws = {1: [0.2, 0.3, 0.5], 2: [0.6, 0.3, 0.1]}
    for step in (1, 2):
        one = Observation(
            step, loss_sum=[2.0, 2.0, 2.0], token_count=[1, 1, 1], sampling_weights=draws[step]
        )
        mixer.observe(one)
    plain.update(2, [2.0] * 3, [1] * 3, p=[0.4, 0.3, 0.3])
    close(mixer, 3, plain.p)


def test_a_draw_that_could_not_happen_teaches_nothing():
    mixer = build("odm")
    before = mixer.describe()["estimate"]
    one = Observation(
        1, loss_sum=[5.0, 0.0, 0.0], token_count=[1, 0, 0], sampling_weights=[0.0, 0.5, 0.5]
    )
    mixer.observe(one)
    assert mixer.describe()["estimate"] == before


@pytest.mark.parametrize("method", ["odm", "exp3"])
def test_importance_weights_divide_by_the_projected_weights(method):
    """With the weights pinned by the bounds, rewards are divided by the pinned ones."""
    pinned = [0.2, 0.3, 0.5]
    mixer, plain = build(method, floor=pinned, ceiling=pinned), Plain(method)
    for step in range(1, 10):
        mixer.observe(observation(step))
        plain.update(step, *losses(step), p=pinned)
        close(mixer, step + 1, pinned)
        shown = list(mixer.describe()["estimate"].values())
        np.testing.assert_allclose(shown, plain.estimate, rtol=1e-12)


def test_bounds_do_not_enter_the_estimates_of_ema():
    free, bound = build("ema"), build("ema", floor=0.3)
    for step in range(1, 20):
        free.observe(observation(step))
        bound.observe(observation(step))
        assert free.describe()["mean_loss"] == bound.describe()["mean_loss"]
        assert bound.decide(step + 1).sampling_weights.min() >= 0.3


def test_bounds_hold_from_the_first_step_and_through_the_warm_up():
    mixer = build("odm", floor=0.25, warmup_steps=3)
    for step in range(1, 8):
        assert mixer.decide(step).sampling_weights.min() >= 0.25
        mixer.observe(observation(step))


def test_ema_starts_from_the_weights_as_they_are():
    small, large = (
        build_mixer("ema", domains=["a", "b"], weights=[w, 3 * w]) for w in (0.25, 25.0)
    )
    assert small.decide(1).sampling_weights.tolist() == large.decide(1).sampling_weights.tolist()
    for mixer in (small, large):
        mixer.observe(Observation(3, loss_sum=[2.0, 0.0], token_count=[1, 0]))
    assert small.decide(4).sampling_weights[0] == pytest.approx(1.125 / 1.875, abs=1e-15)
    assert large.decide(4).sampling_weights[0] == pytest.approx(13.5 / 88.5, abs=1e-15)


def test_ema_by_softmax():
    mixer = build_mixer("ema", domains=["a", "b"], normalisation="softmax")
    assert mixer.decide(1).sampling_weights.tolist() == [0.5, 0.5]
    mixer.observe(Observation(1, loss_sum=[2.0, 3.0], token_count=[1, 1]))
    expected = math.exp(3) / (math.exp(2) + math.exp(3))
    assert mixer.decide(2).sampling_weights[1] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("method", ["smoothed_mean", "smoothed_mean_exp"])
def test_losses_are_clipped_at_50_nats_before_they_are_exponentiated(method):
    shown = []
    for loss in (50.0, 51.0, 1e300):
        mixer = build(method)
        mixer.observe(Observation(1, loss_sum=[loss, 1.0, 1.0], token_count=[1, 1, 1]))
        shown.append(mixer.state_dict())
    assert shown[0] == shown[1] == shown[2]
    assert shown[0]["rule"]["estimate"]["a"] == pytest.approx((1 - ALPHA) * math.exp(50))


def test_no_reward_at_all_changes_nothing():
    mixer = build("smoothed_mean")
    mixer.observe(Observation(1, loss_sum=[-1e9] * 3, token_count=[1, 1, 1]))  # exp gives 0
    close(mixer, 2, [0.5, 1 / 3, 1 / 6])


@pytest.mark.parametrize("method", METHODS)
def test_reload_in_mid_window(method):
    first = build(method, update_every=5)
    for step in range(1, 8):
        first.observe(observation(step))
    state = json.loads(json.dumps(first.state_dict()))
    assert state["window"]["steps"] == 2
    assert state["step"] == 7
    second = build(method, update_every=5)
    second.load_state_dict(state)
    for step in range(8, 30):
        first.observe(observation(step))
        second.observe(observation(step))
        assert first.decide(step + 1).sampling_weights.tobytes() == (
            second.decide(step + 1).sampling_weights.tobytes()
        )


@pytest.mark.parametrize("method", METHODS)
def test_domains_may_change_their_order_between_runs(method):
    first = build(method, update_every=2)
    for step in range(1, 8):
        first.observe(observation(step))
    second = build_mixer(method, domains=DOMAINS[::-1], update_every=2)
    second.load_state_dict(first.state_dict())
    assert (
        second.decide(8).sampling_weights.tolist()
        == (first.decide(8).sampling_weights.tolist()[::-1])
    )
