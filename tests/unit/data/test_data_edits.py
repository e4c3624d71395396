"""Domains that come and go between launches: nothing is read twice or lost in those that stay."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.apportion import sound_carry
from megatron.data.sampler import Sampler, edit_domains
from megatron.errors import CheckpointError

OPTIONS: dict[str, Any] = {"seed": 5, "global_batch": 6}


def sampler(names: list[str], windows: int = 50, **changes: Any) -> Sampler:
    return Sampler(names, [windows] * len(names), **{**OPTIONS, **changes})


def run(
    one: Sampler, steps: range, weights: list[float], fresh_quota: int | None = None
) -> dict[str, list[tuple[int, int]]]:
    """Return what each domain gave, in order; a block opens at the first step if asked for."""
    given: dict[str, list[tuple[int, int]]] = {name: [] for name in one.domain_names}
    for step in steps:
        plan = one.plan(step, weights, fresh_quota if step == steps.start else None)
        for name, epoch, sample in plan.sample_ids(one.domain_names):
            given[name].append((epoch, sample))
    return given


def edited(before: Sampler, names: list[str], **changes: Any) -> Sampler:
    after = sampler(names, **changes)
    after.load_state_dict(edit_domains(json.loads(json.dumps(before.state_dict())), names))
    return after


@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
@pytest.mark.parametrize("block", [None, 100])
def test_domains_that_stay_or_return_go_on_in_order(draw: Any, block: int | None) -> None:
    first = sampler(["a", "b", "c"], windows=1000, draw=draw)
    launches = [run(first, range(1, 8), [3, 2, 1], block)]
    second = edited(first, ["d", "c", "a"], windows=1000, draw=draw)
    launches.append(run(second, range(8, 15), [1, 1, 1]))
    third = edited(second, ["b", "a", "e"], windows=1000, draw=draw)
    launches.append(run(third, range(15, 40), [1, 2, 2]))
    fourth = edited(third, ["c", "b", "a", "d"], windows=1000, draw=draw)
    launches.append(run(fourth, range(40, 50), [1, 1, 1, 1]))
    for name in "abcde":
        union = [sample for launch in launches for sample in launch.get(name, [])]
        assert union == [(0, place) for place in range(len(union))], name
        assert union, name
    assert fourth.samples_seen.tolist() == [
        sum(len(launch.get(name, [])) for launch in launches) for name in "cbad"
    ]


def test_nothing_changes_where_the_domains_are_the_same() -> None:
    one = sampler(["a", "b", "c"])
    run(one, range(1, 5), [3, 2, 2], 10)
    assert edit_domains(one.state_dict(), ["c", "a", "b"]) == one.state_dict()


def test_the_removed_are_kept_by_later_checkpoints_too() -> None:
    one = sampler(["a", "b"])
    taken = run(one, range(1, 6), [1, 1])
    two = edited(one, ["a"])
    run(two, range(6, 9), [1])
    again = sampler(["a"])
    again.load_state_dict(json.loads(json.dumps(two.state_dict())))
    assert again.state_dict() == two.state_dict()
    assert again.state_dict()["retired"]["b"]["samples"] == len(taken["b"])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data())
def test_shares_stay_within_the_bound_from_an_edit_on(data: st.DataObject) -> None:
    """Counted from the edit, no domain strays 1 + ln K samples from what was asked for it."""
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    names = [f"domain {place}" for place in range(data.draw(st.integers(2, 9)))]
    batch = data.draw(st.sampled_from([1, 3, 8]))
    block = data.draw(st.sampled_from([None, None, 4, 50]))
    one = sampler(names, global_batch=batch)
    for step in range(1, data.draw(st.integers(2, 30))):
        one.plan(step, random.dirichlet(np.full(len(names), 0.3)), block if step == 1 else None)
    stay = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    least = int(len(stay) == len(names))
    now = [*stay, *[f"new {place}" for place in range(data.draw(st.integers(least, 4)))]]
    two = edited(one, now, global_batch=batch)
    carry = np.array(list(two.state_dict()["quota"]["carry"].values()))
    assert abs(carry.sum()) < 1e-9
    asked, seen = np.zeros(len(now)), two.samples_seen
    for step in range(100, 130):
        weights = random.dirichlet(np.full(len(now), 0.2))
        two.plan(step, weights)
        asked += weights * batch
        assert np.abs(two.samples_seen - seen - asked).max() <= 1 + math.log(len(now)) + 1e-9


@settings(derandomize=True, max_examples=300)
@given(carry=st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_a_sound_carry_satisfies_what_the_proof_asks(carry: list[float]) -> None:
    sound = sound_carry(np.array(carry))
    count = len(carry)
    assert abs(sound.sum()) < 1e-9
    assert sound.min() > -1
    ordered = np.sort(sound)[::-1]
    for k in range(1, count):
        assert ordered[:k].mean() <= sum(1 / j for j in range(k + 1, count + 1)) + 1e-9
    if count > 1 and abs(sum(carry)) < 1e-12 and max(map(abs, carry)) < 1 / count:
        np.testing.assert_allclose(sound, carry, atol=1e-9)  # what is sound stays as it is


def test_a_state_of_version_1_is_taken_up() -> None:
    one = sampler(["a", "b"])
    run(one, range(1, 4), [1, 2])
    old = {key: value for key, value in one.state_dict().items() if key != "retired"}
    old["version"] = 1
    again = sampler(["a", "b"])
    again.load_state_dict(old)
    assert again.state_dict() == one.state_dict()
    assert list(edit_domains(old, ["b", "c"])["retired"]) == ["a"]
    with pytest.raises(CheckpointError, match="version 3"):
        edit_domains({**old, "version": 3}, ["b", "c"])


def test_other_domains_without_an_edit_are_refused() -> None:
    state = sampler(["a", "b"]).state_dict()
    with pytest.raises(CheckpointError, match=r"\['a', 'b'\].*\['a', 'c'\].*allow_domain_edits"):
        sampler(["a", "c"]).load_state_dict(state)


def test_a_domain_that_returns_smaller_is_refused() -> None:
    one = sampler(["a", "b"])
    taken = run(one, range(1, 10), [1, 1])
    assert len(taken["b"]) == 27
    two = edited(one, ["a"])
    state = edit_domains(two.state_dict(), ["a", "b"])
    with pytest.raises(CheckpointError, match="domain 'b': 27 samples of the epoch are read"):
        Sampler(["a", "b"], [50, 20], **OPTIONS).load_state_dict(state)
