"""The losses that a longer or larger run would end with, from the runs of several studies.

Data Mixing Laws (arXiv 2403.16952), section 4: the runs of every mixture are carried to the
target's steps and size by power laws; the mixing law is fitted to what these predict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.runs_array import RunsArray
from megatron.experiments.step_law import Curve, nested_losses
from megatron.experiments.swept_runs import DIGITS, SweptRun


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """What the laws over steps and sizes have made of the runs.

    Attributes:
        runs: one for each mixture: its losses at the target.
        steps: of the target.
        size: of the target.
        steps_seen: at which losses were measured, smallest model first.
        sizes_seen: that were trained.
        step_r2: least R² of a law over steps; None where none was needed.
        size_r2: least R² of a law over sizes; None where none was needed.
        step_error: mean distance from what was measured at the most steps to what the law of
            the fewer predicts, nats per token; None where there are too few.
        size_error: the same of the largest size.
    """

    runs: RunsArray
    steps: int
    size: float
    steps_seen: tuple[tuple[int, ...], ...]
    sizes_seen: tuple[float, ...]
    step_r2: float | None
    size_r2: float | None
    step_error: float | None
    size_error: float | None


def carry(
    runs: Sequence[SweptRun],
    domains: tuple[str, ...],
    measured: tuple[str, ...],
    *,
    steps: int | None = None,
    size: float | None = None,
    shared_exponent: bool = True,
) -> Carried:
    """Carry every mixture's losses, averaged over seeds, to the target.

    Args:
        runs: of all studies.
        domains: that they train on.
        measured: names of the losses.
        steps: of the target; None: the most that every size was measured at.
        size: of the target, parameters; None: the only one.
        shared_exponent: one exponent for all mixtures.

    Raises:
        ConfigError: the runs do not allow it.
        MissingExtraError: scipy is not installed.
    """
    curves = _curves(runs)
    sizes = tuple(sorted({curve.size for curve in curves}))
    target_size = _target_size(sizes, size)
    seen = {size: _steps_of(curves, size) for size in sizes}
    target = _target_steps(seen, steps)
    _check_steps(runs, seen, target)
    found = nested_losses(curves, steps=target, size=target_size, shared_exponent=shared_exponent)
    per_step = max(run.tokens_per_step for run in runs)
    return Carried(
        runs=RunsArray(
            runs=tuple(f"mixture {number}" for number in range(len(found.mixtures))),
            domains=domains,
            measured=measured,
            mixtures=found.mixtures,
            losses=found.losses,
            tokens=np.full(len(found.mixtures), target * per_step),
        ),
        steps=target,
        size=target_size,
        steps_seen=tuple(seen[size] for size in sizes),
        sizes_seen=sizes,
        step_r2=found.step_r2,
        size_r2=found.size_r2,
        step_error=_step_error(curves, seen, shared_exponent) if found.step_r2 else None,
        size_error=_size_error(curves, sizes, target, shared_exponent) if found.size_r2 else None,
    )


def carried_facts(carried: Carried | None) -> dict[str, Any]:
    """Return how the losses were carried, JSON-able; nothing if they were not."""
    if carried is None:
        return {}
    kept = {name: value for name, value in vars(carried).items() if name != "runs"}
    return {"carried": kept}


def carried_text(facts: Mapping[str, Any] | None) -> list[str]:
    """Return Markdown lines that say how the losses were carried."""
    if facts is None:
        return []
    lines = [
        "",
        f"The law is of runs of {facts['steps']:,} steps with {facts['size']:,.0f} parameters.",
    ]
    seen = "; ".join(_numbers(steps) for steps in facts["steps_seen"])
    for what, kind, where in (
        ("steps", "step", seen),
        ("sizes", "size", _numbers(facts["sizes_seen"])),
    ):
        if facts[f"{kind}_r2"] is None:
            lines.append(f"Nothing was extrapolated over {what}: it was measured there.")
            continue
        error = facts[f"{kind}_error"]
        checked = (
            "too few to check it on the largest"
            if error is None
            else f"predicted from the others, the largest is missed by {error:.4f} nats on average"
        )
        lines.append(
            f"Extrapolated over {what} from {where}: least R² of a mixture's power law "
            f"{facts[f'{kind}_r2']:.4f}; {checked}."
        )
    if facts["step_r2"] is not None or facts["size_r2"] is not None:
        lines.append(
            "The intervals above are of the mixing law alone; the extrapolation's error is not in "
            "them."
        )
    return lines


def _curves(runs: Sequence[SweptRun]) -> list[Curve]:
    """Return one curve for every mixture and size, at the steps that all of that size have."""
    together: dict[float, dict[tuple[float, ...], dict[int, list[FloatArray]]]] = {}
    for run in runs:
        mine = together.setdefault(run.size, {}).setdefault(run.mixture, defaultdict(list))
        for step, losses in run.points.items():
            mine[step].append(losses)
    curves = []
    for size, by_mixture in together.items():
        common = sorted(set.intersection(*(set(points) for points in by_mixture.values())))
        if not common:
            raise ConfigError(
                f"the mixtures that were trained with {size:,.0f} parameters have no number of "
                "steps in common; sweep the same mixtures (--design, --points, --design-seed) at "
                "every length"
            )
        for mixture, points in by_mixture.items():
            losses = np.array([np.mean(points[step], axis=0) for step in common])
            curves.append(
                Curve(
                    mixture=np.array(mixture),
                    size=size,
                    steps=np.array(common, dtype=np.float64),
                    losses=losses,
                )
            )
    return curves


def _steps_of(curves: Sequence[Curve], size: float) -> tuple[int, ...]:
    steps = next(curve.steps for curve in curves if curve.size == size)
    return tuple(int(step) for step in steps)


def _target_size(sizes: Sequence[float], size: float | None) -> float:
    if size is not None and not size > 0:
        raise ConfigError(f"--at-size is {size}; give a number of parameters above 0")
    if size is None and len(sizes) > 1:
        raise ConfigError(
            f"the studies trained models of {_numbers(sizes)} parameters; say for which size the "
            "law is wanted (--at-size)"
        )
    return sizes[0] if size is None else size


def _target_steps(seen: Mapping[float, Sequence[int]], steps: int | None) -> int:
    if steps is not None and steps < 1:
        raise ConfigError(f"--at-steps is {steps}; give a number from 1 on")
    if steps is not None:
        return steps
    common = set.intersection(*(set(each) for each in seen.values()))
    ends = {max(each) for each in seen.values()}
    if len(ends) > 1 or not common:
        raise ConfigError(
            f"the studies' runs end at {_numbers(sorted(ends))} steps; say at how many the law is "
            "wanted (--at-steps)"
        )
    return max(common)


def _check_steps(
    runs: Sequence[SweptRun], seen: Mapping[float, Sequence[int]], target: int
) -> None:
    """Refuse a law over steps where the runs cannot give one, saying why."""
    for size, steps in seen.items():
        if target in steps:
            continue
        mine = [run for run in runs if run.size == size]
        for run in mine:
            if run.cut_short is not None:
                raise ConfigError(
                    f"run '{run.name}' ends at step {run.end}, in the middle of {run.cut_short}, "
                    "so that its loss says nothing of other lengths; let the fall end with the "
                    "run (leave lr_decay_iters out), or train at a constant rate"
                )
        if len(steps) >= 3:
            continue
        why = mine[0].why_ends_alone
        alone = f" ({why}, so that only their ends count)" if why else ""
        raise ConfigError(
            f"the runs of {size:,.0f} parameters give losses at {_numbers(steps)} steps alone"
            f"{alone}; a law over steps needs three. Sweep the same mixtures with other "
            "train_iters too and give all of these studies, or train at a constant rate "
            "(lr_decay_style: constant) with a smaller eval_interval"
        )


def _step_error(
    curves: Sequence[Curve], seen: Mapping[float, Sequence[int]], shared: bool
) -> float | None:
    """Predict what was measured at each size's most steps from the fewer; mean |error|."""
    errors = []
    for size, steps in seen.items():
        mine = [curve for curve in curves if curve.size == size]
        fewer = [
            Curve(mixture=c.mixture, size=size, steps=c.steps[:-1], losses=c.losses[:-1])
            for c in mine
        ]
        try:
            found = nested_losses(fewer, steps=steps[-1], size=size, shared_exponent=shared)
        except ConfigError:
            continue
        truth = np.stack([curve.losses[-1] for curve in mine])
        errors.append(np.abs(found.losses - truth).mean())
    return float(np.mean(errors)) if errors else None


def _size_error(
    curves: Sequence[Curve], sizes: Sequence[float], steps: int, shared: bool
) -> float | None:
    """Predict the largest size from the smaller ones, at the target's steps; mean |error|."""
    largest = [curve for curve in curves if curve.size == sizes[-1]]
    smaller = [curve for curve in curves if curve.size < sizes[-1]]
    try:
        truth = nested_losses(largest, steps=steps, size=sizes[-1], shared_exponent=shared)
        found = nested_losses(smaller, steps=steps, size=sizes[-1], shared_exponent=shared)
    except ConfigError:
        return None
    order = {tuple(row): number for number, row in enumerate(truth.mixtures.round(DIGITS))}
    rows = [order[tuple(row)] for row in found.mixtures.round(DIGITS)]
    return float(np.abs(found.losses - truth.losses[rows]).mean())


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)
