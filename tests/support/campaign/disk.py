"""R11: a disk that is full, wherever in the run that happens."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from support import relayout, runs
from support.campaign.row import Bench, SkippedRowError, Trial, attempt, must
from support.gloo import RankFailedError, run_ranks

from megatron.checkpoint.store import CheckpointStore

STEPS = 12
PAGE = 4096
SETTINGS: dict[str, Any] = {
    "num_gpus": 1,
    "train_iters": STEPS,
    "save_interval": 2,
    "eval_interval": 6,
    "keep_last_n_checkpoints": 3,
    "log_interval": 1,
}


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of ``size`` bytes on a folder.

    Raises:
        SkippedRowError: this process may not.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "neomix-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedRowError(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(folder: Path, size: int) -> None:
    """Make room on a small disk."""
    command = ["mount", "-o", f"remount,size={size}", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def full(bench: Bench, trials: int) -> Iterator[Trial]:
    """R11: runs on disks that are too small by a random amount.

    Every second one writes its checkpoints behind the steps.
    """
    data = bench.folder / "data"
    runs.make_data(data)
    whole = bench.fresh("whole")
    file = runs.write_config(whole / "config.yml", runs.config(data, whole / "run", **SETTINGS))
    run_ranks(relayout.train, 1, file, timeout=600)
    sizes = [p.stat().st_size for p in (whole / "run").rglob("*") if p.is_file()]
    space = sum(-(-size // PAGE) * PAGE for size in sizes)
    for number in range(trials):
        yield attempt(partial(_full_once, bench, data, whole / "run", number, space))


def _full_once(bench: Bench, data: Path, whole: Path, number: int, space: int) -> None:
    chance: random.Random = bench.chance(number)
    folder = bench.fresh(f"disk{number}")
    disk = folder / "disk"
    disk.mkdir()
    run = disk / "run"
    behind = {"async_save": number % 2 == 1}
    file = runs.write_config(folder / "config.yml", runs.config(data, run, **SETTINGS, **behind))
    size = int(space * chance.uniform(0.02, 0.9)) // PAGE * PAGE + PAGE
    with small_disk(disk, size):
        # Two in ten as a user starts them, the others in a forked rank.
        said = _by_launcher(file) if number % 10 < 2 else _by_rank(file)
        must(str(disk) in said, f"{size} of {space} bytes: no path in\n{said}")
        about = re.search(r"No space left|not enough disk space|disk is full", said)
        must(about, f"{size} of {space} bytes: not about the disk\n{said}")
        if "checkpoints" in said:
            must("needed" in said and "free" in said, f"no bytes in\n{said}")
        store = CheckpointStore(run / "checkpoints")
        for step in store.steps():
            must(store.verify(store.path(step)) == [], f"checkpoint {step} is damaged")
        before = store.newest_valid()
        grow(disk, 4 * space)
        run_ranks(relayout.train, 1, file, timeout=600)
        must(before is None or before[1].step < STEPS, "it had not failed")
        runs.assert_same_run(whole, run, STEPS)


def _by_launcher(file: Path) -> str:
    done = runs.run("train.py", file)
    must(done.returncode not in (0, -9), f"exit code {done.returncode}\n{done.stdout}")
    must("Traceback" not in done.stderr, done.stderr)
    return done.stderr


def _by_rank(file: Path) -> str:
    try:
        run_ranks(relayout.train, 1, file, timeout=600)
    except RankFailedError as error:
        must("errors.RunError" in str(error), str(error))
        return str(error)
    raise AssertionError("the run ended well on a disk that is too small")
