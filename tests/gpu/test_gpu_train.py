"""On a GPU: training in bf16 over NCCL, and a resumed run with the same bits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 12


def train(folder: Path, data: Path, **changes: Any) -> Path:
    content = runs.config(
        data,
        folder / "run",
        num_gpus=1,
        train_iters=STEPS,
        deterministic=True,
        mixing={"method": "odm", "draw": "multinomial", "lag": 1},
        **changes,
    )
    file = runs.write_config(folder / "config.yml", content)
    environment = runs.environment()
    del environment["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(
        runs.command("train.py", file), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_fall_and_a_stopped_run_goes_on_with_the_same_bits(
    tmp_path: Path, stage: int, precision: str
) -> None:
    data = tmp_path / "data"
    runs.make_data(data)
    changes: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        changes[precision] = {"enabled": True}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(tmp_path / "whole", data, **changes)
    train(tmp_path / "parts", data, exit_interval=6, **changes)
    parts = train(tmp_path / "parts", data, **changes)
    for name in ("mixture", "samples", "metrics"):
        assert runs.records(whole, name) == runs.records(parts, name), name
    validations = [r["valid_loss"] for r in runs.records(whole, "metrics") if "valid_loss" in r]
    assert all(validations[-1][name] < validations[0][name] for name in runs.DOMAINS)
