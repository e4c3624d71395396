"""The kernel that is told is the one that runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron.model import GPT
from megatron.model.kernels import attention_kernels
from tests.support.model_spec import TestSpec


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_kv_heads": 1},
        {"sliding_window_width": 3},
        {"pos_emb": "alibi"},
        {"pos_emb": "rpe"},
        {"attention_dropout": 0.1},
        {"attention_config": ("global", "local")},
    ],
)
def test_what_is_told_is_what_runs(change: dict[str, Any]) -> None:
    spec = dataclasses.replace(TestSpec(), **change)
    told = attention_kernels(spec, device=torch.device("cpu"), dtype=torch.float32)
    assert set(told) == set(change.get("attention_config", ("global",)))
    model = GPT(spec, seed=1)
    model.dropout.begin(step=1, micro_batch=0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(torch.arange(16)[None])
    ran = {event.key for event in found.key_averages()}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    plain = "aten::_scaled_dot_product_attention_math" in ran
    assert ("flash" in told.values(), "math (unfused)" in told.values()) == (fused, plain)
