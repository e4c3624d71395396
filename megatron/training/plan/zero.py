"""What DeepSpeed's configuration says about memory, with DeepSpeed's own defaults (0.19)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """How weights, gradients and optimizer state are divided over data ranks, and kept.

    Attributes:
        stage: of ZeRO (Rajbhandari et al. 2020).
        width: bytes of a weight as the model computes with it.
        accumulated_width: bytes of a gradient as micro-batches are added up.
        communicated_width: bytes of a gradient on the wire.
        bucket: numbers in a buffer of gradients on their way.
        buckets: how many such buffers there are.
        contiguous: gradients are copied into those buffers (which are then made whole).
        kept_float32: gradients have float32 buffers of their own that are never freed, and go
            out in no other (DeepSpeed's ``BF16_Optimizer``: bf16 weights, stage 1, float32 sums).
        all_reduced: gradients reach their owner by an all-reduce (DeepSpeed's default for
            stages 1 and 2) and not by a reduction to it alone.
        optimizer_on_host: master weights, moments and their gradients are in host memory.
        weights_on_host: so are the partitioned weights (stage 3).
        persistent: stage 3 keeps parameters of at most this many numbers whole …
        persistent_total: … as long as they are no more than this together.
        live: numbers of gathered parameters that stage 3 may hold at a time.
        sub_group: numbers that stage 3 updates at a time.
    """

    stage: int
    width: int
    accumulated_width: int
    communicated_width: int
    bucket: int
    buckets: int
    contiguous: bool
    kept_float32: bool
    all_reduced: bool
    optimizer_on_host: bool
    weights_on_host: bool
    persistent: int
    persistent_total: int
    live: int
    sub_group: int


def zero_settings(deepspeed: Mapping[str, Any]) -> ZeroSettings:
    """Read the dictionary that DeepSpeed is given (:func:`megatron.config.deepspeed_config`)."""
    zero: Mapping[str, Any] = deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    half = any(deepspeed.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    width = 2 if half else 4
    accumulated = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    communicated = deepspeed.get("communication_data_type")
    overlapped = zero.get("overlap_comm")
    overlapped = stage == 3 if overlapped is None else bool(overlapped)

    def number(default: float, *names: str) -> int:
        return int(float(next((zero[name] for name in names if name in zero), default)))

    def on_host(name: str) -> bool:
        return str((zero.get(name) or {}).get("device", "none")) != "none"

    added = BYTES.get(str(accumulated), width)
    bf16 = bool(deepspeed.get("bf16", {}).get("enabled"))
    host = on_host("offload_optimizer")
    return ZeroSettings(
        stage=stage,
        width=width,
        accumulated_width=added,
        communicated_width=BYTES.get(str(communicated), width),
        bucket=number(5e8, "reduce_bucket_size"),
        buckets=2 if overlapped and stage in (1, 2) else 1,
        contiguous=bool(zero.get("contiguous_gradients", True)),
        kept_float32=bf16 and stage == 1 and added == 4 and not host,
        all_reduced=stage < 2
        or not zero.get("reduce_scatter", True)
        or bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        optimizer_on_host=host,
        weights_on_host=stage == 3 and on_host("offload_param"),
        persistent=number(1e5, "stage3_param_persistence_threshold", "param_persistence_threshold"),
        persistent_total=number(
            2**63 - 1, "stage3_model_persistence_threshold", "model_persistence_threshold"
        ),
        live=number(1e9, "stage3_max_live_parameters", "max_live_parameters"),
        sub_group=number(1e9, "sub_group_size"),
    )
