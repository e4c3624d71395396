"""Whether a run has come to its end, told from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.checkpoint.store import CheckpointStore
from megatron.experiments.study import PlannedRun
from megatron.monitor.jsonl import MIXTURE
from megatron.monitor.report.lines import last_step

NAME = "finished.json"


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What is kept of how a run came to its end.

    Attributes:
        step: its last step.
        seconds: that its processes took, start and validation included; None if nobody
            measured them.
        attempts: how often it was started by the runner that saw its end.
    """

    step: int
    seconds: float | None = None
    attempts: int = 1


def read_finish(run: PlannedRun) -> Finish | None:
    """Return how a run ended; None if it has not ended.

    A run that was started elsewhere (as a job of Slurm, say) has left no note: it has ended if
    there is a checkpoint of its last step.
    """
    path = run.own / NAME
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return Finish(
            step=int(found["step"]),
            seconds=None if found["seconds"] is None else float(found["seconds"]),
            attempts=int(found["attempts"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    store = CheckpointStore(run.config.checkpoint.save_dir)
    if run.steps not in store.steps() or store.verify(store.path(run.steps)):
        return None
    return Finish(step=run.steps) if recorded_step(run) == run.steps else None


def write_finish(run: PlannedRun, finish: Finish) -> None:
    """Note that a run has come to its end.

    Raises:
        RunError: the disk refuses.
    """
    path = run.own / NAME
    with disk_errors(path):
        run.own.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(vars(finish)).encode())


def recorded_step(run: PlannedRun) -> int:
    """Return the last step in a run's ledger, 0 if there is none."""
    return last_step(run.folder / MIXTURE) or 0


def came_to_its_end(run: PlannedRun) -> bool:
    """Tell whether the ledger of a run whose process ended with 0 is whole.

    Where data that is used up may end a run (``on_exhausted: stop``), any step will do.
    """
    step = recorded_step(run)
    early = run.config.mixing.on_exhausted == "stop" and step > 0
    return step >= run.steps or early
