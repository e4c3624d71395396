"""Groups: membership, shares, both levels of bounds, and a method that sees groups alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixing import LEDGERS, build_any

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.reported import Reported

NAMES = ["web/high", "books", "web/low", "code"]
GIVEN = [0.3, 0.4, 0.1, 0.2]
ACTING = sorted(set(available_methods()) - LEDGERS)


def build(method="static", **options):
    return build_mixer(method, domains=NAMES, weights=GIVEN, **{"groups": {}, **options})


def weights(mixer, step=1):
    return dict(zip(NAMES, mixer.decide(step).sampling_weights.tolist(), strict=True))


class TestShares:
    def test_given(self):
        np.testing.assert_allclose(list(weights(build()).values()), GIVEN, rtol=1e-15)
        assert build().describe()["groups"]["weights"] == pytest.approx(
            {"web": 0.4, "books": 0.4, "code": 0.2}
        )

    def test_natural_and_temperature(self):
        context = RunContext(samples_per_epoch=(90.0, 5.0, 10.0, 7.0))
        natural = weights(build(groups={"shares": "natural"}, context=context))
        assert natural["web/high"] == pytest.approx(0.4 * 0.9)
        assert natural["web/low"] == pytest.approx(0.4 * 0.1)
        warm = weights(build(groups={"shares": "temperature", "alpha": 0.5}, context=context))
        assert warm["web/high"] / warm["web/low"] == pytest.approx(3.0)
        flat = weights(build(groups={"shares": "temperature", "alpha": 0.0}, context=context))
        assert flat["web/high"] == pytest.approx(flat["web/low"])

    def test_by_name(self):
        found = weights(build(groups={"shares": {"web/high": 1, "web/low": 3}}))
        assert found == pytest.approx({"web/high": 0.1, "books": 0.4, "web/low": 0.3, "code": 0.2})

    def test_a_group_without_weight_is_shared_equally(self):
        mixer = build_mixer("odm", domains=NAMES, weights=[0, 1, 0, 1], groups={})
        assert weights(mixer, 1)["web/high"] == 0.0
        for step in range(1, 5):
            mixer.observe(Observation(step, loss_sum=[2, 3, 4, 5], token_count=[1, 1, 1, 1]))
        found = weights(mixer, 5)
        assert found["web/high"] == found["web/low"] > 0

    def test_members(self):
        groups = {"members": {"text": ["books", "web/low"]}}
        mixer = build(groups=groups)
        assert mixer.describe()["groups"]["weights"] == pytest.approx(
            {"web/high": 0.3, "text": 0.5, "code": 0.2}
        )
        assert mixer.slots.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"shares": "natural"}}, "sizes of the domains are not known"),
        ({"groups": {"shares": "naturl"}}, "shares is 'naturl'"),
        ({"groups": {"members": {"web": ["web/hihg"]}}}, "did you mean 'web/high'"),
        ({"groups": {"members": {"a": ["code"], "b": ["code"]}}}, "a domain is in one group"),
        ({"groups": {"members": {"code": ["books", "web/low"]}}}, "'code' has the name of a dom"),
        ({"groups": {"members": {"code": ["books", "code"]}}}, "a domain and a group's name"),
        ({"groups": {"members": {"a": []}}}, "'a' has no members"),
        ({"groups": {"members": {"a": ["code"]}}}, "every group has one domain alone"),
        ({"groups": {"shares": {"web/high": 1}}}, "but not 'web/low'"),
        ({"groups": {"shares": {"web/high": -1, "web/low": 2}}}, "share of 'web/high' is -1"),
        ({"groups": {"alpha": -1.0}}, "alpha is -1.0"),
        ({"groups": {"member": {}}}, "did you mean 'members'"),
        ({"floor": {"wbe": 0.1}}, "names 'wbe', which is no group and no domain; did you mean"),
        ({"floor": 0.4}, "floors of the 3 groups"),
        ({"ceiling": 0.3}, "ceilings of the 3 groups"),
        ({"floor": {"web/high": 0.5}, "ceiling": {"web": 0.4}}, "ceiling of the group 'web'"),
        ({"floor": {"web": 0.5}, "ceiling": {"web/high": 0.2, "web/low": 0.2}}, "floor of the gr"),
        ({"floor": {"web/high": 0.3}, "ceiling": {"web/high": 0.2}}, "domain 'web/high' is 0.3"),
        ({"floor": {"web": -0.1}}, "floor of the group 'web' is -0.1"),
    ],
)
def test_what_contradicts_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_a_group_that_has_the_name_of_a_domain_outside_is_refused():
    with pytest.raises(ConfigError, match="'web' is a domain and a group's name too"):
        build_mixer("static", domains=["web/a", "web"], groups={})
    context = RunContext(targets=("web",))
    with pytest.raises(ConfigError, match="'web' is a group's name and that of a domain which"):
        build_mixer("static", domains=["web/a", "web/b"], groups={}, context=context)


def test_a_ledger_of_domains_is_not_replayed_by_groups(tmp_path):
    with pytest.raises(ConfigError, match="repeats decisions about domains"):
        build_mixer("replay", domains=NAMES, groups={}, ledger=str(tmp_path / "mixture.jsonl"))


class TestBounds:
    def test_both_levels_hold(self):
        """The group's floor lifts the group; the domain's ceiling moves what is inside it."""
        found = weights(
            build(floor={"web": 0.6, "code": 0.1}, ceiling={"web/high": 0.35, "books": 0.25})
        )
        assert found["web/high"] == pytest.approx(0.35)
        assert found["web/high"] + found["web/low"] >= 0.6 - 1e-12
        assert found["books"] <= 0.25 + 1e-12
        assert found["code"] >= 0.1
        assert sum(found.values()) == pytest.approx(1, abs=1e-12)

    def test_one_number_is_for_groups(self):
        found = weights(
            build_mixer("static", domains=NAMES, weights=[0, 1, 0, 1], floor=0.2, groups={})
        )
        assert found["web/high"] + found["web/low"] == pytest.approx(0.2)

    def test_a_list_is_for_domains(self):
        assert weights(build(floor=[0, 0, 0.25, 0]))["web/low"] == pytest.approx(0.25)

    @settings(derandomize=True, max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_bounds_that_can_be_met_are(self, data):
        """Bounds around a known mixture can be met; whatever the method asks for, they are."""
        draw = data.draw
        count = draw(st.integers(2, 7))
        names = [f"{draw(st.sampled_from('abc'))}/{k}" for k in range(count)]
        if len({name[0] for name in names}) == count:
            return
        unit = st.floats(0, 1)
        meets = np.array([draw(st.floats(0.01, 1)) for _ in names])
        meets /= meets.sum()
        floor = {n: float(m * draw(unit)) for n, m in zip(names, meets, strict=True)}
        ceiling = {n: float(m + (1 - m) * draw(unit)) for n, m in zip(names, meets, strict=True)}
        for group in {name[0] for name in names}:
            held = float(sum(m for n, m in zip(names, meets, strict=True) if n[0] == group))
            floor[group] = held * draw(unit)
            ceiling[group] = min(1.0, held + (1 - held) * draw(unit))
        given = [draw(st.one_of(st.just(0.0), st.floats(1e-6, 1e3))) for _ in names]
        given[0] += 1e-3
        mixer = build_mixer(
            "static", domains=names, weights=given, groups={}, floor=floor, ceiling=ceiling
        )
        p = mixer.decide(1).sampling_weights
        assert abs(p.sum() - 1) <= 1e-12
        for name, weight in zip(names, p, strict=True):
            assert floor[name] - 1e-12 <= weight <= ceiling[name] + 1e-12
        for group in {name[0] for name in names}:
            total = sum(w for n, w in zip(names, p, strict=True) if n[0] == group)
            assert floor[group] - 1e-12 <= total <= ceiling[group] + 1e-12


def observation(step, drew):
    """Four domains' step; the two of the group web differ in everything."""
    return Observation(
        step,
        loss_sum=[30.0 / step, 12.0, 50.0 / step, 8.0],
        token_count=[10, 4, 20, 3 if step % 2 else 0],
        sampling_weights=drew,
        loss_square_sum=[90.0, 36.0, 125.0, 22.0],
        sample_count=[10, 4, 20, 3],
        samples_seen=[10 * step, 4 * step, 20 * step, 3 * step],
        excess_loss=[0.5, 0.2, 0.1, np.nan],
        reference_loss=[2.5, 2.8, 2.4, np.nan],
        batch_valid_loss=[3.1, np.nan, 2.6, np.nan],
        gradient_alignment=[0.3, 0.1, 0.3, -0.2],
        learning_rate=1e-3,
    )


def gathered(step, drew):
    """The same step of three groups, added up and averaged by hand."""
    return Observation(
        step,
        loss_sum=[80.0 / step, 12.0, 8.0 if step % 2 else 0.0],
        token_count=[30, 4, 3 if step % 2 else 0],
        sampling_weights=[drew[0] + drew[2], drew[1], drew[3]],
        loss_square_sum=[215.0, 36.0, 22.0],
        sample_count=[30, 4, 3],
        samples_seen=[30 * step, 4 * step, 3 * step],
        excess_loss=[(0.5 * 10 + 0.1 * 20) / 30, 0.2, np.nan],
        reference_loss=[(2.5 * 10 + 2.4 * 20) / 30, 2.8, np.nan],
        batch_valid_loss=[(3.1 * 10 + 2.6 * 20) / 30, np.nan, np.nan],
        gradient_alignment=[0.3, 0.1, -0.2],
        learning_rate=1e-3,
    )


@pytest.mark.parametrize("method", ACTING)
def test_a_method_on_groups_decides_what_it_would_of_domains_like_them(method):
    """Around any method: what it sees are three domains, and shares are all that is added."""
    mixer = build_any(method, domains=NAMES, weights=GIVEN, groups={}, of=3)
    plain = build_any(method, domains=["web", "books", "code"], weights=[0.4, 0.4, 0.2])
    shares = np.array([0.75, 1, 0.25, 1])
    losses = np.array([3.0, 2.0, 2.0, 2.5])
    for step in range(1, 30):
        ours, theirs = mixer.decide(step), plain.decide(step)
        assert ours.validate == theirs.validate
        if ours.validate:
            now = losses / step**0.2
            within = [0.75 * now[0] + 0.25 * now[2], now[1], now[3]]
            mixer.observe(Observation(step - 1, valid_loss=now))
            plain.observe(Observation(step - 1, valid_loss=within))
            ours, theirs = mixer.decide(step), plain.decide(step)
        assert ours.measure == theirs.measure
        drew = ours.sampling_weights
        if ours.measure:
            ours = mixer.foresee(observation(step, drew))
            theirs = plain.foresee(gathered(step, drew))
        spread = theirs.sampling_weights[[0, 1, 0, 2]] * shares
        np.testing.assert_allclose(drew, spread, rtol=1e-9, atol=1e-12)
        assert (ours.fresh_quota, ours.probe) == (theirs.fresh_quota, theirs.probe)
        assert (ours.loss_weights is None) == (theirs.loss_weights is None)
        if ours.loss_weights is not None:
            np.testing.assert_allclose(ours.loss_weights, theirs.loss_weights[[0, 1, 0, 2]])
        mixer.observe(observation(step, drew))
        plain.observe(gathered(step, drew))
    assert mixer.step == plain.step == 29
    assert mixer.method == plain.method
    assert mixer.needs == plain.needs


@pytest.mark.parametrize("method", ACTING)
def test_it_resumes_with_the_same_bits(method):
    def make():
        return build_any(method, domains=NAMES, weights=GIVEN, groups={}, of=3)

    mixer = make()
    for step in range(1, 20):
        fresh = make()
        text = json.dumps(mixer.state_dict(), allow_nan=False)
        fresh.load_state_dict(json.loads(text))
        assert json.dumps(fresh.state_dict()) == text
        decisions = []
        for one in (mixer, fresh):
            decision = one.decide(step)
            if decision.validate:
                one.observe(Observation(step - 1, valid_loss=[3, 2, 2, 2.5]))
                decision = one.decide(step)
            if decision.measure:
                decision = one.foresee(observation(step, decision.sampling_weights))
            one.observe(observation(step, decision.sampling_weights))
            decisions.append(decision.sampling_weights.tobytes())
        assert decisions[0] == decisions[1]
        mixer = fresh
    json.dumps(mixer.describe(), allow_nan=False)


def test_other_groups_are_refused_on_resume():
    state = build("odm").state_dict()
    other = build("odm", groups={"members": {"x": ["books", "code"]}})
    with pytest.raises(CheckpointError, match="the same groups"):
        other.load_state_dict(state)
    plain = build_mixer("odm", domains=NAMES, weights=GIVEN)
    for act in (build("odm").load_state_dict, lambda old: build("odm").migrate(old, {})):
        with pytest.raises(CheckpointError, match="acted on domains"):
            act(plain.state_dict())
    with pytest.raises(CheckpointError, match="acted on the groups"):
        plain.load_state_dict(state)


def test_an_absent_domain_of_a_group_is_not_read_and_a_broken_loss_is():
    clean, noisy = build("odm"), build("odm")
    counts = {"token_count": [10, 4, 0, 3]}
    clean.observe(Observation(1, loss_sum=[30, 12, 0, 8], **counts))
    noisy.observe(Observation(1, loss_sum=[30, 12, 999, 8], **counts))
    assert clean.state_dict() == noisy.state_dict()
    before = clean.state_dict()
    for broken in (np.nan, np.inf):
        clean.observe(Observation(2, loss_sum=[30, 12, broken, 8], **counts))
        assert clean.state_dict() == before
    clean.observe(Observation(2, loss_sum=[1.7e308, 12, 1.7e308, 8], token_count=[1, 1, 1, 1]))
    assert clean.step == 2


def test_a_held_out_loss_of_one_domain_stands_for_its_group():
    mixer = build("naive_validation", update_every=1)
    mixer.observe(Observation(1, loss_sum=[1] * 4, token_count=[1] * 4))
    mixer.observe(Observation(1, valid_loss=[3.0, 2.0, np.nan, 2.5]))
    assert mixer.describe()["gain"] == pytest.approx({"web": 1.0, "books": 0.0, "code": 0.5})


def test_an_objective_names_groups_and_domains():
    """Weights inside a group are the objective's there, and the shares elsewhere."""
    objective = {"web/low": 3.0, "web/high": 1.0, "books": 4.0}
    mixer = build("skillit", objective=objective, update_every=1)
    plain = build_mixer(
        "skillit",
        domains=["web", "books", "code"],
        weights=[0.4, 0.4, 0.2],
        update_every=1,
        objective={"web": 1.0, "books": 1.0},
    )
    for step in range(1, 6):
        now = np.array([3.0, 2.0, 5.0, 2.5]) / step**0.3
        mixer.observe(Observation(step, loss_sum=[1] * 4, token_count=[1] * 4))
        plain.observe(Observation(step, loss_sum=[1] * 3, token_count=[1] * 3))
        mixer.observe(Observation(step, valid_loss=now))
        within = [0.25 * now[0] + 0.75 * now[2], now[1], now[3]]
        plain.observe(Observation(step, valid_loss=within))
    p, q = mixer.decide(6).sampling_weights, plain.decide(6).sampling_weights
    np.testing.assert_allclose(p, q[[0, 1, 0, 2]] * [0.75, 1, 0.25, 1], rtol=1e-9)
    with pytest.raises(ConfigError, match="names the group 'web' and its domain 'web/low'"):
        build("skillit", objective={"web": 1.0, "web/low": 1.0})
    with pytest.raises(ConfigError, match="name 'web'"):
        build("skillit", objective={"kind": "worst", "above": {"web/low": 1.0}})


@pytest.mark.parametrize("scale", [10.0, 1e308])
def test_a_rule_starts_from_the_groups_weights_as_they_are(scale):
    """A group's given weight is the sum of its domains', of any scale: ema's start is that."""
    given = [scale * weight for weight in (0.3, 0.4, 0.1, 0.2)]
    mixer = build_mixer("ema", domains=NAMES, weights=given, groups={})
    np.testing.assert_allclose(mixer.decide(1).sampling_weights, GIVEN)
    start = mixer.describe()["mean_loss"]
    assert start == pytest.approx({"web": scale * 0.4, "books": scale * 0.4, "code": scale * 0.2})
    huge = build_mixer("ema", domains=NAMES, weights=[1e308, 0, 1.5e308, 1e308], groups={})
    np.testing.assert_allclose(huge.decide(1).sampling_weights, np.array([1, 0, 1.5, 1]) / 3.5)


def test_shadow_draws_the_given_mixture_and_shows_both_levels():
    mixer = build("odm", shadow=True)
    for step in range(1, 6):
        decision = mixer.decide(step)
        np.testing.assert_allclose(decision.sampling_weights, GIVEN, rtol=1e-12)
        assert decision.control == "shadow"
        mixer.observe(observation(step, decision.sampling_weights))
    shown = mixer.describe()
    assert shown["groups"]["weights"] == pytest.approx({"web": 0.4, "books": 0.4, "code": 0.2})
    wanted, groups = shown["controller_weights"], shown["groups"]["controller_weights"]
    assert wanted["web/high"] == pytest.approx(0.75 * groups["web"])
    assert groups["web"] != pytest.approx(0.4)


def test_a_domain_joins_and_leaves_without_the_groups_forgetting():
    mixer = build("odm")
    for step in range(1, 9):
        mixer.observe(observation(step, GIVEN))
    names = ["web/high", "books", "web/mid", "code"]
    after = build_mixer("odm", domains=names, weights=GIVEN, groups={})
    after.load_state_dict(after.migrate(json.loads(json.dumps(mixer.state_dict())), {}))
    assert after.step == 8
    assert after.describe()["estimate"] == mixer.describe()["estimate"]
    p, q = after.decide(9).sampling_weights, mixer.decide(9).sampling_weights
    np.testing.assert_allclose(p, q, rtol=1e-12)


class TestEpochs:
    CONTEXT = RunContext(
        total_steps=100, samples_per_step=10, samples_per_epoch=(100.0, 400.0, 100.0, 500.0)
    )

    def train(self, mixer, steps=100):
        """Draw as decided, in fractions; return the passes over each domain."""
        drawn = np.zeros(4)
        for step in range(1, steps + 1):
            decision = mixer.decide(step)
            drawn += 10 * decision.sampling_weights
            mixer.observe(
                Observation(
                    step,
                    loss_sum=[3.0, 2.0, 4.0, 1.0],
                    token_count=[1, 1, 1, 1],
                    sampling_weights=decision.sampling_weights,
                    samples_seen=drawn,
                )
            )
        return drawn / self.CONTEXT.samples_per_epoch

    def test_a_limit_on_a_group_leaves_its_shares(self):
        mixer = build(max_epochs={"web": 1.5}, context=self.CONTEXT)
        passes = self.train(mixer)
        assert passes[0] == pytest.approx(2.25)
        assert passes[2] == pytest.approx(0.75)
        assert weights(mixer, 101)["web/high"] == pytest.approx(0.3)  # the run is over

    def test_a_limit_on_a_domain_is_made_up_for_by_its_group(self):
        passes = self.train(build(max_epochs={"web/high": 1.0}, context=self.CONTEXT))
        assert passes == pytest.approx([1.0, 1.0, 3.0, 0.4])

    def test_both_and_one_number_for_groups(self):
        limits = {"web/high": 1.0, "web": 1.5}
        passes = self.train(build("odm", max_epochs=limits, context=self.CONTEXT))
        assert passes[0] <= 1 + 1e-9
        assert passes[0] + passes[2] <= 3 + 1e-9
        passes = self.train(build("odm", max_epochs=1.2, context=self.CONTEXT))
        assert passes[0] + passes[2] <= 2.4 + 1e-9
        assert passes[0] > 1.2

    def test_a_fallback_keeps_to_it(self):
        mixer = build(max_epochs={"web": 1.0}, context=self.CONTEXT, guardrail={})
        for step, loss in ((1, 1.0), (2, 5.0)):
            mixer.review(
                Reported(
                    step=step,
                    loss=np.full(4, loss),
                    window_loss=np.full(8, loss),
                    window_domain=np.repeat(np.arange(4), 2),
                )
            )
        assert mixer.decide(3).control == "fallback"
        passes = self.train(mixer)
        assert passes[0] + passes[2] == pytest.approx(2.0)

    def test_limits_that_cannot_be_kept_are_refused(self):
        with pytest.raises(ConfigError, match="names 'wbe', which is no group"):
            build(max_epochs={"wbe": 1.0}, context=self.CONTEXT)
        limits = {"web/high": 0.1, "web/low": 0.1, "books": 0.9, "code": 1.0}
        with pytest.raises(ConfigError, match="allow less data together"):
            build(max_epochs=limits, context=self.CONTEXT)

    def test_it_resumes_with_the_counts(self):
        mixer, fresh = (build(max_epochs={"web": 1.5}, context=self.CONTEXT) for _ in range(2))
        self.train(mixer, 40)
        fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
        a, b = mixer.decide(41), fresh.decide(41)
        assert a.sampling_weights.tobytes() == b.sampling_weights.tobytes()
        assert a.epochs.tobytes() == b.epochs.tobytes()
