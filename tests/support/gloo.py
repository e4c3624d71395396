"""Run a function on several processes that talk over gloo, and return what each returned.

    def body(rank: int, world_size: int, scale: float) -> float: ...
    results = run_ranks(body, 2, 0.5)

``body`` must be a module-level function.  Inside it torch.distributed is initialised and the
environment is that of a launcher (RANK, LOCAL_RANK, WORLD_SIZE, …).  Processes are forked from
one server that has torch and DeepSpeed imported, so a start costs a fraction of a second after
the first; nothing is shared with the test process but the arguments and the results.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch.distributed",
    "deepspeed",
    # What these drag in costs every engine's first step in a process two seconds.
    "torch._inductor",
    "deepspeed.runtime.zero.muon.original_muon",
]
"""What ranks find imported when they start."""


class RankFailedError(AssertionError):
    """A rank raised, died or did not end in time; the message holds what it said."""


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``body(rank, world_size, *arguments)`` on every rank; return results by rank.

    Raises:
        RankFailedError: a rank raised (its traceback is shown), died, or ran out of time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [
            context.Process(
                target=run_rank,
                args=(body, rank, world_size, folder, environment or {}, list(sys.path), arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout)
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                rank.join()
        return [_load(Path(folder) / f"result-{rank}") for rank in range(world_size)]


def _wait(ranks: list[Any], folder: Path, deadline: float) -> None:
    """Wait for all ranks; the first failure ends the wait."""
    running: dict[int, BaseProcess] = dict(enumerate(ranks))
    while running:
        wait([rank.sentinel for rank in running.values()], timeout=deadline - time.monotonic())
        ended = {index: rank for index, rank in running.items() if not rank.is_alive()}
        # Peers of a failed rank fail too, by a lost connection: let the first cause be told.
        for index, rank in ended.items():
            if rank.exitcode != 0:
                raise RankFailedError(_story(folder, index, rank.exitcode))
            del running[index]
        if running and time.monotonic() >= deadline:
            stuck = ", ".join(str(index) for index in running)
            raise RankFailedError(f"ranks {stuck} did not end in time{reports(folder)}")


def _story(folder: Path, index: int, code: int | None) -> str:
    time.sleep(0.2)
    return f"rank {index} ended with exit code {code}{reports(folder)}"


def reports(folder: Path) -> str:
    """Return what the failed ranks wrote, in the order in which they failed."""
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    return "".join(f"\n--- {path.name}\n{path.read_text()}" for path in errors)


def run_rank(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    path: list[str],
    arguments: tuple[Any, ...],
) -> None:
    """Be one rank: join the others, call ``body``, leave its result in ``folder``."""
    sys.path[:] = path
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        }
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=300),
        )
        result = body(rank, world_size, *arguments)
        torch.save(result, Path(folder) / f"result-{rank}")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter teardown with gloo and DeepSpeed loaded aborts now and then.
    os._exit(code)


def _load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=False)
