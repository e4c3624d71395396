"""How many windows of held-out data each of its uses takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config.run import TrainingConfig
from megatron.parallel.topology import Topology
from megatron.training import held_out


@pytest.mark.option(
    "eval_iters", "max_test_samples_per_dataset", "max_validation_samples_per_dataset"
)
@pytest.mark.parametrize(
    ("keys", "reported", "tested"),
    [
        ({"eval_iters": 3}, 24, 24),
        ({"eval_iters": 5}, 40, 40),
        ({"eval_iters": 3, "max_validation_samples_per_dataset": 9}, 9, 24),
        ({"eval_iters": 3, "max_test_samples_per_dataset": 7}, 24, 7),
    ],
)
def test_windows_of_each_use(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], reported: int, tested: int
) -> None:
    def samples(domain: str, count: int, **_: Any) -> tuple[str, int]:
        return domain, count

    monkeypatch.setattr(held_out, "ValidationSet", samples)
    monkeypatch.setattr(held_out, "Validation", lambda sets, **_: sets)
    config: Any = SimpleNamespace(
        training=TrainingConfig(train_iters=1, **keys),
        model=SimpleNamespace(vocab_size=5),
        mixing=SimpleNamespace(validation_samples=2),
    )
    domains: Any = SimpleNamespace(valid=["v", None], test=[None, "t"])
    uses: Any = held_out.HeldOutUses(
        config,
        SimpleNamespace(device=torch.device("cpu")),  # type: ignore[arg-type]
        Topology.single(),
        SimpleNamespace(micro=4, total=8),  # type: ignore[arg-type]
        domains,
        SimpleNamespace(),  # type: ignore[arg-type]
        None,
    )
    assert uses.controller == [("v", 2), None]
    assert uses.reported == [("v", reported), None]
    assert uses.test == [None, ("t", tested)]
