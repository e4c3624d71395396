"""Writing what a study has found."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.files import disk_errors, replace_file


def write_text(path: Path, text: str) -> Path:
    """Write a file of results whole, with the folders it lies in; return its path.

    Raises:
        RunError: the disk refuses.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    return path
