"""What is measured of a few steps: traces, allocations in CUDA memory, operations, times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.config import Config
from megatron.engine.engine import TrainEngine
from megatron.engine.observer import StepOutcome
from megatron.engine.runtime import Runtime, communication_totals
from megatron.errors import ConfigError
from megatron.monitor.record import is_logged
from megatron.training.flops import FlopsProfiler

FOLDER, TRACE, MEMORY = "profile", "trace.json", "memory.pickle"
FLOPS, COMMUNICATION, STATE = "flops.txt", "communication.json", "deepspeed.json"
_ALLOCATIONS = 1_000_000


class StepProfiler:
    """Traces some steps; see :class:`megatron.engine.observer.StepObserver`."""

    def __init__(
        self,
        folder: Path,
        *,
        first: int,
        end: int,
        trace: bool,
        memory: bool,
        memory_file: Path | None = None,
    ) -> None:
        """Say what is traced.

        Args:
            folder: takes the files.
            first: first step of the trace.
            end: step before which it ends.
            trace: whether operations are traced.
            memory: whether allocations in CUDA memory are.
            memory_file: takes those instead of a file in the folder.
        """
        self._memory_file = memory_file or folder / MEMORY
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

    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Write the files after the last step of the trace."""
        if step != self._steps[-1]:
            return {}
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._folder / TRACE))
            self._profiler = None
        if self._recording:
            self._memory_file.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._memory_file))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False
        return {}


def attach_profiler(config: Config, engine: TrainEngine, runtime: Runtime) -> None:
    """Let rank 0 trace, count and write down what the ``logging`` group asks for.

    Raises:
        ConfigError: allocations are wanted, and there is no CUDA device.
    """
    logging = config.logging
    if logging.memory_profiling and runtime.device.type != "cuda":
        raise ConfigError(
            "memory_profiling follows allocations in CUDA memory, and this run has no GPU; leave "
            "it out (--plan says what the memory is used for)"
        )
    if logging.wall_clock_breakdown:
        engine.take_times(
            logged=partial(is_logged, log_interval=logging.log_interval), device=runtime.device
        )
    if runtime.rank != 0:
        return
    folder = Path(config.checkpoint.run_dir) / FOLDER
    if logging.profile or logging.memory_profiling:
        path = logging.memory_profiling_path
        engine.observe(
            StepProfiler(
                folder,
                first=logging.profile_step_start,
                end=logging.profile_step_stop,
                trace=logging.profile,
                memory=logging.memory_profiling,
                memory_file=None if path is None else Path(path),
            )
        )
    if (asked := logging.flops_profiler) is not None and asked.enabled:
        file = Path(asked.output_file) if asked.output_file else folder / FLOPS
        engine.observe(FlopsProfiler(engine.module, asked, file))


def dump_state(config: Config, engine: TrainEngine, given: Mapping[str, Any]) -> None:
    """Write what DeepSpeed was given and what it made of it into the run's folder.

    Args:
        config: of the run.
        engine: newly built.
        given: DeepSpeed's own configuration.
    """
    path = Path(config.checkpoint.run_dir) / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"given": dict(given), **engine.facts()}
    # DeepSpeed is told to print never: infinity is no JSON.
    text = json.dumps(content, indent=1, default=str).replace(": Infinity", ": null")
    path.write_text(text + "\n", encoding="utf-8")


def write_communication(config: Config, runtime: Runtime) -> None:
    """Write the totals of DeepSpeed's log of communication, where it kept one; collective."""
    if (log := config.logging.comms_logger) is None or not log.enabled:
        return
    found = communication_totals()
    if runtime.rank == 0:
        path = Path(config.checkpoint.run_dir) / FOLDER / COMMUNICATION
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
