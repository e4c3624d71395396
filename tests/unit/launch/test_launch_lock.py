from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron.errors import RunError
from megatron.launch.lock import RunLock
from megatron.launch.process import boot_id, process_info

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["flock", "existence"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with and without a file system that knows flock."""
    if request.param == "existence":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


def hold_elsewhere(folder: Path, kind: str) -> subprocess.Popen[str]:
    """Start a process that holds the lock until it is killed."""
    program = textwrap.dedent(f"""
        import errno, fcntl, time
        from megatron.launch.lock import RunLock
        if {kind!r} == "existence":
            def refuse(*_):
                raise OSError(errno.ENOLCK, "No locks available")
            fcntl.flock = refuse
        with RunLock({str(folder)!r}):
            print("held", flush=True)
            time.sleep(300)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_by_name_of_the_first(tmp_path: Path, kind: str) -> None:
    holder = hold_elsewhere(tmp_path, kind)
    try:
        for _ in range(5):
            with pytest.raises(RunError) as caught:
                RunLock(tmp_path).acquire()
            assert f"process {holder.pid} on host {socket.gethostname()}" in str(caught.value)
            assert str(tmp_path) in str(caught.value)
    finally:
        holder.kill()
        holder.communicate()


def test_it_is_free_again_when_its_holder_is_killed(tmp_path: Path, kind: str) -> None:
    holder = hold_elsewhere(tmp_path, kind)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "run.lock").exists()
    with RunLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_the_file_names_pid_host_and_start(tmp_path: Path, kind: str) -> None:
    with RunLock(tmp_path / "deep/run") as lock:
        info = process_info(os.getpid())
        assert info is not None
        assert json.loads(lock.path.read_text()) == {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": info.started,
            "boot": boot_id(),
        }
    assert not lock.held


def test_two_objects_of_one_process_exclude_each_other(tmp_path: Path, kind: str) -> None:
    with RunLock(tmp_path) as lock:
        assert lock.acquire() is lock
        with pytest.raises(RunError, match="in use by process"):
            RunLock(tmp_path).acquire()
    RunLock(tmp_path).acquire().release()


@pytest.mark.parametrize(
    "change",
    [{"started": 1}, {"boot": "another boot"}, {"pid": 2**22 - 1}, None],
    ids=["recycled pid", "before a reboot", "no such process", "empty file"],
)
def test_a_stale_file_is_taken_over(
    tmp_path: Path, kind: str, change: dict[str, object] | None
) -> None:
    with RunLock(tmp_path) as lock:
        content = json.loads(lock.path.read_text())
    stale = "" if change is None else json.dumps({**content, **change})
    lock.path.write_text(stale)
    with RunLock(tmp_path) as second:
        assert json.loads(second.path.read_text())["started"] == content["started"]


def test_without_flock_another_host_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "run.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(RunError, match=r"process 1 on host elsewhere.*remove .*run.lock"):
        RunLock(tmp_path).acquire()


def test_children_inherit_nothing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path).acquire()
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lock.release()
        with RunLock(tmp_path) as again:
            assert again.held
    finally:
        child.kill()
        child.wait()


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys, time
        from megatron.errors import RunError
        from megatron.launch.lock import RunLock
        sys.stdin.readline()
        try:
            RunLock({str(tmp_path)!r}).acquire()
        except RunError:
            print("refused", flush=True)
        else:
            print("held", flush=True)
        sys.stdin.readline()
    """)
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(6)
    ]
    answers = []
    for process in crowd:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in crowd:
        assert process.stdout is not None
        answers.append(process.stdout.readline().strip())
    for process in crowd:
        process.communicate("end\n")
    assert sorted(answers) == ["held"] + ["refused"] * 5


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run cannot be used: Not a directory"):
        RunLock(tmp_path / "file/run").acquire()
