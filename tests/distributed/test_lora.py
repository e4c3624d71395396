"""Low-rank updates through DeepSpeed: the base stays to the bit, every layout trains alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pool import RankPools
from support.training import Harness
from support.tuned import loads_again, same, write

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
    second.parts.engine.save(base.parent / "saved", "tuned", {})
    added = sorted(set(after) - set(weights))
    result = {
        "ledger": second.ledger,
        "base is the same": same(weights, after),
        "added": added,
        "still": [key for key in added if key.endswith("lora.b") and not after[key].any()],
    }
    second.close()
    result["loaded"] = loads_again(tuned, base.parent / "saved", "tuned", after)
    return result


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
        result, other = pools.call(
            train, 2, *write(folder, layout, {"lora": LORA}, steps=STEPS, lr=5e-3)
        )
        for told in ("base is the same", "loaded"):
            assert result[told], (name, told)
        assert other["ledger"] == result["ledger"]
        # Three layers in each block that this stage has; B begins at zero.
        blocks = {one.split(".")[0] for one in result["added"]}
        assert len(result["added"]) == 3 * 2 * len(blocks) > 0
        assert all(one.endswith((".lora.a", ".lora.b")) for one in result["added"])
        assert result["still"] == [], name
        losses[name] = np.array([line["domain_loss"] for line in result["ledger"]])
    for name, values in losses.items():
        if name != "pipe":  # of another model: its output has a weight of its own
            np.testing.assert_allclose(values, losses["data"], rtol=2e-6, err_msg=name)
    assert losses["data"][-1].sum() < 0.998 * losses["data"][0].sum()
