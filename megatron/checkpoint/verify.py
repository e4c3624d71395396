"""Comparison of a checkpoint's folder with its manifest."""

from __future__ import annotations

import stat
from pathlib import Path

from megatron.checkpoint import files as fs
from megatron.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron.errors import CheckpointError


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint in ``path``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = path / MANIFEST_NAME
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise CheckpointError(f"{MANIFEST_NAME} is not a regular file")
        return Manifest.from_bytes(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST_NAME} is missing (the save did not finish)") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {error.strerror}") from error


def compare_names_and_sizes(path: Path, manifest: Manifest) -> list[str]:
    """Compare names and sizes of the files in ``path`` with the manifest."""
    found: dict[str, int | None] = {}
    try:
        for name, entry in fs.walk_files(path):
            regular = entry.is_file(follow_symlinks=False)
            found[name] = entry.stat(follow_symlinks=False).st_size if regular else None
    except FileNotFoundError:
        return [f"{path} is missing"]
    found.pop(MANIFEST_NAME, None)
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - found.keys())]
    problems += [
        f"{name} is not in the manifest" for name in sorted(found.keys() - manifest.files.keys())
    ]
    for name in sorted(found.keys() & manifest.files.keys()):
        size, expected = found[name], manifest.files[name].size
        if size is None:
            problems.append(f"{name} is not a regular file")
        elif size != expected:
            problems.append(f"{name} has {size} bytes instead of {expected}")
    return problems


def compare_hashes(path: Path, manifest: Manifest) -> list[str]:
    """Read every file that the manifest names and compare its SHA-256."""
    names = sorted(manifest.files)
    results = fs.map_files(fs.hash_file, [path / name for name in names])
    return [
        f"{name} is damaged (its SHA-256 differs)"
        for name, (_, digest) in zip(names, results, strict=True)
        if digest != manifest.files[name].sha256
    ]


def summary(problems: list[str]) -> str:
    """Return the first few problems as one phrase."""
    shown = "; ".join(problems[:3])
    return shown + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
