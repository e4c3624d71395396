"""The guardrail: what counts as a regression, who draws then, and that noise is left alone."""

from __future__ import annotations

import json
import math
from typing import ClassVar

import numpy as np
import pytest
from support.mixing import build_any, go

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.errors import CheckpointError, ConfigError, DataError
from megatron.mixing.forecast import FittedForecast, interpolated
from megatron.mixing.held_out_difference import Measurement, Yardstick
from megatron.mixing.objective import Objective, ObjectiveOptions
from megatron.mixing.reported import Reported
from megatron.mixing.simulate import HeldOut, simulate
from megatron.mixing.worlds import power_world, random_linear

NAMES = ["a", "b", "c"]
GIVEN = [0.5, 0.3, 0.2]
HARD = np.random.default_rng(0).normal(0, 0.5, (3, 16))


def report(step, *losses, windows=None):
    """A report of 16 windows a domain; without noise all move alike."""
    level = np.array(losses, dtype=np.float64)
    windows = (
        level[:, None]
        + HARD
        - HARD.mean(axis=1, keepdims=True)
        + (0.0 if windows is None else windows)
    )
    return Reported(
        step=step,
        loss=windows.mean(axis=1),
        window_loss=windows.ravel(),
        window_domain=np.repeat(np.arange(3), 16),
    )


def build(method="odm", *, guardrail=None, **options):
    return build_mixer(method, domains=NAMES, weights=GIVEN, guardrail=guardrail or {}, **options)


def train(mixer, first, last):
    for step in range(first, last + 1):
        go(
            mixer,
            Observation(
                step,
                loss_sum=[30.0, 9.0, 4.0],
                token_count=[10, 4, 3],
                sampling_weights=mixer.decide(step).sampling_weights,
            ),
        )


class TestARegression:
    def test_is_said_and_the_fallback_draws(self):
        mixer = build()
        train(mixer, 1, 10)
        assert mixer.review(report(10, 3, 2, 2)) is None
        before = mixer.decide(11)
        assert before.control is None
        train(mixer, 11, 20)
        text = mixer.review(report(20, 3.3, 2, 2))
        assert "at step 20" in text
        assert "0.1000 above the best, of step 10" in text
        assert "the given weights draw from step 21 on, and odm goes on observing" in text
        after = mixer.decide(21)
        assert after.sampling_weights.tolist() == GIVEN
        assert after.control == "fallback"
        assert after.loss_weights is None
        assert (np.abs(after.controller_weights - GIVEN) > 1e-3).any()

    def test_within_the_tolerance_is_none(self):
        mixer = build(guardrail={"tolerance": 0.05})
        mixer.review(report(10, 3, 2, 2))
        assert mixer.review(report(20, 3.14, 2, 2)) is None
        assert mixer.review(report(30, 3.16, 2, 2)) is not None

    def test_within_two_standard_errors_is_none(self):
        """The difference is 0.1 in both cases; its windows scatter more in one."""
        rng = np.random.default_rng(1)
        for scatter, expected in ((0.2, False), (0.05, True)):
            noise = rng.normal(0, 1, (3, 16))
            noise = (
                scatter
                * (noise - noise.mean(axis=1, keepdims=True))
                / noise.std(axis=1, ddof=1, keepdims=True)
            )
            error = scatter / math.sqrt(48)
            mixer = build(guardrail={"standard_errors": 2.0, "tolerance": 0.01})
            mixer.review(report(10, 3, 2, 2))
            worse = 3 * 2 * error * (1.02 if expected else 0.98)
            said = mixer.review(report(20, 3 + worse, 2, 2, windows=noise.copy()))
            assert (said is not None) == expected

    def test_counts_only_where_the_objective_does(self):
        mixer = build(objective={"b": 1.0})
        mixer.review(report(10, 3, 2, 2))
        assert mixer.review(report(20, 9, 2, 9)) is None
        assert mixer.review(report(30, 1, 2.1, 1)) is not None

    def test_of_the_worst_domain(self):
        mixer = build(objective="worst")
        mixer.review(report(10, 3, 2, 2))
        assert mixer.review(report(20, 2.5, 2.9, 2)) is None
        text = mixer.review(report(30, 2, 2, 2.95))
        assert "0.0500 above" in text

    def test_of_a_target_that_is_never_trained_on(self):
        mixer = build_mixer(
            "odm",
            domains=["a", "b"],
            objective={"old": 1.0},
            guardrail={},
            context=RunContext(targets=("old",)),
        )
        mixer.review(report(10, 3, 2, 2))
        assert mixer.review(report(20, 9, 9, 2)) is None
        assert mixer.review(report(30, 1, 1, 2.1)) is not None

    def test_needs_patience(self):
        mixer = build(guardrail={"patience": 2})
        mixer.review(report(10, 3, 2, 2))
        assert mixer.review(report(20, 4, 2, 2)) is None
        assert mixer.review(report(30, 3, 2, 2)) is None
        assert mixer.review(report(40, 4, 2, 2)) is None
        assert mixer.review(report(50, 4, 2, 2)) is not None

    def test_without_windows_rests_on_the_tolerance(self):
        mixer = build()
        nothing = {"window_loss": np.zeros(0), "window_domain": np.zeros(0, dtype=np.int64)}
        mixer.review(Reported(step=10, loss=np.array([3.0, 2, 2]), **nothing))
        assert mixer.review(Reported(step=20, loss=np.array([3.05, 2, 2]), **nothing)) is None
        assert mixer.review(Reported(step=30, loss=np.array([3.07, 2, 2]), **nothing)) is not None

    def test_of_a_loss_that_is_infinite_and_none_of_one_that_is_not_measured(self):
        mixer = build()
        mixer.review(report(10, 3, 2, 2))
        assert mixer.review(report(20, np.nan, 2, 2)) is None
        assert mixer.review(report(30, np.nan, np.nan, np.nan)) is None
        json.dumps(mixer.state_dict(), allow_nan=False)
        assert mixer.review(report(40, np.inf, 2, 2)) is not None
        json.dumps(mixer.state_dict(), allow_nan=False)

    def test_is_looked_for_once_per_step(self):
        mixer = build()
        mixer.review(report(10, 3, 2, 2))
        state = mixer.state_dict()
        assert mixer.review(report(10, 9, 9, 9)) is None
        assert mixer.state_dict() == state

    def test_is_none_while_the_method_does_not_draw(self):
        """A warm-up may rise (a learning rate that does): the method is compared with its end."""
        for options in ({"warmup_steps": 30}, {"shadow": True}):
            mixer = build(**options)
            for step, loss in ((10, 3.0), (20, 4.0), (30, 5.0)):
                assert mixer.review(report(step, loss, 2, 2)) is None
            assert mixer.decide(31).control == ("shadow" if "shadow" in options else None)
        mixer = build(warmup_steps=30)
        mixer.review(report(30, 5.0, 2, 2))
        assert mixer.review(report(40, 5.2, 2, 2)) is not None


class TestControl:
    def test_returns_and_is_lost_again_for_good(self):
        mixer = build(guardrail={"retry_after": 10, "retries": 1})
        mixer.review(report(10, 3, 2, 2))
        assert "up to step 30" in mixer.review(report(20, 4, 2, 2))
        assert [mixer.decide(s).control for s in (20, 21, 30, 31)] == [
            None,
            "fallback",
            "fallback",
            None,
        ]
        assert mixer.review(report(30, 3.5, 2, 2)) is None
        assert mixer.review(report(40, 3.5, 2, 2)) == "guardrail: odm draws again since step 31"
        assert "up to step" not in mixer.review(report(50, 4, 2, 2))
        assert mixer.decide(10_000).control == "fallback"
        assert mixer.describe()["guardrail"]["reverts"] == 2

    def test_estimates_go_on_and_know_what_drew(self):
        """What the method learns under the fallback is what it would of any such steps."""
        guarded, other = build("exp3"), build_mixer("exp3", domains=NAMES, weights=GIVEN)
        guarded.review(report(1, 3, 2, 2))
        guarded.review(report(2, 9, 2, 2))
        for step in range(3, 12):
            seen = {"loss_sum": [30.0, 24.0, 9.0], "token_count": [10, 8, 3]}
            guarded.observe(Observation(step, **seen))
            other.observe(Observation(step, sampling_weights=GIVEN, **seen))
        p = other.decide(12).sampling_weights
        assert guarded.decide(12).controller_weights.tobytes() == p.tobytes()

    @pytest.mark.parametrize(
        ("fallback", "expected"),
        [
            ("given", GIVEN),
            ("uniform", [1 / 3] * 3),
            ("natural", [0.2, 0.2, 0.6]),
            ({"a": 1, "b": 3, "c": 0}, [0.25, 0.75, 0]),
        ],
    )
    def test_fallbacks(self, fallback, expected):
        context = RunContext(samples_per_epoch=(10.0, 10.0, 30.0))
        mixer = build(guardrail={"fallback": fallback}, context=context)
        mixer.review(report(1, 3, 2, 2))
        mixer.review(report(2, 9, 2, 2))
        np.testing.assert_allclose(mixer.decide(3).sampling_weights, expected, rtol=1e-12)

    def test_floors_hold_for_the_fallback(self):
        mixer = build(guardrail={"fallback": {"a": 1, "b": 1, "c": 0}}, floor={"c": 0.2})
        mixer.review(report(1, 3, 2, 2))
        mixer.review(report(2, 9, 2, 2))
        np.testing.assert_allclose(mixer.decide(3).sampling_weights, [0.4, 0.4, 0.2])

    def test_both_levels_of_groups_hold_for_the_fallback(self):
        mixer = build_mixer(
            "odm",
            domains=["web/a", "web/b", "c"],
            groups={},
            floor={"web": 0.6, "web/b": 0.2},
            guardrail={"fallback": {"web": 0.1, "c": 0.9}},
        )
        mixer.review(report(1, 3, 2, 2))
        mixer.review(report(2, 9, 2, 2))
        np.testing.assert_allclose(mixer.decide(3).sampling_weights, [0.3, 0.3, 0.4])


@pytest.mark.parametrize(
    ("guardrail", "message"),
    [
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"patience": 0}, "patience is 0"),
        ({"retry_after": 0}, "retry_after is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"standard_errors": -0.5}, "standard_errors is -0.5"),
        ({"fallback": "gievn"}, "fallback is 'gievn'"),
        ({"fallback": "natural"}, "sizes of the domains are not known"),
        ({"fallback": {"a": 1.0}}, "says nothing of the domain 'b'"),
        ({"fallback": {"a": 0.0, "b": 0.0, "c": 0.0}}, "one of them above 0"),
        ({"tolerence": 1.0}, "did you mean 'tolerance'"),
    ],
)
def test_what_makes_no_sense_is_refused(guardrail, message):
    with pytest.raises(ConfigError, match=message):
        build(guardrail=guardrail)


class TestForecast:
    def write(self, tmp_path, rows, names=NAMES):
        lines = [{"step": 1, "loss": 5.0}]
        lines += [{"step": s, "valid_loss": dict(zip(names, v, strict=True))} for s, *v in rows]
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path)

    def test_of_an_earlier_run_of_the_fallback(self, tmp_path):
        """Better than before, but far from what the fallback had reached by then."""
        run = self.write(tmp_path, [(10, 4, 4, 4), (30, 2, 2, 2)])
        mixer = build(guardrail={"reference": run, "tolerance": 0.1})
        assert mixer.review(report(10, 4, 4, 4)) is None
        text = mixer.review(report(20, 3.9, 3.9, 3.9))
        assert "0.9000 above what an earlier run of the given weights reached" in text
        assert mixer.decide(21).control == "fallback"

    def test_of_an_earlier_run_says_nothing_beyond_its_end(self, tmp_path):
        run = self.write(tmp_path, [(10, 4, 4, 4), (30, 2, 2, 2)])
        mixer = build(guardrail={"reference": run})
        for step in (5, 31, 40):
            assert mixer.review(report(step, 9 - step / 10, 9, 9)) is None

    def test_the_windows_own_scatter_counts_against_an_earlier_run(self, tmp_path):
        run = self.write(tmp_path, [(10, 4, 4, 4), (30, 4, 4, 4)])
        error = float(np.sqrt((HARD.var(axis=1, ddof=1) / 16).sum()) / 3)
        for factor, expected in ((1.9, False), (2.1, True)):
            mixer = build(guardrail={"reference": run, "tolerance": 0.0})
            assert (mixer.review(report(20, *[4 + factor * error] * 3)) is not None) == expected

    def test_of_an_earlier_run_that_lacks_a_domain(self, tmp_path):
        run = self.write(tmp_path, [(10, 4, 4)], names=NAMES[:2])
        with pytest.raises(DataError, match="no loss of the domain 'c'"):
            build(guardrail={"reference": run})
        build(guardrail={"reference": run}, objective={"a": 1.0})
        with pytest.raises(DataError, match="cannot read the losses of an earlier run"):
            build(guardrail={"reference": str(tmp_path / "nothing")})

    @pytest.mark.parametrize("alpha", [0.2, 0.5])
    def test_of_the_warm_up_by_a_power_law(self, alpha):
        """Nothing gets worse, yet the fallback would have gone on falling."""

        def law(step):
            return 2 + 4 * step**-alpha

        mixer = build(warmup_steps=80)
        for step in range(10, 90, 10):
            assert mixer.review(report(step, *[law(step)] * 3)) is None
        said = [mixer.review(report(step, *[law(80)] * 3)) for step in range(100, 400, 20)]
        text = next(filter(None, said))
        assert "what the given weights would have reached by its power law" in text
        good = build(warmup_steps=80)
        for step in range(10, 400, 10):
            assert good.review(report(step, *[law(step) - 0.001] * 3)) is None

    def test_takes_four_reports_of_the_fallback_and_no_other_mixture(self):
        for warmup, fallback in ((30, "given"), (80, "uniform")):
            mixer = build(warmup_steps=warmup, guardrail={"fallback": fallback})
            for step in range(10, 90, 10):
                assert mixer.review(report(step, *[2 + 4 * step**-0.5] * 3)) is None
            for step in range(90, 400, 10):
                assert mixer.review(report(step, *[2 + 4 * 80**-0.5] * 3)) is None

    def test_a_law_is_less_sure_further_out_and_with_scatter(self):
        steps = list(range(10, 90, 10))
        exact = [2 + 4 * s**-0.5 for s in steps]
        rng = np.random.default_rng(0)
        sure = FittedForecast(steps, exact)
        unsure = FittedForecast(steps, np.array(exact) + rng.normal(0, 0.1, 8))
        assert sure.value(160) == pytest.approx(2 + 4 * 160**-0.5, abs=2e-3)
        errors = [sure.model_error(step) for step in (80, 100, 200, 1000)]
        assert errors == sorted(errors)
        assert errors[0] == 0.0
        assert sure.scatter(100) < 1e-3
        assert 0.03 < unsure.scatter(100) < unsure.scatter(1000)

    def test_interpolation(self):
        losses = np.array([[4.0, np.nan], [2.0, 1.0]])
        assert interpolated((10, 30), losses, 15)[0] == 3.5
        assert interpolated((10, 30), losses, 9) is None
        assert interpolated((), losses, 9) is None


def test_the_paired_error_is_that_of_the_weighted_mean_of_differences():
    """Against its definition, simulated: windows of three domains, weights 0.5, 0.3, 0.2."""
    rng = np.random.default_rng(3)
    objective = Objective(
        ObjectiveOptions(kind="weights", weights={"a": 5.0, "b": 3.0, "c": 2.0}), NAMES
    )
    yardstick = Yardstick(objective, np.eye(3))
    counts, scatter = (40, 10, 25), (0.1, 0.3, 0.2)
    differences, errors = [], []
    for _ in range(3000):
        hard = [rng.normal(3, 1, n) for n in counts]
        now, then = (
            Measurement(
                step=step,
                loss=np.array([w.mean() for w in windows]),
                windows=tuple(windows),
            )
            for step in (1, 2)
            for windows in [
                [h + rng.normal(0, s, len(h)) for h, s in zip(hard, scatter, strict=True)]
            ]
        )
        differences.append(yardstick.difference(now.loss, then.loss))
        errors.append(yardstick.paired_error(now, then))
        assert yardstick.own_error(now) > yardstick.paired_error(now, then)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(differences), rel=0.1)


def alarms(level, *, runs, reports, noise, warmup=0, windows=48):
    """How many of so many runs without fault are stopped; level gives the loss after a step."""
    stopped = 0
    for seed in range(runs):
        mixer = build("static", warmup_steps=warmup)
        held_out = HeldOut(3, windows=windows, noise=noise, seed=seed)
        steps = range(10, 10 * reports + 1, 10)
        stopped += any(mixer.review(held_out.measure(s, np.full(3, level(s)))) for s in steps)
    return stopped


class TestFalseAlarms:
    """200 runs each; the windows scatter far beyond the tolerance."""

    def test_of_a_plateau_are_rare(self):
        assert alarms(lambda step: 2.0, runs=200, reports=30, noise=0.3) <= 10

    def test_of_a_falling_loss_are_rare(self):
        assert alarms(lambda s: 1.5 + 4 * s**-0.4, runs=200, reports=25, noise=0.3) <= 4

    def test_of_a_forecast_are_rare(self):
        law = {"runs": 40, "reports": 25, "noise": 0.2, "warmup": 80}
        assert alarms(lambda s: 1.5 + 4 * s**-0.4, **law) <= 1


def test_a_real_regression_is_found_within_two_reports():
    found = 0
    for seed in range(100):
        mixer = build("static")
        held_out = HeldOut(3, windows=48, noise=0.1, seed=seed)
        for step in range(10, 210, 10):
            level = 1.5 + 4 * step**-0.4
            assert mixer.review(held_out.measure(step, np.full(3, level))) is None
        for step in (210, 220):
            level = 1.5 + 4 * step**-0.4 + 0.08
            if mixer.review(held_out.measure(step, np.full(3, level))):
                found += 1
                break
    assert found >= 95


class TestState:
    OPTIONS: ClassVar = {"guardrail": {"retry_after": 30}, "warmup_steps": 40}

    def reports(self):
        noise = HeldOut(3, windows=8, noise=0.02, seed=4)
        for step in range(10, 200, 10):
            loss = 2 + 3 * step**-0.4 + (0.4 if 90 < step < 130 or step > 160 else 0.0)
            yield noise.measure(step, np.array([loss, loss, np.nan]))

    def test_resumes_to_the_bit(self):
        mixer = whole = build(**self.OPTIONS)
        said = []
        for reported in self.reports():
            fresh = build(**self.OPTIONS)
            text = json.dumps(mixer.state_dict(), allow_nan=False)
            fresh.load_state_dict(json.loads(text))
            assert json.dumps(fresh.state_dict()) == text
            mixer = fresh
            said.append(mixer.review(reported))
        for reported, text in zip(self.reports(), said, strict=True):
            assert whole.review(reported) == text
        assert sum(text is not None for text in said) >= 3
        assert whole.state_dict() == mixer.state_dict()

    def test_a_run_may_get_a_guardrail_later(self):
        plain = build_mixer("odm", domains=NAMES, weights=GIVEN)
        train(plain, 1, 5)
        mixer = build()
        mixer.load_state_dict(json.loads(json.dumps(plain.state_dict())))
        p = plain.decide(6).sampling_weights
        assert mixer.decide(6).sampling_weights.tobytes() == p.tobytes()
        assert mixer.review(report(5, 3, 2, 2)) is None

    @pytest.mark.parametrize("groups", [{}, {"groups": {"members": {"ab": ["a", "b"]}}}])
    def test_a_run_may_go_on_without_its_guardrail(self, groups):
        mixer = build(**groups)
        train(mixer, 1, 5)
        plain = build_mixer("odm", domains=NAMES, weights=GIVEN, **groups)
        plain.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
        p = mixer.decide(6).sampling_weights
        assert plain.decide(6).sampling_weights.tobytes() == p.tobytes()

    def test_damage_is_said(self):
        mixer = build()
        mixer.review(report(5, 3, 2, 2))
        state = mixer.state_dict()
        for key, value in (("best", {"step": 1}), ("history", [[1]]), ("since", "x")):
            bad = {**state, "guardrail": {**state["guardrail"], key: value}}
            with pytest.raises(CheckpointError, match="guardrail is damaged"):
                build().load_state_dict(bad)
        with pytest.raises(CheckpointError, match="guardrail is damaged"):
            build().load_state_dict({**state, "guardrail": {}})

    def test_follows_an_edit_of_the_domains(self):
        mixer = build()
        train(mixer, 1, 10)
        mixer.review(report(10, 3, 2, 2))
        after = build_mixer("odm", domains=["a", "new", "c"], weights=GIVEN, guardrail={})
        after.load_state_dict(after.migrate(json.loads(json.dumps(mixer.state_dict())), {}))
        assert after.review(report(20, 3, 9, 2)) is None
        assert after.review(report(30, 3.2, 9, 2)) is not None

    def test_follows_an_edit_of_the_objective(self):
        """What was best for another objective, and a law through it, is no measure of this one."""
        mixer = build(objective={"a": 1.0}, warmup_steps=80)
        for step in range(10, 90, 10):
            assert mixer.review(report(step, 2 + 4 * step**-0.5, 3, math.nan)) is None
        state = json.dumps(mixer.state_dict(), allow_nan=False)

        after = build(objective={"b": 1.0}, warmup_steps=80)  # compared with a's law, a regression
        after.load_state_dict(json.loads(state))
        for step in range(100, 400, 10):
            assert after.review(report(step, 2.4, 3, math.nan)) is None
        assert after.review(report(400, 2.4, 3.5, math.nan)) is not None

        unmeasured = build(objective={"c": 1.0}, warmup_steps=80)
        unmeasured.load_state_dict(json.loads(state))
        json.dumps(unmeasured.describe(), allow_nan=False)
        assert unmeasured.review(report(90, 2.4, 3, 4)) is None
        assert "above the best, of step 90" in unmeasured.review(report(100, 2.4, 3, 9))


@pytest.mark.parametrize("method", available_methods())
def test_it_goes_around_every_method(method):
    """Groups inside, the guardrail outside: distributions, and state that goes on, throughout."""
    names = ["w/a", "w/b", "c", "d"]
    groups = {} if method in ("replay", "average_of_ledger") else {"groups": {}, "of": 3}

    def make():
        guardrail = {"retry_after": 5, "tolerance": 0.0, "fallback": "uniform"}
        return build_any(method, domains=names, guardrail=guardrail, floor={"c": 0.1}, **groups)

    mixer, seen = make(), set()
    for step in range(1, 25):
        fresh = make()
        fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
        mixer = fresh
        decision = mixer.decide(step)
        if decision.validate:
            mixer.observe(Observation(step - 1, valid_loss=[3, 2, 2.5, 2]))
            decision = mixer.decide(step)
        p = decision.sampling_weights
        assert abs(p.sum() - 1) <= 1e-12
        assert p[2] >= 0.1 - 1e-12
        seen.add(decision.control)
        if decision.control == "fallback":
            np.testing.assert_allclose(p, 0.25, rtol=1e-12)
            assert decision.fresh_quota is decision.probe is decision.loss_weights is None
        counts = np.array([3.0, 4.0, 0.0 if step % 3 == 0 else 2.0, 5.0])
        sums = counts * [3.0, 2.5, 2.0, 3.5]
        go(mixer, Observation(step, loss_sum=sums, token_count=counts, sampling_weights=p))
        json.dumps(mixer.describe(), allow_nan=False)
        if step % 4 == 0:
            loss = np.array([3.0, 2, 2, 2]) + (0.5 if step == 8 else 0.0)
            mixer.review(
                Reported(
                    step=step,
                    loss=loss,
                    window_loss=np.repeat(loss, 2),
                    window_domain=np.repeat(np.arange(4), 2),
                )
            )
    assert seen == {None, "fallback"}
    assert mixer.step == 24


class TestSimulatedRuns:
    STEPS = 1500

    def run(self, method, world, **options):
        mixer = build_mixer(method, domains=list(world.domains), **options)
        held_out = HeldOut(len(world.domains), spread=0.02)
        return simulate(mixer, world, steps=self.STEPS, review_every=50, held_out=held_out)

    def record(self, folder, world, run):
        """Write what a run's report validations would have been."""
        lines = [
            {"step": int(step), "valid_loss": dict(zip(world.domains, losses, strict=True))}
            for step, losses in zip(run.steps, run.losses.tolist(), strict=True)
            if step % 50 == 0
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return str(folder)

    def final(self, world, p):
        world.reset()
        for _ in range(self.STEPS):
            world.train(p)
        return float(world.losses().mean())

    def test_a_method_that_does_harm_ends_where_the_fallback_does(self):
        """Nearly all on one domain after a warm-up, from which the fallback is known."""
        world = power_world()
        fallback = self.run("static", world)
        bad = [1.0, *[1e-3] * 6]
        stages = [{"steps": 400, "weights": "given"}, {"weights": bad}]
        alone = self.run("schedule", world, stages=stages)
        mixed = self.run("schedule", world, stages=stages, warmup_steps=400, guardrail={})
        assert alone.final > fallback.final + 0.1
        assert mixed.final <= fallback.final + 0.02
        assert len(mixed.said) == 1
        assert 0 < mixed.fallback_steps < self.STEPS - 400

    @pytest.mark.parametrize("world", [random_linear(7, seed=5), power_world()])
    def test_a_run_of_the_fallback_shows_what_the_best_so_far_cannot(self, world, tmp_path):
        """The loss falls all the time, only more slowly than it could."""
        fallback = self.run("static", world)
        run = self.record(tmp_path, world, fallback)
        bad = np.full(7, 1e-3)
        worst = [self.final(world, (np.eye(7)[k] + bad) / (1 + 7e-3)) for k in range(7)]
        weights = np.eye(7)[int(np.argmax(worst))] + bad
        stages = [{"weights": weights.tolist()}]
        guardrail = {"reference": run, "tolerance": 0.01, "fallback": "uniform"}
        mixed = self.run("schedule", world, stages=stages, guardrail=guardrail)
        assert max(worst) > fallback.final + 0.04
        assert mixed.final <= fallback.final + 0.02
        assert mixed.said[0][0] <= 400

    def test_smoothed_mean_is_held_to_the_fallback(self, tmp_path):
        """It keeps on to what cannot be learnt any better."""
        world = power_world()
        fallback = self.run("static", world)
        guardrail = {"reference": self.record(tmp_path, world, fallback), "tolerance": 0.01}
        alone = self.run("smoothed_mean", world)
        mixed = self.run("smoothed_mean", world, guardrail=guardrail)
        assert alone.final > fallback.final + 0.015
        assert mixed.final <= fallback.final + 0.01
        assert len(mixed.said) == 1

    def test_a_good_method_is_left_alone(self):
        world = power_world()
        for options in ({}, {"warmup_steps": 250}):
            alone = self.run("aioli", world, **options)
            guarded = self.run("aioli", world, guardrail={}, **options)
            assert guarded.said == ()
            assert guarded.weights.tobytes() == alone.weights.tobytes()
