"""The name under which an outside service knows a run, kept in the run folder.

A resumed run goes on in the same chart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megatron.errors import RunError


def stored_identity(path: Path, make: Callable[[], str], *, resume: bool) -> tuple[str, bool]:
    """Return the identity in ``path``, making and storing one for a new run.

    Args:
        path: file that holds it.
        make: gives a new identity.
        resume: go on with the stored one, if any.

    Returns:
        The identity, and whether it was there before.
    """
    try:
        if resume and path.exists():
            known = path.read_text(encoding="utf-8").strip()
            if known:
                return known, True
        identity = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(identity + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be used: {error.strerror}") from error
    return identity, False
