"""``tools/mix.py budget``: the joint search, and the runs that it proposes."""

from __future__ import annotations

import argparse
import json
import shlex

import numpy as np
import pytest
import yaml
from support import runs, studies
from support.gain_runs import gain_runs

import deepy
from deepy import spread_set
from megatron.errors import ConfigError, NeomixError
from megatron.experiments.bounds import free_bounds
from megatron.experiments.budget_mixing import MixingOption, base_option
from megatron.experiments.budget_search import Aim, search, worth
from megatron.experiments.commands import COMMANDS, budget
from megatron.experiments.designs import well_spread
from megatron.selection.budget_fit import FitRequest, fit_runs
from megatron.selection.commands import load_command
from megatron.selection.cost_model import Reading, sized_model
from megatron.selection.gain_fit import FitOptions
from megatron.selection.gain_law import gain
from megatron.selection.gains import write_gains
from megatron.selection.prices import Prices

pytest.importorskip("scipy")

TOKENS = 1e9
RATES = {"random": 2.0, "ppl": 3.0}


def losses(rates=RATES, sizes=(7e9, 13e9), tokens=TOKENS, noise=1e-6):
    made = gain_runs(
        rates=rates, sizes=sizes, start=3.5, ceiling=2.8, noise=noise, task="own", tokens=tokens
    )
    scale = tokens / TOKENS
    return [type(run)(**{**vars(run), "choosing": run.choosing * scale}) for run in made]


def fitted(made, **options):
    request = FitOptions(better="lower", **options)
    return fit_runs(made, FitRequest(options=request, unit="nats per token"))


def option(name, effect, spread=0.0, **facts):
    draws = effect + spread * np.random.default_rng(5).normal(size=400)
    return MixingOption(name=name, effect=effect, draws=draws, **facts)


@pytest.fixture(scope="module")
def gains():
    return fitted(losses())


PRICES = Prices(reading=Reading(corpus=TOKENS), selectors={"ppl": sized_model("7B")})


def by_hand(size, method, budget, effect=0.0):
    total = 6 * size * TOKENS
    left = budget - (2 * 7e9 * TOKENS if method == "ppl" else 0.0)
    return float(gain(min(left, total), [3.5, RATES[method], 2.8], total)) + effect


def test_the_ranking_is_that_of_the_laws(gains):
    ways = [base_option(400), option("better", -0.05, 0.002), option("worse", 0.03, 0.002)]
    models = [sized_model("7B"), sized_model("13B")]
    found = search(gains, models, ways, PRICES, Aim(budget=4e19, task="own"))
    truth = {
        (model.name, method, way.name): by_hand(model.parameters, method, 4e19, way.effect)
        for model in models
        for method in RATES
        for way in ways
    }
    assert len(found) == len(truth)
    for one in found:
        key = (one.model.name, one.selector, one.mixing.name)
        assert one.performance == pytest.approx(truth[key], abs=1e-3)
        assert one.low <= one.performance <= one.high
        assert one.spent <= 4e19 * (1 + 1e-9)
    order = [one.performance for one in found]
    assert order == sorted(order)
    best = found[0]
    assert (best.model.name, best.selector, best.mixing.name) == min(truth, key=truth.get)
    assert sum(one.best_in for one in found) == pytest.approx(1)


def test_uncertainty_of_laws_and_of_mixing_reaches_the_ranking():
    sure = [base_option(400), option("method", -0.01, 1e-6)]
    unsure = [base_option(400), option("method", -0.01, 0.05)]
    gains = fitted(losses(noise=2e-3, sizes=(7e9,)))
    aim = Aim(budget=1e19, task="own")

    def widths(ways):
        rows = search(gains, [sized_model("7B")], ways, PRICES, aim)
        return {one.mixing.name: (one.high - one.low, one.best_in) for one in rows}

    narrow, wide = widths(sure), widths(unsure)
    assert wide["method"][0] > 5 * narrow["method"][0] > 0
    assert wide["as configured"][0] == pytest.approx(narrow["as configured"][0])
    assert narrow["method"][1] > 0.99
    assert 0.5 < wide["method"][1] < 0.7  # a difference of a fifth of its deviation


def test_what_mixing_spends_is_paid_from_the_budget(gains):
    ways = [
        option("inside", -0.05, overhead=0.25),
        option("on top", -0.05, overhead=0.25, charged=False),
    ]
    rows = search(gains, [sized_model("7B")], ways, PRICES, Aim(budget=1e19, task="own"))
    found = {one.mixing.name: one for one in rows if one.selector == "random"}
    for one in found.values():
        assert one.training == pytest.approx(0.75e19)
        assert one.beside == pytest.approx(0.25e19)
    assert found["inside"].performance == pytest.approx(
        by_hand(7e9, "random", 1e19, -0.05), abs=1e-3
    )
    on_top = by_hand(7e9, "random", 0.75e19, -0.05)
    assert found["on top"].performance == pytest.approx(on_top, abs=1e-3)


def test_shares_and_repeats(gains):
    model, way = [sized_model("7B")], [base_option(400)]
    total = 6 * 7e9 * TOKENS
    free = search(gains, model, way, PRICES, Aim(budget=0.2 * total, task="own"))[0]
    assert (free.share, free.epochs) == (pytest.approx(0.2), pytest.approx(1.0))
    assert not free.notes
    small = Aim(budget=2 * total, task="own", shares=(0.1,), max_epochs=3.0)
    pays = search(gains, model, way, PRICES, small)
    assert pays[0].share == 1.0
    assert worth(0.1, 1.0) == 0.1
    assert 0.1 * 2.8 < worth(0.1, 3.0) < 0.3
    assert worth(0.1, 1e6) == pytest.approx(0.1 * 16.4)
    only = fitted(losses({"ppl": 3.0}))
    with pytest.raises(ConfigError, match="pay for no choice"):
        search(only, model, way, PRICES, Aim(budget=1e18, task="own"))


@pytest.mark.parametrize(
    ("aim", "match"),
    [
        ({"budget": 0.0}, "--flops is 0"),
        ({"max_epochs": 0.0}, "--max-epochs is 0"),
        ({"shares": (2.0,)}, "--share is 2"),
        ({"task": "none"}, "no law of the task"),
    ],
)
def test_what_cannot_be_searched_is_refused(gains, aim, match):
    asked = Aim(**{"budget": 1e19, "task": "own", **aim})
    with pytest.raises(NeomixError, match=match):
        search(gains, [sized_model("7B")], [base_option(400)], PRICES, asked)


def test_scores_need_the_worth_of_a_nat():
    scores = fit_runs(
        gain_runs(rates={"random": 2.0}, noise=1e-6), FitRequest(options=FitOptions(best=1.0))
    )
    ways = [base_option(400), option("method", -0.1)]
    model = [sized_model("7B")]
    with pytest.raises(ConfigError, match="--per-nat"):
        search(scores, model, ways, PRICES, Aim(budget=1e19, task="exam"))
    rows = search(scores, model, ways, PRICES, Aim(budget=1e19, task="exam", per_nat=0.5))
    assert rows[0].mixing.name == "method"
    assert rows[0].performance - rows[1].performance == pytest.approx(0.05)


def test_what_is_extrapolated_is_marked(gains):
    rows = search(
        gains, [sized_model("70B")], [base_option(400)], PRICES, Aim(budget=1e19, task="own")
    )
    assert all("size extrapolated" in one.notes for one in rows)


# The command, on tiny data.

COUNTED = 30_000


def compare_json(folder, names):
    """Write what a comparison of methods would have left."""

    def method(name, mean, sd, training, stages="none"):
        found = {"count": 5, "mean": mean, "sd": sd}
        return {
            "method": name,
            "stages": stages,
            "prior": None,
            "difference": {"average": found} if mean is not None else None,
            "spent": {"training": training, "total": 1.0},
            "by_seed": {"1": {"run": f"{name}-1"}},
        }

    methods = {
        "uniform": method("static", None, None, 1.0),
        "odm": method("odm", -0.2, 0.01, 0.9),
        "doge": method("doge", -0.9, 0.01, 0.5, stages="proxy"),
    }
    (folder / "ran").mkdir(parents=True)
    mixing = {"mixing": {"method": "odm", "weights": {"x": 1.0}, "warmup_steps": 7}}
    (folder / "ran" / "config.yml").write_text(yaml.safe_dump(mixing))
    plan = {"runs": [{"run": "odm-1", "folder": str(folder / "ran")}]}
    (folder / "plan.json").write_text(json.dumps(plan))
    task = {"methods": methods, "budget": 1e9}
    content = {
        "format": 1,
        "baseline": "uniform",
        "budget": {"setting": "equal"},
        "tasks": dict.fromkeys(names, task),
    }
    (folder / "compare.json").write_text(json.dumps(content))
    return folder


def law_json(folder):
    """Write a law of the tiny data's domains whose best mixture is known to be better."""
    names = list(runs.DOMAINS)
    mixtures = well_spread(free_bounds(3), count=12, seed=1)
    rate = np.array([[3.0, 0.3, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.6]])
    noise = np.random.default_rng(0).normal(0, 1e-3, (12, 3))
    found = 1.0 + np.exp(-mixtures @ rate.T) + noise
    best = mixtures[found.mean(axis=1).argmin()]
    facts = {
        "domains": names,
        "mixture": best.tolist(),
        "runs": 12,
        "fitted": [
            {"mixture": m.tolist(), "losses": row.tolist()}
            for m, row in zip(mixtures, found, strict=True)
        ],
    }
    folder.mkdir()
    (folder / "law.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    runs.make_data(folder / "data")
    runs.add_sidecars(folder / "data")
    domains = {
        name: {"train": str(folder / "data" / name), "valid": str(folder / "data" / name)}
        for name in runs.DOMAINS
    }
    studies.base(folder, domains=domains, tokenizer_type="CharLevelTokenizer")
    whole = yaml.safe_load((folder / "base.yml").read_text())
    del whole["vocab_size"]
    runs.write_config(folder / "data.yml", {k: v for k, v in whole.items() if k != "hidden_size"})
    for name, width in (("narrow", 16), ("wide", 32)):
        runs.write_config(folder / f"{name}.yml", {"hidden_size": width})
    made = losses({"random": 2.0, "bm25": 2.6}, sizes=(5e3, 2e4), tokens=COUNTED, noise=1e-3)
    write_gains(fitted(made, replicates=100), folder / "gains")
    compare_json(folder / "league", ["t"])
    law_json(folder / "law")
    (folder / "exam.jsonl").write_text('{"text": "1 2 3"}\n{"text": "2 3 4"}\n')
    return folder


def command(project, *words, flops="2e9"):
    folder = project
    models = [] if "--models" in words else ["--models", str(folder / "narrow.yml")]
    parser = argparse.ArgumentParser()
    budget.add_arguments(parser)
    given = [
        str(folder / "data.yml"),
        *models,
        "--flops",
        flops,
        "--gains",
        str(folder / "gains"),
        *map(str, words),
    ]
    options = parser.parse_args(given)
    assert budget.run(options) == 0
    return json.loads((options.out / "budget.json").read_text())


def test_the_command_ranks_and_says_what_was_measured(project, tmp_path, capsys):
    folder = project
    words = ["--league", folder / "league", "--law", folder / "law", "--out", tmp_path, "--top", 0]
    found = command(project, "--models", folder / "narrow.yml", folder / "wide.yml", *words)
    shown = capsys.readouterr().out
    rows = found["ranking"]
    assert {row["model"] for row in rows} == {"narrow", "wide"}
    assert {row["selector"] for row in rows} == {"random", "bm25"}
    assert {row["mixing"] for row in rows} == {"as configured", "odm", "static by law"}
    assert len(rows) == 12
    assert [row["performance"] for row in rows] == sorted(row["performance"] for row in rows)
    odm = next(row for row in rows if row["mixing"] == "odm")
    assert odm["beside"] / (odm["beside"] + odm["training"]) == pytest.approx(0.1)
    law = {
        row["mixing"]: row for row in rows if (row["model"], row["selector"]) == ("narrow", "bm25")
    }
    gained = law["static by law"]["performance"] - law["as configured"]["performance"]
    assert -0.5 < gained < 0
    assert law["odm"]["performance"] - law["as configured"]["performance"] == pytest.approx(-0.2)
    assert "doge: it needs runs before the one that counts" in shown
    assert "no run had both" in shown
    assert "5 seeds against uniform" in shown
    assert (tmp_path / "budget.md").read_text() in shown
    assert found["not_measured"]


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["--selectors", "bm25"], lambda f: {r["selector"] for r in f["ranking"]} == {"bm25"}),
        (
            ["--share", "0.05", "--max-epochs", "2"],
            lambda f: all(r["share"] == 1 or r["epochs"] <= 2 for r in f["ranking"]),
        ),
        (["--methods", "odm"], lambda f: len(f["ranking"]) == 4),
        (["--league-task", "t"], lambda f: len(f["ranking"]) == 4),
        (["--seed", "4"], lambda f: len(f["ranking"]) == 4),
        (["--task", "own"], lambda f: f["task"] == "own"),
        (["--corpus-tokens", "1e6"], lambda f: f["ranking"][0]["share"] < 0.1),
        (["--set", "num_layers=2"], lambda f: f["ranking"][0]["parameters"] > 1e4),
    ],
)
def test_every_flag_does_something(project, tmp_path, words, check):
    folder = project
    flags = ["--league", folder / "league", "--out", tmp_path, "--top", "0"]
    assert check(command(project, *flags, *words))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--selectors", "less"], "not fitted"),
        (["--methods", "odm"], "by --league"),
        (["--league", "LEAGUE", "--league-task", "u"], "no task of"),
        (["--league", "LEAGUE", "--methods", "doge"], "no option"),
        (["--league", "none"], "cannot be read as a comparison"),
        (["--law", "none"], "cannot be read as a law"),
        (["--scorer", "ppl"], "METHOD=MODEL"),
    ],
)
def test_wrong_words_are_refused(project, tmp_path, words, match):
    given = [str(project / "league") if word == "LEAGUE" else word for word in words]
    with pytest.raises(NeomixError, match=match):
        command(project, "--out", tmp_path, *given)


def test_a_selector_without_its_target_is_told_and_not_written(project, tmp_path, capsys):
    found = command(project, "--selectors", "bm25", "--out", tmp_path, flops="1e8")
    assert found["runs"] == []
    assert "Not written: row 1: 'bm25' chooses by a target" in capsys.readouterr().out


def test_the_proposed_run_is_chosen_for_and_checked(project, tmp_path):
    """What run-1.sh says is done, up to the training, which is only checked."""
    folder = project
    found = command(
        project,
        *("--selectors", "bm25", "--share", "0.3", "--out", tmp_path, "--top", "1"),
        *("--league", folder / "league", "--target", f"exam={folder / 'exam.jsonl'}"),
        flops="1e8",
    )
    (run,) = found["runs"]
    row = found["ranking"][0]
    written = yaml.safe_load((tmp_path / "run-1.yml").read_text())
    assert written["train_iters"] == run["steps"]
    assert written["mixing"]["method"] == "odm"
    assert written["mixing"]["warmup_steps"] == 7
    assert row["share"] < 1
    lines = (tmp_path / "run-1.sh").read_text().splitlines()
    assert sum("select_data.py score --method bm25" in line for line in lines) == 3
    assert lines[-1] == f"./deepy.py train.py {tmp_path / 'run-1.yml'}"
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["python", "tools/select_data.py"]:
            module = load_command(words[2])
            given = spread_set(words[3:])
            assert module.run(module.make_parser("x", given).parse_args(given)) == 0
    assert deepy.main([*shlex.split(lines[-1])[1:], "--check"]) == 0


def test_the_tool_has_the_command():
    assert "budget" in COMMANDS
