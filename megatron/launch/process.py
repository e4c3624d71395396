"""Process life and death on Linux: dying with one's parent, telling one process from another."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None, signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to kill this process as soon as its parent is gone.

    The request survives ``exec`` but not ``fork``: every process makes its own.
    Call it from the main thread.  Elsewhere than on Linux it does nothing.

    Args:
        parent_pid: who the parent must be, if the caller knows it.  A parent that died
            before the request was made cannot trigger it, so a process that finds
            another parent than this one ends at once.  ``None`` (the parent of the
            moment) leaves the time before the call uncovered.
        signum: the signal to kill it with.
    """
    if not sys.platform.startswith("linux"):
        return
    before = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != before:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """What ``/proc`` says of a process.

    Attributes:
        pid: process id.
        parent: its parent's id.
        session: id of the session it belongs to (the pid of the session's leader).
        state: one letter; Z is a process that has ended and was not yet collected.
        started: clock ticks from boot to its start: with the pid, unique until reboot.
    """

    pid: int
    parent: int
    session: int
    state: str
    started: int


def process_info(pid: int) -> ProcessInfo | None:
    """Return what ``/proc`` says of process ``pid``, or ``None`` if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The second field, the command's name, is in parentheses and may hold anything.
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessInfo(
        pid=pid,
        state=fields[0],
        parent=int(fields[1]),
        session=int(fields[3]),
        started=int(fields[19]),
    )


def session_members(session: int) -> list[int]:
    """Return the ids of the living processes of ``session``."""
    members = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            info = process_info(int(entry))
            if info is not None and info.session == session and info.state not in "ZX":
                members.append(info.pid)
    return members


def boot_id() -> str:
    """Return an identifier of this boot of this machine (``""`` where there is none)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
