"""The project's files, as version control knows them (or as they lie in an unpacked archive)."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = {".git", ".venv", "data", "runs", "__pycache__", "build", "dist"}


def tracked_files() -> list[Path]:
    """Return the project's files relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not _NOT_OURS.intersection(name.parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


def python_files(*tops: str) -> list[Path]:
    """Return the Python files under the given folders, or with the given names."""
    return [name for name in tracked_files() if name.suffix == ".py" and name.parts[0] in tops]
