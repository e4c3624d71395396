"""The whole configuration of a run, as typed groups."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field

from megatron.config.base import Group
from megatron.config.batch import BatchConfig
from megatron.config.data import DEFAULT_SPLIT, DataConfig, DomainConfig, Domains, Split
from megatron.config.evaluation import EvaluationConfig, GenerationConfig
from megatron.config.mixing import MixingConfig
from megatron.config.model import ModelConfig
from megatron.config.optimisation import (
    LossScaleConfig,
    OptimizerConfig,
    Precision,
    ScheduleConfig,
)
from megatron.config.run import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.config.system import LaunchConfig, ParallelConfig, TokenizerConfig, ZeroConfig

# Groups whose fields a user writes as flat keys, in the order of the documentation.
FLAT_GROUPS: dict[str, type[Group]] = {
    "model": ModelConfig,
    "schedule": ScheduleConfig,
    "batch": BatchConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "tokenizer": TokenizerConfig,
    "parallel": ParallelConfig,
    "launch": LaunchConfig,
    "evaluation": EvaluationConfig,
    "generation": GenerationConfig,
}


class Config(Group):
    """Everything a run is told.

    Made by :func:`megatron.config.load_config`. A function takes the group that it needs,
    not the whole.
    """

    model: ModelConfig
    precision: Precision = "fp32"
    """Number format of the model: fp32, fp16 (with loss scaling) or bf16."""
    fp16: LossScaleConfig = Field(default_factory=LossScaleConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    batch: BatchConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    domains: Domains
    split: Split = DEFAULT_SPLIT
    """Shares of a domain's documents for train, valid and test, where the domain names no files
    of its own for valid or test."""
    data: DataConfig = Field(default_factory=DataConfig)
    mixing: MixingConfig = Field(default_factory=MixingConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """`deepspeed_extra_args`: merged last into DeepSpeed's own configuration."""
    ignored: tuple[str, ...] = ()
    """Known keys that were given and have no effect, each with the reason."""

    @property
    def trained(self) -> dict[str, DomainConfig]:
        """The domains that are trained on; the others are targets, which are only measured."""
        return {name: domain for name, domain in self.domains.items() if not domain.target}

    @property
    def gradient_clipping(self) -> float:
        """Largest norm of the whole gradient; 0 = no clipping."""
        return self.optimizer.gradient_clipping

    @property
    def run_dir(self) -> str:
        """Folder of the run."""
        return self.checkpoint.run_dir

    @property
    def log_dir(self) -> str:
        """Folder of the ranks' output files."""
        return self.logging.log_dir or f"{self.run_dir}/logs"

    @property
    def save_timeout(self) -> float:
        """Seconds that a stopped run may take to save."""
        return self.checkpoint.save_timeout

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that is run: 1 for 0, unless ``deepspeed_extra_args`` forces another."""
        stage = self._forced_zero.get("stage")
        return stage if isinstance(stage, int) else self.zero.effective_stage

    @property
    def zero_options(self) -> dict[str, Any]:
        """Options of ZeRO, those that ``deepspeed_extra_args`` forces among them."""
        return {**self.zero.options, **self._forced_zero}

    @property
    def _forced_zero(self) -> dict[str, Any]:
        forced = self.deepspeed.get("zero_optimization")
        return forced if isinstance(forced, dict) else {}

    def resolved_yaml(self) -> str:
        """Return the configuration as one file: every key with its value, and reloadable.

        Loading it gives a configuration equal to this one.
        """
        from megatron.config.dump import resolved_yaml

        return resolved_yaml(self)

    def hash(self) -> str:
        """Return a SHA-256 over everything that can change what is computed.

        Places, logging, launch and checkpoint cadence are left out: moving a run or logging
        more does not make it another run.
        """
        unrelated = ("launch", "logging", "checkpoint", "evaluation", "generation", "ignored")
        left_out = dict.fromkeys(unrelated, True)
        kept = self.model_dump(
            mode="json", exclude={**left_out, "training": {"state_check_interval"}}
        )
        text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
