"""Real processes: a supervisor, a launcher (DeepSpeed's own, or a stand-in), small ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.errors import RunError
from megatron.launch.lock import RunLock
from megatron.launch.process import process_info

PROGRAMS = Path(__file__).resolve().parent / "programs"
ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 60.0

LAUNCHERS = pytest.mark.parametrize(
    "launcher", ["standin", pytest.param("deepspeed", marks=pytest.mark.slow)]
)


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        info = process_info(int(entry.name)) if entry.name.isdigit() else None
        if info is not None and info.parent == pid and info.state not in "ZX":
            found.append(info.pid)
    return sorted(found)


def alive(pid: int) -> bool:
    info = process_info(pid)
    return info is not None and info.state not in "ZX"


class Job:
    """A supervised job of two ranks in a process of its own."""

    def __init__(self, folder: Path, behaviour: str, *options: str, **environment: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "job.py"), str(folder), behaviour, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )

    def pids(self) -> dict[str, int]:
        """Wait until both ranks run, and return everybody's pid by role."""
        eventually(lambda: all((self.folder / f"pid.{r}").exists() for r in (0, 1)), "ranks run")
        ranks = {f"rank {r}": int((self.folder / f"pid.{r}").read_text()) for r in (0, 1)}
        infos = {name: process_info(pid) for name, pid in ranks.items()}
        guardians = {f"guardian {name[-1]}": i.parent for name, i in infos.items() if i}
        launcher = children(self.process.pid)
        assert len(launcher) == 1
        assert sorted(guardians.values()) == children(launcher[0])
        return {
            "supervisor": self.process.pid,
            "launcher": launcher[0],
            **guardians,
            **ranks,
        }

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE + 60)
        return self.process.returncode, out, err

    def note(self, name: str) -> set[int]:
        return {r for r in (0, 1) if (self.folder / f"{name}.{r}").exists()}


StartJob = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartJob]:
    jobs: list[Job] = []

    def begin(behaviour: str, *options: str, launcher: str = "standin", **environment: str) -> Job:
        real = ("--real",) if launcher == "deepspeed" else ()
        jobs.append(Job(tmp_path, behaviour, *options, *real, **environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
        job.process.communicate()


@LAUNCHERS
def test_a_finished_job_ends_with_0_and_shows_rank_0(start: StartJob, launcher: str) -> None:
    job = start("finish", launcher=launcher)
    code, out, err = job.end()
    assert (code, err) == (0, "")
    assert out == "rank 0 of 2 says hello\n"
    assert (job.folder / "logs/rank_1.log").read_text() == "rank 1 of 2 says hello\n"


# The one test of these that starts DeepSpeed's launcher in `make test` too.
@pytest.mark.parametrize("launcher", ["standin", "deepspeed"])
def test_sigterm_reaches_every_rank_at_once(start: StartJob, launcher: str) -> None:
    job = start("wait", launcher=launcher)
    job.pids()
    job.process.send_signal(signal.SIGTERM)
    code, _, err = job.end()
    assert code == 143
    assert job.note("saved") == {0, 1}
    assert [(job.folder / f"asked.{r}").read_text() for r in (0, 1)] == ["SIGTERM"] * 2
    assert "chatter" not in err
    assert "Killing" not in err


@LAUNCHERS
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_interrupt_and_usr1_save_and_stop(
    start: StartJob, launcher: str, signum: signal.Signals
) -> None:
    job = start("wait", launcher=launcher)
    job.pids()
    job.process.send_signal(signum)
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}
    assert (job.folder / "asked.1").read_text() == signum.name


def test_a_hangup_saves_and_stops(start: StartJob) -> None:
    job = start("wait")
    job.pids()
    job.process.send_signal(signal.SIGHUP)
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}


@LAUNCHERS
def test_a_signal_to_every_process_of_the_job_saves_too(start: StartJob, launcher: str) -> None:
    """As a batch system sends it: the launcher must not begin to kill the ranks."""
    job = start("uneven", launcher=launcher)
    for pid in job.pids().values():
        os.kill(pid, signal.SIGTERM)
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}


def test_the_launcher_lives_in_a_session_of_its_own(start: StartJob) -> None:
    job = start("wait")
    pids = job.pids()
    infos = {name: process_info(pid) for name, pid in pids.items()}
    sessions = {name: info.session for name, info in infos.items() if info}
    assert sessions["supervisor"] == pids["supervisor"]
    assert {sessions[name] for name in sessions if name != "supervisor"} == {pids["launcher"]}
    os.killpg(pids["supervisor"], signal.SIGINT)  # Ctrl-C in a terminal
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}


@LAUNCHERS
def test_a_failed_rank_decides_the_code_and_has_the_last_word(
    start: StartJob, launcher: str
) -> None:
    code, out, err = start("last-rank-fails", launcher=launcher).end()
    assert code == 7
    lines = err.splitlines()
    assert lines[-1] == "error: the fuse of this rank is blown"
    assert err.count("the fuse of this rank is blown") == 1
    assert "rank 1 failed with exit code 7" in err
    assert "chatter" not in out + err
    assert "Killing" not in out + err


def test_the_first_trouble_counts_not_the_first_exit(start: StartJob) -> None:
    code, _, err = start("others-complain").end()
    assert code == 7
    assert err.splitlines()[-1] == "ValueError: blown"


def test_an_error_that_all_ranks_agree_on_is_said_once(start: StartJob) -> None:
    job = start("user-error")
    code, out, err = job.end()
    assert code == 2
    assert err == "error: domain 'code': no such file\n"
    assert out == "rank 0 of 2 says hello\n"
    assert "no such file" in (job.folder / "logs/rank_1.log").read_text()


@LAUNCHERS
@pytest.mark.parametrize(
    ("victim", "expected"),
    [
        ("supervisor", -9),
        ("launcher", 137),
        ("rank 1", 137),
        pytest.param("rank 0", 137, marks=pytest.mark.slow),
        pytest.param("guardian 1", 137, marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_killed_member(
    start: StartJob, launcher: str, victim: str, expected: int
) -> None:
    job = start("deaf", launcher=launcher)
    pids = job.pids()
    os.kill(pids[victim], signal.SIGKILL)
    code, _, err = job.end()
    assert code == expected
    eventually(lambda: not any(alive(pid) for pid in pids.values()), "all processes gone")
    with RunLock(job.folder) as lock:
        assert lock.held
    if victim.startswith("rank"):
        assert f"{victim} was killed by SIGKILL" in err.splitlines()[-1]
    if victim == "launcher":
        assert "launcher was killed" in err.splitlines()[-1]


def test_a_killed_rank_counts_though_its_peers_complain_first(start: StartJob) -> None:
    job = start("notice")
    os.kill(job.pids()["rank 1"], signal.SIGKILL)
    code, _, err = job.end()
    assert code == 137
    assert "rank 1 was killed by SIGKILL" in err.splitlines()[-1]


def test_ranks_that_do_not_save_in_time_are_killed(start: StartJob) -> None:
    job = start("deaf", "--save-timeout", "0.5")
    pids = job.pids()
    job.process.send_signal(signal.SIGTERM)
    code, _, err = job.end()
    assert code == 137
    assert "not saved after 0.5 s" in err.splitlines()[-1]
    assert not any(alive(pid) for pid in pids.values())


def test_a_second_interrupt_kills(start: StartJob) -> None:
    job = start("deaf")
    pids = job.pids()
    job.process.send_signal(signal.SIGINT)
    assert job.process.stderr is not None
    assert "SIGINT: asked 2 rank(s)" in job.process.stderr.readline()
    job.process.send_signal(signal.SIGTERM)  # does not count as a second Ctrl-C
    job.process.send_signal(signal.SIGINT)
    code, _, err = job.end()
    assert code == 130
    assert "interrupted again" in err
    assert not any(alive(pid) for pid in pids.values())


def test_a_rank_slower_than_its_peers_may_finish_saving(start: StartJob) -> None:
    """Rank 0 is gone seconds before rank 1 has saved: that is no failure of rank 0."""
    job = start("uneven", UNEVEN_SECONDS="2.5")
    job.pids()
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}


@pytest.mark.slow
def test_a_rank_may_take_longer_than_deepspeed_would_wait(start: StartJob) -> None:
    job = start("uneven", launcher="deepspeed", UNEVEN_SECONDS="35")
    job.pids()
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 143
    assert job.note("saved") == {0, 1}


def test_ranks_that_leave_the_signal_to_the_system_end_with_143(start: StartJob) -> None:
    job = start("die-by-default")
    job.pids()
    job.process.send_signal(signal.SIGTERM)
    code, _, err = job.end()
    assert code == 143
    assert "killed by" not in err


@LAUNCHERS
def test_a_stop_before_any_rank_has_started(start: StartJob, launcher: str) -> None:
    job = start("wait", launcher=launcher)
    eventually(lambda: (job.folder / "logs/launcher.log").exists(), "launcher started")
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 143
    with RunLock(job.folder) as lock:
        assert lock.held


def test_a_launcher_that_cannot_start_is_explained(start: StartJob) -> None:
    code, _, err = start("wait", "--broken").end()
    assert code == RunError.exit_code
    assert "ended before it started a rank" in err
    assert err.strip().endswith("ImportError: no launcher here")


def test_a_second_job_in_the_folder_is_refused_and_the_first_goes_on(start: StartJob) -> None:
    first = start("wait")
    first.pids()
    code, _, err = start("wait").end()
    assert code == 2
    assert f"process {first.process.pid} on host" in err
    assert len(err.splitlines()) == 1
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143


def test_the_environment_reaches_the_ranks(start: StartJob, tmp_path: Path) -> None:
    job = start("finish", COLOUR="blue", PATH=str(tmp_path / "empty"), DS_ACCELERATOR="cpu")
    assert job.end()[0] == 0
    environment = json.loads((tmp_path / "environment.1").read_text())
    assert environment["COLOUR"] == "blue"
    assert environment["PATH"] == str(tmp_path / "empty")
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "PYTHONSAFEPATH" not in environment


def test_output_survives_a_log_that_cannot_be_written(start: StartJob, tmp_path: Path) -> None:
    (tmp_path / "logs/rank_0.log").mkdir(parents=True)
    code, out, err = start("user-error").end()
    assert code == 2
    assert "no longer written to" in err
    assert err.strip().endswith("error: domain 'code': no such file")
    assert out == "rank 0 of 2 says hello\n"


def test_a_rank_without_supervisor_is_the_program_itself(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron.launch.rank", str(tmp_path / "program.py"), "a", "b"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "NEOMIX_SUPERVISOR"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "['a', 'b']\n")
