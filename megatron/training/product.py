"""The mixture that a run has found, as a file that the next run takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from megatron.checkpoint.files import disk_errors, replace_file

NAME = "mixture.yml"


def write_mixture(
    run_dir: str | Path,
    domains: Sequence[str],
    result: Callable[[], npt.NDArray[np.float64] | None],
    *,
    method: str,
    step: int,
) -> Path | None:
    """Write ``mixture.yml`` where the method makes a mixture to train with.

    Args:
        run_dir: folder of the run.
        domains: names.
        result: returns the mixture [K], or None.
        method: that made it.
        step: after which.

    Returns:
        The file; None where there is nothing to write.

    Raises:
        RunError: the disk is full or refuses.
    """
    weights = result()
    if weights is None:
        return None
    path = Path(run_dir) / NAME
    named = dict(zip(domains, weights.tolist(), strict=True))
    content = yaml.safe_dump({"mixing": {"weights": named}}, sort_keys=False, allow_unicode=True)
    text = (
        f"# The mixture that {method} found in {step} steps. Train with it by naming this file\n"
        f"# beside the next run's own: ./deepy.py train.py YOUR_CONFIGS {path}\n{content}"
    )
    with disk_errors(path):
        replace_file(path, text.encode())
    return path
