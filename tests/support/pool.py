"""Ranks that are started once and called many times.

    pools = RankPools()
    results = pools.call(body, 2, 0.5)        # as run_ranks(body, 2, 0.5)

Starting ranks costs seconds, building an engine a fraction of one, and nothing that neomix
keeps belongs to the process: so one set of ranks per world size serves one case after the
other.  What DeepSpeed and torch leave behind in the process is cleared after each.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from support.gloo import PRELOADED, RankFailedError, reports, run_rank

_MOST_THREADS = 48
"""Of one rank: what keeps groups alive (ZeRO-3's hooks in autograd) adds up, and each group has a
thread that wakes a hundred times a second.  Ranks with more are started anew."""


class RankPool:
    """The ranks of one world size, waiting for bodies to run."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._connections: list[Connection] = []
        self._ranks = []
        self._crowded = False
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            folder, path = self._folder.name, list(sys.path)
            process = context.Process(
                target=run_rank,
                args=(_serve, rank, world_size, folder, {}, path, (theirs,)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._ranks.append(process)

    def call(self, body: Callable[..., Any], *arguments: Any, timeout: float = 900.0) -> list[Any]:
        """Call ``body(rank, world_size, *arguments)`` on every rank; return results by rank.

        Raises:
            RankFailedError: a rank raised, died or ran out of time.  The pool is closed.
        """
        try:
            for connection in self._connections:
                connection.send((body, arguments))
            return self._collect(time.monotonic() + timeout)
        except (OSError, EOFError) as error:
            ended = [rank.exitcode for rank in self._ranks if rank.join(5) is None]
            told = reports(Path(self._folder.name))
            self._kill()
            raise RankFailedError(f"a rank has died (exit codes {ended}){told}") from error
        except BaseException:
            self._kill()
            raise

    @property
    def usable(self) -> bool:
        """Whether all ranks are there, and none has too many threads."""
        return self._alive and not self._crowded

    def close(self) -> None:
        """Let the ranks end."""
        if self._alive:
            for connection in self._connections:
                connection.send(None)
            for rank in self._ranks:
                rank.join(timeout=60)
        self._kill()

    @property
    def _alive(self) -> bool:
        return bool(self._ranks) and all(rank.is_alive() for rank in self._ranks)

    def _collect(self, deadline: float) -> list[Any]:
        waiting: dict[Any, int] = {end: rank for rank, end in enumerate(self._connections)}
        results: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = ", ".join(str(rank) for rank in waiting.values())
                raise RankFailedError(f"ranks {stuck} did not answer in time")
            for end in ready:
                rank = waiting.pop(end)
                error, result, threads = end.recv()  # type: ignore[union-attr]
                self._crowded = self._crowded or threads > _MOST_THREADS
                if error is not None:
                    # Its peers may hang in a collective now: they are not waited for.
                    raise RankFailedError(f"rank {rank} failed\n{error}")
                results[rank] = result
        return [results[rank] for rank in range(self.world_size)]

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
        for connection in self._connections:
            connection.close()
        self._ranks, self._connections = [], []
        self._folder.cleanup()


class RankPools:
    """One pool per world size, started when it is first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def call(
        self,
        body: Callable[..., Any],
        world_size: int,
        *arguments: Any,
        timeout: float = 900.0,
    ) -> list[Any]:
        """Call ``body(rank, world_size, *arguments)``; see :meth:`RankPool.call`."""
        pool = self._pools.get(world_size)
        if pool is None or not pool.usable:
            if pool is not None:
                pool.close()
            pool = self._pools[world_size] = RankPool(world_size)
        return pool.call(body, *arguments, timeout=timeout)

    def close(self) -> None:
        """End every rank."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _serve(rank: int, world_size: int, connection: Connection) -> None:
    """Run what is sent until None comes."""
    from torch.nn import functional

    linear = functional.linear
    while (order := connection.recv()) is not None:
        body, arguments = order
        before = _groups()
        try:
            result = body(rank, world_size, *arguments)
            _tidy(before)
            functional.linear = linear  # ZeRO 3 leaves its own there, which rounds otherwise
        except BaseException:
            connection.send((traceback.format_exc(), None, 0))
            raise
        connection.send((None, result, _threads()))


def _threads() -> int:
    """Return how many threads this process has; 0 where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def _groups() -> set[Any]:
    from torch.distributed import distributed_c10d

    return set(distributed_c10d._world.pg_map)


def _tidy(before: set[Any]) -> None:
    """Destroy the process groups that a body made (each has threads), and free its memory."""
    import torch.distributed as dist

    _let_go_of_engines()
    gc.collect()
    kept = set(before)
    if (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
        groups.mpu = None
        kept.add(groups._WORLD_GROUP)  # a clone of the world, made once in a process
    if (pipes := sys.modules.get("deepspeed.runtime.pipe.p2p")) is not None:
        pipes._grid = None  # it holds the groups of the last pipeline
    dist.barrier()
    # In the order of their making, which is the same on every rank.
    for group in sorted(_groups() - kept, key=lambda group: group.group_name):
        dist.destroy_process_group(group)


def _let_go_of_engines() -> None:
    """Take DeepSpeed's hooks off the parameters: through them an engine keeps itself alive.

    And with it its process groups, whose threads wake a hundred times a second.  (What ZeRO-3
    hangs into autograd stays.)
    """
    if (engine := sys.modules.get("deepspeed.runtime.engine")) is None:
        return
    # By type: some of all the objects there are look up what isinstance asks them for.
    kinds = {engine.DeepSpeedEngine, *engine.DeepSpeedEngine.__subclasses__()}
    for left in [thing for thing in gc.get_objects() if type(thing) in kinds]:
        left.destroy()
