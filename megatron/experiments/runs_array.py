"""The runs of a study's table as arrays, for what is fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.errors import RunError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.table import Row


@dataclass(frozen=True, kw_only=True, eq=False)
class RunsArray:
    """N runs that train on K domains, with the held-out losses of M domains at their end.

    Attributes:
        runs: names of the runs, N.
        domains: names of what they train on, K.
        measured: names of what they are measured on, M.
        mixtures: mean sampling weights over the run, [N, K].
        losses: nats per token, [N, M].
        tokens: trained on, [N].
    """

    runs: tuple[str, ...]
    domains: tuple[str, ...]
    measured: tuple[str, ...]
    mixtures: FloatArray
    losses: FloatArray
    tokens: FloatArray


def runs_array(rows: Sequence[Row], domains: Sequence[str]) -> RunsArray:
    """Return the ends of all runs of a table.

    Args:
        rows: of the table.
        domains: that the runs train on, in the order that is wanted.

    Raises:
        RunError: no run has ended, or runs are measured on different domains.
    """
    ends: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["last"] and row["split"] == "valid":
            ends.setdefault(row["run"], {})[row["domain"]] = row
    if not ends:
        raise RunError("the table holds no run with held-out losses at its end")
    measured = tuple(next(iter(ends.values())))
    for name, found in ends.items():
        if found.keys() != set(measured) or not set(domains) <= found.keys():
            raise RunError(
                f"run '{name}' is measured on {', '.join(sorted(found))}; all runs need a "
                f"held-out loss of {', '.join(sorted({*measured, *domains}))}"
            )
    mixtures = [[found[name]["weight"] for name in domains] for found in ends.values()]
    losses = [[found[name]["loss"] for name in measured] for found in ends.values()]
    tokens = [next(iter(found.values()))["tokens"] for found in ends.values()]
    return RunsArray(
        runs=tuple(ends),
        domains=tuple(domains),
        measured=measured,
        mixtures=np.array(mixtures, dtype=np.float64),
        losses=np.array(losses, dtype=np.float64),
        tokens=np.array(tokens, dtype=np.float64),
    )
