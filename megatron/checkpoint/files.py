"""Durable file operations, and disk errors in words that a user can act on."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron.errors import RunError

_DISK_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ESTALE,
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What torch's zip writer says when a write comes up short: the system's error is lost.
_TORCH_WRITE_FAILURES = ("PytorchStreamWriter failed", "unexpected pos", "No space left")


def sync_file(path: Path) -> None:
    """Wait until the content of ``path`` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in the folder ``path`` are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; they write names through.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` and wait until it is on the disk (the name may not be)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Replace ``path`` atomically: a reader, or a crash, finds the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, content)
    _put_in_place(temporary, path)


def _put_in_place(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_directory(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path``, as by :func:`replace_file`, at the block's end.

    Where the block fails, ``path`` stays as it was and what was written is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        _put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> Path:
    """Write a file of results whole, with the folders it lies in; return its path.

    Raises:
        RunError: the disk refuses.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    return path


def remove_tree(path: Path) -> None:
    """Remove a folder and all that is in it, a symbolic link instead of what it names."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def hash_file(path: Path) -> tuple[int, str]:
    """Return (bytes, SHA-256 in hexadecimal) of what ``path`` holds."""
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
        return handle.tell(), digest.hexdigest()


def map_files(
    function: Callable[[Path], tuple[int, str]], paths: Sequence[Path]
) -> list[tuple[int, str]]:
    """Apply ``function`` to the paths, several at a time (hashing frees the interpreter)."""
    if len(paths) < 2:
        return [function(path) for path in paths]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1, len(paths))) as pool:
        return list(pool.map(function, paths))


def walk_files(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (path relative to ``folder`` with ``/``, entry) of all but folders, sorted."""
    stack: list[tuple[str, Path]] = [("", folder)]
    while stack:
        prefix, current = stack.pop()
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.is_dir(follow_symlinks=False):
                    stack.append((f"{prefix}{entry.name}/", current / entry.name))
                else:
                    yield prefix + entry.name, entry


def walk_directories(folder: Path) -> Iterable[Path]:
    """Yield ``folder`` and the folders in it, innermost first."""
    for current, _, _ in os.walk(folder, topdown=False):
        yield Path(current)


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write where ``path`` is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def human_bytes(count: int) -> str:
    """Return ``count`` bytes as people read it: ``1,234,567 bytes (1.2 MB)``."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count:,} bytes" + ("" if unit == "bytes" else f" ({value:.1f} {unit})")


def require_space(path: Path, needed: int) -> None:
    """Check that ``needed`` bytes fit where ``path`` will be written.

    Raises:
        RunError: naming the path, the bytes needed and the bytes there are.
    """
    free = free_bytes(path)
    if free < needed:
        raise RunError(
            f"not enough disk space for {path}: {human_bytes(needed)} needed, "
            f"{human_bytes(free)} free; {_REMEDY}"
        )


_REMEDY = (
    "free some space, lower keep_last_n_checkpoints, or give another save folder "
    "(earlier checkpoints are unharmed)"
)


@contextmanager
def disk_errors(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn a disk's refusal (full, read-only, quota, I/O error) into a :class:`RunError`.

    Wrap everything that writes a checkpoint in it, ``torch.save`` included.

    Args:
        path: what is being written, named if the error itself names no file.
        needed: bytes that it takes in all, if known or estimated.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            raise
        # shutil.rmtree leaves names relative to a folder that it holds open.
        named = Path(os.fsdecode(error.filename)) if error.filename else path
        raise _explain(
            named if named.is_absolute() else path, error.errno, error, needed
        ) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _TORCH_WRITE_FAILURES):
            raise
        raise _explain(path, errno.ENOSPC, error, needed) from error


def _explain(path: Path, code: int, error: Exception, needed: int | None) -> RunError:
    reason = os.strerror(code) if isinstance(error, OSError) else str(error).splitlines()[0]
    message = f"cannot write {path}: {reason}"
    if code in _FULL:
        if needed is not None:
            message += f"; {human_bytes(needed)} needed"
        return RunError(f"{message}; {human_bytes(free_bytes(path))} free; {_REMEDY}")
    return RunError(f"{message}; give another save folder or repair this one")
