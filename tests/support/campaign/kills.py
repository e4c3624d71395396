"""R2, R15, R16: processes that are killed, asked to stop, or come second."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from support import runs
from support.campaign.forked import ForkedRun
from support.campaign.row import Bench, Trial, attempt, must

from megatron.checkpoint.store import CheckpointStore

INTERVAL = 3
STEPS = 150
A_CHAIN = 10
"""Kills of one run at most: few enough that a short column has runs of both kinds."""
KINDS = ("group", "rank", "launcher")


class Chain:
    """One run that is disturbed again and again until it is complete."""

    def __init__(self, folder: Path, data: Path, **settings: Any) -> None:
        """Write the configuration; nothing runs yet."""
        folder.mkdir(parents=True)
        self.run_dir = folder / "run"
        self.file = runs.write_config(
            folder / "config.yml", runs.config(data, self.run_dir, **settings)
        )
        self.store = CheckpointStore(self.run_dir / "checkpoints")
        # A save behind the steps may be under way, but no more than one.
        self.unfinished = INTERVAL if settings.get("async_save") else 0

    def newest(self) -> int:
        """Return the step of the newest checkpoint that is whole; 0 if there is none."""
        found = self.store.newest_valid()
        return 0 if found is None else found[1].step

    def finish(self, whole: Path, steps: int) -> None:
        """Let it end undisturbed, and compare it with a run that was never disturbed."""
        runs.train(self.file)
        runs.assert_same_run(whole, self.run_dir, steps)


def last_told(text: str) -> int:
    """Return the last step that the console told of."""
    return max(map(int, re.findall(r"step +(\d+)/", text)), default=0)


def ranks_of(live: runs.LiveRun) -> list[int]:
    """Return the processes of a run that train."""
    wrappers = ("megatron.launch", "deepy.py", "deepspeed.launcher")
    return [
        pid
        for pid, line in live.family().items()
        if "train.py" in line and not any(word in line for word in wrappers)
    ]


def _victims(live: runs.LiveRun, kind: str) -> list[int]:
    if kind == "group":
        return list(live.family())
    return [live.process.pid] if kind == "launcher" else ranks_of(live)[-1:]


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while (left := runs.alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    must(not left, f"processes {left} were left behind")


def _kill_once(chain: Chain, chance: Any, kind: str, *, launched: bool) -> bool:
    """Kill the run at a random moment; return whether it was still running then."""
    before = chain.newest()
    live: Any = runs.LiveRun(chain.file) if launched else ForkedRun(chain.file)
    try:
        live.wait_for_step(before + chance.randint(1, 12), timeout=600)
        time.sleep(chance.random() * 0.3)
        if live.process.poll() is not None:
            must(live.process.returncode == 0, f"ended by itself\n{live.text()}")
            return False
        everyone = list(live.family())
        for pid in _victims(live, kind) if launched else live.victims(kind):
            runs.with_suppressed_kill(pid)
        told = last_told(live.text())
        if launched:
            _wait_until_gone(everyone)
        must(before == 0 or "loaded" in live.text(), f"did not resume\n{live.text()}")
    finally:
        live.end()
    after = chain.newest()
    expected = max(before, (told - 1) // INTERVAL * INTERVAL - chain.unfinished)
    must(after >= expected, f"step {told} was reached; the newest checkpoint is of {after}")
    return True


def killed(bench: Bench, trials: int) -> Iterator[Trial]:
    """R2: SIGKILL at random moments of real training on two ranks.

    Every tenth trial is of the whole tree of processes under ``deepy.py``; in the others the two
    ranks are forked from a server that has the libraries imported, which spares their start.
    Every second run writes its checkpoints behind the steps.
    """
    data = bench.folder / "data"
    runs.make_data(data)
    settings = {
        "train_iters": STEPS,
        "save_interval": INTERVAL,
        "eval_interval": 10,
        "log_interval": 1,
        "keep_last_n_checkpoints": 3,
    }
    whole = Chain(bench.folder / "whole", data, **settings)
    runs.train(whole.file)
    done = number = 0
    while done < trials:
        behind = {"async_save": number % 2 == 1}
        chain = Chain(bench.folder / f"chain{number}", data, **settings, **behind)
        running, enough = True, min(trials, done + A_CHAIN)
        while running and done < enough:
            chance = bench.chance(number, done)
            outcome: list[bool] = []
            kind, launched = KINDS[done % len(KINDS)], done % 10 == 0
            kill = partial(_kill_once, chain, chance, kind, launched=launched)
            trial = attempt(lambda kill=kill, outcome=outcome: outcome.append(kill()))  # type: ignore[misc]
            running = bool(outcome and outcome[0])
            if running or trial.failure:
                done += 1
                yield trial
        if trial.failure is None:
            ended = attempt(partial(chain.finish, whole.run_dir, STEPS))
            if ended.failure:
                yield ended
        number += 1


# What fills most of a run's time, so that a signal at a random moment finds it there.
PHASES: dict[str, dict[str, Any]] = {
    "warm-up": {"train_iters": 60, "save_interval": 1000, "eval_interval": 1000},
    "step": {"train_iters": 400, "save_interval": 1000, "eval_interval": 1000},
    "eval": {"train_iters": 80, "save_interval": 1000, "eval_interval": 1, "eval_iters": 6},
    "save": {"train_iters": 100, "save_interval": 1, "eval_interval": 1000},
}


def _stop_once(chain: Chain, chance: Any, phase: str, first_step_after: float) -> bool:
    before = chain.newest()
    live = runs.LiveRun(chain.file)
    try:
        if phase == "warm-up":
            time.sleep(chance.uniform(0.1, 0.9) * first_step_after)
        else:
            live.wait_for_step(before + chance.randint(1, 12), timeout=600)
            time.sleep(chance.random() * 0.2)
        if live.process.poll() is not None:
            must(live.process.returncode == 0, f"ended by itself\n{live.text()}")
            return False
        everyone = list(live.family())
        os.kill(live.process.pid, signal.SIGTERM)
        code = live.process.wait(timeout=180)
        if code == 0:  # it was already ending
            return False
        # Before Python has come to our first line the signal has its default effect.
        must(code == 143 or (code == -15 and not live.text()), f"exit code {code}\n{live.text()}")
        _wait_until_gone(everyone)
    finally:
        live.end()
    steps = runs.steps_done(chain.run_dir)
    must(chain.newest() == max(steps, before), f"at step {steps}, saved {chain.newest()}")
    return True


def stopped(bench: Bench, trials: int) -> Iterator[Trial]:
    """R15: SIGTERM in warm-up, steps, validation and saving; the same command goes on.

    Every second run, and the first in every second phase, writes its checkpoints behind the steps.
    """
    data = bench.folder / "data"
    runs.make_data(data)
    for place, (phase, own) in enumerate(PHASES.items()):
        wanted = trials // len(PHASES) + (place < trials % len(PHASES))
        settings = {"log_interval": 1, "keep_last_n_checkpoints": 2, **own}
        whole = Chain(bench.folder / phase / "whole", data, **settings)
        live = runs.LiveRun(whole.file)
        start = time.monotonic()
        live.wait_for_step(1, timeout=600)
        first_step_after = time.monotonic() - start
        must(live.process.wait(timeout=1200) == 0, live.text())
        done = number = 0
        while done < wanted:
            behind = {"async_save": (place + number) % 2 == 1}
            chain = Chain(bench.folder / phase / f"chain{number}", data, **settings, **behind)
            running = True
            while running and done < wanted:
                chance, outcome = bench.chance(phase, number, done), []
                stop = partial(_stop_once, chain, chance, phase, first_step_after)
                trial = attempt(lambda stop=stop, outcome=outcome: outcome.append(stop()))  # type: ignore[misc]
                running = bool(outcome and outcome[0])
                if running or trial.failure:
                    done += 1
                    yield trial
            ended = attempt(partial(chain.finish, whole.run_dir, own["train_iters"]))
            if ended.failure:
                yield ended
            number += 1


def second(bench: Bench, trials: int) -> Iterator[Trial]:
    """R16: runs started in a folder that one is using already, however they name it."""
    data = bench.folder / "data"
    runs.make_data(data)
    chain = Chain(bench.folder / "one", data, train_iters=100_000, save_interval=100_000)
    (bench.folder / "link").symlink_to(chain.run_dir.parent)
    ways = {
        "the same file": str(chain.run_dir),
        "through a link": str(bench.folder / "link" / "run"),
        "with a detour": str(chain.run_dir.parent / "x" / ".." / "run"),
    }
    (chain.run_dir.parent / "x").mkdir()
    live = runs.LiveRun(chain.file)
    try:
        live.wait_for_step(1, timeout=600)
        for number in range(trials):
            name, run_dir = list(ways.items())[number % len(ways)]
            yield attempt(partial(_second_once, bench, live, data, f"{number} {name}", run_dir))
    finally:
        live.end()


def _second_once(bench: Bench, live: runs.LiveRun, data: Path, name: str, run_dir: str) -> None:
    file = runs.write_config(bench.folder / f"{name}.yml", runs.config(data, Path(run_dir)))
    before = last_told(live.text())
    done = runs.run("train.py", file)
    must(done.returncode == 2, f"{name}: exit code {done.returncode}\n{done.stderr}")
    must(str(live.process.pid) in done.stderr, f"{name}: does not name the holder\n{done.stderr}")
    must("Traceback" not in done.stderr, done.stderr)
    must(live.process.poll() is None, "the first run has ended")
    deadline = time.monotonic() + 120
    while last_told(live.text()) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    must(last_told(live.text()) > before, "the first run stands still")
