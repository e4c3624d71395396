"""The GPT-NeoX architecture as one list of layers, and the loss that knows domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.model.accounting import flops_per_token, parameter_count
    from megatron.model.domain_loss import DomainLoss
    from megatron.model.gpt import GPT, LayerDescription, layers, param_groups

__all__ = [
    "GPT",
    "DomainLoss",
    "LayerDescription",
    "flops_per_token",
    "layers",
    "param_groups",
    "parameter_count",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that counting parameters needs no torch."""
    import importlib

    homes = {
        "flops_per_token": "accounting",
        "parameter_count": "accounting",
        "DomainLoss": "domain_loss",
    }
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{homes.get(name, 'gpt')}")
    return getattr(home, name)
