"""Low-rank updates through DeepSpeed: the base stays to the bit, every layout trains alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import runs
from support.pool import RankPools
from support.training import Harness

STEPS = 10
LORA = {"rank": 4, "alpha": 16, "targets": ["query_key_value", "dense_4h_to_h", "dense"]}


def train(rank: int, world_size: int, base: Path, tuned: Path) -> dict[str, Any]:
    """Save a model, adapt it from its checkpoint, and resume the adapted one."""
    first = Harness(base)
    first.parts.engine.save(base.parent / "saved", "base", {})
    weights = first.parameters()
    first.close()

    second = Harness(tuned)
    second.parts.engine.load(base.parent / "saved", "base", weights_only=True)
    second.run(STEPS)
    after = second.parameters()
    state = second.parts.engine._optimizer.optimizer.state
    second.parts.engine.save(base.parent / "saved", "tuned", {})
    result = {
        "ledger": second.ledger,
        "base is the same": all(np.array_equal(after[key], weights[key]) for key in weights),
        "added": sorted(set(after) - set(weights)),
        "moved": all(np.abs(after[key]).max() > 0 for key in after if key.endswith("lora.b")),
        "states": sum(value["exp_avg"].numel() for value in state.values() if "exp_avg" in value),
    }
    second.close()

    third = Harness(tuned)
    third.parts.engine.load(base.parent / "saved", "tuned")
    found = third.parameters()
    result["loaded"] = all(np.array_equal(found[key], after[key]) for key in after)
    third.close()
    return result


def write(folder: Path, layout: dict[str, Any]) -> tuple[Path, Path]:
    runs.make_data(folder / "data")
    common = runs.config(
        folder / "data",
        folder / "run",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        train_iters=STEPS,
        mixing={"method": "static"},
        optimizer={"type": "Adam", "params": {"lr": 5e-3}},
        lr_decay_style="constant",
        **layout,
    )
    return (
        runs.write_config(folder / "base.yml", common),
        runs.write_config(folder / "tuned.yml", {**common, "lora": LORA}),
    )


LAYOUTS = {
    "data": {"zero_optimization": {"stage": 2}},
    "tensor": {"model_parallel_size": 2},
    "sequence": {"model_parallel_size": 2, "sequence_parallel": True},
    "pipe": {"pipe_parallel_size": 2, "no_weight_tying": True},
    "pipe, tied": {"pipe_parallel_size": 2, "checkpoint_activations": True},
}


@pytest.mark.option("lora")
def test_every_layout_adapts_alike(pools: RankPools, tmp_path: Path) -> None:
    losses = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path / name.replace(", ", "_")
        folder.mkdir()
        result, other = pools.call(train, 2, *write(folder, layout))
        for told in ("base is the same", "moved", "loaded"):
            assert result[told], (name, told)
        assert other["ledger"] == result["ledger"]
        assert result["added"]
        assert all(".lora." in one for one in result["added"])
        losses[name] = np.array([line["domain_loss"] for line in result["ledger"]])
    for name, values in losses.items():
        if name != "pipe":  # of another model: its output has a weight of its own
            np.testing.assert_allclose(values, losses["data"], rtol=2e-6, err_msg=name)
    assert losses["data"][-1].sum() < 0.998 * losses["data"][0].sum()
