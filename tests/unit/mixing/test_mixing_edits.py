"""Every method follows an edit of the domains, and a resumed one goes on with the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.mixing import LEDGERS, build_any, go

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.errors import CheckpointError

FAST: dict[str, dict[str, Any]] = {
    "ado": {
        "first_fit": 4,
        "fit_every": 5,
        "subsample": 1,
        "smoothing_window": 5,
        "smoothing_order": 2,
    },
    "skillit": {"history": 2},
}
HEIGHT = {"a": 3.0, "b": 2.0, "c": 2.5, "d": 1.5, "a1": 3.2, "a2": 2.8}
FOLLOWING = [method for method in available_methods() if method not in LEDGERS]
"""A replay takes all domains of its ledger at once."""


def make(method: str, names: Sequence[str], weights: Sequence[float] | None = None, **more: Any):
    if method == "aioli":
        every = 2 * len(names) + 3
        probes = {"lp_rounds": 1, "lp_steps": 2, "update_every": every, "one_hot_factor": 0.7}
        return build_mixer(method, domains=list(names), weights=weights, **{**probes, **more})
    options = {**FAST.get(method, {}), **more}
    return build_any(method, domains=list(names), weights=weights, **options)


def loss_of(name: str, step: int) -> float:
    return HEIGHT[name] / step**0.2 + 0.05 * math.sin(7 * step + len(name) * HEIGHT[name])


def advance(mixer: Any, step: int) -> dict[str, Any]:
    """Take a mixer through a step as the loop does; return what was decided, by name."""
    names = mixer.domains
    decision, validated = mixer.decide(step), False
    if decision.validate:
        validated = True
        zero = [0.0] * len(names)
        held_out = [loss_of(name, step) - 0.1 for name in names]
        mixer.observe(Observation(step - 1, valid_loss=held_out, loss_sum=zero, token_count=zero))
        decision = mixer.decide(step)
    tokens = np.array([4.0 if (step + place) % 4 else 0.0 for place in range(len(names))])
    losses = np.array([loss_of(name, step) for name in names])
    go(
        mixer,
        Observation(
            step,
            loss_sum=losses * tokens,
            token_count=tokens,
            sample_count=tokens / 2,
            sampling_weights=decision.sampling_weights,
        ),
    )
    loss_weights = decision.loss_weights
    return {
        "p": dict(zip(names, decision.sampling_weights.tolist(), strict=True)),
        "loss_weights": None if loss_weights is None else loss_weights.tolist(),
        "probe": decision.probe,
        "fresh_quota": decision.fresh_quota,
        "validated": validated,
    }


def through_json(state: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(state, allow_nan=False))


def edited(
    before: Any,
    method: str,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    parents: Mapping[str, str] | None = None,
    **more: Any,
) -> Any:
    after = make(method, names, weights, **more)
    state = through_json(before.state_dict())
    copy = through_json(state)
    fresh = json.dumps(after.state_dict())
    moved = after.migrate(state, parents or {})
    assert state == copy
    assert json.dumps(after.state_dict()) == fresh, "migrating changed the mixer"
    after.load_state_dict(through_json(moved))
    return after


@pytest.mark.parametrize("method", available_methods())
@pytest.mark.parametrize("every", [1, 3])
def test_restored_before_any_step_it_goes_on_with_the_same_bits(method: str, every: int) -> None:
    """In the middle of a probe, of a window, between a measurement and its step."""
    more = {} if method == "aioli" else {"update_every": every}
    whole, parts = make(method, "abc", **more), make(method, "abc", **more)
    for step in range(1, 40):
        state = through_json(parts.state_dict())
        parts = make(method, "abc", **more)
        parts.load_state_dict(state)
        assert advance(parts, step) == advance(whole, step)
        assert json.dumps(parts.state_dict()) == json.dumps(whole.state_dict())


@pytest.mark.parametrize("stop", range(1, 24))
def test_aioli_goes_on_from_a_measurement_that_was_just_made(stop: int) -> None:
    mixer = make("aioli", "abc")
    for step in range(1, stop):
        advance(mixer, step)
    if mixer.decide(stop).validate:
        held_out = [loss_of(name, stop) - 0.1 for name in "abc"]
        mixer.observe(Observation(stop - 1, valid_loss=held_out))
    again = make("aioli", "abc")
    again.load_state_dict(through_json(mixer.state_dict()))
    for step in range(stop, stop + 20):
        assert advance(again, step) == advance(mixer, step)


@pytest.mark.parametrize("stop", [1, 4, 11, 17])
@pytest.mark.parametrize("method", FOLLOWING)
def test_it_follows_every_kind_of_edit(method: str, stop: int) -> None:
    mixer, step = make(method, "abc", [2, 1, 1]), 1
    for names, weights, parents in (
        ("bdc", [1, 2, 1], {}),  # a leaves, d comes
        (["c", "a1", "b", "a2"], [1, 1, 1, 3], {"a1": "a", "a2": "a"}),  # parts of one long gone
        ("abcd", [1, 1, 1, 1], {}),  # both come back
        ("cb", [1, 1], {}),
    ):
        for done in range(step, step + stop):
            advance(mixer, done)
        step += stop
        mixer = edited(mixer, method, names, weights, parents)
        assert mixer.domains == tuple(names)
        for ahead in (step, step + 30):
            p = mixer.decide(ahead).sampling_weights
            assert p.shape == (len(names),)
            assert abs(p.sum() - 1) <= 1e-12
            assert (p >= 0).all()
    for last in range(step, step + 60):
        decided = advance(mixer, last)
        assert set(decided["p"]) == {"b", "c"}
    text = json.dumps(mixer.state_dict(), allow_nan=False)
    assert all(name in text for name in ('"a"', '"d"')), "what is gone is remembered"


@pytest.mark.parametrize("method", FOLLOWING)
def test_the_order_of_the_new_domains_does_not_matter(method: str) -> None:
    mixers = []
    for names, weights in (("bcd", [1, 2, 3]), ("dbc", [3, 1, 2])):
        mixer = make(method, "abc", [1, 1, 2])
        for step in range(1, 14):
            advance(mixer, step)
        mixers.append(edited(mixer, method, names, weights))
    for step in range(14, 30):
        one, other = (mixer.decide(step).sampling_weights for mixer in mixers)
        if not mixers[0].decide(step).validate:
            np.testing.assert_allclose(other, one[[2, 0, 1]], rtol=1e-9)
        for mixer in mixers:
            names = mixer.domains
            tokens = [4.0] * 3
            losses = [4.0 * loss_of(name, step) for name in names]
            if mixer.decide(step).validate:
                mixer.observe(Observation(step - 1, valid_loss=[loss / 4 for loss in losses]))
            drawn = mixer.decide(step).sampling_weights
            go(
                mixer,
                Observation(step, loss_sum=losses, token_count=tokens, sampling_weights=drawn),
            )


SAMPLERS = ["odm", "exp3", "smoothed_mean", "smoothed_mean_exp", "naive_validation", "ema"]


@pytest.mark.parametrize("method", SAMPLERS)
def test_those_that_stay_share_as_they_did(method: str) -> None:
    mixer = make(method, "abc")
    for step in range(1, 20):
        advance(mixer, step)
    before = dict(zip("abc", mixer.decide(20).sampling_weights.tolist(), strict=True))
    if mixer.decide(20).validate:  # measure it first, so that the weights are those of the step
        mixer.observe(Observation(19, valid_loss=[loss_of(name, 20) for name in "abc"]))
        before = dict(zip("abc", mixer.decide(20).sampling_weights.tolist(), strict=True))
    after = edited(mixer, method, "cda", [1, 2, 1])
    shares = dict(zip("cda", after.decide(20).sampling_weights.tolist(), strict=True))
    assert shares["d"] == pytest.approx(0.5)
    assert shares["a"] / shares["c"] == pytest.approx(before["a"] / before["c"])


def test_a_split_divides_weight_and_passes_on_the_estimate() -> None:
    mixer = make("odm", "abc")
    for step in range(1, 12):
        advance(mixer, step)
    before = dict(zip("abc", mixer.decide(12).sampling_weights.tolist(), strict=True))
    estimate = mixer.describe()["estimate"]
    names = ["a1", "a2", "b", "c"]
    after = edited(mixer, "odm", names, [1, 3, 4, 4], {"a1": "a", "a2": "a"})
    shares = dict(zip(names, after.decide(12).sampling_weights.tolist(), strict=True))
    assert shares["a1"] == pytest.approx(before["a"] / 4)
    assert shares["a2"] == pytest.approx(before["a"] * 3 / 4)
    assert [shares[name] for name in "bc"] == pytest.approx([before[name] for name in "bc"])
    now = after.describe()["estimate"]
    assert now == {"a1": estimate["a"], "a2": estimate["a"], "b": estimate["b"], "c": estimate["c"]}


def test_a_domain_that_returns_takes_its_estimate_back() -> None:
    mixer = make("odm", "abc")
    for step in range(1, 12):
        advance(mixer, step)
    estimate = mixer.describe()["estimate"]
    without = edited(mixer, "odm", "bc")
    for step in range(12, 20):
        advance(without, step)
    present = without.describe()["estimate"]
    back = edited(without, "odm", "dabc").describe()["estimate"]
    assert back["a"] == estimate["a"]
    assert {name: back[name] for name in "bc"} == present
    assert back["d"] == pytest.approx(sum(present.values()) / 2)


def test_ado_counts_on_and_waits_for_a_law() -> None:
    mixer = make("ado", "abc", objective={"kind": "uniform"})
    for step in range(1, 14):
        advance(mixer, step)
    before = mixer.state_dict()["rule"]
    after = edited(mixer, "ado", "bd")
    rule = after.state_dict()["rule"]
    assert rule["seen_in_all"] == before["seen_in_all"] == sum(before["seen"].values())
    assert rule["seen"] == {"b": before["seen"]["b"], "d": 0.0}
    assert rule["laws"]["alpha"] == {"b": before["laws"]["alpha"]["b"], "d": None}
    frozen = after.decide(14).sampling_weights
    advance(after, 14)
    np.testing.assert_array_equal(after.decide(15).sampling_weights, frozen)
    for step in range(15, 40):
        advance(after, step)
    assert after.state_dict()["rule"]["laws"]["alpha"]["d"] is not None


@pytest.mark.parametrize("stop", range(1, 21))
def test_aioli_opens_a_round_over_the_new_domains(stop: int) -> None:
    mixer = make("aioli", "abc", update_every=14)
    for step in range(1, stop):
        advance(mixer, step)
    after = edited(mixer, "aioli", "dcba", update_every=14)
    decided = [advance(after, step) for step in range(stop, stop + 30)]
    for opened in (0, 14):
        probes = [one["probe"] for one in decided[opened : opened + 14]]
        assert sorted(set(probes[:8])) == [0, 1, 2, 3]
        assert probes[8:] == [None] * 6
        assert [one["fresh_quota"] for one in decided[opened : opened + 8]] == [2, None] * 4
        measured = [one["validated"] for one in decided[opened : opened + 14]]
        assert measured == [True, False] * 4 + [True] + [False] * 5
    learnt = [tuple(one["p"].values()) for one in decided[8:14]]
    assert len(set(learnt)) == 1


@pytest.mark.parametrize("method", ["static", "schedule"])
def test_what_is_not_learnt_follows_the_configuration(method: str) -> None:
    mixer = make(method, "abc", [2, 1, 1])
    for step in range(1, 5):
        advance(mixer, step)
    again = make(method, "abc", [1, 1, 2])
    again.load_state_dict(through_json(mixer.state_dict()))
    assert again.decide(5).sampling_weights.tolist() == [0.25, 0.25, 0.5]
    after = edited(mixer, method, "bd", [1, 3])
    assert after.decide(5).sampling_weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("method", ["odm", "ado", "aioli", "ema"])
def test_new_given_weights_hold_where_nothing_was_learnt_and_in_shadow(method: str) -> None:
    untouched = make(method, "abc", [2, 1, 1])
    again = make(method, "abc", [1, 1, 2])
    again.load_state_dict(through_json(untouched.state_dict()))
    assert again.decide(10**6).sampling_weights.sum() == pytest.approx(1)
    plain = make(method, "abc", [1, 1, 2])
    assert advance(again, 1) == advance(plain, 1)
    shadow = make(method, "abc", [2, 1, 1], shadow=True)
    for step in range(1, 9):
        advance(shadow, step)
    moved = make(method, "abc", [1, 1, 2], shadow=True)
    moved.load_state_dict(through_json(shadow.state_dict()))
    assert moved.decide(9).sampling_weights.tolist() == [0.25, 0.25, 0.5]
    if method != "aioli":  # which learns nothing where its probes do not draw
        assert moved.decide(9).controller_weights.tolist() == (
            shadow.decide(9).controller_weights.tolist()
        )


def test_a_learnt_distribution_stays_when_given_weights_change() -> None:
    mixer = make("odm", "abc", [2, 1, 1])
    for step in range(1, 9):
        advance(mixer, step)
    again = make("odm", "abc", [1, 1, 2])
    again.load_state_dict(through_json(mixer.state_dict()))
    kept = mixer.decide(9).sampling_weights.tolist()
    assert again.decide(9).sampling_weights.tolist() == kept


def test_a_state_of_version_1_is_taken_up_and_can_be_edited() -> None:
    mixer = make("odm", "abc")
    for step in range(1, 9):
        advance(mixer, step)
    state = through_json(mixer.state_dict())
    for key in ("targets", "given", "moved", "retired"):
        del state[key]
    state["version"] = 1
    again = make("odm", "abc")
    again.load_state_dict(state)
    assert again.decide(9).sampling_weights.tolist() == mixer.decide(9).sampling_weights.tolist()
    after = make("odm", "bcd")
    after.load_state_dict(after.migrate(state, {}))
    assert after.describe()["estimate"]["b"] == mixer.describe()["estimate"]["b"]


def test_without_migration_other_domains_are_refused() -> None:
    state = make("odm", "abc").state_dict()
    with pytest.raises(CheckpointError, match="allow_domain_edits: true"):
        make("odm", "abd").load_state_dict(state)


CONTROLS: dict[str, dict[str, Any]] = {
    "groups": {"groups": {}},
    "guardrail": {"guardrail": {}},
    "limit": {"max_epochs": 50.0},
    "all": {"groups": {}, "guardrail": {}, "max_epochs": 50.0},
}


@pytest.mark.parametrize("controls", CONTROLS)
def test_controls_around_a_method_follow(controls: str) -> None:
    def control(names: Sequence[str], weights: Sequence[float]) -> Any:
        known = RunContext(
            total_steps=100,
            samples_per_step=8,
            draws_per_step=8,
            samples_per_epoch=tuple(40.0 for _ in names),
        )
        return build_mixer(
            "odm", domains=names, weights=weights, context=known, **CONTROLS[controls]
        )

    def train(mixer: Any, steps: range) -> None:
        for step in steps:
            tokens = np.full(len(mixer.domains), 2.0)
            losses = tokens * [2.0 + len(name) / 4 + 1 / step for name in mixer.domains]
            drawn = mixer.decide(step).sampling_weights
            samples = np.cumsum(np.ones(len(tokens)))
            mixer.observe(
                Observation(
                    step,
                    loss_sum=losses,
                    token_count=tokens,
                    sampling_weights=drawn,
                    sample_count=tokens,
                    samples_seen=samples * step,
                )
            )

    mixer = control(["web/high", "web/low", "code"], [2, 1, 1])
    train(mixer, range(1, 12))
    for names, weights, steps in (
        (["math", "web/high", "web/mid", "code"], [1, 2, 1, 1], range(12, 20)),
        (["web/low", "web/high", "math"], [1, 1, 2], range(20, 26)),
    ):
        after = control(names, weights)
        state = through_json(mixer.state_dict())
        after.load_state_dict(through_json(after.migrate(state, {})))
        assert after.step == mixer.step
        p = after.decide(steps[0]).sampling_weights
        assert p.shape == (len(names),)
        assert abs(p.sum() - 1) < 1e-12
        train(after, steps)
        resumed = control(names, weights)
        resumed.load_state_dict(through_json(after.state_dict()))
        ahead = (one.decide(steps[-1] + 1).sampling_weights.tobytes() for one in (resumed, after))
        assert len(set(ahead)) == 1
        mixer = after


def test_a_domain_that_is_only_measured_for_a_while_takes_its_estimate_back() -> None:
    def build(names: str, targets: tuple[str, ...]) -> Any:
        return make("odm", names, context=RunContext(targets=targets))

    mixer = build("abc", ())
    for step in range(1, 9):
        advance(mixer, step)
    estimate = mixer.describe()["estimate"]
    measured = build("bc", ("a",))
    measured.load_state_dict(measured.migrate(through_json(mixer.state_dict()), {}))
    for step in range(9, 12):
        advance(measured, step)
    assert set(measured.describe()["estimate"]) == {"b", "c"}
    back = build("abc", ())
    back.load_state_dict(back.migrate(through_json(measured.state_dict()), {}))
    assert back.describe()["estimate"]["a"] == estimate["a"]


def test_velocitune_starts_a_new_domain_where_it_is_first_measured() -> None:
    mixer = make("velocitune", "abc", update_every=3)
    for step in range(1, 9):
        advance(mixer, step)
    start = mixer.state_dict()["rule"]["start"]
    after = edited(mixer, "velocitune", "bd", update_every=3)
    assert after.state_dict()["rule"]["start"] == {"b": start["b"], "d": None}
    for step in range(9, 12):
        advance(after, step)
    assert after.state_dict()["rule"]["start"]["d"] == pytest.approx(loss_of("d", 10) - 0.1)


@pytest.mark.parametrize("method", [method for method in FOLLOWING if method != "aioli"])
def test_down_to_one_domain_and_to_others_altogether(method: str) -> None:
    mixer = make(method, "abc")
    for step in range(1, 8):
        advance(mixer, step)
    alone = edited(mixer, method, "c")
    for step in range(8, 12):
        assert advance(alone, step)["p"] == {"c": 1.0}
    others = edited(alone, method, ["a1", "d"], [1, 3])
    assert others.decide(12).sampling_weights.sum() == pytest.approx(1)
    for step in range(12, 30):
        advance(others, step)


@pytest.mark.parametrize("method", ["doremi", "doge"])
def test_a_domain_that_is_switched_on_starts_from_its_given_share(method: str) -> None:
    mixer = make(method, "abc", [1, 1, 0])
    for step in range(1, 8):
        advance(mixer, step)
    again = make(method, "abc", [1, 1, 2])
    again.load_state_dict(through_json(mixer.state_dict()))
    weights = again.describe()["domain_weights"]
    before = mixer.describe()["domain_weights"]
    assert before["c"] == 0.0
    assert weights["c"] == pytest.approx(0.5 / 1.5)
    assert weights["a"] / weights["b"] == pytest.approx(before["a"] / before["b"])
    off = make(method, "abc", [1, 0, 2])
    off.load_state_dict(through_json(again.state_dict()))
    assert off.describe()["domain_weights"]["b"] == 0.0
    for step in range(8, 20):
        advance(off, step)
