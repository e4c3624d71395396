"""Which sinks a run has: decided once, from the logging group of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.monitor.console import ConsoleSink
from megatron.monitor.jsonl import JsonlSink
from megatron.monitor.sink import Sink, SinkGroup


def build_sinks(
    logging: Any,
    run_dir: Path | str,
    *,
    rank: int = 0,
    total_steps: int | None = None,
    audit_samples: bool = False,
    console: bool = True,
) -> SinkGroup:
    """Return the sinks that the configuration asks for.

    Args:
        logging: the configuration's logging group: ``log_interval``, ``steps_per_print``,
            ``tensorboard_dir``, ``use_tensorboard``, ``csv_monitor``, ``use_wandb`` and
            ``wandb_*``, ``use_comet`` and ``comet_*``. A field it lacks counts as not set.
        run_dir: the run folder.
        rank: global rank; only rank 0 has sinks, the others get an empty group.
        total_steps: length of the run.
        audit_samples: write ``samples.jsonl``.
        console: show the run on standard output.

    Raises:
        MissingExtraError: a sink is asked for and its library is not installed.
    """
    if rank != 0:
        return SinkGroup()
    run_dir = Path(run_dir)
    interval = getattr(logging, "log_interval", None) or 1
    sinks: list[Sink] = [JsonlSink(run_dir, log_interval=interval, audit=audit_samples)]
    if console:
        shown = getattr(logging, "steps_per_print", None) or interval
        sinks.append(ConsoleSink(log_interval=shown, total_steps=total_steps))
    sinks += chart_sinks(logging, run_dir, interval)
    return SinkGroup(sinks)


def chart_sinks(logging: Any, run_dir: Path, interval: int) -> list[Sink]:
    """Return the chart services that the configuration asks for; their libraries load here."""

    def option(name: str) -> Any:
        return getattr(logging, name, None)

    sinks: list[Sink] = []
    if (tables := option("csv_monitor")) is not None and tables.enabled:
        from megatron.monitor.tables import CsvSink

        folder = Path(tables.output_path or run_dir / "csv") / (tables.job_name or "")
        sinks.append(CsvSink(folder, log_interval=interval))
    if option("use_tensorboard") or option("tensorboard_dir"):
        from megatron.monitor.tensorboard import TensorBoardSink

        directory = option("tensorboard_dir") or run_dir / "tensorboard"
        sinks.append(TensorBoardSink(directory, log_interval=interval))
    if option("use_wandb"):
        from megatron.monitor.wandb import WandbSink

        sinks.append(
            WandbSink(
                run_dir,
                project=option("wandb_project") or "neox",
                entity=option("wandb_team"),
                group=option("wandb_group"),
                name=option("wandb_run_name"),
                host=option("wandb_host"),
                log_interval=interval,
            )
        )
    if option("use_comet"):
        from megatron.monitor.comet import CometSink

        sinks.append(
            CometSink(
                run_dir,
                project=option("comet_project"),
                workspace=option("comet_workspace"),
                name=option("comet_experiment_name"),
                tags=option("comet_tags") or (),
                others=option("comet_others"),
                log_interval=interval,
            )
        )
    return sinks
