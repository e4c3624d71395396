"""Which of torch's kernels attention runs on, told before a run depends on it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from megatron.model.masking import Masking
from megatron.model.relative import own_slopes
from megatron.model.sparsity import DEFAULTS, PATTERNS, BlockPattern
from megatron.model.spec import MIXERS, ModelSpec, attention_types, head_size, kv_heads
from megatron.parallel.topology import Topology

_NAMES = {
    SDPBackend.MATH: "math (unfused)",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}
_PROBE = 64  # tokens; the choice depends on types, masks and head sizes, not on the length


def attention_kernels(
    spec: ModelSpec, *, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Return the kernel that ``scaled_dot_product_attention`` chooses for each kind of attention.

    All kernels compute the same, to rounding.  A mask (windows, block patterns, documents) keeps
    some away, and a bias that learns keeps away all that are fused.

    Args:
        spec: the architecture.
        device: where it runs.
        dtype: in which it computes.

    Returns:
        By name of the kind; "unknown" where this torch does not say.
    """
    kinds = [kind for kind in dict.fromkeys(attention_types(spec)) if kind not in MIXERS]
    return {kind: _kernel(spec, kind, device, dtype) for kind in kinds}


def _kernel(spec: ModelSpec, kind: str, device: torch.device, dtype: torch.dtype) -> str:
    choose: Any = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "unknown"
    query, key = (
        torch.zeros(1, heads, _PROBE, head_size(spec), device=device, dtype=dtype)
        for heads in (spec.num_attention_heads, kv_heads(spec))
    )
    for part in (query, key):
        part.requires_grad_()
    mask = _mask(spec, kind, query)
    chosen = choose(
        query,
        key,
        key,
        attn_mask=mask,
        dropout_p=spec.attention_dropout,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return _NAMES.get(SDPBackend(chosen), "unknown")


def _mask(spec: ModelSpec, kind: str, query: torch.Tensor) -> torch.Tensor | None:
    """Return a mask as blocks of this kind get it."""
    single, heads, pattern = Topology.single(), spec.num_attention_heads, None
    if kind in PATTERNS:
        settings = spec.sparsity_config or DEFAULTS
        pattern = BlockPattern(kind, settings, heads=heads, layer=0, topology=single)
    slopes = own_slopes(spec, single) if spec.pos_emb == "alibi" else None
    masking = Masking(window=spec.sliding_window_width, pattern=pattern, slopes=slopes)
    starts = bias = None
    if spec.reset_attention_mask:
        starts = torch.zeros(1, _PROBE, dtype=torch.int64, device=query.device)
    if spec.pos_emb == "rpe":
        bias = query.new_zeros(heads, _PROBE, requires_grad=True)
    return masking(query, _PROBE, starts=starts, bias=bias)
