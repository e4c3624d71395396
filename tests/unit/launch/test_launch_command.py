from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launch import devices as devices_module
from megatron.launch.command import (
    LaunchPlan,
    decode_config,
    encode_config,
    plan_launch,
)
from megatron.launch.devices import Devices, detect_devices, usable_cores
from megatron.launch.request import LaunchRequest, missing_hostfile

SCRIPT = Path("/somewhere/train.py")
CPU = Devices(cuda=(), cores=8)
GPUS = Devices(cuda=("0", "1", "2", "3"), cores=64)


def plan(
    devices: Devices = CPU, environ: dict[str, str] | None = None, **request: object
) -> LaunchPlan:
    made = plan_launch(
        SCRIPT,
        ["--flag", "a b"],
        LaunchRequest(**request),  # type: ignore[arg-type]
        environ={"DLTS_HOSTFILE": ""} if environ is None else environ,
        devices=devices,
    )
    assert isinstance(made, LaunchPlan)
    return made


def slots(made: LaunchPlan) -> list[object]:
    word = next(w for w in made.command if w.startswith("--world_info="))
    world = json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
    assert list(world) == ["localhost"]
    return list(world["localhost"])


@pytest.mark.option("num_gpus")
def test_ranks_on_a_cpu() -> None:
    assert slots(plan()) == [0]
    made = plan(num_gpus=2)
    assert slots(made) == [0, 1]
    assert (made.ranks, made.gpus) == (2, 0)
    assert made.environment["DS_ACCELERATOR"] == "cpu"
    assert made.environment["OMP_NUM_THREADS"] == "4"
    assert plan(num_gpus=20).environment["OMP_NUM_THREADS"] == "1"


def test_ranks_on_gpus() -> None:
    made = plan(GPUS)
    assert slots(made) == [0, 1, 2, 3]
    assert (made.ranks, made.gpus) == (4, 4)
    assert "DS_ACCELERATOR" not in made.environment
    assert slots(plan(GPUS, num_gpus=2)) == [0, 1]
    assert slots(plan(Devices(cuda=("GPU-aa", "MIG-b"), cores=4))) == ["GPU-aa", "MIG-b"]


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_gpus is 5, but 4 CUDA devices .*lower it"):
        plan(GPUS, num_gpus=5)


def test_several_nodes_need_their_names() -> None:
    with pytest.raises(ConfigError, match=r"num_nodes is 2.*no hostfile.*slurm.*torchrun"):
        plan(num_nodes=2)
    assert plan(num_nodes=1).ranks == 1


def test_a_given_thread_count_stays() -> None:
    assert "OMP_NUM_THREADS" not in plan(environ={"OMP_NUM_THREADS": "3"}).environment


@pytest.mark.option("master_addr", "master_port")
def test_the_command_ends_with_the_program() -> None:
    made = plan(master_port=1234, master_addr="10.0.0.1")
    assert made.command[-4:] == ("megatron.launch.rank", str(SCRIPT), "--flag", "a b")
    assert made.command[:4] == (sys.executable, "-u", "-m", "deepspeed.launcher.launch")
    assert {"--master_port=1234", "--master_addr=10.0.0.1"} <= set(made.command)


def test_the_plan_prints_as_shell() -> None:
    made = LaunchPlan(
        command=(
            sys.executable,
            "-c",
            "import os, sys; print(os.environ['X'], sys.argv[1])",
            "c d",
        ),
        environment={"X": "a b"},
        ranks=1,
        gpus=0,
    )
    done = subprocess.run(["sh", "-c", made.shell()], capture_output=True, text=True, check=True)
    assert done.stdout == "a b c d\n"


def test_a_free_port_can_be_bound() -> None:
    word = next(w for w in plan().command if w.startswith("--master_port="))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(word.partition("=")[2])))


@pytest.mark.parametrize("text", ["", "a: 1\n", "domäne: ü\n" * 5000])
def test_a_configuration_travels_in_one_word(text: str) -> None:
    word = encode_config(text)
    assert decode_config(word) == text
    assert len(word) < 10000
    assert word.replace("-", "").replace("_", "").rstrip("=").isalnum()


@pytest.mark.parametrize("word", ["", "x", "AAAA", "§§"])
def test_what_is_no_configuration_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="not a packed configuration"):
        decode_config(word)


@pytest.mark.option("hostfile")
def test_a_hostfile_of_one_node_gives_the_slots(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# all\n\nhere slots=3  # comment\n")
    assert plan(hostfile=str(file)).ranks == 3
    assert plan(environ={"DLTS_HOSTFILE": str(file)}).ranks == 3
    assert plan(hostfile=str(file), num_gpus=2).ranks == 2
    with pytest.raises(ConfigError, match="num_gpus is 3"):
        plan(Devices(cuda=("0",), cores=1), hostfile=str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("-w slots=2\n", "line 1: '-w slots=2' should be"),
        ("a slots=zwei\n", "line 1: 'a slots=zwei' should be"),
        ("a slots=1\na slots=2\n", "line 2"),
        (None, "cannot be read"),
    ],
)
def test_bad_hostfiles_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        plan(hostfile=str(file), launcher="pdsh")
    assert str(file) in str(caught.value)


def test_a_hostfile_that_is_not_there_is_needed_for_several_nodes_alone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("here slots=3\n")
    gone = str(tmp_path / "gone")
    assert plan(hostfile=gone, num_gpus=2, environ={"DLTS_HOSTFILE": str(there)}).ranks == 2
    said = missing_hostfile(LaunchRequest(hostfile=gone))
    assert said is not None
    assert gone in said
    assert missing_hostfile(LaunchRequest(hostfile=str(there))) is None
    assert missing_hostfile(LaunchRequest()) is None
    for needed in ({"num_nodes": 2}, {"launcher": "openmpi"}, {"force_multi": True}):
        assert missing_hostfile(LaunchRequest(hostfile=gone, **needed)) is None
        with pytest.raises(ConfigError, match=r"gone cannot be read.*leave the key out"):
            plan(hostfile=gone, **needed)


def test_devices_can_be_chosen_in_deepspeeds_form() -> None:
    assert slots(plan(GPUS, include="localhost:2,0")) == [2, 0]
    assert slots(plan(GPUS, include=socket.gethostname())) == [0, 1, 2, 3]
    assert slots(plan(GPUS, exclude="localhost:1")) == [0, 2, 3]
    assert slots(plan(GPUS, include="localhost:1,3", num_gpus=1)) == [1]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"include": "localhost:9"}, "include is 'localhost:9', but the visible devices are 0, 1"),
        ({"include": "localhost:1,1"}, "each once"),
        ({"include": "node7:0"}, "'node7' is none of the hosts .localhost."),
        ({"include": "localhost@node7"}, "'node7' is none of the hosts"),
        ({"exclude": "localhost:0,1,2,3"}, "leaves no device"),
        ({"exclude": "localhost"}, "leaves no device"),
        ({"include": "localhost:0@localhost:1"}, "each once"),
        ({"include": "localhost:0", "exclude": "localhost:1"}, "both given"),
    ],
)
def test_bad_choices_are_named(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(GPUS, **choice)


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists four GPUs, one of them cut in two, and a torch built with CUDA."""
    program = tmp_path / "nvidia-smi"
    listing = "".join(f"GPU {i}: H (UUID: GPU-{i})\n" for i in range(4)) + "  MIG 1g Device 0\n"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices_module, "_torch_has_cuda", lambda: True)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("0", "1", "2", "3")),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ("2", "0")),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "1,9,2"}, ("1",)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3"}, ("GPU-3",)),
        ({"DS_ACCELERATOR": "cpu"}, ()),
    ],
)
def test_devices_are_counted_without_torch(
    environ: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert detect_devices(environ).cuda == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cuda: Optional[str] = '12.4'", True),
        ("cuda = None", False),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.1'", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None", False),
    ],
)
def test_a_torch_without_cuda_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: bool
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "version.py").write_text(f"__version__ = '9'\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert devices_module._torch_has_cuda() is expected


def test_some_core_may_be_used() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
