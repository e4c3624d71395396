"""The engine of a run: a whole model on every rank, or a stage of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron.config import Config, deepspeed_config
from megatron.engine.engine import TrainEngine
from megatron.engine.optimizer import build_optimizer
from megatron.engine.sequential import SequentialEngine
from megatron.model.compiled import compile_blocks
from megatron.model.domain_loss import DomainLoss
from megatron.model.gpt import GPT, freeze_base, layers, param_groups
from megatron.model.layer_run import recomputed_blocks
from megatron.model.mup import width_multiplier
from megatron.model.soft_prompt import prompt_length
from megatron.parallel.rng import DropoutRng
from megatron.parallel.topology import Topology
from megatron.signals.validation import LossObserver
from megatron.training.compatible import optimizer_state
from megatron.training.layout import layer_bounds
from megatron.training.soft_prompt import start_prompt


class Batch(NamedTuple):
    """Batch sizes of a run on its layout, as ``resolve_batch`` gives them."""

    micro: int
    accumulation: int
    total: int


def build_engine(
    config: Config,
    topology: Topology,
    batch: Batch,
    observer: LossObserver,
) -> TrainEngine:
    """Build the model and hand it to DeepSpeed; collective.

    Args:
        config: with ``model.vocab_size`` filled in.
        topology: this rank's place.
        batch: sizes.
        observer: told of every sample's loss.
    """
    settings: dict[str, Any] = deepspeed_config(
        config, micro=batch.micro, accumulation=batch.accumulation, data_size=topology.data_size
    )
    loss_fn = training_loss(config, topology, observer)
    dropout = DropoutRng(
        seed=config.training.seed,
        topology=topology,
        inputs_on_host=config.model.checkpoint_in_cpu,
    )

    def before_micro_batch(step: int, micro: int) -> None:
        dropout.begin(step=step, micro_batch=micro)

    groups = (topology.data_group, topology.tensor_group)
    if topology.pipe_size == 1:
        model = GPT(
            config.model, topology, seed=config.training.seed, loss_fn=loss_fn, dropout=dropout
        )
        _compile(config, model, topology, batch)
        sequential = SequentialEngine(
            model=model,
            topology=topology,
            optimizer=_optimizer(config, model),
            config=settings,
            before_micro_batch=before_micro_batch,
        )
        sequential.describe_optimizer(optimizer_state(config.optimizer), groups)
        start_prompt(config, sequential)
        return sequential
    # DeepSpeed chooses its device when it is imported, which start_runtime has prepared.
    from megatron.engine.pipeline import PipelineEngine, Stage

    stage = Stage(
        layers(config.model, topology, seed=config.training.seed, dropout=dropout),
        topology=topology,
        bounds=layer_bounds(config),
        loss_fn=loss_fn,
        dropout=dropout,
        recomputed=recomputed_blocks(config.model),
    )
    freeze_base(stage, config.model)
    _compile(config, stage, topology, batch)
    pipeline = PipelineEngine(
        stage=stage,
        optimizer=_optimizer(config, stage),
        config=settings,
        before_micro_batch=before_micro_batch,
        row_length=_row_length(config),
    )
    pipeline.describe_optimizer(optimizer_state(config.optimizer), groups)
    return pipeline


def training_loss(config: Config, topology: Topology, observer: LossObserver) -> DomainLoss:
    """Return the loss that a run trains on.

    Args:
        config: with ``model.vocab_size`` filled in.
        topology: this rank's place.
        observer: told of every sample's loss.
    """
    assert config.model.vocab_size is not None
    return DomainLoss(
        topology=topology,
        vocab_size=config.model.vocab_size,
        observe=observer,
        half=config.training.fp16_lm_cross_entropy,
        z_loss=config.training.z_loss,
    )


def _compile(config: Config, model: nn.Module, topology: Topology, batch: Batch) -> None:
    """Let the blocks of this rank run compiled, where the configuration asks for it."""
    if not config.training.torch_compile:
        return
    length = config.model.context_length + prompt_length(config.model)
    shared = topology.tensor_size if topology.splits_sequence else 1
    compile_blocks(
        model,
        rows=batch.micro,
        length=length // shared,
        deterministic=config.training.deterministic,
    )


def _row_length(config: Config) -> Callable[[int], int] | None:
    """Return what tells the tokens of a step's rows, where a curriculum changes them."""
    curriculum = config.data.curriculum_learning
    if curriculum is None or not curriculum.enabled:
        return None
    return partial(config.data.row_length, seq_length=config.model.context_length)


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(
        param_groups(
            model,
            config.optimizer.weight_decay,
            width=width_multiplier(config.model),
            decay_embeddings=config.optimizer.decay_embeddings,
        ),
        kind=config.optimizer.type,
        lr=config.optimizer.lr,
        **config.optimizer.params,
    )
