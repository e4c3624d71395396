"""The command line and environment that start a run's ranks through DeepSpeed's launcher."""

from __future__ import annotations

import base64
import json
import os
import shlex
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launch.carry import carried, environment_files, read_environment_files, secret
from megatron.launch.devices import Devices, cuda_possible, detect_devices
from megatron.launch.hosts import World, is_local
from megatron.launch.remote import RemotePlan
from megatron.launch.request import DEFAULT_PORT, REMOTE, LaunchRequest, Placement, place

RESOLVED_CONFIG_FLAG = "--resolved-config"
ROOT = Path(__file__).resolve().parents[2]
_SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=30"


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """One command that starts all ranks of this node.

    Attributes:
        command: the arguments, the program first.
        environment: variables set beside those of the caller.
        ranks: processes of the whole job.
        gpus: CUDA devices that are visible here; 0: the ranks run on the CPU.
        own_ranks: those of them that this node starts; ``None``: all.
        first_rank: number of the first that this node starts.
        log_name: file for what the launcher says.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    ranks: int
    gpus: int
    own_ranks: int | None = None
    first_rank: int = 0
    log_name: str = "launcher.log"

    @property
    def numbers(self) -> range:
        """The ranks that this node starts."""
        own = self.ranks if self.own_ranks is None else self.own_ranks
        return range(self.first_rank, self.first_rank + own)

    def shell(self) -> str:
        """Return the plan as text that a shell would run."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " \\\n".join([*variables, shlex.join(self.command)])


def plan_launch(
    script: Path,
    arguments: Sequence[str],
    request: LaunchRequest,
    *,
    environ: Mapping[str, str] = os.environ,
    devices: Devices | None = None,
    log_dir: Path = Path("logs"),
    save_timeout: float = 600.0,
) -> LaunchPlan | RemotePlan:
    """Decide how many ranks there are, on which hosts and devices, and with which command.

    Args:
        script: the program that every rank runs.
        arguments: its arguments.
        request: what the configuration asks for.
        environ: the caller's environment.
        devices: what the machine has; found out if not given.
        log_dir: folder for the output of ranks on other hosts.
        save_timeout: seconds that ranks there may take to save.

    Returns:
        A plan for this node's ranks, or for agents on all hosts.

    Raises:
        ConfigError: what is asked for is not there, or a hostfile is malformed.
    """
    devices = devices or detect_devices(environ)
    if request.launcher == "torchrun" and environ.get("NODE_RANK", "").isdigit():
        request = replace(request, node_rank=int(environ["NODE_RANK"]))
    placement = place(request, devices, environ)
    if placement.launcher in REMOTE:
        agent = ("--log-dir", str(log_dir.absolute()), "--save-timeout", f"{save_timeout:g}")
        return _plan_remote(placement, request, (str(script), *arguments), agent, environ, devices)
    if placement.launcher == "torchrun":
        return _plan_torchrun(placement.world, (str(script), *arguments), request, environ, devices)
    return plan_node(
        placement.world,
        0,
        (str(script), *arguments),
        master=(request.master_addr or "127.0.0.1", request.master_port or free_port()),
        environ=environ,
        devices=devices,
    )


def plan_node(
    world: World,
    node: int,
    program: Sequence[str],
    *,
    master: tuple[str, int],
    environ: Mapping[str, str],
    devices: Devices,
) -> LaunchPlan:
    """Return the plan for one node's ranks, through DeepSpeed's launcher of a node.

    Args:
        world: slots by host, those of this node as its devices are called.
        node: number of this node.
        program: what every rank runs, with its arguments.
        master: address and port at which rank 0 is met.
        environ: the environment.
        devices: what this node has.
    """
    slots = list(world.values())
    packed = json.dumps({host: list(own) for host, own in world.items()}).encode()
    numbered = (f"--node_rank={node}",) if len(world) > 1 else ()
    command = (
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(packed).decode()}",
        *numbered,
        f"--master_addr={master[0]}",
        f"--master_port={master[1]}",
        "--no_local_rank",
        "--module",
        "megatron.launch.rank",
        *program,
    )
    return LaunchPlan(
        command=command,
        environment=_environment(environ, devices, len(slots[node])),
        ranks=sum(map(len, slots)),
        own_ranks=len(slots[node]),
        gpus=len(devices.cuda),
        first_rank=sum(map(len, slots[:node])),
        log_name=f"launcher_{node}.log" if len(world) > 1 else "launcher.log",
    )


def _plan_torchrun(
    world: World,
    program: Sequence[str],
    request: LaunchRequest,
    environ: Mapping[str, str],
    devices: Devices,
) -> LaunchPlan:
    node = request.node_rank or 0
    slots = world[f"node{node}"]
    default = DEFAULT_PORT if len(world) > 1 else free_port()
    command = (
        sys.executable,
        "-u",
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(world)}",
        f"--node-rank={node}",
        f"--nproc-per-node={len(slots)}",
        f"--master-addr={request.master_addr or '127.0.0.1'}",
        f"--master-port={request.master_port or default}",
        "--module",
        "megatron.launch.rank",
        *program,
    )
    environment = _environment(environ, devices, len(slots))
    if devices.cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    return LaunchPlan(
        command=command,
        environment=environment,
        ranks=len(world) * len(slots),
        own_ranks=len(slots),
        gpus=len(devices.cuda),
        first_rank=node * len(slots),
        log_name=f"launcher_{node}.log" if len(world) > 1 else "launcher.log",
    )


def _plan_remote(
    placement: Placement,
    request: LaunchRequest,
    program: tuple[str, ...],
    agent: tuple[str, ...],
    environ: Mapping[str, str],
    devices: Devices,
) -> RemotePlan:
    files = environment_files(Path(environ.get("HOME") or "~").expanduser(), Path.cwd())
    settings = {**read_environment_files(files), "PYTHONSAFEPATH": "1"}
    merged = {**environ, **settings}
    settings["PYTHONPATH"] = _python_path(merged)
    if environ.get("DS_ACCELERATOR") != "cpu" and environ.get("CUDA_VISIBLE_DEVICES") == "-1":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    wanted = {**carried(merged), **settings}
    public = wanted
    if placement.launcher == "pdsh":
        # What pdsh carries stands in a command line, which everybody on the hosts can read.
        public = {name: value for name, value in wanted.items() if not secret(name)}
        settings = {
            "PDSH_RCMD_TYPE": environ.get("PDSH_RCMD_TYPE") or "ssh",
            # Nobody is there to type a password, and a host that falls silent is gone.
            "PDSH_SSH_ARGS_APPEND": " ".join(
                filter(None, [environ.get("PDSH_SSH_ARGS_APPEND"), _SSH_OPTIONS])
            ),
        }
    elif placement.launcher == "impi":
        settings["I_MPI_PIN"] = "0"
    master = _master(placement, request, environ)
    own = any(is_local(host) for host in placement.world) if placement.named else False
    on_gpu = bool(devices.cuda) or (cuda_possible(environ) and not own)
    return RemotePlan(
        launcher=placement.launcher,
        world=placement.world,
        named=placement.named,
        gpus=max(map(len, placement.world.values())) if on_gpu else 0,
        agent=("--master-addr", master, "--master-port", str(_port(request, environ)), *agent),
        program=program,
        carried=public,
        environment=settings,
        folder=os.getcwd(),
        extra=tuple(shlex.split(request.launcher_args or "")),
        flags=tuple(_slurm_flags(placement, request, environ, on_gpu=on_gpu)),
        withheld=tuple(name for name in wanted if name not in public),
    )


def _master(placement: Placement, request: LaunchRequest, environ: Mapping[str, str]) -> str:
    """Return where rank 0 is met; ``slurm`` if only the agents can find out."""
    named = request.master_addr or environ.get("MASTER_ADDR")
    if named:
        return named
    return next(iter(placement.world)) if placement.named else "slurm"


def _port(request: LaunchRequest, environ: Mapping[str, str]) -> int:
    named = environ.get("MASTER_PORT", "")
    return request.master_port or (int(named) if named.isdigit() else DEFAULT_PORT)


def _slurm_flags(
    placement: Placement, request: LaunchRequest, environ: Mapping[str, str], *, on_gpu: bool
) -> list[str]:
    flags = [f"--account={request.account}"] if request.account else []
    flags += [f"--comment={request.comment}"] if request.comment else []
    if environ.get("SLURM_CPUS_PER_TASK"):
        # srun does not take it over from sbatch, and would give the agent a single core.
        flags.append(f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}")
    if not placement.named and on_gpu:
        flags.append(f"--gpus-per-node={len(next(iter(placement.world.values())))}")
    return flags


def encode_config(text: str) -> str:
    """Pack a resolved configuration into one short word for a command line."""
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def decode_config(word: str) -> str:
    """Return the configuration that :func:`encode_config` packed.

    Raises:
        ConfigError: it is not one.
    """
    try:
        return zlib.decompress(base64.urlsafe_b64decode(word)).decode()
    except (ValueError, zlib.error) as error:
        raise ConfigError(
            f"the value of {RESOLVED_CONFIG_FLAG} is not a packed configuration ({error}); "
            "give configuration files instead"
        ) from error


def free_port() -> int:
    """Return a TCP port of the loopback that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(environ: Mapping[str, str], devices: Devices, ranks: int) -> dict[str, str]:
    environment = {
        "PYTHONPATH": _python_path(environ),
        # The launcher and the rank's guardian import nothing from the folder that the
        # user happens to stand in; the guardian takes this off again for the rank.
        "PYTHONSAFEPATH": "1",
    }
    if not environ.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(max(1, devices.cores // ranks))
    if not devices.cuda:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _python_path(environ: Mapping[str, str]) -> str:
    before = environ.get("PYTHONPATH") or ""
    if before.split(os.pathsep)[0] == str(ROOT):
        return before
    return os.pathsep.join(filter(None, [str(ROOT), before]))
