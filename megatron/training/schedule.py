"""The learning-rate schedule of a run: its configuration's, or its checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.manifest import Manifest
from megatron.config import Config
from megatron.engine.deepspeed_schedule import DeepSpeedSchedule
from megatron.engine.schedule import Schedule
from megatron.errors import CheckpointError

FACT = "schedule"
"""Name of the schedule among a manifest's facts."""


def run_schedule(config: Config) -> Schedule | DeepSpeedSchedule:
    """Return the schedule that a configuration describes."""
    schedule, iters = config.schedule, config.training.train_iters
    if (given := schedule.scheduler) is not None:
        return DeepSpeedSchedule(kind=given.type, params=given.complete, lr=config.optimizer.lr)
    return Schedule(
        lr=config.optimizer.lr,
        min_lr=schedule.min_lr,
        style=schedule.lr_decay_style,
        formula=schedule.lr_formula,
        warmup_steps=schedule.warmup_steps(iters),
        decay_steps=schedule.decay_steps(iters),
        wsd_decay_fraction=schedule.wsd_decay_fraction,
        wsd_decay_shape=schedule.wsd_decay_shape,
    )


def schedule_facts(config: Config) -> dict[str, Any]:
    """Return what a checkpoint has to remember for ``use_checkpoint_lr_scheduler``."""
    schedule, iters = config.schedule, config.training.train_iters
    kept = schedule.model_dump(
        mode="json",
        exclude={
            "lr_decay_fraction",
            "warmup",
            "override_lr_scheduler",
            "use_checkpoint_lr_scheduler",
        },
    )
    # A share of train_iters becomes steps: train_iters may be another when the run goes on.
    share = schedule.warmup if schedule.warmup_iters is None else None
    return {
        **kept,
        "lr": config.optimizer.lr,
        "lr_decay_iters": schedule.decay_steps(iters),
        "warmup": share,
    }


def with_checkpoint_schedule(config: Config, manifest: Manifest) -> Config:
    """Return the configuration with the schedule that a checkpoint was written with.

    Raises:
        CheckpointError: the checkpoint does not say which it was.
    """
    saved: Mapping[str, Any] | None = manifest.extra.get(FACT)
    if saved is None:
        raise CheckpointError(
            f"use_checkpoint_lr_scheduler is set, and the checkpoint of step {manifest.step} does "
            "not say what its schedule was; write it into the configuration and leave the key out"
        )
    facts = {key: value for key, value in saved.items() if value is not None}
    peak = facts.pop("lr")
    kept = config.schedule.model_dump()
    for key in ("warmup_iters", "lr_decay_fraction", "scheduler"):
        kept[key] = None
    schedule = type(config.schedule)(**{**kept, **facts})
    optimizer = config.optimizer.model_copy(update={"lr": peak})
    return config.model_copy(update={"schedule": schedule, "optimizer": optimizer})


def schedule_note(config: Config, manifest: Manifest) -> str | None:
    """Return what is to be said where the run leaves its checkpoint's schedule; None if not."""
    saved = manifest.extra.get(FACT)
    if saved is None or config.schedule.override_lr_scheduler:
        return None
    own = schedule_facts(config)
    changed = [
        f"{key} (checkpoint {saved.get(key)!r}, configuration {value!r})"
        for key, value in own.items()
        if saved.get(key) != value
    ]
    if not changed:
        return None
    return (
        f"note: the run follows its configuration's learning-rate schedule, which is not its "
        f"checkpoint's: {', '.join(changed)}; use_checkpoint_lr_scheduler: true would follow that, "
        "override_lr_scheduler: true leaves this note out"
    )
