"""Every method, stopped again and again, goes on as if nothing had happened, to the bit.

Methods are taken from the registry, from their ready files, so a new one is resumed here
without a change.  Stops fall into probes, between updates, and before a batch planned ahead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import relayout, runs
from support.pool import RankPools

from data_sampling_utils import available_methods

READY = runs.ROOT / "configs" / "mixing"
EARLIER = "runs/quickstart"
STEPS = 17
EVERY = 4
"""Steps of a launch: four launches end early, at places of every kind."""
SMALLER: dict[str, dict[str, Any]] = {
    "aioli": {"update_every": 9, "lp_rounds": 1, "lp_steps": 2, "validation_samples": 4},
    "ado": {"first_fit": 4, "fit_every": 3, "smoothing_window": 5, "subsample": 1},
}
SHORT = {"aioli", "ado", "doremi", "doge"}
"""One method of each kind of signal; odm is resumed in every layout elsewhere."""


def settings(data: Path, run_dir: Path, mixing: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 16,
        "train_iters": STEPS,
        "eval_interval": 6,
        "eval_iters": 1,
        "save_interval": STEPS,
        "mixing": mixing,
    }
    return runs.config(data, run_dir, **{**base, **changes})


def ready(method: str, product: Path) -> dict[str, Any]:
    """Return a ready file's mixing block, small, with ``product`` as the earlier run."""
    mixing = yaml.safe_load((READY / f"{method}.yml").read_text())["mixing"]
    small = SMALLER.get(method, {"update_every": 3} if "update_every" in mixing else {})
    return json.loads(json.dumps({**mixing, **small}).replace(EARLIER, str(product)))


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, pools: RankPools) -> Path:
    """The run that other methods start from."""
    folder = tmp_path_factory.mktemp("resume-methods")
    runs.make_data(folder / "data")
    mixing = {"method": "odm", "draw": "multinomial"}
    content = settings(folder / "data", folder / "earlier", mixing)
    file = runs.write_config(folder / "earlier.yml", content)
    assert pools.call(relayout.train, 2, file) == [0, 0]
    return folder / "earlier"


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method in SHORT else [pytest.mark.slow])
        for method in available_methods()
    ],
)
def test_stopped_again_and_again(
    tmp_path: Path, pools: RankPools, product: Path, method: str
) -> None:
    mixing = ready(method, product)
    if method == "doge":
        mixing["lag"] = 1
    data, whole, parts = product.parent / "data", tmp_path / "whole", tmp_path / "parts"
    file = runs.write_config(tmp_path / "whole.yml", settings(data, whole, mixing))
    assert pools.call(relayout.train, 2, file) == [0, 0]
    content = settings(data, parts, mixing, exit_interval=EVERY)
    file = runs.write_config(tmp_path / "parts.yml", content)
    for stop in (*range(EVERY, STEPS, EVERY), STEPS):
        assert pools.call(relayout.train, 2, file) == [0, 0]
        assert runs.steps_done(parts) == stop
    runs.assert_same_run(whole, parts, STEPS)
    if method == "aioli":  # a launch ended inside a probe, and one right after
        probes = {line["step"]: line.get("probe") for line in runs.records(parts, "mixture")}
        assert probes[3] == probes[4] is not None
        assert probes[12] == probes[13]
        assert probes[16] != probes[15]
