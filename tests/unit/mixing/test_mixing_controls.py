"""Controls around every method: shadow, least evidence, and the chance of inclusion."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.mixing import HELD_OUT, LEDGERS, build_any

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.data.sampler import Sampler
from megatron.errors import ConfigError
from megatron.mixing.bandit import inclusion_probability
from megatron.training.planner import Planner

NAMES = ["a", "b", "c"]
GIVEN = [0.5, 0.3, 0.2]


def run(mixer, steps, *, first=1):
    """Drive a mixer with what a run would show; return what it asked for."""
    asked = []
    for step in range(first, first + steps):
        decision = mixer.decide(step)
        if decision.validate:
            level = np.array([3.0, 2.0, 2.5]) / (1 + step) ** np.array([0.1, 0.3, 0.2])
            mixer.observe(Observation(step - 1, valid_loss=level))
            decision = mixer.decide(step)
        asked.append(decision)
        mixer.observe(
            Observation(
                step,
                loss_sum=np.array([30.0, 24.0, 28.0]) / step**0.1,
                token_count=[10, 8, 12],
                sampling_weights=decision.sampling_weights,
            )
        )
    return asked


@pytest.mark.parametrize("method", available_methods())
class TestShadow:
    def build(self, method, **more):
        return build_any(method, domains=NAMES, weights=GIVEN, **more)

    def test_the_given_mixture_trains(self, method):
        mixer = self.build(method, shadow=True, warmup_steps=2)
        for step, decision in enumerate(run(mixer, 20), start=1):
            assert decision.sampling_weights.tolist() == GIVEN
            assert decision.fresh_quota is None
            assert decision.probe is None
            assert decision.loss_weights is None
            assert (decision.controller_weights is None) == (step <= 2)

    def test_the_log_shows_both(self, method):
        mixer = self.build(method, shadow=True)
        run(mixer, 5)
        shown = mixer.describe()
        decision = mixer.decide(6)
        json.dumps(shown, allow_nan=False)
        assert list(shown["weights"].values()) == GIVEN
        assert list(shown["controller_weights"].values()) == decision.controller_weights.tolist()

    def test_control_is_handed_over_between_two_launches(self, method):
        shadow = self.build(method, shadow=True)
        run(shadow, 9)
        mixer = self.build(method)
        mixer.load_state_dict(json.loads(json.dumps(shadow.state_dict())))
        wanted = shadow.decide(10)
        taken = mixer.decide(10)
        assert taken.sampling_weights.tolist() == wanted.controller_weights.tolist()
        assert taken.controller_weights is None


@pytest.mark.parametrize("method", sorted(set(available_methods()) - HELD_OUT - LEDGERS - {"ado"}))
def test_a_shadow_learns_what_a_controller_with_the_same_draws_does(method):
    """Estimates rest on what drew, so they do not depend on who is in control."""
    run = RunContext(vocab_size=100)
    shadow = build_any(method, domains=NAMES, weights=GIVEN, context=run, shadow=True)
    other = build_any(method, domains=NAMES, weights=GIVEN, context=run)
    for step in range(1, 12):
        seen = Observation(
            step,
            loss_sum=[30.0, 24.0, 9.0],
            token_count=[10, 8, 3],
            sampling_weights=GIVEN,
            excess_loss=[0.5, 0.1, 0.3],
            reference_loss=[2.5, 2.9, 2.7],
            gradient_alignment=[0.2, -0.1, 0.4],
            learning_rate=0.01,
        )
        shadow.observe(seen)
        other.observe(seen)
    assert shadow.state_dict() == other.state_dict()


@pytest.mark.parametrize("method", ["odm", "exp3", "smoothed_mean", "smoothed_mean_exp", "ema"])
class TestLeastEvidence:
    def test_a_domain_waits_until_it_has_enough(self, method):
        """Steps whose evidence is held back count together, as if they had been one."""
        mixer = build_mixer(method, domains=NAMES, weights=GIVEN, min_tokens=30)
        pooled = build_mixer(method, domains=NAMES, weights=GIVEN, update_every=3)
        estimate = "mean_loss" if method == "ema" else "estimate"
        start = mixer.describe()[estimate]
        for step, tokens in ((1, [10, 50, 0]), (2, [10, 0, 0]), (3, [10, 0, 0])):
            sums = [2.0 * step * tokens[0], 3.0 * tokens[1], 0.0]
            seen = {"token_count": tokens, "loss_sum": sums, "sampling_weights": GIVEN}
            mixer.observe(Observation(step, **seen))
            pooled.observe(Observation(step, **seen))
            shown = mixer.describe()[estimate]
            assert (shown["a"] != start["a"]) == (step == 3)
            assert shown["b"] != start["b"]
            assert shown["c"] == start["c"]
        assert mixer.describe()[estimate]["a"] == pytest.approx(
            pooled.describe()[estimate]["a"], rel=1e-12
        )

    def test_none_is_lost_and_none_is_counted_twice(self, method):
        mixer = build_mixer(method, domains=NAMES, weights=GIVEN, min_tokens=25, update_every=2)
        held = 0.0
        for step in range(1, 40):
            mixer.observe(Observation(step, loss_sum=[8, 8, 8], token_count=[4, 4, 4]))
            window = mixer.state_dict()["window"]
            now = 0.0 if window is None else window["token_count"]["a"]
            assert now == held + 4 or (now == 0 and held + 4 >= 25)
            assert now < 25 + 4
            held = now

    def test_it_resumes_with_the_same_bits_while_evidence_waits(self, method):
        options = {"min_tokens": 25, "update_every": 2}
        whole = build_mixer(method, domains=NAMES, **options)
        mixer = build_mixer(method, domains=NAMES, **options)
        for step in range(1, 25):
            fresh = build_mixer(method, domains=NAMES, **options)
            fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
            mixer = fresh
            seen = Observation(step, loss_sum=[7, 9.5, 3 * step], token_count=[4, 9, step])
            whole.observe(seen)
            mixer.observe(seen)
            p = whole.decide(step + 1).sampling_weights
            assert mixer.decide(step + 1).sampling_weights.tobytes() == p.tobytes()

    def test_zero_changes_nothing(self, method):
        plain = build_mixer(method, domains=NAMES)
        given = build_mixer(method, domains=NAMES, min_tokens=1)
        for step in range(1, 9):
            seen = Observation(step, loss_sum=[2.0, 0.0, step], token_count=[1, 0, 2])
            plain.observe(seen)
            given.observe(seen)
        assert plain.state_dict() == given.state_dict()


@pytest.mark.parametrize("method", ["static", "skillit", "aioli", "naive_validation"])
def test_least_evidence_is_refused_where_none_is_read(method):
    with pytest.raises(ConfigError, match=f"min_tokens is 5; it must be 0 for '{method}'"):
        build_mixer(method, domains=NAMES, min_tokens=5)


def test_ado_holds_evidence_back_too():
    mixer = build_mixer("ado", domains=["a", "b"], min_tokens=10)
    for step, loss in ((1, 4.0), (2, 3.0), (3, 2.0)):
        mixer.observe(Observation(step, loss_sum=[loss * 4, 30.0], token_count=[4, 10]))
        rule = mixer.state_dict()["rule"]
        assert rule["last"]["b"] == 3.0
        assert rule["last"]["a"] == (None if step < 3 else 3.0)
    assert rule["held_tokens"] == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("n", [1, 2, 16, 4096])
def test_the_inclusion_probability(n):
    p = np.array([0.0, 1e-18, 1e-9, 0.01, 0.5, 1.0])
    found = inclusion_probability(p, n)
    assert found[0] == 0.0
    assert found[1] == pytest.approx(n * 1e-18)
    assert found[2] == pytest.approx(n * 1e-9, rel=1e-4)
    for value, q in zip(found[3:], p[3:], strict=True):
        assert value == pytest.approx(1 - (1 - q) ** n, rel=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_inclusion_makes_the_reward_unbiased_where_the_papers_form_is_not(every):
    """Mean of [seen] L / chance over many draws: L, however many draws make a step."""
    p, losses, draws = np.array([0.7, 0.2, 0.1]), np.array([2.0, 3.0, 5.0]), 4
    rng = np.random.default_rng(0)
    sums = {"probability": np.zeros(3), "inclusion": np.zeros(3)}
    trials = 4000
    for _ in range(trials):
        counts = rng.multinomial(draws, p, size=every)
        for kind in sums:
            mixer = build_mixer(
                "exp3",
                domains=NAMES,
                importance=kind,
                update_every=every,
                context=RunContext(draws_per_step=draws),
            )
            for step, row in enumerate(counts, start=1):
                mixer.observe(
                    Observation(step, loss_sum=losses * row, token_count=row, sampling_weights=p)
                )
            sums[kind] += np.array(list(mixer.describe()["estimate"].values()))
    np.testing.assert_allclose(sums["inclusion"] / trials, losses / 10, rtol=0.06)
    assert (sums["probability"] / trials > losses / 10 * 1.3).all()


def test_with_one_draw_a_step_both_forms_agree():
    context = RunContext(draws_per_step=1)
    for method in ("odm", "exp3"):
        both = [
            build_mixer(method, domains=NAMES, weights=GIVEN, importance=kind, context=context)
            for kind in ("probability", "inclusion")
        ]
        for step in range(1, 9):
            row = [float(step % 3 == k) for k in range(3)]
            for mixer in both:
                mixer.observe(Observation(step, loss_sum=[2 * x for x in row], token_count=row))
        p, q = (mixer.decide(9).sampling_weights for mixer in both)
        np.testing.assert_allclose(p, q, rtol=1e-12)


def test_inclusion_wants_to_know_the_draws():
    with pytest.raises(ConfigError, match=r"importance is 'inclusion', but the draws"):
        build_mixer("odm", domains=NAMES, importance="inclusion")
    with pytest.raises(ConfigError, match="importance is 'n'"):
        build_mixer("odm", domains=NAMES, importance="n")
    with pytest.raises(ConfigError, match="min_tokens is -1"):
        build_mixer("odm", domains=NAMES, min_tokens=-1)
    assert math.isfinite(build_mixer("odm", domains=NAMES).decide(1).sampling_weights.sum())


def test_the_planner_keeps_what_a_shadow_would_have_drawn():
    """A step planned ahead is saved and resumed with it."""

    def planner():
        mixer = build_mixer("ema", domains=NAMES, weights=GIVEN, shadow=True)
        sampler = Sampler(NAMES, [100] * 3, seed=1, global_batch=8)
        return Planner(mixer=mixer, sampler=sampler, lag=1, measure=lambda: np.zeros(3))

    first = planner()
    for step in range(1, 4):
        planned = first.take(step)
        first.prepare(step + 1)
        assert planned.plan.weights.tolist() == GIVEN
        first.observe(Observation(step, loss_sum=[9, 4, 1], token_count=[3, 2, 1]))
    second = planner()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    ahead, again = first.take(4).decision, second.take(4).decision
    assert ahead.controller_weights.tolist() != GIVEN
    assert again.controller_weights.tobytes() == ahead.controller_weights.tobytes()
    assert again.sampling_weights.tolist() == GIVEN
