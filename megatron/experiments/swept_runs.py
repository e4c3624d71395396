"""The runs of sweeps at several lengths and sizes, as the laws over these see them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.errors import ConfigError, RunError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.earlier import read_plan
from megatron.experiments.table import Row, read_table

DIGITS: Final = 9
"""Mixtures that agree in so many digits are the same."""


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run of a study, as the laws over steps and sizes see it.

    Attributes:
        name: of the run.
        mixture: its start weights, K.
        size: parameters of its model.
        tokens_per_step: of its global batch.
        points: losses [M] that a run of so many steps would end with, by steps.
        end: its own last step.
        why_ends_alone: why only its end counts, in words; None: its middle counts, too.
        cut_short: what its end is in the middle of, in words; None: it is an end.
    """

    name: str
    mixture: tuple[float, ...]
    size: float
    tokens_per_step: float
    points: Mapping[int, FloatArray]
    end: int
    why_ends_alone: str | None
    cut_short: str | None


def read_runs(studies: Sequence[Path]) -> tuple[list[SweptRun], tuple[str, ...], tuple[str, ...]]:
    """Return the runs of studies, the domains [K] and what is measured [M].

    A run counts once, in however many studies it is.

    Raises:
        RunError: a folder holds no study, or one that does not say what is needed.
        ConfigError: the studies mix different domains.
    """
    found: dict[str, SweptRun] = {}
    domains: tuple[str, ...] | None = None
    measured: tuple[str, ...] | None = None
    for study in studies:
        plan = read_plan(study)
        own = tuple(plan["domain_tokens"])
        if domains is not None and set(own) != set(domains):
            raise ConfigError(
                f"{study} mixes {', '.join(own)}, and {studies[0]} {', '.join(domains)}; a law "
                "needs studies of the same domains"
            )
        domains = domains or own
        by_key: dict[str, list[Row]] = defaultdict(list)
        for row in read_table(study):
            if row["split"] == "valid":
                by_key[row["key"]].append(row)
        for planned in plan["runs"]:
            if planned["method"] != "static" or planned["key"] in found:
                continue
            if rows := by_key.get(planned["key"]):
                if measured is None:
                    measured = tuple(dict.fromkeys(row["domain"] for row in rows))
                found[planned["key"]] = _read_run(study, planned, rows, domains, measured)
    if not found:
        raise RunError("the studies hold no run on a fixed mixture that has ended; give sweeps")
    assert domains is not None
    assert measured is not None
    return list(found.values()), domains, measured


def _read_run(
    study: Path,
    planned: Mapping[str, Any],
    rows: Sequence[Row],
    domains: Sequence[str],
    measured: Sequence[str],
) -> SweptRun:
    if "parameters" not in planned or "schedule" not in planned:
        raise RunError(
            f"{study}: its plan does not say how large its models are; give the command of the "
            "study again (what is finished is not trained again)"
        )
    by_step: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        by_step[row["step"]][row["domain"]] = row["loss"]
    end = max((row["step"] for row in rows if row["last"]), default=0)
    if set(by_step.get(end, ())) != set(measured):
        raise RunError(
            f"run '{planned['run']}' of {study} has no held-out losses of "
            f"{', '.join(measured)} at its end"
        )
    schedule = planned["schedule"]
    falls = schedule["style"] != "constant"
    first = int(np.ceil(schedule["warmup_steps"]))
    steps = [end] if falls else [step for step in by_step if step > first]
    return SweptRun(
        name=str(planned["run"]),
        mixture=tuple(round(float(planned["weights"][name]), DIGITS) for name in domains),
        size=float(planned["parameters"]),
        tokens_per_step=planned["tokens"] / planned["steps"],
        points={
            step: np.array([by_step[step].get(name, np.nan) for name in measured])
            for step in sorted(steps)
        },
        end=end,
        why_ends_alone=f"their learning rate falls ({schedule['style']})" if falls else None,
        cut_short=f"its {schedule['style']} over {schedule['decay_steps']} steps"
        if falls and schedule["decay_steps"] > end
        else None,
    )
