"""The pools themselves: the same processes again, failures told, nothing left behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import runs
from support.gloo import RankFailedError
from support.pool import RankPool, RankPools
from support.scenarios import Shape
from support.training import Harness


def _who(rank: int, world_size: int, factor: float) -> tuple[int, float]:
    value = torch.tensor(rank * factor)
    dist.all_reduce(value)
    return os.getpid(), value.item()


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.barrier()


def test_calls_share_processes_and_a_failure_starts_new_ones() -> None:
    pools = RankPools()
    try:
        first, second = pools.call(_who, 2, 2.0), pools.call(_who, 2, 3.0)
        assert [pid for pid, _ in first] == [pid for pid, _ in second]
        assert [value for _, value in first] == [2.0, 2.0]
        with pytest.raises(RankFailedError, match="the cause"):
            pools.call(_fail, 2)
        third = pools.call(_who, 2, 1.0)
        assert not {pid for pid, _ in third} & {pid for pid, _ in first}
    finally:
        pools.close()


def test_ranks_with_too_many_threads_are_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.pool._MOST_THREADS", 0)
    pools = RankPools()
    try:
        first, second = pools.call(_who, 2, 2.0), pools.call(_who, 2, 3.0)
        assert not {pid for pid, _ in first} & {pid for pid, _ in second}
        assert [value for _, value in second] == [3.0, 3.0]
    finally:
        pools.close()


def test_a_death_is_told() -> None:
    pool = RankPool(2)
    with pytest.raises(RankFailedError, match=r"exit codes \[7, "):
        pool.call(_die)
    assert not pool.usable


def _engine(rank: int, world_size: int, file: Path) -> tuple[int, int]:
    harness = Harness(file)
    harness.run(1)
    harness.close()
    return len(dist.distributed_c10d._world.pg_map), threading.active_count()


def test_engines_leave_nothing_behind(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data", documents=40)
    files = [
        runs.write_config(
            tmp_path / f"{shape}.yml",
            runs.config(tmp_path / "data", tmp_path / "run", train_iters=1, **shape.keys),
        )
        for shape in (Shape(pipe=2), Shape(tensor=2), Shape(data=2))
    ]
    # The same ranks throughout: RankPools would start others where threads were left.
    pool = RankPool(2)
    try:
        # The first engines also make what a process keeps: a clone of the group of all ranks.
        counts = [[pool.call(_engine, file) for file in files] for _ in range(3)]
    finally:
        pool.close()
    assert counts[1] == counts[2]
