"""Saves that are written behind the steps, held up or refused at a chosen point."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from support import relayout

from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.writing import FileWriter
from megatron.errors import RunError
from megatron.training.milestones import Milestones

FIRST, SECOND = "global_step2.tmp", "global_step4.tmp"


def hold(rank: int, world: int, file: Path, checkpoints: Path) -> dict[str, Any]:
    """Train with saves after steps 2 and 4 that wait: the first until the run goes back to the
    newest checkpoint in step 3, the second until an error ends the run in step 5.

    Returns:
        What was seen of ``latest`` while the first was held, where the run went back to, and the
        error.
    """
    gates = {FIRST: threading.Event(), SECOND: threading.Event()}
    seen: dict[str, Any] = {"back": []}
    write, after = FileWriter.write_state, Milestones.after_step

    def held(self: FileWriter, state: Any, path: Path) -> None:
        assert gates[path.parent.name].wait(60), "training did not go on meanwhile"
        write(self, state, path)

    def open_soon(name: str) -> None:
        threading.Timer(0.3, gates[name].set).start()

    def watched(self: Milestones, step: int, ending: Any) -> None:
        after(self, step, ending)
        if step == 3:
            seen["latest"] = os.path.lexists(checkpoints / "latest")
            open_soon(FIRST)
            assert self.saver.guard.go_back is not None
            self.saver.guard.go_back(step, seen["back"].append)
        if step == 5:
            open_soon(SECOND)
            raise RunError("as a step that is not finite")

    with (
        mock.patch.object(FileWriter, "write_state", held),
        mock.patch.object(Milestones, "after_step", watched),
        _told(seen),
    ):
        relayout.train(rank, world, file)
    return seen


def refuse(rank: int, world: int, file: Path, victim: int) -> dict[str, Any]:
    """Train with a disk that is full for one rank when the state after step 4 is written.

    Returns:
        The error, and how many steps were done.
    """
    seen: dict[str, Any] = {"steps": 0}
    write, after = FileWriter._open_and_write, Milestones.after_step

    def full(self: FileWriter, path: Path, *how: Any) -> Any:
        if path.parent.name == SECOND and rank == victim:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, path, *how)

    def watched(self: Milestones, step: int, ending: Any) -> None:
        seen["steps"] = step
        after(self, step, ending)

    with (
        mock.patch.object(FileWriter, "_open_and_write", full),
        mock.patch.object(Milestones, "after_step", watched),
        _told(seen),
    ):
        relayout.train(rank, world, file)
    return seen


@contextmanager
def _told(seen: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except RunError as error:
        seen["error"], seen["code"] = str(error), error.exit_code


def complete(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints that verify; nothing else may lie there."""
    store = CheckpointStore(checkpoints)
    found = [step for step in store.steps() if not store.verify(store.path(step))]
    assert not list(checkpoints.glob("*.tmp"))
    return found
