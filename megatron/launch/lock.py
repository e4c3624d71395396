"""One run per folder: a lock that names its holder and outlives no process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.errors import RunError
from megatron.launch.process import boot_id, process_info

LOCK_NAME = "run.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class RunLock:
    """Exclusive use of a run folder, until :meth:`release` or the end of the process.

    The file ``run.lock`` holds the holder's pid, host and start time as JSON and is
    locked with ``flock``: the kernel frees it when the holder ends, however it ends, so
    a file left behind by a dead run is never in the way.  On a file system without
    ``flock`` the file's existence is the lock, and it is taken over when its holder, on
    this host, is no longer alive (pid and start time: a recycled pid is another process).

    Children inherit nothing: the descriptor is closed on ``exec``.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        """Name the folder; nothing is touched before :meth:`acquire`."""
        self.path = Path(run_dir) / LOCK_NAME
        self._descriptor: int | None = None
        self._owner: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock in this process."""
        return self._descriptor is not None and self._owner == os.getpid()

    def acquire(self) -> RunLock:
        """Take the lock (making the folder if needed) and return self.

        Raises:
            RunError: another run holds it, or the folder cannot be written.
        """
        if self.held:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = self._lock()
        except OSError as error:
            raise RunError(
                f"the run folder {self.path.parent} cannot be used: {error.strerror or error}; "
                "give another run_dir, or make this one writable"
            ) from error
        self._descriptor, self._owner = descriptor, os.getpid()
        return self

    def release(self) -> None:
        """Give the lock back; the file is removed."""
        if not self.held:
            return
        assert self._descriptor is not None
        # Removed while still held: nobody can have locked this file in the meantime, and
        # whoever opened it before finds, once locked, that it is no longer the one there.
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = self._owner = None

    def _lock(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._still_there(descriptor):
                    os.close(descriptor)
                    continue
                self._write(descriptor)
                return descriptor
            except BlockingIOError:
                holder = _read(descriptor)
                os.close(descriptor)
                raise self._refusal(holder) from None
            except OSError as error:
                os.close(descriptor)
                if error.errno in _UNSUPPORTED:
                    return self._lock_by_existence()
                raise

    def _lock_by_existence(self) -> int:
        # The file appears with its content (link), so an empty one is nobody's; a stale
        # one is moved aside first, and moved back if it has changed hands meanwhile.
        own = self.path.with_name(f"{LOCK_NAME}.{socket.gethostname()}.{os.getpid()}")
        stale = own.with_name(own.name + ".stale")
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._write(descriptor)
            holder = _read_path(self.path)
            if holder and _may_be_alive(holder):
                raise self._refusal(holder, sure=holder.get("host") == socket.gethostname())
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, stale)
                if _read_path(stale) != holder:
                    os.rename(stale, self.path)
                    raise self._refusal(_read_path(self.path))
            os.link(own, self.path)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, FileExistsError):
                raise self._refusal(_read_path(self.path)) from None
            raise
        finally:
            own.unlink(missing_ok=True)
            stale.unlink(missing_ok=True)
        return descriptor

    def _still_there(self, descriptor: int) -> bool:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))

    def _write(self, descriptor: int) -> None:
        info = process_info(os.getpid())
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": info.started if info else None,
            "boot": boot_id(),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        os.fsync(descriptor)

    def _refusal(self, holder: dict[str, Any], *, sure: bool = True) -> RunError:
        who = (
            f"process {holder['pid']} on host {holder.get('host', 'unknown')}"
            if "pid" in holder
            else "another process"
        )
        remedy = (
            "wait for it, stop it, or give another run_dir"
            if sure
            else f"this host cannot see whether it still runs; if it does not, remove {self.path}"
        )
        return RunError(f"the run folder {self.path.parent} is in use by {who}: {remedy}")

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.release()


def _read(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _read_path(path: Path) -> dict[str, Any]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _may_be_alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return True
    if holder.get("boot") != boot_id():
        return False
    info = process_info(int(holder.get("pid", 0)))
    return info is not None and info.state not in "ZX" and info.started == holder.get("started")
