"""What the keys of a mixture of experts must agree in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.config.base import invalid

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

_SWITCH = 0.01  # Fedus et al. 2022, section 2.2


def balance_coefficient(model: ModelConfig) -> float | None:
    """Return the factor of the balancing loss; None where there are no experts."""
    if model.moe_num_experts <= 1 or model.moe_loss_coeff is not None:
        return model.moe_loss_coeff
    return _SWITCH if model.moe_router_type == "topk" else 0.0


def check_experts(model: ModelConfig) -> None:
    """Refuse a mixture of experts that cannot be.

    Raises:
        PydanticCustomError: naming the key.
    """
    experts = model.moe_num_experts
    if experts <= 1:
        return
    if model.moe_top_k > experts:
        raise invalid("moe_top_k", f"is above moe_num_experts ({experts}); use at most that")
    if model.moe_normalize_expert_weights and model.moe_top_k == 1:
        raise invalid(
            "moe_normalize_expert_weights",
            "with moe_top_k 1 would give every expert weight 1, and the router would learn "
            "nothing; use moe_top_k: 2 or more, or false",
        )
    if model.use_mup:
        raise invalid("moe_num_experts", "does not go with use_mup; use 1, or use_mup: false")
    if model.mixers:
        raise invalid(
            "moe_num_experts",
            f"does not go with {' and '.join(model.mixers)} in attention_config, whose blocks "
            "have no MLP of their own; use 1, or other kinds",
        )
