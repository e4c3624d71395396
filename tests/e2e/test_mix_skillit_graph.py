"""``tools/mix.py skillit-graph`` from the command line, killed and begun again; then Skill-It."""

from __future__ import annotations

import json

import pytest
import yaml
from support import kills, runs, studies

from megatron.experiments.table import read_table

pytestmark = pytest.mark.slow


def test_a_killed_graph_goes_on_and_the_next_run_takes_it(tmp_path):
    runs.make_data(tmp_path / "data")
    domains = {name: {"train": str(tmp_path / "data" / name)} for name in runs.DOMAINS}
    domains["noise"]["target"] = True
    # Long enough that a kill finds a run between two of its checkpoints.
    size = {"train_iters": 120, "save_interval": 10, "eval_interval": 120}
    studies.base(tmp_path, domains=domains, **size)
    settings = yaml.safe_load((tmp_path / "base.yml").read_text())
    del settings["mixing"]
    base = runs.write_config(tmp_path / "plain.yml", settings)
    out = tmp_path / "out"
    kills.go_on(tmp_path, "skillit-graph", str(base), "--out", str(out))

    graph = json.loads((out / "graph.json").read_text())
    losses = {
        (row["run"], row["domain"], row["step"]): row["loss"]
        for row in read_table(out)
        if row["split"] == "valid"
    }
    for index, domain in enumerate(("walk", "drift")):
        run = f"point-{index}-seed-1234"
        for name in runs.DOMAINS:
            before, after = losses[run, name, 0], losses[run, name, 120]
            assert graph[domain][name] == pytest.approx((before - after) / before)
    assert graph["walk"]["walk"] > graph["walk"]["drift"]

    files = [str(base), str(out / "skillit.yml")]
    checked = runs.run("train.py", *files, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = runs.run("train.py", *files, "--set", "train_iters=4", "mixing.update_every=2")
    assert done.returncode == 0, done.stdout + done.stderr
