"""Whole runs on the pool's ranks: what ``deepy.py train.py`` does, without starting processes.

A launched run takes its ranks seconds to import what it needs; here a dozen steps take one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from support.pool import RankPools

from megatron.config import load_config


def train(pools: RankPools, file: Path, ranks: int = 2) -> None:
    """Train what ``file`` describes, from its newest checkpoint on, to its end.

    Raises:
        RankFailedError: a rank raised; its traceback is shown.
    """
    # Where the launcher's own store would be: the ranks' watchdog keeps its notices there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert pools.call(_be_rank, ranks, str(file), store.port) == [0] * ranks


def _be_rank(rank: int, world_size: int, file: str, port: int) -> int:
    import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
    from megatron.engine.runtime import start_runtime
    from megatron.launch.stop import StopFlag
    from megatron.training.run import run

    os.environ["MASTER_PORT"] = str(port)
    return run(load_config([file]), start_runtime(deterministic=True), StopFlag())
