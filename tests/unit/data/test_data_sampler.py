"""The plan: exact on resume, the same on every layout, fair at every step."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.campaign.sampling import (
    Ids,
    assert_no_repeats,
    binomial_p,
    check_layouts_and_restores,
    draw_sources,
    weight_sequence,
)

from megatron.data.plan import EndOfData, Plan
from megatron.data.sampler import Sampler
from megatron.errors import CheckpointError, ConfigError


def test_the_binomial_test_itself() -> None:
    assert binomial_p(3, 10, 0.5) == pytest.approx(0.34375)
    assert binomial_p(0, 100, 0.5) == pytest.approx(2 / 2**100)
    assert binomial_p(5, 5, 0.2) == pytest.approx(0.2**5)


@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_ordered_ids_are_the_same_on_every_layout_and_after_every_restore(
    examples: int,
) -> None:
    check = given(data=st.data())(check_layouts_and_restores)
    settings(max_examples=examples, deadline=None, derandomize=True)(check)()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_realised_count_stays_within_the_bound(data: st.DataObject) -> None:
    domains = data.draw(st.integers(1, 12))
    global_batch = data.draw(st.sampled_from([1, 4, 12, 64]))
    unit, size = data.draw(
        st.sampled_from([("sample", 1), ("micro_batch", 2), ("step", global_batch)])
    )
    if global_batch % size:
        size = 1
    steps = data.draw(st.integers(1, 60))
    weights = weight_sequence(data, domains, steps)
    sampler = Sampler(
        [str(k) for k in range(domains)],
        draw_sources(data, domains),
        seed=data.draw(st.integers(0, 99)),
        global_batch=global_batch,
        unit=unit,
        micro_batch=size,
    )
    asked, real = np.zeros(domains), np.zeros(domains)
    for step in range(steps):
        plan = sampler.plan(step, weights[step])
        asked, real = asked + weights[step] * global_batch, real + plan.counts()
        assert plan.domain.size == global_batch
        assert (sampler.samples_seen == real).all()
        assert np.abs(real - asked).max() / size <= 1 + math.log(domains) + 1e-9
        if unit != "sample":
            rows = plan.domain.reshape(-1, size)
            assert (rows == rows[:, :1]).all()


@pytest.mark.parametrize(("unit", "size"), [("sample", 1), ("micro_batch", 4), ("step", 32)])
@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
def test_a_fresh_quota_block(unit: str, size: int, draw: str) -> None:
    """Within one unit of its share over the block, clean afterwards, resumed in its middle."""
    random = np.random.default_rng(0)
    names = [str(k) for k in range(7)]
    sampler = Sampler(
        names, [1000] * 7, seed=1, global_batch=32, unit=unit, micro_batch=size, draw=draw
    )
    step = 0
    for length in (1, 2, 3, 10, 1, 25):
        for _ in range(4):
            sampler.plan(step, random.dirichlet(np.ones(7)))
            step += 1
        share, count = random.dirichlet(np.ones(7)), np.zeros(7)
        for inside in range(length):
            state = json.loads(json.dumps(sampler.state_dict()))
            sampler = Sampler(
                names, [1000] * 7, seed=1, global_batch=32, unit=unit, micro_batch=size, draw=draw
            )
            sampler.load_state_dict(state)
            plan = sampler.plan(step, share, length if inside == 0 else None)
            count += plan.counts()
            step += 1
        assert np.abs(count - share * 32 * length).max() < size
        state = sampler.state_dict()["quota"]
        assert state["block"] is None
        assert not any(state["carry"].values())


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("unit", "size"), [("sample", 1), ("micro_batch", 4)])
def test_multinomial_draws_pass_an_exact_binomial_test(
    share: float, seed: int, unit: str, size: int
) -> None:
    """Counts over all steps, and of every single slot, so that no slot prefers a domain."""
    steps, batch = 400, 32
    sampler = Sampler(
        ["a", "b", "c"],
        [5, 10**6, 10**6],
        seed=seed,
        global_batch=batch,
        unit=unit,
        micro_batch=size,
        draw="multinomial",
    )
    weights = [share, (1 - share) * 0.25, (1 - share) * 0.75]
    drawn = np.stack([sampler.plan(step, weights).domain for step in range(steps)])[:, ::size]
    for domain, weight in enumerate(weights):
        hits = drawn == domain
        assert binomial_p(int(hits.sum()), hits.size, weight) > 1e-9
        for slot in range(hits.shape[1]):
            assert binomial_p(int(hits[:, slot].sum()), steps, weight) > 1e-9
    # Steps are independent: a draw does not follow the one before it.
    both = int(((drawn[1:] == 1) & (drawn[:-1] == 1)).sum())
    assert binomial_p(both, drawn[1:].size, weights[1] ** 2) > 1e-9


def test_apportioned_slots_are_shuffled() -> None:
    """No domain prefers a part of the global batch, hence a rank or a micro-batch."""
    sampler = Sampler(["a", "b"], [10**6] * 2, seed=3, global_batch=32)
    drawn = np.stack([sampler.plan(step, [0.25, 0.75]).domain for step in range(600)])
    assert (drawn == 0).sum(axis=1).tolist() == [8] * 600
    for slot in range(32):
        assert binomial_p(int((drawn[:, slot] == 0).sum()), 600, 0.25) > 1e-9


@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
@pytest.mark.parametrize("small", [0.001, 1e-9, 0.0])
def test_extreme_shares_and_domains_of_one_sample(draw: str, small: float) -> None:
    sampler = Sampler(["rare", "tiny"], [1, 1], seed=5, global_batch=64, draw=draw)
    ids: Ids = []
    for step in range(100):
        ids += sampler.plan(step, [small, 1 - small]).sample_ids(["rare", "tiny"])
    assert_no_repeats(ids, ["rare", "tiny"], [1, 1])
    rare = sum(name == "rare" for name, _, _ in ids)
    assert rare == int(sampler.samples_seen[0])
    if draw == "apportion":
        assert abs(rare - small * 6400) < 1 + math.log(2)
    if small == 0.0:
        assert rare == 0
    assert sampler.epochs.tolist() == [rare, 6400 - rare]


def test_weights_are_normalised_and_checked() -> None:
    sampler = Sampler(["a", "b"], [10, 10], seed=0, global_batch=8)
    assert sampler.plan(0, [3, 1]).counts().tolist() == [6, 2]
    assert sampler.plan(1, [3, 1]).weights.tolist() == [0.75, 0.25]
    for weights in ([1.0], [-1, 2], [0, 0], [np.nan, 1], [np.inf, 1]):
        with pytest.raises(ValueError, match="weights"):
            sampler.plan(2, weights)
    with pytest.raises(ValueError, match="block"):
        sampler.plan(2, [1, 1], fresh_quota=0)


@pytest.mark.parametrize("on_exhausted", ["repeat", "stop", "drop"])
def test_a_distribution_keeps_its_bits(on_exhausted: str) -> None:
    """What a plan says it was drawn from is what the controller decided, to the last bit."""
    random = np.random.default_rng(0)
    sampler = Sampler(
        list("abcdefg"), [10**6] * 7, seed=0, global_batch=8, on_exhausted=on_exhausted
    )
    for step in range(200):
        weights = random.dirichlet(np.ones(7))
        assert sampler.plan(step, weights).weights.tobytes() == weights.tobytes()


def test_options_are_checked() -> None:
    for options in ({"unit": "row"}, {"draw": "uniform"}, {"on_exhausted": "loop"}):
        with pytest.raises(ConfigError, match="mixing"):
            Sampler(["a"], [1], seed=0, global_batch=4, **options)
    with pytest.raises(ConfigError, match="multiple"):
        Sampler(["a"], [1], seed=0, global_batch=4, unit="micro_batch", micro_batch=3)
    for names, sizes in ((["a", "a"], [1, 1]), ([], []), (["a"], [1, 2])):
        with pytest.raises(ValueError, match="distinct"):
            Sampler(names, sizes, seed=0, global_batch=4)
    with pytest.raises(ValueError, match="without samples"):
        Sampler(["a"], [0], seed=0, global_batch=4)


def run_out(
    sampler: Sampler, weights: list[float], block_at: int | None = None
) -> tuple[list[Plan], EndOfData]:
    """Plan until the data ends; the step that met the end must have changed nothing."""
    plans: list[Plan] = []
    for step in range(100):
        before = sampler.state_dict()
        try:
            plans.append(sampler.plan(step, weights, 3 if step == block_at else None))
        except EndOfData as end:
            assert sampler.state_dict() == before
            return plans, end
    raise AssertionError("the data never ended")


@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
def test_stop_ends_before_the_step_that_would_repeat(draw: str) -> None:
    sampler = Sampler(
        ["a", "b"], [20, 1000], seed=0, global_batch=8, draw=draw, on_exhausted="stop"
    )
    plans, end = run_out(sampler, [0.5, 0.5])
    ids = [one for plan in plans for one in plan.sample_ids(["a", "b"])]
    step, before = len(plans), sampler.state_dict()
    assert end.domains == ("a",)
    assert end.step == step
    assert sampler.samples_seen.sum() == 8 * step
    assert 20 - 8 < sampler.samples_seen[0] <= 20
    assert all(epoch == 0 for _, epoch, _ in ids)
    if draw == "apportion":
        assert step == 5
        with pytest.raises(EndOfData):
            sampler.plan(5, [0.5, 0.5], fresh_quota=3)
        assert sampler.state_dict() == before


@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
@pytest.mark.parametrize(("unit", "size"), [("sample", 1), ("micro_batch", 2)])
def test_drop_goes_on_without_the_exhausted(draw: str, unit: str, size: int) -> None:
    names, sizes = ["a", "b", "c"], [21, 60, 1]
    sampler = Sampler(
        names,
        sizes,
        seed=4,
        global_batch=8,
        draw=draw,
        unit=unit,
        micro_batch=size,
        on_exhausted="drop",
    )
    plans, end = run_out(sampler, [0.5, 0.4, 0.1], block_at=2)
    ids = [one for plan in plans for one in plan.sample_ids(names)]
    assert all(plan.weights.sum() == pytest.approx(1) for plan in plans)
    # Whole steps of 8 out of what whole units leave.
    available = sum(count // size * size for count in sizes)
    assert len(ids) == available // 8 * 8
    assert end.domains == ("a", "b", "c")
    assert_no_repeats(ids, names, sizes)
    assert all(epoch == 0 for _, epoch, _ in ids)
    if size == 1:  # no micro-batch of two can be made of the one sample of "c"
        assert plans[0].weights.tolist() == [0.5, 0.4, 0.1]
    assert plans[-1].weights[0] == 0.0


def test_a_dropped_domain_leaves_its_share_to_the_others_in_proportion() -> None:
    sampler = Sampler(
        ["a", "b", "c"], [16, 10**6, 10**6], seed=4, global_batch=32, on_exhausted="drop"
    )
    first = sampler.plan(0, [0.5, 0.375, 0.125])
    assert first.counts().tolist() == [16, 12, 4]
    second = sampler.plan(1, [0.5, 0.375, 0.125])
    assert second.counts().tolist() == [0, 24, 8]
    assert second.weights.tolist() == [0.0, 0.75, 0.25]


def test_state_is_refused_where_it_does_not_fit() -> None:
    sampler = Sampler(["a", "b"], [10, 10], seed=0, global_batch=8)
    sampler.plan(0, [1, 1])
    state = sampler.state_dict()
    for other, message in (
        (Sampler(["a", "c"], [10, 10], seed=0, global_batch=8), "domains"),
        (Sampler(["a", "b"], [10, 10], seed=1, global_batch=8), "seed"),
        (Sampler(["a", "b"], [10, 3], seed=0, global_batch=8), "changed"),
    ):
        before = other.state_dict()
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before
    with pytest.raises(CheckpointError, match="version"):
        sampler.load_state_dict(state | {"version": 3})
    with pytest.raises(CheckpointError, match="unknown"):
        sampler.load_state_dict(state | {"more": 1})


def test_another_global_batch_may_take_over_inside_a_block() -> None:
    """The data-parallel size, and with it the batch, may change where a run is resumed."""
    names, share = ["a", "b", "c"], np.array([0.5, 0.3, 0.2])
    sampler = Sampler(names, [100] * 3, seed=0, global_batch=8)
    counts = sampler.plan(0, share, fresh_quota=4).counts()
    larger = Sampler(names, [100] * 3, seed=0, global_batch=24)
    larger.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for step in range(1, 4):
        counts = counts + larger.plan(step, share).counts()
    assert np.abs(counts - share * (8 + 3 * 24)).max() < 1


def test_upcoming_are_the_samples_that_are_drawn_next() -> None:
    names, weights = ["a", "b", "c"], [0.6, 0.3, 0.1]
    sampler = Sampler(names, [40, 7, 1], seed=0, global_batch=10)
    for step in range(30):
        before = sampler.state_dict()
        domain, epoch, sample = sampler.upcoming(weights, 10)
        assert sampler.state_dict() == before
        told = {(names[d], e, s) for d, e, s in zip(domain, epoch, sample, strict=True)}
        assert len(told) == domain.size <= 10 + 2 * 3
        for name, at, place in sampler.plan(step, weights).sample_ids(names):
            # At the end of an epoch nothing is foreseen beyond it.
            crossed = any(n == name and e != at for n, e, _ in told)
            assert (name, at, place) in told or crossed or name == "c"


def test_plans_are_fixed_for_good() -> None:
    """A checkpoint of one release goes on under the next with the same samples."""
    sampler = Sampler(["a", "b", "c"], [5, 100, 7], seed=1234, global_batch=6)
    plans = [sampler.plan(step, [0.2, 0.5, 0.3]).domain.tolist() for step in (1, 2)]
    assert plans == [[2, 0, 2, 1, 1, 1], [2, 2, 1, 0, 1, 1]]
    sampler = Sampler(["a", "b"], [5, 100], seed=1234, global_batch=6, draw="multinomial")
    assert sampler.plan(1, [0.2, 0.8]).domain.tolist() == [1, 1, 1, 1, 1, 1]
