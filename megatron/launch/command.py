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
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launch.devices import Devices, detect_devices
from megatron.launch.hosts import choose_slots, read_hostfile

RESOLVED_CONFIG_FLAG = "--resolved-config"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """Where ranks are wanted: the configuration's ``launch`` group.

    Attributes:
        num_gpus: ranks on this node; ``None``: one per CUDA device, or one on CPU.
        num_nodes: nodes; only one for now.
        hostfile: file of ``host slots=n`` lines; ``None``: ``DLTS_HOSTFILE`` or
            ``/job/hostfile``, if there is one.
        include: devices to use, in DeepSpeed's form (``localhost:0,2``).
        exclude: devices to leave out.
        master_addr: address at which rank 0 is met; ``None``: this machine's loopback.
        master_port: its port; ``None``: a free one.
    """

    num_gpus: int | None = None
    num_nodes: int | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: int | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """One command that starts all ranks of this node.

    Attributes:
        command: the arguments, the program first.
        environment: variables set beside those of the caller.
        ranks: processes that will be started.
        gpus: CUDA devices that are visible here; 0: the ranks run on the CPU.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    ranks: int
    gpus: int

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
) -> LaunchPlan:
    """Decide how many ranks there are, on which devices, and with which command.

    Args:
        script: the program that every rank runs.
        arguments: its arguments.
        request: what the configuration asks for.
        environ: the caller's environment.
        devices: what the machine has; found out if not given.

    Raises:
        ConfigError: more than one node, more ranks than devices, a malformed hostfile.
    """
    devices = devices or detect_devices(environ)
    slots = _slots(request, devices, environ)
    port = request.master_port or free_port()
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(slots)}).encode()).decode()
    command = (
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        f"--master_addr={request.master_addr or '127.0.0.1'}",
        f"--master_port={port}",
        "--no_local_rank",
        "--module",
        "megatron.launch.rank",
        str(script),
        *arguments,
    )
    return LaunchPlan(
        command=command,
        environment=_environment(environ, devices, len(slots)),
        ranks=len(slots),
        gpus=len(devices.cuda),
    )


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


def _slots(
    request: LaunchRequest, devices: Devices, environ: Mapping[str, str]
) -> tuple[int | str, ...]:
    if request.num_nodes is not None and request.num_nodes > 1:
        raise ConfigError(
            f"num_nodes is {request.num_nodes}: this release starts ranks on one node; set it to "
            "1, or start train.py on every node with torchrun"
        )
    hosted = read_hostfile(request.hostfile, environ)
    available: list[int | str] = [int(i) if i.isdigit() else i for i in devices.cuda]
    if not available:
        available = list(range(request.num_gpus or hosted or 1))
    elif request.include or request.exclude:
        available = choose_slots(available, request.include, request.exclude)
    count = request.num_gpus or hosted or len(available)
    if count > len(available):
        raise ConfigError(
            f"num_gpus is {count}, but {len(available)} CUDA "
            f"{'device is' if len(available) == 1 else 'devices are'} visible here; lower it, or "
            "set CUDA_VISIBLE_DEVICES= (empty) to run that many ranks on the CPU"
        )
    return tuple(available[:count])


def _environment(environ: Mapping[str, str], devices: Devices, ranks: int) -> dict[str, str]:
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")])),
        # The launcher and the rank's guardian import nothing from the folder that the
        # user happens to stand in; the guardian takes this off again for the rank.
        "PYTHONSAFEPATH": "1",
    }
    if not environ.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(max(1, devices.cores // ranks))
    if not devices.cuda:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
