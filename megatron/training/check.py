"""``deepy.py --check``: open everything the run would, compute what it would take, start nothing.

No torch is imported, so the answer comes in a second or two.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config, deepspeed_config, resolve_batch
from megatron.errors import RunError
from megatron.mixing import RunContext, build_mixer
from megatron.training.domains import OpenDomains, open_domains, start_weights
from megatron.training.summary import check_device, complete, estimate, startup_report


def check(config: Config, *, world_size: int, gpus: int, say: Callable[[str], None] = print) -> int:
    """Check a configuration as a run of ``world_size`` ranks would find it.

    Args:
        config: the loaded configuration.
        world_size: ranks of the job.
        gpus: GPUs of this node; 0 means a CPU run.
        say: takes the lines of the report.

    Returns:
        0; what does not fit is raised.

    Raises:
        NeomixError: the first thing that the run would stop at.
    """
    domains = open_domains(
        config.domains,
        split=config.split,
        seq_length=config.model.context_length,
        seed=config.training.seed,
        epoch_offset=config.training.epoch_offset,
    )
    try:
        config = complete(config, domains)
        weights = start_weights(config.mixing, config.domains, domains)
        micro, accumulation, total = resolve_batch(config.batch, world_size)
        _check_mixing(config, domains, weights, total)
        check_device(config.precision, on_cpu=gpus == 0)
        deepspeed_config(config, micro=micro, accumulation=accumulation, data_size=world_size)
        startup_report(config, domains, weights, world_size, say)
        _check_read(domains)
        _check_disk(config, say)
        _report_checkpoint(config, say)
        _warn(config, domains, world_size, gpus, say)
    finally:
        domains.close()
    say("check: everything the run needs is there")
    return 0


def _check_mixing(config: Config, domains: OpenDomains, weights: np.ndarray, total: int) -> None:
    """Build the mixer and let it decide once: its own checks are the run's."""
    mixer = build_mixer(
        config.mixing.method,
        domains=domains.names,
        weights=weights,
        context=RunContext(
            total_steps=config.training.train_iters,
            tokens_per_step=total * config.model.context_length,
        ),
        **config.mixing.options,
    )
    mixer.decide(step=1)


def _check_read(domains: OpenDomains) -> None:
    """Read one sample of every part, which a damaged disk would refuse."""
    for domain in (*domains.train, *domains.valid, *domains.test):
        if domain is not None:
            domain.sample(0, 0)


def _check_disk(config: Config, say: Callable[[str], None]) -> None:
    folder = Path(config.checkpoint.save_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise RunError(f"cannot write into {folder}; give another run_dir, or make it writable")
    free = shutil.disk_usage(folder).free
    one = estimate(config, 1).checkpoint_bytes
    kept = config.checkpoint.keep_last_n_checkpoints
    last = config.training.train_iters
    saves = sum(config.checkpoint.saves_at(step, last) for step in range(last + 1))
    # While one is written the oldest is still there.
    needed = one * (min(saves, kept + 1) if kept else saves)
    say(
        f"disk: {saves} checkpoints of about {one / 2**20:,.0f} MiB, {kept or 'all'} kept: about "
        f"{needed / 2**30:.2f} GiB of {free / 2**30:.1f} GiB free in {folder}"
    )
    if needed > free:
        raise RunError(
            f"the checkpoints need about {needed:,} bytes and {folder} has {free:,} free; free "
            "space, raise save_interval, lower keep_last_n_checkpoints, or give another run_dir"
        )


def _report_checkpoint(config: Config, say: Callable[[str], None]) -> None:
    steps = CheckpointStore(config.checkpoint.save_dir).steps()
    if steps:
        say(f"resume: the newest checkpoint in {config.checkpoint.save_dir} is of step {steps[-1]}")


def _warn(
    config: Config,
    domains: OpenDomains,
    world_size: int,
    gpus: int,
    say: Callable[[str], None],
) -> None:
    if gpus and config.mixing.lag == 0 and config.mixing.method != "static":
        say(
            "advice: on GPUs, mixing.lag: 1 lets the next batch be read while a step runs; a "
            "decision then trails its losses by one step"
        )
    for name, train, valid in zip(domains.names, domains.train, domains.valid, strict=True):
        shared = _shared_prefixes(config, name)
        if valid is not None and shared:
            say(f"warning: domain '{name}' validates on training data: {', '.join(shared)}")
        windows = train.num_windows(0)
        if windows < 10:
            say(f"warning: domain '{name}' has only {windows} windows; it will repeat often")


def _shared_prefixes(config: Config, name: str) -> list[str]:
    domain = config.domains[name]
    if domain.uses_split:
        return []
    train = {prefix for other in config.domains.values() for prefix in other.train}
    return sorted(train & {*(domain.valid or ()), *(domain.test or ())})
