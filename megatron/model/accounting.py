"""How many parameters a configuration has and what a token costs; needs no torch."""

from __future__ import annotations

from megatron.model.inventory import (
    SPATIAL,
    block_inventory,
    layer_inventory,
    norm_inventory,
    position_inventory,
    stage_inventory,
)
from megatron.model.spec import MIXERS, ModelSpec, attention_types, ffn_width


def block_parameters(spec: ModelSpec, kind: str = "global") -> int:
    """Return the parameters of one block with attention of a kind."""
    return sum(parameter.count for parameter in block_inventory(spec, kind=kind))


def mixing_width(spec: ModelSpec, kind: str) -> int:
    """Return how many numbers a token takes from each one before it, in a block of a kind.

    Scores and sums of attention are two products of width h each; a spatial gating unit is one
    product of the MLP's width, with a head of attention beside it in "amlp".
    """
    if kind not in MIXERS:
        return spec.hidden_size
    return (ffn_width(spec) + (2 * spec.gmlp_attn_dim if kind == "amlp" else 0)) // 2


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
    blocks = sum(block_parameters(spec, kind) for kind in attention_types(spec))
    return embeddings + blocks + norm_parameters(spec)


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


def held_parameters(spec: ModelSpec, first: int, last: int, *, tensor_size: int = 1) -> int:
    """Return the parameters that one tensor rank of a stage holds, each counted once.

    Args:
        spec: the architecture.
        first: number of the stage's first layer.
        last: number of the layer after its last.
        tensor_size: tensor-parallel ranks.
    """
    held = stage_inventory(spec, first, last, tensor_size=tensor_size)
    return sum(parameter.count for parameter in held)


def block_matrices(spec: ModelSpec, kind: str = "global") -> int:
    """Return the numbers of a block that each multiply a number of every token."""
    # Norms and biases multiply no matrix, and in a narrow model they are not few; a matrix over
    # positions mixes tokens and is counted with attention.
    return sum(
        parameter.count
        for parameter in block_inventory(spec, kind=kind)
        if parameter.decayed and parameter.name != SPATIAL
    )


def flops_per_token(spec: ModelSpec, *, causal: bool = True, tensor_size: int = 1) -> float:
    """Return the floating-point operations of one token's forward and backward pass.

    ``6·N + 6·V·h + 6·L·h·s`` with N the parameters of the blocks' matrices, V the padded
    vocabulary, s the sequence length (Narayanan et al. 2021, appendix, in the causal form;
    recomputed activations are not counted).

    Args:
        spec: the architecture.
        causal: count only the half of attention that the mask leaves; otherwise all of it.
        tensor_size: tensor-parallel ranks, for the padding of the vocabulary.
    """
    kinds = attention_types(spec)
    blocks = sum(block_matrices(spec, kind) for kind in kinds)
    head = spec.padded_vocab_size(tensor_size) * spec.hidden_size
    length = spec.seq_length or 0
    mixed = sum(mixing_width(spec, kind) for kind in kinds)
    attention = mixed * length * (1 if causal else 2)
    return 6.0 * (blocks + head + attention)
