"""Blocks about measuring a run: DeepSpeed's FLOPs profiler, and its monitors under our names."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, model_validator

from megatron.config.base import Count, Group, Int, NonNegative, Text, invalid, listed


class FlopsProfilerConfig(Group):
    """Count the floating-point operations of one step, module by module, as torch runs them."""

    enabled: bool = False
    """Whether a step is profiled."""
    profile_step: Count = 1
    """Which step, counted from 1."""
    module_depth: Int = -1
    """How deep modules are told apart; -1 = to the last."""
    top_modules: Count = 1
    """How many of the most expensive modules of every depth are named."""
    detailed: bool = True
    """Whether every module down to `module_depth` is listed, with its operations."""
    output_file: Text | None = None
    """Takes the profile. Default: `profile/flops.txt` in `run_dir`."""
    recompute_fwd_factor: NonNegative = 0.0
    """DeepSpeed's estimate of what is recomputed; it is counted here, so the key has no effect."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.module_depth < -1:
            raise invalid("module_depth", "should be -1, or at least 0")
        return self


class CommsLoggerConfig(Group):
    """DeepSpeed's log of what it sends between ranks."""

    enabled: bool = False
    """Whether it is kept."""
    verbose: bool = False
    """Whether every operation is printed as it runs."""
    prof_all: bool = True
    """Whether all kinds of operations are logged."""
    prof_ops: Annotated[tuple[Text, ...], BeforeValidator(listed)] = ()
    """The kinds that are, where not all are: `all_reduce`, `reduce_scatter` and so on."""
    debug: bool = False
    """Whether the name of the calling function is added."""


class CsvMonitorConfig(Group):
    """Numbers as tables: one file a number, with the columns step and value."""

    enabled: bool = False
    """Whether they are written."""
    output_path: Text | None = None
    """Folder of the job's folder. Default: `csv` in `run_dir`."""
    job_name: Text | None = None
    """Folder of the files within. Default: none."""
