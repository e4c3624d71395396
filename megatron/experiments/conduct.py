"""What every command that runs a study shares: its flags, and how a study is carried out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.errors import ConfigError
from megatron.experiments.estimate import estimate
from megatron.experiments.execute import Outcome, execute
from megatron.experiments.finished import read_finish
from megatron.experiments.starting import Starter
from megatron.experiments.study import Base, Study
from megatron.launch.devices import cuda_possible, detect_devices
from megatron.launch.request import LAUNCH_KEYS, LaunchRequest
from megatron.launch.sbatch import JobOptions, sbatch_script

SCRIPT = "array.sbatch"
TASKS = "array.txt"


def add_study_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Add the flags of a command that runs a study.

    Args:
        parser: of the command.
        out: default folder of the results.
    """
    parser.add_argument(
        "conf_file",
        nargs="*",
        metavar="CONFIG",
        help="configuration files that all runs begin with, merged; '.yml' may be left out",
    )
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of those files")
    add_set_argument(parser)
    add_run_arguments(parser, out=out)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, which changes keys of all runs."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="set a key of all runs (several may follow, or repeat the flag)",
    )


def add_run_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Add the flags that say where results go and how runs are run.

    Args:
        parser: of the command.
        out: default folder of the results.
    """
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(out), help=f"results (default: {out})"
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        help="folder of the runs' folders, which studies share (default: 'runs' beside --out)",
    )
    where = parser.add_argument_group("how the runs are run")
    where.add_argument(
        "--dry-run", action="store_true", help="list the runs and what they take; start nothing"
    )
    where.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)"
    )
    where.add_argument(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="how often a run that failed is started again (default: 1)",
    )
    where.add_argument(
        "--rate",
        type=float,
        metavar="FLOPS",
        help="FLOPs a second of one run, for the estimated time (default: measured)",
    )
    where.add_argument(
        "--command",
        metavar="TEMPLATE",
        help="shell command that starts a run, such as 'ssh node{slot} {command}'; it must last "
        "as long as the run ({slot}: 0 to N-1; also {name} and {folder})",
    )
    where.add_argument(
        "--slurm",
        action="store_true",
        help="write the runs that are not finished as an array job for sbatch, and stop",
    )
    for flag, metavar, text in (
        ("--time", "LIMIT", "with --slurm: time limit of a run, such as 12:00:00"),
        ("--partition", "NAME", "with --slurm: partition"),
        ("--sbatch-args", "FLAGS", "with --slurm: more flags in one word"),
    ):
        where.add_argument(flag, metavar=metavar, help=text)


def base_of(options: argparse.Namespace) -> Base:
    """Return the configuration that a command line names."""
    return Base(
        files=tuple(options.conf_file),
        conf_dir=options.conf_dir,
        overrides=tuple(options.overrides),
    )


def runs_dir(options: argparse.Namespace) -> Path:
    """Return the folder of the runs' folders."""
    given: Path | None = options.runs
    out: Path = options.out
    return given if given is not None else out.absolute().parent / "runs"


def gpus_of(options: argparse.Namespace, base: Base) -> int:
    """Return the CUDA devices of the machine that a run starts on; 0: it runs on the CPU.

    Where runs start elsewhere, this machine's devices say nothing: GPUs are taken to be there
    if this installation could use them.
    """
    if options.slurm or options.command:
        return (base.load().launch.num_gpus or 1) if cuda_possible(os.environ) else 0
    return len(detect_devices(os.environ).cuda)


def conduct(
    study: Study, options: argparse.Namespace, say: Callable[[str], None] = print
) -> Outcome | None:
    """Show what a study takes, and carry it out as the command line asks.

    Args:
        study: planned.
        options: with the flags of :func:`add_study_arguments`.
        say: takes the lines for the user.

    Returns:
        What became of the runs; None if none was to be started (``--dry-run``, ``--slurm``).

    Raises:
        NeomixError: an option is wrong, or a run cannot be started.
    """
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise ConfigError(f"--rate is {options.rate}; give FLOPs a second, such as 5e9")
    if options.slurm and options.command:
        raise ConfigError("--slurm and --command exclude each other: choose one")
    for flag in ("time", "partition", "sbatch_args"):
        if getattr(options, flag) is not None and not options.slurm:
            raise ConfigError(f"--{flag.replace('_', '-')} belongs to --slurm")
    starter = Starter(
        jobs=options.jobs, devices=detect_devices(os.environ), template=options.command
    )
    if options.dry_run:
        list_runs(study, say)
    say(f"{study.name}: {estimate(study, jobs=options.jobs, rate=options.rate).text()}")
    if options.dry_run:
        return None
    study.write_plan(Path(options.out))
    left = [run for run in study.distinct if read_finish(run) is None]
    if options.slurm and left:
        script = write_array(study, options)
        say(
            f"written: {script}, a job with {len(left)} tasks. Submit it with: sbatch {script}\n"
            "When it has ended, give this command again for the results."
        )
        return None
    return execute(study.distinct, starter, retries=options.retries, say=say)


def list_runs(study: Study, say: Callable[[str], None]) -> None:
    """Print a line for every run: state, folder, name, mixture."""
    for run in study.runs:
        state = "done" if read_finish(run) else "begun" if run.request.exists() else "to do"
        weights = " ".join(f"{name}={weight:.3g}" for name, weight in run.weights.items())
        say(f"{state:5} {run.key} {run.name}: {run.method}, seed {run.seed}, {weights}")


def write_array(study: Study, options: argparse.Namespace) -> Path:
    """Write an array job with a task for every run that is not finished; return the script.

    Raises:
        ConfigError: no run is left, or they ask for different launches.
        RunError: the disk refuses.
    """
    left = [run for run in study.distinct if read_finish(run) is None]
    launches = {run.config.launch for run in left} if left else set()
    if len(launches) != 1:
        raise ConfigError("an array job needs runs that are left and that ask for the same launch")
    (launch,) = launches
    folder = Path(options.out).absolute()
    tasks, script = folder / TASKS, folder / SCRIPT
    requests = [run.write_request() for run in left]
    request = LaunchRequest(**{key: getattr(launch, key) for key in LAUNCH_KEYS})
    job = JobOptions(
        name=study.name,
        output=folder / "slurm-%A_%a.out",
        save_timeout=left[0].config.save_timeout,
        partition=options.partition,
        time=options.time,
        further=options.sbatch_args,
        tasks=tasks,
        task_count=len(left),
        at_a_time=options.jobs if options.jobs > 1 else None,
    )
    text = sbatch_script(["train.py"], request, job)
    with disk_errors(script):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(tasks, "".join(f"{path}\n" for path in requests).encode())
        replace_file(script, text.encode())
    return script
