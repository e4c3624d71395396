"""Evaluation by lm-eval's tasks: which ones, how, and what came of it."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, DataError, MissingExtraError, did_you_mean
from megatron.inference.crew import Crew
from megatron.inference.task_seeds import task_seeds

FEWSHOT_SEED = 1234  # lm-eval's own
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """What shall be measured.

    Attributes:
        tasks: names of tasks, groups and tags, or patterns of them.
        include: folders with task files beside lm-eval's own.
        num_fewshot: examples before every question; None leaves it to the task.
        limit: questions per task, or a share of them if below 1; None takes all.
        bootstrap_iters: resamples for standard errors; 0 = none.
    """

    tasks: tuple[str, ...]
    include: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    bootstrap_iters: int = 10_000


class TaskSet:
    """The tasks that a request names, found once and loaded for each evaluation."""

    def __init__(self, request: TaskRequest) -> None:
        """Find the tasks; lm-eval is imported here.

        A name or pattern that fits a task in a folder of the user's own means that one.

        Raises:
            MissingExtraError: lm-eval is not installed.
            ConfigError: a name fits no task, or a folder is not there.
        """
        _count_no_loads()
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError("lm_eval", "eval", "evaluation by tasks") from error
        self.request = request
        for folder in request.include:
            if not Path(folder).is_dir():
                raise ConfigError(f"eval_include_path: {folder} is no folder")
        include = list(request.include) or None
        self._manager: Any = TaskManager(include_path=include, include_defaults=False)
        names, strangers = match(request.tasks, self._manager.all_tasks)
        if strangers:
            own = names
            # lm-eval's own tasks are many thousand files: read only where they are needed.
            self._manager = TaskManager(include_path=include)
            names, strangers = match(strangers, self._manager.all_tasks)
            names = list(dict.fromkeys([*own, *names]))
        if strangers:
            hint = did_you_mean(strangers[0], self._manager.all_tasks)
            raise ConfigError(
                f"eval_tasks: no task of lm-eval is called '{strangers[0]}'{hint}; name a task, "
                "a group, a tag or a pattern, and give folders of your own as eval_include_path"
            )
        self.names = tuple(names)

    def load(self) -> Any:
        """Return the tasks with their data.

        Raises:
            DataError: the data of a task cannot be read or downloaded.
        """
        try:
            loaded = self._manager.load(list(self.names))
        except (OSError, ValueError, KeyError, ImportError) as error:
            shown = ", ".join(self.names[:_MOST_NAMED])
            raise DataError(
                f"eval_tasks: {shown} could not be loaded: {type(error).__name__}: {error}; "
                "a task whose data is downloaded needs a network the first time: fetch it where "
                "there is one (HF_HOME says where it is kept), or use tasks with local files "
                "(docs/evaluation.md)"
            ) from error
        for task in loaded["tasks"].values():
            default = task.get_config("num_fewshot")
            wanted = self.request.num_fewshot
            # A task that says 0 means it, as lm-eval's own command line has it.
            if wanted is not None and default != 0:
                task.set_config(key="num_fewshot", value=wanted)
            elif default is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def measure(self, crew: Crew, *, seed: int) -> dict[str, Any]:
        """Return lm-eval's results; on rank 0, while it leads the crew.

        Args:
            crew: answers.
            seed: of answers that are sampled.

        Raises:
            DataError: the data of a task cannot be read.
            ConfigError: a task asks for what is not offered.
        """
        from lm_eval.evaluator import evaluate

        from megatron.inference.harness import CrewLM

        request = self.request
        limit = request.limit
        with _no_forks(), task_seeds():
            found = evaluate(
                lm=CrewLM(crew, seed=seed),
                task_dict=self.load(),
                limit=limit if limit is None or limit < 1 else int(limit),
                bootstrap_iters=request.bootstrap_iters,
                log_samples=False,
            )
        results: dict[str, Any] = dict(found)
        return results


def match(patterns: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the known names that patterns fit, in order, and the patterns that fit none."""
    names: dict[str, None] = {}
    strangers = []
    for pattern in patterns:
        # A task's file may be named as well.
        found = [pattern] if Path(pattern).is_file() else fnmatch.filter(known, pattern)
        names.update(dict.fromkeys(sorted(found)))
        if not found:
            strangers.append(pattern)
    return list(names), strangers


def numbers(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task and group by name.

    Args:
        results: as lm-eval gives them, with metrics named ``metric,filter``.

    Returns:
        The same under the metric's name, with the filter where it is not ``none``.
    """
    found: dict[str, dict[str, float]] = {}
    for part in ("results", "groups"):
        for task, metrics in (results.get(part) or {}).items():
            found[task] = {
                name.removesuffix(",none"): float(value)
                for name, value in metrics.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
                if "," in name
            }
    return found


def examples(results: Mapping[str, Any]) -> dict[str, int]:
    """Return how many examples stood before every question, of the tasks that had any.

    Args:
        results: as lm-eval gives them.
    """
    shots = results.get("n-shot") or {}
    return {task: int(shots[task]) for task in results.get("results", {}) if shots.get(task)}


@contextmanager
def _no_forks() -> Iterator[None]:
    """Keep lm-eval's bootstrap from forking: a child of a process with threads may hang."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _count_no_loads() -> None:
    """Keep ``datasets`` from telling a counter on the network of each local file that it loads.

    Whoever wants it told sets the library's variable.
    """
    if os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0") != "0":
        return
    config = sys.modules.get("datasets.config")
    if config is not None:  # it has read the variable already
        config.HF_UPDATE_DOWNLOAD_COUNTS = False  # type: ignore[attr-defined]
