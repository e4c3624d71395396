"""Which layers the stages of a run hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import runs

import megatron.mixing  # noqa: F401
from megatron.config import load_config
from megatron.errors import ConfigError
from megatron.training.layout import layer_bounds

SIZES = ((2, 2), (3, 2), (3, 3), (8, 3), (8, 8))


def bounds(tmp_path: Path, layers: int, stages: int, **changes: Any) -> list[int]:
    content = runs.config(
        tmp_path,
        tmp_path / "run",
        num_layers=layers,
        num_gpus=stages,
        pipe_parallel_size=stages,
        train_micro_batch_size_per_gpu=1,
        **changes,
    )
    return layer_bounds(load_config([str(runs.write_config(tmp_path / "config.yml", content))]))


@pytest.mark.parametrize("vocabulary", [120, 2000, 50000])
@pytest.mark.parametrize(
    ("method", "layers", "stages"),
    [
        *(("parameters", *sizes) for sizes in SIZES),
        *(("uniform", *sizes) for sizes in SIZES),
        *(("type:embedding|output", layers, 2) for layers in (2, 3, 8)),
    ],
)
def test_every_stage_holds_a_block(
    tmp_path: Path, layers: int, stages: int, vocabulary: int, method: str
) -> None:
    """A stage of one parameter group among others of two would never end its first step."""
    found = bounds(
        tmp_path,
        layers,
        stages,
        vocab_size=vocabulary,
        no_weight_tying=True,
        pipe_partition_method=method,
    )
    assert (found[0], found[-1], len(found)) == (0, layers + 3, stages + 1)
    for first, last in pairwise(found):
        assert any(1 <= layer <= layers for layer in range(first, last)), found


@pytest.mark.option("pipe_partition_method")
def test_a_large_vocabulary_takes_as_few_blocks_along_as_it_can(tmp_path: Path) -> None:
    found = bounds(
        tmp_path,
        8,
        4,
        vocab_size=50000,
        no_weight_tying=True,
        pipe_partition_method="parameters",
    )
    assert found == [0, 2, 5, 8, 11]


def test_a_method_that_counts_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pipe_partition_method"):
        bounds(tmp_path, 4, 2, no_weight_tying=True, pipe_partition_method="type:norm|output")
