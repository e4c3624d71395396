"""What a run measures of its parameters and gradients, as its configuration asks."""

from __future__ import annotations

import torch

from megatron.config import Config
from megatron.engine.engine import TrainEngine
from megatron.engine.expert_load import ExpertLoads
from megatron.engine.noise_scale import GradientNoiseScale
from megatron.engine.statistics import ParameterStatistics
from megatron.errors import ConfigError
from megatron.model.gpt import GPT
from megatron.model.spec import block_experts
from megatron.monitor.record import is_logged
from megatron.parallel.topology import Topology
from megatron.training.engines import Batch


def attach_statistics(
    config: Config,
    engine: TrainEngine,
    topology: Topology,
    batch: Batch,
    device: torch.device,
) -> None:
    """Let an engine measure what ``log_…`` keys ask for, and the load of experts.

    Args:
        config: with ``model.vocab_size`` filled in.
        engine: newly built.
        topology: this rank's place.
        batch: sizes.
        device: of the model.

    Raises:
        ConfigError: the batch is one micro-batch, which has no noise scale.
    """
    interval = config.logging.log_interval

    def logged(step: int) -> bool:
        return is_logged(step, interval)

    def counts(name: str) -> bool:
        # Of what tensor ranks hold alike the first counts, of tied weights the first stage.
        if engine.partitions.get(name) is None and topology.tensor_rank > 0:
            return False
        return topology.is_first_stage or not name.startswith("tied_modules.")

    experts = block_experts(config.model)
    if max(experts) > 1:
        engine.observe(
            ExpertLoads(
                engine.module,
                topology,
                blocks=[layer for layer, number in enumerate(experts) if number > 1],
                experts=config.model.moe_num_experts,
                logged=logged,
                device=device,
            )
        )
    if config.logging.statistics:
        whole = GPT(config.model, seed=config.training.seed, device="meta")
        engine.observe(
            ParameterStatistics(
                engine.optimizer,
                names=[name for name, _ in whole.named_parameters()],
                partitions=engine.partitions,
                counts=counts,
                wanted=config.logging.statistics,
                state=config.optimizer.state,
                clipping=config.optimizer.gradient_clipping,
                logged=logged,
                device=device,
            )
        )
    if config.logging.log_gradient_noise_scale:
        if batch.total <= batch.micro:
            raise ConfigError(
                f"log_gradient_noise_scale compares a micro-batch's gradient with the batch's, and "
                f"the batch of {batch.total} samples is one micro-batch; lower "
                "train_micro_batch_size_per_gpu"
            )
        named = engine.module.named_parameters()
        engine.observe(
            GradientNoiseScale(
                [parameter for name, parameter in named if counts(name)],
                micro=batch.micro,
                total=batch.total,
                accumulation=batch.accumulation,
                steps=config.logging.gradient_noise_scale_n_batches,
                log_interval=interval,
                logged=logged,
                device=device,
            )
        )
