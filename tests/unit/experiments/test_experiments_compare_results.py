"""Chains of runs, and what a comparison makes of their ends."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support import compared
from support.compared import Pretender, played

from megatron.errors import RunError
from megatron.experiments.commands.compare import write_results
from megatron.experiments.compare.results import compare_facts, load_compare, write_compare
from megatron.experiments.compare.text import compare_text
from megatron.experiments.report import write_report
from megatron.experiments.table import tag
from megatron.model.accounting import training_flops

stats = pytest.importorskip("scipy.stats")

SEEDS = [1, 2, 3, 4]
METHODS = {
    **compared.UNIFORM,
    "odm": {"mixing": {"method": "odm"}},
    "doremi": {"stages": "doremi", "mixing": {"method": "doremi"}},
    "best": {"stages": "sweep", "points": 4, "design": "spread", "share": 0.4},
    "after": {"prior": "doremi", "mixing": {"method": "odm"}},
    "skillit": {"stages": "skillit", "mixing": {"method": "skillit", "update_every": 10}},
}
GAIN = {"uniform": 0.0, "odm": 0.01, "doremi": -0.2, "best": -0.1, "after": -0.15, "skillit": 0.05}
ORACLE_GAIN = -0.25


def losses(run):
    """Return losses that depend on method, seed and mixture alone."""
    who, seed = run.tags["contestant"], run.seed
    wobble = 0.02 * math.sin(7 * seed + len(who))
    if run.tags["role"] == "final":
        gain = ORACLE_GAIN if who == "oracle" else GAIN[who]
    else:  # walk's share is what helps
        gain = -run.weights["walk"]
    base = {"walk": 2.0, "drift": 3.0, "noise": 4.5}
    return {name: loss + 0.1 * seed + gain + wobble for name, loss in base.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


CONTENT = {
    "seeds": SEEDS,
    "tasks": {"t": {"configs": "base.yml", "entropies": {"walk": 1.0, "drift": 2.5, "noise": 4.0}}},
    "methods": METHODS,
    "oracle": {"points": 2, "seeds": [8, 9]},
}


@pytest.fixture(scope="module")
def settled(folder):
    return compared.league(folder, CONTENT)


@pytest.fixture(scope="module")
def whole(folder, settled):
    pretender = Pretender(losses)
    outcome, rows = played(settled, folder, pretender)
    return outcome, compare_facts(settled, outcome, rows), pretender, rows


def test_stages_of_all_chains_go_together(whole):
    outcome, _, pretender, _ = whole
    assert outcome.exit_code == 0
    first, second, third = pretender.stages
    assert {"t-uniform-seed-1", "t-odm-seed-4", "t-doremi-seed-2-reference"} < set(first)
    assert {"t-best-seed-1-point-0", "t-skillit-seed-3-one-hot-2"} < set(first)
    assert {"t-oracle-seed-8-point-005", "t-oracle-seed-9-point-000"} < set(first)
    assert {"t-doremi-seed-1-proxy", "t-best-seed-2", "t-skillit-seed-4"} < set(second)
    assert {"t-oracle-seed-1", "t-oracle-seed-4"} < set(second)
    assert set(third) == {f"t-{m}-seed-{s}" for m in ("doremi", "after") for s in SEEDS}


def test_runs_that_count_take_what_was_found(settled, whole):
    outcome, _, _, _ = whole
    finals = outcome.finals
    found = {"walk": 0.5, "drift": 0.3, "noise": 0.2}
    doremi = finals["t", "doremi", 1]
    assert (doremi.method, doremi.weights) == ("static", pytest.approx(found))
    after = finals["t", "after", 1]
    given = {name: domain.weight for name, domain in after.config.domains.items()}
    assert (after.method, given) == ("odm", pytest.approx(found))
    chain = outcome.chains["t", "doremi", 1]
    reference, proxy = chain[0][1], chain[1][1]
    assert proxy.config.mixing.options["reference"] == str(reference.folder)
    assert outcome.chains["t", "after", 1][:2] == [
        (role, next(run for run in outcome.runs if run.name == one.name.replace("doremi", "after")))
        for role, one in chain[:2]
    ]
    assert (
        {run.key for _, run in chain[:2]}
        == {  # done once, charged to both
            run.key for _, run in outcome.chains["t", "after", 1][:2]
        }
    )
    points = [run for role, run in outcome.chains["t", "best", 3] if role == "point"]
    most = max(points, key=lambda run: run.weights["walk"])
    assert finals["t", "best", 3].weights == pytest.approx(dict(most.weights))
    graph = finals["t", "skillit", 2].config.mixing.options["graph"]
    start, end = math.log(120), 3.0 + 0.2 + 0.02 * math.sin(14 + 7)
    assert graph["noise"]["drift"] == pytest.approx((start - end) / start)
    assert graph["walk"]["drift"] == pytest.approx((start - end + 1) / start)
    assert finals["t", "oracle", 1].weights == pytest.approx({"walk": 1, "drift": 0, "noise": 0})
    steps = settled.entry("t", "doremi").plan
    assert (proxy.steps, doremi.steps) == (steps.leg("proxy").steps, steps.final.steps)
    assert finals["t", "oracle", 1].steps == compared.STEPS


def values(facts, method, objective="average"):
    by_seed = facts["tasks"]["t"]["methods"][method]["by_seed"]
    return np.array([by_seed[str(seed)]["objectives"][objective] for seed in SEEDS])


def test_differences_are_those_of_scipy(whole):
    _, facts, _, _ = whole
    methods = facts["tasks"]["t"]["methods"]
    raw = {}
    for name in METHODS.keys() - {"uniform"}:
        ours = methods[name]["difference"]["average"]
        test = stats.ttest_rel(values(facts, name), values(facts, "uniform"))
        assert (ours["t"], ours["p"]) == pytest.approx((test.statistic, test.pvalue))
        assert ours["interval"] == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert ours["mean"] == pytest.approx(
            np.mean(values(facts, name) - values(facts, "uniform"))
        )
        assert ours["wins"] == int((values(facts, name) < values(facts, "uniform")).sum())
        assert ours["bootstrap"][0] <= ours["mean"] <= ours["bootstrap"][1]
        raw[name] = ours["p"]
    smallest = min(raw, key=raw.get)
    assert methods[smallest]["difference"]["average"]["p_holm"] == pytest.approx(
        min(1.0, 5 * raw[smallest])  # five methods, of which the oracle is none
    )
    assert methods["oracle"]["difference"]["average"]["p_holm"] is None
    assert methods["uniform"]["difference"]["average"] is None


def test_objectives_are_of_loss_perplexity_and_excess(whole):
    _, facts, _, _ = whole
    end = facts["tasks"]["t"]["methods"]["odm"]["by_seed"]["1"]
    loss = np.array(list(end["loss"].values()))
    wanted = {
        "average": loss.mean(),
        "worst": loss.max(),
        "average_perplexity": np.exp(loss).mean(),
        "worst_perplexity": np.exp(loss).max(),
        "average_excess": (loss - [1.0, 2.5, 4.0]).mean(),
        "worst_excess": (loss - [1.0, 2.5, 4.0]).max(),
    }
    assert end["objectives"] == pytest.approx(wanted)
    assert end["worst_domain"] == "noise"
    assert end["perplexity"]["walk"] == pytest.approx(math.exp(end["loss"]["walk"]))


def test_regret_is_to_the_oracle_trained_anew(whole):
    _, facts, _, _ = whole
    task = facts["tasks"]["t"]
    assert task["oracle"]["best"] == {"walk": 1.0, "drift": 0.0, "noise": 0.0}
    assert len(task["oracle"]["sweep"]) == 6
    regret = task["methods"]["doremi"]["regret"]["average"]
    ours, best, base = (values(facts, name) for name in ("doremi", "oracle", "uniform"))
    assert regret["mean"] == pytest.approx((ours - best).mean())
    assert regret["recovered"] == pytest.approx((ours - base).mean() / (best - base).mean())
    assert task["methods"]["uniform"]["regret"]["average"]["recovered"] == pytest.approx(0.0)


def test_bills_are_those_of_the_ledgers(settled, whole):
    _, facts, _, rows = whole
    task = facts["tasks"]["t"]
    spec = settled.configs["t"].model
    bill = task["methods"]["doremi"]["spent"]
    assert bill["references"] == pytest.approx(training_flops(spec, 12 * compared.BATCH_TOKENS))
    # What is made up here tells of no passes of the reference: planned is more.
    assert bill["proxies"] == pytest.approx(bill["references"])
    assert task["methods"]["doremi"]["planned"]["proxies"] == pytest.approx(
        4 / 3 * bill["references"]
    )
    assert bill["total"] == pytest.approx(task["budget"] * (12 + 12 + 32) / compared.STEPS)
    assert not task["methods"]["doremi"]["over_budget"]
    assert {tag(row, "role") for row in rows} == {
        "final", "reference", "proxy", "point", "one-hot",
    }  # fmt: skip


def test_what_costs_more_than_planned_is_told(folder, settled, whole):
    outcome, _, _, rows = whole
    more = [
        row | {"extra_by_kind": json.dumps({"validation": 10**6})}
        if tag(row, "contestant") == "odm"
        else row
        for row in rows
    ]
    facts = compare_facts(settled, outcome, more)
    methods = facts["tasks"]["t"]["methods"]
    assert [name for name in METHODS if methods[name]["over_budget"]] == ["odm"]
    assert "**odm spent more than its budget**" in compare_text(facts)


def test_the_summary_says_what_it_shows(whole):
    _, facts, _, _ = whole
    text = compare_text(facts)
    assert "causal attention" in text
    assert "## t (room)" in text
    assert f"| best | {facts['tasks']['t']['methods']['best']['train_iters']} |" in text
    difference = facts["tasks"]["t"]["methods"]["doremi"]["difference"]["average"]
    assert f"| doremi | **{difference['mean']:+.4f}** |" in text
    assert "4 of 4" in text
    assert "The oracle's mixture, best of 6: walk 1, drift 0, noise 0." in text


def test_the_file_is_read_back_as_it_was(whole, tmp_path):
    _, facts, _, _ = whole
    path = write_compare(facts, tmp_path)
    assert load_compare(tmp_path) == load_compare(path)
    back = load_compare(path)
    assert back["tasks"]["t"]["methods"].keys() == facts["tasks"]["t"]["methods"].keys()
    assert back["tasks"]["t"]["methods"]["odm"]["by_seed"]["2"]["loss"] == pytest.approx(
        facts["tasks"]["t"]["methods"]["odm"]["by_seed"]["2"]["loss"]
    )
    path.write_text(json.dumps({**back, "format": 99}), encoding="utf-8")
    with pytest.raises(RunError, match="format 99"):
        load_compare(path)
    with pytest.raises(RunError, match="cannot be read as a comparison"):
        load_compare(tmp_path / "nowhere")


SMALL = {
    "seeds": SEEDS,
    "methods": {name: METHODS[name] for name in ("uniform", "odm", "doremi")},
}


def test_a_failed_run_takes_its_seed_from_every_method_and_is_told(tmp_path):
    settled = compared.league(tmp_path, SMALL)
    pretender = Pretender(losses, fails=("t-doremi-seed-2-proxy", "t-odm-seed-3"))
    outcome, rows = played(settled, tmp_path, pretender)
    assert outcome.exit_code == 1
    assert "t-doremi-seed-2" not in pretender.stages[2]
    facts = compare_facts(settled, outcome, rows)
    task = facts["tasks"]["t"]
    assert task["seeds"] == [1, 4]
    assert list(task["left_out"]) == ["2", "3"]
    assert "t-doremi-seed-2-proxy" in task["left_out"]["2"][0]
    assert "exit code 3" in task["left_out"]["3"][0]
    assert all(
        method["difference"]["average"]["count"] == 2
        for name, method in task["methods"].items()
        if name != "uniform"
    )
    assert facts["failed"] == [
        "t-odm-seed-3: exit code 3",
        "t-doremi-seed-2-proxy: exit code 3",
    ]
    text = compare_text(facts)
    assert "**Seed 2 is left out of every method**" in text
    assert "- t-odm-seed-3: exit code 3" in text


def test_a_loss_that_is_not_finite_takes_its_seed_along(tmp_path):
    settled = compared.league(tmp_path, SMALL)

    def diverged(run):
        found = losses(run)
        return found | {"walk": math.nan} if run.name == "t-odm-seed-1" else found

    outcome, rows = played(settled, tmp_path, Pretender(diverged))
    facts = compare_facts(settled, outcome, rows)
    assert facts["tasks"]["t"]["seeds"] == [2, 3, 4]
    assert facts["tasks"]["t"]["left_out"] == {"1": ["odm: its loss is not finite"]}
    write_compare(facts, tmp_path)
    back = load_compare(tmp_path)
    assert back["tasks"]["t"]["methods"]["odm"]["by_seed"]["1"]["loss"]["walk"] is None


def test_one_seed_has_a_difference_and_no_test(tmp_path):
    settled = compared.league(tmp_path, {**SMALL, "seeds": [4]})
    outcome, rows = played(settled, tmp_path, Pretender(losses))
    facts = compare_facts(settled, outcome, rows)
    found = facts["tasks"]["t"]["methods"]["doremi"]["difference"]["average"]
    assert (found["count"], found["wins"], found["p"], found["interval"]) == (1, 1, None, None)
    assert found["mean"] == pytest.approx(-0.2 + 0.02 * (math.sin(34) - math.sin(35)))
    assert "there is no test" in compare_text(facts)
    out = tmp_path / "out"
    assert write_results(settled, outcome, out) == 0
    assert write_report(out).stat().st_size > 0
    assert (out / "summary.md").read_text() == compare_text(facts)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["budgets"]["t"] == pytest.approx(settled.budgets["t"])
    assert {run["run"] for run in plan["runs"]} == {run.name for run in outcome.runs}
    (doremi,) = [one for one in plan["methods"] if one["method"] == "doremi"]
    assert [(leg["role"], leg["steps"]) for leg in doremi["legs"]] == [
        ("reference", 12),
        ("proxy", 12),
        ("final", 32),
    ]


def test_an_oracle_whose_points_fail_is_none(tmp_path):
    content = {**SMALL, "seeds": [1, 2], "oracle": {"points": 1, "seeds": [9]}}
    settled = compared.league(tmp_path, content)
    names = tuple(f"t-oracle-seed-9-point-00{number}" for number in range(3))
    outcome, rows = played(settled, tmp_path, Pretender(losses, fails=names[:2]))
    best = outcome.finals["t", "oracle", 1]
    assert best.weights["walk"] == 1.0  # the one that is left
    assert outcome.exit_code == 1
    other = tmp_path / "none"
    outcome, rows = played(settled, other, Pretender(losses, fails=names))
    facts = compare_facts(settled, outcome, rows)
    assert facts["tasks"]["t"]["methods"].keys() == {"uniform", "odm", "doremi"}
    assert facts["tasks"]["t"]["methods"]["odm"]["regret"] is None
    assert facts["tasks"]["t"]["seeds"] == [1, 2]
    assert compare_text(facts)


def test_a_proxy_of_an_online_method_speaks_by_what_drew_it(tmp_path):
    methods = {**compared.UNIFORM, "o": {"stages": "proxy", "mixing": {"method": "odm"}}}
    settled = compared.league(tmp_path, {"seeds": [1], "methods": methods})
    outcome, _ = played(settled, tmp_path, Pretender(losses_of_any))
    (_, proxy), (_, final) = outcome.chains["t", "o", 1]
    assert (proxy.method, final.method) == ("odm", "static")
    assert final.weights == pytest.approx(dict(proxy.weights))


def losses_of_any(run):
    """Return losses that hang on nothing."""
    return {"walk": 2.0, "drift": 3.0, "noise": 4.0}


def test_where_no_seed_is_left_nothing_is_compared(tmp_path):
    settled = compared.league(tmp_path, {**SMALL, "seeds": [1, 2]})
    pretender = Pretender(losses, fails=("t-uniform-seed-1", "t-uniform-seed-2"))
    outcome, rows = played(settled, tmp_path, pretender)
    facts = compare_facts(settled, outcome, rows)
    assert facts["tasks"]["t"]["seeds"] == []
    assert facts["tasks"]["t"]["methods"]["odm"]["mean"] is None
    assert "| odm | – |" in compare_text(facts)
    assert write_results(settled, outcome, tmp_path / "out") == 1
    assert write_report(tmp_path / "out").stat().st_size > 0


def test_tasks_have_their_own_domains_seeds_and_budgets(tmp_path):
    content = {
        "methods": {name: METHODS[name] for name in ("uniform", "odm")},
        "tasks": {
            "t": {"configs": "base.yml", "seeds": [1, 2]},
            "u": {
                "configs": "base.yml",
                "kind": "control",
                "seeds": [3, 4, 5],
                "set": {"train_iters": 30, "mixing.validation_samples": 4},
            },
        },
    }
    settled = compared.league(tmp_path, content)
    assert settled.budgets["t"] == pytest.approx(2 * settled.budgets["u"])
    outcome, rows = played(settled, tmp_path, Pretender(losses))
    facts = compare_facts(settled, outcome, rows)
    assert [task["seeds"] for task in facts["tasks"].values()] == [[1, 2], [3, 4, 5]]
    assert facts["tasks"]["u"]["methods"]["odm"]["train_iters"] == 30
    text = compare_text(facts)
    assert "| method | t (room) | u (control) | mean of room | worst control |" in text
    shown = [facts["tasks"][name]["methods"]["odm"]["difference"]["average"] for name in "tu"]
    cells = [f"{one['mean']:+.4f}" for one in shown]
    line = next(line for line in text.splitlines() if line.startswith("| odm |"))
    assert [cell.strip("* ") for cell in line.split("|")[2:6]] == [*cells, *cells]


def test_two_baselines_are_not_needed_where_a_method_is_its_twin(tmp_path):
    twin = {**compared.UNIFORM, "twin": compared.UNIFORM["uniform"]}
    settled = compared.league(tmp_path, {"seeds": [1, 2], "methods": twin})
    outcome, rows = played(settled, tmp_path, Pretender(losses_of_any))
    assert outcome.finals["t", "twin", 1].key == outcome.finals["t", "uniform", 1].key
    facts = compare_facts(settled, outcome, rows)
    found = facts["tasks"]["t"]["methods"]["twin"]["difference"]["average"]
    assert (found["mean"], found["p"], found["seeds_needed"]) == (0.0, 1.0, None)
