"""How a configuration arranges the ranks of a job, and its layers.  No torch in here."""

from __future__ import annotations

from itertools import pairwise

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.model.accounting import layer_names, layer_parameters
from megatron.model.spec import block_experts
from megatron.parallel.layout import Layout
from megatron.parallel.stages import layer_weights, stage_bounds


def run_layout(config: Config, world_size: int) -> Layout:
    """Arrange ``world_size`` ranks as the configuration asks.

    Raises:
        ConfigError: they cannot be arranged so.
    """
    parallel = config.parallel
    return Layout(
        world_size=world_size,
        tensor_size=parallel.model_parallel_size,
        pipe_size=parallel.stages,
        expert_size=parallel.moe_expert_parallel_size,
    )


def frozen_layout(config: Config, world_size: int) -> Layout:
    """Arrange ranks that only look at models, and hold all experts of what they look at.

    Raises:
        ConfigError: they cannot be arranged so.
    """
    alone = config.parallel.model_copy(update={"moe_expert_parallel_size": 1})
    return run_layout(config.model_copy(update={"parallel": alone}), world_size)


def layer_bounds(config: Config) -> list[int]:
    """Return the first layer of every pipeline stage, and the end of the last.

    Every stage holds a block.

    Args:
        config: with ``model.vocab_size`` filled in.

    Raises:
        ConfigError: ``pipe_partition_method`` names no layer, or too few, or a stage gets none of
            the experts that data ranks share out.
    """
    bounds = _bounds(config)
    shared = config.parallel.moe_expert_parallel_size > 1
    experts = [1, *block_experts(config.model), 1, 1]
    for stage, (first, last) in enumerate(pairwise(bounds)):
        if shared and max(experts[first:last]) == 1:
            # DeepSpeed adds up norms over the stages once for each group of parameters.
            raise ConfigError(
                f"moe_expert_parallel_size is {config.parallel.moe_expert_parallel_size}, and "
                f"stage {stage} of the pipeline has no block with experts; use fewer stages, a "
                "smaller moe_expert_interval, or moe_expert_parallel_size: 1"
            )
    return bounds


def _bounds(config: Config) -> list[int]:
    parallel, model = config.parallel, config.model
    names = layer_names(model)
    weights = layer_weights(
        parallel.pipe_partition_method,
        names=names,
        parameters=layer_parameters(model, parallel.model_parallel_size),
    )
    bounds = stage_bounds(weights, parallel.stages)
    blocks = range(1, model.num_layers + 1)
    if all(max(a, blocks.start) < min(b, blocks.stop) for a, b in pairwise(bounds)):
        return bounds
    # A large vocabulary would be a stage by itself.  It would have no parameter that is spared
    # weight decay, and DeepSpeed, which adds up gradient norms over the stages once for each
    # group of parameters, would wait forever.  So the ends go with the blocks beside them.
    joined = [
        sum(weights[: blocks.start + 1]),
        *weights[blocks.start + 1 : blocks.stop - 1],
        sum(weights[blocks.stop - 1 :]),
    ]
    inner = stage_bounds(joined, parallel.stages)[1:-1]
    return [0, *(bound + blocks.start for bound in inner), len(weights)]
