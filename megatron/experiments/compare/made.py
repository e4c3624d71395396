"""With what a result was made: command, date, versions, machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from typing import Any, Final

_LIBRARIES: Final = ("torch", "deepspeed", "numpy", "scipy", "scikit-learn")


def made_with() -> dict[str, Any]:
    """Return the facts that a reader needs to make a result again, JSON-able."""
    return {
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
