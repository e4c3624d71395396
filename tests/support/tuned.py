"""A base model and a run that tunes something beside its weights, through DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from support import runs
from support.training import Harness


def write(
    folder: Path, layout: Mapping[str, Any], tuned: Mapping[str, Any], *, steps: int, lr: float
) -> tuple[Path, Path]:
    """Write the configurations of the base model and of its tuning, and their data."""
    runs.make_data(folder / "data")
    common = runs.config(
        folder / "data",
        folder / "run",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        train_iters=steps,
        mixing={"method": "static"},
        optimizer={"type": "Adam", "params": {"lr": lr}},
        lr_decay_style="constant",
        **layout,
    )
    return (
        runs.write_config(folder / "base.yml", common),
        runs.write_config(folder / "tuned.yml", {**common, **tuned}),
    )


def same(weights: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> bool:
    """Tell whether ``found`` has all of these weights, to the bit."""
    return all(np.array_equal(found[name], value) for name, value in weights.items())


def loads_again(file: Path, saved: Path, tag: str, weights: Mapping[str, np.ndarray]) -> bool:
    """Tell whether a fresh run loads these weights from a checkpoint."""
    harness = Harness(file)
    harness.parts.engine.load(saved, tag)
    found = harness.parameters()
    harness.close()
    return same(weights, found)
