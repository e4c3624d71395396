"""Start what was planned, on this node or on all."""

from __future__ import annotations

from pathlib import Path

from megatron.launch.cluster import supervise_all
from megatron.launch.command import LaunchPlan
from megatron.launch.lock import RunLock
from megatron.launch.remote import RemotePlan
from megatron.launch.supervise import supervise


def start(
    plan: LaunchPlan | RemotePlan, run_dir: Path, log_dir: Path, *, save_timeout: float
) -> int:
    """Lock the run folder, run the job to its end and return the exit code.

    Where every node has a parent of its own (``launcher: torchrun``), the first one locks.

    Raises:
        NeomixError: another run is in the folder, or the launcher cannot start.
    """
    if isinstance(plan, LaunchPlan) and plan.first_rank > 0:
        return supervise(plan, log_dir, save_timeout=save_timeout)
    with RunLock(run_dir):
        if isinstance(plan, RemotePlan):
            return supervise_all(plan, log_dir, save_timeout=save_timeout)
        return supervise(plan, log_dir, save_timeout=save_timeout)
