"""Comparisons on tiny data, whose runs are made up in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from support import runs, studies

from megatron.experiments.compare.league import League, StageStudy, form_league
from megatron.experiments.compare.playing import Played, play
from megatron.experiments.compare.study_file import read_study_file
from megatron.experiments.compare.study_parts import StudyFile
from megatron.experiments.execute import Failure, Outcome
from megatron.experiments.finished import Finish, read_finish, write_finish
from megatron.experiments.study import PlannedRun
from megatron.experiments.table import study_rows

UNIFORM = {"uniform": {"mixing": {"method": "static", "weights": "uniform"}}}
STEPS = 60
BATCH_TOKENS = 128
Losses = Callable[[PlannedRun], Mapping[str, float]]


def study(folder: Path, content: Mapping[str, Any], **changes: Any) -> StudyFile:
    """Write a study file beside a task's configuration, and read it."""
    return read_study_file(write(folder, content, **changes))


def write(folder: Path, content: Mapping[str, Any], **changes: Any) -> Path:
    """Write a study file beside a task's configuration; one task and two seeds by default."""
    if not (folder / "data").exists():
        runs.make_data(folder / "data")
    studies.base(folder, **{"mixing": {"method": "static"}, "train_iters": STEPS, **changes})
    whole = {"seeds": [1, 2], "tasks": {"t": {"configs": "base.yml"}}, **content}
    path = folder / "study.yml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


def league(folder: Path, content: Mapping[str, Any], **changes: Any) -> League:
    """Settle the runs of a study."""
    return form_league(study(folder, content, **changes))


class Pretender:
    """Conducts stages by writing what their runs would have left.

    Args:
        losses: measured at the end of a run, by domain.
        fails: names of runs that fail.
    """

    def __init__(self, losses: Losses, *, fails: tuple[str, ...] = ()) -> None:
        """Start without a stage."""
        self._losses, self._fails = losses, fails
        self.stages: list[list[str]] = []

    def __call__(self, stage: StageStudy) -> Outcome:
        """Finish or fail all runs of a stage."""
        self.stages.append([run.name for run in stage.runs])
        failed = [run for run in stage.distinct if run.name in self._fails]
        done = [run for run in stage.distinct if run.name not in self._fails]
        for run in done:
            if read_finish(run) is None:
                leave(run, self._losses(run))
        return Outcome(
            finished=tuple(done),
            started=(),
            failed=tuple(Failure(run=run, why="exit code 3", attempts=2) for run in failed),
        )


def leave(run: PlannedRun, losses: Mapping[str, float]) -> None:
    """Write the files of a finished run that ends with these losses."""
    run.folder.mkdir(parents=True, exist_ok=True)
    tokens = {name: round(run.tokens // run.steps * p) for name, p in run.weights.items()}
    tokens[next(iter(tokens))] += run.tokens // run.steps - sum(tokens.values())
    mixture = [
        {
            "step": step,
            "probability": dict(run.weights),
            "tokens": tokens,
            "samples": {name: 8 * p for name, p in run.weights.items()},
        }
        for step in range(1, run.steps + 1)
    ]
    start = {name: math.log(120) for name in losses}
    metrics = [
        {"step": 0, "valid_loss": start},
        {"step": run.steps, "loss": 4.0, "tokens_per_second": 1280.0},
        {"step": run.steps, "valid_loss": dict(losses)},
        {"step": run.steps, "test_loss": dict(losses)},
    ]
    for name, lines in (("mixture", mixture), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if run.method in ("doremi", "doge"):
        found = {"mixing": {"weights": {"walk": 0.5, "drift": 0.3, "noise": 0.2}}}
        (run.folder / "mixture.yml").write_text(yaml.safe_dump(found), encoding="utf-8")
    write_finish(run, Finish(step=run.steps, seconds=1.0))


def played(
    settled: League, folder: Path, pretender: Pretender
) -> tuple[Played, list[dict[str, Any]]]:
    """Play a league with made-up runs; return it with the rows of its table.

    A made-up reference leaves no model, so nobody looks for one.
    """
    with mock.patch("megatron.training.check.check_reference_source"):
        outcome = play(settled, folder / "runs", pretender, say=lambda _: None)
    finished = [run for run in outcome.runs if read_finish(run) is not None]
    return outcome, study_rows("study", finished)
