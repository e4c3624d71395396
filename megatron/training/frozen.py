"""Building a frozen model from a checkpoint, in the layout of the run that looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.vet import UNIVERSAL_GLOBALS, vet_checkpoint
from megatron.config import Config
from megatron.engine.engine import tensor_partitions
from megatron.engine.frozen import FrozenModel, FrozenSequential, load_weights
from megatron.engine.runtime import Runtime
from megatron.engine.universal_load import UniversalCheckpoint
from megatron.errors import CheckpointError, NeomixError
from megatron.model.accounting import parameter_count
from megatron.model.domain_loss import DomainLoss
from megatron.model.gpt import GPT, layers
from megatron.monitor.throughput import short
from megatron.parallel.rng import DropoutRng
from megatron.parallel.topology import Topology
from megatron.training.conversion import find_universal, is_universal, universal_form
from megatron.training.layout import layer_bounds
from megatron.training.plan.units import size
from megatron.training.reference_checkpoint import (
    ReferenceCheckpoint,
    check_reference,
    find_reference,
)


def share_reference(
    given: str | Path,
    config: Config,
    runtime: Runtime,
    *,
    step: int | None = None,
    say: Callable[[str], None],
) -> ReferenceCheckpoint:
    """Return a reference's checkpoint, the same on every rank; collective.

    Rank 0 verifies every byte and tells the others.

    Args:
        given: see :func:`find_reference`.
        config: of the run, with ``model.vocab_size`` filled in.
        runtime: ranks and their host-side group.
        step: of the checkpoint; None takes the newest.
        say: takes a line for the console.

    Raises:
        CheckpointError: there is none, or it does not fit the run.
    """

    def find() -> int:
        found = find_reference(given, step=step, verified=True, say=say)
        check_reference(found, config)
        return found.manifest.step

    return find_reference(given, step=on_first(runtime, find), verified=False, say=say)


def share_weights(
    reference: ReferenceCheckpoint,
    runtime: Runtime,
    *,
    cache: Path,
    say: Callable[[str], None],
) -> Path:
    """Return the folder of a reference's weights in the universal format; collective.

    Rank 0 converts where needed.

    Args:
        reference: the checkpoint.
        runtime: ranks and their host-side group.
        cache: folder for the converted form, unless one lies beside the checkpoint.
        say: takes a line for the console.

    Raises:
        CheckpointError: it cannot be converted, or there is no room.
    """
    store = CheckpointStore(cache)
    return Path(on_first(runtime, lambda: str(whole_parameters(reference, store, say))))


def on_first(runtime: Runtime, work: Callable[[], Any]) -> Any:
    """Return on every rank what ``work`` returns on the first, or raise its error there too.

    Collective; what it returns is JSON-able.

    Raises:
        CheckpointError: ``work`` failed.
    """
    answer: dict[str, Any] = {}
    if runtime.rank == 0:
        try:
            answer = {"result": work()}
        except NeomixError as error:
            answer = {"problem": str(error)}
    answer = runtime.broadcast(answer)
    if "problem" in answer:
        raise CheckpointError(answer["problem"])
    return answer["result"]


def whole_parameters(
    reference: ReferenceCheckpoint, cache: CheckpointStore, say: Callable[[str], None]
) -> Path:
    """Return a universal form: the checkpoint itself, one beside it, or one in the cache.

    Args:
        reference: the checkpoint.
        cache: takes the converted form, unless one lies beside the checkpoint.
        say: takes a line for the console.

    Raises:
        CheckpointError: it cannot be converted, or there is no room.
    """
    path, manifest = reference.path, reference.manifest
    if is_universal(manifest):
        vet_checkpoint(path, allowed=UNIVERSAL_GLOBALS)
        return path
    for store in (CheckpointStore(path.parent), cache):
        if (found := find_universal(store, manifest)) is not None:
            return found
    return universal_form(cache, path, manifest, say)


def build_frozen(
    reference: ReferenceCheckpoint,
    files: Path,
    config: Config,
    runtime: Runtime,
    topology: Topology,
    *,
    micro: int,
    accumulation: int,
) -> FrozenModel:
    """Build a reference model with its weights, in the layout and precision of a run; collective.

    Args:
        reference: what the model is.
        files: folder of its weights in the universal format.
        config: of the run.
        runtime: ranks and device.
        topology: this rank's place.
        micro: samples per data rank and micro-batch.
        accumulation: micro-batches of a step.

    Raises:
        CheckpointError: the weights are not of that model.
    """
    topology = topology.with_all_experts()
    spec = reference.config.model.model_copy(update={"checkpoint_activations": False})
    assert spec.vocab_size is not None
    dropout = DropoutRng(seed=0, topology=topology)
    if topology.pipe_size == 1:
        model = GPT(spec, topology, seed=0, dropout=dropout)
        load_weights(model, _checkpoint(files, model, topology))
        return FrozenSequential(model, precision=config.precision, device=runtime.device)
    # DeepSpeed chooses its device when it is imported, which start_runtime has prepared.
    from megatron.engine.frozen_pipeline import FrozenPipeline
    from megatron.engine.pipeline import Stage

    stage = Stage(
        layers(spec, topology, seed=0, dropout=dropout),
        topology=topology,
        bounds=layer_bounds(config.model_copy(update={"model": spec})),
        loss_fn=DomainLoss(topology=topology, vocab_size=spec.vocab_size),
        dropout=dropout,
        recomputed=0,
    )
    load_weights(stage, _checkpoint(files, stage, topology))
    return FrozenPipeline(
        stage,
        precision=config.precision,
        micro=micro,
        accumulation=accumulation,
        data_size=topology.data_size,
    )


def reload_frozen(model: FrozenModel, files: Path, topology: Topology) -> None:
    """Fill a frozen model with the weights of another checkpoint of the same architecture.

    Args:
        model: built by :func:`build_frozen`.
        files: folder of the weights in the universal format.
        topology: this rank's place.

    Raises:
        CheckpointError: the weights are not of that model.
    """
    load_weights(model.module, _checkpoint(files, model.module, topology))


def describe_frozen(reference: ReferenceCheckpoint, config: Config, topology: Topology) -> str:
    """Return a line for the console about a reference model and the memory that it takes.

    Args:
        reference: the model.
        config: of the run that looks at it.
        topology: a rank's place.
    """
    model = reference.config.model
    parameters = parameter_count(model)
    width = 4 if config.precision == "fp32" else 2
    share = parameters * width / (topology.tensor_size * topology.pipe_size)
    return (
        f"reference: {reference.path}, {short(float(parameters))} parameters, {model.num_layers} "
        f"layers of {model.hidden_size}, about {size(share)} of weights per rank beside the run's; "
        f"model {reference.identity[:16]}"
    )


def _checkpoint(files: Path, model: Any, topology: Topology) -> UniversalCheckpoint:
    return UniversalCheckpoint(
        files,
        partitions=tensor_partitions(model),
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )
