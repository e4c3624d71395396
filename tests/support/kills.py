"""A study's command, killed between two of its runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support import runs


def kill_once(folder: Path, ready: Callable[[], bool], *words: str) -> None:
    """Kill ``tools/mix.py`` with these words as soon as ``ready``; wait until its ranks are gone.

    Args:
        folder: where its output goes.
        ready: asked again and again.
        words: of the command.
    """
    with (folder / "killed.out").open("wb") as output:
        killed = subprocess.Popen(
            [sys.executable, str(runs.ROOT / "tools" / "mix.py"), *words],
            env=runs.environment(),
            stdout=output,
            stderr=output,
        )
        deadline = time.monotonic() + 300
        while not ready() and time.monotonic() < deadline:
            assert killed.poll() is None, (folder / "killed.out").read_text()
            time.sleep(0.02)
        family = list(runs.family(killed.pid))
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert ready()
    while runs.alive(family):
        time.sleep(0.02)


def kill_in_the_second_run(folder: Path, *words: str) -> str:
    """Kill ``tools/mix.py`` once its first run is finished and its second has a checkpoint.

    Args:
        folder: holds ``runs``, the folder of the runs' folders.
        words: of the command.

    Returns:
        Name of the folder of the run that is finished.
    """
    kill_once(folder, lambda: _in_the_second(folder), *words)
    (done,) = finished(folder)
    return done


def go_on(folder: Path, *words: str) -> str:
    """Kill a study's command in its second run and give it again; return what it printed.

    The finished run must not be touched, and no other be begun anew.
    """
    done = kill_in_the_second_run(folder, *words)
    before = stamp(folder / "runs" / done)
    again = runs.tool("mix.py", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of" in again.stdout
    assert "runs are finished already" in again.stdout
    assert stamp(folder / "runs" / done) == before
    told = [path.read_text() for path in (folder / "runs").glob("*/runner/output.log")]
    assert again.stdout.count(" started in ") == len(told) - 1
    assert sum("/checkpoints/global_step" in text for text in told) == 1  # went on, not anew
    third = runs.tool("mix.py", *words)
    assert third.returncode == 0, third.stderr
    assert " started in " not in third.stdout
    return again.stdout


def stamp(run: Path) -> dict[str, int]:
    """Return when each file of a run was last written."""
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def finished(folder: Path) -> list[str]:
    """Return the names of the runs' folders that are finished."""
    return [path.parents[1].name for path in (folder / "runs").glob("*/runner/finished.json")]


def _in_the_second(folder: Path) -> bool:
    """Whether one run is finished and the next has a checkpoint."""
    done = finished(folder)
    running = [
        path
        for path in (folder / "runs").glob("*")
        if path.name not in done and (path / "checkpoints" / "latest").exists()
    ]
    return len(done) == 1 and len(running) == 1
