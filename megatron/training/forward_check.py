"""A forward pass on fixed tokens, kept with a checkpoint and repeated when it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megatron.checkpoint.manifest import Manifest
from megatron.config import Config
from megatron.engine.engine import TrainEngine
from megatron.engine.runtime import Runtime
from megatron.errors import CheckpointError
from megatron.model.domain_loss import DomainLoss
from megatron.parallel.topology import Topology

FACT = "forward_loss"
"""Name of the loss among a manifest's facts."""

_BOUNDS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}


def forward_loss(
    config: Config, runtime: Runtime, topology: Topology, engine: TrainEngine
) -> float:
    """Return the mean loss in nats of counting through the vocabulary; collective.

    Args:
        config: with ``model.vocab_size`` filled in.
        runtime: ranks and their host-side group.
        topology: this rank's place.
        engine: with the weights as they are.
    """
    assert config.model.vocab_size is not None
    vocabulary, length = config.model.vocab_size, config.model.context_length
    counted = (torch.arange(length + 1) % vocabulary).to(runtime.device)[None, :]
    tokens, targets = counted[:, :-1].contiguous(), counted[:, 1:].contiguous()
    loss_fn = DomainLoss(topology=topology, vocab_size=vocabulary)
    found: list[float] = []

    def keep(output: Any, labels: Any) -> torch.Tensor:
        hidden, weight = output[0], output[1]
        losses = loss_fn.token_losses(hidden, weight, targets)
        found.append(float(losses.double().mean()))
        return losses.mean()

    ones = torch.ones_like(targets, dtype=torch.float32)
    row = torch.zeros(1, dtype=torch.int64, device=runtime.device)
    labels = (targets, ones, row, row.float() + 1)

    def micro_batches() -> Iterator[tuple[torch.Tensor, Any]]:
        yield tokens, labels

    engine.evaluate(micro_batches(), 1, loss_fn=keep)
    told = [value for part in runtime.gather(found) for value in part]
    return float(told[0])


def keep_forward_loss(
    config: Config, runtime: Runtime, topology: Topology, engine: TrainEngine
) -> Callable[[], Mapping[str, Any]]:
    """Return what adds to a checkpoint's facts, where that is asked for; collective."""
    if not config.checkpoint.checkpoint_validation_with_forward_pass:
        return dict
    return lambda: {FACT: forward_loss(config, runtime, topology, engine)}


def check_forward_loss(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    engine: TrainEngine,
    manifest: Manifest,
    say: Callable[[str], None],
) -> None:
    """Compare the loaded weights' forward pass with that of the checkpoint; collective.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    if not config.checkpoint.checkpoint_validation_with_forward_pass:
        return
    saved = manifest.extra.get(FACT)
    if saved is None:
        say(
            f"note: the checkpoint of step {manifest.step} was written without "
            "checkpoint_validation_with_forward_pass, so there is no forward pass to compare with"
        )
        return
    now = forward_loss(config, runtime, topology, engine)
    if not math.isclose(now, saved, rel_tol=_BOUNDS[config.precision]):
        raise CheckpointError(
            f"the weights of the checkpoint of step {manifest.step} had a loss of {saved:.6f} on "
            f"fixed tokens when they were written, and have {now:.6f} now that they are loaded; "
            "the checkpoint, or what it is loaded with, is damaged: start from an earlier one "
            "(load and iteration), or leave checkpoint_validation_with_forward_pass out"
        )
    say(f"a forward pass of the loaded weights gives what it gave when they were saved: {now:.6f}")
