"""On a GPU: torch itself counts where a step waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import runs
from support.training import Harness

STEPS = 6
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_step_of_ours_waits_once_and_mixing_adds_nothing(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    places: dict[str, dict[int, Counter[str]]] = {}
    for method in ("static", "odm"):
        content = runs.config(
            tmp_path / "data",
            tmp_path / method,
            num_gpus=1,
            train_iters=STEPS,
            mixing={"method": method},
            bf16={"enabled": True},
        )
        harness = Harness(runs.write_config(tmp_path / f"{method}.yml", content))
        places[method] = _count(harness)
        harness.close()
    for method, by_step in places.items():
        for step, counted in by_step.items():
            ours = {place: n for place, n in counted.items() if "/megatron/" in place}
            assert step == 1 or list(ours.values()) == [1], (method, step, counted)
    steady = {method: by_step[STEPS] for method, by_step in places.items()}
    assert steady["odm"] == steady["static"]


def _count(harness: Harness) -> dict[int, Counter[str]]:
    counts: dict[int, Counter[str]] = {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")

        def after(step: int, ending: Any) -> None:
            counts[step] = Counter(
                f"{entry.filename}:{entry.lineno}"
                for entry in seen
                if "synchronizing CUDA" in str(entry.message)
            )
            seen.clear()

        harness.after_step = after  # type: ignore[method-assign]
        harness.step = lambda *arguments, **named: None  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            harness.run(STEPS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counts
