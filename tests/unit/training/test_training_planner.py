"""Deciding, planning and observing, with and without a lag, stopped anywhere and resumed."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.sampler import Sampler
from megatron.mixing import Observation, RunContext, build_mixer
from megatron.mixing.base import Decision, Mixer, Signal
from megatron.mixing.options import CommonOptions
from megatron.training.planner import Planned, Planner

DOMAINS = ("a", "b", "c")
WINDOWS = (7, 1, 400)
STEPS = 30


def losses(step: int) -> np.ndarray:
    return np.array([3.0 / step, 1.0 + 0.1 * (step % 4), 2.0 - 0.02 * step])


class AsksForValidation(Mixer):
    """Wants a validation before every third step and draws by what it measured."""

    method: ClassVar[str] = "asks_for_validation"
    needs = frozenset({Signal.LOSS, Signal.VALID_LOSS})

    def _decide(self, step: int) -> Decision:
        wants = step % 3 == 1 and not self._measured_before(step)
        return Decision(
            sampling_weights=self._weights.copy(),
            validate=wants,
            fresh_quota=3 if step % 3 == 1 else None,
            probe=step % 3,
            loss_weights=np.array([1.0, 2.0, 0.5]),
        )

    def _measure(self, step: int, valid_loss: np.ndarray) -> None:
        self._set_weights(np.nan_to_num(valid_loss, nan=0.5))

    def _update(self, step: int, window: Any) -> None:
        return None


def mixer_called(name: str) -> Mixer:
    if name == "asks_for_validation":
        return AsksForValidation(
            domains=DOMAINS,
            weights=np.ones(3),
            options=CommonOptions(),
            context=RunContext(),
        )
    return build_mixer(name, domains=DOMAINS, weights=[1, 1, 2])


class Session:
    """A training loop without a model."""

    def __init__(self, method: str, lag: int, draw: str = "apportion") -> None:
        self.measured: list[int] = []
        self.trained = 0
        self.planner = Planner(
            mixer=mixer_called(method),
            sampler=Sampler(DOMAINS, WINDOWS, seed=3, global_batch=8, draw=draw),
            lag=lag,
            measure=self.measure,
        )

    def measure(self) -> np.ndarray:
        self.measured.append(self.trained)
        return np.array([1.0 + self.trained, np.nan, 2.0])

    def run(self, first: int, last: int) -> list[Planned]:
        done = []
        for step in range(first, last + 1):
            planned = self.planner.take(step)
            assert planned is not None
            self.planner.prepare(step + 1)
            self.trained = step
            counts = planned.plan.counts() * 16.0
            self.planner.observe(
                Observation(
                    step=step,
                    loss_sum=losses(step) * counts,
                    token_count=counts,
                    sampling_weights=planned.plan.weights,
                )
            )
            done.append(planned)
        return done


def facts(done: list[Planned]) -> list[Any]:
    return [
        (
            p.step,
            p.plan.sample_ids(DOMAINS),
            p.plan.weights.tobytes(),
            None if p.decision.loss_weights is None else p.decision.loss_weights.tolist(),
            p.decision.fresh_quota,
            p.decision.probe,
            None if p.valid_loss is None else p.valid_loss.tobytes(),
        )
        for p in done
    ]


@pytest.mark.parametrize("method", ["odm", "static", "asks_for_validation"])
@pytest.mark.parametrize("lag", [0, 1])
@settings(max_examples=12, derandomize=True, deadline=None)
@given(stop=st.integers(1, STEPS - 1), draw=st.sampled_from(["apportion", "multinomial"]))
def test_a_run_stopped_anywhere_goes_on_with_the_same_bits(
    method: str, lag: int, stop: int, draw: str
) -> None:
    whole = facts(Session(method, lag, draw).run(1, STEPS))

    first = Session(method, lag, draw)
    before = facts(first.run(1, stop))
    state = json.loads(json.dumps(first.planner.state_dict(), allow_nan=False))
    second = Session(method, lag, draw)
    second.planner.load_state_dict(state)
    second.trained = stop
    assert before + facts(second.run(stop + 1, STEPS)) == whole


def test_a_lag_decides_from_one_observation_less() -> None:
    prompt, late = Session("odm", 0).run(1, 12), Session("odm", 1).run(1, 12)
    mixer = build_mixer("odm", domains=DOMAINS, weights=[1, 1, 2])
    # Step 1 and, with a lag, step 2 know of nothing.
    np.testing.assert_array_equal(late[0].plan.weights, late[1].plan.weights)
    assert not np.array_equal(prompt[0].plan.weights, prompt[1].plan.weights)
    for planned in late[:-1]:
        expected = mixer.decide(step=planned.step + 1).sampling_weights
        np.testing.assert_array_equal(late[planned.step].plan.weights, expected)
        counts = planned.plan.counts() * 16.0
        mixer.observe(
            Observation(
                step=planned.step,
                loss_sum=losses(planned.step) * counts,
                token_count=counts,
                sampling_weights=planned.plan.weights,
            )
        )


def test_validation_is_measured_before_the_step_that_asks() -> None:
    session = Session("asks_for_validation", 0)
    done = session.run(1, 9)
    assert session.measured == [0, 3, 6]
    assert [p.step for p in done if p.valid_loss is not None] == [1, 4, 7]
    assert not any(p.decision.validate for p in done)


def test_the_end_of_the_data_ends_the_plans() -> None:
    sampler = Sampler(DOMAINS, (4, 4, 4), seed=3, global_batch=8, on_exhausted="drop")
    planner = Planner(
        mixer=mixer_called("static"), sampler=sampler, lag=1, measure=lambda: np.zeros(3)
    )
    assert planner.take(1) is not None
    assert planner.prepare(2) is None
    assert planner.take(2) is None
    assert planner.state_dict()["ahead"] is None
    assert planner.end_of_data is not None
    assert set(planner.end_of_data.domains) == set(DOMAINS)


def test_what_was_measured_before_a_step_is_kept_for_the_record() -> None:
    mixer = build_mixer("validation_gap", domains=DOMAINS, weights=[1, 1, 2])
    sampler = Sampler(DOMAINS, WINDOWS, seed=1, global_batch=8)
    planner = Planner(mixer=mixer, sampler=sampler, lag=0, measure=lambda: losses(1))
    planned = planner.take(1)
    assert planned is not None
    assert planned.decision.measure == {Signal.BATCH_VALID_LOSS}
    gap = {"batch_valid_loss": np.array([2.0, 1.0, 3.0])}
    known = planner.foresee(planned, gap, lr=0.1)
    assert known.measured["batch_valid_loss"].tolist() == [2.0, 1.0, 3.0]
    assert known.foreseen == {Signal.BATCH_VALID_LOSS}
    assert not known.decision.measure
    assert known.plan is planned.plan
