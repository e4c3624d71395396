"""How many parameters a configuration has and what a token costs; needs no torch."""

from __future__ import annotations

from megatron.model.inventory import (
    block_inventory,
    layer_inventory,
    norm_inventory,
    stage_inventory,
)
from megatron.model.spec import ModelSpec


def block_parameters(spec: ModelSpec) -> int:
    """Return the parameters of one block."""
    return sum(parameter.count for parameter in block_inventory(spec))


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
    return embeddings + spec.num_layers * block_parameters(spec) + norm_parameters(spec)


def layer_names(spec: ModelSpec) -> list[str]:
    """Return the class names of the ``num_layers + 3`` layers of ``megatron.model.gpt.layers``.

    The last is the embedding once more where input and output weights are one.
    """
    last = "OutputLayer" if spec.no_weight_tying else "Embedding"
    return ["Embedding", *["TransformerBlock"] * spec.num_layers, "FinalNorm", last]


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
    # Norms and biases multiply no matrix, and in a narrow model they are not few.
    matrices = sum(parameter.count for parameter in block_inventory(spec) if parameter.decayed)
    blocks = spec.num_layers * matrices
    head = spec.padded_vocab_size(tensor_size) * spec.hidden_size
    length = spec.seq_length or 0
    attention = spec.num_layers * spec.hidden_size * length * (1 if causal else 2)
    return 6.0 * (blocks + head + attention)
