"""Two agents on this machine under stand-ins for pdsh, mpirun and srun; small ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.launch.lock import RunLock
from megatron.launch.outcome import RankEnd
from megatron.launch.process import process_info
from megatron.launch.reports import ReportReader, format_report, pack_ends, unpack_ends

PROGRAMS = Path(__file__).resolve().parent / "programs"
ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 90.0
PROGRAM_OF = {"pdsh": "pdsh", "openmpi": "mpirun.openmpi", "slurm": "srun"}
STANDINS = {"pdsh": "pdsh", "openmpi": "mpirun", "slurm": "srun"}
EVERY = pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("openmpi", "slurm")]


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    info = process_info(pid)
    return info is not None and info.state not in "ZX"


class Job:
    """A job of two nodes with one rank each, in a process of its own."""

    def __init__(
        self,
        folder: Path,
        behaviour: str,
        *options: str,
        launcher: str,
        hosts: str,
        real: bool,
        **environment: str,
    ) -> None:
        self.folder = folder
        path = f"{ROOT}" if real else f"{ROOT}:{PROGRAMS / 'standin'}"
        (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts.split()))
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(PROGRAMS / "cluster_job.py"), str(folder), behaviour),
                *("--launcher", launcher, "--hostfile", str(folder / "hosts"), *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                **environment,
            },
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        """Wait until both ranks run; return the pids of ranks, guardians, launchers, agents."""
        files = [self.folder / f"pid.{rank}" for rank in (0, 1)]
        eventually(lambda: all(file.exists() for file in files), "ranks run")
        found = []
        for file in files:
            pid = int(file.read_text())
            for _ in range(4):
                found.append(pid)
                info = process_info(pid)
                assert info is not None
                pid = info.parent
        return found

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE + 60)
        return self.process.returncode, out, err

    def note(self, name: str) -> set[int]:
        return {r for r in (0, 1) if (self.folder / f"{name}.{r}").exists()}


StartJob = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartJob]:
    jobs: list[Job] = []
    folder = tmp_path / "bin"
    folder.mkdir()
    for launcher, program in PROGRAM_OF.items():
        file = folder / program
        shell = f"{sys.executable} {PROGRAMS / 'standin_shell.py'} {STANDINS[launcher]}"
        file.write_text(f'#!/bin/sh\nexec {shell} "$@"\n')
        file.chmod(0o755)

    def begin(
        behaviour: str,
        *options: str,
        launcher: str = "pdsh",
        hosts: str = "127.0.0.1 127.0.0.2",
        real: bool = False,
        **environment: str,
    ) -> Job:
        job = Job(
            tmp_path,
            behaviour,
            *options,
            launcher=launcher,
            hosts=hosts,
            real=real,
            **environment,
        )
        jobs.append(job)
        return job

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
        job.process.communicate()


@EVERY
def test_two_nodes_make_one_job(start: StartJob, launcher: str) -> None:
    job = start("finish", launcher=launcher, NCCL_DEBUG="it's 5%n", EDITOR="vi")
    assert job.end() == (0, "rank 0 of 2 says hello\n", "")
    assert (job.folder / "logs/rank_1.log").read_text() == "rank 1 of 2 says hello\n"
    environments = [json.loads((job.folder / f"environment.{r}").read_text()) for r in (0, 1)]
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == str(rank)
        assert environment["LOCAL_RANK"] == "0"
        assert environment["CROSS_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == "2"
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "29500")
        assert environment["NCCL_DEBUG"] == "it's 5%n"
        assert environment["OMP_NUM_THREADS"] == "1"
        assert ("EDITOR" in environment) == (launcher == "slurm")
        assert "PYTHONSAFEPATH" not in environment
    with RunLock(job.folder) as lock:
        assert lock.held


@EVERY
def test_a_failed_rank_of_another_node_has_the_last_word(start: StartJob, launcher: str) -> None:
    job = start("last-rank-fails", launcher=launcher)
    code, _, err = job.end()
    assert code == 7
    lines = err.splitlines()
    assert lines[-1] == "127.0.0.2: error: the fuse of this rank is blown"
    assert "rank 1 on 127.0.0.2 failed with exit code 7" in err
    assert "chatter" not in err
    assert not alive(int((job.folder / "pid.0").read_text()))


@pytest.mark.parametrize("launcher", ["pdsh", *SLOWER])
def test_the_cause_counts_not_the_complaint_of_another_node(start: StartJob, launcher: str) -> None:
    code, _, err = start("others-complain", launcher=launcher).end()
    assert code == 7
    assert err.splitlines()[-1] == "127.0.0.2: ValueError: blown"


def test_an_error_that_all_nodes_agree_on_is_said_once(start: StartJob) -> None:
    code, out, err = start("user-error").end()
    assert (code, err) == (2, "error: domain 'code': no such file\n")
    assert out == "rank 0 of 2 says hello\n"


@EVERY
def test_a_signal_saves_on_every_node(start: StartJob, launcher: str) -> None:
    job = start("wait", launcher=launcher)
    job.pids()
    job.process.send_signal(signal.SIGTERM)
    code, _, err = job.end()
    assert code == 143, err
    assert job.note("saved") == {0, 1}
    assert "SIGTERM: asked 2 rank(s) on 2 hosts to save and stop" in err


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_do_too(start: StartJob, launcher: str, signum: signal.Signals) -> None:
    job = start("uneven", launcher=launcher)
    job.pids()
    job.process.send_signal(signum)
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}


@pytest.mark.parametrize("launcher", ["pdsh", *SLOWER])
def test_nothing_outlives_a_killed_parent(start: StartJob, launcher: str) -> None:
    job = start("deaf", launcher=launcher)
    pids = job.pids()
    job.process.kill()
    eventually(lambda: not any(alive(pid) for pid in pids), "all processes gone")


@pytest.mark.slow
@EVERY
def test_a_second_interrupt_kills_everywhere(start: StartJob, launcher: str) -> None:
    job = start("deaf", launcher=launcher)
    pids = job.pids()
    job.process.send_signal(signal.SIGINT)
    assert job.process.stderr is not None
    assert "SIGINT: asked 2 rank(s)" in job.process.stderr.readline()
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == 130
    eventually(lambda: not any(alive(pid) for pid in pids), "all processes gone")


@pytest.mark.slow
@EVERY
def test_a_killed_agent_ends_the_job(start: StartJob, launcher: str) -> None:
    job = start("deaf", launcher=launcher)
    pids = job.pids()
    os.kill(pids[-1], signal.SIGKILL)
    code, _, err = job.end()
    assert code == 137
    assert "were lost" in err
    eventually(lambda: not any(alive(pid) for pid in pids), "all processes gone")


@pytest.mark.slow
def test_nodes_that_do_not_save_in_time_are_killed(start: StartJob) -> None:
    job = start("deaf", "--save-timeout", "0.5")
    pids = job.pids()
    job.process.send_signal(signal.SIGTERM)
    code, _, err = job.end()
    assert code == 137
    assert "not saved after 0.5 s" in err
    eventually(lambda: not any(alive(pid) for pid in pids), "all processes gone")


def test_a_host_that_cannot_be_reached_is_named(start: StartJob) -> None:
    code, _, err = start("deaf", hosts="127.0.0.1 nowhere").end()
    assert code == 2
    assert "Could not resolve hostname nowhere" in err
    last = [line for line in err.splitlines() if line.startswith("error: ")][-1]
    assert "no ranks could be started on nowhere: ssh exited with exit code 255" in last


@pytest.mark.slow
def test_a_launcher_of_a_node_that_cannot_start_is_explained(
    start: StartJob, tmp_path: Path
) -> None:
    broken = tmp_path / "broken/deepspeed/launcher"
    broken.mkdir(parents=True)
    for folder in (broken, broken.parent):
        (folder / "__init__.py").write_text("")
    (broken / "launch.py").write_text("raise ImportError('no launcher here')\n")
    code, _, err = start("wait", PYTHONPATH=f"{ROOT}:{tmp_path / 'broken'}").end()
    assert code == 2
    assert "127.0.0." in err
    assert "ImportError: no launcher here" in err


@pytest.mark.slow
def test_deepspeeds_own_launcher_on_two_nodes(start: StartJob) -> None:
    job = start("last-rank-fails", real=True)
    code, _, err = job.end()
    assert code == 7
    assert err.splitlines()[-1] == "127.0.0.2: error: the fuse of this rank is blown"


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["finish", "last-rank-fails", "wait"])
def test_the_real_pdsh(start: StartJob, tmp_path: Path, behaviour: str) -> None:
    """pdsh itself, with a local shell in the place of ssh."""
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    (tmp_path / "bin/pdsh").unlink()
    (tmp_path / "bin/ssh").write_text('#!/bin/sh\nfor last; do :; done\ncd / && eval "$last"\n')
    (tmp_path / "bin/ssh").chmod(0o755)
    job = start(behaviour, NCCL_DEBUG="it's 5%n")
    if behaviour == "wait":
        job.pids()
        job.process.send_signal(signal.SIGTERM)
    code, out, err = job.end()
    assert code == {"finish": 0, "last-rank-fails": 7, "wait": 143}[behaviour], err
    assert out == "rank 0 of 2 says hello\n"
    environment = json.loads((job.folder / "environment.1").read_text())
    assert environment["NCCL_DEBUG"] == "it's 5%n"


def test_reports_are_found_among_output() -> None:
    message = {"ended": 7, "words": ["ä" * 2000], "ends": []}
    lines = format_report(3, 1, message)
    assert max(map(len, lines.splitlines())) < 700
    stream = b"step 1\nhalf a line" + lines + b"rest ::neo" + b"mix is a name\n" + lines[:40]
    for size in (1, 7, 100, len(stream)):
        reader = ReportReader()
        output, reports = b"", []
        for begin in range(0, len(stream), size):
            text, found = reader.feed(stream[begin : begin + size])
            output, reports = output + text, reports + found
        assert reports == [(3, message)]
        plain = b"step 1\nhalf a linerest ::neomix is a name\n"
        assert output + reader.rest() == plain + lines[:40]


def test_the_ends_of_ranks_travel() -> None:
    now = time.monotonic()
    end = RankEnd(rank=5, code=-9, at=now - 2, tail=["a", "b"], log="/l", lost=True)
    (read,) = unpack_ends(json.loads(json.dumps(pack_ends([end]))), "w-1")
    assert (read.rank, read.code, read.tail, read.lost, read.host) == (
        5,
        -9,
        ["a", "b"],
        True,
        "w-1",
    )
    assert abs(read.at - end.at) < 1
