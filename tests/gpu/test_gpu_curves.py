"""On GPUs: the loss curves of a CPU run, in fp32 and bf16, and in every layout that fits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import runs

STEPS = 40
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(folder: Path, data: Path, *, gpus: int, **changes: Any) -> list[dict[str, Any]]:
    """Train on GPUs (or, with 0, on one CPU rank); return the ledger."""
    folder.mkdir(parents=True)
    content = runs.config(
        data,
        folder / "run",
        num_gpus=max(gpus, 1),
        train_iters=STEPS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Samples must not depend on the losses, or rounding could tip a draw.
        mixing={"method": "static", "weights": "uniform"},
        optimizer={"type": "Adam", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-4}},
        **changes,
    )
    environment = runs.environment()
    if gpus:
        del environment["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(
        runs.command("train.py", runs.write_config(folder / "config.yml", content)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs.records(folder / "run", "mixture")


def worst(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of two curves' domain losses."""
    return max(
        abs(first[name] - second[name]) / abs(second[name])
        for first, second in (
            (a["domain_loss"], b["domain_loss"]) for a, b in zip(one, other, strict=True)
        )
        for name in second
        if second[name] is not None
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of three small domains."""
    folder = tmp_path_factory.mktemp("curves") / "data"
    runs.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def on_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curve of one CPU rank in fp32."""
    return train(tmp_path_factory.mktemp("cpu") / "fp32", data, gpus=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_one_gpu_follows_the_cpu(
    tmp_path: Path,
    data: Path,
    on_cpu: list[dict[str, Any]],
    precision: str,
    tolerance: float,
    record_property: Any,
) -> None:
    changes = {} if precision == "fp32" else {precision: {"enabled": True}}
    found = worst(train(tmp_path / "gpu", data, gpus=1, **changes), on_cpu)
    record_property("worst_relative_difference", found)
    print(f"{precision}: worst relative difference of a domain's loss {found:.2e}")
    assert found < tolerance


@pytest.mark.parametrize(
    "layout",
    [
        {"model_parallel_size": 2},
        {"model_parallel_size": 2, "sequence_parallel": True},
        {"pipe_parallel_size": 2},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3}},
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_follow_the_cpu(
    tmp_path: Path, data: Path, on_cpu: list[dict[str, Any]], layout: dict[str, Any]
) -> None:
    assert worst(train(tmp_path / "gpu", data, gpus=2, **layout), on_cpu) < 1e-3
