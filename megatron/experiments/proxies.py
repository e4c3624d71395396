"""The runs of a study as RegMix sees them: mixtures, their mean losses, and those kept unseen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.regression import IntArray
from megatron.experiments.runs_array import runs_array
from megatron.experiments.table import Row, tag

LEAST_UNSEEN: Final = 3
"""Two mixtures are always in the right order or in the wrong one."""
_DIGITS: Final = 9


@dataclass(frozen=True, kw_only=True, eq=False)
class Proxies:
    """N mixtures of K domains with their held-out losses, means over seeds.

    Attributes:
        names: of the first run of each mixture, N.
        domains: names of what is trained on, K.
        measured: names of what is measured, M.
        mixtures: mean sampling weights, [N, K].
        losses: nats per token at the end, [N, M].
        tokens: that the longest run trained on.
        seeds: that every mixture was trained with.
        left_out: runs of mixtures that lack one of the seeds.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    measured: tuple[str, ...]
    mixtures: FloatArray
    losses: FloatArray
    tokens: float
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]


def read_proxies(rows: Sequence[Row], domains: Sequence[str]) -> Proxies:
    """Return the mixtures of a study's table, losses averaged over seeds.

    Runs are of one mixture if the study calls them one point, or else if their weights are
    equal.  A mixture that lacks a seed which others have is left out: its mean would be one of
    fewer runs, and of other seeds.

    Args:
        rows: of the table.
        domains: that the runs train on, in the order that is wanted.

    Raises:
        RunError: no run has ended, or runs are measured on different domains.
    """
    runs = runs_array(rows, domains)
    seed_of = {row["run"]: int(row["seed"]) for row in rows}
    point_of = {row["run"]: tag(row, "point") for row in rows}
    groups: dict[object, list[int]] = {}
    for index, (name, mixture) in enumerate(zip(runs.runs, runs.mixtures, strict=True)):
        point = point_of[name]
        key = tuple((mixture.round(_DIGITS) + 0.0).tolist()) if point is None else point
        groups.setdefault(key, []).append(index)
    seeds = tuple(sorted({seed_of[name] for name in runs.runs}))
    whole = [g for g in groups.values() if {seed_of[runs.runs[i]] for i in g} == set(seeds)]
    kept = {index for group in whole for index in group}
    return Proxies(
        names=tuple(runs.runs[group[0]] for group in whole),
        domains=runs.domains,
        measured=runs.measured,
        mixtures=_means(runs.mixtures, whole),
        losses=_means(runs.losses, whole),
        tokens=float(runs.tokens.max()),
        seeds=seeds,
        left_out=tuple(name for i, name in enumerate(runs.runs) if i not in kept),
    )


def _means(values: FloatArray, groups: Sequence[Sequence[int]]) -> FloatArray:
    rows = [values[list(group)].mean(axis=0) for group in groups]
    return np.array(rows, dtype=np.float64).reshape(len(rows), values.shape[1])


def unseen_count(given: float, mixtures: int, domains: int) -> int:
    """Return how many mixtures are kept out of the fit.

    Args:
        given: a number of mixtures, or a share of them below 1.
        mixtures: that there are.
        domains: that a mixture has, K.

    Raises:
        ConfigError: too few are kept out, or too few are left to fit.
    """
    if not given > 0 or (given >= 1 and given != int(given)):
        raise ConfigError(f"--held-out is {given}; give a share below 1, or a number of mixtures")
    count = int(given) if given >= 1 else max(LEAST_UNSEEN, round(given * mixtures))
    if count < LEAST_UNSEEN:
        raise ConfigError(
            f"--held-out is {given:g}; a rank correlation needs {LEAST_UNSEEN} mixtures or more"
        )
    if mixtures - count < domains + 1:
        raise ConfigError(
            f"of {mixtures} mixtures {count} are held out, which leaves {mixtures - count} to fit; "
            f"{domains} domains need at least {domains + 1}: run more proxies (better ten for "
            "each domain), or hold out fewer"
        )
    return count


def unseen_mixtures(count: int, mixtures: int, seed: int) -> IntArray:
    """Return which of the mixtures are kept out of the fit, in their order."""
    chosen = np.random.default_rng(seed).permutation(mixtures)[:count]
    return np.sort(chosen).astype(np.int64)
