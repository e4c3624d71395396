"""A checkpoint that is opened to look at has been read by every rank when it is open."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

from support import relayout, runs
from support.pool import RankPools

from megatron.config import load_config
from megatron.engine.runtime import start_runtime
from megatron.training import inference
from megatron.training.inference import OpenModel


def opened(rank: int, world_size: int, file: Path) -> int:
    """Open the newest checkpoint with a slow second rank; the first throws its cache away."""
    build = inference.build_frozen

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(2.0 * rank)
        return build(*arguments, **options)

    runtime = start_runtime(deterministic=True)
    cache = file.parent / "cache"
    one = OpenModel.create(load_config([str(file)]), runtime, rows=2, cache=cache, say=print)
    with mock.patch.object(inference, "build_frozen", late):
        _, step = one.load(None)
    if rank == 0:
        assert cache.exists()
        shutil.rmtree(cache)
    return step


def test_what_was_converted_may_go_once_the_model_is_open(pools: RankPools, tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    content = runs.config(tmp_path / "data", tmp_path / "run", train_iters=2)
    file = runs.write_config(tmp_path / "config.yml", content)
    assert pools.call(relayout.train, 2, file) == [0, 0]
    assert pools.call(opened, 2, file) == [2, 2]
