"""Traces of a few steps: torch's profiler, and the allocations in CUDA memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron.config import Config
from megatron.engine.engine import TrainEngine
from megatron.engine.runtime import Runtime
from megatron.errors import ConfigError

FOLDER, TRACE, MEMORY = "profile", "trace.json", "memory.pickle"
_ALLOCATIONS = 1_000_000


class StepProfiler:
    """Traces some steps; see :class:`megatron.engine.observer.StepObserver`."""

    def __init__(self, folder: Path, *, first: int, end: int, trace: bool, memory: bool) -> None:
        """Say what is traced.

        Args:
            folder: takes the files.
            first: first step of the trace.
            end: step before which it ends.
            trace: whether operations are traced.
            memory: whether allocations in CUDA memory are.
        """
        self._folder, self._steps = folder, range(first, end)
        self._trace, self._memory = trace, memory
        self._profiler: torch.profiler.profile | None = None
        self._recording = False

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Start where the trace begins, or in the middle of it after a resume."""
        if step not in self._steps:
            return
        if self._trace and self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        if self._memory and not self._recording:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
            self._recording = True

    def end(
        self, step: int, *, grad_norm: float | torch.Tensor | None, skipped: bool
    ) -> Mapping[str, float]:
        """Write the files after the last step of the trace."""
        if step != self._steps[-1]:
            return {}
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._folder / TRACE))
            self._profiler = None
        if self._recording:
            torch.cuda.memory._dump_snapshot(str(self._folder / MEMORY))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False
        return {}


def attach_profiler(config: Config, engine: TrainEngine, runtime: Runtime) -> None:
    """Let rank 0 trace the steps that ``profile`` and ``memory_profiling`` ask for.

    Raises:
        ConfigError: allocations are wanted, and there is no CUDA device.
    """
    logging = config.logging
    if logging.memory_profiling and runtime.device.type != "cuda":
        raise ConfigError(
            "memory_profiling follows allocations in CUDA memory, and this run has no GPU; leave "
            "it out (--plan says what the memory is used for)"
        )
    if runtime.rank != 0 or not (logging.profile or logging.memory_profiling):
        return
    engine.observe(
        StepProfiler(
            Path(config.checkpoint.run_dir) / FOLDER,
            first=logging.profile_step_start,
            end=logging.profile_step_stop,
            trace=logging.profile,
            memory=logging.memory_profiling,
        )
    )
