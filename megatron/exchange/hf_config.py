"""``config.json`` of a Hugging Face folder from a model of ours, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.exchange.architecture import (
    ARCHITECTURES,
    MISTRAL,
    MIXTRAL,
    NEOX,
    Architecture,
)
from megatron.exchange.libraries import transformers

_GELU_TANH = ("gelu_pytorch_tanh", "gelu_fast", "gelu_new", "gelu_accurate", "gelu_python_tanh")
_SYNONYMS = {
    **dict.fromkeys(_GELU_TANH, "gelu_pytorch_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}


def hf_config(
    model: ModelConfig,
    architecture: Architecture,
    *,
    dtype: str = "float32",
    eod: int | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Rotary settings are given in both spellings, of transformers 4 and 5.

    Args:
        model: one that the architecture can express.
        architecture: what it is written as.
        dtype: torch's name of the weights' type.
        eod: token that ends a document (both beginning and end of a sequence there).
        pad: token that fills up batches.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_emb_base}
    content: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "hidden_act": architecture.activations[model.activation],
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": min(model.init_method_std, 1.0),
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.no_weight_tying,
        "use_cache": True,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if architecture is NEOX:
        share = model.rotary_pct if model.pos_emb == "rotary" else 0.0
        content |= {
            "hidden_dropout": model.hidden_dropout,
            "classifier_dropout": 0.1,
            "layer_norm_eps": model.layernorm_epsilon,
            "use_parallel_residual": model.gpt_j_residual,
            "attention_bias": model.use_bias_in_attn_linear,
            "rotary_pct": share,
            "rotary_emb_base": model.rotary_emb_base,
            "rope_parameters": {**rope, "partial_rotary_factor": share},
        }
        return content
    content |= {
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "rms_norm_eps": model.rms_norm_epsilon,
        "rope_theta": model.rotary_emb_base,
        "rope_parameters": rope,
    }
    if architecture is MIXTRAL:
        content |= {
            "num_local_experts": model.moe_num_experts,
            "num_experts_per_tok": model.moe_top_k,
            "router_aux_loss_coef": model.moe_loss_coeff,
            "router_jitter_noise": model.moe_jitter_eps or 0.0,
        }
    if architecture in (MISTRAL, MIXTRAL):
        # Theirs counts the token itself, ours those before it.
        width = model.sliding_window_width
        content["sliding_window"] = None if width is None else width + 1
    else:
        content["attention_bias"] = model.use_bias_in_attn_linear
        content["mlp_bias"] = model.use_bias_in_mlp
    return content


def generation_config(*, eod: int | None, pad: int | None) -> dict[str, Any]:
    """Return the content of ``generation_config.json``."""
    ids = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": pad}
    return {"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}}


def read_config(folder: Path) -> Any:
    """Return the configuration object of a local Hugging Face folder; runs no code of it.

    Raises:
        CheckpointError: it has none, or one that transformers does not know.
    """
    library = transformers("reading a Hugging Face folder")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error}") from error
    if kind not in {one.model_type for one in ARCHITECTURES.values()}:
        known = ", ".join(one.model_type for one in ARCHITECTURES.values())
        raise CheckpointError(
            f"{folder} is a model of type {kind!r}; of these can be read: {known}"
        )
    try:
        return library.CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:  # whatever its own checks raise
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a configuration object."""
    return next(one for one in ARCHITECTURES.values() if one.model_type == config.model_type)


def model_keys(config: Any, folder: Path) -> dict[str, Any]:
    """Return our keys of the model that a configuration object describes.

    Args:
        config: of :func:`read_config`.
        folder: where it was read, for messages.

    Raises:
        CheckpointError: it describes what no model of ours computes, by key.
    """
    one = architecture_of(config)
    rope = _rope(config, folder)
    act = _SYNONYMS.get(config.hidden_act, config.hidden_act)
    ours = {value: key for key, value in reversed(one.activations.items())}
    if act not in ours:
        raise _strange(folder, "hidden_act", config.hidden_act, f"one of {', '.join(ours)}")
    if config.hidden_size % config.num_attention_heads:
        raise _strange(folder, "hidden_size", config.hidden_size, "a multiple of the heads")
    keys: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "activation": "silu" if one is NEOX and act == "silu" else ours[act],
        "norm": one.norm,
        "rotary_emb_base": float(rope["rope_theta"]),
        "no_weight_tying": not config.tie_word_embeddings,
        "attention_dropout": float(config.attention_dropout or 0.0),
        "init_method_std": float(config.initializer_range),
    }
    if one is NEOX:
        share = float(rope.get("partial_rotary_factor", 1.0))
        keys |= {
            "layernorm_epsilon": config.layer_norm_eps,
            "gpt_j_residual": config.use_parallel_residual,
            "use_bias_in_attn_linear": config.attention_bias,
            "hidden_dropout": float(config.hidden_dropout),
            **({"pos_emb": "rotary", "rotary_pct": share} if share else {"pos_emb": "none"}),
        }
        return keys
    size = config.hidden_size // config.num_attention_heads
    if (config.head_dim or size) != size:
        raise _strange(folder, "head_dim", config.head_dim, f"{size} (hidden_size / heads)")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _strange(folder, "partial_rotary_factor", share, "1.0")
    keys |= {
        "num_kv_heads": config.num_key_value_heads,
        "rms_norm_epsilon": config.rms_norm_eps,
        "pos_emb": "rotary",
        "use_bias_in_attn_linear": bool(getattr(config, "attention_bias", False)),
        "use_bias_in_mlp": bool(getattr(config, "mlp_bias", False)),
    }
    window = getattr(config, "sliding_window", None)
    if one is MIXTRAL:
        keys |= {
            "moe_num_experts": config.num_local_experts,
            "moe_top_k": config.num_experts_per_tok,
            "moe_router_type": "topk",
            "moe_normalize_expert_weights": True,
            "moe_loss_coeff": float(config.router_aux_loss_coef),
            "moe_jitter_eps": float(config.router_jitter_noise) or None,
        }
    if one in (MISTRAL, MIXTRAL) and window is not None and window < config.max_position_embeddings:
        if window < 2:
            raise _strange(folder, "sliding_window", window, "2 or more, or null")
        keys["sliding_window_width"] = window - 1
    return keys


def model_config(keys: Mapping[str, Any], folder: Path) -> ModelConfig:
    """Return a model of ours from its keys.

    Raises:
        CheckpointError: sizes do not fit each other.
    """
    try:
        return ModelConfig(**keys)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or str(first.get("ctx", {}).get("field", "model"))
        raise CheckpointError(f"{folder}: {where}: {first['msg']}") from error


def _rope(config: Any, folder: Path) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise _strange(folder, "rope_scaling", rope["rope_type"], "none: plain rotary positions")
    return rope


def _strange(folder: Path, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'config.json'}: {key} is {value!r}, which no model here computes; it must be "
        f"{wanted}"
    )
