"""What maximal update parametrisation (``use_mup``) needs of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.config.base import invalid

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


def check_mup(model: ModelConfig) -> None:
    """Refuse a parametrisation by width that is not worked out.

    Raises:
        PydanticCustomError: naming the key.
    """
    if not model.use_mup:
        return
    if model.mup_base_hidden_size is None:
        raise invalid("use_mup", "needs mup_base_hidden_size, the hidden_size of the base model")
    if model.mixers:
        raise invalid("use_mup", "is not worked out for gmlp and amlp blocks")
    for field in ("init_method", "output_layer_init_method"):
        method = getattr(model, field)
        if method.startswith("xavier") or method.endswith("orthogonal"):
            raise invalid(field, "has no scale for use_mup to set; use normal or small_init")
