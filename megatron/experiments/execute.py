"""Runs the runs of a study here, some at a time, until each has come to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron.errors import ConfigError, RunError
from megatron.experiments.finished import (
    Finish,
    came_to_its_end,
    read_finish,
    recorded_step,
    write_finish,
)
from megatron.experiments.starting import OUTPUT, RunProcess, Starter, last_words
from megatron.experiments.study import PlannedRun, distinct
from megatron.experiments.warm import WarmParent
from megatron.launch.lock import RunLock
from megatron.launch.outcome import SAVED_CODES
from megatron.launch.process import session_members
from megatron.launch.stop import EXIT_INTERRUPTED, EXIT_SAVED
from megatron.launch.supervise import caught_signals, kill_session
from megatron.monitor.throughput import duration

_TICK_SECONDS = 0.1
_WAIT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed as often as it was allowed to.

    Attributes:
        run: which.
        why: what ended its last attempt, in words.
        attempts: how often it was started.
    """

    run: PlannedRun
    why: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the runs of a study ended.

    Attributes:
        finished: came to their end, now or earlier.
        started: names of those that a process was started for.
        failed: did not.
        stopped: the signal that stopped the runner; None: it was not stopped.
    """

    finished: tuple[PlannedRun, ...]
    started: tuple[str, ...]
    failed: tuple[Failure, ...]
    stopped: int | None = None

    @property
    def exit_code(self) -> int:
        """0 if all runs are finished, 1 if one failed, else that of a stopped command."""
        if self.stopped is not None:
            return EXIT_INTERRUPTED if self.stopped == signal.SIGINT else EXIT_SAVED
        return 1 if self.failed else 0


@dataclass(kw_only=True)
class _Job:
    """A run that is to be done, and the process that does it."""

    run: PlannedRun
    number: int
    attempts: int = 0
    seconds: float = 0.0
    slot: int = -1
    began: float = 0.0
    not_before: float = 0.0
    told: bool = False
    lock: RunLock | None = None
    process: RunProcess | None = field(default=None, repr=False)


def execute(
    runs: Sequence[PlannedRun],
    starter: Starter,
    *,
    retries: int = 1,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Bring every run to its end; return what became of them.

    A run that has ended is not started again; one that was killed goes on from its newest
    checkpoint.  Of two runners that want the same run one does it and the other waits.

    On SIGTERM, SIGINT or SIGHUP the running ones are asked to save and stop; a second Ctrl-C
    kills them.  If this process is killed, so are they; what a template has started elsewhere,
    or through a shell that stays its parent, runs on, and the next runner waits for its end.

    Args:
        runs: one or more; those that share a folder are done once.
        starter: starts them.
        retries: how often a run that failed is started again.
        say: takes the lines that tell of the progress.

    Raises:
        ConfigError: ``retries`` is negative.
        RunError: a process cannot be started, or the disk refuses.
    """
    if retries < 0:
        raise ConfigError(f"--retries is {retries}; give 0 or more")
    return _Runner(runs, starter, retries, say).run()


class _Runner:
    def __init__(
        self,
        runs: Sequence[PlannedRun],
        starter: Starter,
        retries: int,
        say: Callable[[str], None],
    ) -> None:
        self._starter = starter
        self._retries = retries
        self._say = say
        once = distinct(runs)
        self._total = len(once)
        self._pending = deque(_Job(run=run, number=number) for number, run in enumerate(once, 1))
        self._active: list[_Job] = []
        self._finished: list[PlannedRun] = []
        self._started: list[str] = []
        self._failed: list[Failure] = []
        self._arrived: deque[int] = deque()
        self._stopping: int | None = None
        self._deadline: float | None = None
        self._pace: list[float] = []
        self._warm: WarmParent | None = None
        self._told_cold = False

    # -- the life of a study ------------------------------------------------------------

    def run(self) -> Outcome:
        with caught_signals(self._arrived):
            try:
                self._take_finished()
                self._warm = self._starter.preload(job.run for job in self._pending)
                while self._active or (self._pending and self._stopping is None):
                    self._obey()
                    self._collect()
                    if self._stopping is None:
                        self._fill()
                    if self._active or self._pending:
                        time.sleep(_TICK_SECONDS)
            finally:
                self._end_everything()
        return Outcome(
            finished=tuple(self._finished),
            started=tuple(self._started),
            failed=tuple(self._failed),
            stopped=self._stopping,
        )

    def _take_finished(self) -> None:
        """Leave out what earlier commands have done."""
        left = deque[_Job]()
        for job in self._pending:
            if read_finish(job.run) is None:
                left.append(job)
            else:
                self._finished.append(job.run)
        self._pending = left
        if self._finished:
            self._say(f"{len(self._finished)} of {self._total} runs are finished already")

    def _fill(self) -> None:
        """Start as many runs as there are free slots, passing over those that others do."""
        if not self._prepared():
            return
        now = time.monotonic()
        for _ in range(len(self._pending)):
            if len(self._active) >= self._starter.jobs:
                return
            job = self._pending.popleft()
            if job.not_before > now or not self._begin(job):
                self._pending.append(job)

    def _prepared(self) -> bool:
        """Tell whether what forks the runs has done its imports, or has failed to."""
        if self._warm is None or not self._warm.settled():
            return self._warm is None
        if self._warm.trouble is not None and not self._told_cold:
            self._say(f"every run does its own imports from here on: {self._warm.trouble}")
            self._told_cold = True
        return True

    def _begin(self, job: _Job) -> bool:
        """Start a run, or find it done; return False if another process holds it."""
        lock = RunLock(job.run.own)
        try:
            lock.acquire()
            # Without a runner of its own, a run's process holds the folder itself.
            with RunLock(job.run.folder):
                pass
        except RunError as error:
            lock.release()
            if "in use" not in str(error):
                raise
            if not job.told:
                self._say(f"{self._name(job)} waits: {error}")
            job.told, job.not_before = True, time.monotonic() + _WAIT_SECONDS
            return False
        if read_finish(job.run) is not None:
            lock.release()
            self._finished.append(job.run)
            self._say(f"{self._name(job)} was finished by another runner")
            return True
        job.lock = lock
        job.slot = min(set(range(self._starter.jobs)) - {other.slot for other in self._active})
        job.attempts += 1
        job.began = time.monotonic()
        try:
            job.process = self._starter.start(job.run, job.slot, self._warm)
        except BaseException:
            lock.release()
            raise
        self._active.append(job)
        if job.run.name not in self._started:
            self._started.append(job.run.name)
        again = f", attempt {job.attempts}" if job.attempts > 1 else ""
        self._say(f"{self._name(job)} started in {job.run.folder}{again}")
        return True

    def _collect(self) -> None:
        """Take note of the processes that have ended."""
        for job in list(self._active):
            assert job.process is not None
            code = job.process.poll()
            if code is None or self._still_saving(job):
                continue
            self._active.remove(job)
            job.seconds += time.monotonic() - job.began
            kill_session(job.process.pid, self._say)
            try:
                self._judge(job, code)
            finally:
                assert job.lock is not None
                job.lock.release()

    def _still_saving(self, job: _Job) -> bool:
        """Tell whether a stopped template's shell has ended before what it started."""
        assert job.process is not None
        in_time = self._deadline is not None and time.monotonic() <= self._deadline
        return in_time and bool(session_members(job.process.pid))

    def _judge(self, job: _Job, code: int) -> None:
        """Decide what the end of a process means for its run."""
        if code == 0 and came_to_its_end(job.run):
            step = min(job.run.steps, recorded_step(job.run))
            finish = Finish(step=step, seconds=round(job.seconds, 3), attempts=job.attempts)
            write_finish(job.run, finish)
            self._finished.append(job.run)
            self._pace.append(job.seconds)
            left = len(self._pending) + len(self._active)
            rest = sum(self._pace) / len(self._pace) * left / self._starter.jobs
            eta = f"; {left} left, about {duration(rest)}" if left else ""
            self._say(f"{self._name(job)} finished in {duration(job.seconds)}{eta}")
            return
        why = _why(code, job.run)
        if self._stopping is not None:
            self._say(f"{self._name(job)} stopped after step {recorded_step(job.run)}")
            return
        if job.attempts <= self._retries:
            self._say(f"{self._name(job)} failed: {why}; it is started again")
            self._quote(job)
            self._pending.append(job)
            return
        self._failed.append(Failure(run=job.run, why=why, attempts=job.attempts))
        self._say(f"{self._name(job)} failed for good, attempt {job.attempts}: {why}")
        self._quote(job)

    def _quote(self, job: _Job) -> None:
        for line in last_words(job.run):
            self._say(f"    {line}")
        self._say(f"    (all of it: {job.run.own / OUTPUT})")

    # -- signals ------------------------------------------------------------------------

    def _obey(self) -> None:
        """Ask the runs to save and stop; kill them on a second Ctrl-C or when it takes long."""
        while self._arrived:
            signum = self._arrived.popleft()
            if self._stopping is not None:
                if signum == signal.SIGINT:
                    self._deadline = 0.0
                continue
            self._stopping = signum
            waiting = max((job.run.config.save_timeout for job in self._active), default=0.0)
            self._deadline = time.monotonic() + waiting
            self._say(
                f"{signal.Signals(signum).name}: {len(self._active)} running run(s) save and "
                "stop (Ctrl-C to kill them now); give the same command again to go on"
            )
            for job in self._active:
                assert job.process is not None
                with contextlib.suppress(ProcessLookupError):
                    if self._starter.template is None:
                        os.kill(job.process.pid, signal.SIGTERM)
                    else:
                        os.killpg(job.process.pid, signal.SIGTERM)
        if self._deadline is not None and time.monotonic() > self._deadline:
            for job in self._active:
                assert job.process is not None
                kill_session(job.process.pid, self._say)

    def _end_everything(self) -> None:
        """Leave no process behind, whatever ended the runner."""
        for job in self._active:
            if job.process is not None:
                kill_session(job.process.pid, self._say)
                job.process.wait()
            if job.lock is not None:
                job.lock.release()
        if self._warm is not None:
            self._warm.close()

    def _name(self, job: _Job) -> str:
        return f"[{job.number}/{self._total}] {job.run.name}"


def _why(code: int, run: PlannedRun) -> str:
    """Return what the end of a process was, in words."""
    if code == 0:
        return (
            f"its command ended with 0, but its ledger ends at step {recorded_step(run)} of "
            f"{run.steps} (does the command wait for the run to end, on the same file system?)"
        )
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    if code in SAVED_CODES:
        return f"somebody stopped it (exit code {code})"
    return f"exit code {code}"
