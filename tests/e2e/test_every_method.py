"""Every mixing method trains on two ranks, from its ready file, and moves what it says it moves.

The ready files are read as they are; only what a run of a dozen steps needs is made smaller.
Methods are taken from the registry, so a new one is trained here without a change.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import runs
from support.pool import RankPools
from support.whole_run import train

from data_sampling_utils import available_methods
from megatron.config import load_config
from megatron.registry import mixing_methods
from megatron.training.check import check

READY = runs.ROOT / "configs" / "mixing"
STEPS = 12
EARLIER = "runs/quickstart"
"""The run that the ready files take the products of."""

SMALLER: dict[str, dict[str, Any]] = {
    "aioli": {"update_every": 5, "lp_steps": 1, "validation_samples": 4},
    "ado": {"first_fit": 4, "fit_every": 3, "smoothing_window": 5, "subsample": 1},
}
"""Cadences that fit a dozen steps, where ``update_every: 3`` is not the whole story."""
FIXED = {"static", "average_of_ledger"}
"""The methods whose mixture is the same at every step."""


def settings(data: Path, run_dir: Path, mixing: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return runs.config(
        data,
        run_dir,
        num_layers=1,
        hidden_size=16,
        train_iters=STEPS,
        eval_interval=STEPS,
        eval_iters=1,
        save_interval=STEPS,
        log_interval=1,
        audit_samples=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mixing=mixing,
        **changes,
    )


def ready(method: str, product: Path) -> dict[str, Any]:
    """Return a ready file's mixing block, small, with ``product`` as the earlier run."""
    mixing = yaml.safe_load((READY / f"{method}.yml").read_text())["mixing"]
    assert mixing["method"] == method
    small = SMALLER.get(method, {"update_every": 3} if "update_every" in mixing else {})
    return json.loads(json.dumps({**mixing, **small}).replace(EARLIER, str(product)))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every-method") / "data"
    runs.make_data(folder)
    return folder


@pytest.fixture(scope="session")
def product(data: Path, pools: RankPools) -> Path:
    """The run that other methods start from: checkpoint, ledger and held-out losses."""
    folder = data.parent / "earlier"
    mixing = {"method": "odm", "draw": "multinomial"}
    file = runs.write_config(data.parent / "earlier.yml", settings(data, folder, mixing))
    train(pools, file)
    return folder


@pytest.mark.parametrize("method", available_methods())
def test_it_trains_to_its_end(
    method: str, data: Path, product: Path, pools: RankPools, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    file = runs.write_config(tmp_path / "run.yml", settings(data, run_dir, ready(method, product)))
    assert check(load_config([str(file)]), world_size=2, gpus=0, say=lambda _: None) == 0
    train(pools, file)

    ledger = runs.records(run_dir, "mixture")
    assert [row["step"] for row in ledger] == list(range(1, STEPS + 1))
    for row in ledger:
        assert sum(row["probability"].values()) == pytest.approx(1.0, abs=1e-9)
        assert sum(row["samples"].values()) == 8
        assert all(loss is None or np.isfinite(loss) for loss in row["domain_loss"].values())
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in metrics if "valid_loss" in row] == [0, STEPS]
    assert (run_dir / "checkpoints" / f"global_step{STEPS}").is_dir()
    check_costs(method, ledger, [row for row in metrics if "loss" in row])

    drawn = [list(row["probability"].values()) for row in ledger]
    earlier = [list(row["probability"].values()) for row in runs.records(product, "mixture")]
    if method == "replay":
        assert drawn == earlier
    elif method == "average_of_ledger":
        np.testing.assert_allclose(drawn, [np.mean(earlier, axis=0)] * STEPS, rtol=1e-12)
    else:
        weights = [row.get("loss_weight") for row in ledger]
        moved = [a != b for a, b in itertools.pairwise(zip(drawn, weights, strict=True))]
        assert any(moved) is (method not in FIXED)


FORESEEN = {"gradient_alignment", "batch_valid_loss"}


def check_costs(method: str, ledger: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
    """Check that what mixing took is recorded: seconds on every line, tokens by what was asked."""
    for row in logged:
        assert {"all", "collective", "update"} <= row["overhead"].keys()
        assert sum(row["overhead"].values()) <= 2 * row["overhead"]["all"]
    needs = mixing_methods[method].needs
    trained = 8 * 16
    for row in ledger:
        tokens = row.get("extra_tokens", {})
        assert ("validation" in tokens) is ("valid_loss" in row)
        assert tokens.get("probes", trained) == trained
        assert ("probes" in tokens) is ("probe" in row)
        assert ("reference" in tokens) is ("excess_loss" in needs)
        assert ("foresight" in tokens) is bool(FORESEEN & row.keys())
    assert any(FORESEEN & row.keys() for row in ledger) is bool(FORESEEN & needs)
    asked = {kind for row in ledger for kind in row.get("extra_tokens", {})}
    timed = {kind for row in logged for kind in row["overhead"]}
    assert asked - {"probes"} <= timed


def needs_an_earlier_run() -> list[str]:
    """Return the methods whose ready file names the quickstart's run."""
    return [
        method
        for method in available_methods()
        if (file := READY / f"{method}.yml").exists()
        and EARLIER in json.dumps(yaml.safe_load(file.read_text()))
    ]


def test_the_methods_that_live_on_an_earlier_run_are_known() -> None:
    assert {"replay", "average_of_ledger", "dynamic_loading"} <= set(needs_an_earlier_run())
    if "doremi" in mixing_methods:
        assert "doremi" in needs_an_earlier_run()


@pytest.mark.parametrize("method", needs_an_earlier_run())
def test_without_its_product_the_run_says_how_to_make_it(
    method: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixing = yaml.safe_load((READY / f"{method}.yml").read_text())["mixing"]
    file = runs.write_config(tmp_path / "run.yml", settings(data, tmp_path / "run", mixing))
    monkeypatch.chdir(tmp_path)  # where there is no runs/quickstart
    done = runs.run("train.py", file)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert EARLIER in message
    command = re.search(r"\./deepy\.py train\.py [^;,()]+", done.stderr)
    assert command is not None, done.stderr
    assert "local/quickstart mixing/odm" in command[0]
    assert not (tmp_path / "run" / "mixture.jsonl").exists()
