"""DoReMi's proxy ends with the same weights whatever its reference's form, layout and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import relayout, runs
from support.pool import RankPools
from support.scored import PROXY, REFERENCE, proxies, scored, write

from megatron.training.scoring import ScoreRequest

STEPS = 12
# Losses lie below 8 here, where float16 is off by at most 2^-9; each step adds its own to log α.
HALF = STEPS * 2.0**-9
EXACT = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pools: RankPools) -> Path:
    """Data, a reference that was trained on it, and its losses."""
    folder = tmp_path_factory.mktemp("doremi")
    runs.make_data(folder / "data", documents=60)
    file = write(folder, "reference", "reference", **REFERENCE)
    assert pools.call(relayout.train, 2, file) == [0, 0]
    request = ScoreRequest(checkpoint=str(folder / "reference"), out=str(folder / "store"))
    score = proxy(folder, "score", reference="unused")
    assert [code for code, _ in pools.call(scored, 2, score, request)] == [0, 0]
    return folder


def proxy(folder: Path, name: str, *, reference: str | None = None, **changes: Any) -> Path:
    options = {"method": "doremi", "eta": 0.5, **changes.pop("mixing", {})}
    if reference is None:
        options["reference_losses"] = str(folder / "store")
    else:
        options["reference"] = str(folder / reference)
    weights = dict.fromkeys(runs.DOMAINS, 1.0)
    weights["noise"] = 2.0
    content = {**PROXY, **changes, "mixing": options}
    content["domains"] = {
        domain: {"train": str(folder / "data" / domain), "weight": weight}
        for domain, weight in weights.items()
    }
    return write(folder, name, f"proxy-{name}", **content)


def log_distance(one: list[float], other: list[float]) -> float:
    return float(np.abs(np.log(one) - np.log(other)).max())


def run(pools: RankPools, files: dict[str, Path]) -> dict[str, Any]:
    first, *others = pools.call(proxies, 2, files, STEPS)
    for other in others:
        for name in files:
            assert other[name]["state"] == first[name]["state"], name
    return first


def test_online_reference_and_store_give_the_same_weights(folder: Path, pools: RankPools) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "data": {},
        "tensor": {"model_parallel_size": 2},
        "pipeline": {"pipe_parallel_size": 2},
        "ahead": {"mixing": {"loss_lag": 0}},
        "read ahead": {"mixing": {"lag": 1}},
    }
    files = {
        f"{name}-{form}": proxy(
            folder, f"{name}-{form}".replace(" ", "-"), reference=reference, **layout
        )
        for name, layout in layouts.items()
        for form, reference in (("model", "reference"), ("store", None))
    }
    found = run(pools, files)
    for name in layouts:
        model, store = found[f"{name}-model"], found[f"{name}-store"]
        distance = log_distance(model["weights"], store["weights"])
        print(f"{name}: log weights {distance:.1e} apart, of at most {HALF:.1e}")
        assert 0 < distance <= HALF, name
        assert log_distance(model["mean"], store["mean"]) <= HALF, name
        # They have gone far further than that, each from its given share.
        assert log_distance(model["weights"], [0.25, 0.25, 0.5]) > 10 * HALF
        if name in ("tensor", "pipeline"):
            for form in ("model", "store"):
                same = found[f"data-{form}"]["weights"]
                assert log_distance(found[f"{name}-{form}"]["weights"], same) <= EXACT
    # Of the step's own losses, one step sooner.
    ahead, behind = found["ahead-model"]["weights"], found["data-model"]["weights"]
    assert log_distance(ahead, behind) > HALF


@pytest.mark.parametrize("form", ["model", "store"])
def test_accumulation_changes_nothing(folder: Path, pools: RankPools, form: str) -> None:
    reference = "reference" if form == "model" else None
    layouts: list[dict[str, Any]] = [{}, {"mixing": {"loss_lag": 0}}]
    if form == "model":
        layouts.append({"pipe_parallel_size": 2})
    for number, layout in enumerate(layouts):
        ranks = 1 if "pipe_parallel_size" in layout else 2
        files = {
            f"{form}-{number}-{accumulation}": proxy(
                folder,
                f"{form}-{number}-{accumulation}",
                reference=reference,
                train_micro_batch_size_per_gpu=8 // accumulation // ranks,
                gradient_accumulation_steps=accumulation,
                **layout,
            )
            for accumulation in (1, 4)
        }
        one, four = run(pools, files).values()
        for step, (first, second) in enumerate(
            zip(one["ledger"], four["ledger"], strict=True), start=1
        ):
            assert first["samples"] == second["samples"], step
        assert log_distance(one["weights"], four["weights"]) <= EXACT
        assert log_distance(one["mean"], four["mean"]) <= EXACT
