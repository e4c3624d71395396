"""``evaluate.py``: a run's checkpoints measured by tasks, and on every domain's held-out data."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.files import remove_tree
from megatron.config import Config, resolve_batch
from megatron.engine.frozen import FrozenModel
from megatron.engine.runtime import Runtime
from megatron.errors import RunError
from megatron.inference.tasks import TaskSet, examples, numbers
from megatron.launch.stop import StopFlag
from megatron.model.domain_loss import DomainLoss
from megatron.monitor.build import chart_sinks
from megatron.monitor.console import task_lines
from megatron.monitor.encode import dumps, named
from megatron.monitor.jsonl import (
    EVALUATIONS,
    average_scalars,
    task_fields,
    validation_fields,
)
from megatron.monitor.record import TaskRecord, ValidationRecord
from megatron.monitor.sink import SinkGroup
from megatron.signals.ledger import Ledger
from megatron.signals.validation import LossObserver, Validation
from megatron.tokenizer import Tokenizer
from megatron.training.build import masked_token
from megatron.training.domains import OpenDomains, average_weights, open_run_domains
from megatron.training.engines import Batch
from megatron.training.frozen import on_first
from megatron.training.held_out import HeldOutUses, contributes
from megatron.training.inference import OpenModel, task_request
from megatron.training.inference_options import (
    Say,
    check_evaluation,
    run_tokenizer,
    saved_steps,
)
from megatron.training.summary import complete

FOLDER = "evaluation"


@dataclass(kw_only=True)
class Measured:
    """What is known of one checkpoint.

    Attributes:
        step: of the checkpoint.
        results: lm-eval's, whole.
        tasks: metrics by task.
        num_fewshot: examples before every question of a task, where there were any.
        averages: over domains, by the names that charts have them by.
        loss: mean nats per token of every domain.
        seconds: that it took.
    """

    step: int
    results: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    num_fewshot: dict[str, int] = field(default_factory=dict)
    averages: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return one line of the table of all checkpoints."""
        return {
            "step": self.step,
            **{f"{t}/{name}": value for t, m in self.tasks.items() for name, value in m.items()},
            **{f"loss/{domain}": value for domain, value in self.loss.items()},
            **{f"perplexity/{domain}": v for domain, v in perplexities(self.loss).items()},
            **self.averages,
        }


def evaluate_run(config: Config, runtime: Runtime, stop: StopFlag, say: Say) -> int:
    """Measure what the configuration asks for; collective.

    Args:
        config: of the run.
        runtime: ranks and device.
        stop: ends the work after a checkpoint.
        say: takes a line for the console, on rank 0.

    Returns:
        The exit code: 0, or the stop flag's.

    Raises:
        NeomixError: the checkpoint, the tasks or the data do not fit.
    """
    check_evaluation(config)
    evaluator = _Evaluator(config, runtime, say)
    try:
        whole = config.evaluation.eval_all_checkpoints
        steps: Sequence[int | None] = [config.checkpoint.iteration]
        if whole:
            steps = on_first(runtime, lambda: saved_steps(config))
            if not steps:
                raise RunError(f"{config.checkpoint.save_dir} holds no checkpoint to evaluate")
        done: list[Measured] = []
        for step in steps:
            done.append(evaluator.measure(step))
            if whole and runtime.rank == 0:
                # Written anew each time: what is measured outlives an interruption.
                _write_table(evaluator.path("eval_checkpoints"), done)
            if any(runtime.gather(stop.requested)) and len(done) < len(steps):
                say("stopped")
                return stop.exit_code
        if runtime.rank == 0:
            if whole:
                say(f"results: {_table_names(evaluator.path('eval_checkpoints'))}")
            else:
                say(f"results: {_write_results(evaluator.path('eval_results'), config, done[0])}")
    finally:
        evaluator.close()
    return 0


class _Evaluator:
    """Holds what serves every checkpoint: the model, the tasks, the data, the sinks."""

    def __init__(self, config: Config, runtime: Runtime, say: Say) -> None:
        self._runtime, self._say = runtime, say
        self._folder = Path(config.run_dir) / FOLDER
        self._date = datetime.now().strftime("%m-%d-%Y-%H-%M-%S")
        self._tokenizer: Tokenizer = run_tokenizer(config, "evaluation")
        self._tasks = _find_tasks(config, runtime)
        self._domains: OpenDomains | None = None
        if config.evaluation.eval_perplexity is not None:
            self._domains = open_run_domains(config)
            config = complete(config, self._domains)
        self._config = config
        self._open = OpenModel.create(
            config,
            runtime,
            rows=config.evaluation.eval_batch_size,
            cache=self._folder / "model",
            say=say,
        )
        sinks = chart_sinks(config.logging, self._folder, 1) if runtime.rank == 0 else []
        self._sinks = SinkGroup(sinks)
        self._sinks.start(None, {"config": config.model_dump(mode="json")})
        self._validation: Validation | None = None
        self._observer: LossObserver | None = None

    def close(self) -> None:
        """Let go of the data and the sinks."""
        self._sinks.close()
        if self._domains is not None:
            self._domains.close()
        if self._runtime.rank == 0 and (self._folder / "model").exists():
            # Whole parameters with their moments, which nobody needs any more.
            remove_tree(self._folder / "model")

    def path(self, kind: str) -> Path:
        """Return where results go: GPT-NeoX's names, with the number of examples if given."""
        evaluation = self._config.evaluation
        shots = evaluation.eval_num_fewshot
        name = f"{kind}_{'' if shots is None else f'{shots}shot_'}{self._date}.json"
        prefix = evaluation.eval_results_prefix
        return Path(f"{prefix}_{name}" if prefix else name)

    def measure(self, step: int | None) -> Measured:
        """Measure one checkpoint; collective."""
        started = time.perf_counter()
        model, step = self._open.load(step)
        measured = Measured(step=step)
        if self._config.evaluation.eval_tasks:
            crew = self._open.crew(model, self._tokenizer)
            tasks, seed = self._tasks, self._config.training.seed
            results = crew.lead(lambda crew: tasks.measure(crew, seed=seed) if tasks else {})
            if results is not None:
                measured.results, measured.tasks = results, numbers(results)
                measured.num_fewshot = examples(results)
        if self._domains is not None:
            measured.loss = self._losses(model, self._domains)
        measured.seconds = time.perf_counter() - started
        if self._runtime.rank == 0:
            self._record(measured)
        return measured

    def _losses(self, model: FrozenModel, domains: OpenDomains) -> dict[str, float]:
        """Return the mean held-out loss of every domain that has such data; collective."""
        config, topology, runtime = self._open.config, self._open.topology, self._runtime
        if self._validation is None or self._observer is None:
            ledger = Ledger(len(domains.names), runtime.device, contributes=contributes(topology))
            self._observer = LossObserver(ledger)
            uses = HeldOutUses(
                config,
                runtime,
                topology,
                Batch(*resolve_batch(config.batch, topology.data_size)),
                domains,
                self._observer,
                masked_token(config, domains),
            )
            test = config.evaluation.eval_perplexity == "test"
            self._validation = uses.test if test else uses.reported
        assert config.model.vocab_size is not None
        loss = DomainLoss(
            topology=topology, vocab_size=config.model.vocab_size, observe=self._observer
        )
        found = self._validation.measure(_Losses(model, loss)).loss
        return {
            name: float(value)
            for name, value in zip(domains.measured, found.tolist(), strict=True)
            if math.isfinite(value)
        }

    def _weights(self, split: str) -> dict[str, float] | None:
        """Return the weights of the weighted averages, as a validation in training has them."""
        assert self._domains is not None
        if given := average_weights(self._config.domains).get(split):
            return given
        return self._open.weights

    def _record(self, measured: Measured) -> None:
        """Tell the console, the charts, and the file that the report reads."""
        record = TaskRecord(
            step=measured.step,
            tasks=measured.tasks,
            num_fewshot=measured.num_fewshot,
            seconds=measured.seconds,
        )
        line: dict[str, Any] = {"step": measured.step}
        if measured.tasks:
            self._sinks.tasks(record)
            line |= task_fields(record)
            for text in task_lines(record):
                self._say(text)
        if measured.loss:
            split = self._config.evaluation.eval_perplexity or "valid"
            losses = ValidationRecord(
                step=measured.step,
                valid_loss=measured.loss,
                weights=self._weights(split),
                split=split,
            )
            self._sinks.validation(losses)
            line |= validation_fields(losses)
            averages = average_scalars(losses)
            measured.averages = averages
            line["perplexity"] = named(perplexities(measured.loss))
            for domain, value in perplexities(measured.loss).items():
                self._say(f"step {measured.step} · {domain}: perplexity {value:.4f} ({split})")
            for name, value in averages.items():
                self._say(f"step {measured.step} · {name}: {value:.4f}")
        _append(Path(self._config.run_dir) / EVALUATIONS, dumps(line))


class _Losses:
    """A frozen model as a validation wants it."""

    def __init__(self, model: FrozenModel, loss: DomainLoss) -> None:
        self._model, self._loss = model, loss

    def evaluate(self, micro_batches: Iterable[tuple[torch.Tensor, Any]], count: int) -> None:
        """Run the model on ``count`` micro-batches of tokens and labels."""
        self._model.evaluate(micro_batches, count, loss_fn=self._loss)


def _find_tasks(config: Config, runtime: Runtime) -> TaskSet | None:
    """Find the tasks on rank 0, and end on all ranks where there are none such."""
    found: list[TaskSet] = []

    def find() -> None:
        tasks = TaskSet(task_request(config))
        tasks.load()
        found.append(tasks)

    if config.evaluation.eval_tasks:
        on_first(runtime, find)
    return found[0] if found else None


def perplexities(losses: Mapping[str, float]) -> dict[str, float]:
    """Return e to the loss of every domain, infinite where that overflows."""
    return {
        name: math.exp(loss) if loss < math.log(1e300) else math.inf
        for name, loss in losses.items()
    }


def _append(path: Path, line: str) -> None:
    """Add a line to a file that nothing is cut from."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def _write_results(path: Path, config: Config, measured: Measured) -> Path:
    """Write one checkpoint's results as lm-eval gives them, with what they are of."""
    content = {
        **measured.results,
        "step": measured.step,
        "numbers": measured.tasks,
        "loss": measured.loss,
        "perplexity": perplexities(measured.loss),
        "averages": measured.averages,
        "run_dir": config.run_dir,
        "seconds": measured.seconds,
    }
    _write(path, json.dumps(content, indent=4, default=str) + "\n")
    return path


def _write_table(path: Path, done: Sequence[Measured]) -> None:
    """Write all checkpoints as JSON, and as CSV beside it."""
    rows = [one.row() for one in done]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    _write(path, json.dumps({"checkpoints": rows}, indent=4) + "\n")
    try:
        with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def _table_names(path: Path) -> str:
    return f"{path} and {path.with_suffix('.csv')}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
