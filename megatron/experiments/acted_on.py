"""The matrix Ã that a mixing method acts on at a point of its run.

Aioli (Chen et al., arXiv 2411.05735), table 1, reads every online method as one that knows
an A of the linear dynamic law and steps by p_j ~ p_j exp(eta sum_i A_ij).  What that A is,
method by method, is said beside each function below; ``docs/experiments.md`` lists them.
Only the direction of the column sums matters to the fidelity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.experiments.bounds import FloatArray
from megatron.mixing.ado import LEAST_ALPHA
from megatron.mixing.skillit import read_graph

_GIVEN: Final = ("static", "schedule", "replay", "average_of_ledger")
"""Methods whose weights are given: they act on no A."""
_REWARDS: Final = {
    "odm": "estimate",
    "exp3": "estimate",
    "smoothed_mean": "estimate",
    "smoothed_mean_exp": "estimate",
    "validation_gap": "estimate",
    "naive_validation": "gain",
    "ema": "mean",
    "doremi": "score",
    "velocitune": "velocity",
}
"""Methods that act on one number for each domain, and its name in their state."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A method at one step of its run.

    Attributes:
        method: its name.
        options: its options, all of them.
        state: of the controller, from the checkpoint of the step.
        ledger: lines of ``mixture.jsonl`` up to the step, in order.
        domains: trained on, K.
        measured: with held-out losses, M: the domains, and then what is only measured.
    """

    method: str
    options: Mapping[str, Any]
    state: Mapping[str, Any]
    ledger: Sequence[Mapping[str, Any]]
    domains: tuple[str, ...]
    measured: tuple[str, ...]

    def by_domain(self, values: Mapping[str, float | None]) -> FloatArray:
        """Return what is kept by name as [K]; 0 where nothing is known."""
        return np.array([float(values.get(name) or 0.0) for name in self.domains])


@dataclass(frozen=True, kw_only=True, eq=False)
class ActedOn:
    """A method's Ã.

    Attributes:
        source: where it was read, in words.
        matrix: Ã_ij, what domain j does to loss i, [M, K]; None where only the sums are known.
        sums: its column sums, each row counted as the objective does, [K].
    """

    source: str
    matrix: FloatArray | None
    sums: FloatArray


def acted_on(point: Point) -> ActedOn | None:
    """Return what a method acts on; None if that is nothing, or nothing yet."""
    if point.method in _GIVEN:
        return None
    own = _own_state(point.state)
    if own is None:  # it acts on groups, or is read at a loss
        return _from_weights(point)
    rule: Mapping[str, Any] = own.get("rule") or {}
    read = _READERS.get(point.method)
    if read is not None:
        return read(point, rule)
    if point.method in _REWARDS:
        return _diagonal(point, rule)
    return _from_weights(point)


def row_weights(
    options: Mapping[str, Any], domains: Sequence[str], measured: Sequence[str]
) -> FloatArray:
    """Return how much each measured loss counts in column sums, [M]: 1 each for a plain mean.

    An objective that changes with the losses (``worst``), or that names groups, counts as a
    plain one.
    """
    plain = np.array([1.0 if name in domains else 0.0 for name in measured])
    given = (options.get("objective") or {}).get("weights")
    if not given or not set(given) <= set(measured):
        return plain
    weights = np.array([float(given.get(name, 0.0)) for name in measured])
    return np.asarray(weights / weights.sum() * np.count_nonzero(weights))


def _own_state(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the method's own state inside its controls; None where it acts on groups."""
    while "controller" in state:
        if "groups" in state:
            return None
        state = state["controller"]
    return state


def _of_matrix(point: Point, matrix: FloatArray, source: str) -> ActedOn | None:
    if not np.isfinite(matrix).all() or not matrix.any():
        return None
    rows = row_weights(point.options, point.domains, point.measured)
    return ActedOn(source=source, matrix=matrix, sums=rows @ matrix)


def _on_diagonal(point: Point, values: FloatArray, source: str) -> ActedOn | None:
    matrix = np.zeros((len(point.measured), len(point.domains)))
    for column, (name, value) in enumerate(zip(point.domains, values, strict=True)):
        if name in point.measured:
            matrix[point.measured.index(name), column] = value
    return _of_matrix(point, matrix, source)


def _diagonal(point: Point, rule: Mapping[str, Any]) -> ActedOn | None:
    """Rewards and excess losses: Ã is diagonal, a domain helps itself alone."""
    key = _REWARDS[point.method]
    values = rule.get(key)
    return None if values is None else _on_diagonal(point, point.by_domain(values), f"its {key}")


def _aioli(point: Point, rule: Mapping[str, Any]) -> ActedOn | None:
    """Its own estimate of A, normalised (and smoothed) as its rule takes it."""
    rows = rule.get("smoothed")
    if rows is None:
        return None
    matrix = np.stack([point.by_domain(rows.get(name, {})) for name in point.measured])
    return _of_matrix(point, matrix, "its estimate of A")


def _skillit(point: Point, rule: Mapping[str, Any]) -> ActedOn | None:
    """Ã_ij = L_i times the share of it that domain j takes away, by the graph."""
    graph = read_graph(point.options.get("graph"), point.domains, point.measured)  # [K, M]
    losses = np.ones(len(point.measured))
    if recent := rule.get("recent"):
        losses = np.array(
            [sum(float(one.get(name) or 0.0) for one in recent) for name in point.measured]
        )
    return _of_matrix(point, graph.T * losses[:, None], "its graph times the held-out losses")


def _doge(point: Point, rule: Mapping[str, Any]) -> ActedOn | None:
    """Alignments of the gradients, cut as the rule cuts them: the column sums themselves."""
    every = int(point.options.get("update_every", 1))
    if not point.ledger:
        return None
    last = int(point.ledger[-1]["step"]) // every * every
    rows = [
        point.by_domain(line["gradient_alignment"])
        for line in point.ledger
        if last - every < line["step"] <= last and line.get("gradient_alignment")
    ]
    if not rows:
        return None
    sums = np.clip(np.mean(rows, axis=0), 0.0, float(point.options.get("clip", np.inf)))
    if not np.isfinite(sums).all() or not sums.any():
        return None
    return ActedOn(source="alignments of its gradients", matrix=None, sums=sums)


def _ado(point: Point, rule: Mapping[str, Any]) -> ActedOn | None:
    """The speed at which its laws say that each domain's loss falls, on the diagonal."""
    if point.options.get("r_star") is not None:
        return _from_weights(point)
    laws: Mapping[str, Any] = rule.get("laws") or {}
    if not laws or any(value is None for value in laws["alpha"].values()):
        return None
    alpha, beta = point.by_domain(laws["alpha"]), point.by_domain(laws["beta"])
    own = point.options.get("count") == "own"
    n = point.by_domain(rule["seen"]) if own else np.full(len(alpha), float(rule["seen_in_all"]))
    if (n <= 0).any():
        return None
    speed = np.maximum(alpha, LEAST_ALPHA) * beta * n**-alpha / n
    return _on_diagonal(point, speed, "how fast its laws fall")


def _from_weights(point: Point) -> ActedOn | None:
    """The last move of the weights: log p is raised by Ã's column sums, times eta.

    A constant in them moves no weight and cannot be read; the least is taken as 0.
    """
    drawn = [line for line in point.ledger if line.get("probe") is None and "control" not in line]
    weights = [point.by_domain(line["probability"]) for line in drawn]
    for after, before in zip(reversed(weights), reversed(weights[:-1]), strict=False):
        known = (after > 0) & (before > 0)
        if np.abs(after - before).max() <= 1e-12 or not known.any():
            continue
        moved = np.log(np.where(known, after, 1.0)) - np.log(np.where(known, before, 1.0))
        least = float(moved[known].min())
        sums = np.where(known, moved - least, 0.0)
        if sums.any():
            return ActedOn(source="the last move of its weights", matrix=None, sums=sums)
    return None


_READERS: Final[Mapping[str, Callable[[Point, Mapping[str, Any]], ActedOn | None]]] = {
    "aioli": _aioli,
    "skillit": _skillit,
    "doge": _doge,
    "ado": _ado,
}
