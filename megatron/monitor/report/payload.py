"""The numbers that the page draws, as JSON with as many digits as a pixel needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron.monitor.record import FloatArray
from megatron.monitor.report.load import RunData
from megatron.monitor.report.shell import script_json

MOST_VALIDATIONS = 400


def payload(
    runs: Sequence[RunData],
    groups: Sequence[int],
    against: Sequence[int | None] | None = None,
) -> str:
    """Return the page's data as JSON that is safe inside a script element.

    Args:
        runs: the runs.
        groups: index of the group of each.
        against: the run that each is subtracted from, if they are compared.
    """
    domains = domain_order(runs)
    data = {
        "domains": domains,
        "runs": [_run(run, group, domains) for run, group in zip(runs, groups, strict=True)],
        "against": list(against) if against is not None else [None] * len(runs),
    }
    return script_json(data)


def domain_order(runs: Sequence[RunData]) -> list[str]:
    """Return all domains: in their own order if few, else by falling tokens of all runs."""
    tokens: dict[str, float] = {}
    for run in runs:
        for name, count in zip(run.ledger.domains, run.ledger.tokens, strict=True):
            tokens[name] = tokens.get(name, 0.0) + float(count)
    if len(tokens) <= 12:
        return list(tokens)
    return sorted(tokens, key=lambda name: -tokens[name])


def _run(run: RunData, group: int, domains: Sequence[str]) -> dict[str, Any]:
    ledger = run.ledger
    index = {name: k for k, name in enumerate(ledger.domains)}
    bounds = np.searchsorted(ledger.steps, ledger.edges, side="right")
    starts = np.concatenate([[0], bounds[:-1]])
    totals = np.cumsum(ledger.step_tokens)
    mean, low, high = _loss_bins(run, starts, bounds)
    natural = run.natural_weights()

    def columns(matrix: FloatArray | None) -> list[Any] | None:
        if matrix is None:
            return None
        return [numbers(matrix[:, index[d]]) if d in index else None for d in domains]

    valid = thin(run.validations)
    return {
        "name": run.name,
        "group": group,
        "width": ledger.width,
        "steps": ledger.edges.tolist(),
        "tokens": numbers(totals[bounds - 1], 8),
        "loss": numbers(mean),
        "low": numbers(low),
        "high": numbers(high),
        "probability": columns(ledger.probability),
        "controller": columns(ledger.controller),
        "weighed": columns(ledger.weighed),
        "share": columns(ledger.share),
        "train": columns(ledger.loss),
        "epochs": columns(ledger.epochs),
        "natural": None
        if natural is None
        else [number(natural[index[d]]) if d in index else None for d in domains],
        "uniform": 1 / max(1, len(ledger.domains)),
        "valid": {
            "steps": [v.step for v in valid],
            "tokens": numbers(np.array([v.tokens for v in valid]), 8),
            "mean": [number(v.average()) for v in valid],
            "loss": [[number(v.loss.get(d, math.nan)) for v in valid] for d in domains],
        },
        "metrics": {
            "steps": run.metric_steps.astype(np.int64).tolist(),
            "tokens": numbers(
                np.interp(run.metric_steps, ledger.steps.astype(np.float64), totals), 8
            ),
            **{name: numbers(values) for name, values in run.metrics.items()},
        },
    }


def _loss_bins(run: RunData, starts: Any, bounds: Any) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return token-weighted mean, lowest and highest step loss of every bin, each ``[N]``."""
    ledger = run.ledger
    known = np.isfinite(ledger.step_loss)
    weight = np.where(known, ledger.step_tokens, 0.0)
    total = np.add.reduceat(np.where(known, ledger.step_loss, 0.0) * weight, starts)
    weights = np.add.reduceat(weight, starts)
    mean = np.divide(total, weights, out=np.full_like(total, np.nan), where=weights > 0)
    low = np.minimum.reduceat(np.where(known, ledger.step_loss, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, ledger.step_loss, -np.inf), starts)
    return mean, low, high


def thin(records: Sequence[Any]) -> list[Any]:
    """Return at most ``MOST_VALIDATIONS`` records, evenly chosen, the first and last among them."""
    if len(records) <= MOST_VALIDATIONS:
        return list(records)
    chosen = np.linspace(0, len(records) - 1, MOST_VALIDATIONS).round().astype(int)
    return [records[i] for i in chosen]


def number(value: float, digits: int = 5) -> float | None:
    """Return ``value`` rounded to ``digits`` significant digits, ``None`` if not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def numbers(values: FloatArray, digits: int = 5) -> list[float | None]:
    """Return a vector for JSON."""
    return [number(value, digits) for value in values.tolist()]
