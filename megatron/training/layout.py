"""How a configuration arranges the ranks of a job, and its layers.  No torch in here."""

from __future__ import annotations

from megatron.config import Config
from megatron.model.accounting import layer_names, layer_parameters
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
    )


def layer_bounds(config: Config) -> list[int]:
    """Return the first layer of every pipeline stage, and the end of the last.

    Args:
        config: with ``model.vocab_size`` filled in.

    Raises:
        ConfigError: ``pipe_partition_method`` names no layer, or too few.
    """
    parallel, model = config.parallel, config.model
    names = layer_names(model)
    weights = layer_weights(
        parallel.pipe_partition_method,
        names=names,
        parameters=layer_parameters(model, parallel.model_parallel_size),
    )
    return stage_bounds(weights, parallel.stages)
