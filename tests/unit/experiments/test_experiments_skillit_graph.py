"""``tools/mix.py skillit-graph``: the matrix, the file for the next run, and what is refused."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import yaml
from support import runs, studies

from megatron.config import load_config
from megatron.errors import ConfigError, RunError
from megatron.experiments.commands import skillit_graph
from megatron.experiments.execute import execute
from megatron.experiments.skill_graph import Negative, graph_text, skill_graph
from megatron.experiments.table import COLUMNS
from megatron.mixing.skillit import read_graph
from megatron.training.check import preflight

DOMAINS = ("code", "prose")
MEASURED = ("code", "prose", "target")
BEFORE = np.array([4.0, 5.0, 2.0])
EDGES = {
    ("code", 1): [0.5, 0.1, 0.2],
    ("prose", 1): [-0.1, 0.4, 0.0],
    ("code", 2): [0.3, 0.3, 0.2],
    ("prose", 2): [-0.3, 0.2, 0.1],
}
RUNS = {(seed, domain): f"{domain}-{seed}" for domain, seed in EDGES}


def rows(edges=EDGES, tokens=100):
    """Rows of runs whose losses make these edges; the middle of a run must not matter."""
    found = []
    for (domain, seed), row in edges.items():
        ends = {0: BEFORE, 5: BEFORE * 9, 10: BEFORE * (1 - np.array(row))}
        for step, losses in ends.items():
            for name, loss in zip(MEASURED, losses, strict=True):
                one = {column: kind() for column, kind in COLUMNS.items()}
                one |= {"run": f"{domain}-{seed}", "seed": seed, "domain": name, "step": step}
                one |= {"split": "valid", "loss": float(loss), "last": step == 10}
                found.append({**one, "tokens": tokens * step})
                found.append({**found[-1], "split": "test", "loss": 77.0})
    return found


def test_the_graph_is_the_share_of_the_loss_that_is_taken_away():
    graph = skill_graph(rows(), RUNS, Negative.KEEP)
    assert graph.domains == DOMAINS
    assert graph.measured == MEASURED
    expected = [[0.4, 0.2, 0.2], [-0.2, 0.3, 0.05]]
    np.testing.assert_allclose(graph.matrix, expected, atol=1e-12)
    np.testing.assert_allclose(graph.deviation[0], [np.sqrt(0.02), np.sqrt(0.02), 0], atol=1e-12)
    # The method reads what is named, targets last.
    np.testing.assert_allclose(read_graph(graph.named(), DOMAINS, MEASURED), expected)
    zero = skill_graph(rows(), RUNS, Negative.ZERO)
    np.testing.assert_allclose(zero.matrix, np.maximum(expected, 0), atol=1e-12)
    np.testing.assert_allclose(zero.edges, graph.edges)
    text = graph_text(graph)
    assert "| prose | -0.2000 ± 0.1414 | 0.3000 ± 0.1414 | 0.0500 ± 0.0707 |" in text
    assert "| (nothing) | 0 | 4.0000 | 5.0000 | 2.0000 |" in text
    assert "| code | 1,000 | 2.4000 | 4.0000 | 1.6000 |" in text
    assert "Warning" not in text


def test_one_seed_has_no_deviation_and_unequal_runs_are_warned_of():
    one = {key: name for key, name in RUNS.items() if key[0] == 1}
    given = [row for row in rows() if row["seed"] == 1]
    graph = skill_graph(given, one, Negative.KEEP)
    assert graph.deviation is None
    assert "| code | 0.5000 | 0.1000 | 0.2000 |" in graph_text(graph)
    shorter = [{**r, "tokens": r["tokens"] // 2} if r["run"] == "code-1" else r for r in given]
    assert "differ in the tokens" in graph_text(skill_graph(shorter, one, Negative.KEEP))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda r: None if r["step"] == 0 else r, "no held-out losses before its first step"),
        (lambda r: None if r["last"] else r, "no held-out losses at its end"),
        (
            lambda r: {**r, "loss": float("nan")} if r["last"] and r["domain"] == "prose" else r,
            "loss of prose at its end is nan",
        ),
        (
            lambda r: (
                None if r["step"] == 0 and r["run"] == "prose-1" and r["domain"] == "target" else r
            ),
            "loss of target before its first step is nan",
        ),
        (lambda r: {**r, "loss": 0.0} if r["step"] == 0 else r, "before its first step is 0.0"),
    ],
)
def test_missing_and_useless_losses_are_refused(spoil, match):
    spoilt = [row for row in map(spoil, rows()) if row is not None]
    with pytest.raises(RunError, match=match):
        skill_graph(spoilt, RUNS, Negative.KEEP)


# -- the command ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("graph")
    runs.make_data(place / "data")
    prefix = str(place / "data" / "noise")
    domains = {name: {"train": str(place / "data" / name)} for name in ("walk", "drift")}
    studies.base(place, domains={**domains, "noise": {"train": prefix, "target": True}})
    # As the next run has it: no method, which is the fragment's to say.
    settings = yaml.safe_load((place / "base.yml").read_text())
    del settings["mixing"]
    runs.write_config(place / "plain.yml", settings)
    return place


def parse(data, out, *words, file="plain.yml"):
    parser = argparse.ArgumentParser()
    skillit_graph.add_arguments(parser)
    return parser.parse_intermixed_args([str(data / file), "--out", str(out), *words])


def pretend(monkeypatch, what):
    def conduct(study, options):
        study.write_plan(options.out)
        return execute(study.distinct, studies.pretending(what), retries=0, say=lambda _: None)

    monkeypatch.setattr(skillit_graph, "conduct", conduct)


def test_the_next_run_takes_the_fragment_as_it_is(data, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "good")
    out = tmp_path / "out"
    assert skillit_graph.run(parse(data, out, "--seeds", "1", "2")) == 0
    shown = capsys.readouterr().out
    assert "contradicts" not in shown
    # Runs that pretend halve all losses, of the target too.
    half = {"walk": 0.5, "drift": 0.5, "noise": 0.5}
    assert json.loads((out / "graph.json").read_text()) == {"walk": half, "drift": half}
    config = load_config([str(data / "plain.yml"), str(out / "skillit.yml")])
    assert config.mixing.method == "skillit"
    assert config.mixing.options["graph"] == {"walk": half, "drift": half}
    checked = preflight(config, world_size=1, gpus=0)
    checked.domains.close()
    assert checked.mixer.decide(step=1).sampling_weights.tolist() == [0.5, 0.5]
    # The graph alone, as the option's file, under a method that is given elsewhere.
    words = ["mixing=null", "mixing.method=skillit", f"mixing.graph={out / 'graph.json'}"]
    config = load_config([str(data / "base.yml")], overrides=words)
    preflight(config, world_size=1, gpus=0).domains.close()
    assert "| walk | 0.5000 ± 0.0000 |" in (out / "summary.md").read_text()
    assert (out / "report.html").stat().st_size > 0


def test_a_method_in_the_files_is_told_of(data, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "good")
    out = tmp_path / "out"
    assert skillit_graph.run(parse(data, out, file="base.yml")) == 0
    shown = capsys.readouterr().out
    assert f"--set mixing=null mixing.method=skillit mixing.graph={out / 'graph.json'}" in shown


def test_a_seed_with_a_failed_run_is_left_out_and_named(data, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "point-1-seed-2:bad")
    out = tmp_path / "out"
    assert skillit_graph.run(parse(data, out, "--seeds", "1", "2")) == 1
    assert "failed: point-1-seed-2: exit code 3" in capsys.readouterr().out
    text = (out / "summary.md").read_text()
    assert "a run of it failed: seed 2" in text
    assert "point-1-seed-2: exit code 3" in text
    assert "±" not in text
    assert (out / "skillit.yml").exists()


def test_without_a_whole_seed_there_is_no_graph(data, tmp_path, monkeypatch):
    pretend(monkeypatch, "point-1-seed-2:bad")
    out = tmp_path / "out"
    assert skillit_graph.run(parse(data, out, "--seeds", "2")) == 1
    assert "No graph" in (out / "summary.md").read_text()
    assert not (out / "skillit.yml").exists()
    assert (out / "table.csv").exists()


def test_a_dry_run_lists_a_run_for_every_domain_and_seed(data, tmp_path, capsys):
    assert skillit_graph.run(parse(data, tmp_path / "out", "--seeds", "1", "2", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert shown.count("to do ") == 4
    assert "walk=1 drift=0" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--set", "eval_iters=0"], "eval_iters is 0"),
        (["--set", "load=somewhere"], "set finetune: true"),
        (["--set", "domains.drift=null"], "needs two domains"),
        (["--seeds", "1", "1"], "give each once"),
    ],
)
def test_what_cannot_lead_to_a_graph_is_refused_before_it_runs(data, tmp_path, words, match):
    with pytest.raises(ConfigError, match=match):
        skillit_graph.run(parse(data, tmp_path / "out", *words))
    assert list(tmp_path.iterdir()) == []


def test_a_domain_without_validation_data_is_refused(data, tmp_path):
    settings = yaml.safe_load((data / "plain.yml").read_text())
    settings["split"] = "100,0,0"
    valid = str(data / "data" / "walk")
    settings["domains"]["noise"] = {"valid": valid, "target": True}
    file = runs.write_config(data / "blind.yml", settings)
    with pytest.raises(ConfigError, match="walk, drift has no validation data"):
        skillit_graph.run(parse(data, tmp_path / "out", file=file.name))
