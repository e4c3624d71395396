"""Which model of the transformers library computes what a model of ours computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.config import ModelConfig
from megatron.errors import ConfigError
from megatron.training.compatible import NOT_ARCHITECTURE

_PLAIN = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "mish": "mish",
}
# What the gate goes through.
_GATED = {
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "glu": "sigmoid",
    "bilinear": "linear",
}
_SIZES = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_kv_heads",
        "vocab_size",
        "seq_length",
        "max_position_embeddings",
        "intermediate_size",
        "activation",
        "norm",
        "pos_emb",
        "rotary_emb_base",
        "no_weight_tying",
    }
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A causal language model of the transformers library.

    Attributes:
        name: what ``--architecture`` calls it.
        model_type: its name in ``config.json``.
        class_name: the class that ``AutoModelForCausalLM`` makes.
        norm: the norm that it has.
        activations: its ``hidden_act`` by our ``activation``.
        understood: keys of ours that it has a counterpart of, beside the sizes.
        unused: keys that a model with this norm does not read.
        fixed: what keys must be that are otherwise by default in ours.
    """

    name: str
    model_type: str
    class_name: str
    norm: str
    activations: dict[str, str] = field(repr=False)
    understood: frozenset[str] = field(repr=False)
    unused: frozenset[str] = field(repr=False)
    fixed: dict[str, bool | str] = field(default_factory=dict, repr=False)


NEOX = Architecture(
    name="neox",
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    norm="layernorm",
    activations=_PLAIN,
    understood=frozenset(
        {
            "layernorm_epsilon",
            "rotary_pct",
            "gpt_j_residual",
            "use_bias_in_attn_linear",
            "use_bias_in_mlp",
            "use_bias_in_norms",
        }
    ),
    unused=frozenset({"rms_norm_epsilon", "rms_norm_epsilon_outside_root", "scalenorm_epsilon"}),
)
_RMS_UNUSED = frozenset({"layernorm_epsilon", "scalenorm_epsilon", "use_bias_in_norms"})
LLAMA = Architecture(
    name="llama",
    model_type="llama",
    class_name="LlamaForCausalLM",
    norm="rmsnorm",
    activations=_GATED,
    understood=frozenset({"rms_norm_epsilon", "use_bias_in_attn_linear", "use_bias_in_mlp"}),
    unused=_RMS_UNUSED,
)
MISTRAL = Architecture(
    name="mistral",
    model_type="mistral",
    class_name="MistralForCausalLM",
    norm="rmsnorm",
    activations=_GATED,
    understood=frozenset({"rms_norm_epsilon", "sliding_window_width"}),
    unused=_RMS_UNUSED,
    fixed={"use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
)
MIXTRAL = Architecture(
    name="mixtral",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    norm="rmsnorm",
    activations=_GATED,
    understood=frozenset(
        {"rms_norm_epsilon", "sliding_window_width", "moe_num_experts", "moe_top_k"}
    ),
    unused=_RMS_UNUSED,
    fixed={
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "moe_router_type": "topk",
        "moe_normalize_expert_weights": True,
    },
)
ARCHITECTURES = {one.name: one for one in (NEOX, LLAMA, MISTRAL, MIXTRAL)}
"""Every architecture by its name, in the order in which ``auto`` tries them."""


def choose_architecture(model: ModelConfig, name: str = "auto") -> Architecture:
    """Return the architecture that a model is written as.

    Args:
        model: the model.
        name: of :data:`ARCHITECTURES`, or ``"auto"`` for the first that can express it.

    Raises:
        ConfigError: it cannot be expressed; with every key that stands in the way.
    """
    if name != "auto":
        one = ARCHITECTURES[name]
        if problems := obstacles(model, one):
            raise ConfigError(_refusal(one, problems))
        return one
    found = {one.name: obstacles(model, one) for one in ARCHITECTURES.values()}
    for key, problems in found.items():
        if not problems:
            return ARCHITECTURES[key]
    # The family that the model is of says what is in the way; others lack more.
    nearest = min(
        ARCHITECTURES.values(), key=lambda one: (one.norm != model.norm, len(found[one.name]))
    )
    raise ConfigError(_refusal(nearest, found[nearest.name]))


def obstacles(model: ModelConfig, architecture: Architecture) -> list[str]:
    """Return what of a model an architecture has no counterpart of, as ``key: value (reason)``."""
    found: dict[str, str] = {}
    if model.norm != architecture.norm:
        found["norm"] = f"it has {architecture.norm}"
    if model.activation not in architecture.activations:
        found["activation"] = f"it has one of {', '.join(architecture.activations)}"
    positions = ("rotary", "none") if architecture is NEOX else ("rotary",)
    if model.pos_emb not in positions:
        found["pos_emb"] = "it has rotary positions"
    # Whatever else is not as it is where nobody asked for it has no counterpart: a key that is
    # new is refused until somebody says here what becomes of it.
    known = _SIZES | architecture.understood
    given = model.model_dump()
    taken = {key: given[key] for key in known if given.get(key) is not None}
    if architecture is MIXTRAL:
        if model.moe_num_experts < 2:
            found["moe_num_experts"] = "it has two or more"
        elif model.moe_top_k < 2:
            found["moe_top_k"] = "its weights of experts sum to 1, so that it takes two or more"
            taken["moe_top_k"] = 2
    elif model.moe_num_experts < 2:
        known |= {key for key in given if key.startswith("moe_")}
    plain = ModelConfig(**{**taken, **architecture.fixed, "pos_emb": "none"}).model_dump()
    for key, value in plain.items():
        if key not in known | architecture.unused | NOT_ARCHITECTURE and given[key] != value:
            found.setdefault(key, f"it has {_spelt(value)}")
    return [f"{key}: {_spelt(given[key])} ({reason})" for key, reason in found.items()]


def _refusal(architecture: Architecture, problems: list[str]) -> str:
    return (
        f"{architecture.class_name} of transformers cannot express this model: "
        f"{'; '.join(problems)}. Models are exchanged as {', '.join(ARCHITECTURES)} "
        "(--architecture)"
    )


def _spelt(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
