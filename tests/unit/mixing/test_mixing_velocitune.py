"""Velocitune: the formula, its start, its state, and that it nears the optimum's losses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.simulate import simulate
from megatron.mixing.velocitune import velocity
from megatron.mixing.worlds import hub_transfer, power_world

NAMES = ["a", "b", "c"]
TARGETS = [1.0, 2.0, 3.0]
ROWS = [[5.0, 4.0, 3.5], [4.0, 4.5, 3.4], [2.0, 2.1, 2.9], [0.5, 3.0, 3.25]]


def build(**options):
    return build_mixer("velocitune", domains=NAMES, **{"targets": TARGETS} | options)


def drive(mixer, rows, *, every, warmup=0):
    """Feed a run whose held-out losses are ``rows``, the first of them before its start."""
    rows, found, asked = list(rows), [], []
    for step in range(1, warmup + every * len(rows)):
        if len(asked) == len(rows):
            break
        decision = mixer.decide(step)
        if decision.validate:
            asked.append(step - 1)
            mixer.observe(Observation(step - 1, valid_loss=rows[len(asked) - 1]))
            decision = mixer.decide(step)
            assert not decision.validate
            found.append(decision.sampling_weights)
        mixer.observe(Observation(step, loss_sum=[1, 2, 3], token_count=[1, 1, 1]))
    return asked, np.array(found)


def expected(rows, start):
    """The rule as plain sums and products, one domain at a time."""
    p, found = list(start), [list(start)]
    for row in rows[1:]:
        grown = []
        for i, loss in enumerate(row):
            v = (loss - TARGETS[i]) / (rows[0][i] - TARGETS[i])
            grown.append(p[i] * math.exp(min(max(v, 0.0), 1.0)))
        p = [value / sum(grown) for value in grown]
        found.append(p)
    return np.array(found)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_rule(warmup):
    mixer = build(weights=[2, 1, 1], update_every=4, warmup_steps=warmup)
    asked, found = drive(mixer, ROWS, every=4, warmup=warmup)
    assert asked == [warmup, 4, 8, 12]
    np.testing.assert_allclose(found, expected(ROWS, [0.5, 0.25, 0.25]), rtol=1e-12)


def test_the_share_of_the_way_counts_and_not_its_length():
    """Two domains half-way to their targets are alike, however far those are."""
    v = velocity(np.array([5.0, 2.05]), np.array([9.0, 2.1]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(v, [0.5, 0.5])


def test_a_domain_that_starts_at_its_target_or_is_not_measured():
    now, start = np.array([0.9, 1.1, 1.0, np.nan]), np.array([1.0, 1.0, 0.5, 2.0])
    v = velocity(now, start, np.ones(4))
    np.testing.assert_array_equal(v, [0.0, 1.0, 0.0, np.nan])


def test_without_held_out_data_a_domain_shrinks_and_nothing_breaks():
    mixer = build(update_every=2)
    _, found = drive(mixer, [[5.0, np.nan, 4.0], [5.0, np.nan, 4.0]], every=2)
    np.testing.assert_allclose(found[1], np.array([math.e, 1, math.e]) / (1 + 2 * math.e))
    assert mixer.describe()["velocity"] == {"a": 1.0, "b": None, "c": 1.0}


def test_the_start_is_part_of_the_state():
    mixer, again = build(update_every=4), build(update_every=4)
    drive(mixer, ROWS[:2], every=4)
    again.load_state_dict(mixer.state_dict())
    for one in (mixer, again):
        one.observe(Observation(8, valid_loss=ROWS[2]))
    first, second = (one.decide(9).sampling_weights for one in (mixer, again))
    assert first.tobytes() == second.tobytes()
    assert not np.array_equal(first, [1 / 3] * 3)
    state = mixer.state_dict()
    state["rule"]["velocity"]["a"] = 2.0
    with pytest.raises(CheckpointError, match="velocity"):
        again.load_state_dict(state)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="'velocitune': no targets"):
        build(targets=None)
    with pytest.raises(ConfigError, match="exclude each other"):
        build(targets_from="x")
    with pytest.raises(ConfigError, match="targets says nothing of the domain 'c'"):
        build(targets={"a": 1.0, "b": 1.0})


def test_with_the_optimums_losses_as_targets_it_nears_the_optimum():
    world, steps = power_world(transfer=hub_transfer()), 3000
    best = world.best_fixed(steps)
    ends = {}
    for method, options in (
        ("static", {}),
        ("velocitune", {"targets": best.losses.tolist(), "update_every": 50}),
    ):
        mixer = build_mixer(method, domains=list(world.domains), **options)
        ends[method] = simulate(mixer, world, steps=steps, record_every=steps).final - best.value
    assert 0 <= ends["velocitune"] < 0.5 * ends["static"]
