"""How one run of a study becomes a process."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from megatron.errors import ConfigError, RunError, did_you_mean
from megatron.experiments.study import PlannedRun
from megatron.experiments.warm import WarmParent
from megatron.launch.devices import Devices
from megatron.launch.process import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "output.log"
ALONE = "train.py"
PLACEHOLDERS = ("command", "folder", "name", "slot")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


class RunProcess(Protocol):
    """A run's process, as ``subprocess.Popen`` tells of it."""

    @property
    def pid(self) -> int:
        """Its process, which leads a session of its own."""
        ...

    def poll(self) -> int | None:
        """Return the exit code, −n if signal n killed it; None while it runs."""
        ...

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        ...


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Starts runs, each in one of ``jobs`` slots.

    Attributes:
        jobs: runs at a time.
        devices: what this machine has.
        template: a shell command in which ``{command}`` stands for the run's own; None: the
            run starts here.
        environ: the environment of the runs.
        warm: whether runs on the CPU may share their imports (:meth:`preload`).

    Raises:
        ConfigError: ``template`` lacks ``{command}`` or names what does not exist.
    """

    jobs: int
    devices: Devices
    template: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    warm: bool = True

    def __post_init__(self) -> None:
        """Check the numbers and the template."""
        if self.jobs < 1:
            raise ConfigError(f"--jobs is {self.jobs}; give a number from 1 on")
        if self.template is None:
            return
        names = _PLACEHOLDER.findall(self.template)
        for name in names:
            if name not in PLACEHOLDERS:
                known = ", ".join(f"{{{one}}}" for one in PLACEHOLDERS)
                hint = did_you_mean(name, PLACEHOLDERS)
                raise ConfigError(f"--command has {{{name}}}, which is not one of {known}{hint}")
        if "command" not in names:
            raise ConfigError(
                f"--command is {self.template!r}; write {{command}} where the run's own command "
                "belongs, as in 'ssh host {command}'"
            )

    def preload(self, runs: Iterable[PlannedRun]) -> WarmParent | None:
        """Return a new process that forks runs, if ``runs`` has two or more that it would serve.

        Those are the runs of one rank on the CPU that start here.

        Raises:
            RunError: it cannot be started.
        """
        served = [run for run in runs if self._forkable(run)]
        if len(served) < 2:
            return None
        try:
            return WarmParent(ROOT, self.environment(served[0], 0))
        except OSError as error:
            raise RunError(f"no process can be started: {error}") from error

    def start(self, run: PlannedRun, slot: int, warm: WarmParent | None = None) -> RunProcess:
        """Start a run in a session of its own that ends with this process.

        Its output is added to ``runner/output.log`` in its folder.

        Args:
            run: what to start.
            slot: which of the ``jobs`` it takes.
            warm: forks the run, if it serves such a run and can.

        Raises:
            RunError: the command cannot be started, or the disk refuses.
        """
        request = run.write_request()
        try:
            with (run.own / OUTPUT).open("ab") as output:
                if warm is not None and self._forkable(run):
                    forked = self._fork(run, slot, warm, output)
                    if forked is not None:
                        return forked
                return self._spawn(run, request, slot, output)
        except OSError as error:
            raise RunError(f"run '{run.name}' cannot be started: {error}") from error

    def _fork(
        self, run: PlannedRun, slot: int, warm: WarmParent, output: IO[bytes]
    ) -> RunProcess | None:
        if self.environment(run, slot) != warm.environment:
            return None
        return warm.start([str(ROOT / ALONE), str(run.request)], output)

    def _spawn(self, run: PlannedRun, request: Path, slot: int, output: IO[bytes]) -> RunProcess:
        if self.template is None:
            command = self.command(run, request, slot)
        else:
            command = ["/bin/sh", "-c", self._filled(run, request, slot)]
        own = os.getpid()
        return subprocess.Popen(
            command,
            env=self.environment(run, slot),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(own),
        )

    def command(self, run: PlannedRun, request: Path, slot: int) -> list[str]:
        """Return the words that start a run: without a launcher if it has one rank."""
        alone = self._alone(run)
        program = [ALONE] if alone else ["deepy.py", ALONE]
        script, *rest = program
        return [sys.executable, "-u", str(ROOT / script), *rest, str(request)]

    def environment(self, run: PlannedRun, slot: int) -> dict[str, str]:
        """Return the environment of a run here: its share of the cores, and its devices."""
        environment = dict(self.environ)
        if self.template is not None:
            return environment
        if not environment.get("OMP_NUM_THREADS"):
            threads = self.devices.cores // (self.jobs * run.ranks)
            environment["OMP_NUM_THREADS"] = str(max(1, threads))
        cuda = self.devices.cuda
        if cuda and self.jobs > 1:
            wanted = min(run.ranks, len(cuda))
            first = slot * wanted % len(cuda)
            chosen = [cuda[(first + place) % len(cuda)] for place in range(wanted)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        return environment

    def _alone(self, run: PlannedRun) -> bool:
        launch = run.config.launch
        local = launch.launcher in (None, "local") and not launch.force_multi
        return run.ranks == 1 and local and launch.hostfile is None and self.template is None

    def _forkable(self, run: PlannedRun) -> bool:
        # Where die_with_parent does nothing, a fork would outlive its parent unseen.
        here = self.warm and sys.platform.startswith("linux") and not self.devices.cuda
        return here and self._alone(run)

    def _filled(self, run: PlannedRun, request: Path, slot: int) -> str:
        assert self.template is not None
        words = ["env", "-C", os.getcwd(), *self.command(run, request, slot)]
        values = {
            "command": shlex.join(words),
            "folder": shlex.quote(str(run.folder)),
            "name": shlex.quote(run.name),
            "slot": str(slot),
        }
        return _PLACEHOLDER.sub(lambda found: values[found.group(1)], self.template)


def last_words(run: PlannedRun, lines: int = 12) -> list[str]:
    """Return the last lines that a run has printed."""
    try:
        text = (run.own / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rstrip().splitlines()[-lines:]
