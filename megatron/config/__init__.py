"""Configuration: NeoX-style YAML in, typed groups out.

Needs pydantic and PyYAML, and neither torch nor DeepSpeed.
"""

from __future__ import annotations

from megatron.config.batch import BatchConfig, resolve_batch
from megatron.config.config import Config
from megatron.config.data import DomainConfig, split_shares
from megatron.config.deepspeed import deepspeed_config
from megatron.config.load import load_config
from megatron.config.mixing import MixingConfig
from megatron.config.model import ModelConfig
from megatron.config.optimisation import OptimizerConfig, ScheduleConfig
from megatron.config.run import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.config.system import LaunchConfig, ParallelConfig, TokenizerConfig, ZeroConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DomainConfig",
    "LaunchConfig",
    "LoggingConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ZeroConfig",
    "deepspeed_config",
    "load_config",
    "resolve_batch",
    "split_shares",
]
