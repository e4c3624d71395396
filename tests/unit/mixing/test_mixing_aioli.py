"""Aioli: its formula, its probes in the real sampler, what it recovers, and every refusal."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer
from megatron.data.sampler import Sampler
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.simulate import simulate
from megatron.mixing.worlds import LinearWorld, hub_transfer, power_world, random_linear
from megatron.training.planner import Planner


def names(count):
    return [f"d{i}" for i in range(count)]


def drive(mixer, world, *, first=1, last, skip=()):
    """The loop of the contract; yields (step, decision, measured losses or None)."""
    for step in range(first, last + 1):
        decision, measured = mixer.decide(step), None
        if decision.validate:
            measured = world.losses().copy()
            mixer.observe(
                Observation(
                    step - 1,
                    valid_loss=measured,
                    loss_sum=np.zeros(len(measured)),
                    token_count=np.zeros(len(measured)),
                )
            )
            decision = mixer.decide(step)
        assert not decision.validate
        yield step, decision, measured
        if step in skip:
            continue
        losses = world.losses()
        world.train(decision.sampling_weights)
        mixer.observe(
            Observation(
                step,
                loss_sum=losses,
                token_count=np.ones(len(losses)),
                sampling_weights=decision.sampling_weights,
            )
        )


OPTIONS = {"update_every": 40, "lp_rounds": 2, "lp_steps": 3, "one_hot_factor": 0.7, "eta": 2.0}


@pytest.mark.parametrize("ema", [None, 0.3])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_formula(ema, diagonal):
    """Three rounds, computed a second time from what was measured and what was probed."""
    count, o = 3, OPTIONS["one_hot_factor"]
    world = random_linear(count, seed=1, half_life=50.0)
    mixer = build_mixer(
        "aioli", domains=names(count), weights=[5, 3, 2], ema=ema, diagonal=diagonal, **OPTIONS
    )
    probes = [[o if i == j else (1 - o) / (count - 1) for i in range(count)] for j in range(count)]
    p, smoothed, drops, last, ended = np.array([0.5, 0.3, 0.2]), None, {}, None, None
    updates = 0
    for step, decision, measured in drive(mixer, world, last=120):
        place = (step - 1) % 40
        if place == 0:
            drops = {j: np.zeros(count) for j in range(count)}
            last = measured
        elif place <= 18 and place % 3 == 0:
            drops[ended] += last - measured
            last = measured
        else:
            assert measured is None
        if place == 18:
            updates += 1
            a = np.zeros((count, count))
            for i in range(count):
                beta = np.array([drops[j][i] for j in range(count)]) / 2
                a[i] = np.linalg.solve(np.array(probes), beta)
                if diagonal:
                    a[i] = np.where(np.arange(count) == i, beta[i] / o, 0.0)
            if a.min() < 0:
                a = a - a.min()
            a = a / a.sum()
            if ema is None:
                p = p * np.exp(2.0 * a.sum(axis=0))
            else:
                smoothed = a if smoothed is None else 0.7 * a + 0.3 * smoothed
                p = np.exp(2.0 * smoothed.sum(axis=0))
            p = p / p.sum()
        if place < 18:
            ended = decision.probe
            np.testing.assert_allclose(decision.sampling_weights, probes[decision.probe])
            assert decision.fresh_quota == (3 if place % 3 == 0 else None)
        else:
            assert decision.probe is None
            assert decision.fresh_quota is None
            np.testing.assert_allclose(decision.sampling_weights, p, atol=1e-12)
    assert updates == 3
    if ema is not None:
        assert p.max() / p.min() <= np.exp(2.0)


def test_every_sweep_is_a_permutation_and_they_differ():
    mixer = build_mixer(
        "aioli", domains=names(7), update_every=100, lp_rounds=6, lp_steps=2, one_hot_factor=0.5
    )
    probes = [d.probe for _, d, _ in drive(mixer, random_linear(7, seed=1), last=84)]
    assert probes[::2] == probes[1::2]
    sweeps = [tuple(probes[14 * n : 14 * n + 14 : 2]) for n in range(6)]
    assert all(sorted(sweep) == list(range(7)) for sweep in sweeps)
    assert len(set(sweeps)) > 1


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 7, 22])
def test_it_recovers_the_truth_without_noise(count, lag):
    """Driven by the planner of the training loop, which with a lag measures a step early."""
    world = random_linear(count, seed=count)
    mixer = build_mixer(
        "aioli",
        domains=names(count),
        one_hot_factor=0.75,
        lp_rounds=2,
        lp_steps=3,
        update_every=6 * count + 10,
    )
    sampler = Sampler(names(count), [1000] * count, seed=1, global_batch=16)
    planner = Planner(mixer=mixer, sampler=sampler, lag=lag, measure=lambda: world.losses())
    for step in range(1, 12 * count + 20):
        planned = planner.take(step)
        planner.prepare(step + 1)
        weights, losses = planned.plan.weights, world.losses()
        world.train(weights)
        planner.observe(
            Observation(step, loss_sum=losses, token_count=np.ones(count), sampling_weights=weights)
        )
    found = mixer.describe()["influence_on"]
    matrix = np.array([[found[i][j] for j in names(count)] for i in names(count)])
    correlation = np.corrcoef(matrix.ravel(), world.matrix.ravel())[0, 1]
    assert correlation > 1 - 1e-9
    np.testing.assert_allclose(matrix, world.matrix / world.matrix.sum(), atol=1e-9)


@pytest.mark.parametrize("unit", ["sample", "step"])
@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
@pytest.mark.parametrize("count", [2, 3, 7, 22])
def test_the_real_sampler_realises_every_probe_to_one_sample(count, draw, unit):
    batch, lp_steps = (16, 5) if unit == "sample" else (4, 12)
    sampler = Sampler(
        names(count), [1000] * count, seed=3, global_batch=batch, draw=draw, unit=unit
    )
    mixer = build_mixer(
        "aioli",
        domains=names(count),
        one_hot_factor=0.625,
        lp_rounds=2,
        lp_steps=lp_steps,
        update_every=2 * lp_steps * count + 7,
    )
    blocks = {}

    def take(step, weights, fresh_quota):
        plan = sampler.plan(step, weights, fresh_quota)
        return np.bincount(plan.domain, minlength=count)

    def note(step, decision, counts):
        if decision.probe is not None:
            if decision.fresh_quota is not None:
                blocks[step] = [decision.probe, decision.sampling_weights, 0, 0]
            block = blocks[max(blocks)]
            assert block[0] == decision.probe
            block[2], block[3] = block[2] + counts, block[3] + 1

    world = random_linear(count, seed=2)
    steps = 2 * (2 * lp_steps * count + 7)
    run = simulate(mixer, world, steps=steps, batch=batch, draw=take, on_step=note)
    assert len(blocks) == 4 * count
    slack = 1.0 if unit == "sample" else float(batch)
    for _, weights, counts, length in blocks.values():
        assert length == lp_steps
        assert np.abs(counts - weights * batch * lp_steps).max() <= slack
    assert run.probe_steps == 4 * count * lp_steps
    assert run.validations == 2 * (2 * count + 1)


def test_a_skipped_step_is_not_counted_as_training():
    """Where a probe's step was dropped, A is still right: what trained is what is counted."""
    world = random_linear(3, seed=9)
    mixer = build_mixer("aioli", domains=names(3), **OPTIONS)
    for _ in drive(mixer, world, last=25, skip={4, 8, 17}):
        pass
    found = mixer.describe()["influence_on"]
    matrix = np.array([[found[i][j] for j in names(3)] for i in names(3)])
    np.testing.assert_allclose(matrix, world.matrix / world.matrix.sum(), atol=1e-9)


def test_floors_and_ceilings_hold_in_probes_and_the_truth_is_still_found():
    world = random_linear(3, seed=9)
    floor, ceiling = [0.2, 0.0, 0.0], [1.0, 0.5, 1.0]
    mixer = build_mixer("aioli", domains=names(3), floor=floor, ceiling=ceiling, **OPTIONS)
    for _, decision, _ in drive(mixer, world, last=60):
        assert (decision.sampling_weights >= np.array(floor) - 1e-12).all()
        assert (decision.sampling_weights <= np.array(ceiling) + 1e-12).all()
    found = mixer.describe()["influence_on"]
    matrix = np.array([[found[i][j] for j in names(3)] for i in names(3)])
    np.testing.assert_allclose(matrix, world.matrix / world.matrix.sum(), atol=1e-9)


def test_in_shadow_nothing_is_concluded_from_probes_that_never_trained():
    world = random_linear(3, seed=9)
    mixer = build_mixer("aioli", domains=names(3), weights=[2, 1, 1], shadow=True, **OPTIONS)
    for step, decision, _ in drive(mixer, world, last=60):
        assert decision.sampling_weights.tolist() == [0.5, 0.25, 0.25]
        assert decision.fresh_quota is None
        if step == 1:
            assert sorted(decision.controller_weights.round(2)) == [0.15, 0.15, 0.7]
    assert decision.controller_weights.tolist() == [0.5, 0.25, 0.25]


def test_losses_that_do_not_move_leave_the_weights():
    world = LinearWorld(start=np.ones(2), matrix=np.zeros((2, 2)), half_life=None)
    mixer = build_mixer("aioli", domains=names(2), weights=[3, 1], **OPTIONS)
    *_, (_, decision, _) = drive(mixer, world, last=40)
    assert decision.sampling_weights.tolist() == [0.75, 0.25]


@pytest.mark.parametrize("init", ["prior", "uniform"])
def test_restricted_mode(init):
    world = random_linear(2, seed=4)
    options = OPTIONS | {"update_every": 15}
    mixer = build_mixer(
        "aioli", domains=names(2), prior=[0.9, 0.1], prior_steps=10, init=init, **options
    )
    seen = {step: (decision, measured) for step, decision, measured in drive(mixer, world, last=25)}
    for step in range(1, 11):
        assert seen[step][0].sampling_weights.tolist() == [0.9, 0.1]
        assert seen[step][0].probe is None
        assert seen[step][1] is None
    assert seen[11][1] is not None
    assert seen[11][0].probe is not None
    a = world.matrix / world.matrix.sum()
    start = np.array([0.9, 0.1] if init == "prior" else [0.5, 0.5])
    p = start * np.exp(2.0 * a.sum(axis=0))
    np.testing.assert_allclose(seen[25][0].sampling_weights, p / p.sum(), atol=1e-9)


def test_it_resumes_with_the_same_bits_before_every_step():
    """Also in the middle of a probe, and with the domains in another order."""
    options = OPTIONS | {"update_every": 60, "ema": 0.4}
    worlds = [power_world(transfer=hub_transfer()) for _ in range(2)]
    order = ["d2", "d0", "d3", "d1", "d6", "d4", "d5"]
    whole = build_mixer("aioli", domains=names(7), **options)
    plain = {s: d for s, d, _ in drive(whole, worlds[0], last=130)}
    mixer = build_mixer("aioli", domains=names(7), **options)
    for step in range(1, 131):
        fresh = build_mixer("aioli", domains=names(7), **options)
        fresh.load_state_dict(json.loads(json.dumps(mixer.state_dict(), allow_nan=False)))
        mixer = fresh
        ((_, decision, _),) = drive(mixer, worlds[1], first=step, last=step)
        assert decision.sampling_weights.tobytes() == plain[step].sampling_weights.tobytes()
        assert (decision.probe, decision.fresh_quota) == (
            plain[step].probe,
            plain[step].fresh_quota,
        )
        turned = build_mixer("aioli", domains=order, **options)
        turned.load_state_dict(mixer.state_dict())
        later = turned.decide(step + 1)
        back = [order.index(name) for name in names(7)]
        expected = mixer.decide(step + 1)
        assert later.sampling_weights[back].tolist() == expected.sampling_weights.tolist()
        assert (later.probe is None) == (expected.probe is None)
        if later.probe is not None:
            assert order[later.probe] == names(7)[expected.probe]


@pytest.mark.parametrize(
    "damage",
    [
        {"round": -2},
        {"last": {"d0": 1.0}},
        {"drop": {}},
        {"drop": {"d0": {"d0": None, "d1": 0.0}, "d1": {"d0": 0.0, "d1": 0.0}}},
        {"more": 1},
    ],
)
def test_a_damaged_state_is_refused(damage):
    mixer = build_mixer("aioli", domains=names(2), **OPTIONS)
    state = mixer.state_dict()
    with pytest.raises(CheckpointError, match="aioli"):
        mixer.load_state_dict(state | {"rule": state["rule"] | damage})
    assert mixer.state_dict() == state


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        (1, {}, "there is one domain and nothing to compare it with"),
        (22, {}, r"4 \* 4 \* 22 = 352 steps of each round; raise update_every to at least 353"),
        (7, {"update_every": 112}, r"raise update_every to at least 113"),
        (4, {"one_hot_factor": 0.25}, r"one_hot_factor is 0.25; .* above 1/4"),
        (2, {"one_hot_factor": 1.5}, r"at most 1"),
        (2, {"eta": 0.0}, r"eta is 0.0; it must be above 0"),
        (2, {"ema": 1.0}, r"ema is 1.0; it must be at least 0 and below 1"),
        (2, {"lp_steps": 0}, r"lp_steps is 0"),
        (2, {"lp_rounds": 0}, r"lp_rounds is 0"),
        (2, {"prior": [1.0]}, r"prior has 1 values for 2 domains"),
        (2, {"prior": {"d0": 1.0}}, r"says nothing of the domain 'd1'"),
        (2, {"prior": [0.0, 0.0]}, r"prior is \[0.0, 0.0\]"),
        (2, {"prior": [1.0, 1.0], "init": "uniform"}, r"nothing would use it"),
    ],
)
def test_what_cannot_work_is_refused_by_name(domains, options, message):
    with pytest.raises(ConfigError, match=message):
        build_mixer("aioli", domains=names(domains), **options)


def test_one_step_more_than_the_probes_is_enough():
    build_mixer("aioli", domains=names(7), update_every=113)


def test_a_whole_probe_leaves_the_off_diagonal_out():
    """With o = 1, ``diagonal`` is no full solve either."""
    world = random_linear(3, seed=5)
    options = OPTIONS | {"one_hot_factor": 1.0, "diagonal": True}
    mixer = build_mixer("aioli", domains=names(3), **options)
    for _ in drive(mixer, world, last=25):
        pass
    found = mixer.describe()["influence_on"]
    assert all(found[i][j] == 0 for i in names(3) for j in names(3) if i != j)
    own = [found[i][i] for i in names(3)]
    truth = np.diag(world.matrix) / np.trace(world.matrix)
    np.testing.assert_allclose(own, truth, atol=1e-9)
