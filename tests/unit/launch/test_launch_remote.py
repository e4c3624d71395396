from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launch.carry import carried, read_environment_files, secret
from megatron.launch.command import LaunchPlan, plan_launch
from megatron.launch.devices import Devices
from megatron.launch.hosts import format_world, is_local, parse_world
from megatron.launch.node import find_node
from megatron.launch.remote import RemotePlan
from megatron.launch.request import LaunchRequest, visible_slots
from megatron.launch.sbatch import JobOptions, sbatch_script
from megatron.launch.slurm import expand_nodes

CPU = Devices(cuda=(), cores=8)
GPUS = Devices(cuda=("0", "1"), cores=8)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    file = tmp_path / "hosts"
    file.write_text("# ours\nw-0 slots=4\n\nw-1 slots = 4 # half\nw-2 slots=2\n")
    return str(file)


def plan(
    environ: dict[str, str] | None = None, devices: Devices = CPU, **request: object
) -> LaunchPlan | RemotePlan:
    return plan_launch(
        Path("/p/train.py"),
        ["--flag", "it's 100% & $HOME"],
        LaunchRequest(**request),  # type: ignore[arg-type]
        environ={"HOME": "/nonexistent", "DS_ACCELERATOR": "cpu", **(environ or {})},
        devices=devices,
        log_dir=Path("/logs"),
    )


def remote(**arguments: object) -> RemotePlan:
    made = plan(**arguments)  # type: ignore[arg-type]
    assert isinstance(made, RemotePlan)
    return made


def test_several_hosts_mean_pdsh_with_all_their_slots(hostfile: str) -> None:
    made = remote(hostfile=hostfile)
    assert (made.launcher, made.ranks, made.gpus) == ("pdsh", 10, 0)
    assert made.world == {"w-0": (0, 1, 2, 3), "w-1": (0, 1, 2, 3), "w-2": (0, 1)}
    command = made.command()
    assert command[0] == "pdsh"
    assert command[command.index("-w") + 1] == "w-0,w-1,w-2"
    assert command[command.index("-f") + 1] == "3"
    assert "--node %n" in command[-1]
    assert "--master-addr w-0 --master-port 29500" in command[-1]
    assert remote(environ={"DLTS_HOSTFILE": hostfile}).ranks == 10


@pytest.mark.option("include", "exclude", "num_nodes")
def test_hosts_and_slots_are_chosen_in_deepspeeds_form(hostfile: str) -> None:
    def world(**keys: object) -> dict[str, tuple[int | str, ...]]:
        return remote(hostfile=hostfile, force_multi=True, **keys).world

    assert world(include="w-0:1,3@w-2") == {"w-0": (1, 3), "w-2": (0, 1)}
    assert world(exclude="w-0@w-1:0") == {"w-1": (1, 2, 3), "w-2": (0, 1)}
    assert world(num_nodes=2) == {"w-0": (0, 1, 2, 3), "w-1": (0, 1, 2, 3)}
    assert world(num_gpus=2) == dict.fromkeys(("w-0", "w-1", "w-2"), (0, 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_nodes": 4}, "num_nodes is 4, but 3 hosts can be used .w-0, w-1, w-2."),
        ({"num_gpus": 3}, "num_gpus is 3, but host w-2 has 2 slots"),
        ({"include": "w-O"}, "'w-O' is none of the hosts .w-0, w-1, w-2.; did you mean"),
        ({"include": "w-0:4"}, "the slots of w-0 are 0, 1, 2, 3"),
        ({"include": "w-0", "exclude": "w-1"}, "both given"),
        ({"launcher": "local"}, "launcher is local, but the hostfile names 3 hosts"),
        ({"launcher": "torchrun"}, "hostfile has no meaning under launcher: torchrun"),
    ],
)
def test_what_is_not_there_is_named(hostfile: str, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(hostfile=hostfile, **keys)


def test_the_text_for_pdsh_survives_every_shell_on_the_way(hostfile: str, tmp_path: Path) -> None:
    """Values with quotes, dollars, per cents and line breaks arrive as they are."""
    nasty = 'it\'s "5%n" of $HOME; `x`\n\\ done'
    folder = tmp_path / "a b%h'c"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        made = remote(environ={"NCCL_NASTY": nasty}, hostfile=hostfile)
    finally:
        os.chdir(before)
    text = made.command()[-1].replace("%%", "\0").replace("%n", "1").replace("\0", "%")
    program = text[: text.index("-m megatron.launch.node")]
    printing = 'import os; print(os.environ["NCCL_NASTY"], os.getcwd(), sep="|", end="")'
    done = subprocess.run(
        ["sh", "-c", f"{program} -c {shlex.quote(printing)}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{nasty}|{folder}"
    words = shlex.split(text)
    assert words[-3:] == ["/p/train.py", "--flag", "it's 100% & $HOME"]
    assert words[words.index("--node") + 1] == "1"
    # What --dry-run prints is the same command once a shell has read it.
    assert shlex.split(made.shell().replace("\\\n", ""))[-1] == made.command()[-1]


def test_variables_go_along_but_secrets_not_on_a_command_line(hostfile: str) -> None:
    environ = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "abc", "HF_TOKEN": "d", "EDITOR": "vi"}
    made = remote(environ=environ, hostfile=hostfile)
    assert "NCCL_DEBUG=INFO" in made.command()[-1]
    assert not any(word in made.shell() for word in ("abc", "HF_TOKEN", "EDITOR"))
    assert made.withheld == ("HF_TOKEN", "WANDB_API_KEY")
    over_mpi = remote(environ=environ, hostfile=hostfile, launcher="openmpi")
    command = over_mpi.command()
    names = {command[i + 1] for i, word in enumerate(command) if word == "-x"}
    assert {"NCCL_DEBUG", "WANDB_API_KEY", "HF_TOKEN", "PYTHONPATH"} <= names
    assert over_mpi.withheld == ()
    assert "abc" not in over_mpi.shell()


def test_the_numbers_of_this_machines_devices_stay_here() -> None:
    assert carried({"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_LAUNCH_BLOCKING": "1"}) == {
        "CUDA_LAUNCH_BLOCKING": "1"
    }
    assert carried({"CUDA_VISIBLE_DEVICES": ""}) == {"CUDA_VISIBLE_DEVICES": ""}
    assert carried({"NEOMIX_SUPERVISOR": "x", "MASTER_PORT": "1", "BASH_FUNC_x%%": "y"}) == {}
    assert [secret(name) for name in ("AWS_SECRET", "my_password", "TOKENIZERS_X")] == [
        True,
        True,
        False,
    ]


def test_deepspeeds_environment_files_are_read(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("# ours\nA=1\nexport B='x y=z'\n\n")
    two.write_text("A=2\n")
    files = [one, tmp_path / "absent", two]
    assert read_environment_files(files) == {"A": "2", "B": "x y=z"}
    two.write_text("A=2\nhunter2\n")
    with pytest.raises(ConfigError, match="two, line 2: should be NAME=VALUE") as caught:
        read_environment_files(files)
    assert "hunter2" not in str(caught.value)


@pytest.mark.option("account", "comment")
def test_mpi_and_slurm_commands(hostfile: str) -> None:
    mpi = shlex.join(remote(hostfile=hostfile, launcher="openmpi", launcher_args="--tag").command())
    assert "-n 3 --host w-0:1,w-1:1,w-2:1 --map-by ppr:1:node --bind-to none" in mpi
    assert "--tag" in mpi
    assert "--node host:OMPI_COMM_WORLD_RANK" in mpi
    hydra = shlex.join(remote(hostfile=hostfile, launcher="mpich").command())
    assert "-n 3 -ppn 1 -hosts w-0,w-1,w-2" in hydra
    assert "--node host:PMI_RANK" in hydra
    slurm = remote(
        hostfile=hostfile,
        launcher="slurm",
        account="me",
        comment="a b",
        environ={"SLURM_CPUS_PER_TASK": "12"},
    ).command()
    for word in ("--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--nodelist=w-0,w-1,w-2"):
        assert word in slurm
    assert {"--account=me", "--comment=a b", "--cpus-per-task=12"} <= set(slurm)
    assert "--kill-on-bad-exit=1" in slurm


def test_a_slurm_job_gives_hosts_and_slots() -> None:
    made = remote(environ=SLURM)
    assert made.launcher == "slurm"
    assert made.world == dict.fromkeys(("n1", "n2", "n3"), (0, 1, 2, 3))
    assert remote(environ=SLURM, launcher="openmpi", num_nodes=2).ranks == 8
    assert isinstance(plan(environ=SLURM, launcher="local"), LaunchPlan)
    with pytest.raises(ConfigError, match=r"srun has started deepy\.py 3 times"):
        plan(environ={**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3"})


def test_srun_can_be_asked_for_the_nodes_itself() -> None:
    made = remote(launcher="slurm", num_nodes=2, num_gpus=4)
    assert made.ranks == 8
    assert not any(word.startswith("--nodelist") for word in made.command())
    assert "only:SLURM_PROCID" in made.command()
    assert made.agent[:2] == ("--master-addr", "slurm")
    with pytest.raises(ConfigError, match="set num_gpus"):
        plan(launcher="slurm", num_nodes=2)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a[01-03,7],b", ["a01", "a02", "a03", "a7", "b"]),
        ("r[1-2]n[8-9]x", ["r1n8x", "r1n9x", "r2n8x", "r2n9x"]),
        ("a[098-101]", ["a098", "a099", "a100", "a101"]),
    ],
)
def test_slurms_short_form_of_names(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


def test_a_malformed_node_list_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'a\[x-2\]' is no list"):
        expand_nodes("a[x-2]")


def test_torchrun_starts_this_nodes_ranks() -> None:
    made = plan(launcher="torchrun", num_gpus=2)
    assert isinstance(made, LaunchPlan)
    assert "torch.distributed.run" in made.command
    assert {"--nnodes=1", "--node-rank=0", "--nproc-per-node=2"} <= set(made.command)
    second = plan(
        launcher="torchrun",
        num_gpus=2,
        num_nodes=3,
        master_addr="h",
        environ={"NODE_RANK": "2"},
    )
    assert isinstance(second, LaunchPlan)
    assert (second.ranks, list(second.numbers)) == (6, [4, 5])
    assert "--master-port=29500" in second.command
    for keys, message in (
        ({"num_nodes": 2}, "give master_addr"),
        ({"num_nodes": 2, "master_addr": "h", "node_rank": 2}, "nodes count from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(launcher="torchrun", **keys)


def test_a_node_finds_its_number() -> None:
    hosts = ["elsewhere.invalid", "localhost", "other.invalid"]
    assert find_node("2", hosts, {}) == 2
    assert find_node("host:R", hosts, {"R": "0"}) == 1  # by its name, whatever the number
    assert find_node("only:R", hosts, {"R": "0"}) == 0
    twice = ["127.0.0.1", "127.0.0.2"]
    assert [find_node("host:R", twice, {"R": r}) for r in "01"] == [0, 1]
    with pytest.raises(ConfigError, match=r"cannot tell which of a\.invalid, b\.invalid it is"):
        find_node("host:R", ["a.invalid", "b.invalid"], {})


def test_names_and_addresses_of_this_machine() -> None:
    assert is_local("127.0.0.3")
    assert not is_local("192.0.2.1")
    world = {"a": (0, 1), "b": ("GPU-1",)}
    assert parse_world(format_world(world)) == world


def test_slots_are_the_devices_a_host_shows() -> None:
    assert visible_slots((1,), Devices(cuda=("4", "GPU-x"), cores=1), "h") == ("GPU-x",)
    assert visible_slots((0, 1, 2), CPU, "h") == (0, 1, 2)
    with pytest.raises(ConfigError, match="w-1 shows 2 CUDA devices, but slot 2 was given"):
        visible_slots((0, 2), GPUS, "w-1")


@pytest.mark.option("launcher")
def test_a_launcher_that_is_not_installed_is_named(
    hostfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for launcher, program in (("pdsh", "pdsh"), ("openmpi", "mpirun"), ("slurm", "srun")):
        made = remote(hostfile=hostfile, launcher=launcher)
        with pytest.raises(ConfigError, match=f"there is no {program} on PATH: .*or choose"):
            made.check_program()


def script(**options: object) -> str:
    return sbatch_script(
        ["/p/train.py", "a b", "--set", "x=[1, 2]"],
        LaunchRequest(num_nodes=4, num_gpus=8, account="me", comment="to the moon"),
        JobOptions(name="run", output=Path("o-%j"), save_timeout=600, **options),  # type: ignore[arg-type]
        environ={"DS_ACCELERATOR": "cpu"},
        devices=CPU,
    )


def test_a_job_script_is_a_script(tmp_path: Path) -> None:
    text = script(time="1-12:00:00", partition="gpu", further="--qos=high --mem=0")
    flags = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=4", "--ntasks-per-node=1", "--time=1-12:00:00", "--qos=high"} <= set(flags)
    assert {"--signal=B:USR1@660", "--requeue", '--comment="to the moon"'} <= set(flags)
    file = tmp_path / "job.sh"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    line = next(line for line in text.splitlines() if "deepy.py" in line and line.endswith("&"))
    words = shlex.split(line[:-1])
    assert words[2:6] == ["/p/train.py", "a b", "--set", "x=[1, 2]"]
    assert words[6:] == ["--set", "launcher=slurm", "num_nodes=4", "num_gpus=8"]
    for wrong in ({"time": "soon"}, {"further": "high"}):
        with pytest.raises(ConfigError, match=r"time is 'soon'|sbatch-args is 'high'"):
            script(**wrong)


@pytest.mark.parametrize("time", ["11", "11:00", "0:11:00", "0-0:11", "0-0:11:00", "0-0"])
def test_a_job_too_short_to_save_is_refused(time: str) -> None:
    with pytest.raises(ConfigError, match=f"--time is {time}, but .* save 660 seconds before"):
        script(time=time)


@pytest.mark.parametrize("time", ["12", "11:01", "0:11:01", "0-0:12", "1-0", "0-1", "0-0:11:01"])
def test_a_job_long_enough_to_save_is_written(time: str) -> None:
    assert f"#SBATCH --time={time}" in script(time=time)


@pytest.mark.parametrize(
    ("ends", "signalled", "expected", "requeued"),
    [(0, False, 0, False), (7, False, 7, False), (143, True, 0, True), (143, False, 143, False)],
)
def test_a_job_saves_at_its_limit_and_queues_itself_again(
    tmp_path: Path, ends: int, signalled: bool, expected: int, requeued: bool
) -> None:
    """The script itself, with a run that waits for the signal where there is one."""
    lines = script().splitlines()
    place = next(i for i, line in enumerate(lines) if "deepy.py" in line and line.endswith("&"))
    waiting = "trap 'exit 143' USR1; while :; do kill -USR1 $PPID; sleep 0.1; done"
    lines[place] = f"bash -c {shlex.quote(waiting if signalled else f'exit {ends}')} &"
    # The signal must not come before the script's own trap: the run starts once it is set.
    lines.insert(place, "trap : USR1")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, timeout=30, check=False
    )
    assert done.returncode == expected
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 42\n"
