"""Process start and end: device, determinism, process groups.

DeepSpeed on CPU compiles a shared-memory collective when it initialises, which fails
without a compiler and takes a minute with one; it is switched off before that.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron.engine.board import NoticeBoard
from megatron.engine.lighten import import_muon_uncompiled, keep_freed_memory
from megatron.errors import RunError

# On the host, ranks wait for rank 0 to verify or convert a checkpoint, which may take long.
_HOST_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where this process stands.

    Attributes:
        rank: global rank.
        world_size: number of processes of the job.
        local_rank: rank on this node (the index of its device).
        device: the device that holds the model.
        host_group: gloo group over all ranks for small host-side collectives; on CPU the
            default group itself.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    host_group: dist.ProcessGroup | None

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(group=self.host_group)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON-able ``value``, in the order of the ranks."""
        own = _to_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([own.numel()]), group=self.host_group)
        longest = int(max(size.item() for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: own.numel()] = own
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.host_group)
        return [
            _from_bytes(part[: int(size.item())]) for part, size in zip(parts, sizes, strict=True)
        ]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's JSON-able ``value`` on every rank."""
        own = _to_bytes(value)
        size = torch.tensor([own.numel()])
        dist.broadcast(size, src=0, group=self.host_group)
        buffer = own if self.rank == 0 else torch.zeros(int(size.item()), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self.host_group)
        return _from_bytes(buffer)

    def beside(self) -> Runtime:
        """Return the same ranks with a group of their own, for another thread; collective.

        Threads must not share a group: their collectives would be matched in the order in which
        each process happens to come to them.
        """
        return replace(self, host_group=dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT))


def sum_on_host(
    array: npt.NDArray[np.int64], group: dist.ProcessGroup | None
) -> npt.NDArray[np.int64]:
    """Return the sum of the int64 arrays of a group's ranks; None stands for this rank alone."""
    total = torch.from_numpy(array.astype(np.int64, copy=True))
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.numpy()


def start_runtime(*, deterministic: bool, timeout_minutes: int = 30) -> Runtime:
    """Initialise the process groups from the launcher's environment variables.

    A process that was started without a launcher becomes a job of one rank.

    Raises:
        RunError: the launcher gave more local ranks than this node has GPUs.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500" if os.environ["WORLD_SIZE"] != "1" else "0")
    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise RunError(
                f"local rank {local_rank} has no GPU: this node shows "
                f"{torch.cuda.device_count()}; lower num_gpus or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Or else every buffer that DeepSpeed reserves (gigabytes a step) is filled with NaN.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        # What remains of attention's kernels, flash and plain, adds in a fixed order then.
        torch.backends.cuda.enable_mem_efficient_sdp(False)

    deepspeed = load_deepspeed()
    backend = "nccl" if use_cuda else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=timeout_minutes),
    )
    host_group = (
        dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT) if use_cuda else dist.group.WORLD
    )
    return Runtime(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"),
        host_group=host_group,
    )


def load_deepspeed() -> Any:
    """Import DeepSpeed for the device that DS_ACCELERATOR names; return the module.

    It does not initialise anything: a process that has called it may still be forked.
    """
    # torch renames its collectives now and then; DeepSpeed's calls of the old names would
    # fill the console.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import_muon_uncompiled()
    return deepspeed


def communication_totals() -> dict[str, Any]:
    """Return how often DeepSpeed sent how much, by operation and size in bytes; collective."""
    import deepspeed.comm as comm

    logged = comm.log_summary(return_dict=True) or {}
    return {
        name: {str(size): dict(told) for size, told in sizes.items()}
        for name, sizes in logged.get("summary", {}).items()
    }


def open_board(runtime: Runtime) -> NoticeBoard | None:
    """Return the notice board of all ranks; ``None`` in a job of one."""
    return NoticeBoard(runtime.rank, runtime.world_size) if runtime.world_size > 1 else None


def end_process(code: int, *, collective: bool) -> NoReturn:
    """Leave the process for good.

    Interpreter teardown with gloo and DeepSpeed loaded aborts now and then, so a rank
    never tears down: it flushes, takes its leave of the other ranks, and exits.

    Args:
        code: exit code.
        collective: every rank is here; wait for them and destroy the groups. False after
            an error that only this rank may have met.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if collective and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    os._exit(code)


def _to_bytes(value: Any) -> torch.Tensor:
    # JSON, not pickle: what comes from another process is data and never code.
    return torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
