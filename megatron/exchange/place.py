"""A folder that is there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.files import (
    disk_errors,
    remove_tree,
    sync_directory,
    sync_file,
    walk_files,
)
from megatron.errors import CheckpointError


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that takes its name at the end.

    After an error nothing of it is left.

    Args:
        target: must not be there, or be an empty folder.

    Raises:
        CheckpointError: it is there.
        RunError: the disk refuses.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; give another --output, or remove it")
    partial = target.with_name(f".{target.name}.partial")
    try:
        with disk_errors(target):
            remove_tree(partial)
            partial.mkdir(parents=True)
            yield partial
            for name, _ in walk_files(partial):
                sync_file(partial / name)
            if target.is_dir():
                target.rmdir()
            os.rename(partial, target)
            sync_directory(target.parent)
    finally:
        with contextlib.suppress(OSError):
            remove_tree(partial)
