"""Telling DeepSpeed of the layout."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from megatron.parallel.layout import Layout


def process_topology(layout: Layout) -> Any:
    """Return DeepSpeed's description of a layout; both number the ranks alike."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(
        num_pp=layout.pipe_size, num_mp=layout.tensor_size, num_dp=layout.data_size
    )


def grid(layout: Layout) -> Any | None:
    """Return DeepSpeed's process groups of a layout; None where all ranks are data ranks.

    Collective: every rank calls it.
    """
    if layout.tensor_size == 1:
        return None
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineParallelGrid(topology=process_topology(layout))


def forget_grid() -> None:
    """Let the next engine of this process have a layout of its own.

    DeepSpeed keeps the last engine's groups in a module and never clears them, so that an
    engine without model parallelism would go on with the groups of the one before it.
    """
    from deepspeed.utils import groups

    groups.mpu = None
    for kept in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        kept.clear()
