"""A run that starts from another's weights, on new domains, with the old ones as its objective."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import runs
from support.pool import RankPools
from support.whole_run import train

from megatron.config import load_config
from megatron.errors import ConfigError
from megatron.training.check import check

STEPS = 18
OLD, NEW = ("walk", "drift"), ("noise", "count")


def make_count(folder: Path) -> None:
    """Write a domain of its own: counting upwards."""
    from megatron.data.writer import TokenWriter

    with TokenWriter(folder / "count", np.uint16) as writer:
        for start in range(200):
            writer.add(((start + np.arange(90)) % 110).astype(np.uint16))


def settings(run_dir: Path, domains: dict[str, Any], mixing: dict[str, Any]) -> dict[str, Any]:
    return {
        **runs.config(run_dir, run_dir),
        "train_iters": STEPS,
        "eval_interval": STEPS,
        "eval_iters": 1,
        "save_interval": STEPS,
        "log_interval": 1,
        "audit_samples": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "warmup": 0.25,
        "lr_decay_style": "cosine",
        "min_lr": 3e-4,
        "domains": domains,
        "mixing": mixing,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pools: RankPools) -> Path:
    """Two runs: the first on the old domains, the second goes on with the new ones."""
    root = tmp_path_factory.mktemp("continual")
    for part, documents in (("train", 200), ("valid", 60)):
        runs.make_data(root / part, documents)
        make_count(root / part)

    def data(name: str, *parts: str) -> dict[str, str]:
        return {part: str(root / part / name) for part in parts}

    old = {name: data(name, "train", "valid") for name in OLD}
    first = settings(root / "first", old, {"method": "static"})
    train(pools, runs.write_config(root / "first.yml", first))
    new: dict[str, Any] = {name: data(name, "train", "valid") for name in NEW}
    kept = {name: {"target": True, **data(name, "valid")} for name in OLD}
    aioli = {
        "method": "aioli",
        "update_every": 8,
        "lp_rounds": 1,
        "lp_steps": 2,
        "validation_samples": 8,
        "objective": {"kind": "weights", "weights": {"walk": 1.0, "drift": 1.0, "count": 2.0}},
    }
    second = settings(root / "second", {**new, **kept}, aioli)
    second |= {"load": str(root / "first"), "finetune": True}
    file = runs.write_config(root / "second.yml", second)
    assert check(load_config([str(file)]), world_size=2, gpus=0, say=lambda _: None) == 0
    train(pools, file)
    return root


def lines(folder: Path, run: str, field: str) -> dict[int, Any]:
    """Return a field of the metrics by step, where a line has it."""
    rows = map(json.loads, (folder / run / "metrics.jsonl").open())
    return {row["step"]: row[field] for row in rows if field in row}


def test_it_starts_with_the_other_runs_weights(folder: Path) -> None:
    before, after = (lines(folder, run, "valid_loss") for run in ("first", "second"))
    assert list(before) == list(after) == [0, STEPS]
    for name in OLD:
        # The windows are the same, and so is the model that the second run begins with.
        assert after[0][name] == pytest.approx(before[STEPS][name], rel=1e-6)
        assert after[0][name] < before[0][name]


def test_it_begins_at_step_0_and_warms_up_anew(folder: Path) -> None:
    ledger = runs.records(folder / "second", "mixture")
    assert [row["step"] for row in ledger] == list(range(1, STEPS + 1))
    rates = [lines(folder, run, "learning_rate") for run in ("first", "second")]
    assert rates[0] == rates[1]
    peak = max(rates[1], key=rates[1].__getitem__)
    assert rates[1][1] <= rates[1][2] < rates[1][3] < rates[1][peak]
    assert 1 < peak < STEPS / 2
    assert (folder / "second" / "checkpoints" / f"global_step{STEPS}").is_dir()


def test_the_old_domains_are_measured_and_never_drawn(folder: Path) -> None:
    ledger = runs.records(folder / "second", "mixture")
    measured = [row for row in ledger if "target_loss" in row]
    assert len(measured) >= 4  # every probe of aioli is measured before and after
    for row in measured:
        assert set(row["target_loss"]) == set(OLD)
        assert set(row["valid_loss"]) == set(NEW)
        assert all(math.isfinite(loss) for loss in row["target_loss"].values())
    for row in ledger:
        assert set(row["probability"]) == set(row["samples"]) == set(NEW)
    assert set(lines(folder, "second", "valid_loss")[STEPS]) == {*OLD, *NEW}


def test_the_controller_acts_for_the_old_domains_too(folder: Path) -> None:
    """What it estimates speaks of every domain, trained on or not, and its weights move."""
    ledger = runs.records(folder / "second", "mixture")
    held = [row["probability"]["count"] for row in ledger if "probe" not in row]
    assert len(set(held)) > 1
    # Measurements for the controller are counted with the domains that are only measured.
    tokens = [row["extra_tokens"]["validation"] for row in ledger if "target_loss" in row]
    assert set(tokens) == {4 * 8 * 16}


def test_a_target_has_no_weight(folder: Path) -> None:
    config = yaml.safe_load((folder / "second.yml").read_text())
    config["domains"]["walk"]["weight"] = 0.5
    file = runs.write_config(folder / "weighed.yml", config)
    with pytest.raises(ConfigError, match="never trained on; leave its weight out"):
        load_config([str(file)])
