"""Objectives: how they are given, what they weigh, and what methods make of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixing import build_any

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.errors import ConfigError
from megatron.mixing.objective import Objective, ObjectiveOptions
from megatron.mixing.options import CommonOptions, read_options
from megatron.mixing.simulate import simulate
from megatron.mixing.worlds import target_world
from megatron.registry import mixing_methods

NAMES = ["a", "b", "c"]
WITH = ["ado", "aioli", "auto", "skillit"]
PROBES = {"update_every": 7, "lp_rounds": 1, "lp_steps": 2, "eta": 1.5, "one_hot_factor": 0.6}
nan = math.nan


def objective(given="uniform", targets=()):
    return Objective(
        read_options(CommonOptions, "x", {"objective": given}).objective, NAMES, targets
    )


def context(targets=("t",)):
    return RunContext(targets=targets)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("worst", ObjectiveOptions(kind="worst")),
        ({"a": 1}, ObjectiveOptions(kind="weights", weights={"a": 1})),
        ({"kind": 2}, ObjectiveOptions(kind="weights", weights={"kind": 2})),
        ({"weights": {"a": 0.5}}, ObjectiveOptions(kind="weights", weights={"a": 0.5})),
        ({"above": {"a": 0.5}}, ObjectiveOptions(kind="worst", above={"a": 0.5})),
        ({"kind": "uniform"}, ObjectiveOptions()),
        (ObjectiveOptions(kind="worst"), ObjectiveOptions(kind="worst")),
    ],
)  # fmt: skip
def test_the_shorter_forms(given, options):
    assert read_options(CommonOptions, "x", {"objective": given}).objective == options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wurst", "objective: kind is 'wurst'"),
        ({"kind": "worst", "abov": {}}, "has no option 'abov'; did you mean 'above'"),
        ({"kind": "weights"}, "give weights with the kind 'weights'"),
        ({"kind": "worst", "weights": {"a": 1}}, "give weights with the kind 'weights'"),
        ({"kind": "uniform", "above": {"a": 1}}, "only the kind 'worst' looks at it"),
        ({"a": -1}, "at least 0, and one of them above 0"),
        ({"a": 0}, "at least 0, and one of them above 0"),
        ({"weights": {"a": math.inf}}, "a mapping"),
        ({"above": {}}, "name at least one domain"),
        ({}, None),
        (3, "one of 'uniform', 'worst' or a mapping or a mapping of kind, weights, above"),
        (None, "objective is None"),
    ],
)
def test_mistakes(given, message):
    if message is None:
        assert read_options(CommonOptions, "x", {"objective": given}).objective.kind == "uniform"
        return
    with pytest.raises(ConfigError, match=message):
        read_options(CommonOptions, "x", {"objective": given})


def test_uniform_counts_what_is_trained_on_and_was_measured():
    one = objective(targets=("t",))
    np.testing.assert_allclose(one.weights(np.array([3, nan, 1, 9])), [0.5, 0, 0.5, 0])
    assert one.factors(np.array([3, nan, 1, 9])).tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(one.fixed, [1 / 3, 1 / 3, 1 / 3, 0])
    assert one.value(np.array([3.0, nan, 1.0, 9.0])) == 2.0
    assert not one.weights(np.full(4, nan)).any()
    assert math.isnan(one.value(np.full(4, nan)))


def test_weights_name_domains_and_targets():
    one = objective({"a": 1, "t": 3}, targets=("t",))
    np.testing.assert_allclose(one.weights(np.array([3.0, 5, 1, 9])), [0.25, 0, 0, 0.75])
    np.testing.assert_allclose(one.weights(np.array([3.0, 5, 1, nan])), [1, 0, 0, 0])
    np.testing.assert_allclose(one.factors(np.array([3.0, 5, 1, 9])), [0.5, 0, 0, 1.5])
    assert one.value(np.array([2.0, 5, 1, 4])) == 3.5
    assert one.describe() == {"a": 0.25, "t": 0.75}
    with pytest.raises(ConfigError, match=r"weights names the domain 'tt'.*did you mean"):
        objective({"tt": 1}, targets=("ttt",))


def test_the_worst_shares_ties_and_may_be_above_a_reference():
    one = objective("worst", targets=("t",))
    assert one.weights(np.array([3.0, 3.0, 1.0, 9.0])).tolist() == [0.5, 0.5, 0, 0]
    assert one.value(np.array([3.0, 2.0, nan, 9.0])) == 3.0
    assert one.fixed is None
    above = objective({"above": {"a": 2.5, "t": 8.0, "c": 0.9}}, targets=("t",))
    assert above.weights(np.array([3.0, 99.0, 1.0, 8.9])).tolist() == [0, 0, 0, 1]
    assert above.value(np.array([3.0, 99.0, 1.0, 8.4])) == 0.5
    assert above.weights(np.array([3.0, 99.0, 1.0, nan])).tolist() == [1, 0, 0, 0]


def test_a_pinned_objective_does_not_change_its_mind():
    pinned = objective("worst").pinned(np.array([3.0, 2.0, 1.0]))
    assert pinned.weights(np.array([0.0, 9.0, 9.0])).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="none of the losses"):
        objective("worst").pinned(np.full(3, nan))


LOSSES = st.lists(st.one_of(st.floats(0, 20), st.just(nan)), min_size=4, max_size=4)


@settings(derandomize=True, deadline=None)
@given(losses=LOSSES, kind=st.sampled_from(["uniform", "worst", {"a": 1, "t": 2}]))
def test_weights_sum_to_one_over_what_was_measured(losses, kind):
    one, values = objective(kind, targets=("t",)), np.array(losses)
    weights = one.weights(values)
    assert (weights >= 0).all()
    assert not weights[np.isnan(values)].any()
    measured = (one.counted & ~np.isnan(values)).any()
    assert weights.sum() == pytest.approx(1.0 if measured else 0.0, abs=1e-12)


@pytest.mark.parametrize("method", available_methods())
def test_methods_without_the_notion_refuse_one(method):
    kind = mixing_methods[method].build
    if kind.has_objective:
        assert method in {*WITH, "doge"}
        return
    message = r"no notion of one.*use one of ado, aioli, auto, .*skillit"
    with pytest.raises(ConfigError, match=message):
        build_any(method, domains=NAMES, objective="worst")


def drive(mixer, steps, *, targets=True, start=8.0):
    """Train in a world whose losses fall by a known matrix; return p of every step."""
    effect = np.array([[0.30, 0.02, 0.0], [0.0, 0.1, 0.05], [0.05, 0.0, 0.2], [0.01, 0.20, 0.02]])
    losses, found = np.full(4, start), []
    for step in range(1, steps + 1):
        decision = mixer.decide(step)
        if decision.validate:
            more = {"target_loss": losses[3:]} if targets else {}
            mixer.observe(Observation(step - 1, valid_loss=losses[:3], **more))
            decision = mixer.decide(step)
        p = decision.sampling_weights
        found.append(p)
        losses = losses - 0.05 * effect @ p
        mixer.observe(
            Observation(step, loss_sum=losses[:3], token_count=[1, 1, 1], sampling_weights=p)
        )
    return np.array(found), effect


def test_aioli_multiplies_the_rows_of_what_counts():
    """Rows of the losses that count, shifted and scaled; row i times o_i times their number."""
    chosen = {"a": 1, "t": 3}
    mixer = build_mixer("aioli", domains=NAMES, objective=chosen, context=context(), **PROBES)
    p, effect = drive(mixer, 8)
    rows = 2 * 0.05 * effect[[0, 3]]
    rows = rows - min(rows.min(), 0)
    rows = rows / rows.sum()
    score = 1.5 * (2 * 0.25 * rows[0] + 2 * 0.75 * rows[1])
    expected = np.exp(score) / np.exp(score).sum()
    np.testing.assert_allclose(p[6], expected, rtol=1e-9)
    assert set(mixer.describe()["influence_on"]) == {"a", "b", "c", "t"}


def test_uniform_is_the_rule_without_an_objective_to_the_bit():
    """And a target that nobody names changes nothing, however it is measured."""
    plain, _ = drive(build_mixer("aioli", domains=NAMES, **PROBES), 40, targets=False)
    watched = build_mixer("aioli", domains=NAMES, context=context(), **PROBES)
    assert drive(watched, 40)[0].tobytes() == plain.tobytes()
    graph = [[0.5, 0.2, 0.0], [0.0, 0.4, 0.1], [0.3, 0.0, 0.6]]
    options = {"graph": graph, "update_every": 3}
    plain, _ = drive(build_mixer("skillit", domains=NAMES, **options), 20, targets=False)
    watched = build_mixer("skillit", domains=NAMES, context=context(), **options)
    assert drive(watched, 20)[0].tobytes() == plain.tobytes()


def test_skillit_carries_the_target_back_along_its_column():
    graph = [[0.5, 0.2, 0.0, 0.1], [0.0, 0.4, 0.1, 0.7], [0.3, 0.0, 0.6, 0.0]]
    mixer = build_mixer(
        "skillit", domains=NAMES, graph=graph, eta=0.4, objective={"t": 2, "c": 1},
        context=context(),
    )  # fmt: skip
    column = np.array([0.1, 0.7, 0.0]) * 2 / 3 * 2
    other = np.array([0.0, 0.1, 0.6]) * 1 / 3 * 2
    start = np.exp(0.4 * (column + other))
    np.testing.assert_allclose(mixer.decide(1).sampling_weights, start / start.sum(), rtol=1e-12)
    mixer.observe(Observation(1, loss_sum=[1, 1, 1], token_count=[1, 1, 1]))
    mixer.observe(Observation(1, valid_loss=[2.0, 3.0, 4.0], target_loss=[5.0]))
    after = np.exp(0.4 * (column * 5 + other * 4))
    np.testing.assert_allclose(mixer.decide(2).sampling_weights, after / after.sum(), rtol=1e-12)
    named = {"a": {"t": 0.1}, "b": {"t": 0.7}, "c": {}}
    build_mixer("skillit", domains=NAMES, graph=named, objective={"t": 1}, context=context())


def test_what_cannot_reach_the_objective_is_refused():
    with pytest.raises(ConfigError, match="the objective counts t, which no domain helps"):
        build_mixer("skillit", domains=NAMES, objective={"t": 1}, context=context())
    with pytest.raises(ConfigError, match="counts t, never trained on, and the method reads train"):
        build_mixer("ado", domains=NAMES, objective={"t": 1, "a": 1}, context=context())
    with pytest.raises(ConfigError, match=r"diagonal learns .* counts only t"):
        build_mixer(
            "aioli", domains=NAMES, diagonal=True, objective={"t": 1}, context=context(), **PROBES
        )


def test_ado_multiplies_its_credit():
    def weights(objective):
        mixer = build_mixer(
            "ado", domains=NAMES, objective=objective, first_fit=20, fit_every=100,
            smoothing_window=1, smoothing_order=0, subsample=1,
        )  # fmt: skip
        for step in range(1, 41):
            losses = np.array([1.0, 1.5, 0.5]) + np.array([4.0, 4.0, 6.0]) * step**-0.4
            counts = np.array([30, 30, 30])
            mixer.observe(
                Observation(step, loss_sum=losses * counts, token_count=counts, sample_count=counts)
            )
        return mixer.decide(41).sampling_weights

    uniform, one, worst = weights("uniform"), weights({"c": 1}), weights("worst")
    assert one[2] > uniform[2] + 0.3
    assert one[0] == pytest.approx(one[1], abs=0.02)
    assert int(np.argmax(worst)) == 1  # 1.5 + 4 x is the highest loss at the end
    equal = weights({"a": 5, "b": 5, "c": 5})
    np.testing.assert_allclose(equal, uniform, rtol=1e-9)


@pytest.mark.parametrize("method", ["aioli", "skillit"])
def test_an_objective_keeps_to_floors_and_ceilings(method):
    options = PROBES if method == "aioli" else {"graph": [[0, 0, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]]}
    mixer = build_mixer(
        method, domains=NAMES, objective={"t": 1}, floor={"a": 0.2}, ceiling={"b": 0.5},
        context=context(), **options,
    )  # fmt: skip
    p, _ = drive(mixer, 60)
    assert (p[:, 0] >= 0.2 - 1e-12).all()
    assert (p[:, 1] <= 0.5 + 1e-12).all()
    assert p[-1, 1] == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["aioli", "skillit"])
def test_targets_come_and_go_with_the_state(method):
    options = PROBES if method == "aioli" else {"update_every": 3}
    first = build_mixer(method, domains=NAMES, context=context(("t",)), **options)
    drive(first, 11)
    state = first.state_dict()
    same = build_mixer(method, domains=NAMES, context=context(("t",)), **options)
    same.load_state_dict(state)
    assert same.state_dict() == state
    other = build_mixer(method, domains=NAMES, context=context(("u",)), **options)
    other.load_state_dict(other.migrate(state, {}))
    np.testing.assert_allclose(
        other.decide(12).sampling_weights, first.decide(12).sampling_weights, rtol=1e-12
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("aioli", {"update_every": 200, "lp_rounds": 1, "lp_steps": 10, "eta": 1.0}),
        ("skillit", {"update_every": 100, "eta": 0.5, "graph": "true"}),
    ],
)
def test_a_target_that_is_never_trained_on_is_reached_by_transfer(method, options):
    """With the target as objective the run ends nearer the best mixture for it than without."""
    world, steps = target_world(), 3000
    best = world.best_fixed(steps, np.array([0.0, 0, 0, 0, 1]))
    assert best.gap < 1e-9
    assert best.weights[1] > 0.5  # the domain that teaches it most
    if options.get("graph") == "true":
        options = {**options, "graph": world.transfer.T.tolist()}
    ends = {}
    for name, chosen in (("uniform", "uniform"), ("target", {"t0": 1})):
        mixer = build_mixer(
            method, domains=list(world.domains), objective=chosen,
            context=RunContext(targets=world.targets), **options,
        )  # fmt: skip
        run = simulate(mixer, world, steps=steps, noise=1.0, record_every=steps)
        near = float(np.abs(run.drawn / run.drawn.sum() - best.weights).sum())
        ends[name] = (float(world.target_losses()[0]) - best.value, near)
    assert 0 <= ends["target"][0] < 0.8 * ends["uniform"][0]
    if method == "aioli":
        assert ends["target"][1] < ends["uniform"][1]


def test_the_optimum_for_a_target_is_one():
    world, steps = target_world(), 300
    chosen = np.array([0.0, 0, 0, 0, 1])
    best = world.best_fixed(steps, chosen)
    rng = np.random.default_rng(0)
    for _ in range(40):
        p = rng.dirichlet(np.ones(4))
        world.reset()
        for _ in range(steps):
            world.train(p)
        assert world.target_losses()[0] >= best.value - 1e-9
    uniform = world.best_fixed(steps)
    assert uniform.value == pytest.approx(uniform.losses[:4].mean())
