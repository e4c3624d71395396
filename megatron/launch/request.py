"""Where ranks are wanted: which hosts, how many on each, and by which launcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launch.devices import Devices
from megatron.launch.hosts import Slot, World, choose_hosts, is_local, limit, read_hostfile
from megatron.launch.slurm import Allocation, read_allocation, started_by_srun

MPI = ("openmpi", "mpich", "impi")
REMOTE = ("pdsh", *MPI, "slurm")
DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """Where ranks are wanted: the configuration's ``launch`` group.

    Attributes:
        launcher: ``local``, ``torchrun``, ``pdsh``, ``openmpi``, ``mpich``, ``impi`` or
            ``slurm``; ``None``: by the number of hosts.
        num_gpus: ranks on each node; ``None``: one per slot or CUDA device, or one on CPU.
        num_nodes: nodes; ``None``: all of the hostfile or allocation.
        node_rank: number of this node among ``num_nodes`` under ``torchrun``.
        hostfile: file of ``host slots=n`` lines; ``None``: ``DLTS_HOSTFILE`` or
            ``/job/hostfile``, if there is one.
        include: hosts and devices to use, in DeepSpeed's form (``worker-0:0,2@worker-1``).
        exclude: hosts and devices to leave out.
        force_multi: start the ranks through the remote launcher on a single host too.
        master_addr: address at which rank 0 is met; ``None``: the loopback, or the first
            of several hosts.
        master_port: its port; ``None``: a free one, or 29500 with several hosts.
        launcher_args: further words for pdsh, mpirun or srun.
        comment: comment of the Slurm job.
        account: account that the Slurm job is charged to.
    """

    launcher: str | None = None
    num_gpus: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    force_multi: bool = False
    master_addr: str | None = None
    master_port: int | None = None
    launcher_args: str | None = None
    comment: str | None = None
    account: str | None = None


LAUNCH_KEYS = tuple(LaunchRequest.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where ranks go.

    Attributes:
        launcher: what starts them, by name.
        world: slots by host; the hosts of ``torchrun``, and of a Slurm job that is not yet
            granted, have made-up names.
        named: whether these are the names of hosts.
    """

    launcher: str
    world: World
    named: bool = True

    @property
    def ranks(self) -> int:
        """Ranks on all hosts."""
        return sum(len(slots) for slots in self.world.values())


def place(request: LaunchRequest, devices: Devices, environ: Mapping[str, str]) -> Placement:
    """Decide which launcher starts how many ranks on which hosts.

    Raises:
        ConfigError: what is asked for is not there, or does not fit together.
    """
    if request.launcher == "torchrun":
        return _under_torchrun(request, devices)
    absent = missing_hostfile(request) is not None
    hosts = None if absent else read_hostfile(request.hostfile, environ)
    if hosts is not None:
        return _by_hostfile(request, hosts, devices)
    allocation = read_allocation(environ)
    if allocation is not None and _uses(request, allocation):
        return _in_allocation(request, allocation, devices, environ)
    if request.launcher == "slurm":
        return _before_allocation(request, devices)
    if (request.num_nodes or 1) > 1:
        raise ConfigError(
            f"num_nodes is {request.num_nodes}, but there is no hostfile: give one (hostfile: "
            "FILE, with lines 'HOST slots=N'), or use launcher: slurm, or launcher: torchrun with "
            "node_rank on every node"
        )
    remote = request.force_multi or request.launcher in MPI
    return Placement(
        launcher=_remote_launcher(request) if remote else "local",
        world={"localhost": _local_slots(request, None, devices)},
    )


def missing_hostfile(request: LaunchRequest) -> str | None:
    """Return what to say of a hostfile that is not there and that nobody needs, else ``None``.

    As in DeepSpeed's launcher, ranks then start on this machine alone: GPT-NeoX's own files name a
    hostfile that no machine has. Who asks for several nodes, or for a launcher of such, needs it.
    """
    wanted = request.force_multi or request.launcher in REMOTE or (request.num_nodes or 1) > 1
    if request.hostfile is None or wanted or Path(request.hostfile).exists():
        return None
    return (
        f"hostfile {request.hostfile} is not there: the ranks start without it; correct the path, "
        "or leave the key out"
    )


def _by_hostfile(request: LaunchRequest, hosts: Mapping[str, int], devices: Devices) -> Placement:
    asked = request.force_multi or request.launcher in (*MPI, "slurm")
    if len(hosts) == 1 and not asked:
        limit({host: range(count) for host, count in hosts.items()}, request.num_nodes, None)
        slots = _local_slots(request, next(iter(hosts.values())), devices)
        return Placement(launcher="local", world={"localhost": slots})
    every = {host: range(count) for host, count in hosts.items()}
    world = choose_hosts(every, request.include, request.exclude)
    world = limit(world, request.num_nodes, request.num_gpus)
    if request.launcher == "local" and len(world) > 1:
        raise ConfigError(
            f"launcher is local, but the hostfile names {len(world)} hosts; set num_nodes: 1, or "
            "launcher: pdsh, openmpi or slurm"
        )
    if len(world) == 1 and not asked:
        (host, slots) = next(iter(world.items()))
        if request.launcher == "local" or is_local(host):
            slots = visible_slots(slots, devices, "this machine")
            return Placement(launcher="local", world={"localhost": slots})
    return Placement(launcher=_remote_launcher(request), world=world)


def _remote_launcher(request: LaunchRequest) -> str:
    return request.launcher if request.launcher in REMOTE else "pdsh"


def _local_slots(request: LaunchRequest, hosted: int | None, devices: Devices) -> tuple[Slot, ...]:
    """Return this machine's slots; a hostfile of one host says only how many (``hosted``)."""
    slots = _device_slots(devices)
    if not slots:
        slots = tuple(range(request.num_gpus or hosted or 1))
    elif request.include or request.exclude:
        slots = choose_hosts({"localhost": slots}, request.include, request.exclude)["localhost"]
    count = request.num_gpus or hosted or len(slots)
    if count > len(slots):
        raise ConfigError(
            f"num_gpus is {count}, but {len(slots)} CUDA "
            f"{'device is' if len(slots) == 1 else 'devices are'} visible here; lower it, or "
            "set CUDA_VISIBLE_DEVICES= (empty) to run that many ranks on the CPU"
        )
    return slots[:count]


def _device_slots(devices: Devices) -> tuple[Slot, ...]:
    return tuple(int(i) if i.isdigit() else i for i in devices.cuda)


def visible_slots(slots: tuple[Slot, ...], devices: Devices, who: str) -> tuple[Slot, ...]:
    """Return the devices behind the numbers of a hostfile: slot n is the n-th visible device.

    Args:
        slots: as the world has them.
        devices: what the host has; without a GPU, ranks run on its CPU.
        who: the host, for the error.

    Raises:
        ConfigError: there are fewer devices.
    """
    if not devices.cuda:
        return slots
    own = _device_slots(devices)
    beyond = [slot for slot in slots if not isinstance(slot, int) or slot >= len(own)]
    if beyond:
        raise ConfigError(
            f"{who} shows {len(own)} CUDA device{'' if len(own) == 1 else 's'}, but slot "
            f"{beyond[0]} was given to it; correct the hostfile or num_gpus, or set "
            "CUDA_VISIBLE_DEVICES= (empty) to run on CPUs"
        )
    return tuple(own[slot] for slot in slots if isinstance(slot, int))


def _under_torchrun(request: LaunchRequest, devices: Devices) -> Placement:
    if request.hostfile or request.include or request.exclude:
        key = "hostfile" if request.hostfile else "include" if request.include else "exclude"
        raise ConfigError(
            f"{key} has no meaning under launcher: torchrun, which is started on every node; set "
            "num_nodes, num_gpus, node_rank and master_addr"
        )
    nodes = request.num_nodes or 1
    if nodes > 1 and (request.master_addr is None or request.node_rank is None):
        raise ConfigError(
            f"num_nodes is {nodes} under launcher: torchrun: give master_addr (the first node) and "
            "node_rank (0 on it; also the variable NODE_RANK), and start the command on every node"
        )
    if request.node_rank is not None and request.node_rank >= nodes:
        raise ConfigError(
            f"node_rank is {request.node_rank}, but num_nodes is {nodes}: nodes count from 0"
        )
    slots = _local_slots(request, None, devices)
    return Placement(
        launcher="torchrun", world={f"node{n}": slots for n in range(nodes)}, named=False
    )


def _uses(request: LaunchRequest, allocation: Allocation) -> bool:
    """Tell whether ranks go onto a Slurm job's nodes: if asked for, or if it has several."""
    if request.launcher is None:
        return len(allocation.hosts) > 1 and request.num_nodes != 1
    return request.launcher in (*MPI, "slurm") or (
        request.launcher == "pdsh" and (request.num_nodes or 1) > 1
    )


def _in_allocation(
    request: LaunchRequest, allocation: Allocation, devices: Devices, environ: Mapping[str, str]
) -> Placement:
    tasks = started_by_srun(environ)
    if tasks > 1:
        raise ConfigError(
            f"srun has started deepy.py {tasks} times; start it once, without srun: it starts the "
            "ranks of all nodes itself (or start train.py under torchrun on every node)"
        )
    count = request.num_gpus or allocation.gpus or len(devices.cuda) or 1
    every = {host: range(count) for host in allocation.hosts}
    world = choose_hosts(every, request.include, request.exclude)
    world = limit(world, request.num_nodes, request.num_gpus)
    return Placement(launcher=request.launcher or "slurm", world=world)


def _before_allocation(request: LaunchRequest, devices: Devices) -> Placement:
    """Place ranks on nodes that ``srun`` will first have to be given."""
    if request.include or request.exclude:
        raise ConfigError(
            "include and exclude choose among known hosts; outside of a Slurm job, give srun its "
            "own flags: launcher_args: '--nodelist=… --exclude=…'"
        )
    count = request.num_gpus or len(devices.cuda)
    if not count:
        raise ConfigError(
            "launcher is slurm, outside of a Slurm job and on a machine without a GPU: set "
            "num_gpus, the ranks on each node"
        )
    nodes = range(request.num_nodes or 1)
    return Placement(
        launcher="slurm", world={f"node{n}": tuple(range(count)) for n in nodes}, named=False
    )
