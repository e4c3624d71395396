"""Opening data files: one clear error for whatever is not a readable file."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path

from megatron.data.index_format import LEGACY_HEADER_BYTES, IndexHeader, parse_header
from megatron.errors import DataError, did_you_mean


def open_file(path: str, prefix: str) -> tuple[int, int]:
    """Open a regular file and return its descriptor and size.

    Raises:
        DataError: it is missing (``prefix`` serves to name the nearest), not a regular file, or
            cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EMFILE and _raise_descriptor_limit():
            return open_file(path, prefix)
        raise DataError(_cannot_open(path, prefix, error)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise DataError(f"{path}: {kind}; give the prefix of a .bin/.idx pair")
    return descriptor, status.st_size


def map_index(path: str, prefix: str) -> tuple[mmap.mmap, IndexHeader]:
    """Map an index for reading here and there, and parse its header.

    Raises:
        DataError: it cannot be opened, or its header is not one of token data.
    """
    descriptor, size = open_file(path, prefix)
    try:
        header = parse_header(os.pread(descriptor, LEGACY_HEADER_BYTES, 0), path)
        index = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    finally:
        os.close(descriptor)
    if hasattr(mmap, "MADV_RANDOM"):
        index.madvise(mmap.MADV_RANDOM)
    return index, header


def _raise_descriptor_limit() -> bool:
    """Raise the soft limit of open files to the hard one; tell whether that gained anything."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # some systems allow less than they state
        return False
    return bool(soft != hard)


def _cannot_open(path: str, prefix: str, error: OSError) -> str:
    if error.errno == errno.EMFILE:
        return f"{path}: too many open files; raise the limit (ulimit -n) for this many prefixes"
    if error.errno != errno.ENOENT:
        return f"{path}: cannot be opened: {error.strerror}"
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        return f"{path}: no such file; give the prefix without {suffix}: {stem}"
    folder = Path(prefix).parent
    if not folder.is_dir():
        return f"{path}: no such file: the folder {folder} does not exist"
    prefixes = [str(found)[: -len(".idx")] for found in sorted(folder.glob("*.idx"))]
    return (
        f"{path}: no such file{did_you_mean(prefix, prefixes)} "
        f"(write it with tools/preprocess_data.py, or correct the prefix)"
    )
