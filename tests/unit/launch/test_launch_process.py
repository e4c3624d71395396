from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from megatron.launch.process import die_with_parent, process_info, session_members

ROOT = Path(__file__).resolve().parents[3]


def gone(pid: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        info = process_info(pid)
        if info is None or info.state in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_a_child_dies_with_its_parent() -> None:
    program = textwrap.dedent("""
        import os, subprocess, sys, time
        from megatron.launch.process import die_with_parent
        own = os.getpid()
        child = subprocess.Popen(["sleep", "300"], preexec_fn=lambda: die_with_parent(own))
        print(child.pid, flush=True)
        time.sleep(300)
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone_now(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    assert gone(child)


def gone_now(pid: int) -> bool:
    info = process_info(pid)
    return info is None or info.state in "ZX"


def test_a_child_whose_parent_is_already_gone_ends_at_once() -> None:
    child = os.fork()
    if child == 0:
        die_with_parent(os.getppid() + 1)  # not its parent: as after the parent's death
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_process_info_reads_names_with_parentheses(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "60"], start_new_session=True)
    try:
        info = process_info(process.pid)
        assert info is not None
        assert (info.pid, info.parent, info.session) == (process.pid, os.getpid(), process.pid)
        assert session_members(process.pid) == [process.pid]
    finally:
        process.kill()
    assert gone(process.pid)
    assert session_members(process.pid) == []  # a zombie is not alive
    process.wait()
    assert process_info(process.pid) is None
