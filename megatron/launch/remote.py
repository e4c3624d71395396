"""The commands of pdsh, mpirun and srun that start one agent on every host."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.launch.hosts import World, format_world

_NODE = "@NODE@"
_INSTALL = {
    "pdsh": "install it (Debian and Ubuntu: apt install pdsh)",
    "openmpi": "install Open MPI (Debian and Ubuntu: apt install openmpi-bin)",
    "mpich": "install MPICH (Debian and Ubuntu: apt install mpich)",
    "impi": "load Intel MPI (source …/setvars.sh)",
    "slurm": "run this on a machine of the Slurm cluster",
}
# Programs that may go by the name, the surest first.
_PROGRAMS = {
    "pdsh": ("pdsh",),
    "openmpi": ("mpirun.openmpi", "mpirun"),
    "mpich": ("mpiexec.mpich", "mpiexec.hydra", "mpiexec"),
    "impi": ("mpiexec.hydra", "mpiexec"),
    "slurm": ("srun",),
}
# Where an agent finds its number.
_RANK_VARIABLES = {
    "openmpi": "OMPI_COMM_WORLD_RANK",
    "mpich": "PMI_RANK",
    "impi": "PMI_RANK",
    "slurm": "SLURM_PROCID",
}


@dataclass(frozen=True, kw_only=True)
class RemotePlan:
    """One command that starts an agent on every host, which starts the ranks there.

    Attributes:
        launcher: ``pdsh``, ``openmpi``, ``mpich``, ``impi`` or ``slurm``.
        world: slots by host.
        named: whether these are the names of hosts (else Slurm has yet to choose them).
        gpus: CUDA devices of a host; 0: the ranks run on the CPU.
        agent: the agent's arguments, without those that belong to one launch.
        program: what every rank runs, with its arguments.
        carried: variables that the hosts get as they are here.
        environment: variables set beside those of the caller.
        folder: working directory of everything.
        extra: the user's further words for the launcher.
        flags: further flags of ours.
        withheld: variables that are not carried, since others could read them.
    """

    launcher: str
    world: World
    named: bool
    gpus: int
    agent: tuple[str, ...]
    program: tuple[str, ...]
    carried: Mapping[str, str]
    environment: Mapping[str, str]
    folder: str
    extra: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(len(slots) for slots in self.world.values())

    def command(self, job: str | None = None) -> tuple[str, ...]:
        """Return the command, the program first.

        Args:
            job: name of the job, if the agents report to a parent; without it the command
                works by itself.
        """
        build = {"pdsh": self._pdsh, "openmpi": self._openmpi, "slurm": self._srun}
        return build.get(self.launcher, self._hydra)(self._agent(job))

    def tell(self, job: str) -> tuple[str, ...] | None:
        """Return the command that asks every agent to stop; ``None``: by a signal."""
        if self.launcher != "pdsh":
            return None
        return self._pdsh([sys.executable, "-m", "megatron.launch.tell", job, _NODE])

    def shell(self) -> str:
        """Return the plan as text that a shell would run."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " \\\n".join([*variables, shlex.join(self.command())])

    def check_program(self) -> None:
        """Make sure that the launcher's program is there.

        Raises:
            ConfigError: it is not.
        """
        program = self.command()[0]
        if shutil.which(program) is None:
            raise ConfigError(
                f"launcher is {self.launcher}, but there is no {program} on PATH: "
                f"{_INSTALL[self.launcher]}, or choose another launcher (pdsh, openmpi, mpich, "
                "impi, slurm), or start train.py with torchrun on every node"
            )

    def _agent(self, job: str | None) -> list[str]:
        variable = _RANK_VARIABLES.get(self.launcher)
        node = f"{'host' if self.named else 'only'}:{variable}" if variable else _NODE
        reporting = ["--job", job] if job else []
        watching = ["--watch-stdin"] if self.launcher == "pdsh" else []
        world = ["--world", format_world(self.world), "--node", node]
        start = [sys.executable, "-u", "-m", "megatron.launch.node"]
        return [*start, *world, *self.agent, *watching, *reporting, *self.program]

    def _pdsh(self, agent: list[str]) -> tuple[str, ...]:
        settings = [f"{name}={value}" for name, value in self.carried.items()]
        words = shlex.join(["exec", "env", *settings, *agent])
        # pdsh has placeholders of its own, such as %n for the number of the host.
        text = f"cd {shlex.quote(self.folder)} && {words}".replace("%", "%%").replace(_NODE, "%n")
        hosts = ",".join(self.world)
        return (
            "pdsh",
            "-S",
            "-N",
            "-b",
            "-f",
            str(len(self.world)),
            "-w",
            hosts,
            *self.extra,
            text,
        )

    def _openmpi(self, agent: list[str]) -> tuple[str, ...]:
        hosts = ",".join(f"{host}:1" for host in self.world)
        return (
            _program(self.launcher),
            *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
            *("-n", str(len(self.world)), "--host", hosts),
            # One agent a host, which may use all of its cores.
            *("--map-by", "ppr:1:node", "--bind-to", "none", "--wdir", self.folder),
            *(word for name in self.carried for word in ("-x", name)),
            *self.extra,
            *agent,
        )

    def _hydra(self, agent: list[str]) -> tuple[str, ...]:
        return (
            _program(self.launcher),
            *("-n", str(len(self.world)), "-ppn", "1", "-hosts", ",".join(self.world)),
            *("-wdir", self.folder, "-genvlist", ",".join(self.carried)),
            *self.extra,
            *agent,
        )

    def _srun(self, agent: list[str]) -> tuple[str, ...]:
        nodes = len(self.world)
        return (
            "srun",
            *(f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
            *("--export=ALL", f"--chdir={self.folder}", "--input=none", "--mpi=none"),
            *("--cpu-bind=none", "--kill-on-bad-exit=1"),
            *([f"--nodelist={','.join(self.world)}"] if self.named else []),
            *self.flags,
            *self.extra,
            *agent,
        )


def _program(launcher: str) -> str:
    names = _PROGRAMS[launcher]
    return next((name for name in names if shutil.which(name)), names[-1])
