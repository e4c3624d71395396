"""``tools/mix.py regmix`` from the command line, killed in its middle and begun again."""

from __future__ import annotations

import json

import pytest
import yaml
from support import kills, runs, studies

from megatron.config import load_config
from megatron.experiments.table import read_table

pytestmark = pytest.mark.slow


def test_a_killed_regmix_goes_on_and_finds_a_mixture(tmp_path):
    pytest.importorskip("sklearn")
    runs.make_data(tmp_path / "data")
    # Long enough that a kill finds a run between two of its checkpoints.
    studies.base(tmp_path, train_iters=100, save_interval=10, eval_interval=100)
    out = tmp_path / "out"
    words = ["regmix", str(tmp_path / "base.yml"), "--out", str(out), "--proxies", "7"]
    words += ["--held-out", "3", "--floor", "0.1", "--simulated", "2000", "--seeds", "1"]
    kills.go_on(tmp_path, *words)

    facts = json.loads((out / "regmix.json").read_text())
    assert facts["mixtures"] == 7
    rows = read_table(out)
    ends = [row for row in rows if row["last"] and row["split"] == "valid"]
    held_out = {one["run"]: one["measured"] for one in facts["held_out"]}
    assert len(held_out) == 3
    for run, value in held_out.items():
        mine = [row["loss"] for row in ends if row["run"] == run]
        assert value == pytest.approx(sum(mine) / 3)
    weights = yaml.safe_load((out / "mixture.yml").read_text())["mixing"]["weights"]
    assert min(weights.values()) >= 0.1 - 1e-9
    taken = load_config([str(tmp_path / "base.yml"), str(out / "mixture.yml")])
    assert {name: domain.weight for name, domain in taken.domains.items()} == pytest.approx(weights)

    # The same runs, read from the table, are the same search.
    asked = ["--held-out", "3", "--floor", "0.1", "--simulated", "2000"]
    done = runs.tool("mix.py", "regmix", "--study", str(out), *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((out / "regmix" / "regmix.json").read_text())
    assert again == facts
