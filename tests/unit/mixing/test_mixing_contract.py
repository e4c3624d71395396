"""The base carries methods of every kind: errors of the protocol, and three methods made up here.

The three stand for the kinds that no method of the first set is: one that re-weights
losses, one that asks for validations, and one that probes.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.mixing import HELD_OUT, build_any

from data_sampling_utils import (
    Decision,
    Mixer,
    Observation,
    ObservationError,
    RunContext,
    Signal,
    available_methods,
    build_mixer,
)
from megatron.errors import CheckpointError, NeomixError
from megatron.mixing.options import CommonOptions
from megatron.registry import mixing_methods


def step_of(step, loss=(2.0, 1.0), tokens=(4, 4), **more):
    sums = [x * n for x, n in zip(loss, tokens, strict=True)]
    return Observation(step, loss_sum=sums, token_count=tokens, **more)


def validation(step, values=(2.0, 1.0), **more):
    return Observation(step, valid_loss=values, **more)


@pytest.mark.parametrize("method", available_methods())
class TestProtocol:
    def build(self, method, **options):
        return build_any(method, domains=["a", "b"], **options)

    def test_a_step_is_observed_once_and_in_order(self, method):
        mixer = self.build(method)
        mixer.observe(step_of(5))
        for step in (5, 4):
            with pytest.raises(ObservationError, match=rf"step {step} after that of step 5"):
                mixer.observe(step_of(step))
        mixer.observe(step_of(9))
        assert mixer.step == 9

    def test_the_past_cannot_be_decided_and_the_future_can(self, method):
        mixer = self.build(method)
        mixer.observe(step_of(5))
        with pytest.raises(ObservationError, match=r"step 5, but step 5 has been observed"):
            mixer.decide(step=5)
        assert abs(mixer.decide(step=10**9).sampling_weights.sum() - 1) < 1e-12

    @pytest.mark.parametrize("step", [0, -1, 1.0, "1", None, True])
    def test_what_is_no_step_is_refused(self, method, step):
        with pytest.raises(ObservationError, match="whole numbers from 1"):
            self.build(method).decide(step=step)

    def test_another_number_of_domains_is_refused(self, method):
        with pytest.raises(ObservationError, match=r"3 values per vector and the mixer 2 domains"):
            self.build(method).observe(step_of(1, loss=(1, 1, 1), tokens=(1, 1, 1)))

    def test_only_observations_are_observed(self, method):
        with pytest.raises(ObservationError, match="takes an Observation"):
            self.build(method).observe({"step": 1})

    def test_a_validation_is_no_training_step(self, method):
        """Step t - 1 may have both, in either order, and step 0 may have one."""
        mixer, plain = self.build(method), self.build(method)
        mixer.observe(validation(0))
        for step in range(1, 5):
            plain.observe(step_of(step))
            one, other = step_of(step), validation(step, token_count=[0, 0], loss_sum=[0, 0])
            for observation in (one, other) if step % 2 else (other, one):
                mixer.observe(observation)
            if method not in HELD_OUT:
                assert mixer.decide(step + 1).sampling_weights.tolist() == (
                    plain.decide(step + 1).sampling_weights.tolist()
                )
        assert mixer.step == 4
        with pytest.raises(ObservationError, match="validation of step 4 after that of step 4"):
            mixer.observe(validation(4))

    def test_the_state_of_another_method_or_other_domains_is_refused(self, method):
        state = self.build(method).state_dict()
        other = "static" if method != "static" else "odm"
        with pytest.raises(CheckpointError, match=f"'{method}' and the configuration's '{other}'"):
            self.build(other).load_state_dict(state)
        with pytest.raises(CheckpointError, match="the same domains"):
            build_any(method, domains=["a", "c"]).load_state_dict(state)
        with pytest.raises(CheckpointError, match="version 3"):
            self.build(method).load_state_dict(state | {"version": 3})
        with pytest.raises(CheckpointError, match="unknown \\['more'\\]"):
            self.build(method).load_state_dict(state | {"more": 1})

    @pytest.mark.parametrize(
        "damage",
        [
            {"step": -1},
            {"step": "3"},
            {"measured_step": 0.5},
            {"weights": {"a": 0.7, "b": 0.7}},
            {"weights": {"a": 1.0}},
            {"weights": {"a": "x", "b": 0.0}},
            {"rule": {"nonsense": 1}},
            {"window": {"version": 1}},
        ],
    )
    def test_a_damaged_state_is_refused_and_changes_nothing(self, method, damage):
        mixer = self.build(method)
        mixer.observe(step_of(3))
        before = mixer.state_dict()
        with pytest.raises(CheckpointError):
            mixer.load_state_dict(before | damage)
        assert mixer.state_dict() == before

    def test_the_state_is_a_copy(self, method):
        mixer = self.build(method, update_every=3)
        mixer.observe(step_of(1))
        state = mixer.state_dict()
        text = json.dumps(state)
        mixer.observe(step_of(2))
        mixer.observe(step_of(3))
        assert json.dumps(state) == text

    def test_needs_are_registered_as_they_are(self, method):
        mixer = self.build(method)
        assert mixer.needs == mixing_methods[method].needs
        assert all(isinstance(need, Signal) for need in mixer.needs)

    def test_it_describes_itself_by_name(self, method):
        mixer = self.build(method)
        mixer.observe(step_of(1))
        shown = mixer.describe()
        json.dumps(shown, allow_nan=False)
        assert shown["method"] == method
        assert list(shown["weights"].values()) == mixer.decide(2).sampling_weights.tolist()


@pytest.mark.parametrize("method", ["odm", "smoothed_mean", "smoothed_mean_exp", "exp3", "ema"])
def test_a_missing_signal_is_named(method):
    mixer = build_mixer(method, domains=["a", "b"])
    with pytest.raises(ObservationError, match=rf"no loss_sum and token_count, which .*'{method}'"):
        mixer.observe(Observation(1, excess_loss=[0.1, 0.2]))


def test_the_errors_are_users_errors_and_value_errors():
    assert issubclass(ObservationError, NeomixError)
    assert issubclass(ObservationError, ValueError)


def make(kind, **options):
    return kind(
        domains=["a", "b"],
        weights=np.array([0.5, 0.5]),
        options=CommonOptions(**options),
        context=RunContext(),
    )


class Reweighter(Mixer):
    """Samples by the given weights and moves the weight of each loss (the way of DoReMi)."""

    method = "reweighter"
    needs = frozenset({Signal.LOSS, Signal.EXCESS_LOSS})

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.score = np.zeros(2)
        self.log_alpha = np.zeros(2)

    def _update(self, step, window):
        self.score = np.where(np.isnan(window.mean_excess), self.score, window.mean_excess)
        self.log_alpha = self.log_alpha + self.score
        return None

    def _decide(self, step):
        alpha = np.exp(self.log_alpha) / np.exp(self.log_alpha).sum()
        weights = super()._decide(step).sampling_weights
        return Decision(sampling_weights=weights, loss_weights=alpha / weights)


def test_a_reweighter_fits():
    mixer = make(Reweighter, update_every=2)
    mixer.observe(step_of(1, tokens=(2, 6), excess_loss=[0.5, 1.0]))
    mixer.observe(step_of(2, tokens=(0, 2), excess_loss=[math.nan, 0.2]))
    decision = mixer.decide(3)
    assert decision.sampling_weights.tolist() == [0.5, 0.5]
    a, b = math.exp(0.5), math.exp((6 * 1.0 + 2 * 0.2) / 8)
    np.testing.assert_allclose(decision.loss_weights, [2 * a / (a + b), 2 * b / (a + b)])
    mixer.observe(step_of(3, excess_loss=[math.inf, 0.0]))
    assert mixer.state_dict()["window"] is None


class Prober(Mixer):
    """Rounds of 10 steps that open with a probe of 2 steps per domain (the way of Aioli)."""

    method = "prober"
    needs = frozenset({Signal.VALID_LOSS})

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.last = None
        self.drop = np.zeros(2)

    def _decide(self, step):
        place = (step - 1) % 10
        if place in (0, 2, 4) and not self._measured_before(step):
            return Decision(sampling_weights=self._weights.copy(), validate=True)
        if place >= 4:
            return super()._decide(step)
        probe = place // 2
        mixture = np.where(np.arange(2) == probe, 0.8, 0.2)
        return Decision(
            sampling_weights=mixture, fresh_quota=2 if place % 2 == 0 else None, probe=probe
        )

    def _measure(self, step, valid_loss):
        place = step % 10
        if place in (2, 4):
            self.drop[place // 2 - 1] = (self.last - valid_loss).sum()
        self.last = valid_loss
        if place == 4:
            self._set_weights(np.exp(self.drop))

    def _update(self, step, window):
        return None

    def _save(self):
        last = None if self.last is None else self._by_name(self.last)
        return {"last": last, "drop": self._by_name(self.drop)}

    def _restore(self, rule):
        self.last = None if rule["last"] is None else self._vector(rule["last"], "last")
        self.drop = self._vector(rule["drop"], "drop")


@pytest.mark.parametrize("lag", [0, 1])
def test_a_prober_fits_and_resumes_anywhere(lag):
    """The loop of the contract, restoring a fresh mixer from its state before every step."""
    mixer, seen, measured = make(Prober), [], 0
    waiting = []
    for step in range(1, 25):
        fresh = make(Prober)
        fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
        mixer = fresh
        decision = mixer.decide(step)
        if decision.validate:
            measured += 1
            level = 3.0 - 0.1 * measured * (1 + measured % 2)
            mixer.observe(
                Observation(
                    step - 1, valid_loss=[level, level], loss_sum=[0, 0], token_count=[0, 0]
                )
            )
            decision = mixer.decide(step)
        assert not decision.validate
        seen.append((decision.probe, decision.fresh_quota, decision.sampling_weights.tolist()))
        waiting.append(step_of(step, sampling_weights=decision.sampling_weights))
        if len(waiting) > lag:
            mixer.observe(waiting.pop(0))
    assert [probe for probe, _, _ in seen[:10]] == [0, 0, 1, 1] + [None] * 6
    assert [quota for _, quota, _ in seen[:10]] == [2, None, 2, None] + [None] * 6
    assert seen[0][2] == [0.8, 0.2]
    assert seen[2][2] == [0.2, 0.8]
    assert len({tuple(weights) for _, _, weights in seen[4:10]}) == 1
    assert seen[4][2] != [0.5, 0.5]
    assert measured == 8


class Follower(Mixer):
    """Keeps a running share of the batch that every step moves (the way of ADO's history)."""

    method = "follower"

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.share = np.array([0.5, 0.5])

    def _follow(self, observation, sampling_weights):
        tokens = observation.vector("token_count")
        self.share = 0.9 * self.share + 0.1 * tokens / tokens.sum()

    def _update(self, step, window):
        return self.share


def test_a_follower_sees_every_counted_step():
    mixer = make(Follower, update_every=5, warmup_steps=1)
    share = 0.5
    for step in range(1, 11):
        mixer.observe(step_of(step, tokens=(step, 4)))
        if step > 1:
            share = 0.9 * share + 0.1 * step / (step + 4)
        if step % 5 == 0:
            assert mixer.decide(step + 1).sampling_weights[0] == pytest.approx(share, abs=1e-15)


class Broken(Mixer):
    """A rule that fails."""

    method = "broken"
    result = np.array([math.nan, 1.0])

    def _update(self, step, window):
        return self.result


@pytest.mark.parametrize("result", [[math.nan, 1.0], [math.inf, 1.0], [-0.1, 1.1], [0.0, 0.0]])
def test_no_rule_can_leave_the_simplex(result):
    mixer = make(Broken)
    mixer.result = np.array(result)
    mixer.observe(step_of(1))
    assert mixer.decide(2).sampling_weights.tolist() == [0.5, 0.5]
