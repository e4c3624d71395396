"""Runs that keep their checkpoints at some points, and short runs that start there.

What a domain's data does to the losses at one point of a run is measured by its children:
runs of a few steps on fixed mixtures, from the checkpoint of that point, with its optimizer
and its learning rate (Aioli, arXiv 2411.05735, section 4).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config
from megatron.errors import ConfigError, RunError
from megatron.experiments.bounds import FloatArray, free_bounds
from megatron.experiments.designs import well_spread
from megatron.experiments.study import KEY_LENGTH, PlannedRun, Variant, static_overrides
from megatron.training.schedule import run_schedule

PARENT: Final = "parent"
CHILD: Final = "child"


def point_steps(total: int, count: int) -> tuple[int, ...]:
    """Return ``count`` steps that divide a run of ``total`` evenly, its ends left out.

    Raises:
        ConfigError: the run is too short.
    """
    if count < 1:
        raise ConfigError(f"--points is {count}; give a number from 1 on")
    steps = tuple(round(total * number / (count + 1)) for number in range(1, count + 1))
    if len(set(steps)) < count or steps[0] < 1:
        raise ConfigError(f"a run of {total} steps has no {count} points inside; give fewer")
    return steps


def checked_steps(steps: Sequence[int], total: int) -> tuple[int, ...]:
    """Return the steps of points that were named, in order.

    Raises:
        ConfigError: one lies outside the run, or is named twice.
    """
    for step in steps:
        if not 0 < step <= total:
            raise ConfigError(f"--at names step {step}; the run has steps 1 to {total}")
    if len(set(steps)) < len(steps):
        raise ConfigError(f"--at {' '.join(map(str, steps))}: give each step once")
    return tuple(sorted(steps))


def keeping(run: PlannedRun, steps: Sequence[int]) -> PlannedRun:
    """Return a run that saves at these steps and at its end, and removes no checkpoint.

    It has a folder of its own: how often a run saves is not in its hash, and one that other
    studies share has not kept what is needed here.
    """
    facts = json.dumps([run.key, "keeps", *steps])
    key = hashlib.sha256(facts.encode()).hexdigest()[:KEY_LENGTH]
    folder = run.folder.with_name(key)
    own = {
        "run_dir": str(folder),
        "save_interval": None,
        "checkpoint_scale": "linear",
        "checkpoint_factor": None,
        "extra_save_iters": tuple(steps),
        "keep_last_n_checkpoints": None,
    }
    checkpoint = run.config.checkpoint.model_copy(update=own)
    config = run.config.model_copy(update={"checkpoint": checkpoint})
    return replace(run, key=key, folder=folder, config=config)


def checkpoint_at(run: PlannedRun, step: int) -> Path:
    """Return the folder of a run's checkpoint, whether it is there yet or not."""
    return CheckpointStore(run.config.checkpoint.save_dir).path(step)


def check_kept(run: PlannedRun, steps: Sequence[int]) -> None:
    """Check that a finished run still has its checkpoints.

    Raises:
        RunError: one is missing.
    """
    for step in steps:
        if not checkpoint_at(run, step).is_dir():
            raise RunError(
                f"run '{run.name}' is finished, but its checkpoint of step {step} is gone; remove "
                f"{run.folder}, and the run is done again"
            )


def child_mixtures(domains: int, *, share: float, extra: int, seed: int = 0) -> FloatArray:
    """Return what children train on, [domains + extra, domains].

    First one mixture per domain that gives it ``share`` and the others the rest in equal
    parts; then the even mixture, which shows whether the law is linear; then spread ones.

    Raises:
        ConfigError: the mixtures do not tell the domains apart.
    """
    if domains < 2:
        raise ConfigError("there is one domain, and nothing to compare it with; give two or more")
    if not 1 / domains < share <= 1:
        raise ConfigError(
            f"--own-share is {share}; with {domains} domains it must be above 1/{domains} (at "
            f"which all children are alike) and at most 1"
        )
    if extra < 0:
        raise ConfigError(f"--extra is {extra}; give 0 or more")
    mostly = np.full((domains, domains), (1 - share) / (domains - 1))
    np.fill_diagonal(mostly, share)
    parts = [mostly]
    if extra:
        parts.append(np.full((1, domains), 1 / domains))
    if extra > 1:
        parts.append(well_spread(free_bounds(domains), count=extra - 1, seed=seed))
    return np.concatenate(parts)


def child_variants(
    parent: PlannedRun, step: int, mixtures: FloatArray, *, steps: int, number: int
) -> list[Variant]:
    """Return the children of one point of a run.

    They have a seed that the parent does not have, the same for all children of the point, so
    that they do not begin with the samples that it began with (their held-out windows are
    others, too), and start with its optimizer at the learning rate of its next step.

    Args:
        parent: keeps a checkpoint of ``step``.
        step: of the point.
        mixtures: what each trains on, [R, K].
        steps: of a child.
        number: of the point, from 1.
    """
    rate = rate_after(parent.config, step)
    shared = (
        f"seed={parent.seed + number}",
        f"train_iters={steps}",
        f"eval_interval={steps}",
        f"save_interval={steps}",
        "checkpoint_scale=linear",
        "checkpoint_factor=null",
        "extra_save_iters=[]",
        "exit_interval=null",
        f"load={json.dumps(str(checkpoint_at(parent, step)))}",
        "load_universal=false",
        "finetune=true",
        "finetune_optimizer=true",
        f"optimizer.params.lr={rate!r}",
        "min_lr=0.0",
        "lr_decay_style=constant",
        "lr_decay_iters=null",
        "lr_decay_fraction=null",
        "warmup=0.0",
    )
    names = list(parent.weights)
    return [
        Variant(
            name=f"{parent.name}-step-{step}-child-{place}",
            overrides=(
                *static_overrides(parent.config, dict(zip(names, map(float, row), strict=True))),
                *shared,
            ),
            tags={**parent.tags, "role": CHILD, "at": step, "child": place},
        )
        for place, row in enumerate(mixtures)
    ]


def rate_after(config: Config, step: int) -> float:
    """Return the learning rate of the step after ``step``, or of the last one."""
    return run_schedule(config).rate(min(step + 1, config.training.train_iters))
