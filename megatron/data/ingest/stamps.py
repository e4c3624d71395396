"""Checksums of files too large to hold."""

from __future__ import annotations

import hashlib

from megatron.data.sidecar import FileStamp

_HASH_BLOCK = 8 << 20


def stamp(path: str) -> FileStamp:
    """Return a file's size and SHA-256, read in blocks."""
    total = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            total.update(block)
            size += len(block)
    return FileStamp(size=size, sha256=total.hexdigest())
