"""Job scripts for Slurm."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launch.devices import Devices, cuda_possible, detect_devices
from megatron.launch.request import LaunchRequest

# Between the signal and the time limit, beside the time that saving may take: the step that
# is being done is finished first.
_STEP_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What Slurm is asked for beside nodes and devices.

    Attributes:
        name: name of the job.
        output: file for what the job prints; Slurm's placeholders such as ``%j`` work.
        save_timeout: seconds that saving may take.
        partition: partition; ``None``: the cluster's default.
        time: time limit in Slurm's form; ``None``: the partition's.
        further: more flags of sbatch (``--qos=high --mem=0``), quoted as for a shell.
        tasks: file with one configuration file's path a line; the job is then an array with a
            task for each, and ``deepy.py`` gets the task's own as its last argument.
        task_count: lines of that file.
        at_a_time: tasks that may run at once; ``None``: as the cluster likes.
    """

    name: str
    output: Path
    save_timeout: float
    partition: str | None = None
    time: str | None = None
    further: str | None = None
    tasks: Path | None = None
    task_count: int = 0
    at_a_time: int | None = None


def sbatch_script(
    arguments: Sequence[str],
    request: LaunchRequest,
    options: JobOptions,
    *,
    environ: Mapping[str, str] = os.environ,
    devices: Devices | None = None,
) -> str:
    """Return a job script that runs ``deepy.py`` with ``arguments`` on all nodes of its job.

    The script has the run save before the time limit, and puts itself back into the queue to
    go on; a run that ends by itself, or fails, is not queued again.

    Args:
        arguments: the program, the configuration and overrides, as for ``deepy.py``.
        request: what the configuration asks for.
        options: what the job is called and limited to.
        environ: the environment.
        devices: what this machine has; found out if not given.

    Raises:
        ConfigError: ``num_gpus`` is not known, a time or a flag has the wrong form.
    """
    nodes = request.num_nodes or 1
    on_gpu = cuda_possible(environ)
    count = request.num_gpus or len((devices or detect_devices(environ)).cuda)
    if on_gpu and not count:
        raise ConfigError("a job script needs num_gpus, the GPUs of each node; set it")
    if options.time and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", options.time):
        raise ConfigError(f"--time is {options.time!r}; write it as 2-12:00:00 or 12:00:00")
    lead = math.ceil(options.save_timeout) + _STEP_SECONDS
    if options.time and _seconds(options.time) <= lead:
        raise ConfigError(
            f"--time is {options.time}, but the run is told to save {lead} seconds before the end "
            "(save_timeout, and time for a step), so it would save at once; give more time, or "
            "lower save_timeout"
        )
    flags = [
        f"--job-name={options.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={count}" if on_gpu else f"--cpus-per-task={count or 1}",
        f"--chdir={os.getcwd()}",
        f"--output={options.output}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{lead}",
    ]
    for name, value in (
        ("partition", options.partition),
        ("time", options.time),
        ("account", request.account),
        ("comment", request.comment),
    ):
        flags += [f"--{name}={value}"] if value else []
    if options.tasks is not None:
        limit = f"%{options.at_a_time}" if options.at_a_time else ""
        flags.append(f"--array=0-{options.task_count - 1}{limit}")
    further = shlex.split(options.further or "")
    if any(not word.startswith("-") for word in further):
        raise ConfigError(
            f"--sbatch-args is {options.further!r}; write each flag as one word, like --qos=high"
        )
    deepy = Path(__file__).resolve().parents[2] / "deepy.py"
    settings = ["launcher=slurm", f"num_nodes={nodes}", f"num_gpus={count or 1}"]
    command = shlex.join([sys.executable, str(deepy), *arguments])
    command += f" {_TASK}" if options.tasks is not None else ""
    command += f" --set {shlex.join(settings)}"
    chosen = _CHOICE.format(tasks=shlex.quote(str(options.tasks))) if options.tasks else ""
    lines = "\n".join(f"#SBATCH {_line(flag)}" for flag in [*flags, *further])
    return _SCRIPT.format(flags=lines, command=chosen + command)


def _seconds(time: str) -> int:
    """Return a time limit in Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _line(flag: str) -> str:
    """Quote one flag as sbatch reads it."""
    name, equals, value = flag.partition("=")
    if "\n" in flag or '"' in flag:
        raise ConfigError(f"{flag!r} cannot stand in a job script: it has a quote or a line break")
    return f'{name}{equals}"{value}"' if re.search(r"[\s#';&|<>()$`\\]", value) else flag


_TASK = '"$task"'
_CHOICE = 'task=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {tasks})\n'

_SCRIPT = """\
#!/bin/bash
# Written by deepy.py --sbatch; submit it with sbatch.
{flags}

# Slurm sends USR1 to this shell some minutes before the time limit. The run then saves and
# ends with 143, and the job goes back into the queue to continue from there.
{command} &
run=$!
limit=
trap 'limit=1; kill -USR1 "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM INT
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
done
wait "$run"
code=$?
if [ "$code" -eq 143 ] && [ -n "$limit" ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""
