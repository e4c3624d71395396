"""Two ranks forked from a server that has the libraries imported, watched as a run is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support import relayout, runs
from support.gloo import PRELOADED, reports, run_rank

RANKS = 2


def train_into(rank: int, world: int, file: Path) -> int:
    """Train, with what is printed going into a file beside the configuration."""
    if rank == 0:
        with file.with_suffix(".out").open("w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    return relayout.train(rank, world, file)


class _Ranks:
    """The ranks, as far as a process can be asked."""

    def __init__(self, ranks: list[Any]) -> None:
        self.ranks = ranks
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return 0 once all have ended well, another number once one has not."""
        codes = [rank.exitcode for rank in self.ranks]
        if any(code not in (None, 0) for code in codes) or None not in codes:
            self.returncode = next((code for code in codes if code), 0)
        return self.returncode


class ForkedRun(runs.LiveRun):
    """A run of two forked ranks, without a launcher."""

    def __init__(self, file: Path) -> None:
        """Start the ranks."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._folder = tempfile.TemporaryDirectory(prefix="forked-", ignore_cleanup_errors=True)
        self._output = file.with_suffix(".out")
        self._output.unlink(missing_ok=True)
        arguments = (self._folder.name, {}, list(sys.path), (file,))
        self.process: Any = _Ranks(
            [
                context.Process(target=run_rank, args=(train_into, rank, RANKS, *arguments))
                for rank in range(RANKS)
            ]
        )
        for rank in self.process.ranks:
            rank.start()

    def text(self) -> str:
        """Return what rank 0 printed so far, and what ranks that failed said."""
        told = ""
        with contextlib.suppress(FileNotFoundError):
            told = self._output.read_text(encoding="utf-8")
        return told + reports(Path(self._folder.name))

    def family(self) -> dict[int, str]:
        """Return the ranks that are still there."""
        return {rank.pid: "rank" for rank in self.process.ranks if rank.is_alive()}

    def victims(self, kind: str) -> list[int]:
        """Return whom a trial kills first; what is left is ended by :meth:`end`."""
        pids = [rank.pid for rank in self.process.ranks]
        return {"rank": pids[-1:], "launcher": pids[:1]}.get(kind, pids)

    def end(self) -> int:
        """End what is left a moment later, as the launcher does."""
        if self.process.poll() is None:
            time.sleep(0.1)
        for rank in self.process.ranks:
            rank.kill()
            rank.join()
        self._folder.cleanup()
        return int(self.process.poll() or 0)
