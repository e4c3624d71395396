"""``tools/mix.py fit-law`` on tables of which the law is known."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import pytest
import yaml

from megatron.errors import ConfigError, RunError
from megatron.experiments.bounds import free_bounds
from megatron.experiments.commands import COMMANDS, fit_law, load_command
from megatron.experiments.designs import well_spread
from megatron.experiments.study import PLAN
from megatron.experiments.table import COLUMNS, write_table

DOMAINS = ("code", "prose", "noise")
CONSTANT = np.array([1.0, 1.5, 4.0])
RATE = np.array([[2.0, 0.4, 0.0], [0.3, 1.2, 0.0], [0.0, 0.1, 0.1]])


@pytest.fixture(scope="module", autouse=True)
def _scipy():
    pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("law")
    mixtures = well_spread(free_bounds(3), count=16, seed=1)
    noise = np.random.default_rng(0).normal(0, 1e-3, (16, 3))
    losses = CONSTANT + np.exp(-mixtures @ RATE.T) + noise
    rows = []
    for index, (mixture, loss) in enumerate(zip(mixtures, losses, strict=True)):
        for name, weight, value in zip(DOMAINS, mixture, loss, strict=True):
            row = {column: kind() for column, kind in COLUMNS.items()}
            mine = {"run": f"run-{index}", "domain": name, "last": True, "split": "valid"}
            rows.append({**row, **mine, "weight": weight, "loss": value, "tokens": 1000})
            rows.append({**rows[-1], "split": "test", "loss": math.nan})
    write_table(rows, folder)
    plan = {"domain_tokens": dict.fromkeys(DOMAINS, 500), "runs": [{"steps": 10}]}
    (folder / PLAN).write_text(json.dumps(plan))
    return folder


def fit(study, *words):
    parser = argparse.ArgumentParser()
    fit_law.add_arguments(parser)
    assert fit_law.run(parser.parse_args([str(study), "--replicates", "30", *words])) == 0
    facts = json.loads((study / "law" / "law.json").read_text())
    written = yaml.safe_load((study / "law" / "mixture.yml").read_text())["mixing"]["weights"]
    assert written == dict(zip(DOMAINS, facts["mixture"], strict=True))
    return facts


def test_the_law_and_its_best_mixture_are_found(study, capsys):
    facts = fit(study)
    assert np.allclose(facts["c"][:2], CONSTANT[:2], atol=0.1)
    assert min(facts["r2"][:2]) > 0.99
    assert min(facts["r2_held_out"][:2]) > 0.98
    grid = np.array([[a, b, 100 - a - b] for a in range(101) for b in range(101 - a)]) / 100
    truth = grid[(CONSTANT + np.exp(-grid @ RATE.T)).mean(axis=1).argmin()]
    assert np.abs(np.array(facts["mixture"]) - truth).max() < 0.05
    shown = capsys.readouterr().out
    assert f"| code | {facts['mixture'][0]:.4f} |" in shown


def test_limits_and_objective_are_kept(study):
    facts = fit(study, "--floor", "noise=0.2", "--ceiling", "0.6", "--objective", "code=1")
    assert facts["mixture"] == pytest.approx([0.6, 0.2, 0.2], abs=1e-6)
    capped = fit(study, "--max-epochs", "code=1,prose=1", "--tokens", "2000")
    assert capped["ceiling"] == [0.25, 0.25, 1.0]
    assert capped["mixture"] == pytest.approx([0.25, 0.25, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--objective", "coed=1"], "coed is not measured"),
        (["--objective", "1"], "write pairs"),
        (["--floor", "0.5"], "floors sum"),
    ],
)
def test_wrong_options_are_refused(study, words, match):
    with pytest.raises(ConfigError, match=match):
        fit(study, *words)


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(RunError, match="of a sweep"):
        fit(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    command = load_command(name)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert f"tools/mix.py {name}" in str(command.__doc__)
    assert callable(command.run)
