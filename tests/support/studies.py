"""Studies on tiny data, and runs that pretend to train."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from support import runs

from megatron.experiments.starting import Starter
from megatron.experiments.study import Base, PlannedRun, Study, Variant, plan_study
from megatron.launch.devices import Devices

STEPS = 12
FAKE = Path(__file__).with_name("fake_run.py")


def base(folder: Path, **changes: Any) -> Base:
    """Write a configuration of a run of one rank and some steps on the data in ``folder``."""
    settings = runs.config(
        folder / "data",
        folder / "elsewhere",
        num_gpus=1,
        num_layers=1,
        hidden_size=16,
        train_micro_batch_size_per_gpu=8,
        train_iters=STEPS,
        eval_interval=STEPS,
        eval_iters=1,
        log_interval=1,
        audit_samples=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    file = runs.write_config(folder / "base.yml", {**settings, **changes})
    return Base(files=(str(file),))


def plan(folder: Path, *variants: Variant, runs_dir: Path | None = None, **changes: Any) -> Study:
    """Plan a study of ``variants`` (default: one run)."""
    chosen = variants or (Variant(name="one"),)
    return plan_study("study", base(folder, **changes), chosen, runs_dir or folder / "runs")


def seeds(count: int) -> list[Variant]:
    """Return variants that differ in the seed."""
    return [Variant(name=f"seed-{seed}", overrides=(f"seed={seed}",)) for seed in range(count)]


def pretending(*words: str, jobs: int = 1, shell: bool = False) -> Starter:
    """Return a starter of runs that only write what a run would: see ``fake_run.py``.

    Under ``shell`` a shell stays their parent.
    """
    command = shlex.join([sys.executable, str(FAKE), *words])
    template = f"{{first}}{command} {{folder}} {{name}}{{last}} # {{command}}"
    first, last = ("", "; exit $?") if shell else ("exec ", "")
    template = template.replace("{first}", first).replace("{last}", last)
    return Starter(jobs=jobs, devices=Devices(cuda=(), cores=2), template=template)


def starts(run: PlannedRun) -> int:
    """Return how often a run that pretends was started."""
    try:
        return len((run.folder / "starts").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0
