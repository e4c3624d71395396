"""The dictionary that ``deepspeed.initialize`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.config import Config
from megatron.errors import ConfigError


def deepspeed_config(
    config: Config, micro: int, accumulation: int, data_size: int
) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    Optimizer and schedule are not in it: the optimizer is handed over as an object, and the
    engine sets the learning rate. ``deepspeed_extra_args`` is merged last, block by block.

    Args:
        config: the configuration of the run.
        micro: samples per data rank and micro-batch.
        accumulation: micro-batches per optimizer step.
        data_size: number of data-parallel ranks.
    """
    result: dict[str, Any] = {
        "train_batch_size": micro * accumulation * data_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {**config.zero.options, "stage": config.zero.effective_stage},
        "zero_allow_untested_optimizer": True,
        # Offloaded state is updated by torch's optimizer too: DeepSpeed's would be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": float("inf"),
        "wall_clock_breakdown": False,
        # Its timer waits for the device twice a step, for a report that nobody reads.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision == "fp16":
        result["fp16"] = {"enabled": True, **config.fp16.model_dump()}
    elif config.precision == "bf16":
        result["bf16"] = {"enabled": True}
    if config.parallel.communication_data_type is not None:
        result["communication_data_type"] = config.parallel.communication_data_type
    if config.parallel.divides_before_sum:
        _check_division(config, data_size)
        result["prescale_gradients"] = config.parallel.prescale_gradients
        result["gradient_predivide_factor"] = config.parallel.gradient_predivide_factor
        # Where each rank receives its own part alone, DeepSpeed divides after the sum.
        result["zero_optimization"]["reduce_scatter"] = False
    if (log := config.logging.comms_logger) is not None and log.enabled:
        result["comms_logger"] = log.model_dump(mode="json")
    if config.parallel.sequence_parallel:
        # By default a stage takes activations to be the same on every tensor rank, and each
        # rank sends a part of them.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return _merged(result, config.deepspeed)


def _check_division(config: Config, data_size: int) -> None:
    """Refuse what DeepSpeed computes wrongly.

    Raises:
        ConfigError: naming the key.
    """
    factor = config.parallel.gradient_predivide_factor
    if config.zero_stage == 3 and not config.parallel.prescale_gradients and factor == data_size:
        raise ConfigError(
            f"gradient_predivide_factor ({factor:g}) is the number of data ranks, for which "
            "DeepSpeed's ZeRO 3 divides once too often; use prescale_gradients: true, which "
            "divides by the same before the sum"
        )


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        present = result.get(key)
        both = isinstance(present, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(present, value) if both else value  # type: ignore[arg-type]
    return result
