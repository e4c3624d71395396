"""Domains edited between the launches of one run: nothing repeated or lost, every step once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support import relayout, runs
from support.pool import RankPools

from megatron.config import load_config
from megatron.errors import CheckpointError
from megatron.training.check import check

AIOLI = {"lp_rounds": 1, "lp_steps": 2, "update_every": 11, "one_hot_factor": 0.6}
METHODS: dict[str, dict[str, Any]] = {
    "odm": {"method": "odm", "draw": "multinomial", "lag": 1},
    "aioli": {"method": "aioli", **AIOLI},
    "static": {"method": "static", "lag": 1},
    "ado": {"method": "ado", "first_fit": 5, "fit_every": 4, "subsample": 1, "smoothing_window": 3},
    "skillit": {"method": "skillit", "update_every": 3},
}
METHODS["ado"]["smoothing_order"] = 1
SHORT = {"aioli", "static"}
STOPS = (5, 12, 24)


def domains(data: Path, weights: Mapping[str, float]) -> dict[str, Any]:
    """Return domains with weights; a name that ends in a number is a part of ``noise``."""
    files = {
        "walk": "old/walk",
        "drift": "old/drift",
        "noise": "old/noise",
        "fresh": "new/walk",
        "noise 1": "new/drift",
        "noise 2": "new/noise",
    }
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        found[name] = {"train": str(data / files[name]), "weight": weight}
        if name.startswith("noise "):
            found[name]["split_of"] = "noise"
    return found


def launches(data: Path) -> list[dict[str, Any]]:
    """Remove ``drift``, split ``noise``, add ``fresh``, re-weight; then let ``drift`` return."""
    second = {"fresh": 3, "walk": 1, "noise 1": 2, "noise 2": 1}
    return [
        {"domains": domains(data, {"walk": 2, "drift": 1, "noise": 1})},
        {"domains": domains(data, second), "allow_domain_edits": True},
        {"domains": domains(data, {"drift": 2, **second}), "allow_domain_edits": True},
    ]


def told_by_check(file: Path) -> list[str]:
    """Return what ``--check`` says of a configuration."""
    told: list[str] = []
    assert check(load_config([str(file)]), world_size=2, gpus=0, say=told.append) == 0
    return told


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[] if m in SHORT else [pytest.mark.slow]) for m in METHODS],
)
def test_edited_twice(tmp_path: Path, pools: RankPools, method: str) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    runs.make_data(data / "old")
    runs.make_data(data / "new")
    for stop, changes in zip(STOPS, launches(data), strict=True):
        content = runs.config(
            data, run_dir, **changes, train_iters=24, exit_interval=stop, mixing=METHODS[method]
        )
        file = runs.write_config(tmp_path / "config.yml", content)
        assert pools.call(relayout.train, 2, file) == [0, 0]
        assert runs.steps_done(run_dir) == stop

    ledger = runs.records(run_dir, "mixture")
    assert [line["step"] for line in ledger] == list(range(1, STOPS[-1] + 1))
    expected = [set(launch["domains"]) for launch in launches(data)]
    for line in ledger:
        launch = sum(line["step"] > stop for stop in STOPS)
        assert set(line["probability"]) == expected[launch]
        assert abs(sum(line["probability"].values()) - 1) < 1e-12

    given: dict[str, list[tuple[int, int]]] = {}
    for record in runs.records(run_dir, "samples"):
        for name, epoch, sample in record["samples"]:
            given.setdefault(name, []).append((epoch, sample))
    for name, samples in given.items():
        assert samples == [(0, place) for place in range(len(samples))], name
    assert set(given) == set().union(*expected)
    assert sum(map(len, given.values())) == 8 * STOPS[-1]

    first, second = ledger[STOPS[0]]["probability"], ledger[STOPS[1]]["probability"]
    if method == "static":
        assert [round(7 * first[name], 9) for name in ("fresh", "walk", "noise 1")] == [3, 1, 2]
        assert round(9 * second["drift"], 9) == 2
    if method == "aioli":  # the probes that were under way start anew, over the new domains
        for launch, stop in ((expected[1], STOPS[0]), (expected[2], STOPS[1])):
            opened = ledger[stop]
            assert opened["fresh_quota"] == 2
            assert set(opened["valid_loss"]) == launch
            probed = {
                line["probe"] for line in ledger[stop : stop + 2 * len(launch)] if "probe" in line
            }
            assert len(probed) == min(len(launch), (STOPS[-1] - stop) // 2)


def test_an_edit_without_leave_is_refused_and_told_of(tmp_path: Path) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    runs.make_data(data / "old")
    runs.make_data(data / "new")
    before, after, _ = launches(data)
    small = {"train_iters": 9, "exit_interval": 3, "num_gpus": 2}
    mixing = {"method": "static"}
    file = tmp_path / "config.yml"
    runs.write_config(file, runs.config(data, run_dir, **before, **small, mixing=mixing))
    runs.train(file)
    refused = {**after, "allow_domain_edits": False}
    runs.write_config(file, runs.config(data, run_dir, **refused, **small, mixing=mixing))
    with pytest.raises(CheckpointError) as raised:
        told_by_check(file)
    done = runs.run("train.py", file)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for text in (str(raised.value), done.stderr):
        assert "'fresh' is added, 'noise 1' is added" in text
        assert "'drift' is removed, 'noise' is removed" in text
        assert "allow_domain_edits: true" in text
    lines = (
        "edit: domain 'drift' is removed; sample 6 of epoch 0 is kept for its return",
        "edit: domain 'noise' is split into 'noise 1' and 'noise 2'",
        "edit: domain 'fresh' is new; its samples start at the first",
        "edit: domain 'noise 2' takes over what was learnt of 'noise'",
    )
    runs.write_config(file, runs.config(data, run_dir, **after, **small, mixing=mixing))
    told = told_by_check(file)
    assert all(any(said.startswith(line) for said in told) for line in lines), told
    printed = runs.train(file).stdout
    assert all(line in printed for line in lines), printed

    # What a domain holds may not change unnoticed while it is away.
    after["domains"]["drift"] = {"train": str(data / "new" / "walk"), "weight": 1}
    content = runs.config(data, run_dir, **after, **small, mixing=mixing)
    content["domains"]["noise 3"] = {**content["domains"]["noise 2"], "split_of": "nose"}
    runs.write_config(file, content)
    with pytest.raises(CheckpointError, match="the training data of 'drift' is not what"):
        told_by_check(file)
    runs.write_config(file, {**content, "allow_changed_data": True})
    with pytest.raises(CheckpointError, match=r"noise 3.split_of is 'nose'.*did you mean 'noise'"):
        told_by_check(file)


def test_given_weights_that_change_take_effect(tmp_path: Path, pools: RankPools) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    runs.make_data(data / "old")
    file = tmp_path / "config.yml"
    for stop, walk in ((4, 2), (8, 6)):
        content = runs.config(
            data,
            run_dir,
            domains=domains(data, {"walk": walk, "drift": 1, "noise": 1}),
            train_iters=8,
            exit_interval=stop,
            mixing={"method": "static", "lag": 1},
        )
        runs.write_config(file, content)
        if stop == 8:
            told = told_by_check(file)
            assert any("edit: given weights changed: walk 0.5 → 0.75" in line for line in told)
            assert any("the run draws by them from here on" in line for line in told)
        assert pools.call(relayout.train, 2, file) == [0, 0]
    shares = [line["probability"]["walk"] for line in runs.records(run_dir, "mixture")]
    assert shares == [0.5] * 4 + [0.75] * 4
