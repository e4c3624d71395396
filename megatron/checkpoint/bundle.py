"""What a checkpoint holds beside DeepSpeed's files: the state of data and mixing.

It is rank-free JSON (cursors, carries, weights, estimates; floats keep their bits), so the
number of ranks may change between saving and loading.  Nothing of ours is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError
from megatron.state import check_state

STATE_NAME = "neomix_state.json"
_VERSION = 1
_KEYS = ("step", "domains", "planner", "guard")


def bundle_bytes(*, step: int, domains: list[str], planner: Mapping[str, Any], guard: Any) -> bytes:
    """Return the state of a run after ``step`` as its file holds it.

    Args:
        step: optimizer steps attempted so far.
        domains: names in the order of the run.
        planner: state of mixer, sampler and lag.
        guard: state of the non-finite policy.
    """
    state = {
        "version": _VERSION,
        "step": step,
        "domains": domains,
        "planner": planner,
        "guard": guard,
    }
    return json.dumps(state, allow_nan=False).encode() + b"\n"


def read_bundle(directory: Path) -> dict[str, Any]:
    """Read the file that :func:`bundle_bytes` are the content of.

    Raises:
        CheckpointError: the file is missing, no JSON, or of another version.
    """
    path = directory / STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; choose another checkpoint folder or start a new run_dir"
        ) from error
    check_state(f"the run in {path}", state, version=_VERSION, keys=_KEYS)
    return dict(state)
