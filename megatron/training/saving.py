"""Saving a run: DeepSpeed's files and ours into one atomic checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.bundle import write_bundle
from megatron.checkpoint.files import disk_errors
from megatron.checkpoint.store import CheckpointStore
from megatron.engine.engine import TrainEngine
from megatron.engine.runtime import Runtime
from megatron.errors import RunError
from megatron.monitor.sink import SinkGroup
from megatron.training.guard import RunGuard
from megatron.training.planner import Planner


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Writes checkpoints of one run; collective, every rank calls :meth:`save`.

    Attributes:
        runtime: ranks and their host-side group.
        store: the run's checkpoints.
        engine: weights and optimizer.
        planner: data and mixing.
        guard: policies for steps that are not finite, or spike.
        sinks: flushed before a checkpoint counts, so that resuming finds every record.
        domains: names in the order of the run.
        layout: see :class:`~megatron.checkpoint.manifest.Manifest`.
        config_hash: hash of the resolved configuration.
        fingerprints: data fingerprint by domain.
        facts: further facts for the manifest (threads, versions).
        universal_info: how the files can be converted to another layout, see
            :func:`megatron.engine.universal.universal_info`.
        measured: returns facts that are taken of the model at each save; collective.
        bytes_needed: estimated size of a checkpoint.
    """

    runtime: Runtime
    store: CheckpointStore
    engine: TrainEngine
    planner: Planner
    guard: RunGuard
    sinks: SinkGroup
    domains: list[str]
    layout: Mapping[str, Any]
    config_hash: str
    fingerprints: Mapping[str, Any]
    facts: Mapping[str, Any]
    universal_info: Mapping[str, Any]
    measured: Callable[[], Mapping[str, Any]] = dict
    bytes_needed: int | None = None

    def save(self, step: int) -> None:
        """Save the state after ``step``.

        Raises:
            RunError: the disk is full or refuses; earlier checkpoints are intact.
        """
        measured = self.measured()
        self.sinks.flush()
        if self.runtime.rank == 0:
            self.store.begin(step, bytes_needed=self.bytes_needed)
        self.runtime.barrier()
        try:
            with disk_errors(self.store.temporary_path(step), needed=self.bytes_needed):
                self._write(step, measured)
        except RunError:
            # The space that a failed save took is wanted back; earlier checkpoints stand.
            self.store.abort(step)
            raise
        self.runtime.barrier()

    def _write(self, step: int, measured: Mapping[str, Any]) -> None:
        first, temporary = self.runtime.rank == 0, self.store.temporary_path(step)
        client_state = {
            "iteration": step,
            "universal_checkpoint_info": dict(self.universal_info),
        }
        written = self.engine.save(temporary.parent, temporary.name, client_state)
        if first:
            written.append(
                write_bundle(
                    temporary,
                    step=step,
                    domains=self.domains,
                    planner=self.planner.state_dict(),
                    guard=self.guard.state_dict(),
                )
            )
        entries = self.runtime.gather(self.store.seal_files(written))
        if first:
            self.store.commit(
                step,
                {name: entry for part in entries for name, entry in part.items()},
                layout=self.layout,
                config_hash=self.config_hash,
                fingerprints=self.fingerprints,
                extra={**self.facts, **measured},
            )
