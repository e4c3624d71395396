"""R6 and R7: the order of the samples, and how often each domain comes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.campaign.row import Bench, Trial, attempt, must

from megatron.data.plan import Plan
from megatron.data.sampler import Sampler

_AT_ONCE = 250  # examples that Hypothesis makes without looking at the clock
FOUR_SIGMA = math.erfc(4 / math.sqrt(2))  # both sides

Ids = list[tuple[str, int, int]]


def wavering(base: int) -> Callable[[int], int]:
    """Windows of a domain whose epochs differ by one, as moved cuts make them."""
    return lambda epoch: base + (epoch * 7919 + base) % 2


def draw_sources(data: st.DataObject, domains: int) -> list[int | Callable[[int], int]]:
    sizes = st.sampled_from([1, 1, 2, 3, 10, 57, 1000, 10**9])
    return [
        wavering(size) if data.draw(st.booleans()) else size
        for size in data.draw(st.lists(sizes, min_size=domains, max_size=domains))
    ]


def binomial_p(hits: int, trials: int, share: float) -> float:
    """Two-sided exact binomial test: the probability of counts no likelier than ``hits``."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    count = np.arange(trials + 1)
    log_choose = factorials[-1] - factorials - factorials[::-1]
    chances = np.exp(log_choose + count * math.log(share) + (trials - count) * math.log1p(-share))
    return float(chances[chances <= chances[hits] * (1 + 1e-7)].sum())


def windows(source: int | Callable[[int], int], epoch: int) -> int:
    return source if isinstance(source, int) else source(epoch)


def weight_sequence(data: st.DataObject, domains: int, steps: int) -> NDArray[np.float64]:
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    kind = data.draw(st.sampled_from(["steady", "wild", "extreme", "switching"]))
    if kind == "steady":
        return np.tile(random.dirichlet(np.ones(domains)), (steps, 1))
    if kind == "wild":
        return random.dirichlet(np.full(domains, 0.1), steps)
    if kind == "extreme":
        rows = np.full((steps, domains), 0.001 / max(domains - 1, 1))
        rows[np.arange(steps), random.integers(0, domains, steps)] = 0.999
        return rows
    return np.eye(domains)[random.integers(0, domains, steps)]


def check_layouts_and_restores(data: st.DataObject) -> None:
    """Data-parallel sizes 1–16, micro-batch, accumulation, stop points, weights, drawn kinds.

    One sampler runs through; others are torn down after steps of Hypothesis's choice, their
    state sent through JSON into a new sampler with the domains in another order, and divided
    among other ranks from there on.
    """
    domains = data.draw(st.integers(1, 6))
    sources = draw_sources(data, domains)
    names = [f"domain {place}" for place in range(domains)]
    global_batch = data.draw(st.sampled_from([1, 2, 6, 16, 48, 240]))
    unit = data.draw(st.sampled_from(["sample", "micro_batch", "step"]))
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    # With whole micro-batches as the unit their size is part of the question asked.
    fixed_micro = data.draw(st.sampled_from(divisors)) if unit == "micro_batch" else None
    options = {
        "seed": data.draw(st.integers(0, 2**40)),
        "global_batch": global_batch,
        "unit": unit,
        "micro_batch": fixed_micro or 1,
        "draw": data.draw(st.sampled_from(["apportion", "multinomial"])),
    }
    steps = data.draw(st.integers(1, 14))
    weights = weight_sequence(data, domains, steps)
    blocks = {
        step: data.draw(st.integers(1, 5))
        for step in range(steps)
        if data.draw(st.integers(0, 5)) == 0
    }

    through = Sampler(names, sources, **options)
    expected = [
        through.plan(step, weights[step], blocks.get(step)).sample_ids(names)
        for step in range(steps)
    ]

    sampler, order = Sampler(names, sources, **options), list(range(domains))
    for step in range(steps):
        if data.draw(st.booleans()):
            state = json.loads(json.dumps(sampler.state_dict()))
            order = data.draw(st.permutations(order))
            # Another order of the domains changes the draws, so it is kept for loading only.
            shuffled = Sampler([names[k] for k in order], [sources[k] for k in order], **options)
            shuffled.load_state_dict(state)
            again = json.loads(json.dumps(shuffled.state_dict()))
            sampler = Sampler(names, sources, **options)
            sampler.load_state_dict(again)
        plan = sampler.plan(step, weights[step], blocks.get(step))
        assert collected(plan, names, data, divisors, fixed_micro) == expected[step]
    assert sampler.state_dict() == through.state_dict()
    assert_no_repeats([one for step in expected for one in step], names, sources)


def collected(
    plan: Plan, names: Sequence[str], data: st.DataObject, divisors: list[int], micro: int | None
) -> Ids:
    """Divide a plan among ranks, and put together again what each of them would read."""
    total = plan.domain.size
    micro = micro or data.draw(st.sampled_from(divisors))
    sizes = [n for n in range(1, 17) if total // micro % n == 0]
    data_size = data.draw(st.sampled_from(sizes))
    accumulation = total // micro // data_size
    ids, seen = plan.sample_ids(names), {}
    for rank in range(data_size):
        slots = plan.slots(micro, accumulation, rank, data_size)
        assert slots.shape == (accumulation, micro)
        for step in range(accumulation):
            for row in range(micro):
                seen[(step * data_size + rank) * micro + row] = ids[slots[step, row]]
    return [seen[slot] for slot in range(total)]


def assert_no_repeats(
    ids: Ids, names: Sequence[str], sources: Sequence[int | Callable[[int], int]]
) -> None:
    """Each domain's samples are its epochs, whole and in order, the last one to its cursor."""
    for name, source in zip(names, sources, strict=True):
        own = [(epoch, sample) for domain, epoch, sample in ids if domain == name]
        assert len(set(own)) == len(own)
        epoch = sample = 0
        for one in own:
            if sample == windows(source, epoch):
                epoch, sample = epoch + 1, 0
            assert one == (epoch, sample)
            sample += 1


def same_order(bench: Bench, trials: int) -> Iterator[Trial]:
    """R6: ordered global sample ids over layouts, stops, restores and changing weights."""
    while trials > 0:
        wanted = min(trials, _AT_ONCE)
        made = 0

        def counted(data: st.DataObject) -> None:
            nonlocal made
            made += 1
            check_layouts_and_restores(data)

        check = settings(max_examples=wanted, deadline=None, database=None)(
            given(data=st.data())(counted)
        )
        outcome = attempt(hypothesis_seed(bench.seed * 1_000_003 + trials)(check))
        yield Trial(failure=outcome.failure, count=made)
        trials -= wanted


def realised_shares(bench: Bench, trials: int) -> Iterator[Trial]:
    """R7: the realised share of every domain against its weight."""
    for number in range(trials):
        yield attempt(partial(_share_once, bench.chance(number), number))


def _share_once(chance: random.Random, number: int) -> None:
    domains = chance.randint(2, 8)
    values = np.random.default_rng(chance.randint(0, 2**31))
    weights = values.dirichlet(np.full(domains, chance.choice([0.1, 1.0])))
    if number % 3 == 0:
        domains, weights = 2, np.array([0.001, 0.999])
    sizes = [chance.choice([1, 2, 3, 57, 10**6]) for _ in range(domains)]
    batch, steps = chance.choice([1, 4, 16, 48]), chance.randint(20, 200)
    drawn = "multinomial" if number % 2 else "apportion"
    sampler = Sampler(
        [str(k) for k in range(domains)],
        sizes,
        seed=chance.randint(0, 2**40),
        global_batch=batch,
        draw=drawn,
    )
    counts = np.zeros(domains)
    for step in range(steps):
        counts += sampler.plan(step, weights).counts()
    total = batch * steps
    must(counts.sum() == total, f"{counts} of {total}")
    if drawn == "apportion":
        far = np.abs(counts - weights * total).max()
        must(far <= 1 + 1e-9, f"{far} samples from {weights * total}: {counts}")
        return
    # The exact binomial test, at the chance of leaving 4 sigma of a normal distribution: the
    # normal bound itself is wrong where a share is tiny.
    for count, weight in zip(counts.astype(int), weights, strict=True):
        if 0 < weight < 1:
            must(
                binomial_p(int(count), total, float(weight)) >= FOUR_SIGMA / domains,
                f"{count} of {total} at a share of {weight}",
            )
