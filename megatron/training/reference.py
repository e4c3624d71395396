"""Giving a run its reference losses: from a store, or from a frozen model run beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config
from megatron.data.batch import MicroBatch
from megatron.engine.runtime import Runtime
from megatron.errors import CheckpointError
from megatron.model.domain_loss import DomainLoss
from megatron.monitor.overhead import Overhead
from megatron.parallel.topology import Topology
from megatron.signals.reference import ModelReference, ReferenceSource, StoreReference
from megatron.training.domains import OpenDomains
from megatron.training.frozen import (
    build_frozen,
    describe_frozen,
    share_reference,
    share_weights,
)
from megatron.training.planner import Planned
from megatron.training.reference_options import open_store, reference_paths

if TYPE_CHECKING:
    from megatron.training.loop import Reader

RECORD_NAME = "reference.json"
CACHE_NAME = "reference"


class ReferenceReader:
    """A reader whose micro-batches carry a reference's losses."""

    def __init__(self, inner: Reader, source: ReferenceSource) -> None:
        """Wrap a reader.

        Args:
            inner: reads the micro-batches.
            source: of the losses.
        """
        self._inner = inner
        self._source = source

    def read(self, planned: Planned) -> Iterator[MicroBatch]:
        """Return this rank's micro-batches of a plan, with reference losses where needed."""
        return self._source.attach(planned.plan, self._inner.read(planned))

    def read_ahead(self, planned: Planned) -> None:
        """Start reading a plan that :meth:`read` will be asked for next."""
        self._inner.read_ahead(planned)
        self._source.prepare(planned.plan)


def reference_source(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    domains: OpenDomains,
    *,
    micro: int,
    accumulation: int,
    overhead: Overhead | None = None,
    say: Callable[[str], None],
) -> ReferenceSource:
    """Return where a run's reference losses come from, as its options name it; collective.

    For a method that needs :attr:`~megatron.mixing.Signal.EXCESS_LOSS`.

    Args:
        config: with ``model.vocab_size`` filled in.
        runtime: ranks and device.
        topology: this rank's place.
        domains: of the run.
        micro: samples per data rank and micro-batch.
        accumulation: micro-batches of a step.
        overhead: is told what forward passes of a reference cost.
        say: takes a line for the console.

    Raises:
        NeomixError: the reference is not there, does not fit, or is not the one that the run
            began with.
    """
    paths = reference_paths(config)
    if paths.losses is not None:
        store = open_store(config, domains, paths.losses)
        model, identity = store.header.model.get("checkpoint"), store.header.model_hash
        say(f"reference losses: {paths.losses}, of {model}, model {identity[:16]}")
        _keep_to(config, runtime, identity, paths.losses)
        return StoreReference(
            store,
            micro_batch=micro,
            accumulation=accumulation,
            topology=topology,
            pin_memory=runtime.device.type == "cuda",
        )
    assert paths.model is not None
    reference = share_reference(paths.model, config, runtime, say=say)
    say(describe_frozen(reference, config, topology))
    _keep_to(config, runtime, reference.identity, str(reference.path))
    cache = Path(config.checkpoint.run_dir) / CACHE_NAME
    files = share_weights(reference, runtime, cache=cache, say=say)
    assert config.model.vocab_size is not None
    return ModelReference(
        build_frozen(
            reference, files, config, runtime, topology, micro=micro, accumulation=accumulation
        ),
        DomainLoss(topology=topology, vocab_size=config.model.vocab_size),
        accumulation=accumulation,
        seq_length=config.model.context_length,
        topology=topology,
        device=runtime.device,
        identity=reference.identity,
        overhead=overhead,
    )


def _keep_to(config: Config, runtime: Runtime, identity: str, place: str) -> None:
    """Refuse another reference in the middle of a run; note the one that it begins with.

    Raises:
        CheckpointError: with both models.
    """
    path = Path(config.checkpoint.run_dir) / RECORD_NAME
    before: dict[str, str] = {}
    if runtime.rank == 0:
        if CheckpointStore(config.checkpoint.save_dir).steps():
            before = _recorded(path)
        if not before:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"model": identity, "place": place}, indent=1) + "\n"
            with disk_errors(path):
                replace_file(path, content.encode())
    before = runtime.broadcast(before)
    if before and before["model"] != identity:
        raise CheckpointError(
            f"the run began with the reference model {before['model'][:16]} ({before['place']}), "
            f"and is given {identity[:16]} ({place}); give it that model again (a run's folder "
            "means its newest checkpoint, a checkpoint's folder that one), or start another "
            f"run_dir (or remove {path}, if the change is meant)"
        )


def _recorded(path: Path) -> dict[str, str]:
    """Return which reference a run began with; nothing where that is not known any more."""
    try:
        content = json.loads(path.read_bytes())
        return {"model": str(content["model"]), "place": str(content["place"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
