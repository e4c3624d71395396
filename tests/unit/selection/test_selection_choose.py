"""What is kept, and in which order: against naive loops, and by what the rules promise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from megatron.errors import ConfigError, DataError
from megatron.selection.base import Cost
from megatron.selection.bill import Bill
from megatron.selection.choose import Limit, Ranking, choose, share_of
from megatron.selection.cost_model import sized_model
from megatron.selection.names import Naming, domain_name, output_name

NAN = np.nan


def kept(scores: Any, documents: int = 10**9, **ranking: Any) -> list[int]:
    return choose(np.array(scores), Ranking(**ranking), Limit(documents=documents)).tolist()


def test_top_is_a_stable_sort_and_nan_is_never_chosen() -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        scores = random.integers(0, 5, 40).astype(float)
        scores[random.random(40) < 0.2] = NAN
        naive = sorted((n for n in range(40) if scores[n] == scores[n]), key=lambda n: -scores[n])
        assert kept(scores) == naive
        assert kept(scores, 7) == naive[:7]
    assert kept([1.0, np.inf, NAN, -np.inf]) == [1, 0, 3]
    with pytest.raises(DataError, match="no document has a score"):
        kept([NAN, NAN])


@pytest.mark.parametrize("count", [1, 2, 3, 10, 31])
def test_thirds_stand_in_the_order_of_their_name(count: int) -> None:
    scores = np.random.default_rng(count).permutation(count).astype(float)
    ascending = np.argsort(scores)
    cuts = [0, count // 3, 2 * count // 3, count]
    thirds = [sorted(ascending[a:b].tolist()) for a, b in itertools.pairwise(cuts)]
    for order, first in (("low", (0, 1, 2)), ("mid", (1, 0, 2))):
        found = kept(scores, order=order, seed=4)
        place = 0
        for third in first:
            part = found[place : place + len(thirds[third])]
            assert sorted(part) == thirds[third]
            place += len(part)
        assert found == kept(scores, order=order, seed=4)
    if count == 31:
        assert kept(scores, order="low", seed=4) != kept(scores, order="low", seed=5)
        # Shuffled inside: the third is not in the order of its scores.
        assert kept(scores, 10, order="low") != ascending[:10].tolist()


def test_a_share_of_mid_is_of_the_middle_and_the_papers_program_of_the_lowest() -> None:
    scores = np.random.default_rng(1).permutation(300).astype(float)
    ascending = np.argsort(scores).tolist()
    assert set(kept(scores, 60, order="mid")) < set(ascending[100:200])
    released = kept(scores, 60, order="mid", thirds_of="kept")
    assert sorted(released[:20]) == sorted(ascending[20:40])
    assert sorted(released[20:40]) == sorted(ascending[:20])
    assert sorted(released) == sorted(ascending[:60])
    low = kept(scores, 60, order="low", thirds_of="kept")
    assert sorted(low[:20]) == sorted(ascending[:20])
    # Where everything is kept the two are one.
    for order in ("low", "mid"):
        assert kept(scores, order=order) == kept(scores, order=order, thirds_of="kept")


def test_draws_follow_the_softmax_of_standardised_scores() -> None:
    scores = np.array([1.0, 2.0, 4.0, 7.0])
    z = (scores - scores.mean()) / scores.std()
    for temperature in (0.5, 2.0):
        weights = np.exp(z / temperature)
        weights /= weights.sum()
        first = np.zeros(4)
        pairs = np.zeros((4, 4))
        draws = 6000
        for seed in range(draws):
            found = kept(scores, 2, order="sample", seed=seed, temperature=temperature)
            first[found[0]] += 1
            pairs[found[0], found[1]] += 1
        deviation = np.sqrt(weights * (1 - weights) / draws)
        assert (np.abs(first / draws - weights) < 4.5 * deviation + 1e-9).all()
        # Without replacement: the second by the weights that are left.
        expected = weights[:, None] * weights[None, :] / (1 - weights[:, None])
        np.fill_diagonal(expected, 0)
        assert np.abs(pairs / draws - expected).max() < 4.5 * np.sqrt(0.25 / draws)
    assert sorted(kept(scores, order="sample")) == [0, 1, 2, 3]
    assert kept(scores, order="sample", temperature=1e-6) == [3, 2, 1, 0]
    assert sorted(kept([2.0, 2.0], order="sample")) == [0, 1]
    extreme = kept([0.0, np.inf, 1.0, NAN], 2, order="sample", temperature=1e-6)
    assert sorted(extreme) == [1, 2]  # as good as the best finite one


@pytest.mark.parametrize("order", ["top", "mid", "sample"])
def test_sources_are_balanced_in_every_stretch(order: str) -> None:
    random = np.random.default_rng(3)
    sources = np.repeat(np.array([0, 1, 2], dtype=np.int32), [100, 20, 4])
    scores = random.normal(size=124) + 5.0 * (sources == 0)  # the first would take it all
    tokens = random.integers(1, 9, 124)
    ranking = {"order": order, "seed": 1}
    alone = kept(scores, 24, order="top")
    assert set(sources[alone].tolist()) == {0}
    share = choose(
        scores, Ranking(**ranking, per_source="share"), Limit(documents=62), sources=sources
    )
    assert np.abs(np.bincount(sources[share]) - [50, 10, 2]).max() <= 1
    equal = Ranking(**ranking, per_source="equal")
    found = choose(scores, equal, Limit(documents=36), sources=sources)
    assert np.bincount(sources[found]).tolist() == [16, 16, 4]
    found = choose(scores, equal, Limit(tokens=90), tokens=tokens, sources=sources)
    taken = np.bincount(sources[found], weights=tokens[found])
    assert abs(taken[0] - taken[1]) <= 9
    if order == "top":
        for source in (0, 1):
            own = [n for n in found.tolist() if sources[n] == source]
            members = np.flatnonzero(sources == source)
            best = members[np.argsort(-scores[members])][: len(own)]
            assert own == best.tolist()


def test_a_budget_in_tokens_is_never_passed() -> None:
    random = np.random.default_rng(2)
    scores, tokens = random.normal(size=50), random.integers(0, 20, 50)
    order = np.argsort(-scores)
    for budget in (30.0, 100.0, 1e9):
        found = choose(scores, Ranking(), Limit(tokens=budget), tokens=tokens)
        assert found.tolist() == order[: len(found)].tolist()
        assert tokens[found].sum() <= budget
        if len(found) < 50:
            assert tokens[order[: len(found) + 1]].sum() > budget
    with pytest.raises(DataError, match=r"the budget is 3 tokens, and the first .* alone has 5"):
        choose(np.array([1.0]), Ranking(), Limit(tokens=3), tokens=np.array([5]))


def test_shares_count_documents() -> None:
    assert [share_of(100, share) for share in (0.29, 1.0, 0.001, 0.999)] == [29, 100, 1, 99]
    for share in (0.0, 1.5, -0.1, NAN):
        with pytest.raises(ConfigError, match="--share"):
            share_of(100, share)
    with pytest.raises(ConfigError, match="--temperature 0"):
        Ranking(temperature=0.0)


def test_scoring_is_paid_for_first() -> None:
    bill = Bill(flops=1e9, scoring=Cost(flops=4e8, tokens=50), model=sized_model(1e3), epochs=2)
    assert bill.tokens == pytest.approx((1e9 - 4e8) / (2 * 6 * 1e3))
    lines = bill.lines(40_000)
    assert [line.split()[0] for line in lines] == ["budget", "scoring", "training", "left"]
    assert "4e+08 FLOPs  40.00 %  50 tokens read by models" in lines[1]
    assert "4.8e+08 FLOPs  48.00 %  1K on 40,000 tokens, 2 epochs" in lines[2]
    assert "1.2e+08 FLOPs  12.00 %" in lines[3]
    with pytest.raises(ConfigError, match=r"--flops 4e\+08 leaves nothing .* scoring has cost 4e"):
        Bill(flops=4e8, scoring=Cost(flops=4e8), model=sized_model("1M"))


def test_names_are_those_of_the_released_data_sets() -> None:
    def name(method: str, share: float = 1.0, parameters: Any = None, **ranking: Any) -> str:
        return output_name(
            Naming(
                task="mmlu",
                method=method,
                parameters=parameters or {},
                ranking=Ranking(**ranking),
                share=share,
                epoch=2,
            )
        )

    assert name("bm25") == "mmlu-train-p1.0-bm25"
    assert name("embed", 0.05) == "mmlu-train-p0.05-embedding"
    assert name("ppl", order="mid", seed=3) == "mmlu-train-p1.0-ppl-epoch2-mid-ppl-3"
    assert name("ppl", seed=3) == "mmlu-train-p1.0-ppl-epoch2-top-ppl-3"
    assert name("less", 0.1, {"seed": 3}) == "mmlu-train-p0.1-less-seed3"
    assert name("random", 1 / 3, {"seed": 6}) == "mmlu-train-p0.333333-random-seed6"
    assert name("bm25", order="low", seed=2) == "mmlu-train-p1.0-bm25-low-seed2"
    assert domain_name("a/b c", "embed") == "a-b-c-embedding"
    assert domain_name("", "random") == "any-random"
