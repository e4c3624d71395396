"""Run folders for the report's tests, written by the sink that real runs use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from megatron.monitor import StepRecord, ValidationRecord
from megatron.monitor.encode import dumps
from megatron.monitor.jsonl import JsonlSink, task_fields, validation_fields
from megatron.monitor.record import TaskRecord

DOMAINS = ("code", "prose", "names")
NATURAL = np.array([0.5, 0.3, 0.2])
SAMPLES, LENGTH = 32, 64


def write_run(
    folder: Path,
    *,
    method: str = "odm",
    steps: int = 60,
    planned: int = 60,
    seed: int = 1,
    gain: float = 0.0,
    domains: Sequence[str] = DOMAINS,
    validate_every: int = 20,
    info: bool = True,
    cost: bool = False,
) -> Path:
    """Write a run whose held-out losses end ``gain`` nats lower than a plain one's."""
    rng = np.random.default_rng(seed)
    count = len(domains)
    natural = NATURAL if count == len(NATURAL) else np.full(count, 1 / count)
    folder.mkdir(parents=True, exist_ok=True)
    mixing = {"method": method, "weights": "uniform"}
    settings = {"train_iters": planned, "seed": seed, "run_dir": str(folder), "mixing": mixing}
    (folder / "config.yml").write_text(yaml.safe_dump(settings))
    sink = JsonlSink(folder, log_interval=10)
    facts = {
        "natural_weights": dict(zip(domains, natural.tolist(), strict=True)),
        "parameters": 1_250_000,
    }
    sink.start(None, facts if info else {})
    noise = rng.normal(0, 1e-3)

    def validate(step: int) -> None:
        losses = 6.0 - (3.0 + gain) * min(1.0, step / planned) + 0.1 * np.arange(count) + noise
        sink.validation(
            ValidationRecord(
                step=step,
                valid_loss=dict(zip(domains, losses.tolist(), strict=True)),
                weights=dict(zip(domains, natural.tolist(), strict=True)),
                bits_per_byte={name: x / 2.5 for name, x in zip(domains, losses, strict=True)},
                seconds=0.5,
            )
        )

    validate(0)
    seen = np.zeros(count)
    for step in range(1, steps + 1):
        probability = np.full(count, 1 / count)
        if method != "static":
            moved = 0.2 * min(1.0, step / planned)
            probability[0] += moved
            probability[1:] -= moved / (count - 1)
        samples = rng.multinomial(SAMPLES, probability)
        seen += samples
        sink.step(
            StepRecord(
                step=step,
                domains=tuple(domains),
                loss=6.0 - 3.0 * step / planned,
                learning_rate=1e-3 * (1 - step / planned / 2),
                probability=probability,
                domain_loss=np.where(samples > 0, 6.0 - 3.0 * step / planned, np.nan),
                tokens=samples * LENGTH,
                samples=samples,
                epochs=seen / (natural * 400),
                tokens_per_second=1000.0 + step,
                seconds=2.0,
                overhead={"collective": 0.02, "update": 0.06} if cost else {},
                extra_tokens={"validation": 512} if cost and step % 10 == 1 else {},
            )
        )
        if step % validate_every == 0:
            validate(step)
    sink.close()
    return folder


def evaluated(step: int, split: str = "valid", *, shots: int = 0) -> str:
    """Return a line of what evaluate.py measured."""
    losses = ValidationRecord(
        step=step,
        valid_loss={name: 5 - step / 40 + k for k, name in enumerate(DOMAINS)},
        weights=dict(zip(DOMAINS, NATURAL.tolist(), strict=True)),
        split=split,
    )
    found = {"quiz": {"acc": 0.5 + step / 1000 + shots / 10}}
    tasks = TaskRecord(step=step, tasks=found, num_fewshot={"quiz": shots} if shots else {})
    return dumps(task_fields(tasks) | validation_fields(losses)) + "\n"
