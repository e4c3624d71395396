"""How many parameters a configuration has and what a token costs; needs no torch."""

from __future__ import annotations

from typing import Final

from megatron.model.inventory import (
    SPATIAL,
    block_inventory,
    expert_inventory,
    is_trained,
    layer_inventory,
    norm_inventory,
    position_inventory,
    stage_inventory,
)
from megatron.model.seen_keys import seen_keys
from megatron.model.spec import MIXERS, ModelSpec, attention_types, block_experts, ffn_width

FORWARD_SHARE: Final = 1.0 / 3.0
"""Of a pass through what is trained: backward multiplies every matrix twice."""


def block_parameters(spec: ModelSpec, kind: str = "global", experts: int = 1) -> int:
    """Return the parameters of one block with attention of a kind and so many experts."""
    held = block_inventory(spec, kind=kind, experts=experts)
    return sum(parameter.count for parameter in held)


def block_kinds(spec: ModelSpec) -> list[tuple[str, int]]:
    """Return the kind of attention and the number of experts of every block."""
    return [*zip(attention_types(spec), block_experts(spec), strict=True)]


def mixing_width(spec: ModelSpec, kind: str) -> int:
    """Return how many numbers a token takes from each one before it, in a block of a kind.

    Scores and sums of attention are two products of width h each; a spatial gating unit is one
    product of the MLP's width, with a head of attention beside it in "amlp".
    """
    if kind not in MIXERS:
        return spec.hidden_size
    return (ffn_width(spec) + (2 * spec.gmlp_attn_dim if kind == "amlp" else 0)) // 2


def mixed_numbers(spec: ModelSpec, layer: int) -> float:
    """Return how many numbers of other tokens a token of a block takes in, of both products."""
    return 2 * mixing_width(spec, attention_types(spec)[layer]) * seen_keys(spec, layer)


def norm_parameters(spec: ModelSpec) -> int:
    """Return the parameters of one norm."""
    return sum(parameter.count for parameter in norm_inventory(spec))


def parameter_count(spec: ModelSpec, *, tensor_size: int = 1) -> int:
    """Return the parameters of the whole model, all ranks together, each counted once.

    Args:
        spec: the architecture.
        tensor_size: tensor-parallel ranks; the vocabulary is padded to divide by them.
    """
    vocabulary = spec.padded_vocab_size(tensor_size) * spec.hidden_size
    embeddings = vocabulary * (2 if spec.no_weight_tying else 1)
    embeddings += sum(parameter.count for parameter in position_inventory(spec))
    if spec.soft_prompt_tuning is not None:
        embeddings += spec.soft_prompt_tuning.n_tokens * spec.hidden_size
    blocks = sum(block_parameters(spec, *kind) for kind in block_kinds(spec))
    return embeddings + blocks + norm_parameters(spec)


def active_parameters(spec: ModelSpec, layer: int) -> int:
    """Return the parameters of a block that one token passes through."""
    kind, experts = block_kinds(spec)[layer]
    one = sum(parameter.count for parameter in expert_inventory(spec))
    idle = 0 if experts == 1 else (experts - spec.moe_top_k) * one
    return block_parameters(spec, kind, experts) - idle


def active_parameter_count(spec: ModelSpec, *, tensor_size: int = 1) -> int:
    """Return the parameters that one token passes through: of all experts, those it goes to.

    Args:
        spec: the architecture.
        tensor_size: tensor-parallel ranks, for the padding of the vocabulary.
    """
    idle = sum(
        block_parameters(spec, *kind) - active_parameters(spec, layer)
        for layer, kind in enumerate(block_kinds(spec))
    )
    return parameter_count(spec, tensor_size=tensor_size) - idle


def layer_names(spec: ModelSpec) -> list[str]:
    """Return the class names of the ``num_layers + 3`` layers of ``megatron.model.gpt.layers``.

    The last is the embedding once more where input and output weights are one.
    """
    last = "OutputLayer" if spec.no_weight_tying else "Embedding"
    blocks = [
        "GMLPTransformerBlock" if kind in MIXERS else "TransformerBlock"
        for kind in attention_types(spec)
    ]
    return ["Embedding", *blocks, "FinalNorm", last]


def layer_parameters(spec: ModelSpec, tensor_size: int = 1) -> list[int]:
    """Return the parameters that one tensor rank holds of each of the layers, in their order.

    A tied embedding counts in both its places: the first and the last stage of a pipeline each
    hold it.  (Where they are one stage it is there once; see :func:`held_parameters`.)

    Args:
        spec: the architecture.
        tensor_size: tensor-parallel ranks.

    Returns:
        ``num_layers + 3`` counts.
    """
    layers = layer_inventory(spec, tensor_size)
    return [sum(parameter.count for parameter in layer) for layer in layers]


def held_parameters(
    spec: ModelSpec, first: int, last: int, *, tensor_size: int = 1, expert_size: int = 1
) -> int:
    """Return the parameters that one tensor rank of a stage holds, each counted once.

    Args:
        spec: the architecture.
        first: number of the stage's first layer.
        last: number of the layer after its last.
        tensor_size: tensor-parallel ranks.
        expert_size: data ranks that share experts out.
    """
    held = stage_inventory(spec, first, last, tensor_size=tensor_size, expert_size=expert_size)
    return sum(parameter.count for parameter in held)


def block_matrices(spec: ModelSpec, kind: str = "global", experts: int = 1) -> int:
    """Return the numbers of a block that each multiply a number of every token.

    Of experts, as many count as a token goes to.
    """
    return sum(_matrices(spec, kind, experts))


def _matrices(spec: ModelSpec, kind: str, experts: int) -> tuple[int, int]:
    """Return those of them that are trained, and those that are frozen."""
    # Norms and biases multiply no matrix, and in a narrow model they are not few; a matrix over
    # positions mixes tokens and is counted with attention.
    held = block_inventory(spec, kind=kind, experts=experts)
    matrices = [one for one in held if one.decayed and one.name != SPATIAL]
    idle = 0.0 if experts == 1 else 1.0 - spec.moe_top_k / experts
    active = sum(one.count for one in matrices) - round(
        idle * sum(one.count for one in matrices if one.expert)
    )
    frozen = sum(one.count for one in matrices if not is_trained(spec, one))
    return active - frozen, frozen


def flops_per_token(spec: ModelSpec, *, causal: bool = True, tensor_size: int = 1) -> float:
    """Return the floating-point operations of one token's forward and backward pass.

    ``6·N + 6·V·h + 12·h·Σk`` with N the parameters of the blocks' matrices, V the padded
    vocabulary and k the keys that a query of a block sees on average, s / 2 where it sees all
    before it (Narayanan et al. 2021, appendix, in the causal form; fewer with windows and sparse
    patterns, see :func:`~megatron.model.seen_keys.seen_keys`).  These are the operations that the
    model needs: recomputed activations, and scores that a kernel computes and masks, do not count.
    A frozen matrix costs 4 instead of 6: its own gradient is not taken.

    Args:
        spec: the architecture.
        causal: count only the half of attention that the mask leaves; otherwise as much again.
        tensor_size: tensor-parallel ranks, for the padding of the vocabulary.
    """
    trained, frozen, mixed = _multiplied(spec, tensor_size)
    return 6.0 * (trained + mixed * (1 if causal else 2)) + 4.0 * frozen


def training_flops(spec: ModelSpec, tokens: float, *, causal: bool = True) -> float:
    """Return the operations of forward and backward passes over so many tokens.

    Args:
        spec: the architecture; its ``seq_length`` decides attention's share.
        tokens: trained on, in samples of ``seq_length``.
        causal: count only the half of attention that the mask leaves.
    """
    return tokens * flops_per_token(spec, causal=causal)


def forward_flops(spec: ModelSpec, tokens: float, *, causal: bool = True) -> float:
    """Return the operations of forward passes alone: validation, a reference, scoring."""
    trained, frozen, mixed = _multiplied(spec, 1)
    return tokens * 2.0 * (trained + frozen + mixed * (1 if causal else 2))


def _multiplied(spec: ModelSpec, tensor_size: int) -> tuple[float, float, float]:
    """Return the multiplications of a token with trained, frozen and other tokens' numbers."""
    blocks = [_matrices(spec, *kind) for kind in block_kinds(spec)]
    trained, frozen = float(sum(one for one, _ in blocks)), float(sum(one for _, one in blocks))
    head = spec.padded_vocab_size(tensor_size) * spec.hidden_size
    mixed = sum(mixed_numbers(spec, layer) for layer in range(spec.num_layers))
    if spec.lora is not None or spec.soft_prompt_tuning is not None:
        return trained, frozen + head, mixed
    return trained + head, frozen, mixed
