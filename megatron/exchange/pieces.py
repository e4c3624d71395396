"""Which parameter of ours is which of transformers', and how the one is made of the other.

A piece works in both directions and on "meta" tensors, so shapes are known before any weight
is read.  Names and forms: ours are GPT-NeoX's, ``query_key_value`` as ``[heads, 3, head_size]``
or, where heads share keys and values, as ``[queries | keys | values]``; gated MLPs as
``[up | gate]``.  Rotary positions pair the same components in both, so nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.exchange.architecture import NEOX, Architecture

Tensors = tuple[torch.Tensor, ...]


def _same(tensor: torch.Tensor) -> Tensors:
    return (tensor,)


def _only(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One parameter of ours and what it is in a Hugging Face folder.

    Attributes:
        ours: its global name; None for one that we leave out because it is all zeros.
        theirs: names there.
        shape: of a parameter that is left out.
        split: makes theirs of ours.
        join: makes ours of theirs.
    """

    ours: str | None
    theirs: tuple[str, ...]
    shape: tuple[int, ...] = ()
    split: Callable[[torch.Tensor], Tensors] = field(default=_same, repr=False)
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] = field(default=_only, repr=False)


def pieces(model: ModelConfig, architecture: Architecture) -> list[Piece]:
    """Return every parameter of a model, in the order of its layers.

    Args:
        model: one that the architecture can express.
        architecture: what it is written as.
    """
    layers, body = model.num_layers, "gpt_neox" if architecture is NEOX else "model"
    tied = not model.no_weight_tying
    embedding = ("tied_modules.embed" if tied else "0") + ".word_embeddings.weight"
    into, norm, out = (
        ("embed_in", "final_layer_norm", "embed_out")
        if architecture is NEOX
        else ("embed_tokens", "norm", "lm_head")
    )
    found = [Piece(ours=embedding, theirs=(f"{body}.{into}.weight",))]
    block = _neox_block if architecture is NEOX else _llama_block
    for layer in range(layers):
        found += block(model, f"{layer + 1}", f"{body}.layers.{layer}")
    found += _norm(model, f"{layers + 1}.norm", f"{body}.{norm}")
    if not tied:
        found.append(Piece(ours=f"{layers + 2}.final_linear.weight", theirs=(f"{out}.weight",)))
    return found


def _neox_block(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    hidden, width = model.hidden_size, model.intermediate_size or 4 * model.hidden_size
    found = _norm(model, f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
    kinds = ("weight", "bias") if model.use_bias_in_attn_linear else ("weight",)
    for kind in kinds:
        name = f"attention.query_key_value.{kind}"
        split, join = _same, _only
        if model.num_kv_heads != model.num_attention_heads:
            split, join = partial(_repeated, model), partial(_shared, model, f"{ours}.{name}")
        found.append(
            Piece(ours=f"{ours}.{name}", theirs=(f"{theirs}.{name}",), split=split, join=join)
        )
    found += _linear(f"{ours}.attention.dense", f"{theirs}.attention.dense", kinds)
    name = "post_attention_layernorm"
    found += _norm(model, f"{ours}.{name}", f"{theirs}.{name}")
    for name, size in (("mlp.dense_h_to_4h", width), ("mlp.dense_4h_to_h", hidden)):
        found += _linear(f"{ours}.{name}", f"{theirs}.{name}", ("weight",))
        biased = model.use_bias_in_mlp
        found.append(_maybe(f"{ours}.{name}.bias", f"{theirs}.{name}.bias", biased, size))
    return found


def _llama_block(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    attention = ("weight", "bias") if model.use_bias_in_attn_linear else ("weight",)
    mlp = ("weight", "bias") if model.use_bias_in_mlp else ("weight",)
    found = _norm(model, f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
    found += [
        Piece(
            ours=f"{ours}.attention.query_key_value.{kind}",
            theirs=tuple(f"{theirs}.self_attn.{one}_proj.{kind}" for one in "qkv"),
            split=partial(_split_heads, model),
            join=partial(_join_heads, model),
        )
        for kind in attention
    ]
    found += _linear(f"{ours}.attention.dense", f"{theirs}.self_attn.o_proj", attention)
    name = "post_attention_layernorm"
    found += _norm(model, f"{ours}.{name}", f"{theirs}.{name}")
    if model.moe_num_experts > 1:
        return found + _experts(model, f"{ours}.mlp", f"{theirs}.block_sparse_moe")
    found += [
        Piece(
            ours=f"{ours}.mlp.dense_h_to_4h.{kind}",
            theirs=(f"{theirs}.mlp.up_proj.{kind}", f"{theirs}.mlp.gate_proj.{kind}"),
            split=_halves,
            join=_joined,
        )
        for kind in mlp
    ]
    return found + _linear(f"{ours}.mlp.dense_4h_to_h", f"{theirs}.mlp.down_proj", mlp)


def _experts(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    """Return router and experts by the names that files of Mixtral have."""
    found = [Piece(ours=f"{ours}.router.weight", theirs=(f"{theirs}.gate.weight",))]
    for number in range(model.moe_num_experts):
        own, other = f"{ours}.experts.{number}", f"{theirs}.experts.{number}"
        found += [
            Piece(
                ours=f"{own}.dense_h_to_4h.weight",
                theirs=(f"{other}.w3.weight", f"{other}.w1.weight"),
                split=_halves,
                join=_joined,
            ),
            Piece(ours=f"{own}.dense_4h_to_h.weight", theirs=(f"{other}.w2.weight",)),
        ]
    return found


def _linear(ours: str, theirs: str, kinds: Sequence[str]) -> list[Piece]:
    return [Piece(ours=f"{ours}.{kind}", theirs=(f"{theirs}.{kind}",)) for kind in kinds]


def _norm(model: ModelConfig, ours: str, theirs: str) -> list[Piece]:
    if model.norm == "rmsnorm":
        return [Piece(ours=f"{ours}.scale", theirs=(f"{theirs}.weight",))]
    return [
        Piece(ours=f"{ours}.weight", theirs=(f"{theirs}.weight",)),
        _maybe(f"{ours}.bias", f"{theirs}.bias", model.use_bias_in_norms, model.hidden_size),
    ]


def _maybe(ours: str, theirs: str, there: bool, size: int) -> Piece:
    return Piece(ours=ours if there else None, theirs=(theirs,), shape=(size,))


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors))


def _halves(tensor: torch.Tensor) -> Tensors:
    return tensor.chunk(2)


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    kv = model.num_kv_heads or model.num_attention_heads
    return model.num_attention_heads, kv, model.head_size


def _split_heads(model: ModelConfig, fused: torch.Tensor) -> Tensors:
    """Return queries, keys and values of a fused weight or bias."""
    heads, kv, size = _heads(model)
    if heads != kv:
        return tuple(torch.split(fused, [heads * size, kv * size, kv * size]))
    by_head = fused.view(heads, 3, size, *fused.shape[1:])
    return tuple(by_head[:, one].reshape(heads * size, *fused.shape[1:]) for one in range(3))


def _join_heads(model: ModelConfig, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    heads, kv, size = _heads(model)
    if heads != kv:
        return torch.cat(tuple(parts))
    by_head = [part.view(heads, size, *part.shape[1:]) for part in parts]
    return torch.stack(by_head, dim=1).reshape(3 * heads * size, *parts[0].shape[1:])


def _repeated(model: ModelConfig, fused: torch.Tensor) -> Tensors:
    """Give every head keys and values of its own: copies of those that it shared."""
    heads, kv, size = _heads(model)
    query, key, value = torch.split(fused, [heads * size, kv * size, kv * size])
    rest = fused.shape[1:]
    each = [
        query.view(heads, size, *rest),
        *(one.view(kv, size, *rest).repeat_interleave(heads // kv, 0) for one in (key, value)),
    ]
    return (torch.stack(each, dim=1).reshape(3 * heads * size, *rest),)


def _shared(model: ModelConfig, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Take one of the copies that :func:`_repeated` made."""
    heads, kv, size = _heads(model)
    rest = parts[0].shape[1:]
    by_head = parts[0].view(kv, heads // kv, 3, size, *rest)
    fused = torch.cat(
        [
            by_head[:, :, 0].reshape(heads * size, *rest),
            *(by_head[:, 0, one].reshape(kv * size, *rest) for one in (1, 2)),
        ]
    )
    if not torch.equal(_repeated(model, fused)[0], parts[0]):
        raise CheckpointError(
            f"{name}: heads that shared keys and values have them no longer (the model was trained "
            "on after its export); remove neomix.json from the folder, and every head gets its own"
        )
    return fused
