"""A rank that dies inside a save, at a chosen point of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from support import relayout

from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.writing import FileWriter


def train_and_die(rank: int, world: int, file: Path, victim: int, tag: str, point: str) -> None:
    """Train; the victim ends as by SIGKILL inside the save of ``tag``.

    To be run in processes of its own: it changes the engine for good.

    Args:
        rank: this rank.
        world: number of ranks.
        file: the configuration.
        victim: the rank that dies.
        tag: name of the checkpoint that is being saved then.
        point: ``"seal"`` (all its files are written), ``"commit"`` (all are sealed: rank 0
            alone comes there) or the number of one of its files, which is left half written.
    """
    if rank == victim:
        _arm(f"{tag}.tmp", point)
    relayout.train(rank, world, file)


def _arm(folder: str, point: str) -> None:
    written = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "seal":
        finish = FileWriter.finish

        def before_finish(self: FileWriter) -> Any:
            if any(path.parent.name == folder for path, *_ in self._written):
                die()
            return finish(self)

        FileWriter.finish = before_finish  # type: ignore[method-assign]
    elif point == "commit":
        commit = CheckpointStore.commit

        def before_commit(self: CheckpointStore, step: int, *rest: Any, **named: Any) -> Any:
            if self.temporary_path(step).name == folder:
                die()
            return commit(self, step, *rest, **named)

        CheckpointStore.commit = before_commit  # type: ignore[method-assign]
    else:
        write = FileWriter.write_state

        def halfway(self: FileWriter, state: Any, path: Path) -> None:
            nonlocal written
            write(self, state, path)
            if path.parent.name == folder:
                if written == int(point):
                    os.truncate(path, path.stat().st_size // 2)
                    die()
                written += 1

        FileWriter.write_state = halfway  # type: ignore[method-assign]
