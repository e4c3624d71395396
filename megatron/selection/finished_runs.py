"""Finished runs of ``train.py`` as rows of performance against compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
from megatron.config import load_config
from megatron.errors import DataError, did_you_mean
from megatron.model.accounting import parameter_count, training_flops
from megatron.model.spec import ModelSpec
from megatron.monitor.jsonl import METRICS, MIXTURE
from megatron.monitor.report.load import RunData, load_runs
from megatron.monitor.report.measured import Validation
from megatron.selection.budget_runs import UNTRAINED, Run

LOSS: Final = "loss"
SELECTION: Final = ".selection.json"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """How a run's documents were chosen.

    Attributes:
        method: "ppl-low", say; ``random`` of data that nobody chose from.
        flops: that all its tables of scores have cost; one that several domains share counts once.
    """

    method: str
    flops: float


def read_finished(
    folders: Sequence[Path], *, measure: str = LOSS, task: str = "target"
) -> list[Run]:
    """Return a row for every finished run, and one for each model before its first step.

    Training is priced by the run's own architecture; choosing by what ``select`` has noted beside
    the domains that the run trained on.

    Args:
        folders: of runs, or of folders of runs.
        measure: ``loss``: mean over the held-out domains at the end (of the test part where there
            is one); ``loss/DOMAIN``: of one; ``TASK/METRIC`` of an evaluation by tasks.
        task: name that the rows get.

    Raises:
        DataError: no run is found, or one has no such measure.
        RunError: a run's files cannot be read.
    """
    places = [place for folder in folders for place in _run_folders(folder)]
    rows: list[Run] = []
    untrained: dict[int, list[Run]] = {}
    for run in load_runs(places):
        spec = _spec(run)
        size = parameter_count(spec)
        chosen = chosen_of(run.config)
        rows.append(
            Run(
                method=chosen.method,
                task=task,
                size=float(size),
                performance=_measured(run, measure),
                training=training_flops(spec, float(run.ledger.tokens.sum())),
                choosing=chosen.flops,
                seed=run.seed,
                source=str(run.path),
            )
        )
        before = _before(run, measure, task, float(size))
        if before is not None:
            untrained.setdefault(size, []).append(before)
    return rows + [row for mine in untrained.values() for row in mine[:1]]


def chosen_of(config: Mapping[str, Any]) -> Chosen:
    """Return how the documents of a run's domains were chosen, and what that has cost.

    Args:
        config: of the run, as its folder has it.
    """
    found: dict[str, Mapping[str, Any]] = {}
    domains = config.get("domains")
    for block in domains.values() if isinstance(domains, dict) else ():
        train = block.get("train") if isinstance(block, dict) else None
        for prefix in [train] if isinstance(train, str) else train or ():
            note = selection_note(Path(str(prefix)))
            if note is not None:
                found.setdefault(json.dumps([note["settings"].get("data"), _name(note)]), note)
    names = sorted({_name(note) for note in found.values()})
    flops = sum(float((note.get("scoring") or {}).get("flops", 0.0)) for note in found.values())
    return Chosen(method="+".join(names) or "random", flops=flops)


def selection_note(prefix: Path) -> Mapping[str, Any] | None:
    """Return what ``select`` has noted beside the token files of a prefix; None if nothing."""
    longest: Path | None = None
    for path in prefix.parent.glob(f"*{SELECTION}") if prefix.parent.is_dir() else ():
        stem = path.name.removesuffix(SELECTION)
        if prefix.name.startswith(stem) and (longest is None or len(path.name) > len(longest.name)):
            longest = path
    if longest is None:
        return None
    try:
        note = json.loads(longest.read_text(encoding="utf-8"))
        note["settings"]["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{longest}: cannot be read as a choice of documents ({error}); choose them again"
        ) from None
    return dict(note)


def _name(note: Mapping[str, Any]) -> str:
    settings = note["settings"]
    order = settings.get("order", "top")
    return str(settings["method"]) + ("" if order == "top" else f"-{order}")


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give folders of finished runs")
    if (folder / METRICS).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    found = [path for path in inside if (path / MIXTURE).is_file()]
    if not found:
        raise DataError(
            f"{folder}: holds no run ({METRICS} and {MIXTURE}), and no folder in it does; give "
            "folders of finished runs"
        )
    return found


def _spec(run: RunData) -> ModelSpec:
    path = run.path / "config.yml"
    if not path.is_file():
        raise DataError(f"{path}: is missing; a run's price follows from its configuration")
    spec = load_config([str(path)]).model
    if spec.vocab_size is None:
        raise DataError(f"{path}: does not say vocab_size; the run has not begun with it")
    return spec


def _measured(run: RunData, measure: str) -> float:
    value = _loss(run, measure) if is_loss(measure) else _task(run, measure)
    if not np.isfinite(value):
        raise DataError(f"{run.path}: {measure} is {value} at its end; leave the run out")
    return value


def is_loss(measure: str) -> bool:
    """Tell whether a measure is a held-out loss."""
    return measure == LOSS or measure.startswith(f"{LOSS}/")


def _task(run: RunData, measure: str) -> float:
    name, _, metric = measure.rpartition("/")
    ends = [one for one in run.tasks if one.step == run.last_step]
    known = {key: value for one in ends for key, value in one.metrics.items()}
    if (name, metric) not in known:
        names = [f"{task}/{kind}" for task, kind in known]
        raise DataError(
            f"{run.path}: {measure} was not measured at step {run.last_step}"
            f"{did_you_mean(measure, names)} (measured there: {', '.join(names) or 'no task'})"
        )
    return float(known[name, metric])


def _loss(run: RunData, measure: str) -> float:
    for part in (run.tests, run.validations):
        ends = [one for one in part if one.step == run.last_step]
        if ends:
            return _of(ends[-1], measure, run)
    raise DataError(
        f"{run.path}: no held-out loss was measured at its end, step {run.last_step}; let the run "
        "come to its end, or evaluate it"
    )


def _of(validation: Validation, measure: str, run: RunData) -> float:
    if measure == LOSS:
        return validation.average()
    domain = measure.partition("/")[2]
    if domain not in validation.loss:
        raise DataError(
            f"{run.path}: no loss of '{domain}' was measured"
            f"{did_you_mean(domain, validation.loss)} (measured: {', '.join(validation.loss)})"
        )
    return validation.loss[domain]


def _before(run: RunData, measure: str, task: str, size: float) -> Run | None:
    """Return the row of the model before its first step, where its loss was measured."""
    first = [one for one in run.validations if one.step == 0]
    # A test part is measured at the end alone, and is another text.
    if not is_loss(measure) or not first or any(one.step == run.last_step for one in run.tests):
        return None
    return Run(
        method=UNTRAINED,
        task=task,
        size=size,
        performance=_of(first[0], measure, run),
        training=0.0,
        source=f"{run.path}, before its first step",
    )
