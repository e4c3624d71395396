"""Every parameter of the model by size, in the order in which the modules hold them; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.model.spec import (
    GATED_ACTIVATIONS,
    MIXERS,
    ModelSpec,
    attention_types,
    block_experts,
    ffn_width,
    head_size,
    kv_heads,
    position_rows,
    shares_norm,
    spatial_rows,
)


@dataclass(frozen=True, kw_only=True)
class ParameterSize:
    """One parameter on one tensor rank.

    Attributes:
        name: inside its layer.
        count: numbers that the rank holds of it.
        decayed: whether weight decay applies (not to norms and biases).
        expert: whether it belongs to an expert.
    """

    name: str
    count: int
    decayed: bool
    expert: bool = False


def layer_inventory(
    spec: ModelSpec, tensor_size: int = 1, expert_size: int = 1
) -> list[list[ParameterSize]]:
    """Return what one tensor rank holds of each of the ``num_layers + 3`` layers.

    A tied embedding is in both its places.

    Args:
        spec: the architecture.
        tensor_size: tensor-parallel ranks.
        expert_size: data ranks that share experts out.
    """
    vocabulary = _weight(
        "weight", spec.padded_vocab_size(tensor_size) // tensor_size, spec.hidden_size
    )
    kinds = [*zip(attention_types(spec), block_experts(spec), strict=True)]
    built = {
        (kind, experts): block_inventory(
            spec, tensor_size, kind=kind, experts=experts, expert_size=expert_size
        )
        for kind, experts in set(kinds)
    }
    blocks = [built[kind] for kind in kinds]
    prompt = spec.soft_prompt_tuning
    learned = [] if prompt is None else [_weight(_PROMPT, prompt.n_tokens, spec.hidden_size)]
    first = [vocabulary, *position_inventory(spec, tensor_size), *learned]
    return [first, *blocks, _norm("norm", spec), [vocabulary]]


def position_inventory(spec: ModelSpec, ranks: int = 1) -> list[ParameterSize]:
    """Return what one of ``ranks`` tensor ranks holds of positions, beside the embedding."""
    if spec.pos_emb == "learned":
        rows = position_rows(spec)
        return [_weight("position_embeddings.weight", rows, spec.hidden_size)]
    if spec.pos_emb == "rpe":
        heads = spec.num_attention_heads // ranks
        return [_weight("relative_bias.weight", spec.rpe_num_buckets, heads)]
    return []


def stage_inventory(
    spec: ModelSpec, first: int, last: int, *, tensor_size: int = 1, expert_size: int = 1
) -> list[ParameterSize]:
    """Return what one tensor rank of a stage holds, each parameter once, as modules order it.

    Args:
        spec: the architecture.
        first: number of the stage's first layer.
        last: number of the layer after its last.
        tensor_size: tensor-parallel ranks.
        expert_size: data ranks that share experts out.
    """
    layers = layer_inventory(spec, tensor_size, expert_size)
    ends = {0, len(layers) - 1}
    held = range(first, last)
    if spec.no_weight_tying:
        return [parameter for layer in held for parameter in layers[layer]]
    # Tied modules come before all others, whatever their place in the list.
    tied = layers[min(ends & set(held))] if ends & set(held) else []
    return [*tied, *(one for layer in held if layer not in ends for one in layers[layer])]


def block_inventory(
    spec: ModelSpec,
    ranks: int = 1,
    *,
    kind: str = "global",
    experts: int = 1,
    expert_size: int = 1,
) -> list[ParameterSize]:
    """Return what one of ``ranks`` tensor ranks holds of a block.

    Args:
        spec: the architecture.
        ranks: tensor-parallel ranks.
        kind: of attention.
        experts: of the block; 1 = a plain MLP.
        expert_size: data ranks that share them out.
    """
    if kind in MIXERS:
        return _gmlp_inventory(spec, kind)
    hidden = spec.hidden_size
    query_key_value = (hidden + 2 * kv_heads(spec) * head_size(spec)) // ranks
    head_norms = [
        *_norm("attention.query_norm", spec, head_size(spec)),
        *_norm("attention.key_norm", spec, head_size(spec)),
    ]
    mlp = _mlp(spec, ranks, "mlp")
    if experts > 1:
        mlp = [
            _weight("mlp.router.weight", experts, hidden),
            *expert_inventory(spec, ranks) * (experts // expert_size),
        ]
    return [
        *_norm("input_layernorm", spec),
        *_linear("attention.query_key_value", query_key_value, hidden, query_key_value, spec),
        *(head_norms if spec.use_qk_layernorm else []),
        *_linear("attention.dense", hidden, hidden // ranks, hidden, spec),
        *([] if shares_norm(spec) else _norm("post_attention_layernorm", spec)),
        *mlp,
    ]


def expert_inventory(spec: ModelSpec, ranks: int = 1) -> list[ParameterSize]:
    """Return what one of ``ranks`` tensor ranks holds of one expert."""
    return [replace(one, expert=True) for one in _mlp(spec, ranks, "mlp.experts.0")]


def _mlp(spec: ModelSpec, ranks: int, name: str) -> list[ParameterSize]:
    hidden, width = spec.hidden_size, ffn_width(spec)
    up = width * (2 if spec.activation in GATED_ACTIVATIONS else 1) // ranks
    return [
        *_linear(f"{name}.dense_h_to_4h", up, hidden, up, spec),
        *_linear(f"{name}.dense_4h_to_h", hidden, width // ranks, hidden, spec),
    ]


def _gmlp_inventory(spec: ModelSpec, kind: str) -> list[ParameterSize]:
    hidden, width, head = spec.hidden_size, ffn_width(spec), spec.gmlp_attn_dim
    rows = spatial_rows(spec)
    own = _linear("input_linear", 2 * width, hidden, 2 * width, spec)
    back = _linear("output_linear", hidden, width, hidden, spec)
    attention = [
        *_linear("sgu.attn.proj_qkv", 3 * head, 2 * width, 3 * head, spec),
        *_linear("sgu.attn.proj_ffn", width, head, width, spec),
    ]
    return [
        *_norm("norm", spec),
        *own,
        *_norm("sgu.norm", spec, width),
        _weight(SPATIAL, rows, rows),
        ParameterSize(name="sgu.proj.bias", count=rows, decayed=False),
        *(attention if kind == "amlp" else []),
        *back,
    ]


_PROMPT = "soft_prompt.weight"
_LORA = ".lora."


def is_trained(spec: ModelSpec, parameter: ParameterSize) -> bool:
    """Tell whether a parameter is trained: all are, unless a prompt or updates alone are."""
    if spec.soft_prompt_tuning is not None:
        return parameter.name == _PROMPT
    return spec.lora is None or _LORA in parameter.name


SPATIAL = "sgu.proj.weight"
"""The matrix over positions of a block that has one."""


def _linear(
    name: str, outputs: int, inputs: int, bias: int, spec: ModelSpec
) -> list[ParameterSize]:
    attends = name.startswith(("attention", "sgu.attn"))
    biased = spec.use_bias_in_attn_linear if attends else spec.use_bias_in_mlp
    weight = _weight(f"{name}.weight", outputs, inputs)
    whole = [weight, ParameterSize(name=f"{name}.bias", count=bias, decayed=False)][: 1 + biased]
    if spec.lora is None or name.rpartition(".")[2] not in spec.lora.targets:
        return whole
    first = _weight(f"{name}{_LORA}a", spec.lora.rank, inputs)
    return [*whole, first, _weight(f"{name}{_LORA}b", outputs, spec.lora.rank)]


def _norm(name: str, spec: ModelSpec, hidden: int | None = None) -> list[ParameterSize]:
    width = hidden or spec.hidden_size
    sizes = {
        "layernorm": {"weight": width, "bias": width},
        "rmsnorm": {"scale": width},
        "scalenorm": {"g": 1},
    }.get(spec.norm, {})
    return [
        ParameterSize(name=f"{name}.{part}", count=count, decayed=False)
        for part, count in sizes.items()
        if part != "bias" or spec.use_bias_in_norms
    ]


def norm_inventory(spec: ModelSpec) -> list[ParameterSize]:
    """Return what a norm of the residual stream holds; the same on every rank."""
    return _norm("norm", spec)


def _weight(name: str, outputs: int, inputs: int) -> ParameterSize:
    return ParameterSize(name=name, count=outputs * inputs, decayed=True)
