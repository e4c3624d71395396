"""Saving a run: DeepSpeed's files and ours into one atomic checkpoint.

With a copy in host memory (``async_save``) the files are written by a thread while training goes
on; what is written, and when it counts, is the same.  The thread's agreement with the other ranks
has a process group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.background import Background
from megatron.checkpoint.bundle import STATE_NAME, bundle_bytes
from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.writing import FileWriter
from megatron.engine.engine import TrainEngine
from megatron.engine.host_copy import HostCopies
from megatron.engine.runtime import Runtime
from megatron.errors import RunError
from megatron.monitor.sink import SinkGroup
from megatron.training.guard import RunGuard
from megatron.training.planner import Planner

Sealed = Mapping[Path, tuple[int, str]]
"""Size and SHA-256 of files that are on the disk."""


@dataclass(frozen=True, kw_only=True)
class Behind:
    """What a save needs to go on behind the next steps.

    Attributes:
        runtime: the ranks, with a group of its own.
        copies: of the state, in host memory.
        thread: writes them.
    """

    runtime: Runtime
    copies: HostCopies
    thread: Background = field(default_factory=lambda: Background("checkpoint"))


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
        behind: for saves that go on behind the next steps; None waits for each.
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
    behind: Behind | None = None

    @property
    def failed(self) -> bool:
        """Whether a save behind the steps has failed; :meth:`wait` says how."""
        return self.behind is not None and self.behind.thread.failed

    def save(self, step: int, *, last: bool = False) -> None:
        """Save the state after ``step``, once a save that is going on has ended.

        Args:
            step: the last one done.
            last: nothing will be done meanwhile: write it, and come back when it counts.

        Raises:
            RunError: the disk is full or refuses, on this rank or another, now or in the save
                before; earlier checkpoints are intact.
        """
        self.wait()
        measured = self.measured()
        self.sinks.flush()
        if self.runtime.rank == 0:
            self.store.begin(step, bytes_needed=self.bytes_needed)
        self.runtime.barrier()
        if self.behind is None or last:
            with FileWriter(needed=self.bytes_needed) as writer:
                self._collect(step, writer.write_state)
                writer.write_bytes(*self._bundle(step))
                self._complete(self.runtime, writer.finish, step, measured)
            return
        copies, taken = self.behind.copies, list[tuple[Any, Path]]()
        copies.begin()
        self._collect(step, lambda state, path: taken.append((copies.take(state), path)))
        self.behind.thread.start(
            partial(
                self._complete,
                self.behind.runtime,
                partial(self._write, copies, taken, self._bundle(step)),
                step,
                measured,
            )
        )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a save that is going on; return False if it does so after ``timeout`` seconds.

        Raises:
            RunError: it has failed, on this rank or another.
        """
        return self.behind is None or self.behind.thread.wait(timeout)

    def _collect(self, step: int, write: Callable[[Any, Path], None]) -> None:
        """Hand what this rank's files shall hold to ``write``."""
        temporary = self.store.temporary_path(step)
        client_state = {
            "iteration": step,
            "universal_checkpoint_info": dict(self.universal_info),
        }
        self.engine.save(temporary.parent, temporary.name, client_state, write=write)

    def _bundle(self, step: int) -> tuple[bytes | None, Path]:
        """Return the rank-free state and its file; no state on ranks other than the first."""
        path = self.store.temporary_path(step) / STATE_NAME
        if self.runtime.rank:
            return None, path
        state = bundle_bytes(
            step=step,
            domains=self.domains,
            planner=self.planner.state_dict(),
            guard=self.guard.state_dict(),
        )
        return state, path

    def _write(
        self,
        copies: HostCopies,
        taken: list[tuple[Any, Path]],
        bundle: tuple[bytes | None, Path],
    ) -> Sealed:
        """Write what was copied; on a thread of its own."""
        with FileWriter(needed=self.bytes_needed) as writer:
            copies.wait()
            for state, path in taken:
                writer.write_state(state, path)
            writer.write_bytes(*bundle)
            return writer.finish()

    def _complete(
        self,
        ranks: Runtime,
        finish: Callable[[], Sealed],
        step: int,
        measured: Mapping[str, Any],
    ) -> None:
        """Let the checkpoint count once every rank's files are on the disk; collective.

        Args:
            ranks: with the group to agree over.
            finish: returns this rank's files once they are on the disk.
            step: the last one done.
            measured: facts for the manifest.
        """
        try:
            parts = together(ranks, lambda: self.store.entries(finish()))
            files = {name: entry for part in parts for name, entry in part.items()}
            together(ranks, lambda: self._commit(step, files, measured) if not ranks.rank else None)
        except RunError:
            # The space that a failed save took is wanted back; earlier checkpoints stand.
            if ranks.rank == 0:
                self.store.abort(step)
            raise

    def _commit(self, step: int, files: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        self.store.commit(
            step,
            files,
            layout=self.layout,
            config_hash=self.config_hash,
            fingerprints=self.fingerprints,
            extra={**self.facts, **measured},
        )


def together(ranks: Runtime, work: Callable[[], Any]) -> list[Any]:
    """Do a piece of work on every rank and return what it gave on each; collective.

    Args:
        ranks: with the group to agree over.
        work: returns something JSON-able.

    Raises:
        RunError: it has failed on another rank; where it failed, its own error is raised.
    """
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    told = ranks.gather([result, None if error is None else str(error) or repr(error)])
    if error is not None:
        raise error
    failures = [said for _, said in told if said is not None]
    if failures:
        raise RunError(failures[0])
    return [one for one, _ in told]
