"""What a plan says is sent is what goes through torch's collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.gloo import run_ranks
from support.memory import traffic, write

BF16 = {"bf16": {"enabled": True}}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, BF16 | zero(2)),
        slow(2, zero(1)),
        slow(4, BF16 | zero(1)),
        slow(2, {"model_parallel_size": 2}),
        slow(2, BF16 | {"model_parallel_size": 2, "checkpoint_activations": True}),
        slow(2, BF16 | {"model_parallel_size": 2, "sequence_parallel": True}),
        slow(2, {"pipe_parallel_size": 2}),
        slow(4, BF16 | {"pipe_parallel_size": 2, "model_parallel_size": 2}),
        slow(4, BF16 | zero(2) | {"model_parallel_size": 2}),
    ],
)
def test_traffic_is_what_was_planned(tmp_path: Path, ranks: int, changes: dict[str, Any]) -> None:
    file = write(tmp_path, **changes)
    for found in run_ranks(traffic, ranks, file, timeout=300):
        for axis, (counted, planned) in found.items():
            assert planned == pytest.approx(counted, rel=0.02), (axis, found)
        assert any(counted for counted, _ in found.values()), found
