"""From runs to laws of gains: one for each task, model size and selector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from megatron.errors import DataError
from megatron.selection.budget_runs import UNTRAINED, Run
from megatron.selection.cost_model import read_number, size_name, sized_model
from megatron.selection.gain_fit import FitOptions, fit_gain
from megatron.selection.gains import Gain, Gains

_SAME_SIZE: Final = 0.02
_STRIDE: Final = 1_000_003


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """What is asked of a fit.

    Attributes:
        options: of every law.
        compute: see :class:`~megatron.selection.gains.Gains`.
        unit: of the performance.
        ceilings: P̄ by size; under None for all sizes.
        corpus_tokens: of everything that could be trained on, from which C_total follows where
            the runs do not say it.
    """

    options: FitOptions
    compute: str = "training"
    unit: str = "performance"
    ceilings: Mapping[float | None, float] | None = None
    corpus_tokens: float | None = None


def fit_runs(runs: Sequence[Run], request: FitRequest) -> Gains:
    """Fit every task, size and method for itself.

    What cannot be fitted is left out with its reason.

    Raises:
        DataError: nothing can be fitted.
        MissingExtraError: scipy is not installed.
    """
    fitted: list[Gain] = []
    left_out: dict[str, str] = {}
    for (task, size), mine in _groups(runs).items():
        total = total_flops(mine, size, request.corpus_tokens)
        for method in dict.fromkeys(run.method for run in mine if run.method != UNTRAINED):
            chosen = [run for run in mine if run.method in (method, UNTRAINED)]
            # Laws are drawn independently: those of two selectors share no runs.
            number = len(fitted) + len(left_out)
            own = replace(request.options, seed=request.options.seed + _STRIDE * number)
            try:
                fitted.append(
                    _fit(chosen, task, method, size, total, replace(request, options=own))
                )
            except DataError as error:
                left_out[f"{task}, {size_name(size)}, {method}"] = str(error)
    if not fitted:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise DataError(f"no law can be fitted. {reasons or 'There are no runs that trained.'}")
    return Gains(
        gains=tuple(fitted),
        compute=request.compute,
        better=request.options.better,
        unit=request.unit,
        confidence=request.options.confidence,
        intervals=request.options.intervals,
        left_out=left_out,
    )


def total_flops(runs: Sequence[Run], size: float, corpus_tokens: float | None) -> float:
    """Return C_total of one task and size.

    As the runs say it, else of the corpus' tokens at 6 a parameter, else the most that a run has
    trained for.

    Raises:
        DataError: the runs contradict each other, or none has trained.
    """
    said = {run.total for run in runs if run.total is not None}
    if len(said) > 1:
        first, second = sorted(said)[:2]
        raise DataError(
            f"the runs of {size_name(size)} name two totals, {first:.6g} and {second:.6g} FLOPs; "
            "total_flops is what training this model on the whole corpus takes: give one"
        )
    if said:
        return said.pop()
    if corpus_tokens is not None:
        return sized_model(size).training(corpus_tokens)
    most = max(run.training for run in runs)
    if most <= 0:
        raise DataError(f"no run of {size_name(size)} has trained; a law needs compute above 0")
    return most


def read_ceilings(texts: Sequence[str]) -> dict[float | None, float]:
    """Read ``0.6`` for all sizes, or ``7B=0.55`` for one.

    Raises:
        DataError: a text is neither.
    """
    found: dict[float | None, float] = {}
    for text in texts:
        for part in text.split(","):
            size, is_pair, value = part.rpartition("=")
            try:
                number = float(value)
            except ValueError:
                raise DataError(
                    f"--ceiling {part}: write a number, or SIZE=NUMBER such as 7B=0.55"
                ) from None
            found[read_number(size, "--ceiling: a size") if is_pair else None] = number
    return found


def _groups(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """Return the runs by task and size; sizes within a few per cent, such as names say, are one."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        near = (
            key for key in found if key[0] == run.task and abs(key[1] / run.size - 1) < _SAME_SIZE
        )
        key = next(near, (run.task, run.size))
        found.setdefault(key, []).append(run)
    return found


def _fit(
    runs: Sequence[Run], task: str, method: str, size: float, total: float, request: FitRequest
) -> Gain:
    own = [run for run in runs if run.method == method]
    options = replace(request.options, ceiling=_ceiling(runs, size, request))
    flops = np.array([run.flops if request.compute == "total" else run.training for run in runs])
    found = fit_gain(flops, np.array([run.performance for run in runs]), total, options)
    return Gain(
        task=task,
        method=method,
        size=size,
        law=found.law,
        low=found.low,
        high=found.high,
        draws=found.draws,
        total=total,
        choosing=float(np.mean([run.choosing for run in own])),
        flops=found.flops,
        performance=found.performance,
        r2=found.r2,
        rmse=found.rmse,
        fixed=found.fixed,
    )


def _ceiling(runs: Sequence[Run], size: float, request: FitRequest) -> float | None:
    given = request.ceilings or {}
    for known, value in given.items():
        if known is not None and abs(known / size - 1) < _SAME_SIZE:
            return value
    if None in given:
        return given[None]
    said = {run.ceiling for run in runs if run.ceiling is not None}
    if len(said) > 1:
        raise DataError(
            f"the runs of {size_name(size)} name two ceilings, {min(said):g} and {max(said):g}; "
            "a model has one on a task"
        )
    return said.pop() if said else None
