"""Run Python where only some libraries can be imported, as on a machine that has no others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The finder stands before all others, so that even a lazy import inside a library fails.
_GUARD = """
import importlib.abc, sys
allowed = set({allowed!r}) | set(sys.stdlib_module_names)
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in allowed and not first.startswith("_"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None
sys.meta_path.insert(0, Guard())
sys.path.insert(0, {root!r})
"""


def run_isolated(code: str, *, allowed: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter where only ``allowed`` can be imported.

    The standard library and the project's own modules always can.
    """
    own = {"megatron", "data_sampling_utils", "deepy", "train", "prepare_data"}
    guard = _GUARD.format(allowed=sorted(own | set(allowed)), root=str(ROOT))
    return subprocess.run(
        [sys.executable, "-c", guard + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
