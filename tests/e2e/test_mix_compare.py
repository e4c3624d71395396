"""``tools/mix.py compare`` from the command line, killed in its second stage and begun again."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support import compared, kills, runs

from megatron.experiments.compare.results import load_compare
from megatron.experiments.table import read_table, tag

pytestmark = pytest.mark.slow

METHODS = {
    **compared.UNIFORM,
    "aioli": {"mixing": {"method": "aioli", "lp_rounds": 1, "lp_steps": 2, "update_every": 20}},
    "naive": {"mixing": {"method": "naive_validation", "update_every": 30, "lag": 1}},
    "doremi": {"stages": "doremi", "mixing": {"method": "doremi", "weights": "uniform"}},
}
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    domains = {name: {"train": str(place / "data" / name)} for name in ("walk", "noise")}
    compared.write(
        place,
        {"name": "small", "seeds": list(SEEDS), "methods": METHODS},
        domains=domains,
        train_iters=240,
        save_interval=10,
        eval_interval=120,
        audit_samples=True,
        mixing={"method": "static", "validation_samples": 8},
    )
    return place


def words(folder: Path) -> list[str]:
    return ["compare", str(folder / "study.yml"), "--out", str(folder / "out"), "--jobs", "2"]


def proxies(folder: Path) -> list[Path]:
    """Return the folders of proxies that have a checkpoint and are not finished."""
    return [
        request.parents[1]
        for request in (folder / "runs").glob("*/runner/request.yml")
        if "method: doremi" in request.read_text()
        and (request.parents[1] / "checkpoints" / "latest").exists()
        and request.parents[1].name not in kills.finished(folder)
    ]


def test_a_killed_comparison_goes_on_and_compares_like_with_like(folder):
    shown = runs.tool("mix.py", *words(folder), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "t, doremi: 1 reference of " in shown.stdout
    assert "all stages: at most 12 runs" in shown.stdout
    assert not (folder / "runs").exists()

    kills.kill_once(folder, lambda: bool(proxies(folder)), *words(folder))
    done = kills.finished(folder)
    assert len(done) >= 8  # uniform, aioli, naive and the references, of two seeds
    assert not (folder / "out" / "compare.json").exists()
    before = {name: kills.stamp(folder / "runs" / name) for name in done}
    again = runs.tool("mix.py", *words(folder))
    assert again.returncode == 0, again.stdout + again.stderr
    assert {name: kills.stamp(folder / "runs" / name) for name in done} == before
    assert again.stdout.count(" started in ") == 12 - len(done)
    told = [path.read_text() for path in (folder / "runs").glob("*/runner/output.log")]
    assert any("/checkpoints/global_step" in text for text in told)  # went on, not anew

    facts = load_compare(folder / "out")["tasks"]["t"]
    _check_budgets(facts)
    _check_pairs(folder)
    assert facts["seeds"] == list(SEEDS)
    text = (folder / "out" / "summary.md").read_text()
    assert "## t (room)" in text
    assert "| doremi | " in text

    third = runs.tool("mix.py", *words(folder))
    assert third.returncode == 0, third.stderr
    assert " started in " not in third.stdout


def _check_budgets(facts: dict[str, Any]) -> None:
    """Every method spends what was planned, and that is the baseline's budget but for a step."""
    for name, method in facts["methods"].items():
        spent, planned = method["spent"], method["planned"]
        assert spent["total"] == pytest.approx(planned["total"]), name
        for kind in ("training", "validation", "proxies", "references"):
            assert spent[kind] == pytest.approx(planned[kind]), (name, kind)
        assert spent["most"] <= facts["budget"] * (1 + 1e-9)
        assert not method["over_budget"]
    aioli, doremi = facts["methods"]["aioli"], facts["methods"]["doremi"]
    assert aioli["spent"]["validation"] > 0
    assert facts["methods"]["naive"]["spent"]["validation"] > 0
    assert aioli["train_iters"] < 240
    assert doremi["spent"]["proxies"] == pytest.approx(4 / 3 * doremi["spent"]["references"])


def _check_pairs(folder: Path) -> None:
    """The same seed begins with the same weights, and reads each domain in the same order."""
    rows = read_table(folder / "out")
    keys = {
        (row["seed"], tag(row, "contestant")): (row["key"], row["method"])
        for row in rows
        if tag(row, "role") == "final"
    }
    assert len(keys) == 8
    firsts = {}
    for seed in SEEDS:
        orders = {}
        for method in METHODS:
            key, _ = keys[seed, method]
            records = runs.records(folder / "runs" / key, "metrics")
            start = next(one["valid_loss"] for one in records if one["step"] == 0)
            assert firsts.setdefault(seed, start) == start
            orders[method] = _order(folder / "runs" / key)
        for method in ("aioli", "naive", "doremi"):
            for domain in ("walk", "noise"):
                ours, theirs = orders[method][domain], orders["uniform"][domain]
                both = min(len(ours), len(theirs))
                assert both > 100
                assert ours[:both] == theirs[:both], (seed, method, domain)
    assert firsts[1] != firsts[2]


def _order(run: Path) -> dict[str, list[Any]]:
    """Return the samples of each domain in the order in which they were read."""
    order = defaultdict(list)
    for line in (run / "samples.jsonl").read_text().splitlines():
        for name, epoch, sample in json.loads(line)["samples"]:
            order[name].append((epoch, sample))
    return order
