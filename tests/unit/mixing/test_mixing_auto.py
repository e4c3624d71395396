"""Auto: its rule against a plain one, what it counts and when, and what follows an edit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, build_mixer
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.controls import grouped_counts
from megatron.mixing.grouping import GroupsOptions, make_grouping

NAMES = ["a", "b", "c", "d"]
GIVEN = [0.4, 0.3, 0.2, 0.1]
OPTIONS = {
    "keep": 0.2,
    "least_exponent": 0.05,
    "greatest_exponent": 0.4,
    "memory": 3.0,
    "first_update": 3,
}


class Counter:
    """A context's count of known losses that remembers what it was asked."""

    def __init__(self, losses):
        self.losses, self.asked = losses, []

    def __call__(self, tokens):
        self.asked.append(tokens.tolist())
        return np.array(self.losses, dtype=float)


def build(names=NAMES, weights=GIVEN, *, count_losses=(1.0, 1.0, 1.0, 1.0), **more):
    told = {} if count_losses is None else {"count_losses": list(count_losses)}
    return build_mixer("auto", domains=list(names), weights=weights, **{**OPTIONS, **told, **more})


def observe(mixer, step, loss, tokens):
    sums = [x * n for x, n in zip(loss, tokens, strict=True)]
    mixer.observe(Observation(step, loss_sum=sums, token_count=tokens))


def weights_after(mixer, steps, losses, tokens):
    for step in range(1, steps + 1):
        observe(mixer, step, losses(step), tokens)
    return mixer.decide(steps + 1).sampling_weights


def line(history, memory):
    """Return slope and level of a weighted line through (tokens so far, new tokens, loss)."""
    weights = []
    for total, new, _ in history:
        weights = [max(0.0, 1 - memory * new / total) * weight for weight in weights] + [new]
    x = [math.log(total) for total, _, _ in history]
    y = [loss for _, _, loss in history]
    whole = sum(weights)
    mx = sum(w * v for w, v in zip(weights, x, strict=True)) / whole
    my = sum(w * v for w, v in zip(weights, y, strict=True)) / whole
    xx = sum(w * (v - mx) ** 2 for w, v in zip(weights, x, strict=True)) / whole
    xy = sum(w * (u - mx) * (v - my) for w, u, v in zip(weights, x, y, strict=True)) / whole
    slope = -xy / xx if xx > 1e-12 else 0.0
    return slope, my - slope * (x[-1] - mx)


def plain(histories, given, counts, options, ahead):
    """The rule, domain by domain, as the docstring of the method says it.

    ``ahead`` is the steps of the run over the steps done.
    """
    memory, keep = options["memory"], options["keep"]
    a, b = options["least_exponent"], options["greatest_exponent"]
    seen = [m if history else 0.0 for m, history in zip(given, histories, strict=True)]
    lines = [line(history, memory) if history else (0.0, math.inf) for history in histories]
    gains, passed = [], []
    for (slope, level), count in zip(lines, counts, strict=True):
        if level == math.inf:  # not seen: filled in below
            gains.append(0.0)
            passed.append(False)
            continue
        excess = max(level - count, 0.0)
        alpha = min(max(slope / excess, a), b) if excess else 0.0
        gains.append(alpha * excess * ahead**-alpha)
        passed.append(level < count - 0.02)
    if any(passed):
        mu = sum(m for m, there in zip(given, passed, strict=True) if there)
        alike = sum(
            m * max(slope, 0.0)
            for m, there, (slope, _) in zip(given, passed, lines, strict=True)
            if there
        )
        alike *= ahead**-a
        gains = [alike / mu if there else g for g, there in zip(gains, passed, strict=True)]
        if not any(gains):
            gains = [float(there) for there in passed]
    mean = sum(m * g for m, g in zip(seen, gains, strict=True)) / sum(seen)
    gains = [g if m else mean for m, g in zip(seen, gains, strict=True)]
    wanted = [m * g for m, g in zip(given, gains, strict=True)]
    if not any(wanted):
        return None
    total = sum(wanted)
    return [(1 - keep) * w / total + keep * m for w, m in zip(wanted, given, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_the_rule(seed):
    """Falling, rising and noisy losses, domains that are absent now and then, some passed."""
    total = (None, 40, 1000)[seed % 3]
    rng = np.random.default_rng(seed)
    counts = rng.uniform(0.5, 4.0, 4)
    floor, height, fall = rng.uniform(0.3, 3.0, 4), rng.uniform(1, 9, 4), rng.uniform(0.05, 0.6, 4)
    if seed % 2:
        counts[seed % 4] = 8.0
    mixer, histories, expected = (
        build(count_losses=counts.tolist(), context=RunContext(total_steps=total)),
        [[] for _ in NAMES],
        GIVEN,
    )
    passed = 0
    for step in range(1, 60):
        tokens = np.where(rng.random(4) < 0.8, rng.integers(1, 400, 4), 0).astype(float)
        loss = floor + height * step**-fall + 0.1 * rng.normal(size=4)
        if not tokens.any():
            continue
        observe(mixer, step, loss.tolist(), tokens.tolist())
        for history, new, value in zip(histories, tokens, loss, strict=True):
            if new:
                history.append(((history[-1][0] if history else 0.0) + new, new, value))
        if step >= OPTIONS["first_update"]:
            ahead = 2.0 if total is None else max(1.0, total / step)
            expected = plain(histories, GIVEN, counts, OPTIONS, ahead) or expected
            levels = [line(history, 3.0)[1] if history else 9.0 for history in histories]
            passed += any(np.array(levels) < counts - 0.02)
        p = mixer.decide(step + 1).sampling_weights
        np.testing.assert_allclose(p, expected, rtol=1e-7, atol=1e-10)
    assert passed or not seed % 2, "no domain got below its count loss"


def test_until_the_first_update_the_given_weights_draw():
    mixer = build(first_update=5)
    for step in range(1, 6):
        assert mixer.decide(step).sampling_weights == pytest.approx(GIVEN, abs=1e-15)
        observe(mixer, step, falling(step), [10, 10, 10, 10])
    assert mixer.decide(6).sampling_weights != pytest.approx(GIVEN, abs=1e-3)


def test_a_domain_that_has_not_been_seen_keeps_its_weight():
    mixer = build()
    p = weights_after(mixer, 30, lambda step: [9 / step**0.5, 1.0, 3.0, 0.0], [10, 10, 10, 0])
    assert p[3] == pytest.approx(GIVEN[3], rel=1e-12)
    assert p[0] > GIVEN[0] + 0.05


def test_a_domain_that_is_kept_out_stays_out():
    """By weight 0, or by a ceiling of 0: neither is ever seen."""
    for more in ({"weights": [1, 1, 2, 0]}, {"ceiling": {"d": 0}}):
        mixer = build(**more)
        start = mixer.decide(1).sampling_weights
        p = weights_after(mixer, 30, lambda step: [9 / step**0.5, 1.0, 3.0, 0.0], [10, 10, 10, 0])
        assert start[3] == p[3] == 0.0
        assert p[0] > start[0] + 0.1


def test_noise_and_what_is_learnt_get_only_what_is_kept():
    """A loss at its count loss is at its end; a plateau above it is not."""
    p = weights_after(
        build(count_losses=[2.0, 3.0, 1.0, 1.0]),
        60,
        lambda step: [2.0, 3.0, 1.0 + 6 * step**-0.3, 5.0],
        [100, 100, 100, 100],
    )
    np.testing.assert_allclose(p[:2], [0.2 * 0.4, 0.2 * 0.3], rtol=1e-9)
    assert p[2] > 0.2
    assert p[3] > 0.02 + 0.05  # least_exponent of 4 nats


def test_exponents_bound_what_a_slope_is_believed():
    steep = lambda step: [9.0 - 2 * math.log(step), 3.0, 3.0, 3.0]  # noqa: E731
    mixer = build(count_losses=[0.5, 1, 1, 1])
    p = weights_after(mixer, 30, steep, [10] * 4)
    shown = mixer.describe()
    ends = shown["level"]["a"] - 0.5
    # The length of the run is not known, so that it is half done: h = ln 2.
    assert shown["gain"]["a"] == pytest.approx(0.4 * ends * 2**-0.4)
    assert [shown["gain"][name] for name in "bcd"] == pytest.approx([0.05 * 2.0 * 2**-0.05] * 3)
    assert p[0] == max(p)


def test_what_will_be_learnt_anyway_can_wait():
    """Two domains fall as fast now; the one that is nearer its end gets its data later."""
    losses = lambda step: [1 + 4 * step**-0.4, 1 + 4 * step**-0.1, 3.0, 3.0]  # noqa: E731
    shares = {}
    for total in (100, 10_000):
        mixer = build(context=RunContext(total_steps=total), count_losses=[1, 1, 3, 3])
        p = weights_after(mixer, 100, losses, [100] * 4)
        shares[total] = p[0] / p[1]
        slope = mixer.describe()["slope"]
    assert slope["a"] == pytest.approx(slope["b"], rel=0.3)
    assert shares[10_000] < 0.6 * shares[100]


def test_those_below_their_count_losses_share_by_the_given_weights():
    """What counts cannot tell, they do not decide: the two that are there get the mean slope."""
    losses = lambda step: [1 + 4 * step**-0.3, 0.5 + 4 * step**-0.1, 2.0, 2.0]  # noqa: E731
    mixer = build(count_losses=[9, 9, 2, 2])
    p = weights_after(mixer, 60, losses, [100] * 4)
    assert p[0] / p[1] == pytest.approx(4 / 3)
    shown = mixer.describe()
    slope = shown["slope"]
    mean = (0.4 * slope["a"] + 0.3 * slope["b"]) / 0.7
    assert shown["gain"]["a"] == shown["gain"]["b"] == pytest.approx(mean * 2**-0.05)
    assert slope["a"] > 1.4 * slope["b"]


@pytest.mark.parametrize("moving", [True, False])
def test_once_all_are_there_the_given_weights_hold(moving):
    losses = lambda step: [1 + moving * 4 * step**-0.3, 0.5, 1.0, 2.0]  # noqa: E731
    p = weights_after(build(count_losses=[9, 9, 9, 9]), 40, losses, [10, 20, 30, 40])
    np.testing.assert_allclose(p, GIVEN, rtol=1e-12)


def test_nothing_to_gain_anywhere_changes_nothing():
    mixer = build(count_losses=[2.0, 2.0, 2.0, 2.0])
    start = mixer.decide(1).sampling_weights.tolist()
    assert weights_after(mixer, 20, lambda step: [2.0] * 4, [10] * 4).tolist() == start


def test_an_objective_multiplies():
    losses = lambda step: [1 + 4 * step**-0.3, 2 + 4 * step**-0.2, 5.0, 4.5]  # noqa: E731
    found = {}
    for objective in ("uniform", "worst", {"a": 1, "b": 3}):
        p = weights_after(build(objective=objective), 40, losses, [10] * 4)
        found[str(objective)] = (p - 0.2 * np.array(GIVEN)) / 0.8
    uniform = found["uniform"]
    np.testing.assert_allclose(found["worst"], [0, 0, 1, 0], atol=1e-12)
    expected = uniform * [1, 3, 0, 0]
    np.testing.assert_allclose(
        found["{'a': 1, 'b': 3}"], expected / expected.sum(), rtol=1e-9, atol=1e-12
    )
    with pytest.raises(ConfigError, match="counts t, never trained on, and the method reads train"):
        build(objective={"t": 1}, context=RunContext(targets=("t",)))
    build(objective={"a": 1}, context=RunContext(targets=("t",)))


# What is counted, and when.


def test_it_counts_once_and_only_when_the_weights_first_change():
    count = Counter([1.0, 1.0, 1.0, 1.0])
    mixer = build(count_losses=None, context=RunContext(count_losses=count), first_update=4)
    for step in range(1, 4):
        mixer.decide(step)
        mixer.describe()
        mixer.state_dict()
        observe(mixer, step, [3, 3, 2, 2], [10] * 4)
    assert count.asked == []
    for step in range(4, 20):
        observe(mixer, step, [3 / step, 3, 2, 2], [10] * 4)
    assert count.asked == [[1e6] * 4]
    again = build(count_losses=None, context=RunContext(count_losses=count), first_update=4)
    again.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
    observe(again, 20, [3 / 20, 3, 2, 2], [10] * 4)
    assert len(count.asked) == 1, "what was counted before the stop is in the state"


def test_no_more_is_counted_than_the_run_would_train_on():
    count = Counter([1.0, 1.0, 1.0, 1.0])
    context = RunContext(count_losses=count, total_steps=100, tokens_per_step=1000)
    mixer = build(count_losses=None, context=context, count_tokens=25_000)
    weights_after(mixer, 5, lambda step: [3 / step] * 4, [10] * 4)
    assert count.asked[0] == pytest.approx([25_000, 25_000, 20_000, 10_000])


def test_told_losses_are_not_counted():
    count = Counter([9.0] * 4)
    named = dict(zip(reversed(NAMES), [4.0, 3.0, 2.0, 1.0], strict=True))
    one = build_mixer(
        "auto", domains=NAMES, weights=GIVEN, **OPTIONS, count_losses=named,
        context=RunContext(count_losses=count),
    )  # fmt: skip
    other = build(count_losses=[1, 2, 3, 4])
    losses = lambda step: [5 + 4 / step, 6, 7 - step / 40, 8]  # noqa: E731
    p = weights_after(one, 30, losses, [10] * 4)
    assert p.tolist() == weights_after(other, 30, losses, [10] * 4).tolist()
    assert count.asked == []
    assert one.describe()["count_loss"] == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1, 2, -0.5, 1], r"count_losses: 'c' is -0.5; it must be at least 0"),
        ({"a": 1, "b": 1, "c": 1, "e": 1}, r"count_losses names the domain 'e', which does not"),
        ({"a": 1, "b": 1, "c": 1}, r"count_losses says nothing of the domain 'd'"),
        ([1, 2], r"count_losses has 2 values for 4 domains"),
        ([1, 2, math.inf, 1], r"count_losses"),
    ],
)
def test_wrong_count_losses_are_named(losses, message):
    with pytest.raises(ConfigError, match=rf"mixing method 'auto': {message}"):
        build_mixer("auto", domains=NAMES, count_losses=losses)


def test_without_data_and_without_losses_it_says_what_to_give():
    with pytest.raises(ConfigError, match=r"give count_losses .*count_model.*RunContext"):
        build_mixer("auto", domains=NAMES)


@pytest.mark.parametrize("answer", [[1.0, 2.0], [1.0, 2.0, math.nan, 1.0], [1.0, -1.0, 1.0, 1.0]])
def test_a_context_that_counts_wrongly_is_found_out(answer):
    mixer = build(count_losses=None, context=RunContext(count_losses=Counter(answer)))
    with pytest.raises(ConfigError, match=r"count_losses returned .* for each of a, b, c, d"):
        weights_after(mixer, 5, lambda step: [3 / step] * 4, [10] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count_tokens": 0}, "count_tokens is 0; it must be at least 1"),
        ({"keep": 1.5}, r"keep is 1.5; it must be between 0 and 1"),
        ({"least_exponent": 0.9}, r"least_exponent is 0.9; it must be from 0 to greatest_exponent"),
        ({"least_exponent": 0.0, "greatest_exponent": 0.0}, r"greatest_exponent is 0.0; .*above 0"),
        ({"memory": 0.5}, r"memory is 0.5; it must be at least 1"),
        ({"first_update": 0}, r"first_update is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


# Groups.


def test_a_groups_count_loss_is_its_domains_by_their_shares():
    grouping = make_grouping(
        GroupsOptions(members={"g": ["a", "c"]}),
        domains=("a", "b", "c"),
        weights=np.array([3.0, 2.0, 1.0]),
        sizes=None,
    )
    count = Counter([1.0, 7.0, 3.0])
    counted = grouped_counts(grouping, count)
    at = grouping.groups.index("g")
    tokens = np.zeros(2)
    tokens[at], tokens[1 - at] = 400.0, 50.0
    found = counted(tokens)
    assert count.asked == [[300.0, 50.0, 100.0]]
    assert found[at] == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert found[1 - at] == 7.0
    assert grouped_counts(grouping, None) is None


def test_of_groups_it_asks_by_group_and_names_them():
    count = Counter([1.0, 7.0, 3.0])
    options = {
        **OPTIONS,
        "groups": {"members": {"g": ["a", "c"]}},
        "context": RunContext(count_losses=count, total_steps=10, tokens_per_step=100),
    }
    mixer = build_mixer("auto", domains=["a", "b", "c"], weights=[3, 2, 1], **options)
    p = weights_after(mixer, 20, lambda step: [9 / step**0.5, 8.0, 9 / step**0.5], [30, 20, 10])
    assert count.asked[0] == pytest.approx([500, 1000 / 3, 500 / 3])
    assert p[0] / p[2] == pytest.approx(3.0)
    told = build_mixer(
        "auto", domains=["a", "b", "c"], weights=[3, 2, 1], groups=options["groups"], **OPTIONS,
        count_losses={"g": 1.5, "b": 7.0}, context=RunContext(total_steps=10),
    )  # fmt: skip
    q = weights_after(told, 20, lambda step: [9 / step**0.5, 8.0, 9 / step**0.5], [30, 20, 10])
    np.testing.assert_allclose(p, q, rtol=1e-12)
    with pytest.raises(ConfigError, match="count_losses names the domain 'a'"):
        build_mixer(
            "auto", domains=["a", "b", "c"], groups=options["groups"], count_losses={"a": 1.0}
        )


# State and edits.


def counting(names, losses, **more):
    count = Counter(losses)
    weights = [1.0] * len(names)
    context = RunContext(count_losses=count)
    return build(names, weights, count_losses=None, context=context, **more), count


def falling(step):
    return [1 + 4 * step**-0.3, 2 + 4 * step**-0.2, 5.0, 4.5 + 0.1 * math.sin(step)]


def test_resumed_anywhere_it_goes_on_with_the_same_bits():
    (whole, _), (parts, asked) = (counting(NAMES, [1, 2, 3, 4.5]) for _ in range(2))
    for step in range(1, 30):
        state = json.loads(json.dumps(parts.state_dict(), allow_nan=False))
        counts = asked.asked
        parts, asked = counting(NAMES, [1, 2, 3, 4.5])
        asked.asked = counts
        parts.load_state_dict(state)
        for mixer in (whole, parts):
            observe(mixer, step, falling(step), [10, 20, 30, 5 * (step % 2)])
        p, q = (mixer.decide(step + 1).sampling_weights for mixer in (whole, parts))
        assert p.tobytes() == q.tobytes()
        assert whole.state_dict() == parts.state_dict()
    assert len(asked.asked) == 1


def test_a_newcomer_has_no_trend_and_is_counted_with_the_others():
    mixer, _ = counting(NAMES, [1, 1, 1, 1])
    for step in range(1, 20):
        observe(mixer, step, falling(step), [10] * 4)
    before = mixer.describe()
    after, count = counting([*NAMES, "e"], [1, 1, 1, 1, 2])
    after.load_state_dict(json.loads(json.dumps(after.migrate(mixer.state_dict(), {}))))
    shown = after.describe()
    assert shown["slope"] == {**before["slope"], "e": 0.0}
    assert shown["level"] == {**before["level"], "e": None}
    assert "count_loss" not in shown
    assert count.asked == []
    observe(after, 20, [*falling(20), 0.0], [10, 10, 10, 10, 0])
    newcomer = after.decide(21).sampling_weights[4]
    assert newcomer == pytest.approx(1 / 5), "not seen yet, it keeps its given weight"
    for step in range(21, 40):
        observe(after, step, [*falling(step), 9.0], [10] * 5)
    assert len(count.asked) == 1
    assert after.describe()["count_loss"] == dict(zip([*NAMES, "e"], [1, 1, 1, 1, 2], strict=True))


def test_a_domain_that_leaves_and_returns_is_as_it_was_and_not_counted_again():
    mixer, _ = counting(NAMES, [1.0, 1.1, 1.2, 1.3])
    for step in range(1, 20):
        observe(mixer, step, falling(step), [10] * 4)
    known = mixer.describe()
    three, count = counting(["c", "b", "d"], [9.0] * 3)
    three.load_state_dict(three.migrate(mixer.state_dict(), {}))
    for step in range(20, 30):
        observe(three, step, falling(step)[1:], [10] * 3)
    assert count.asked == []
    back, count = counting(NAMES, [9.0] * 4)
    back.load_state_dict(back.migrate(json.loads(json.dumps(three.state_dict())), {}))
    shown = back.describe()
    assert shown["count_loss"] == known["count_loss"]
    assert shown["slope"]["a"] == known["slope"]["a"]
    assert shown["level"]["a"] == known["level"]["a"]
    assert count.asked == []


def test_what_the_configuration_says_now_wins_over_what_was_counted():
    mixer, _ = counting(NAMES, [1.0] * 4)
    for step in range(1, 10):
        observe(mixer, step, falling(step), [10] * 4)
    told = build(NAMES, [1.0] * 4, count_losses=[0.5, 0.6, 0.7, 0.8])
    told.load_state_dict(mixer.state_dict())
    assert list(told.describe()["count_loss"].values()) == [0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize(
    "damage",
    [
        {"trend": None},
        {"trend": {"tokens": {"a": 1.0}}},
        {"trend": {}},
        {"count_losses": {"a": 1.0}},
        {"more": 1},
    ],
)
def test_a_damaged_state_is_refused(damage):
    mixer = build()
    weights_after(mixer, 5, falling, [10] * 4)
    state = mixer.state_dict()
    with pytest.raises(CheckpointError):
        build().load_state_dict({**state, "rule": {**state["rule"], **damage}})
