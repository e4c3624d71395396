"""``tools/mix.py regmix`` on tables of which the order is known, and with pretending runs."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import yaml
from support import runs, studies

from megatron.errors import ConfigError, RunError
from megatron.experiments.bounds import free_bounds
from megatron.experiments.commands import regmix
from megatron.experiments.designs import dirichlet
from megatron.experiments.execute import execute
from megatron.experiments.proxies import read_proxies, unseen_count, unseen_mixtures
from megatron.experiments.study import PLAN
from megatron.experiments.table import COLUMNS, read_table, write_table

DOMAINS = ("code", "prose", "noise")
CONSTANT = np.array([1.0, 1.5, 4.0, 2.0])
RATE = np.array([[2.0, 0.4, 0.0], [0.3, 1.2, 0.0], [0.0, 0.1, 0.1], [1.0, 0.0, 0.0]])


@pytest.fixture(scope="module", autouse=True)
def _sklearn():
    pytest.importorskip("sklearn")


def losses_of(mixtures):
    return CONSTANT + np.exp(-mixtures @ RATE.T)


def table(mixtures, losses, seeds=(0,), points=True):
    """Rows of runs on three domains that are also measured on a fourth."""
    rows = []
    for seed in seeds:
        for index, (mixture, loss) in enumerate(zip(mixtures, losses, strict=True)):
            run = f"point-{index}-seed-{seed}"
            tags = json.dumps({"point": index} if points else {})
            weights = (*mixture, 0.0)
            for name, weight, value in zip((*DOMAINS, "target"), weights, loss, strict=True):
                row = {column: kind() for column, kind in COLUMNS.items()}
                row |= {"run": run, "seed": seed, "domain": name, "last": True, "split": "valid"}
                row |= {"weight": weight, "loss": value + seed, "tokens": 1000, "tags": tags}
                rows.append(row)
    return rows


def write_study(folder, rows):
    write_table(rows, folder)
    plan = {"domain_tokens": {"code": 100, "prose": 500, "noise": 400}, "runs": [{"steps": 10}]}
    (folder / PLAN).write_text(json.dumps(plan))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    mixtures = dirichlet(free_bounds(3), count=60, seed=1)
    noise = np.random.default_rng(0).normal(0, 1e-3, (60, 4))
    return write_study(
        tmp_path_factory.mktemp("regmix"), table(mixtures, losses_of(mixtures) + noise)
    )


def parse(*words):
    parser = argparse.ArgumentParser()
    regmix.add_arguments(parser)
    return parser.parse_intermixed_args([str(word) for word in words])


def find(study, *words):
    """Search a study; return what ``regmix.json`` holds."""
    given = ("--study", study, "--simulated", 5000, "--best", 64)
    assert regmix.run(parse(*given, *words)) == 0
    facts = json.loads((study / "regmix" / "regmix.json").read_text())
    written = yaml.safe_load((study / "regmix" / "mixture.yml").read_text())["mixing"]["weights"]
    assert written == facts["mixture"]
    assert sum(written.values()) == pytest.approx(1)
    return facts


def test_the_mixture_of_an_earlier_study_is_near_the_optimum(study, capsys):
    facts = find(study, "--regressor", "boosting")
    grid = np.array([[a, b, 50 - a - b] for a in range(51) for b in range(51 - a)]) / 50
    truth = grid[losses_of(grid).mean(axis=1).argmin()]
    found = np.array([facts["mixture"][name] for name in DOMAINS])
    assert np.abs(found - truth).max() < 0.15
    assert losses_of(found).mean() < losses_of(np.full(3, 1 / 3)).mean() - 0.02
    ranks = facts["rank_correlation"]["boosting"]
    assert ranks["objective"] > 0.9
    assert ranks["domains"]["code"] > 0.9
    assert len(facts["held_out"]) == 15
    assert facts["mixtures"] == 60
    assert not facts["warnings"]
    text = (study / "regmix" / "summary.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    assert "fitted to all 60 mixtures" in text
    assert "held out of a fit to the other 45" in text
    assert f"| objective | {ranks['objective']:.3f} |" in text
    assert (study / "regmix" / "report.html").stat().st_size > 0


def test_of_two_regressors_the_better_one_finds_the_mixture(study):
    facts = find(study)
    ranks = {name: found["objective"] for name, found in facts["rank_correlation"].items()}
    assert ranks.keys() == {"boosting", "log_linear"}
    assert ranks[facts["regressor"]] == max(ranks.values())
    alone = find(study, "--regressor", facts["regressor"])
    assert alone["mixture"] == facts["mixture"]


def test_objective_and_limits_are_kept(study):
    words = ("--objective", "target=1", "--ceiling", "code=0.7", "--floor", "noise=0.1")
    facts = find(study, *words)
    assert facts["objective"] == {"code": 0, "prose": 0, "noise": 0, "target": 1}
    assert 0.5 < facts["mixture"]["code"] <= 0.7
    assert facts["mixture"]["noise"] >= 0.1
    capped = find(study, "--objective", "target=1", "--max-epochs", "code=1", "--tokens", "400")
    assert capped["mixture"]["code"] <= 0.25 + 1e-9
    natural = find(study, "--prior", "natural", "--concentration", "20", "--simulated", "200")
    assert natural["prior"] == [0.1, 0.5, 0.4]
    assert natural["mixture"]["code"] < 0.3


def test_a_low_rank_correlation_is_warned_of(tmp_path):
    mixtures = dirichlet(free_bounds(3), count=24, seed=1)
    losses = 3 + 0.1 * np.random.default_rng(3).random((24, 4))
    facts = find(write_study(tmp_path, table(mixtures, losses)))
    assert any("is low" in warning for warning in facts["warnings"])
    assert any("by chance alone" in warning for warning in facts["warnings"])
    assert "**Warning.** The rank correlation" in (tmp_path / "regmix" / "summary.md").read_text()


@pytest.mark.parametrize("points", [True, False])
def test_seeds_are_averaged_and_half_mixtures_left_out(points):
    mixtures = dirichlet(free_bounds(3), count=5, seed=0)
    rows = table(mixtures, losses_of(mixtures), seeds=(0, 2), points=points)
    rows = [row for row in rows if row["run"] != "point-3-seed-2"]
    proxies = read_proxies(rows, DOMAINS)
    kept = [0, 1, 2, 4]
    assert proxies.names == tuple(f"point-{index}-seed-0" for index in kept)
    assert proxies.left_out == ("point-3-seed-0",)
    assert proxies.seeds == (0, 2)
    np.testing.assert_allclose(proxies.losses, losses_of(mixtures)[kept] + 1)
    np.testing.assert_allclose(proxies.mixtures, mixtures[kept])


def test_mixtures_are_held_out_by_share_or_number():
    assert unseen_count(0.25, 40, 3) == 10
    assert unseen_count(0.1, 12, 3) == 3
    assert unseen_count(7, 40, 3) == 7
    chosen = unseen_mixtures(10, 40, seed=1)
    assert len(set(chosen.tolist())) == 10
    assert (chosen == unseen_mixtures(10, 40, seed=1)).all()
    assert (chosen != unseen_mixtures(10, 40, seed=2)).any()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--held-out", "2"], "--held-out is 2"),
        (["--held-out", "3.5"], "--held-out is 3.5"),
        (["--held-out", "nan"], "--held-out is nan"),
        (["--held-out", "58"], "leaves 2 to fit"),
        (["--objective", "coed=1"], "coed is not measured"),
        (["--best", "9", "--simulated", "8"], "--best is 9"),
        (["--seeds", "1"], "--study reads runs.* --seeds"),
        (["base.yml", "--jobs", "2"], "a configuration file, --jobs"),
        (["--floor", "0.5"], "floors sum"),
        (["--max-epochs", "0.1"], "ceilings sum"),
    ],
)
def test_wrong_options_are_refused(study, words, match):
    with pytest.raises(ConfigError, match=match):
        regmix.run(parse("--study", study, *words))


def test_every_flag_of_new_runs_is_refused_with_a_study(data):
    asked = vars(parse("--study", data))
    assert {name: asked[name] for name in regmix._OF_RUNS} == regmix._OF_RUNS
    searching = {"study", "out", "design_seed", "concentration", "prior", "floor", "ceiling"}
    searching |= {"max_epochs", "tokens", "objective", "regressor", "held_out", "simulated", "best"}
    assert asked.keys() == regmix._OF_RUNS.keys() | searching


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(RunError, match="give the folder"):
        regmix.run(parse("--study", tmp_path))


# -- runs of its own -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("proxies")
    runs.make_data(place / "data")
    studies.base(place)
    return place


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--proxies", "6"], "leaves 3 to fit"),
        (["--proxies", "0"], "--proxies is 0"),
        (["--objective", "coed=1"], "coed is not measured"),
        (["--max-epochs", "0.001"], "ceilings sum"),
        (["--seeds", "1", "1"], "give each once"),
        (["--set", "eval_iters=0"], "eval_iters is 0"),
        (["--set", "split=100,0,0"], "no validation data"),
    ],
)
def test_what_cannot_lead_to_a_mixture_is_refused_before_it_runs(data, tmp_path, words, match):
    given = parse(data / "base.yml", "--out", tmp_path / "out", *words)
    with pytest.raises(ConfigError, match=match):
        regmix.run(given)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_the_proxies(data, tmp_path, capsys):
    given = parse(data / "base.yml", "--out", tmp_path / "out", "--dry-run", "--proxies", "10")
    assert regmix.run(given) == 0
    shown = capsys.readouterr().out
    assert shown.count("to do ") == 10
    assert "regmix: 10 runs" in shown
    assert list(tmp_path.iterdir()) == []


def pretend(monkeypatch, what):
    """Let the command's runs only pretend to train."""

    def conduct(study, options):
        study.write_plan(options.out)
        return execute(study.distinct, studies.pretending(what), retries=0, say=lambda _: None)

    monkeypatch.setattr(regmix, "conduct", conduct)


def test_a_failed_proxy_is_named_and_the_others_are_fitted_to(data, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "point-2-seed-1234:bad")
    out = tmp_path / "out"
    words = ("--proxies", "8", "--simulated", "500", "--seeds", "1234")
    given = parse(data / "base.yml", "--out", out, *words)
    # Runs that only pretend report one mixture, whatever they were asked for.
    assert regmix.run(given) == 1
    shown = capsys.readouterr().out
    assert "failed: point-2-seed-1234: exit code 3" in shown
    assert "point-2-seed-1234: exit code 3" in (out / "summary.md").read_text()
    facts = json.loads((out / "regmix.json").read_text())
    assert facts["mixtures"] == 7
    assert facts["failed"] == ["point-2-seed-1234: exit code 3"]
    assert len({row["run"] for row in read_table(out)}) == 7
    assert json.loads((out / PLAN).read_text())["study"] == "regmix"


def test_too_few_finished_proxies_are_no_mixture(data, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "point-2-seed-1234:bad")
    out = tmp_path / "out"
    given = parse(data / "base.yml", "--out", out, "--proxies", "7", "--held-out", "3")
    assert regmix.run(given) == 1
    assert "no mixture was found: of 6 mixtures 3 are held out" in capsys.readouterr().out
    assert "exit code 3" in (out / "summary.md").read_text()
    assert not (out / "mixture.yml").exists()
