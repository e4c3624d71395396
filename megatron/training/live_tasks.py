"""Evaluation by tasks of the model that trains."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config import Config, resolve_batch
from megatron.engine.runtime import Runtime
from megatron.inference.tasks import TaskSet, examples, numbers
from megatron.training.build import Parts
from megatron.training.frozen import on_first
from megatron.training.inference import crew_of, task_request
from megatron.training.inference_options import run_tokenizer
from megatron.training.milestones import TaskNumbers

_RESAMPLES = 100  # training waits for them


def live_tasks(
    config: Config, runtime: Runtime, parts: Parts
) -> Callable[[], TaskNumbers | None] | None:
    """Return what evaluates the run's model by ``eval_tasks``; None where none are asked for.

    Collective.  The tasks are found and loaded once before training, so that what is misspelt
    or cannot be downloaded ends the run at its start.

    Args:
        config: with ``model.vocab_size`` filled in.
        runtime: ranks and device.
        parts: of the run.

    Raises:
        CheckpointError: a task is not known, or its data is not there.
    """
    if not config.evaluation.eval_tasks:
        return None
    found: list[TaskSet] = []

    def find() -> None:
        tasks = TaskSet(task_request(config, most_resamples=_RESAMPLES))
        tasks.load()
        found.append(tasks)

    on_first(runtime, find)
    tokenizer = run_tokenizer(config, "eval_tasks")
    micro, _, _ = resolve_batch(config.batch, parts.topology.data_size)
    rows = config.evaluation.eval_batch_size or micro
    crew = crew_of(config, runtime, parts.topology, parts.engine, tokenizer, rows=rows)

    def evaluate() -> TaskNumbers | None:
        results = crew.lead(lambda crew: found[0].measure(crew, seed=config.training.seed))
        if results is None:
            return None
        return TaskNumbers(metrics=numbers(results), num_fewshot=examples(results))

    return evaluate
