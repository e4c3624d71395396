"""The harness itself: results by rank, the first cause of a failure, no wait for ever."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.gloo import RankFailedError, run_ranks


def _sum(rank: int, world_size: int, factor: float) -> dict[str, object]:
    value = torch.tensor(rank * factor)
    dist.all_reduce(value)
    return {"sum": value.item(), "env": os.environ["RANK"], "world": world_size}


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(600)


def test_results_come_back_by_rank() -> None:
    results = run_ranks(_sum, 3, 2.0)
    assert [result["sum"] for result in results] == [6.0, 6.0, 6.0]
    assert [result["env"] for result in results] == ["0", "1", "2"]


def test_failures_are_told() -> None:
    with pytest.raises(RankFailedError, match="the cause"):
        run_ranks(_fail, 2)
    with pytest.raises(RankFailedError, match=r"exit code 7"):
        run_ranks(_die, 2)


def test_a_hanging_rank_ends_with_the_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="did not end in time"):
        run_ranks(_hang, 2, timeout=8.0)
    assert time.monotonic() - start < 60
