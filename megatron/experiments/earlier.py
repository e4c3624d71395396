"""A study that has been run: the plan in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.errors import RunError
from megatron.experiments.study import PLAN


def read_plan(study: Path) -> dict[str, Any]:
    """Return the plan of a study that has been run.

    Args:
        study: its folder (``--out``).

    Raises:
        RunError: the folder holds none.
    """
    try:
        plan: dict[str, Any] = json.loads((study / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{study / PLAN} cannot be read ({error}); give the folder (--out) of a sweep"
        ) from None
    return plan
