"""The mixture that a finished run has left in its folder."""

from __future__ import annotations

import yaml

from megatron.errors import RunError
from megatron.experiments.study import PlannedRun
from megatron.training.product import NAME as MIXTURE


def read_mixture(run: PlannedRun) -> dict[str, float]:
    """Return the mixture that a finished run has left.

    Raises:
        RunError: there is none.
    """
    path = run.folder / MIXTURE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["mixing"]["weights"]
        return {str(name): float(weight) for name, weight in found.items()}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise RunError(
            f"{path}, the mixture that run '{run.name}' found, cannot be read ({error}); remove "
            f"{run.folder}, and the run is done again"
        ) from None
