"""Which layers of a block get a low-rank update, and that nothing else is trained beside them."""

from __future__ import annotations

from typing import Final

from torch import nn

from megatron.model.dropout import Dropout
from megatron.model.spec import ModelSpec
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.lora import ColumnLowRank, LowRank, RowLowRank
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng

PLACES: Final = {
    "query_key_value": "attention",
    "dense": "attention",
    "dense_h_to_4h": "mlp",
    "dense_4h_to_h": "mlp",
}
"""Where in a block the layers are that can have an update."""


def attach_lora(
    block: nn.Module, scope: ParameterScope, spec: ModelSpec, *, layer: int, dropout: DropoutRng
) -> None:
    """Give a block's layers the updates that the specification asks for.

    Args:
        block: with ``attention`` and ``mlp``.
        scope: the block's.
        spec: the architecture.
        layer: the block's number, from 0.
        dropout: source of masks for the updates' inputs.
    """
    if spec.lora is None:
        return
    for target in spec.lora.targets:
        place = PLACES[target]
        linear = block.get_submodule(f"{place}.{target}")
        assert isinstance(linear, ColumnParallelLinear | RowParallelLinear)
        linear.lora = _update(
            scope.child(place).child(target).child("lora"), spec, linear, target, layer, dropout
        )


def _update(
    scope: ParameterScope,
    spec: ModelSpec,
    linear: ColumnParallelLinear | RowParallelLinear,
    target: str,
    layer: int,
    rng: DropoutRng,
) -> LowRank:
    settings = spec.lora
    assert settings is not None
    by_column = isinstance(linear, ColumnParallelLinear)
    dropping = Dropout(
        rate=settings.dropout,
        layer=layer,
        place=f"lora.{target}",
        rng=rng,
        divided=not by_column and scope.topology.tensor_size > 1,
    )
    rank, scale = settings.rank, settings.alpha / settings.rank
    blocks = getattr(linear.weight, "partition").blocks  # noqa: B009
    if by_column:
        inputs = linear.weight.shape[1]
        return ColumnLowRank(
            scope, inputs=inputs, outputs=blocks, rank=rank, scale=scale, dropping=dropping
        )
    return RowLowRank(
        scope,
        inputs=sum(blocks),
        outputs=linear.weight.shape[0],
        rank=rank,
        scale=scale,
        dropping=dropping,
    )


def freeze_all_but_lora(model: nn.Module) -> None:
    """Let nothing of a model, or of a pipeline's stage, be trained but the updates."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.requires_grad_(True)
