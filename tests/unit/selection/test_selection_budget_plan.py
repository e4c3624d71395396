"""Plans: the best selector for a budget, and where selectors break even."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.gain_runs import COSTS, RATES, SCORER, TOKENS, gain_runs, write_csv

from megatron.errors import ConfigError, DataError
from megatron.selection.break_even import break_even_budget, break_even_sizes
from megatron.selection.budget_fit import FitRequest, fit_runs, read_ceilings
from megatron.selection.budget_plan import plan_choices
from megatron.selection.budget_runs import Run, read_runs
from megatron.selection.cost_model import Reading, sized_model
from megatron.selection.gain_fit import FitOptions
from megatron.selection.gain_law import gain
from megatron.selection.gains import read_gains, write_gains
from megatron.selection.laws_at import law_at
from megatron.selection.prices import Prices

pytest.importorskip("scipy")

EXACT = 1e-7


def fitted(runs, **request):
    options = request.pop("options", FitOptions(best=1.0))
    return fit_runs(runs, FitRequest(options=options, **request))


@pytest.fixture(scope="module")
def gains():
    return fitted(gain_runs(noise=EXACT))


@pytest.fixture(scope="module")
def prices():
    scorer = sized_model(SCORER)
    return Prices(reading=Reading(corpus=TOKENS), selectors={"ppl": scorer, "less": scorer})


def test_every_task_size_and_method_has_its_law(gains):
    assert [one.name for one in gains.gains][:2] == ["exam, 7B, random", "exam, 7B, bm25"]
    for one in gains.gains:
        assert one.law == pytest.approx([0.4, RATES[one.method], 0.6], rel=1e-3)
        assert one.total == 6 * one.size * TOKENS
        assert one.choosing == COSTS[one.method]


def test_the_compute_optimal_selector_is_the_one_that_the_law_names(gains, prices):
    budget, model = 4e19, sized_model("13B")
    found = plan_choices(gains, "exam", [model], [budget], prices)
    total = 6 * 13e9 * TOKENS
    truth = {
        name: float(gain(budget - COSTS[name], [0.4, rate, 0.6], total))
        for name, rate in RATES.items()
        if COSTS[name] < budget
    }
    assert found[0].method == max(truth, key=truth.get)
    assert found[0].best
    assert [one.best for one in found].count(True) == 1
    for one in found:
        if one.method in truth:
            assert one.performance == pytest.approx(truth[one.method], abs=1e-5)
            assert one.low <= one.performance <= one.high
            assert one.choosing_share == pytest.approx(COSTS[one.method] / budget)
            assert one.choosing + one.training == pytest.approx(budget)
    dear = next(one for one in found if one.method == "less")
    assert not dear.affordable
    assert np.isnan(dear.performance)
    assert dear.best_in == 0
    assert "too dear" in dear.notes
    assert sum(one.best_in for one in found) == pytest.approx(1)


def test_what_lies_outside_the_runs_is_said(gains, prices):
    by = {
        model.name: plan_choices(gains, "exam", [model], [budget], prices)[0]
        for model, budget in ((sized_model("70B"), 1e19), (sized_model("10B"), 1e19))
    }
    assert "size extrapolated" in by["70B"].notes
    assert "size interpolated" in by["10B"].notes
    whole = plan_choices(gains, "exam", [sized_model("7B")], [1e21], prices)
    assert all("nothing is left to choose" in one.notes[-1] for one in whole)
    assert all(one.corpus_share == 1 for one in whole)
    little = plan_choices(gains, "exam", [sized_model("7B")], [1e17], prices)
    assert "less compute" in little[0].notes[0]


def test_break_even_sizes_are_those_of_the_closed_form(gains, prices):
    found = break_even_sizes(gains, "exam", prices, shares=(0.25, 0.5), against="random")
    got = {(one.method, one.share): one for one in found if one.method != "bm25"}
    assert len(got) == 4
    for share in (0.25, 0.5):
        ppl = 1 / (3 * share * (1 - RATES["random"] / RATES["ppl"]))
        less = 1.2 / (share * (1 - RATES["random"] / RATES["less"]))
        assert got["ppl", share].ratio == pytest.approx(ppl, rel=2e-3)
        assert got["less", share].ratio == pytest.approx(less, rel=2e-3)
        assert got["ppl", share].low <= got["ppl", share].size <= got["ppl", share].high


def test_the_papers_break_even_ratios_follow_from_its_gains():
    """Five and ten times the scoring model, of laws whose rates are such."""
    rates = {"random": 2.0, "ppl": 2.0 / (1 - 1 / 3.75), "less": 2.0 / (1 - 1 / 2.5)}
    exact = fitted(gain_runs(rates=rates, noise=1e-8))
    scorer = sized_model("7B")
    reading = Reading(corpus=TOKENS, warm_up=0.0)
    priced = Prices(reading=reading, selectors={"ppl": scorer, "less": scorer})
    found = break_even_sizes(exact, "exam", priced, shares=(0.25,))
    assert {one.method: one.ratio for one in found} == {
        "ppl": pytest.approx(5.0, rel=1e-3),
        "less": pytest.approx(10.0, rel=1e-3),
    }


def test_a_selector_that_gains_nothing_never_breaks_even(prices):
    same = fitted(gain_runs(rates={"random": 2.0, "ppl": 1.8}, noise=EXACT))
    one = break_even_sizes(same, "exam", prices, shares=(0.5,))[0]
    assert one.size == np.inf
    assert break_even_budget(same, "exam", sized_model("7B"), "ppl", prices) == np.inf


def test_break_even_budgets_are_those_of_the_closed_form(gains, prices):
    found = break_even_budget(gains, "exam", sized_model("70B"), "ppl", prices, against="random")
    closed = COSTS["ppl"] / (1 - RATES["random"] / RATES["ppl"])
    assert found == pytest.approx(closed, rel=3e-3)


def test_intervals_of_break_even_sizes_hold_the_truth(prices):
    held, times = 0, 30
    truth = 7e9 / (3 * 0.5 * (1 - 2.0 / 3.0))
    for seed in range(times):
        noisy = fitted(
            gain_runs(rates={"random": 2.0, "ppl": 3.0}, sizes=(7e9,), noise=4e-3, seed=seed),
            ceilings={None: 0.6},
        )
        one = break_even_sizes(noisy, "exam", prices, shares=(0.5,))[0]
        held += one.low <= truth <= one.high
    assert held >= 25


def test_the_file_of_a_fit_keeps_everything(gains, tmp_path):
    again = read_gains(write_gains(gains, tmp_path))
    assert again.better == "higher"
    for mine, theirs in zip(again.gains, gains.gains, strict=True):
        assert mine.name == theirs.name
        assert mine.law == pytest.approx(theirs.law, rel=1e-9)
        assert mine.draws == pytest.approx(theirs.draws, rel=1e-8)
    (tmp_path / "gains.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="cannot be read as fitted gains"):
        read_gains(tmp_path)
    (tmp_path / "gains.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="format 9"):
        read_gains(tmp_path)


def test_laws_between_sizes_lie_between_them(gains):
    mine = [one for one in gains.gains if one.method == "ppl"]
    other = type(mine[0])(**{**vars(mine[1]), "law": np.array([0.5, 3.0, 0.7])})
    middle = law_at([mine[0], other], np.sqrt(7e9 * 13e9))
    assert middle.law == pytest.approx([0.45, 3.0, 0.65], rel=1e-3)
    assert middle.how == "interpolated"
    assert law_at([mine[0], other], 1e12).law == pytest.approx([0.5, 3.0, 0.7])


def test_compute_may_be_counted_with_the_choosing(prices):
    runs = gain_runs(noise=EXACT, sizes=(7e9,))
    with_it = [
        Run(
            **{
                **vars(run),
                "performance": float(gain(run.flops, [0.4, RATES[run.method], 0.6], run.total)),
            }
        )
        for run in runs
    ]
    noise = np.random.default_rng(0).normal(0, EXACT, len(with_it))
    with_it = [
        Run(**{**vars(run), "performance": run.performance + more})
        for run, more in zip(with_it, noise, strict=True)
    ]
    total = fitted(with_it, compute="total")
    assert {one.method: one.law[1] for one in total.gains} == pytest.approx(RATES, rel=1e-2)
    found = plan_choices(total, "exam", [sized_model("7B")], [2e19], prices)
    ppl = next(one for one in found if one.method == "ppl")
    assert ppl.performance == pytest.approx(float(gain(2e19, [0.4, 3.0, 0.6], 4.2e19)), abs=1e-4)


def test_prices_that_are_not_known_are_asked_for(gains):
    assert Prices().choosing("ppl", gains.gains) == COSTS["ppl"]
    larger = Prices(reading=Reading(corpus=10 * TOKENS))
    assert larger.choosing("ppl", gains.gains) == pytest.approx(10 * COSTS["ppl"])
    assert "in proportion" in larger.said("ppl", gains.gains)
    with pytest.raises(ConfigError, match="--corpus-tokens"):
        Prices(selectors={"ppl": sized_model("7B")})
    with pytest.raises(ConfigError, match="did you mean 'ppl'"):
        Prices(reading=Reading(corpus=1), selectors={"pl": sized_model("7B")})
    free = [type(one)(**{**vars(one), "choosing": 0.0}) for one in gains.gains]
    with pytest.raises(ConfigError, match="no selection_flops"):
        Prices().choosing("less", free)


def test_what_cannot_be_planned_is_refused(gains, prices):
    with pytest.raises(DataError, match="did you mean 'exam'"):
        plan_choices(gains, "exams", [sized_model("7B")], [1e19], prices)
    with pytest.raises(ConfigError, match="above 0"):
        plan_choices(gains, "exam", [sized_model("7B")], [0.0], prices)
    with pytest.raises(ConfigError, match="--against lesss"):
        break_even_sizes(gains, "exam", prices, against="lesss")


def test_a_part_that_cannot_be_fitted_is_named_and_the_rest_is_fitted():
    runs = gain_runs(noise=EXACT, sizes=(7e9,))
    flat = [
        Run(**{**vars(run), "performance": 0.5}) if run.method == "ppl" else run for run in runs
    ]
    found = fitted(flat)
    assert {one.method for one in found.gains} == {"random", "bm25", "less"}
    assert "is 0.5 in all runs" in found.left_out["exam, 7B, ppl"]
    with pytest.raises(DataError, match="no law can be fitted"):
        fitted([run for run in flat if run.method == "ppl"])


def test_the_untrained_model_is_a_point_of_every_curve():
    runs = gain_runs(noise=EXACT, sizes=(7e9,), rates={"random": 2.0, "ppl": 3.0})
    base = Run(method="none", task="exam", size=7e9, performance=0.4, training=0.0)
    found = fitted([*runs, base])
    assert {one.method for one in found.gains} == {"random", "ppl"}
    assert all(one.flops.min() == 0 for one in found.gains)


def test_tables_are_read_in_every_form(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    runs = gain_runs(sizes=(7e9,), rates={"random": 2.0, "ppl": 3.0})
    table = write_csv(runs, tmp_path / "runs.csv")
    rows = [
        {
            "method": run.method,
            "size": "7B",
            "task": run.task,
            "performance": run.performance,
            "training_flops": run.training,
            "selection_flops": run.choosing,
            "total_flops": run.total,
        }
        for run in runs
    ]
    lines = tmp_path / "runs.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = tmp_path / "runs.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), packed)
    for path in (table, lines, packed):
        for mine, run in zip(read_runs([path]), runs, strict=True):
            assert (mine.method, mine.size, mine.total) == (run.method, run.size, run.total)
            assert mine.training == pytest.approx(run.training)
            assert mine.performance == pytest.approx(run.performance)


@pytest.mark.parametrize(
    ("head", "row", "match"),
    [
        ("method,size,performance", "a,7B,1", "'flops'"),
        ("method,size,performance,flop", "a,7B,1,2", "no column 'flop'; did you mean 'flops'"),
        ("method,performance,flops", "a,1,2", "column 'size' is missing"),
        ("method,size,performance,flops", "a,7X,1,2", "row 1: 'size' is '7X'"),
        ("method,size,performance,flops", "a,7B,high,2", "'performance' is 'high'"),
        ("method,size,performance,flops", "a,7B,,2", "'performance' is empty"),
        ("method,size,performance,flops", "a,7B,nan,2", "must be finite"),
        ("method,size,performance,flops", "a,7B,1,-2", "must be at least 0"),
        ("method,size,performance,flops,selection_flops", "a,7B,1,2,3", "less than its"),
        ("method,size,performance,flops,training_flops", "a,7B,1,2,5", "leave one column out"),
        ("method,size,performance,flops", "", "there are no rows"),
    ],
)
def test_tables_that_cannot_be_read_name_the_place(tmp_path, head, row, match):
    path = tmp_path / "runs.csv"
    path.write_text(f"{head}\n{row}\n" if row else f"{head}\n")
    with pytest.raises((DataError, ConfigError), match=match):
        read_runs([path])


def test_tokens_are_priced_by_the_formula(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("method,size,performance,tokens\nppl,7B,0.5,1e9\n")
    assert read_runs([path])[0].training == 6 * 7e9 * 1e9
    with pytest.raises(DataError, match="ending in"):
        read_runs([tmp_path / "runs.txt"])
    with pytest.raises(DataError, match="cannot be read"):
        read_runs([tmp_path / "none.csv"])


def test_totals_and_ceilings_are_found_or_asked_for():
    runs = gain_runs(noise=EXACT, sizes=(7e9,), rates={"random": 2.0})
    bare = [Run(**{**vars(run), "total": None}) for run in runs]
    assert fitted(bare, corpus_tokens=2e9).gains[0].total == 6 * 7e9 * 2e9
    assert fitted(bare).gains[0].total == 6 * 7e9 * TOKENS
    two = [Run(**{**vars(run), "total": 1e19 * (i + 1)}) for i, run in enumerate(runs[:2])]
    with pytest.raises(DataError, match="two totals"):
        fitted(two)
    given = fitted(runs, ceilings=read_ceilings(["7B=0.65", "0.7"])).gains[0]
    assert given.law[2] == 0.65
    assert given.fixed
    assert given.low[2] == given.high[2] == 0.65
    own = [Run(**{**vars(run), "ceiling": 0.62}) for run in runs]
    assert fitted(own).gains[0].law[2] == 0.62
    with pytest.raises(DataError, match="write a number"):
        read_ceilings(["much"])
